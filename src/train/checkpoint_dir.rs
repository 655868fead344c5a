//! The `checkpoint-N/` folders of one run: saving, finding the newest whole one, pruning.
//!
//! `N` is the number of finished optimizer steps. The contents of a checkpoint are the caller's
//! business; here it is only written whole, verified and deleted. `best.json` beside the folders
//! names the step with the best validation metric.
//!
//! One process at a time owns a run folder; [`RunLock`] sees to it.

use std::error::Error;
use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::files::{
    Depth, FileError, FolderDamage, FolderWriter, is_disk_full, remove_folder, remove_leftovers,
    verify_folder, write_atomic,
};

const PREFIX: &str = "checkpoint-";
const ABANDONED: &str = "abandoned-checkpoint-";
const BEST_FILE: &str = "best.json";
const LOCK_FILE: &str = ".lock";

/// A run folder or one of its checkpoints cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointDirError {
    /// A file or folder of the run.
    #[error(transparent)]
    File(#[from] FileError),
    /// The disk filled up while a checkpoint was being written.
    #[error(
        "no space left to save `{}`: {cause}; \
         hint: free disk space or keep fewer checkpoints, then resume the run", .path.display()
    )]
    DiskFull {
        /// The checkpoint's folder, which does not exist now unless it did before.
        path: PathBuf,
        /// What the writing closure returned.
        cause: Box<dyn Error + Send + Sync>,
    },
    /// The writing closure failed.
    #[error("cannot save `{}`: {cause}", .path.display())]
    Save {
        /// The checkpoint's folder, which does not exist now unless it did before.
        path: PathBuf,
        /// What the writing closure returned.
        cause: Box<dyn Error + Send + Sync>,
    },
    /// Another process owns the run folder.
    #[error(
        "`{}` is in use by another process that trains there; wait for its end, or choose another \
         output_dir", .0.display()
    )]
    InUse(PathBuf),
    /// `best.json` holds something else.
    #[error(
        "`{}` is damaged: {cause}; hint: delete it, or write the best step into it by hand as \
         `{{\"step\": 100, \"metric\": \"eval_loss\", \"value\": 1.0}}`", .path.display()
    )]
    BadBest {
        /// The file.
        path: PathBuf,
        /// Where it stops making sense.
        cause: serde_json::Error,
    },
}

/// Keeps other processes out of a run folder while it lives.
///
/// The lock is the system's, on the file `.lock`: it ends with the process, however that ends, so a
/// file left by a killed run locks nobody out.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// Takes the folder, which must exist.
    ///
    /// # Errors
    /// [`CheckpointDirError::InUse`], or [`CheckpointDirError::File`] also where the file system
    /// knows no locks.
    pub fn take(run: &Path) -> Result<Self, CheckpointDirError> {
        let path = run.join(LOCK_FILE);
        let failed = |cause| FileError::write(&path, cause);
        let file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(CheckpointDirError::InUse(run.to_path_buf())),
            Err(TryLockError::Error(cause)) => Err(failed(cause).into()),
        }
    }
}

/// The best checkpoint so far: the content of `best.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Finished optimizer steps.
    pub step: u64,
    /// Which metric chose it, such as `eval_loss`.
    pub metric: String,
    /// The metric's value there; a finite number.
    pub value: f64,
}

/// A checkpoint folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Finished optimizer steps.
    pub step: u64,
    /// Its folder.
    pub path: PathBuf,
}

/// A damaged checkpoint that was skipped; displays as a warning that names the folder and the reason.
#[derive(Debug)]
pub struct DamagedCheckpoint {
    /// The folder that was skipped.
    pub checkpoint: Checkpoint,
    /// What is wrong with it.
    pub damage: FolderDamage,
}

impl fmt::Display for DamagedCheckpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.checkpoint.path.display();
        write!(
            f,
            "checkpoint `{path}` is damaged and was passed over: {}",
            self.damage
        )
    }
}

/// Result of a search for a whole checkpoint.
#[derive(Debug)]
pub struct Search {
    /// The newest whole checkpoint, if there is one.
    pub found: Option<Checkpoint>,
    /// Newer ones that are damaged, newest first.
    pub passed_over: Vec<DamagedCheckpoint>,
}

/// The checkpoints of one run folder.
#[derive(Debug, Clone)]
pub struct CheckpointDir {
    run: PathBuf,
}

impl CheckpointDir {
    /// Opens a run folder for writing, creating it if missing, and removes what a killed run left
    /// half written.
    ///
    /// # Errors
    /// [`CheckpointDirError::File`].
    pub fn open(run: &Path) -> Result<Self, CheckpointDirError> {
        fs::create_dir_all(run).map_err(|cause| FileError::write(run, cause))?;
        remove_leftovers(run, |name| step_of(name).is_some() || name == BEST_FILE)?;
        Ok(Self {
            run: run.to_path_buf(),
        })
    }

    /// Looks at a run folder without changing anything in it, for readers such as inference.
    pub fn view(run: &Path) -> Self {
        Self {
            run: run.to_path_buf(),
        }
    }

    /// Path of the checkpoint of `step`, whether it exists or not.
    pub fn path(&self, step: u64) -> PathBuf {
        self.run.join(format!("{PREFIX}{step}"))
    }

    /// Saves the checkpoint of `step`: `write` fills the folder it is given, and the checkpoint
    /// appears only once all of it is on the disk. One that already exists is replaced.
    ///
    /// # Errors
    /// [`CheckpointDirError::DiskFull`], [`CheckpointDirError::Save`] with the error of `write`, or
    /// [`CheckpointDirError::File`]. Nothing half written stays.
    pub fn save<E>(
        &self,
        step: u64,
        write: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<Checkpoint, CheckpointDirError>
    where
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        let path = self.path(step);
        let folder = FolderWriter::new(&path)?;
        if let Err(cause) = write(folder.path()) {
            let (path, cause) = (path, cause.into());
            return Err(if is_disk_full(cause.as_ref()) {
                CheckpointDirError::DiskFull { path, cause }
            } else {
                CheckpointDirError::Save { path, cause }
            });
        }
        folder.finish()?;
        Ok(Checkpoint { step, path })
    }

    /// All checkpoint folders, whole or not, by rising step; none if the run folder is missing.
    ///
    /// # Errors
    /// [`CheckpointDirError::File`] if the run folder cannot be listed.
    pub fn list(&self) -> Result<Vec<Checkpoint>, CheckpointDirError> {
        let unreadable = |cause| FileError::read(&self.run, cause);
        let entries = match fs::read_dir(&self.run) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(unreadable)?,
        };
        let mut checkpoints = Vec::new();
        for entry in entries {
            let entry = entry.map_err(unreadable)?;
            let step = entry.file_name().to_str().and_then(step_of);
            if let (Some(step), true) = (step, entry.path().is_dir()) {
                checkpoints.push(Checkpoint {
                    step,
                    path: entry.path(),
                });
            }
        }
        checkpoints.sort_by_key(|checkpoint| checkpoint.step);
        Ok(checkpoints)
    }

    /// Finds the newest checkpoint whose marker, file lengths and hashes all agree.
    ///
    /// # Errors
    /// [`CheckpointDirError::File`] if the run folder cannot be listed; damage is no error.
    pub fn newest_whole(&self) -> Result<Search, CheckpointDirError> {
        self.search(|_| true)
    }

    /// As [`CheckpointDir::newest_whole`], among the checkpoints of fewer than `step` steps: where
    /// to go on when a whole checkpoint is of no use.
    ///
    /// # Errors
    /// As [`CheckpointDir::newest_whole`].
    pub fn newest_whole_before(&self, step: u64) -> Result<Search, CheckpointDirError> {
        self.search(|candidate| candidate < step)
    }

    fn search(&self, admit: impl Fn(u64) -> bool) -> Result<Search, CheckpointDirError> {
        let mut passed_over = Vec::new();
        for checkpoint in self.list()?.into_iter().rev().filter(|c| admit(c.step)) {
            match verify_folder(&checkpoint.path, Depth::Hashes) {
                Ok(_) => {
                    return Ok(Search {
                        found: Some(checkpoint),
                        passed_over,
                    });
                }
                Err(damage) => passed_over.push(DamagedCheckpoint { checkpoint, damage }),
            }
        }
        Ok(Search {
            found: None,
            passed_over,
        })
    }

    /// Records the best checkpoint in `best.json`, in one piece.
    ///
    /// # Errors
    /// [`CheckpointDirError::File`]; the previous record stays.
    pub fn set_best(&self, best: &Best) -> Result<(), CheckpointDirError> {
        write_atomic(&self.run.join(BEST_FILE), |out| {
            serde_json::to_writer_pretty(&mut *out, best)?;
            out.write_all(b"\n")
        })?;
        Ok(())
    }

    /// The recorded best checkpoint; `None` before the first record. The folder is not checked:
    /// [`verify_folder`] on [`CheckpointDir::path`] checks whether it is whole.
    ///
    /// # Errors
    /// [`CheckpointDirError::BadBest`] or [`CheckpointDirError::File`].
    pub fn best(&self) -> Result<Option<Best>, CheckpointDirError> {
        let path = self.run.join(BEST_FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(FileError::read(&path, cause).into()),
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|cause| CheckpointDirError::BadBest { path, cause })
    }

    /// Renames the checkpoints of more than `step` steps to `abandoned-checkpoint-N`, damaged ones
    /// too: a run that goes on from `step` leaves their branch, and what it saves must not be mixed
    /// with them. A best one among them is forgotten. Returns old and new places.
    ///
    /// # Errors
    /// [`CheckpointDirError`].
    pub fn abandon_after(&self, step: u64) -> Result<Vec<(PathBuf, PathBuf)>, CheckpointDirError> {
        let mut moved = Vec::new();
        for checkpoint in self.list()?.into_iter().filter(|one| one.step > step) {
            let name = format!("{ABANDONED}{}", checkpoint.step);
            let place = (1..)
                .map(|number| match number {
                    1 => self.run.join(&name),
                    number => self.run.join(format!("{name}-{number}")),
                })
                .find(|place| place.symlink_metadata().is_err())
                .unwrap_or_else(|| self.run.join(&name));
            fs::rename(&checkpoint.path, &place)
                .map_err(|cause| FileError::write(&place, cause))?;
            moved.push((checkpoint.path, place));
        }
        if self.best()?.is_some_and(|best| best.step > step) {
            let path = self.run.join(BEST_FILE);
            fs::remove_file(&path).map_err(|cause| FileError::write(&path, cause))?;
        }
        Ok(moved)
    }

    /// Deletes all but the last `keep_last` checkpoints (at least one), the best one and that of
    /// step `written`. Returns the deleted ones, oldest first.
    ///
    /// Only checkpoints whose marker and file lengths agree count or are deleted, so a damaged one
    /// never pushes out a good one; damaged ones stay for a person to look at.
    ///
    /// # Errors
    /// [`CheckpointDirError`]; if `best.json` cannot be read, nothing is deleted.
    pub fn prune(
        &self,
        keep_last: usize,
        written: u64,
    ) -> Result<Vec<Checkpoint>, CheckpointDirError> {
        let best = self.best()?.map(|best| best.step);
        let mut whole = self.list()?;
        whole.retain(|checkpoint| verify_folder(&checkpoint.path, Depth::Sizes).is_ok());
        whole.truncate(whole.len().saturating_sub(keep_last.max(1)));
        whole.retain(|checkpoint| Some(checkpoint.step) != best && checkpoint.step != written);
        for checkpoint in &whole {
            remove_folder(&checkpoint.path)?;
        }
        Ok(whole)
    }
}

/// `checkpoint-120` → 120; `None` for every other name, also `checkpoint-0120`.
fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix(PREFIX)?;
    let step: u64 = digits.parse().ok()?;
    (step.to_string() == digits).then_some(step)
}

#[cfg(test)]
mod tests;
