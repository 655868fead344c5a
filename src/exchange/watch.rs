//! A watched folder: files that are put into it are taken in and moved to `taken` or `refused` below it.

use std::{
    collections::HashMap,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::intake::{Intake, IntakeError};
use crate::store::{Actor, StoreError};

/// Folder of files that were taken.
const TAKEN: &str = "taken";
/// Folder of files that were not.
const REFUSED: &str = "refused";

/// A watched folder.
pub struct Watched {
    folder: PathBuf,
    max_file_bytes: u64,
    /// Size and time of files at the last look: a file is taken once it has not changed between two.
    seen: HashMap<PathBuf, (u64, Option<SystemTime>)>,
}

impl Watched {
    /// Watches `folder`, and makes the folders below it.
    ///
    /// # Errors
    /// The folder's name with what the system says.
    pub fn new(folder: &Path, max_file_bytes: u64) -> Result<Self, String> {
        for name in [TAKEN, REFUSED] {
            let below = folder.join(name);
            fs::create_dir_all(&below)
                .map_err(|error| format!("folder `{}` cannot be made: {error}", below.display()))?;
        }
        Ok(Self {
            folder: folder.to_owned(),
            max_file_bytes,
            seen: HashMap::new(),
        })
    }

    fn put_away(&self, path: &Path, below: &str) {
        let Some(name) = path.file_name() else { return };
        let folder = self.folder.join(below);
        let mut to = folder.join(name);
        let mut number = 1;
        while to.exists() {
            to = folder.join(format!("{}.{number}", name.to_string_lossy()));
            number += 1;
        }
        if let Err(error) = fs::rename(path, &to) {
            // Names of files may name patients.
            log::error!("a file of the watched folder could not be moved to `{below}`: {error}");
        }
    }

    /// Looks once; `true` if something was taken.
    ///
    /// # Errors
    /// A folder that cannot be read, in the system's words.
    pub fn look(&mut self, intake: &Intake) -> Result<bool, String> {
        let mut found = HashMap::new();
        let mut any = false;
        let entries = fs::read_dir(&self.folder).map_err(|error| error.to_string())?;
        for entry in entries {
            let entry = entry.map_err(|error| error.to_string())?;
            let path = entry.path();
            let hidden = entry.file_name().to_string_lossy().starts_with('.');
            let meta = match fs::symlink_metadata(&path) {
                Ok(meta) if meta.is_file() && !hidden => meta,
                Ok(_) => continue,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error.to_string()),
            };
            let state = (meta.len(), meta.modified().ok());
            if self.seen.get(&path) != Some(&state) {
                found.insert(path, state);
                continue;
            }
            if meta.len() > self.max_file_bytes {
                log::warn!(
                    "a file of the watched folder is refused: it is larger than {} bytes",
                    self.max_file_bytes
                );
                self.put_away(&path, REFUSED);
                continue;
            }
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                Err(error) => {
                    log::warn!("a file of the watched folder cannot be read: {error}");
                    continue;
                }
            };
            let actor = Actor {
                name: "folder".into(),
                role: "server",
            };
            match intake.take(bytes, None, "folder", &actor) {
                Ok(_) => {
                    any = true;
                    self.put_away(&path, TAKEN);
                }
                // There may be room later, so the file stays.
                Err(IntakeError::Store(error @ (StoreError::Full(_) | StoreError::Failed(_)))) => {
                    found.insert(path, state);
                    log::error!("a file of the watched folder stays there: {error}");
                }
                Err(error) => {
                    log::warn!("a file of the watched folder is refused: {error}");
                    self.put_away(&path, REFUSED);
                }
            }
        }
        self.seen = found;
        Ok(any)
    }
}
