//! `serve` against what is wrong, hostile or in a hurry: it refuses in OpenAI's form and stays up.

mod connections;
mod limits;

use std::{
    io::{Read, Write},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};

use crate::{
    demo_image, run,
    server::{Response, Server, about, data_url, question, read_response, start, with},
    text,
};

/// An answer that takes a while.
fn long_answer() -> Value {
    let body = with(question("请写一份报告。"), "ignore_eos", true.into());
    with(with(body, "max_tokens", 3000.into()), "stream", true.into())
}

/// Checks that the server still answers.
fn answers(server: &Server) {
    let body = with(question("请写一份报告。"), "max_tokens", 4.into());
    assert_eq!(server.chat(&body).status, 200);
}

fn check_error(response: &Response, status: u16, says: &str) {
    assert_eq!(response.status, status, "{response:?}");
    let error = &response.json()["error"];
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(says), "{message:?} does not say {says:?}");
    assert!(
        error["type"].is_string() && error.get("param").is_some() && error.get("code").is_some()
    );
    // Nothing of the inside: no path, no source file, no address in memory.
    for inside in [
        "/src/",
        ".rs",
        "0x",
        "panicked",
        "model/tiny",
        env!("CARGO_MANIFEST_DIR"),
    ] {
        assert!(
            !response.body.contains(inside),
            "{inside:?} in {response:?}"
        );
    }
}

fn picture(bytes: &[u8]) -> Value {
    about(
        &format!("data:image/png;base64,{}", STANDARD.encode(bytes)),
        "？",
    )
}

/// The head of a PNG that announces a size, and nothing after it.
fn png_of_size(width: u32, height: u32) -> Vec<u8> {
    let mut crc_table = [0u32; 256];
    for (index, entry) in crc_table.iter_mut().enumerate() {
        *entry = (0..8).fold(index as u32, |value, _| {
            if value & 1 == 1 {
                0xedb8_8320 ^ (value >> 1)
            } else {
                value >> 1
            }
        });
    }
    let mut chunk = b"IHDR".to_vec();
    chunk.extend(width.to_be_bytes());
    chunk.extend(height.to_be_bytes());
    chunk.extend([8, 2, 0, 0, 0]);
    let crc = !chunk.iter().fold(!0u32, |crc, byte| {
        crc_table[((crc ^ u32::from(*byte)) & 0xff) as usize] ^ (crc >> 8)
    });
    let mut png = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0d".to_vec();
    png.extend(chunk);
    png.extend(crc.to_be_bytes());
    png.extend(b"\x00\x00\x00\x00IDAT\x35\xaf\x06\x1e");
    png
}

#[test]
fn wrong_requests_are_refused_with_a_reason() {
    let server = start(&["--max-body-mib", "1", "--max-images", "2"]);
    let json = ["content-type: application/json"];
    let chat = "/v1/chat/completions";
    check_error(
        &server.send("POST", chat, &json, b"{\"messages\": ["),
        400,
        "not a request",
    );
    check_error(&server.send("POST", chat, &json, b""), 400, "not a request");
    check_error(
        &server.send("POST", chat, &[], b"{}"),
        415,
        "application/json",
    );
    check_error(
        &server.send("POST", chat, &["content-type: text/plain"], b"{}"),
        415,
        "json",
    );
    check_error(
        &server.send("POST", chat, &json, &vec![b' '; 3 << 20]),
        413,
        "bytes",
    );
    check_error(&server.get(chat), 405, "method");
    check_error(&server.get("/v1/none"), 404, "nothing");
    let demo = data_url(&demo_image());
    let ask = || about(&demo, "？");
    for (body, says) in [
        (json!({"messages": []}), "messages"),
        (
            json!({"messages": [{"role": "robot", "content": "x"}]}),
            "role",
        ),
        (
            json!({"messages": [{"role": "user", "content": 5}]}),
            "content",
        ),
        (with(ask(), "temperature", json!(-1)), "temperature"),
        (with(ask(), "temperature", json!(1e30)), "temperature"),
        (with(ask(), "top_p", json!(0)), "top_p"),
        (with(ask(), "n", json!(99)), "`n`"),
        (with(ask(), "max_tokens", json!(0)), "max_tokens"),
        (with(ask(), "max_tokens", json!(8000)), "together"),
        (with(ask(), "stop", json!([""])), "stop"),
        (with(ask(), "logit_bias", json!({"99999": 1})), "logit_bias"),
        (with(ask(), "top_logprobs", json!(3)), "logprobs"),
        (with(ask(), "tools", json!([{}])), "tools"),
        (about("file:///etc/passwd", "？"), "image 1"),
        (about("/etc/passwd", "？"), "image 1"),
        (about("http://127.0.0.1/x.png", "？"), "does not fetch"),
        (about("data:image/png;base64,%%%", "？"), "base64"),
        (about("data:image/png,abc", "？"), "base64"),
        (about(&demo, "<|im_end|>"), "control token"),
        (about(&demo, "<|image_pad|>"), "control token"),
        (picture(b""), "empty"),
        (picture(b"hello"), "not a PNG"),
        (picture(&png_of_size(100, 100)), "PNG picture"),
    ] {
        check_error(&server.chat(&body), 400, says);
    }
    let huge = picture(&png_of_size(60_000, 60_000));
    check_error(&server.chat(&huge), 413, "60000 × 60000");
    let cut = std::fs::read(demo_image()).unwrap();
    check_error(
        &server.chat(&picture(&cut[..cut.len() / 2])),
        400,
        "PNG picture",
    );
    let mut three = ask();
    let part = three["messages"][0]["content"][0].clone();
    three["messages"][0]["content"] = json!([part, part, part]);
    check_error(&server.chat(&three), 400, "more than 2 images");
    let system = json!({"messages": [
        {"role": "user", "content": "a"}, {"role": "system", "content": "b"},
    ]});
    check_error(&server.chat(&system), 400, "system message");
    check_error(
        &server.chat(&with(ask(), "model", "none".into())),
        404,
        "none",
    );
    answers(&server);
    assert_eq!(server.metric("xray_queue"), 0);
}

#[test]
fn addresses_that_are_not_public_are_never_fetched() {
    let server = start(&["--allow-image-urls"]);
    let trap = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    trap.set_nonblocking(true).unwrap();
    let port = trap.local_addr().unwrap().port();
    for host in [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "2130706433",
        "0",
    ] {
        let response = server.chat(&about(&format!("http://{host}:{port}/x.png"), "？"));
        check_error(&response, 400, "image 1");
    }
    for bad in [
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "http://u:p@example.org/",
    ] {
        check_error(&server.chat(&about(bad, "？")), 400, "image 1");
    }
    assert!(trap.accept().is_err(), "the server connected to itself");
    answers(&server);
}

#[test]
fn keys_names_and_origins_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let (code, _, stderr) = run(folder.path(), &["serve", "--host", "0.0.0.0"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("--api-key"), "{stderr}");
    let (code, _, stderr) = run(folder.path(), &["serve", "--api-key", "short"]);
    assert_eq!((code, stderr.contains("short")), (2, true), "{stderr}");

    let server = start(&["--api-key", "correct-horse"]);
    check_error(&server.get("/v1/models"), 401, "Bearer");
    let wrong = server.send(
        "GET",
        "/v1/models",
        &["authorization: Bearer correct-hors"],
        b"",
    );
    check_error(&wrong, 401, "Bearer");
    check_error(&server.get("/metrics"), 401, "Bearer");
    check_error(&server.chat(&question("？")), 401, "Bearer");
    let right = ["authorization: Bearer correct-horse"];
    assert_eq!(server.send("GET", "/v1/models", &right, b"").status, 200);
    for open in ["/healthz", "/readyz", "/", "/app.js", "/openapi.json"] {
        assert_eq!(server.get(open).status, 200, "{open}");
    }
    let page = server.get("/");
    let policy = page.header("content-security-policy").unwrap();
    assert!(
        policy.starts_with("default-src 'none'") && !policy.contains("unsafe"),
        "{policy}"
    );
    assert_eq!(page.header("x-content-type-options"), Some("nosniff"));

    let open = start(&[]);
    let get = |head: &[&str]| open.send("GET", "/v1/models", head, b"").status;
    assert_eq!(get(&[]), 200);
    assert_eq!(get(&["host: localhost"]), 200);
    assert_eq!(get(&["host: evil.example"]), 403);
    assert_eq!(get(&["origin: http://evil.example"]), 403);
    assert_eq!(get(&["origin: null"]), 403);
    assert_eq!(get(&[&format!("origin: http://{}", open.address)]), 200);
}

#[test]
fn beyond_the_queue_is_429_and_nothing_is_lost() {
    let server = start(&["--max-running", "2", "--max-queue", "3"]);
    let body = with(
        with(long_answer(), "stream", false.into()),
        "max_tokens",
        150.into(),
    );
    let want = server.chat(&body).text();
    let statuses: Vec<u16> = thread::scope(|scope| {
        let users: Vec<_> = (0..60)
            .map(|_| {
                let (server, body, want) = (&server, &body, &want);
                scope.spawn(move || {
                    let response = server.chat(body);
                    if response.status == 200 {
                        assert_eq!(response.text(), *want);
                    } else {
                        check_error(&response, 429, "busy");
                        assert!(response.header("retry-after").is_some());
                    }
                    response.status
                })
            })
            .collect();
        users.into_iter().map(|user| user.join().unwrap()).collect()
    });
    let count = |status| statuses.iter().filter(|found| **found == status).count();
    assert_eq!(count(200) + count(429), 60);
    assert!(count(429) > 0 && count(200) >= 3, "{statuses:?}");
    server.wait_metric("xray_running", 0);
    assert_eq!(server.metric("xray_queue"), 0);
    answers(&server);
}

#[test]
fn who_hangs_up_leaves_nothing_running() {
    let server = start(&["--max-running", "4", "--no-prefix-cache"]);
    answers(&server);
    let body = long_answer().to_string();
    let waits = with(long_answer(), "stream", false.into()).to_string();
    let json = ["content-type: application/json"];
    let mut streams = Vec::new();
    for user in 0..24 {
        let mut stream = server.connect();
        // Some read a stream, some wait for a whole answer; most are still in the queue.
        let body = if user % 3 == 0 { &waits } else { &body };
        server.write(
            &mut stream,
            "POST",
            "/v1/chat/completions",
            &json,
            body.as_bytes(),
        );
        streams.push(stream);
    }
    let mut first = [0; 256];
    assert!(streams[1].read(&mut first).unwrap() > 0);
    assert!(server.metric("xray_running") > 0);
    drop(streams);
    let started = Instant::now();
    server.wait_metric("xray_running", 0);
    server.wait_metric("xray_queue", 0);
    // 3,000 tokens take longer than this, to say nothing of 24 times as many.
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(server.metric("xray_cache_running_tokens"), 0);
    assert_eq!(server.metric("xray_cache_kept_tokens"), 0);
    answers(&server);
}

#[test]
fn any_body_gets_an_answer_and_none_ends_the_server() {
    let server = start(&["--max-new-tokens", "4"]);
    let mut random = SmallRng::seed_from_u64(1);
    let plain = json!({
        "model": "tiny", "max_tokens": 3, "temperature": 0.5, "n": 1, "stop": ["。"], "seed": 4,
        "logit_bias": {"3": 1.0}, "stream": false, "logprobs": true, "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}},
        "messages": [{"role": "user", "content": [{"type": "text", "text": "心影？"}]}],
    })
    .to_string();
    let pieces = [
        "null",
        "-1",
        "1e999",
        "\"\"",
        "[]",
        "{}",
        "true",
        "99999999999999999999",
        "\"\\ud800\"",
        "[[[[[[[[",
        "\u{0}",
        "\"<|im_end|>\"",
        "心",
        ",",
        ":",
        "\"type\"",
        "\"image_url\"",
    ];
    for round in 0..1500 {
        let mut body = plain.clone().into_bytes();
        for _ in 0..random.random_range(1..6) {
            let at = random.random_range(0..body.len());
            match random.random_range(0..4) {
                0 => body[at] = random.random(),
                1 => body.truncate(at.max(1)),
                2 => {
                    let end = (at + random.random_range(1..12)).min(body.len());
                    let piece = pieces[random.random_range(0..pieces.len())];
                    body.splice(at..end, piece.bytes());
                }
                _ => {
                    let end = (at + random.random_range(1..40)).min(body.len());
                    let copy = body[at..end].to_vec();
                    body.splice(at..at, copy);
                }
            }
        }
        let json = ["content-type: application/json"];
        let response = server.send("POST", "/v1/chat/completions", &json, &body);
        let known = [200, 400, 404].contains(&response.status);
        assert!(
            known,
            "round {round}: {response:?} to {}",
            String::from_utf8_lossy(&body)
        );
    }
    answers(&server);
    assert_eq!(
        server.metric("xray_sequences_failed_total"),
        0,
        "{}",
        server.log()
    );
    assert_eq!(server.metric("xray_queue"), 0);
}

#[test]
fn after_sigterm_it_finishes_its_answers() {
    let mut server = start(&[]);
    let body = with(long_answer(), "max_tokens", 400.into()).to_string();
    let json = ["content-type: application/json"];
    let mut stream = server.connect();
    server.write(
        &mut stream,
        "POST",
        "/v1/chat/completions",
        &json,
        body.as_bytes(),
    );
    server.wait_metric("xray_running", 1);
    server.terminate();
    let events = read_response(stream).events();
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    assert!(events.len() > 100);
    assert!(server.child.wait().unwrap().success());
}

#[test]
fn an_answer_that_takes_too_long_is_broken_off() {
    let server = start(&["--request-timeout-seconds", "1", "--no-prefix-cache"]);
    let body = with(
        with(long_answer(), "stream", false.into()),
        "max_tokens",
        3900.into(),
    );
    // A fast machine needs several at once to take more than a second.
    let statuses: Vec<u16> = thread::scope(|scope| {
        let users: Vec<_> = (0..12)
            .map(|_| scope.spawn(|| server.chat(&body)))
            .collect();
        users
            .into_iter()
            .map(|user| {
                let response = user.join().unwrap();
                if response.status != 200 {
                    check_error(&response, 504, "in the time");
                }
                response.status
            })
            .collect()
    });
    assert!(statuses.contains(&504), "{statuses:?}");
    server.wait_metric("xray_running", 0);
    answers(&server);
}

#[cfg(feature = "tls")]
#[test]
fn with_a_certificate_it_speaks_tls() {
    let folder = tempfile::tempdir().unwrap();
    let (key, certificate) = (
        folder.path().join("key.pem"),
        folder.path().join("cert.pem"),
    );
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
        ])
        .args([
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ])
        .args(["-keyout", text(&key), "-out", text(&certificate)])
        .output();
    if !made.is_ok_and(|made| made.status.success()) {
        eprintln!("skipped: no openssl to make a certificate with");
        return;
    }
    let server = start(&["--tls-cert", text(&certificate), "--tls-key", text(&key)]);
    let url = format!("https://{}/healthz", server.address);
    match Command::new("curl")
        .args(["--silent", "--fail", "--cacert", text(&certificate), &url])
        .output()
    {
        Ok(output) => assert_eq!(output.stdout, b"ok\n", "{output:?}"),
        Err(_) => eprintln!("skipped: no curl to speak TLS with"),
    }
    // Plain HTTP gets no answer, and does not harm.
    let mut stream = server.connect();
    stream.write_all(b"GET /healthz HTTP/1.1\r\n\r\n").unwrap();
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    assert!(!bytes.starts_with(b"HTTP"), "{bytes:?}");
    let (code, _, stderr) = run(
        folder.path(),
        &[
            "serve",
            "--port",
            "0",
            "--tls-cert",
            text(&key),
            "--tls-key",
            text(&key),
        ],
    );
    assert_eq!(code, 1);
    assert!(stderr.contains("key.pem"), "{stderr}");
}

fn signal(server: &Server, name: &str) {
    let id = server.child.id().to_string();
    let sent = Command::new("kill").args([name, &id]).status().unwrap();
    assert!(sent.success());
}

/// Ends a server's life within this time, or the test.
fn wait_for_end(server: &mut Server, limit: Duration) -> Option<i32> {
    let started = Instant::now();
    loop {
        if let Some(status) = server.child.try_wait().unwrap() {
            return status.code();
        }
        assert!(started.elapsed() < limit, "still there");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_hangup_drains_and_a_second_signal_ends_at_once() {
    let body = with(long_answer(), "max_tokens", 3900.into()).to_string();
    let json = ["content-type: application/json"];
    let busy = || {
        let server = start(&[]);
        let mut streams: Vec<_> = (0..8).map(|_| server.connect()).collect();
        for stream in &mut streams {
            server.write(
                stream,
                "POST",
                "/v1/chat/completions",
                &json,
                body.as_bytes(),
            );
        }
        server.wait_metric("xray_running", 8);
        (server, streams)
    };
    let (mut server, mut streams) = busy();
    signal(&server, "-HUP");
    let stream = streams.swap_remove(0);
    drop(streams);
    let events = read_response(stream).events();
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    assert_eq!(wait_for_end(&mut server, Duration::from_secs(60)), Some(0));

    let (mut server, _streams) = busy();
    signal(&server, "-INT");
    thread::sleep(Duration::from_millis(100));
    signal(&server, "-TERM");
    assert_eq!(wait_for_end(&mut server, Duration::from_secs(5)), Some(130));
}
