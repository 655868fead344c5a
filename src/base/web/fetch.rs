//! Files from addresses on the web, where the user allows that.
//!
//! Loopback, link-local, private and other special addresses are refused, after the name is resolved
//! and again for every redirect; the address that was checked is the one that is connected to, so a
//! name that resolves differently the second time gains nothing.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{StatusCode, Uri, body::Bytes, header};

use super::connection;

/// Redirects that are followed.
const MAX_REDIRECTS: usize = 3;

/// Longest address.
const LONGEST_URL: usize = 4096;

/// Why an address gave no file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FetchError<E> {
    /// It is none of the web.
    #[error("has no address of the form http:// or https://")]
    Address,
    /// It is refused, or does not answer with a file. One kind for both: the difference would show a stranger which
    /// hosts an inner network has.
    #[error("could not be fetched; expected an image at a public address that can be reached")]
    Unreachable,
    /// Redirects without end.
    #[error("is redirected too often")]
    Redirects,
    /// More bytes than are taken, or not all of them.
    #[error("is too large or broke off")]
    Body,
    /// The time is over.
    #[error("did not come in time")]
    Late,
    /// What takes the bytes did not.
    #[error("cannot be kept")]
    Sink(E),
}

/// Takes the bytes of a file as they come.
pub trait Sink {
    /// Why it does not take more.
    type Error;

    /// Takes the next bytes.
    ///
    /// # Errors
    /// Its own.
    fn take(&mut self, data: &[u8]) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

impl Sink for Vec<u8> {
    type Error = Infallible;

    async fn take(&mut self, data: &[u8]) -> Result<(), Infallible> {
        self.extend_from_slice(data);
        Ok(())
    }
}

/// Which addresses may be connected to.
pub type Allowed = fn(IpAddr) -> bool;

/// Fetches what is at `url`, at most `max_bytes` within `timeout`, redirects included; `allowed` decides on each
/// address that is connected to, [`is_public`] outside tests.
///
/// # Errors
/// [`FetchError`].
pub async fn fetch<S: Sink>(
    url: &str,
    max_bytes: usize,
    timeout: Duration,
    allowed: Allowed,
    sink: &mut S,
) -> Result<(), FetchError<S::Error>> {
    tokio::time::timeout(timeout, follow(url, max_bytes, allowed, sink))
        .await
        .unwrap_or(Err(FetchError::Late))
}

async fn follow<S: Sink>(
    url: &str,
    max_bytes: usize,
    allowed: Allowed,
    sink: &mut S,
) -> Result<(), FetchError<S::Error>> {
    let mut url = url.to_owned();
    for _ in 0..=MAX_REDIRECTS {
        let uri = parse(&url).ok_or(FetchError::Address)?;
        let address = resolve(&uri, allowed).await?;
        let mut connection = connection::connect(&uri, address)
            .await
            .map_err(|_| FetchError::Unreachable)?;
        let request = hyper::Request::get(uri.path_and_query().map_or("/", |path| path.as_str()))
            .header(header::HOST, connection::host_header(&uri))
            .header(header::ACCEPT, "image/*")
            .header(header::USER_AGENT, "xray-qwen3vl")
            .body(Empty::<Bytes>::new())
            .map_err(|_| FetchError::Unreachable)?;
        let response = connection.send(request).await;
        let response = response.map_err(|_| FetchError::Unreachable)?;
        let status = response.status();
        if status.is_redirection() {
            let target = response
                .headers()
                .get(header::LOCATION)
                .and_then(|location| location.to_str().ok());
            url = target
                .and_then(|target| redirected(&uri, target))
                .ok_or(FetchError::Unreachable)?;
            continue;
        }
        if status != StatusCode::OK {
            return Err(FetchError::Unreachable);
        }
        let mut body = Limited::new(response.into_body(), max_bytes);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| FetchError::Body)?;
            if let Some(data) = frame.data_ref() {
                sink.take(data).await.map_err(FetchError::Sink)?;
            }
        }
        return Ok(());
    }
    Err(FetchError::Redirects)
}

fn parse(url: &str) -> Option<Uri> {
    if url.len() > LONGEST_URL {
        return None;
    }
    let uri: Uri = url.parse().ok()?;
    let known = matches!(uri.scheme_str(), Some("http" | "https"));
    let plain = uri
        .authority()
        .is_some_and(|authority| !authority.as_str().contains('@'));
    (known && plain).then_some(uri)
}

fn redirected(from: &Uri, target: &str) -> Option<String> {
    if target.contains("://") {
        return Some(target.to_owned());
    }
    // `//host/path` and relative paths are rare among images; only an absolute path is followed.
    if target.starts_with('/') && !target.starts_with("//") {
        return Some(format!(
            "{}://{}{target}",
            from.scheme_str()?,
            from.authority()?
        ));
    }
    None
}

async fn resolve<E>(uri: &Uri, allowed: Allowed) -> Result<SocketAddr, FetchError<E>> {
    let (host, port) = connection::host_and_port(uri).ok_or(FetchError::Address)?;
    let found: Vec<SocketAddr> = match host.parse::<IpAddr>() {
        Ok(ip) => vec![SocketAddr::new(ip, port)],
        Err(_) => tokio::net::lookup_host((host.as_str(), port))
            .await
            .map_err(|_| FetchError::Unreachable)?
            .collect(),
    };
    // One refused address is enough to refuse the name: the resolver chooses the order.
    if found.iter().any(|address| !allowed(address.ip())) {
        return Err(FetchError::Unreachable);
    }
    found.first().copied().ok_or(FetchError::Unreachable)
}

/// Whether an address belongs to the public internet.
///
/// Source: the IANA registries of special-purpose addresses, for IPv4 and IPv6.
pub fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    let special = a == 0
        || a == 10
        || a == 127
        || (a == 100 && (64..128).contains(&b))
        || (a == 169 && b == 254)
        || (a == 172 && (16..32).contains(&b))
        || (a == 192 && b == 0 && (c == 0 || c == 2))
        || (a == 192 && b == 88 && c == 99)
        || (a == 192 && b == 168)
        || (a == 198 && (b == 18 || b == 19))
        || (a == 198 && b == 51 && c == 100)
        || (a == 203 && b == 0 && c == 113)
        || a >= 224;
    !special
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    let segments = ip.segments();
    // Forms that carry an IPv4 address are what that address is.
    if let Some(v4) = ip.to_ipv4_mapped() {
        return is_public_v4(v4);
    }
    // NAT64 and 6to4 lead to IPv4 addresses, Teredo to anything; none is needed for an image.
    let translated = segments[0] == 0x64 && segments[1] == 0xff9b
        || segments[0] == 0x2002
        || segments[0] == 0x2001 && segments[1] < 0x200;
    let documentation = segments[0] == 0x2001 && segments[1] == 0xdb8 || segments[0] == 0x3fff;
    // Only 2000::/3 is given out as global unicast.
    (segments[0] & 0xe000) == 0x2000 && !translated && !documentation
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// Answers every request by its path, for ever.
    async fn small_server(listener: TcpListener) {
        let port = listener.local_addr().unwrap().port();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let read = stream.read(&mut request).await.unwrap();
            let request = String::from_utf8_lossy(&request[..read]);
            let answer = match request.split(' ').nth(1).unwrap() {
                "/image" => "200 OK\r\ncontent-length: 5\r\n\r\nimage".to_owned(),
                "/moved" => "302 Found\r\nlocation: /image\r\n\r\n".to_owned(),
                "/inside" => {
                    format!("302 Found\r\nlocation: http://127.0.0.2:{port}/image\r\n\r\n")
                }
                "/circle" => "302 Found\r\nlocation: /circle\r\n\r\n".to_owned(),
                "/large" => format!("200 OK\r\n\r\n{}", "x".repeat(2000)),
                _ => "404 Not Found\r\ncontent-length: 0\r\n\r\n".to_owned(),
            };
            let _ = stream
                .write_all(format!("HTTP/1.1 {answer}").as_bytes())
                .await;
        }
    }

    #[test]
    fn an_image_is_fetched_and_every_redirect_is_checked() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            // All of 127.0.0.0/8 reaches this listener; one address plays the public one.
            let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            tokio::spawn(small_server(listener));
            let public = |address: IpAddr| address == IpAddr::from([127, 0, 0, 1]);
            let fetch = async |path: &str| {
                let url = format!("http://127.0.0.1:{port}{path}");
                let mut bytes = Vec::new();
                let fetched = follow(&url, 1000, public, &mut bytes).await;
                fetched.map(|()| bytes)
            };
            assert_eq!(&fetch("/image").await.unwrap()[..], b"image");
            assert_eq!(&fetch("/moved").await.unwrap()[..], b"image");
            for (path, says) in [
                ("/inside", FetchError::Unreachable),
                ("/none", FetchError::Unreachable),
                ("/circle", FetchError::Redirects),
                ("/large", FetchError::Body),
            ] {
                assert_eq!(fetch(path).await.unwrap_err(), says, "{path}");
            }
        });
    }

    #[test]
    fn only_the_public_internet_is_fetched_from() {
        for bad in [
            "127.0.0.1",
            "127.8.9.1",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "192.0.0.8",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "::ffff:127.0.0.1",
            "::127.0.0.1",
            "fe80::1",
            "fc00::1",
            "fd12:3456::1",
            "ff02::1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
        ] {
            assert!(!is_public(bad.parse().unwrap()), "{bad}");
        }
        for good in [
            "8.8.8.8",
            "172.32.0.1",
            "100.128.0.1",
            "2606:4700:4700::1111",
        ] {
            assert!(is_public(good.parse().unwrap()), "{good}");
        }
    }

    #[test]
    fn other_schemes_and_hidden_users_are_refused() {
        for bad in [
            "file:///etc/passwd",
            "ftp://example.org/a.png",
            "http://user@example.org/a.png",
            "gopher://127.0.0.1:6379/",
            "//example.org/a.png",
            "a.png",
            "",
        ] {
            assert!(parse(bad).is_none(), "{bad}");
        }
        assert!(parse("https://example.org/a.png").is_some());
    }

    #[test]
    fn names_and_odd_spellings_of_loopback_are_refused() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        for bad in [
            "http://127.0.0.1:9/a.png",
            "http://localhost:9/a.png",
            "http://[::1]:9/a.png",
            "http://[::ffff:127.0.0.1]:9/a.png",
            "http://2130706433/a.png",
            "http://0x7f.1/a.png",
            "http://127.1/a.png",
            "http://169.254.169.254/latest/meta-data",
        ] {
            let mut bytes = Vec::new();
            let fetched = fetch(bad, 1000, Duration::from_secs(9), is_public, &mut bytes);
            let error = runtime.block_on(fetched).unwrap_err();
            assert_eq!(error, FetchError::Unreachable, "{bad}");
        }
    }

    #[test]
    fn a_redirect_is_taken_apart_again() {
        let from: Uri = "https://example.org/a/b".parse().unwrap();
        assert_eq!(
            redirected(&from, "/c").as_deref(),
            Some("https://example.org/c")
        );
        assert_eq!(
            redirected(&from, "http://127.0.0.1/").as_deref(),
            Some("http://127.0.0.1/")
        );
        assert_eq!(redirected(&from, "//127.0.0.1/"), None);
    }
}
