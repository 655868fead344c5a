//! Connections that are slow, half closed, many or of another host.

use super::*;

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
