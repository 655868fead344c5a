//! Limits of memory, tokens and time.

use super::*;

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
