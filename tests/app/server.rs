//! A server of the tests: the program's own, on a free port, with a client made of a socket.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{demo_image, program};

/// Longest wait for anything a test waits for.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running server; it is killed when this is dropped.
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) address: String,
    folder: TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One response.
#[derive(Debug, Clone)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Response {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// The answer's text.
    pub(crate) fn text(&self) -> String {
        assert_eq!(self.status, 200, "{self:?}");
        self.json()["choices"][0]["message"]["content"]
            .as_str()
            .expect("an answer has content")
            .to_owned()
    }

    /// Data of all events of a stream.
    pub(crate) fn events(&self) -> Vec<String> {
        self.body
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .map(str::to_owned)
            .collect()
    }
}

/// Starts a server on the tiny model with further arguments.
pub(crate) fn start(args: &[&str]) -> Server {
    let folder = tempfile::tempdir().unwrap();
    let mut all = vec!["serve", "--device", "cpu", "--port", "0"];
    all.extend(args);
    let mut child = program(folder.path(), &all).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut lines = String::new();
    let address = loop {
        let mut line = String::new();
        if stderr.read_line(&mut line).unwrap() == 0 {
            panic!("the server did not start: {lines}");
        }
        lines.push_str(&line);
        if let Some((_, rest)) = line.split_once("://") {
            break rest.split(',').next().unwrap().trim().to_owned();
        }
    };
    // The log goes to a file of its own, as a full pipe would stop the server.
    let log = folder.path().join("log");
    thread::spawn(move || {
        let mut text = Vec::new();
        let mut file = fs::File::create(log).unwrap();
        while let Ok(read @ 1..) = stderr.read_until(b'\n', &mut text) {
            let _ = file.write_all(&text[text.len() - read..]);
            text.clear();
        }
    });
    Server {
        child,
        address,
        folder,
    }
}

impl Server {
    /// Lines the server logged so far.
    /// Whether the log has `piece`, soon: a line is written after its answer.
    pub(crate) fn logs(&self, piece: &str) -> bool {
        let started = std::time::Instant::now();
        while started.elapsed() < PATIENCE {
            if self.log().contains(piece) {
                return true;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        false
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends a request with the given header lines.
    pub(crate) fn send(&self, method: &str, path: &str, head: &[&str], body: &[u8]) -> Response {
        let mut stream = self.connect();
        self.write(&mut stream, method, path, head, body);
        read_response(stream)
    }

    pub(crate) fn write(
        &self,
        stream: &mut TcpStream,
        method: &str,
        path: &str,
        head: &[&str],
        body: &[u8],
    ) {
        let mut request = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n");
        if !head.iter().any(|line| line.starts_with("host:")) {
            request.push_str(&format!("host: {}\r\n", self.address));
        }
        for line in head {
            request.push_str(line);
            request.push_str("\r\n");
        }
        if method == "POST" {
            request.push_str(&format!("content-length: {}\r\n", body.len()));
        }
        request.push_str("\r\n");
        let mut bytes = request.into_bytes();
        bytes.extend_from_slice(body);
        // A server that refuses early closes while this is still writing.
        let _ = stream.write_all(&bytes);
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        self.send("GET", path, &[], b"")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        let head = ["content-type: application/json"];
        self.send("POST", path, &head, body.to_string().as_bytes())
    }

    pub(crate) fn chat(&self, body: &Value) -> Response {
        self.post("/v1/chat/completions", body)
    }

    /// A number of `/metrics`.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let text = self.get("/metrics").body;
        let line = text
            .lines()
            .find(|line| line.split(' ').next() == Some(name))
            .unwrap_or_else(|| panic!("no {name} in {text}"));
        line.split(' ').nth(1).unwrap().parse().unwrap()
    }

    /// Waits until a number of `/metrics` has a value.
    pub(crate) fn wait_metric(&self, name: &str, value: u64) {
        let started = Instant::now();
        while self.metric(name) != value {
            assert!(
                started.elapsed() < PATIENCE,
                "{name} is {}, not {value}",
                self.metric(name)
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Stops the server with SIGTERM, as a service manager does.
    pub(crate) fn terminate(&self) {
        let id = self.child.id().to_string();
        let status = Command::new("kill").args(["-TERM", &id]).status().unwrap();
        assert!(status.success());
    }
}

/// Reads until the server closes.
pub(crate) fn read_response(mut stream: TcpStream) -> Response {
    let mut bytes = Vec::new();
    let started = Instant::now();
    let mut buffer = [0; 65536];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => bytes.extend_from_slice(&buffer[..read]),
            // A reset after the response is how an early refusal can end.
            Err(_) if !bytes.is_empty() && started.elapsed() < PATIENCE => break,
            Err(error) => panic!("no response: {error}"),
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or_else(|| panic!("no status in {text}"));
    let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
    Response {
        status,
        head: head.to_owned(),
        body: if chunked {
            unchunk(body)
        } else {
            body.to_owned()
        },
    }
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        if size == 0 || rest.len() < size {
            break;
        }
        whole.push_str(&rest[..size]);
        body = rest[size..].trim_start_matches("\r\n");
    }
    whole
}

/// A picture as a data: address.
pub(crate) fn data_url(path: &Path) -> String {
    let bytes = fs::read(path).unwrap();
    format!("data:image/png;base64,{}", STANDARD.encode(bytes))
}

/// A question about a picture.
pub(crate) fn about(picture: &str, question: &str) -> Value {
    json!({
        "model": "tiny",
        "messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": question},
        ]}],
    })
}

/// A question about the sample picture.
pub(crate) fn question(question: &str) -> Value {
    about(&data_url(&demo_image()), question)
}

/// The same body with one key more.
pub(crate) fn with(mut body: Value, key: &str, value: Value) -> Value {
    body[key] = value;
    body
}
