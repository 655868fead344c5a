//! Images that are no files of the user: from rows and from the web, kept as files below a cache folder.
//!
//! A file is named by the SHA-256 of what is in it, one from the web by that of its address, so that each
//! is written and fetched once. Whoever reads images later opens files alone.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::StreamExt;

use crate::base::files::{FileError, sha256_bytes, write_atomic};
use crate::base::web::fetch::{Allowed, FetchError, fetch, is_public};

/// Time for one image from the web, redirects included.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Largest image from the web, in bytes.
const MAX_BYTES: usize = 256 << 20;

/// Images fetched at once.
const AT_ONCE: usize = 8;

/// Where images are kept, and from where they may be fetched.
#[derive(Debug, Clone)]
pub struct ImageStore {
    folder: PathBuf,
    allowed: Allowed,
    /// Called with the number of images fetched and of all.
    fetching: Option<Fetching>,
}

/// Takes the number of images that were fetched, and of all that are.
pub type Fetching = fn(usize, usize);

impl Default for ImageStore {
    /// Below `XRAY_CACHE_DIR`, else `$XDG_CACHE_HOME/xray-qwen3vl` or `~/.cache/xray-qwen3vl`; public addresses alone.
    fn default() -> Self {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let cache = set("XRAY_CACHE_DIR").map(PathBuf::from).or_else(|| {
            let cache = set("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .or_else(|| Some(PathBuf::from(set("HOME")?).join(".cache")))?;
            Some(cache.join("xray-qwen3vl"))
        });
        let cache = cache.unwrap_or_else(|| std::env::temp_dir().join("xray-qwen3vl"));
        Self {
            folder: cache.join("images"),
            allowed: is_public,
            fetching: None,
        }
    }
}

impl ImageStore {
    /// A store in a folder of its own.
    pub fn new(folder: impl Into<PathBuf>, allowed: Allowed) -> Self {
        Self {
            folder: folder.into(),
            allowed,
            fetching: None,
        }
    }

    /// With what is called while images are fetched.
    pub fn with_progress(self, fetching: Option<Fetching>) -> Self {
        Self { fetching, ..self }
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Keeps the bytes of an image, and gives its file.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn keep(&self, bytes: &[u8]) -> Result<PathBuf, FileError> {
        let (folder, path) = self.place(&sha256_bytes(bytes));
        let is_there = fs::metadata(&path).is_ok_and(|data| data.len() == bytes.len() as u64)
            && fs::read(&path).is_ok_and(|found| found == bytes);
        if !is_there {
            // Not synced to the disk: the bytes are in the data file, and are compared each time.
            static COUNT: AtomicU64 = AtomicU64::new(0);
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let temporary = folder.join(format!(".tmp-{}-{count}", std::process::id()));
            let written = make_private(&folder)
                .and_then(|()| fs::write(&temporary, bytes))
                .and_then(|()| fs::rename(&temporary, &path));
            written.map_err(|cause| {
                // What is left of it helps nobody, and the first cause is the one to report.
                let _ = fs::remove_file(&temporary);
                FileError::write(&path, cause)
            })?;
        }
        Ok(path)
    }

    /// The folder and the file of a name.
    fn place(&self, name: &str) -> (PathBuf, PathBuf) {
        let folder = self.folder.join(&name[..2]);
        let path = folder.join(format!("{name}.image"));
        (folder, path)
    }

    /// Fetches images from the web; those that are there already are not fetched again.
    ///
    /// # Errors
    /// [`FileError`] if one cannot be kept; what an address did not give is in its place of the answer.
    pub fn fetch(
        &self,
        addresses: &BTreeSet<String>,
    ) -> Result<BTreeMap<String, Result<PathBuf, String>>, FileError> {
        let mut found = BTreeMap::new();
        let mut wanted = Vec::new();
        for address in addresses {
            let name = sha256_bytes(address.as_bytes());
            let (_, path) = self.place(&name);
            if path.is_file() {
                found.insert(address.clone(), Ok(path));
            } else {
                wanted.push((address, name));
            }
        }
        if wanted.is_empty() {
            return Ok(found);
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|cause| FileError::read(&self.folder, cause))?;
        let (mut done, total) = (0, wanted.len());
        let fetches = wanted.into_iter().map(|(address, name)| async move {
            let mut bytes = Vec::new();
            let fetched = fetch(address, MAX_BYTES, TIMEOUT, self.allowed, &mut bytes).await;
            (address, name, fetched.map(|()| bytes))
        });
        let mut fetched = futures_util::stream::iter(fetches).buffer_unordered(AT_ONCE);
        runtime.block_on(async {
            while let Some((address, name, result)) = fetched.next().await {
                let result: Result<Vec<u8>, FetchError<Infallible>> = result;
                let kept = match result {
                    Ok(bytes) => {
                        let (folder, path) = self.place(&name);
                        make_private(&folder).map_err(|cause| FileError::write(&folder, cause))?;
                        write_atomic(&path, |out| out.write_all(&bytes))?;
                        Ok(path)
                    }
                    Err(error) => Err(error.to_string()),
                };
                found.insert(address.clone(), kept);
                done += 1;
                if let Some(fetching) = self.fetching {
                    fetching(done, total);
                }
            }
            Ok(found)
        })
    }
}

/// Makes a folder that others cannot look into: images of patients are private.
fn make_private(folder: &Path) -> std::io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::DirBuilderExt;
        builder.mode(0o700);
    }
    builder.create(folder)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{IpAddr, TcpListener};
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Answers `/a.png` and counts the requests.
    fn server() -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let count = Arc::new(AtomicUsize::new(0));
        let requests = Arc::clone(&count);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = [0; 4096];
                let read = stream.read(&mut request).unwrap();
                requests.fetch_add(1, Ordering::SeqCst);
                let answer = if request[..read].starts_with(b"GET /a.png ") {
                    "200 OK\r\ncontent-length: 5\r\n\r\nimage"
                } else {
                    "404 Not Found\r\ncontent-length: 0\r\n\r\n"
                };
                let _ = stream.write_all(format!("HTTP/1.1 {answer}").as_bytes());
            }
        });
        (address, count)
    }

    #[test]
    fn an_image_of_the_web_is_fetched_once() {
        let folder = tempfile::tempdir().unwrap();
        let here: Allowed = |address| address == IpAddr::from([127, 0, 0, 1]);
        let store = ImageStore::new(folder.path().join("images"), here);
        let (address, requests) = server();
        let urls: BTreeSet<String> =
            [format!("{address}/a.png"), format!("{address}/b.png")].into();
        let found = store.fetch(&urls).unwrap();
        let path = found[&format!("{address}/a.png")].clone().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"image");
        let missing = found[&format!("{address}/b.png")].clone().unwrap_err();
        assert!(missing.contains("could not be fetched"), "{missing}");
        assert_eq!(requests.load(Ordering::SeqCst), 2);
        let one = [format!("{address}/a.png")].into();
        assert_eq!(
            store.fetch(&one).unwrap()[&format!("{address}/a.png")],
            Ok(path)
        );
        assert_eq!(requests.load(Ordering::SeqCst), 2);
        // Outside the test no address of an inner network is asked.
        let public = ImageStore::new(folder.path().join("other"), is_public);
        let refused = public.fetch(&urls).unwrap();
        assert!(refused.values().all(Result::is_err));
        assert_eq!(requests.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn bytes_are_kept_once_by_their_hash() {
        let folder = tempfile::tempdir().unwrap();
        let store = ImageStore::new(folder.path(), is_public);
        let path = store.keep(b"one").unwrap();
        assert_eq!(store.keep(b"one").unwrap(), path);
        assert_ne!(store.keep(b"two").unwrap(), path);
        assert_eq!(fs::read(&path).unwrap(), b"one");
        // Damaged meanwhile, of the same length.
        fs::write(&path, b"two").unwrap();
        assert_eq!(store.keep(b"one").unwrap(), path);
        assert_eq!(fs::read(path).unwrap(), b"one");
    }
}
