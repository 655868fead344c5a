//! `serve` against what is wrong, hostile or in a hurry: it refuses in OpenAI's form and stays up.

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
fn slow_clients_are_cut_off() {
    let server = start(&["--read-timeout-seconds", "1"]);
    let mut head = server.connect();
    head.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: ")
        .unwrap();
    let mut body = server.connect();
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{{",
        server.address
    );
    body.write_all(request.as_bytes()).unwrap();
    let started = Instant::now();
    let mut rest = Vec::new();
    let _ = head.read_to_end(&mut rest);
    check_error(&read_response(body), 408, "in the time");
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "{:?}",
        started.elapsed()
    );
    answers(&server);
    assert_eq!(server.metric("xray_queue"), 0);
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

/// A PNG of one colour, as an address.
fn plain_picture(side: u32) -> String {
    let mut png = std::io::Cursor::new(Vec::new());
    image::DynamicImage::new_luma8(side, side)
        .write_to(&mut png, image::ImageFormat::Png)
        .unwrap();
    format!(
        "data:image/png;base64,{}",
        STANDARD.encode(png.into_inner())
    )
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
fn text_beyond_the_context_is_refused_before_it_is_tokenised() {
    let server = start(&[]);
    answers(&server);
    let before = server.metric("xray_resident_memory_bytes");
    for megabytes in [1, 16] {
        let text = "a b ".repeat(megabytes << 18);
        let body = json!({"messages": [{"role": "user", "content": text}]});
        let started = Instant::now();
        let refused = server.chat(&body);
        check_error(&refused, 400, "tokens");
        assert_eq!(refused.json()["error"]["code"], "context_length_exceeded");
        // Tokenised whole, a megabyte took two seconds and 300 MB.
        assert!(started.elapsed() < Duration::from_secs(5));
    }
    let taken = server
        .metric("xray_resident_memory_bytes")
        .saturating_sub(before);
    assert!(taken < 200 << 20, "{taken} bytes");
    // Long text that fits is still answered.
    let text = "心影".repeat(400);
    let body = json!({"messages": [{"role": "user", "content": text}], "max_tokens": 2});
    assert_eq!(server.chat(&body).status, 200);
}

#[test]
fn json_that_is_large_in_memory_alone_is_refused() {
    let server = start(&[]);
    let body = format!("{{\"stop\": [{}\"\"]}}", "\"\",".repeat(1_000_000));
    let head = ["content-type: application/json"];
    let refused = server.send("POST", "/v1/chat/completions", &head, body.as_bytes());
    check_error(&refused, 400, "values");
}

#[test]
fn whatever_waits_stays_within_its_memory() {
    let server = start(&[
        "--max-running",
        "1",
        "--max-waiting-memory-mib",
        "320",
        "--max-body-mib",
        "8",
        "--max-image-megapixels",
        "4",
        "--request-timeout-seconds",
        "20",
    ]);
    // Small enough for one request to be answered in its time on a busy machine.
    let picture = plain_picture(700);
    let mut body = about(&picture, "？");
    let part = body["messages"][0]["content"][0].clone();
    body["messages"][0]["content"] = json!([part, part, part, part]);
    let body = with(
        with(body, "max_tokens", 150.into()),
        "ignore_eos",
        true.into(),
    );
    // The first one brings the engine's own memory, which does not wait.
    assert_eq!(server.chat(&body).status, 200);
    let before = server.metric("xray_resident_memory_bytes");
    let most = thread::scope(|scope| {
        let users: Vec<_> = (0..40)
            .map(|_| scope.spawn(|| server.chat(&body)))
            .collect();
        let (started, mut most) = (Instant::now(), 0);
        while users.iter().any(|user| !user.is_finished()) {
            assert!(started.elapsed() < Duration::from_secs(60));
            most = most.max(server.metric("xray_resident_memory_bytes"));
            thread::sleep(Duration::from_millis(50));
        }
        for user in users {
            let status = user.join().unwrap().status;
            assert!([200, 503, 504].contains(&status), "{status}");
        }
        most
    });
    // 40 times 47 MB of patches would be 1.9 GB.
    let taken = most.saturating_sub(before) >> 20;
    assert!(taken < 320 + 160, "{taken} MiB");
    assert_eq!(server.metric("xray_queue"), 0);
    server.wait_metric("xray_waiting_memory_bytes", 0);
    answers(&server);
}

#[test]
fn reports_do_not_wait_for_previews() {
    let server = start(&[]);
    answers(&server);
    let mut png = std::io::Cursor::new(Vec::new());
    image::DynamicImage::new_rgb16(4000, 4000)
        .write_to(&mut png, image::ImageFormat::Png)
        .unwrap();
    let png = png.into_inner();
    thread::scope(|scope| {
        let previews: Vec<_> = (0..24)
            .map(|_| {
                let head = ["content-type: image/png"];
                let (server, png) = (&server, &png);
                scope.spawn(move || server.send("POST", "/v1/images/preview", &head, png).status)
            })
            .collect();
        thread::sleep(Duration::from_millis(300));
        for _ in 0..3 {
            let started = Instant::now();
            answers(&server);
            let took = started.elapsed();
            assert!(took < Duration::from_secs(4), "{took:?}");
        }
        let statuses: Vec<u16> = previews
            .into_iter()
            .map(|preview| preview.join().unwrap())
            .collect();
        let known = |status: &u16| [200, 429].contains(status);
        assert!(statuses.iter().all(known), "{statuses:?}");
        assert!(
            statuses.contains(&200) && statuses.contains(&429),
            "{statuses:?}"
        );
    });
}

#[test]
fn a_client_that_never_reads_is_closed() {
    let server = start(&["--write-timeout-seconds", "1"]);
    let request = format!(
        "GET /strings.js HTTP/1.1\r\nhost: {}\r\n\r\n",
        server.address
    );
    let silent: Vec<_> = (0..8)
        .map(|_| {
            let mut stream = server.connect();
            stream
                .set_write_timeout(Some(Duration::from_millis(200)))
                .unwrap();
            let _ = stream.write_all(request.repeat(2000).as_bytes());
            stream
        })
        .collect();
    // The connection of `/metrics` is the one left.
    server.wait_metric("xray_connections", 1);
    drop(silent);
    answers(&server);
}

#[test]
fn probes_are_answered_when_an_address_has_all_its_connections() {
    let server = start(&["--max-connections-per-address", "4"]);
    let held: Vec<_> = (0..20).map(|_| server.connect()).collect();
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    let refused = server.get("/v1/models");
    check_error(&refused, 503, "connections");
    assert!(refused.header("retry-after").is_some());
    drop(held);
    let started = Instant::now();
    while server.get("/v1/models").status != 200 {
        assert!(started.elapsed() < Duration::from_secs(10));
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_client_that_closes_its_half_gets_its_answer() {
    let server = start(&[]);
    let whole = with(long_answer(), "max_tokens", 600.into());
    for (streamed, tokens) in [(true, 600), (false, 600), (false, 1)] {
        let body = with(whole.clone(), "stream", streamed.into());
        let body = with(body, "max_tokens", tokens.into()).to_string();
        let mut stream = server.connect();
        let head = ["content-type: application/json"];
        server.write(
            &mut stream,
            "POST",
            "/v1/chat/completions",
            &head,
            body.as_bytes(),
        );
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let text = text.trim_start_matches("HTTP/1.1 100 Continue\r\n\r\n");
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        let end = if streamed {
            "data: [DONE]"
        } else {
            "\"usage\""
        };
        assert!(text.contains(end), "{text}");
    }
    let mut stream = server.connect();
    stream
        .write_all(format!("GET /healthz HTTP/1.1\r\nhost: {}\r\n\r\n", server.address).as_bytes())
        .unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(read_response(stream).status, 200);
}

#[test]
fn a_request_names_one_host() {
    let server = start(&["--host", "127.0.0.1"]);
    let host = format!("host: {}", server.address);
    let twice = server.send("GET", "/healthz", &[&host, "host: evil.example"], b"");
    check_error(&twice, 400, "2 `Host` headers");
    let mut none = server.connect();
    none.write_all(b"GET /healthz HTTP/1.1\r\nconnection: close\r\n\r\n")
        .unwrap();
    check_error(&read_response(none), 400, "0 `Host` headers");
    assert_eq!(server.send("GET", "/healthz", &[&host], b"").status, 200);
}

#[test]
fn the_status_of_a_refused_body_arrives() {
    let server = start(&["--api-key", "correct-horse", "--max-body-mib", "4"]);
    let large = vec![b' '; 7 << 20];
    let key = "authorization: Bearer correct-horse";
    let json = "content-type: application/json";
    for (path, head, status) in [
        ("/v1/chat/completions", vec![json], 401),
        ("/v1/none", vec![json], 404),
        ("/v1/chat/completions", vec![json, key], 413),
        ("/v1/chat/completions", vec![key], 415),
    ] {
        let mut stream = server.connect();
        let mut request = format!("POST {path} HTTP/1.1\r\nhost: {}\r\n", server.address);
        for line in head {
            request.push_str(&format!("{line}\r\n"));
        }
        request.push_str(&format!("content-length: {}\r\n\r\n", large.len()));
        // All of it is taken: a client that sends first and reads then learns the status.
        stream.write_all(request.as_bytes()).unwrap();
        stream.write_all(&large).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(read_response(stream).status, status, "{path}");
    }
    assert_eq!(server.send("GET", "/metrics", &[key], b"").status, 200);
}

#[test]
fn streams_that_are_broken_off_end_with_an_error_event() {
    let mut server = start(&["--drain-seconds", "0"]);
    let body = with(long_answer(), "max_tokens", 3900.into()).to_string();
    let json = ["content-type: application/json"];
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
    server.terminate();
    for stream in streams {
        let events = read_response(stream).events();
        let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
        assert_eq!(last["error"]["type"], "service_unavailable_error", "{last}");
    }
    assert_eq!(wait_for_end(&mut server, Duration::from_secs(10)), Some(0));
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

#[test]
fn limits_of_zero_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for flag in [
        "--max-images",
        "--max-image-megapixels",
        "--request-timeout-seconds",
        "--read-timeout-seconds",
        "--write-timeout-seconds",
        "--max-connections-per-address",
    ] {
        let (code, _, stderr) = run(folder.path(), &["serve", flag, "0"]);
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains(&format!("{flag} is 0")), "{stderr}");
    }
    let (code, _, stderr) = run(
        folder.path(),
        &["serve", "--port", "0", "--max-waiting-memory-mib", "100"],
    );
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("expected at least 1250"), "{stderr}");
}

#[test]
fn a_body_that_comes_too_late_has_its_own_number() {
    let server = start(&["--read-timeout-seconds", "1"]);
    let mut body = server.connect();
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{{",
        server.address
    );
    body.write_all(request.as_bytes()).unwrap();
    assert_eq!(read_response(body).status, 408);
    assert_eq!(server.metric("xray_responses_total{status=\"408\"}"), 1);
}
