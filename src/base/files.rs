//! Writes files and folders so that a reader meets them whole or not at all.
//!
//! A file is written beside its place, synced to the disk and renamed; a folder likewise, with a
//! marker file written last that lists what belongs to it. A kill or a full disk at any moment
//! leaves the old content, plus at most a temporary entry whose name contains `.tmp-`.
//!
//! This module knows nothing of what it writes.

mod folder;
pub mod hint;
pub mod name;
pub mod nearest;
#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

pub use folder::{
    COMPLETE_MARKER, CompleteMarker, Depth, FileRecord, FolderDamage, FolderWriter, remove_folder,
    remove_leftovers, verify_folder,
};

/// A file or folder that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The disk, or the user's share of it, is full.
    #[error(
        "no space left to write `{}`: {cause}; \
         hint: free disk space or choose another output folder, then start again", .path.display()
    )]
    DiskFull {
        /// What was being written.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// Any other failure while writing.
    #[error("cannot write `{}`: {cause}", .path.display())]
    Write {
        /// What was being written.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// A failure while reading.
    #[error("cannot read `{}`: {cause}", .path.display())]
    Read {
        /// What was being read.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// Something else than a file: read to its end, a pipe or a device may never come to it.
    #[error("cannot read `{}`: it is a {kind}, expected a file{}", .path.display(), if *.kind == "folder" { "; hint: `--images-dir` takes a folder" } else { "; hint: save what it holds as a file first" })]
    NotAFile {
        /// What was named.
        path: PathBuf,
        /// `folder`, `pipe` or `device`.
        kind: &'static str,
    },
    /// A path such as `/` or `..` that has no last name to write under.
    #[error("cannot write `{}`: the path must end in a name", .0.display())]
    NoName(PathBuf),
}

impl FileError {
    /// Wraps a failure to write `path`, recognising a full disk.
    pub fn write(path: &Path, cause: io::Error) -> Self {
        let path = path.to_path_buf();
        if is_disk_full(&cause) {
            Self::DiskFull { path, cause }
        } else {
            Self::Write { path, cause }
        }
    }

    /// Wraps a failure to read `path`.
    pub fn read(path: &Path, cause: io::Error) -> Self {
        Self::Read {
            path: path.to_path_buf(),
            cause,
        }
    }
}

/// Whether `error`, or an error it was made from, says that the disk or the quota is full.
pub fn is_disk_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut link = Some(error);
    while let Some(error) = link {
        if let Some(io_error) = error.downcast_ref::<io::Error>() {
            if matches!(
                io_error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ) {
                return true;
            }
            // `io::Error::other(e)` answers `source()` with the source of `e`, not with `e`.
            if io_error.get_ref().is_some_and(|inner| is_disk_full(inner)) {
                return true;
            }
        }
        if let Some(FileError::DiskFull { .. }) = error.downcast_ref::<FileError>() {
            return true;
        }
        link = error.source();
    }
    false
}

/// Writes `path` in one piece: `write` fills a temporary file `.NAME.tmp-PID.COUNT` beside it,
/// which is flushed, synced to the disk and renamed over `path`.
///
/// The parent folder must exist.
///
/// # Errors
/// [`FileError::DiskFull`], [`FileError::Write`] (also what `write` returned) or
/// [`FileError::NoName`]; the temporary file is removed and the old content of `path` stays.
pub fn write_atomic<F>(path: &Path, write: F) -> Result<(), FileError>
where
    F: FnOnce(&mut dyn Write) -> io::Result<()>,
{
    let name = path
        .file_name()
        .ok_or_else(|| FileError::NoName(path.to_path_buf()))?;
    let mut hidden = OsString::from(".");
    hidden.push(name);
    let temporary = path.with_file_name(temporary_name(&hidden));
    let result = write_and_sync(&temporary, write)
        .and_then(|()| fs::rename(&temporary, path))
        .and_then(|()| sync_folder(parent_of(path)));
    result.map_err(|cause| {
        // After the rename there is nothing to remove, and the first cause is the one to report.
        let _ = fs::remove_file(&temporary);
        FileError::write(path, cause)
    })
}

/// What `path` is, links followed, where that is neither a file nor absent: `folder`, `pipe`, `socket`
/// or `device`.
pub fn other_kind(path: &Path) -> Option<&'static str> {
    let kind = fs::metadata(path).ok()?.file_type();
    if kind.is_file() {
        return None;
    }
    if kind.is_dir() {
        return Some("folder");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return Some("pipe");
        }
        if kind.is_socket() {
            return Some("socket");
        }
    }
    Some("device")
}

/// Refuses what is there and is no file, before something is read that has no end.
///
/// # Errors
/// [`FileError::NotAFile`].
pub fn expect_file(path: &Path) -> Result<(), FileError> {
    match other_kind(path) {
        None => Ok(()),
        Some(kind) => Err(FileError::NotAFile {
            path: path.to_path_buf(),
            kind,
        }),
    }
}

/// Whether two names, links followed, are of one file, pipe or device.
pub fn is_same_file(one: &Path, other: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let number = |path: &Path| fs::metadata(path).map(|data| (data.dev(), data.ino()));
        matches!((number(one), number(other)), (Ok(one), Ok(other)) if one == other)
    }
    #[cfg(not(unix))]
    {
        matches!((fs::canonicalize(one), fs::canonicalize(other)), (Ok(one), Ok(other)) if one == other)
    }
}

/// SHA-256 of bytes, as 64 lower-case hexadecimal digits.
pub fn sha256_bytes(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A size as people write it, in powers of ten with three digits: `812 bytes`, `4.04 MB`, `17.5 GB`.
pub fn size_text(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "kB", "MB", "GB", "TB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = match value {
        _ if unit == 0 => 0,
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$} {}", UNITS[unit])
}

/// SHA-256 of a file's bytes, as 64 lower-case hexadecimal digits; reads in blocks.
///
/// # Errors
/// [`FileError::Read`].
pub fn sha256_file(path: &Path) -> Result<String, FileError> {
    let failed = |cause| FileError::read(path, cause);
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = Sha256::new();
    let mut block = vec![0_u8; 1 << 18];
    loop {
        match file.read(&mut block) {
            Ok(0) => break,
            Ok(count) => hasher.update(&block[..count]),
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(failed(cause)),
        }
    }
    Ok(hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

const TEMPORARY: &str = ".tmp-";
const OLD: &str = ".old-";

fn temporary_name(name: &OsStr) -> OsString {
    suffixed(name, TEMPORARY)
}

/// `NAME` + `infix` + process id + count; the count keeps threads of one process apart.
fn suffixed(name: &OsStr, infix: &str) -> OsString {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let mut result = name.to_os_string();
    result.push(format!("{infix}{}.{count}", std::process::id()));
    result
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn write_and_sync<F>(path: &Path, write: F) -> io::Result<()>
where
    F: FnOnce(&mut dyn Write) -> io::Result<()>,
{
    let mut out = BufWriter::with_capacity(1 << 16, File::create(path)?);
    write(&mut out)?;
    out.flush()?;
    out.get_ref().sync_all()
}

/// Brings a folder's entries, such as a rename, to the disk.
fn sync_folder(folder: &Path) -> io::Result<()> {
    // Only Unix opens a folder as a file; elsewhere the rename itself is all there is.
    if cfg!(unix) {
        File::open(folder)?.sync_all()
    } else {
        Ok(())
    }
}
