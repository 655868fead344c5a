//! Pages of other origins: which may use the server, and the headers that tell their browsers so.
//!
//! Source: the Fetch standard, "CORS protocol".

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    response::Response,
};

/// Why a text is no origin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no origin; expected SCHEME://HOST[:PORT] without a path, `null`, or `*` for any")]
pub struct NoOrigin(String);

/// Origins whose pages may use the server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedOrigins {
    any: bool,
    list: Vec<String>,
}

/// Headers of responses that scripts may read besides the usual ones.
const EXPOSED: &str = "x-request-id, x-ignored-fields, retry-after, www-authenticate";

/// Seconds for which a browser remembers the answer to a preflight request.
const MAX_AGE: &str = "600";

fn is_origin(text: &str) -> bool {
    let Some((scheme, host)) = text.split_once("://") else {
        return false;
    };
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
    let of_host = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte);
    !scheme.is_empty()
        && scheme.bytes().all(letter)
        && host.bytes().all(of_host)
        // `file://` has no host.
        && (!host.is_empty() || scheme.eq_ignore_ascii_case("file"))
}

impl AllowedOrigins {
    /// Reads origins.
    ///
    /// # Errors
    /// [`NoOrigin`], the first of them.
    pub fn new(texts: &[String]) -> Result<Self, NoOrigin> {
        let mut origins = Self::default();
        for text in texts {
            let text = text.trim().to_ascii_lowercase();
            match text.as_str() {
                "*" => origins.any = true,
                "null" => origins.list.push(text),
                _ if is_origin(&text) => origins.list.push(text),
                _ => return Err(NoOrigin(text)),
            }
        }
        Ok(origins)
    }

    /// Whether pages of any origin may use the server.
    pub fn any(&self) -> bool {
        self.any
    }

    fn lists(&self, origin: &str) -> bool {
        self.list.iter().any(|one| one.eq_ignore_ascii_case(origin))
    }

    /// Whether pages of this origin may use the server.
    pub(super) fn allows(&self, origin: &str) -> bool {
        self.any || self.lists(origin)
    }

    /// The response to a preflight request; `None` for any other, and from an origin that is not allowed.
    pub(super) fn preflight(&self, request: &Request) -> Option<Response> {
        let headers = request.headers();
        let asks = headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
        if request.method() != Method::OPTIONS || !asks || !self.allows(origin_of(headers)?) {
            return None;
        }
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NO_CONTENT;
        let out = response.headers_mut();
        out.insert(
            header::ACCESS_CONTROL_ALLOW_METHODS,
            HeaderValue::from_static("GET, POST, OPTIONS"),
        );
        // Clients have headers of their own; `*` would leave `Authorization` out.
        if let Some(wanted) = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
            out.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
        }
        let private = HeaderName::from_static("access-control-request-private-network");
        if headers.contains_key(private) {
            let allow = HeaderName::from_static("access-control-allow-private-network");
            out.insert(allow, HeaderValue::from_static("true"));
        }
        out.insert(
            header::ACCESS_CONTROL_MAX_AGE,
            HeaderValue::from_static(MAX_AGE),
        );
        Some(response)
    }

    /// Adds the headers that let a page of `origin` read a response.
    pub(super) fn mark(&self, origin: Option<&HeaderValue>, headers: &mut HeaderMap) {
        if self.list.is_empty() && !self.any {
            return;
        }
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
        let Some(origin) = origin else {
            return;
        };
        let text = origin.to_str().unwrap_or_default();
        if self.lists(text) {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            let yes = HeaderValue::from_static("true");
            headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, yes);
        } else if self.any {
            // Never with credentials: that would be every page in the name of the browser's user.
            let any = HeaderValue::from_static("*");
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, any);
        } else {
            return;
        }
        let exposed = HeaderValue::from_static(EXPOSED);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
    }
}

/// The text of the `Origin` header.
pub(super) fn origin_of(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::ORIGIN)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_a_scheme_and_a_host() {
        let read = |text: &str| AllowedOrigins::new(&[text.to_owned()]);
        for good in [
            "https://viewer.example",
            "http://localhost:3000",
            "http://[::1]:3000",
            "chrome-extension://abcdef",
            "file://",
            "null",
            "*",
        ] {
            assert!(read(good).is_ok(), "{good}");
        }
        for bad in [
            "viewer.example",
            "https://viewer.example/",
            "https://a b",
            "https://",
            "",
            "://x",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
        let origins = read("https://Viewer.example").unwrap();
        assert!(origins.allows("https://viewer.example"));
        assert!(!origins.allows("https://viewer.example.evil.example"));
        assert!(!origins.allows("http://viewer.example"));
        assert!(read("*").unwrap().allows("https://anything.example"));
        assert!(!AllowedOrigins::default().allows("null"));
    }
}
