//! Access checks: the API key, the `Host` header and the `Origin` header.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::{cors::AllowedOrigins, error::ApiError};

/// The other end of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// Number of the client, from its address or its key.
    pub client: u64,
}

impl Peer {
    /// A client by address.
    pub fn new(address: IpAddr) -> Self {
        let digest = match address.to_canonical() {
            IpAddr::V4(ip) => Sha256::digest(ip.octets()),
            // One subscriber has a whole /64.
            IpAddr::V6(ip) => Sha256::digest(&ip.octets()[..8]),
        };
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&digest[..8]);
        Self {
            client: u64::from_le_bytes(bytes),
        }
    }
}

/// Fewest letters of a key.
const SHORTEST_KEY: usize = 8;

/// Why a text is no key; the text itself is never repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Nothing but blanks.
    #[error("is empty")]
    Empty,
    /// Easily guessed.
    #[error(
        "is too short: {0} letters without the blanks around it, expected at least {SHORTEST_KEY}"
    )]
    Short(usize),
    /// Cannot be sent in a header.
    #[error("holds something else than the printable letters of ASCII")]
    NotAscii,
}

/// One key, as its hash. There is none of blanks, and none that is shorter than it looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApiKey([u8; 32]);

impl ApiKey {
    /// Reads a key; blanks around it are not part of it.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn new(text: &str) -> Result<Self, KeyError> {
        let key = text.trim();
        if key.is_empty() {
            return Err(KeyError::Empty);
        }
        if !key.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
            return Err(KeyError::NotAscii);
        }
        if key.len() < SHORTEST_KEY {
            return Err(KeyError::Short(key.len()));
        }
        Ok(Self(Sha256::digest(key).into()))
    }

    /// Number of the client that uses this key, which does not reveal the key.
    fn client(&self) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[..8]);
        u64::from_le_bytes(bytes)
    }
}

/// The keys of which one must be shown.
#[derive(Clone, Default)]
pub struct KeyCheck {
    keys: Vec<ApiKey>,
}

impl KeyCheck {
    /// A check against `keys`; none lets everybody in.
    pub fn new(keys: &[ApiKey]) -> Self {
        Self {
            keys: keys.to_vec(),
        }
    }

    /// Looks for `Authorization: Bearer KEY` and returns the number of that key's client; `None` where no key
    /// is required.
    ///
    /// Hashes are compared, all of them and to the end, so that the time reveals nothing.
    ///
    /// # Errors
    /// [`ApiError`] of status 401.
    pub fn check(&self, headers: &HeaderMap) -> Result<Option<u64>, ApiError> {
        if !self.has_any() {
            return Ok(None);
        }
        let shown = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            // No key at all is compared with none.
            .and_then(|(_, key)| ApiKey::new(key).ok());
        let found = shown.filter(|shown| {
            let same = self
                .keys
                .iter()
                .fold(Choice::from(0), |found, key| found | key.0.ct_eq(&shown.0));
            bool::from(same)
        });
        match found {
            Some(key) => Ok(Some(key.client())),
            None => Err(Self::refused()),
        }
    }

    /// Whether a key is required.
    pub fn has_any(&self) -> bool {
        !self.keys.is_empty()
    }

    /// Whether there are several keys, each of somebody.
    pub fn has_several(&self) -> bool {
        self.keys.len() > 1
    }

    /// The error of a request without a good key.
    pub fn refused() -> ApiError {
        ApiError::new(
            StatusCode::UNAUTHORIZED,
            "expected the header `Authorization: Bearer KEY` with a key of this server",
        )
        .with_code("invalid_api_key")
    }
}

/// Refuses what a web page of somebody else makes a browser send.
///
/// A server without keys trusts whoever reaches it. A page may reach it too: through a name
/// that suddenly resolves to this machine (so the `Host` must be one of `host_names`), or by a plain
/// cross-origin request (so the `Origin` must be the server itself, one of `origin_names`, or one that is
/// `allowed`).
///
/// # Errors
/// [`ApiError`] of status 403.
pub fn check_origin(
    headers: &HeaderMap,
    host_names: &[String],
    origin_names: &[String],
    allowed: &AllowedOrigins,
) -> Result<(), ApiError> {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text(header::HOST).unwrap_or_default();
    if !host_names.is_empty() {
        let name = host_name(host).to_ascii_lowercase();
        if !host_names.contains(&name) {
            return Err(ApiError::new(
                StatusCode::FORBIDDEN,
                "this server is not called by that name; name it with --host-name",
            ));
        }
    }
    if let Some(value) = headers.get(header::ORIGIN) {
        let origin = value.to_str().unwrap_or_default();
        let ours = origin.split_once("://").is_some_and(|(_, authority)| {
            let name = host_name(authority).to_ascii_lowercase();
            authority.eq_ignore_ascii_case(host) || origin_names.contains(&name)
        });
        if !ours && !allowed.allows(origin) {
            return Err(ApiError::new(
                StatusCode::FORBIDDEN,
                "requests from pages of this origin are not taken; --allow-origin lets them in",
            ));
        }
    }
    Ok(())
}

/// `name:port` without its port.
fn host_name(host: &str) -> &str {
    if host.starts_with('[') {
        return host.find(']').map_or(host, |end| &host[..=end]);
    }
    host.split(':').next().unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (name.parse::<HeaderName>().unwrap(), value.parse().unwrap()))
            .collect()
    }

    #[test]
    fn one_of_the_keys_and_nothing_like_it() {
        // As a list in the environment is cut up.
        let keys = ["key-number-one", " key-number-two"].map(|key| ApiKey::new(key).unwrap());
        let check = KeyCheck::new(&keys);
        for good in [
            "Bearer key-number-one",
            "bearer key-number-two",
            "Bearer  key-number-one",
        ] {
            assert!(
                check.check(&headers(&[("authorization", good)])).is_ok(),
                "{good}"
            );
        }
        for bad in [
            "Bearer",
            "Bearer ",
            "Bearer key-number-on",
            "Bearer key-number-onekey-number-two",
            "Basic key-number-one",
            "key-number-one",
        ] {
            let error = check
                .check(&headers(&[("authorization", bad)]))
                .unwrap_err();
            assert_eq!(error.status, StatusCode::UNAUTHORIZED, "{bad}");
        }
        assert!(check.check(&headers(&[])).is_err());
        assert_eq!(KeyCheck::new(&[]).check(&headers(&[])), Ok(None));
    }

    #[test]
    fn a_key_is_judged_without_the_blanks_around_it() {
        for (text, error) in [
            ("", KeyError::Empty),
            ("        ", KeyError::Empty),
            ("\t\u{a0}\u{3000}   ", KeyError::Empty),
            ("       a", KeyError::Short(1)),
            ("a              ", KeyError::Short(1)),
            ("钥匙钥匙钥匙钥匙", KeyError::NotAscii),
            ("line\nbreak-1", KeyError::NotAscii),
        ] {
            assert_eq!(ApiKey::new(text), Err(error), "{text:?}");
        }
        assert_eq!(ApiKey::new(" 12345678 "), ApiKey::new("12345678"));
    }

    #[test]
    fn one_client_however_its_key_is_written() {
        let check = KeyCheck::new(&[ApiKey::new("key-number-one").unwrap()]);
        let client = |text: &str| check.check(&headers(&[("authorization", text)])).unwrap();
        assert_eq!(
            client("Bearer key-number-one"),
            client("bearer   key-number-one")
        );
    }

    #[test]
    fn one_client_is_one_address_in_either_form() {
        let client = |address: &str| Peer::new(address.parse().unwrap()).client;
        assert_eq!(client("::ffff:192.0.2.1"), client("192.0.2.1"));
        assert_ne!(client("::ffff:192.0.2.1"), client("::ffff:192.0.2.2"));
        assert_eq!(client("2001:db8::1"), client("2001:db8::2"));
    }

    #[test]
    fn foreign_pages_and_names_are_refused() {
        let names = ["localhost".to_owned(), "[::1]".to_owned()];
        let none = AllowedOrigins::default();
        let check =
            |pairs: &[(&str, &str)]| check_origin(&headers(pairs), &names, &[], &none).is_ok();
        assert!(check(&[("host", "localhost:7860")]));
        assert!(check(&[("host", "[::1]:7860")]));
        assert!(check(&[("host", "LOCALHOST")]));
        assert!(!check(&[("host", "evil.example:7860")]));
        assert!(!check(&[]));
        assert!(check(&[
            ("host", "localhost:7860"),
            ("origin", "http://localhost:7860")
        ]));
        for origin in [
            "https://evil.example",
            "null",
            "http://localhost:80",
            "localhost:7860",
        ] {
            assert!(
                !check(&[("host", "localhost:7860"), ("origin", origin)]),
                "{origin}"
            );
        }
        let proxied = headers(&[("host", "inner:80"), ("origin", "https://xray.example")]);
        assert!(check_origin(&proxied, &[], &[], &none).is_err());
        assert!(check_origin(&proxied, &[], &["xray.example".into()], &none).is_ok());
        // An allowed origin still has to call the server by its name.
        let allowed = AllowedOrigins::new(&["https://viewer.example".into()]).unwrap();
        let of_viewer = |host| headers(&[("host", host), ("origin", "https://viewer.example")]);
        assert!(check_origin(&of_viewer("localhost"), &names, &[], &allowed).is_ok());
        assert!(check_origin(&of_viewer("localhost"), &names, &[], &none).is_err());
        assert!(check_origin(&of_viewer("evil.example"), &names, &[], &allowed).is_err());
    }
}
