//! Folders that appear whole: written beside their place, with a marker that lists their files, and renamed.

use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    FileError, OLD, TEMPORARY, parent_of, sha256_file, suffixed, sync_folder, temporary_name,
    write_atomic,
};

/// Name of the marker that makes a folder whole; see [`FolderWriter`].
pub const COMPLETE_MARKER: &str = "COMPLETE.json";

/// Layout number written into [`COMPLETE_MARKER`].
const MARKER_FORMAT: u32 = 1;

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
