//! Writes files and folders so that a reader meets them whole or not at all.
//!
//! A file is written beside its place, synced to the disk and renamed; a folder likewise, with a
//! marker file written last that lists what belongs to it. A kill or a full disk at any moment
//! leaves the old content, plus at most a temporary entry whose name contains `.tmp-`.
//!
//! This module knows nothing of what it writes.

pub mod hint;
pub mod name;
pub mod nearest;
#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Name of the marker that makes a folder whole; see [`FolderWriter`].
pub const COMPLETE_MARKER: &str = "COMPLETE.json";

/// Layout number written into [`COMPLETE_MARKER`].
const MARKER_FORMAT: u32 = 1;

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

/// One file of a whole folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Path below the folder, with `/` between its parts.
    pub name: String,
    /// Length in bytes.
    pub size: u64,
    /// SHA-256, 64 lower-case hexadecimal digits.
    pub sha256: String,
}

/// Content of [`COMPLETE_MARKER`]: every file of the folder but the marker itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompleteMarker {
    /// Layout number of the marker, 1.
    pub format: u32,
    /// The files, sorted by name.
    pub files: Vec<FileRecord>,
}

/// Writes a folder that appears whole: files go into `NAME.tmp-PID.COUNT` beside the target, and
/// [`FolderWriter::finish`] adds [`COMPLETE_MARKER`] and renames it to `NAME`.
///
/// Dropped before `finish`, it removes what it wrote.
#[derive(Debug)]
pub struct FolderWriter {
    target: PathBuf,
    temporary: PathBuf,
    renamed: bool,
}

impl FolderWriter {
    /// Starts writing the folder `target`; its parent is created if missing.
    ///
    /// # Errors
    /// [`FileError`] if the temporary folder cannot be made.
    pub fn new(target: &Path) -> Result<Self, FileError> {
        let name = target
            .file_name()
            .ok_or_else(|| FileError::NoName(target.to_path_buf()))?;
        let temporary = target.with_file_name(temporary_name(name));
        fs::create_dir_all(parent_of(target))
            .and_then(|()| fs::create_dir(&temporary))
            .map_err(|cause| FileError::write(&temporary, cause))?;
        Ok(Self {
            target: target.to_path_buf(),
            temporary,
            renamed: false,
        })
    }

    /// The temporary folder, to write files and folders into.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Makes the folder whole and puts it in place; a folder already there is replaced.
    ///
    /// # Errors
    /// [`FileError`]; a folder already at the target stays as it was.
    pub fn finish(mut self) -> Result<CompleteMarker, FileError> {
        let mut files = Vec::new();
        collect_files(&self.temporary, "", &mut files)?;
        files.retain(|file| file.name != COMPLETE_MARKER);
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let marker = CompleteMarker {
            format: MARKER_FORMAT,
            files,
        };
        // This also syncs the temporary folder's own entries to the disk, before the rename.
        write_atomic(&self.temporary.join(COMPLETE_MARKER), |out| {
            serde_json::to_writer_pretty(&mut *out, &marker)?;
            out.write_all(b"\n")
        })?;
        self.put_in_place()
            .map_err(|cause| FileError::write(&self.target, cause))?;
        Ok(marker)
    }

    fn put_in_place(&mut self) -> io::Result<()> {
        // A folder cannot be renamed over one with content, so the old one steps aside. A kill in
        // between leaves it as `NAME.old-…`, which `remove_leftovers` puts back.
        let aside = if self.target.symlink_metadata().is_ok() {
            let name = self.target.file_name().unwrap_or_default();
            let aside = self.target.with_file_name(suffixed(name, OLD));
            fs::rename(&self.target, &aside)?;
            Some(aside)
        } else {
            None
        };
        if let Err(cause) = fs::rename(&self.temporary, &self.target) {
            if let Some(aside) = aside {
                let _ = fs::rename(aside, &self.target);
            }
            return Err(cause);
        }
        self.renamed = true;
        sync_folder(parent_of(&self.target))?;
        aside.map_or(Ok(()), |aside| remove_entry(&aside))
    }
}

impl Drop for FolderWriter {
    fn drop(&mut self) {
        if !self.renamed {
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Why a folder is not whole.
#[derive(Debug, thiserror::Error)]
pub enum FolderDamage {
    /// The marker is missing: the folder was not written to its end, or not by [`FolderWriter`].
    #[error("`{COMPLETE_MARKER}` is missing")]
    NoMarker,
    /// The marker is not what [`FolderWriter`] writes.
    #[error("`{COMPLETE_MARKER}` is damaged: {0}")]
    BadMarker(String),
    /// A listed file is missing.
    #[error("`{0}` is missing")]
    MissingFile(String),
    /// A listed file has another length.
    #[error("`{name}` has {found} bytes, expected {expected}")]
    Size {
        /// The file.
        name: String,
        /// Length in the marker.
        expected: u64,
        /// Length on the disk.
        found: u64,
    },
    /// A listed file has other bytes.
    #[error("`{name}` has sha256 `{found}`, expected `{expected}`")]
    Hash {
        /// The file.
        name: String,
        /// Hash in the marker.
        expected: String,
        /// Hash of the bytes on the disk.
        found: String,
    },
    /// A file cannot be read at all.
    #[error(transparent)]
    Unreadable(#[from] FileError),
}

/// How closely [`verify_folder`] looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Marker and lengths: no file but the marker is opened.
    Sizes,
    /// Marker, lengths and hashes: every byte is read.
    Hashes,
}

/// Checks a folder against its marker. Files the marker does not list are left out of account.
///
/// # Errors
/// The first [`FolderDamage`] met, in order of file name.
pub fn verify_folder(folder: &Path, depth: Depth) -> Result<CompleteMarker, FolderDamage> {
    let path = folder.join(COMPLETE_MARKER);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            return Err(FolderDamage::NoMarker);
        }
        Err(cause) => return Err(FileError::read(&path, cause).into()),
    };
    let marker: CompleteMarker = serde_json::from_slice(&text)
        .map_err(|cause| FolderDamage::BadMarker(cause.to_string()))?;
    if marker.format != MARKER_FORMAT {
        let found = marker.format;
        let reason = format!("format `{found}`, expected `{MARKER_FORMAT}`");
        return Err(FolderDamage::BadMarker(reason));
    }
    for FileRecord {
        name,
        size: expected,
        sha256,
    } in &marker.files
    {
        let inside = Path::new(name)
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        if !inside {
            return Err(FolderDamage::BadMarker(format!(
                "`{name}` is not inside the folder"
            )));
        }
        let path = folder.join(name);
        let found = match fs::metadata(&path) {
            Ok(data) if data.is_file() => data.len(),
            Ok(_) => return Err(FolderDamage::MissingFile(name.clone())),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                return Err(FolderDamage::MissingFile(name.clone()));
            }
            Err(cause) => return Err(FileError::read(&path, cause).into()),
        };
        let (name, expected) = (name.clone(), *expected);
        if found != expected {
            return Err(FolderDamage::Size {
                name,
                expected,
                found,
            });
        }
        if depth == Depth::Hashes {
            let found = sha256_file(&path)?;
            if found != *sha256 {
                return Err(FolderDamage::Hash {
                    name,
                    expected: sha256.clone(),
                    found,
                });
            }
        }
    }
    Ok(marker)
}

/// Removes a folder so that a kill midway leaves no half of it under its name: it is renamed to a
/// temporary name first.
///
/// # Errors
/// [`FileError::Write`].
pub fn remove_folder(folder: &Path) -> Result<(), FileError> {
    let name = folder
        .file_name()
        .ok_or_else(|| FileError::NoName(folder.to_path_buf()))?;
    let aside = folder.with_file_name(temporary_name(name));
    fs::rename(folder, &aside)
        .and_then(|()| fs::remove_dir_all(&aside))
        .map_err(|cause| FileError::write(folder, cause))
}

/// Clears `folder` of what a killed process left: temporary entries for which `is_ours(NAME)`
/// holds are removed, and a folder that stepped aside and was not replaced is put back.
///
/// To be called only while no other process writes there. Returns the removed paths.
///
/// # Errors
/// [`FileError`] if the folder cannot be listed or an entry cannot be removed.
pub fn remove_leftovers(
    folder: &Path,
    is_ours: impl Fn(&str) -> bool,
) -> Result<Vec<PathBuf>, FileError> {
    let unreadable = |cause| FileError::read(folder, cause);
    let mut removed = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let (path, name) = (entry.path(), entry.file_name());
        let Some(name) = name.to_str() else { continue };
        let temporary = name.rsplit_once(TEMPORARY).map(|(stem, _)| stem);
        let old = name.rsplit_once(OLD).map(|(stem, _)| stem);
        let Some(stem) = temporary.or(old) else {
            continue;
        };
        if !is_ours(stem.strip_prefix('.').unwrap_or(stem)) {
            continue;
        }
        if old.is_some() && !folder.join(stem).exists() {
            let place = folder.join(stem);
            fs::rename(&path, &place).map_err(|cause| FileError::write(&place, cause))?;
            continue;
        }
        remove_entry(&path).map_err(|cause| FileError::write(&path, cause))?;
        removed.push(path);
    }
    removed.sort();
    Ok(removed)
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

fn remove_entry(path: &Path) -> io::Result<()> {
    if path.symlink_metadata()?.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    }
}

/// Lists, hashes and syncs to the disk every file below `folder`, and the folders below it.
fn collect_files(
    folder: &Path,
    prefix: &str,
    files: &mut Vec<FileRecord>,
) -> Result<(), FileError> {
    let unreadable = |cause| FileError::read(folder, cause);
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let path = entry.path();
        let failed = |cause| FileError::write(&path, cause);
        let file_name = entry.file_name();
        let name = file_name.to_str().ok_or_else(|| {
            failed(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the name is not UTF-8",
            ))
        })?;
        let name = format!("{prefix}{name}");
        let data = fs::metadata(&path).map_err(failed)?;
        if data.is_dir() {
            collect_files(&path, &format!("{name}/"), files)?;
            sync_folder(&path).map_err(failed)?;
        } else {
            File::open(&path)
                .and_then(|file| file.sync_all())
                .map_err(failed)?;
            let sha256 = sha256_file(&path)?;
            files.push(FileRecord {
                name,
                size: data.len(),
                sha256,
            });
        }
    }
    Ok(())
}
