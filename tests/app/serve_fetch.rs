//! `serve` with images by their address, in a network namespace of its own.
//!
//! The server fetches from public addresses alone. In a namespace this machine can be given one, and
//! nothing beyond it can be reached.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    process::Command,
    thread,
};

use crate::{
    demo_image,
    server::{about, data_url, start, with},
};

/// Set inside the namespace.
const INSIDE: &str = "XRAY_TEST_NAMESPACE";

/// An address of the public internet, given to the namespace's loopback.
const PUBLIC: &str = "8.8.4.4";

const NAME: &str = "serve_fetch::an_image_is_fetched_from_a_public_address_and_no_other";

/// Runs this test again where only loopback exists.
fn enter() {
    let script =
        format!("ip link set lo up && ip address add {PUBLIC}/32 dev lo && exec \"$0\" \"$@\"");
    let test = std::env::current_exe().expect("a test has a path");
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-c", &script])
        .arg(test)
        .args([NAME, "--exact", "--ignored", "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("`unshare` of util-linux starts");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    // A name that matches no test would pass as well.
    assert!(said.contains("1 passed"), "{said}");
}

/// Answers every request on `listener`: the sample picture, or a redirect.
fn small_server(listener: TcpListener, inner: String) {
    let picture = fs::read(demo_image()).expect("the sample can be read");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection is accepted");
            let mut request = [0; 4096];
            let read = stream.read(&mut request).expect("a request comes");
            let request = String::from_utf8_lossy(&request[..read]);
            let (head, body) = match request.split(' ').nth(1) {
                Some("/image.png") => (
                    format!("200 OK\r\ncontent-length: {}", picture.len()),
                    &picture[..],
                ),
                Some("/moved") => ("302 Found\r\nlocation: /image.png".to_owned(), &[][..]),
                Some("/inner") => (format!("302 Found\r\nlocation: {inner}"), &[][..]),
                _ => ("404 Not Found\r\ncontent-length: 0".to_owned(), &[][..]),
            };
            let _ = stream.write_all(format!("HTTP/1.1 {head}\r\n\r\n").as_bytes());
            let _ = stream.write_all(body);
        }
    });
}

#[test]
#[ignore = "needs a network namespace of its own (unshare, ip); tests/clients/run runs it"]
fn an_image_is_fetched_from_a_public_address_and_no_other() {
    if std::env::var_os(INSIDE).is_none() {
        return enter();
    }
    let trap = TcpListener::bind("127.0.0.1:0").unwrap();
    trap.set_nonblocking(true).unwrap();
    let inner = format!("http://{}/image.png", trap.local_addr().unwrap());
    let web = TcpListener::bind((PUBLIC, 0)).unwrap();
    let port = web.local_addr().unwrap().port();
    small_server(web, inner.clone());
    let address = |path: &str| format!("http://{PUBLIC}:{port}{path}");

    let server = start(&["--allow-image-urls"]);
    let ask = |url: &str| server.chat(&with(about(url, "？"), "max_tokens", 8.into()));
    let sent = ask(&data_url(&demo_image())).text();
    assert_eq!(ask(&address("/image.png")).text(), sent);
    assert_eq!(ask(&address("/moved")).text(), sent);
    // The same pixels: the vision tower ran for the first request only.
    assert_eq!(server.metric("xray_images_encoded_total"), 1);
    let mut refusals = Vec::new();
    for url in [address("/inner"), address("/none"), inner] {
        let refused = ask(&url);
        assert_eq!(refused.status, 400, "{url}: {refused:?}");
        let error = refused.json()["error"].clone();
        assert_eq!(error["code"], "image_url", "{url}: {error}");
        refusals.push(error["message"].clone());
    }
    // Which addresses of the inner network answer cannot be told from the words.
    assert!(
        refusals.iter().all(|one| *one == refusals[0]),
        "{refusals:?}"
    );
    assert!(trap.accept().is_err(), "an inner address was connected to");

    let closed = start(&[]);
    let refused = closed.chat(&about(&address("/image.png"), "？"));
    assert_eq!(refused.status, 400, "{refused:?}");
    assert!(
        refused.body.contains("does not fetch images"),
        "{refused:?}"
    );
}
