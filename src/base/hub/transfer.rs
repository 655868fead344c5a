//! One file: what has come is kept and gone on with, and only the listed bytes get the file's name.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use sha1::{Digest as _, Sha1};
use ureq::http::StatusCode;

use super::{
    HubError,
    client::{Attempts, Client, Failure, header},
    listing::{Digest, Entry},
    place::{Spot, make_parent},
};
use crate::base::files::FileError;

/// Times that other bytes than the listed ones may come.
const MAX_DAMAGED: usize = 3;

/// What happens to a file.
#[derive(Debug, Clone)]
pub enum FileEvent {
    /// Bytes came (or, negative, were thrown away).
    Bytes(i64),
    /// Bytes were there before.
    Found(i64),
    /// A request failed and is repeated after a wait.
    Retry {
        /// Why it failed.
        reason: String,
        /// The wait.
        wait: Duration,
    },
    /// Other bytes than the listed ones came; they are deleted and fetched again.
    Damaged {
        /// `size`, `sha256` or `git hash`.
        what: &'static str,
    },
    /// Another process downloads the file.
    Waiting,
    /// A file of the user's folder has other content than the hub's, which replaces it.
    Replaced,
    /// All of it came.
    Done,
}

/// One file of a model.
pub(super) struct Transfer<'a> {
    pub(super) client: &'a Client,
    pub(super) id: &'a str,
    pub(super) url: String,
    pub(super) entry: &'a Entry,
    pub(super) spot: Spot,
    /// Whether files that are there are read and compared, as folders without names by content need.
    pub(super) verifies: bool,
    /// Set when another file of the model failed for good.
    pub(super) stopped: &'a AtomicBool,
}

/// The difference between what came and what is listed.
struct Difference {
    what: &'static str,
    expected: String,
    found: String,
}

impl Transfer<'_> {
    /// Brings the file, unless it is there.
    pub(super) fn run(&self, tell: &dyn Fn(FileEvent)) -> Result<(), HubError> {
        let size = self.entry.size;
        if self.spot.is_placed(size) && !self.verifies {
            tell(FileEvent::Found(size.unwrap_or(0) as i64));
            return Ok(());
        }
        let _lock = self.spot.lock(&|| tell(FileEvent::Waiting))?;
        if self.spot.whole.is_file() {
            let damaged = self.verifies && self.difference(&self.spot.whole)?.is_some();
            if !damaged && self.spot.has_whole(size) {
                self.spot.link()?;
                tell(FileEvent::Found(size.unwrap_or(0) as i64));
                return Ok(());
            }
            if self.verifies {
                tell(FileEvent::Replaced);
            }
        }
        make_parent(&self.spot.partial)?;
        self.fetch_all(tell)?;
        self.spot.take_partial()?;
        self.spot.link()?;
        tell(FileEvent::Done);
        Ok(())
    }

    /// Fills the partial file until it holds the listed bytes.
    fn fetch_all(&self, tell: &dyn Fn(FileEvent)) -> Result<(), HubError> {
        let partial = &self.spot.partial;
        let mut attempts = Attempts::default();
        let mut damaged = 0;
        let mut counted = fs::metadata(partial).map_or(0, |data| data.len()) as i64;
        tell(FileEvent::Found(counted));
        let mut is_whole = false;
        loop {
            let have = fs::metadata(partial).map_or(0, |data| data.len());
            tell(FileEvent::Bytes(have as i64 - counted));
            counted = have as i64;
            let longer = self.entry.size.is_some_and(|size| have >= size);
            if (longer && partial.is_file()) || is_whole {
                let Some(difference) = self.difference(partial)? else {
                    return Ok(());
                };
                fs::remove_file(partial).map_err(|cause| FileError::write(partial, cause))?;
                damaged += 1;
                is_whole = false;
                if damaged == MAX_DAMAGED {
                    return Err(HubError::Checksum {
                        id: self.id.to_owned(),
                        file: self.entry.path.clone(),
                        what: difference.what,
                        expected: difference.expected,
                        found: difference.found,
                        times: damaged,
                    });
                }
                tell(FileEvent::Damaged {
                    what: difference.what,
                });
                continue;
            }
            let (reason, named) = match self.fetch(have, &mut counted, tell)? {
                Ok(()) => {
                    is_whole = true;
                    continue;
                }
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Again { reason, wait }) => (reason, wait),
            };
            if counted > have as i64 {
                attempts.reset();
            }
            let Some(wait) = attempts.next_wait(named) else {
                return Err(HubError::Broken {
                    id: self.id.to_owned(),
                    file: self.entry.path.clone(),
                    reason,
                });
            };
            tell(FileEvent::Retry { reason, wait });
            thread::sleep(wait);
        }
    }

    /// One request: appends what comes after byte `from`. The outer error is one of the disk.
    fn fetch(
        &self,
        from: u64,
        counted: &mut i64,
        tell: &dyn Fn(FileEvent),
    ) -> Result<Result<(), Failure>, HubError> {
        let response = match self.client.file(&self.url, from) {
            Ok(response) => response,
            Err(failure) => return Ok(Err(failure)),
        };
        let failed = |cause| HubError::from(FileError::write(&self.spot.partial, cause));
        let mut options = OpenOptions::new();
        options.create(true).write(true);
        let begins = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                header(response.headers(), "content-range").and_then(|range| {
                    range
                        .strip_prefix("bytes ")?
                        .split('-')
                        .next()?
                        .parse()
                        .ok()
                })
            }
            // What is there is of no use to this server.
            StatusCode::RANGE_NOT_SATISFIABLE => {
                options
                    .truncate(true)
                    .open(&self.spot.partial)
                    .map_err(failed)?;
                tell(FileEvent::Bytes(-*counted));
                *counted = 0;
                return Ok(Err(Failure::Again {
                    reason: "the server has no such range".into(),
                    wait: None,
                }));
            }
            _ => Some(0),
        };
        let mut file = match begins {
            Some(at) if at == from && from > 0 => OpenOptions::new()
                .append(true)
                .open(&self.spot.partial)
                .map_err(failed)?,
            // A server without ranges sends the whole.
            Some(0) => {
                tell(FileEvent::Bytes(-*counted));
                *counted = 0;
                options
                    .truncate(true)
                    .open(&self.spot.partial)
                    .map_err(failed)?
            }
            _ => {
                return Ok(Err(Failure::Again {
                    reason: "the server sent another range than asked for".into(),
                    wait: None,
                }));
            }
        };
        let written = self.copy(response.into_body().into_reader(), &mut file, counted, tell);
        let synced = file.sync_all();
        let ended = written?;
        synced.map_err(failed)?;
        Ok(ended)
    }

    fn copy(
        &self,
        mut body: impl Read,
        file: &mut File,
        counted: &mut i64,
        tell: &dyn Fn(FileEvent),
    ) -> Result<Result<(), Failure>, HubError> {
        let mut block = vec![0; 1 << 18];
        loop {
            let count = match body.read(&mut block) {
                Ok(0) => break,
                Ok(count) => count,
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => continue,
                Err(cause) => {
                    return Ok(Err(Failure::Again {
                        reason: cause.to_string(),
                        wait: None,
                    }));
                }
            };
            if self.stopped.load(Ordering::Relaxed) {
                return Ok(Err(Failure::Final(HubError::Broken {
                    id: self.id.to_owned(),
                    file: self.entry.path.clone(),
                    reason: "another file of the model failed".into(),
                })));
            }
            file.write_all(&block[..count])
                .map_err(|cause| FileError::write(&self.spot.partial, cause))?;
            *counted += count as i64;
            tell(FileEvent::Bytes(count as i64));
            // One block more than listed is enough to know that it is another file.
            if self.entry.size.is_some_and(|size| *counted > size as i64) {
                return Ok(Ok(()));
            }
        }
        match self.entry.size {
            Some(size) if *counted < size as i64 => Ok(Err(Failure::Again {
                reason: format!("the connection ended after {counted} of {size} bytes"),
                wait: None,
            })),
            _ => Ok(Ok(())),
        }
    }

    /// Compares a file with the listing.
    fn difference(&self, path: &Path) -> Result<Option<Difference>, HubError> {
        let data = fs::metadata(path).map_err(|cause| FileError::read(path, cause))?;
        if let Some(size) = self.entry.size.filter(|size| *size != data.len()) {
            return Ok(Some(Difference {
                what: "size",
                expected: size.to_string(),
                found: data.len().to_string(),
            }));
        }
        let (what, expected, found) = match &self.entry.digest {
            None => return Ok(None),
            Some(Digest::Sha256(digits)) => {
                ("sha256", digits, crate::base::files::sha256_file(path)?)
            }
            Some(Digest::Git(digits)) => ("git hash", digits, git_hash(path, data.len())?),
        };
        Ok((found != *expected).then(|| Difference {
            what,
            expected: expected.clone(),
            found,
        }))
    }
}

/// Git's name of a file's content.
fn git_hash(path: &Path, size: u64) -> Result<String, FileError> {
    let failed = |cause| FileError::read(path, cause);
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {size}\0"));
    let mut file = File::open(path).map_err(failed)?;
    io::copy(&mut file, &mut hasher).map_err(failed)?;
    let digits = hasher.finalize();
    Ok(digits.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_has_the_name_that_git_gives_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "hello\n").unwrap();
        // `printf 'hello\n' | git hash-object --stdin`
        assert_eq!(
            git_hash(&path, 6).unwrap(),
            "ce013625030ba8dba906f756967f9e9ca394464a"
        );
    }
}
