//! A hub of its own on 127.0.0.1: the parts of Hugging Face's and ModelScope's protocols that `pull` uses, with
//! large files on another port, and with faults on demand.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use sha2::Sha256;

/// Commit of every model here.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What goes wrong with one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// The connection stays open after so many bytes, and nothing more comes.
    Stall(usize),
    /// One byte of the body is another.
    Wrong,
    /// A status, with the seconds of `Retry-After`.
    Status(u16, Option<u64>),
    /// The range is not heeded.
    Whole,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// Whether it came to the port of large files.
    pub(crate) at_cdn: bool,
    pub(crate) method: String,
    pub(crate) target: String,
    headers: HashMap<String, String>,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// First byte asked for.
    pub(crate) fn from(&self) -> Option<usize> {
        let range = self.header("range")?.strip_prefix("bytes=")?;
        range.split('-').next()?.parse().ok()
    }
}

/// Files of a model by path.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

#[derive(Default)]
struct State {
    models: Mutex<HashMap<String, Files>>,
    faults: Mutex<HashMap<String, VecDeque<Fault>>>,
    seen: Mutex<Vec<Seen>>,
    /// Time between two blocks of a large file.
    slow: Mutex<Duration>,
}

/// The server; it lives as long as the test process.
pub(crate) struct HubServer {
    state: Arc<State>,
    pub(crate) address: SocketAddr,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|lock| lock.into_inner())
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// Git's name of a content.
pub(crate) fn git_hash(bytes: &[u8]) -> String {
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {}\0", bytes.len()));
    hasher.update(bytes);
    hexadecimal(&hasher.finalize())
}

/// Files that a hub keeps in git-lfs.
fn is_large(path: &str) -> bool {
    [".safetensors", ".bin", ".gguf"]
        .iter()
        .any(|ending| path.ends_with(ending))
}

impl HubServer {
    pub(crate) fn start(models: &[(&str, Files)]) -> Self {
        let state = Arc::new(State::default());
        for (id, files) in models {
            held(&state.models).insert(id.to_string(), files.clone());
        }
        let listen = || TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let (hub, cdn) = (listen(), listen());
        let address = |listener: &TcpListener| listener.local_addr().expect("it has an address");
        let (hub_address, cdn_address) = (address(&hub), address(&cdn));
        for (listener, at_cdn) in [(hub, false), (cdn, true)] {
            let state = state.clone();
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let state = state.clone();
                    // A client that goes away in the middle is part of the tests.
                    thread::spawn(move || answer(stream, &state, at_cdn, cdn_address));
                }
            });
        }
        Self {
            state,
            address: hub_address,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next answers with the file `path` have these faults, one each.
    pub(crate) fn spoil(&self, path: &str, faults: &[Fault]) {
        held(&self.state.faults).insert(path.into(), faults.iter().copied().collect());
    }

    /// Large files take this long for each of their blocks.
    pub(crate) fn slow_down(&self, pause: Duration) {
        *held(&self.state.slow) = pause;
    }

    /// The requests since the last call.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut *held(&self.state.seen))
    }
}

fn answer(stream: TcpStream, state: &State, at_cdn: bool, cdn: SocketAddr) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let seen = Seen {
        at_cdn,
        method,
        target: target.clone(),
        headers,
    };
    held(&state.seen).push(seen.clone());
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query: HashMap<String, String> = query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name.to_owned(), decoded(value)))
        .collect();
    let path = decoded(path);
    let path = path.trim_start_matches('/');
    let parts: Vec<&str> = path.split('/').collect();
    let models = held(&state.models).clone();
    let reply = Reply {
        stream,
        state,
        seen,
    };
    match parts.as_slice() {
        ["cdn", owner, name, file @ ..] if at_cdn => {
            let file = file.join("/");
            let bytes = models.get(&format!("{owner}/{name}"))?.get(&file)?;
            reply.file(&file, bytes, &[])
        }
        ["api", "models", owner, name, "revision", revision @ ..] => {
            let id = format!("{owner}/{name}");
            if id == "test/gated" {
                return reply.status(401, &[("x-error-code", "GatedRepo".into())]);
            }
            let Some(files) = models.get(&id) else {
                return reply.status(404, &[("x-error-code", "RepoNotFound".into())]);
            };
            if !["main", "v1", COMMIT].contains(&revision.join("/").as_str()) {
                return reply.status(404, &[("x-error-code", "RevisionNotFound".into())]);
            }
            let listed: Vec<Value> = files
                .iter()
                .map(|(path, bytes)| listed(path, bytes))
                .collect();
            reply.json(&json!({"id": id, "sha": COMMIT, "siblings": listed}))
        }
        ["api", "v1", "models", owner, name, "repo", "files"] => {
            let Some(files) = models.get(&format!("{owner}/{name}")) else {
                return reply.json(
                    &json!({"Code": 10010205001_i64, "Message": "not found", "Success": false}),
                );
            };
            let mut listed = vec![json!({"Path": "assets", "Name": "assets", "Type": "tree"})];
            listed.extend(files.iter().map(|(path, bytes)| {
                json!({"Path": path, "Name": path, "Type": "blob", "Size": bytes.len(),
                       "Sha256": sha256(bytes), "IsLFS": is_large(path)})
            }));
            reply.json(&json!({"Code": 200, "Data": {"Files": listed}, "Success": true}))
        }
        ["api", "v1", "models", owner, name, "repo"] => {
            let file = query.get("FilePath")?.clone();
            reply.one(&models, &format!("{owner}/{name}"), &file, cdn)
        }
        [owner, name, "resolve", _, file @ ..] => {
            reply.one(&models, &format!("{owner}/{name}"), &file.join("/"), cdn)
        }
        _ => reply.status(404, &[]),
    }
}

fn listed(path: &str, bytes: &[u8]) -> Value {
    // A file that no disk holds.
    let size = match path.starts_with("huge") {
        true => 1 << 55,
        false => bytes.len() as u64,
    };
    match is_large(path) {
        true => json!({"rfilename": path, "size": size, "blobId": "0".repeat(40),
                       "lfs": {"sha256": sha256(bytes), "size": size, "pointerSize": 130}}),
        false => json!({"rfilename": path, "size": size, "blobId": git_hash(bytes)}),
    }
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after
            .get(..2)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match digits
            .filter(|_| *first == b'%')
            .map(|digits| u8::from_str_radix(digits, 16))
        {
            Some(Ok(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

struct Reply<'a> {
    stream: TcpStream,
    state: &'a State,
    seen: Seen,
}

impl Reply<'_> {
    fn head(&mut self, status: u16, length: usize, headers: &[(&str, String)]) -> Option<()> {
        let mut text =
            format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n");
        for (name, value) in headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        self.stream.write_all(format!("{text}\r\n").as_bytes()).ok()
    }

    fn status(mut self, status: u16, headers: &[(&str, String)]) -> Option<()> {
        self.head(status, 0, headers)
    }

    fn json(mut self, value: &Value) -> Option<()> {
        if let Some(Fault::Status(status, wait)) = self.fault("listing") {
            let wait = wait.map(|seconds| ("retry-after", seconds.to_string()));
            return self.status(status, wait.as_slice());
        }
        let text = value.to_string();
        self.head(200, text.len(), &[])?;
        self.stream.write_all(text.as_bytes()).ok()
    }

    fn fault(&self, path: &str) -> Option<Fault> {
        held(&self.state.faults).get_mut(path)?.pop_front()
    }

    /// A file of a model: at once if it is small, else from the other port.
    fn one(
        self,
        models: &HashMap<String, Files>,
        id: &str,
        file: &str,
        cdn: SocketAddr,
    ) -> Option<()> {
        let Some(bytes) = models.get(id).and_then(|files| files.get(file)) else {
            return self.status(404, &[("x-error-code", "EntryNotFound".into())]);
        };
        if !is_large(file) {
            return self.file(file, bytes, &[("etag", format!("\"{}\"", git_hash(bytes)))]);
        }
        let headers = [
            ("location", format!("http://{cdn}/cdn/{id}/{file}?signed=1")),
            ("x-repo-commit", COMMIT.into()),
            ("x-linked-etag", format!("\"{}\"", sha256(bytes))),
            ("x-linked-size", bytes.len().to_string()),
        ];
        self.status(302, &headers)
    }

    fn file(mut self, path: &str, bytes: &[u8], headers: &[(&str, String)]) -> Option<()> {
        let fault = self.fault(path);
        if let Some(Fault::Status(status, wait)) = fault {
            let wait = wait.map(|seconds| ("retry-after", seconds.to_string()));
            return self.status(status, wait.as_slice());
        }
        let from = self.seen.from().filter(|_| fault != Some(Fault::Whole));
        let mut body = bytes.get(from.unwrap_or(0)..)?.to_vec();
        if fault == Some(Fault::Wrong) {
            *body.last_mut()? ^= 1;
        }
        let mut headers = headers.to_vec();
        let status = match from {
            Some(from) => {
                let last = bytes.len().saturating_sub(1);
                headers.push((
                    "content-range",
                    format!("bytes {from}-{last}/{}", bytes.len()),
                ));
                206
            }
            None => 200,
        };
        self.head(status, body.len(), &headers)?;
        if self.seen.method == "HEAD" {
            return Some(());
        }
        let sent = match fault {
            Some(Fault::Cut(count) | Fault::Stall(count)) => &body[..count.min(body.len())],
            _ => &body,
        };
        let pause = *held(&self.state.slow);
        for block in sent.chunks(1 << 16) {
            self.stream.write_all(block).ok()?;
            if self.seen.at_cdn && !pause.is_zero() {
                thread::sleep(pause);
            }
        }
        if matches!(fault, Some(Fault::Stall(_))) {
            // Longer than any client of the tests waits.
            thread::sleep(Duration::from_secs(30));
        }
        Some(())
    }
}
