//! Who asks: the key, the name the server was called by, and the page a browser asks from.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::error::ApiError;

/// The other end of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// Tells askers apart.
    pub client: u64,
}

impl Peer {
    /// An asker by address.
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

/// Hashes of the keys of which one must be shown.
#[derive(Clone, Default)]
pub struct KeyCheck {
    hashes: Vec<[u8; 32]>,
}

impl KeyCheck {
    /// A check against `keys`; none lets everybody in.
    pub fn new(keys: &[String]) -> Self {
        Self {
            hashes: keys
                .iter()
                .map(|key| Sha256::digest(key.trim()).into())
                .collect(),
        }
    }

    /// Looks for `Authorization: Bearer KEY`.
    ///
    /// Hashes are compared, all of them and to the end, so that the time tells nothing.
    ///
    /// # Errors
    /// [`ApiError`] of status 401.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.hashes.is_empty() {
            return Ok(());
        }
        let shown = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map_or("", |(_, key)| key.trim());
        let shown: [u8; 32] = Sha256::digest(shown).into();
        let found = self
            .hashes
            .iter()
            .fold(Choice::from(0), |found, hash| found | hash.ct_eq(&shown));
        if bool::from(found) {
            Ok(())
        } else {
            Err(ApiError::new(
                StatusCode::UNAUTHORIZED,
                "expected the header `Authorization: Bearer KEY` with a key of this server",
            )
            .with_code("invalid_api_key"))
        }
    }
}

/// Refuses what a web page of somebody else makes a browser send.
///
/// A server that asks for no key trusts whoever reaches it. A page may reach it too: through a name
/// that suddenly resolves to this machine (so the `Host` must be one of `host_names`), or by a plain
/// cross-origin request (so the `Origin` must be the server itself, or one of `origin_names`).
///
/// # Errors
/// [`ApiError`] of status 403.
pub fn check_origin(
    headers: &HeaderMap,
    host_names: &[String],
    origin_names: &[String],
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
        if !ours {
            return Err(ApiError::new(
                StatusCode::FORBIDDEN,
                "requests from pages of other origins are not taken",
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
        let check = KeyCheck::new(&["one".into(), " two".into()]);
        for good in ["Bearer one", "bearer two", "Bearer  one"] {
            assert!(
                check.check(&headers(&[("authorization", good)])).is_ok(),
                "{good}"
            );
        }
        for bad in [
            "Bearer",
            "Bearer ",
            "Bearer on",
            "Bearer onetwo",
            "Basic one",
            "one",
        ] {
            let error = check
                .check(&headers(&[("authorization", bad)]))
                .unwrap_err();
            assert_eq!(error.status, StatusCode::UNAUTHORIZED, "{bad}");
        }
        assert!(check.check(&headers(&[])).is_err());
        assert!(KeyCheck::new(&[]).check(&headers(&[])).is_ok());
    }

    #[test]
    fn one_asker_is_one_address_in_either_form() {
        let asker = |address: &str| Peer::new(address.parse().unwrap()).client;
        assert_eq!(asker("::ffff:192.0.2.1"), asker("192.0.2.1"));
        assert_ne!(asker("::ffff:192.0.2.1"), asker("::ffff:192.0.2.2"));
        assert_eq!(asker("2001:db8::1"), asker("2001:db8::2"));
    }

    #[test]
    fn foreign_pages_and_names_are_refused() {
        let names = ["localhost".to_owned(), "[::1]".to_owned()];
        let check = |pairs: &[(&str, &str)]| check_origin(&headers(pairs), &names, &[]).is_ok();
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
        assert!(check_origin(&proxied, &[], &[]).is_err());
        assert!(check_origin(&proxied, &[], &["xray.example".into()]).is_ok());
    }
}
