//! One file: what has come is kept and gone on with, and only the listed bytes get the file's name.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use sha1::{Digest as _, Sha1};
use sha2::Sha256;
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

/// The hash of what has come, taken while it comes: a file of many gigabytes is not read once more.
struct Running {
    hasher: Hasher,
    /// Bytes it has seen, from the file's beginning on.
    seen: u64,
}

enum Hasher {
    Sha256(Sha256),
    Git(Sha1),
}

impl Running {
    /// For the digest that the hub lists of a file of `size` bytes.
    fn new(digest: &Digest, size: u64) -> Self {
        let hasher = match digest {
            Digest::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Digest::Git(_) => Hasher::Git(Sha1::new_with_prefix(format!("blob {size}\0"))),
        };
        Self { hasher, seen: 0 }
    }

    fn add(&mut self, bytes: &[u8]) {
        match &mut self.hasher {
            Hasher::Sha256(hasher) => hasher.update(bytes),
            Hasher::Git(hasher) => hasher.update(bytes),
        }
        self.seen += bytes.len() as u64;
    }

    /// Adds what the file holds beyond what was seen.
    fn add_file(&mut self, path: &Path) -> Result<(), FileError> {
        let failed = |cause| FileError::read(path, cause);
        let mut file = File::open(path).map_err(failed)?;
        file.seek(SeekFrom::Start(self.seen)).map_err(failed)?;
        let mut block = vec![0; 1 << 18];
        loop {
            match file.read(&mut block) {
                Ok(0) => return Ok(()),
                Ok(count) => self.add(&block[..count]),
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(failed(cause)),
            }
        }
    }

    fn digits(self) -> (&'static str, String) {
        let text = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self.hasher {
            Hasher::Sha256(hasher) => ("sha256", text(&hasher.finalize())),
            Hasher::Git(hasher) => ("git hash", text(&hasher.finalize())),
        }
    }
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
            let damaged = self.verifies && self.difference(&self.spot.whole, None)?.is_some();
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
        let mut running = None;
        loop {
            let have = fs::metadata(partial).map_or(0, |data| data.len());
            tell(FileEvent::Bytes(have as i64 - counted));
            counted = have as i64;
            let longer = self.entry.size.is_some_and(|size| have >= size);
            if (longer && partial.is_file()) || is_whole {
                let Some(difference) = self.difference(partial, running.take())? else {
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
            if running.is_none() {
                running = self.hash_from_the_start();
            }
            if let Some(running) = &mut running
                && running.seen < have
            {
                running.add_file(partial)?;
            }
            let (reason, named) = match self.fetch(have, &mut counted, &mut running, tell)? {
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
        running: &mut Option<Running>,
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
                (*counted, *running) = (0, None);
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
                (*counted, *running) = (0, self.hash_from_the_start());
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
        let body = response.into_body().into_reader();
        let written = self.copy(body, &mut file, counted, running, tell);
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
        running: &mut Option<Running>,
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
            if let Some(running) = running {
                running.add(&block[..count]);
            }
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

    /// A hash that has seen nothing; `None` where the hub lists none.
    fn hash_from_the_start(&self) -> Option<Running> {
        let Entry { size, digest, .. } = self.entry;
        Some(Running::new(digest.as_ref()?, (*size)?))
    }

    /// Compares a file with the listing; reads what `running` has not seen.
    fn difference(
        &self,
        path: &Path,
        running: Option<Running>,
    ) -> Result<Option<Difference>, HubError> {
        let length = fs::metadata(path)
            .map_err(|cause| FileError::read(path, cause))?
            .len();
        if let Some(size) = self.entry.size.filter(|size| *size != length) {
            return Ok(Some(Difference {
                what: "size",
                expected: size.to_string(),
                found: length.to_string(),
            }));
        }
        let Some(digest) = &self.entry.digest else {
            return Ok(None);
        };
        let mut running = running.unwrap_or_else(|| Running::new(digest, length));
        if running.seen < length {
            running.add_file(path)?;
        }
        let (what, found) = running.digits();
        let expected = digest.text().to_owned();
        Ok((found != expected).then_some(Difference {
            what,
            expected,
            found,
        }))
    }
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
        let name = "ce013625030ba8dba906f756967f9e9ca394464a";
        for seen in ["", "hel", "hello\n"] {
            let mut running = Running::new(&Digest::Git(String::new()), 6);
            running.add(seen.as_bytes());
            running.add_file(&path).unwrap();
            assert_eq!(running.digits(), ("git hash", name.to_owned()));
        }
    }
}
