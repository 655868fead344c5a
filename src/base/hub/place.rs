//! Where the files of a download go, and the locks that keep two downloads apart.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::{HubError, listing::Entry};
use crate::base::files::{FileError, sha256_bytes, write_atomic};

/// A folder that is being filled.
#[derive(Debug)]
pub(super) enum Place {
    /// Hugging Face's cache: bytes in `blobs`, links to them in a snapshot.
    HuggingFace {
        /// The cache.
        cache: PathBuf,
        /// `models--OWNER--NAME`.
        repo: PathBuf,
        /// The snapshot's name.
        commit: String,
    },
    /// Files under their own names: ModelScope's cache, or a folder of the user.
    Plain {
        /// The folder.
        folder: PathBuf,
        /// ModelScope's cache, with the name of the model; `None` for a folder of the user.
        cache: Option<(PathBuf, String)>,
    },
}

/// Where one file goes.
#[derive(Debug)]
pub(super) struct Spot {
    /// The bytes that have come.
    pub(super) partial: PathBuf,
    /// All bytes.
    pub(super) whole: PathBuf,
    /// The name that readers use, where it is another.
    link: Option<(PathBuf, PathBuf)>,
    lock: PathBuf,
}

impl Place {
    /// The folder to name to a reader.
    pub(super) fn folder(&self) -> PathBuf {
        match self {
            Self::HuggingFace { repo, commit, .. } => repo.join("snapshots").join(commit),
            Self::Plain { folder, .. } => folder.clone(),
        }
    }

    /// Where a file goes.
    pub(super) fn spot(&self, entry: &Entry) -> Spot {
        let path = &entry.path;
        match self {
            Self::HuggingFace {
                cache,
                repo,
                commit,
            } => {
                let name = match &entry.digest {
                    Some(digest) => digest.text().to_owned(),
                    None => sha256_bytes(format!("{commit}/{path}").as_bytes()),
                };
                let model = repo.file_name().unwrap_or_default();
                // From the link's folder, so that the cache may be moved.
                let up = "../".repeat(path.split('/').count() + 1);
                Spot {
                    partial: repo.join("blobs").join(format!("{name}.incomplete")),
                    whole: repo.join("blobs").join(&name),
                    link: Some((
                        self.folder().join(path),
                        PathBuf::from(format!("{up}blobs/{name}")),
                    )),
                    lock: cache
                        .join(".locks")
                        .join(model)
                        .join(format!("{name}.lock")),
                }
            }
            Self::Plain { folder, cache } => {
                let whole = folder.join(path);
                let mut partial = whole.clone().into_os_string();
                partial.push(".incomplete");
                let lock = match cache {
                    // The lock that ModelScope's tools take.
                    Some((cache, id)) => {
                        let key =
                            format!("modelscope-hub-download-lock-v2\0file\0model\0{id}\0{path}");
                        let name = format!("file_{}.lock", sha256_bytes(key.as_bytes()));
                        cache.join(".lock").join(name)
                    }
                    None => folder.join(LOCKS).join(sha256_bytes(path.as_bytes())),
                };
                Spot {
                    partial: partial.into(),
                    whole,
                    link: None,
                    lock,
                }
            }
        }
    }

    /// Writes the reference of the requested name into the cache; called when all files are there.
    pub(super) fn finish(&self, revision: &str) -> Result<(), HubError> {
        match self {
            Self::HuggingFace { repo, commit, .. } => {
                if revision == commit {
                    return Ok(());
                }
                let path = repo.join("refs").join(revision);
                make_parent(&path)?;
                write_atomic(&path, |out: &mut dyn Write| {
                    out.write_all(commit.as_bytes())
                })?;
            }
            Self::Plain {
                folder,
                cache: None,
            } => {
                let _ = fs::remove_dir_all(folder.join(LOCKS));
            }
            Self::Plain { .. } => {}
        }
        Ok(())
    }
}

/// Folder of the locks inside a folder of the user, for the time of the download.
const LOCKS: &str = ".pull-locks";

impl Spot {
    /// Whether the bytes are there under a name that others read.
    pub(super) fn has_whole(&self, size: Option<u64>) -> bool {
        let data = fs::metadata(&self.whole);
        data.is_ok_and(|data| data.is_file() && size.is_none_or(|size| size == data.len()))
    }

    /// Whether a reader finds the file.
    pub(super) fn is_placed(&self, size: Option<u64>) -> bool {
        let Some((link, _)) = &self.link else {
            return self.has_whole(size);
        };
        let data = fs::metadata(link);
        data.is_ok_and(|data| data.is_file() && size.is_none_or(|size| size == data.len()))
    }

    /// Waits for another download of the same file, after `on_wait`; `None` where the file system has no locks.
    pub(super) fn lock(&self, on_wait: &dyn Fn()) -> Result<Option<File>, HubError> {
        make_parent(&self.lock)?;
        let failed = |cause: io::Error| HubError::Lock {
            path: self.lock.clone(),
            cause,
        };
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&self.lock)
            .map_err(failed)?;
        // Without a lock two downloads may mix their bytes: the hash finds that out.
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => {
                on_wait();
                file.lock().map_err(failed)?;
                Ok(Some(file))
            }
            Err(TryLockError::Error(cause)) if cause.kind() == io::ErrorKind::Unsupported => {
                Ok(None)
            }
            Err(TryLockError::Error(cause)) => Err(failed(cause)),
        }
    }

    /// Gives the bytes that have come their place.
    pub(super) fn take_partial(&self) -> Result<(), HubError> {
        make_parent(&self.whole)?;
        fs::rename(&self.partial, &self.whole)
            .map_err(|cause| FileError::write(&self.whole, cause))?;
        Ok(())
    }

    /// Makes a reader find the bytes.
    pub(super) fn link(&self) -> Result<(), HubError> {
        let Some((link, target)) = &self.link else {
            return Ok(());
        };
        make_parent(link)?;
        let failed = |cause| HubError::from(FileError::write(link, cause));
        let mut aside = link.clone().into_os_string();
        aside.push(format!(".tmp-{}", std::process::id()));
        let aside = PathBuf::from(aside);
        if symlink(target, &aside).is_ok() {
            return fs::rename(&aside, link).map_err(failed);
        }
        // As `huggingface_hub` does where there are no links.
        fs::rename(&self.whole, link).map_err(failed)
    }
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Makes the folder of a file.
pub(super) fn make_parent(path: &Path) -> Result<(), HubError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|cause| FileError::write(parent, cause))?;
    }
    Ok(())
}
