//! Films as files: written whole, synchronised, and readable by the owner alone.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use crate::store::StoreError;

/// An error of a file; it names the file, which is an id of ours.
pub(super) fn io_error(path: &Path, error: &io::Error) -> StoreError {
    let text = format!("`{}`: {error}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            StoreError::Full(text)
        }
        _ => StoreError::Failed(text),
    }
}

/// Makes a folder that nobody else can look into.
pub(super) fn private_folder(folder: &Path) -> Result<(), StoreError> {
    let is_new = !folder.exists();
    fs::create_dir_all(folder).map_err(|error| io_error(folder, &error))?;
    #[cfg(unix)]
    if is_new {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
            .map_err(|error| io_error(folder, &error))?;
    }
    #[cfg(not(unix))]
    let _ = is_new;
    Ok(())
}

/// Lets nobody else read a file.
pub(super) fn private_file(path: &Path) -> Result<(), StoreError> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .map_err(|error| io_error(path, &error))?;
    }
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

/// Makes sure that a folder's list of names is on the disk.
fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    #[cfg(unix)]
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| io_error(folder, &error))?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

/// The folder of films.
pub(super) struct Films {
    folder: PathBuf,
}

impl Films {
    pub(super) fn new(folder: PathBuf) -> Result<Self, StoreError> {
        private_folder(&folder)?;
        Ok(Self { folder })
    }

    pub(super) fn path(&self, id: &str) -> PathBuf {
        self.folder.join(id.get(..2).unwrap_or("_")).join(id)
    }

    pub(super) fn write(&self, id: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.path(id);
        let folder = path.parent().unwrap_or(&self.folder);
        if !folder.is_dir() {
            private_folder(folder)?;
            sync_folder(&self.folder)?;
        }
        let part = path.with_extension("part");
        let written = File::create(&part).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
        let written = written.and_then(|()| fs::rename(&part, &path));
        if let Err(error) = written {
            let _ = fs::remove_file(&part);
            return Err(io_error(&path, &error));
        }
        private_file(&path)?;
        sync_folder(folder)
    }

    pub(super) fn read(&self, id: &str) -> Result<Vec<u8>, StoreError> {
        let path = self.path(id);
        fs::read(&path).map_err(|error| io_error(&path, &error))
    }

    /// Removes a film; one that is not there is no error.
    pub(super) fn remove(&self, id: &str) -> Result<(), StoreError> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(&path, &error)),
            _ => Ok(()),
        }
    }

    /// Names of all files.
    pub(super) fn names(&self) -> Result<Vec<PathBuf>, StoreError> {
        let list = |folder: &Path| -> Result<Vec<PathBuf>, StoreError> {
            let entries = fs::read_dir(folder).map_err(|error| io_error(folder, &error))?;
            let paths = entries.map(|entry| entry.map(|entry| entry.path()));
            paths
                .collect::<Result<_, _>>()
                .map_err(|error| io_error(folder, &error))
        };
        let mut names = Vec::new();
        for folder in list(&self.folder)? {
            if folder.is_dir() {
                names.extend(list(&folder)?);
            }
        }
        Ok(names)
    }

    /// Removes files that no record knows: a server ended between the file and the record.
    pub(super) fn remove_leftovers(&self, known: &HashSet<String>) -> Result<(), StoreError> {
        for path in self.names()? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if !known.contains(&*name) {
                fs::remove_file(&path).map_err(|error| io_error(&path, &error))?;
            }
        }
        Ok(())
    }
}
