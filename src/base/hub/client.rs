//! Requests to a hub: redirects followed here, so that the token stays with the hub; failures sorted into
//! those that are tried again and those that are final.

use std::time::Duration;

use ureq::{
    Agent, Body,
    http::{HeaderMap, Response, StatusCode, Uri},
};

use super::{
    HubError,
    name::Hub,
    settings::{HubPlace, HubSettings, Token},
};

/// Requests for one thing before it is given up, if nothing comes.
const ATTEMPTS: u32 = 5;

/// Wait after the first failure; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// Longest wait that a server can ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// Redirects that are followed.
const MAX_REDIRECTS: usize = 10;

/// Longest answer that is read into memory.
const LONGEST_TEXT: u64 = 64 << 20;

/// A request that failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// May go better later, after the wait that the server named.
    Again {
        reason: String,
        wait: Option<Duration>,
    },
    /// Will not.
    Final(HubError),
}

/// Counts failures in a row, and says how long to wait after each.
#[derive(Debug, Default)]
pub(super) struct Attempts(u32);

impl Attempts {
    /// Something came: the next failure is a first one.
    pub(super) fn reset(&mut self) {
        self.0 = 0;
    }

    /// The wait before the next attempt; `None` if there is none.
    pub(super) fn next_wait(&mut self, named: Option<Duration>) -> Option<Duration> {
        self.0 += 1;
        let wait = FIRST_WAIT * 2_u32.pow(self.0 - 1);
        (self.0 < ATTEMPTS).then(|| named.map_or(wait, |named| named.min(LONGEST_WAIT)))
    }
}

/// Requests to a hub.
pub(super) struct Client {
    pub(super) hub: Hub,
    pub(super) endpoint: String,
    origin: Origin,
    token: Option<Token>,
    agent: Agent,
}

/// Scheme, host and port.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Origin(String, String, u16);

impl Origin {
    fn of(uri: &Uri) -> Option<Self> {
        let scheme = uri.scheme_str()?.to_ascii_lowercase();
        let port = match scheme.as_str() {
            "https" => 443,
            "http" => 80,
            _ => return None,
        };
        let host = uri.host()?.to_ascii_lowercase();
        Some(Self(scheme, host, uri.port_u16().unwrap_or(port)))
    }
}

/// Which bytes of a file a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// All from this byte on.
    From(u64),
    /// Headers alone, of the hub itself.
    Head,
}

impl Client {
    pub(super) fn new(hub: Hub, settings: &HubSettings) -> Result<Self, HubError> {
        let HubPlace {
            endpoint,
            variable,
            token,
            ..
        } = settings.of(hub);
        let origin = endpoint.parse().ok().as_ref().and_then(Origin::of);
        let Some(origin) = origin else {
            return Err(HubError::Endpoint {
                variable,
                value: endpoint.clone(),
            });
        };
        let builder = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("xray-qwen3vl/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(settings.read_timeout))
            .timeout_recv_response(Some(settings.read_timeout.max(Duration::from_secs(60))))
            .timeout_per_read(Some(settings.read_timeout));
        #[cfg(feature = "tls")]
        let builder = match &settings.certificates {
            Some((variable, path)) => builder.tls_config(tls(variable, path)?),
            None => builder,
        };
        Ok(Self {
            hub,
            endpoint: endpoint.clone(),
            origin,
            token: token.clone(),
            agent: builder.build().new_agent(),
        })
    }

    /// The text at an address of the hub.
    pub(super) fn text(&self, url: &str) -> Result<Vec<u8>, Failure> {
        let (mut response, _) = self.call(url, Ask::From(0))?;
        let read = response
            .body_mut()
            .with_config()
            .limit(LONGEST_TEXT)
            .read_to_vec();
        read.map_err(|error| again(error.to_string()))
    }

    /// The bytes of a file from byte `from` on.
    pub(super) fn file(&self, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        Ok(self.call(url, Ask::From(from))?.0)
    }

    /// What the hub itself, and not where it sends on to, says about a file.
    pub(super) fn head(&self, url: &str) -> Result<HeaderMap, Failure> {
        Ok(self.call(url, Ask::Head)?.1)
    }

    fn call(&self, url: &str, ask: Ask) -> Result<(Response<Body>, HeaderMap), Failure> {
        let mut url = url.to_owned();
        let answer = |url: &str, reason: &str| {
            Failure::Final(HubError::Answer {
                hub: self.hub,
                url: url.to_owned(),
                reason: reason.to_owned(),
            })
        };
        for _ in 0..=MAX_REDIRECTS {
            let uri: Uri = url
                .parse()
                .map_err(|_| answer(&url, "the address cannot be read"))?;
            let origin = Origin::of(&uri).ok_or_else(|| answer(&url, "no http address"))?;
            if origin.0 == "https" && cfg!(not(feature = "tls")) {
                return Err(Failure::Final(HubError::NoTls(url)));
            }
            let mut request = match ask {
                Ask::From(_) => self.agent.get(&url),
                Ask::Head => self.agent.head(&url),
            };
            if let Ask::From(from @ 1..) = ask {
                request = request.header("range", format!("bytes={from}-"));
            }
            // Where a hub sends on to (a CDN) has no business with the token.
            if let Some(Token(token)) = self.token.as_ref().filter(|_| origin == self.origin) {
                request = request.header("authorization", format!("Bearer {token}"));
                if self.hub == Hub::ModelScope {
                    request = request.header("cookie", format!("m_session_id={token}"));
                }
            }
            let response = request.call().map_err(|error| again(error.to_string()))?;
            let status = response.status();
            if !status.is_redirection() {
                check(self, &url, &response)?;
                let headers = response.headers().clone();
                return Ok((response, headers));
            }
            let target = header(response.headers(), "location")
                .and_then(|target| redirected(&uri, target))
                .ok_or_else(|| answer(&url, "a redirect to nowhere"))?;
            let leaves = target.parse().ok().as_ref().and_then(Origin::of) != Some(origin);
            if ask == Ask::Head && leaves {
                let headers = response.headers().clone();
                return Ok((response, headers));
            }
            url = target;
        }
        Err(answer(&url, "it is redirected too often"))
    }
}

fn again(reason: String) -> Failure {
    Failure::Again { reason, wait: None }
}

/// A header as text.
pub(super) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn check(client: &Client, url: &str, response: &Response<Body>) -> Result<(), Failure> {
    let status = response.status();
    if status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE {
        return Ok(());
    }
    let headers = response.headers();
    // Hugging Face's own words for what a status cannot say.
    let code = header(headers, "x-error-code").unwrap_or_default();
    let said = header(headers, "x-error-message").unwrap_or_default();
    let reason = match (code, said) {
        ("", "") => format!("status {status}"),
        (code, "") => format!("status {status}, {code}"),
        (_, said) => format!("status {status}: {said}"),
    };
    let what = url.strip_prefix(&client.endpoint).unwrap_or(url).to_owned();
    Err(match status.as_u16() {
        401 | 403 if code != "RepoNotFound" => Failure::Final(HubError::Denied {
            hub: client.hub,
            id: what,
            reason,
        }),
        401 | 403 | 404 | 410 => Failure::Final(HubError::NotFound {
            hub: client.hub,
            endpoint: client.endpoint.clone(),
            what: format!("`{what}`"),
            hint: match (code, said) {
                ("", "") => String::new(),
                _ => reason,
            },
        }),
        408 | 425 | 429 | 500..=599 => Failure::Again {
            reason,
            wait: header(headers, "retry-after").and_then(retry_after),
        },
        _ => Failure::Final(HubError::Answer {
            hub: client.hub,
            url: url.to_owned(),
            reason,
        }),
    })
}

/// Seconds, or a date as HTTP writes it.
fn retry_after(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = chrono::DateTime::parse_from_rfc2822(text.trim()).ok()?;
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .ok()?;
    let until = u64::try_from(until.timestamp()).ok()?;
    Some(Duration::from_secs(until.saturating_sub(now.as_secs())))
}

/// The address a redirect leads to.
fn redirected(from: &Uri, target: &str) -> Option<String> {
    if target.contains("://") {
        return Some(target.to_owned());
    }
    let scheme = from.scheme_str()?;
    let authority = from.authority()?;
    if let Some(rest) = target.strip_prefix("//") {
        return Some(format!("{scheme}://{rest}"));
    }
    if target.starts_with('/') {
        return Some(format!("{scheme}://{authority}{target}"));
    }
    let (folder, _) = from.path().rsplit_once('/')?;
    Some(format!("{scheme}://{authority}{folder}/{target}"))
}

/// Text as part of a path or a query: everything but letters, digits and `-._~` as `%` and two digits.
pub(super) fn encoded(text: &str, keep_slash: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        let plain = byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        if plain || (keep_slash && byte == b'/') {
            out.push(byte.into());
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Trust in the certificates of a file alone: that of an institution whose proxy opens TLS.
#[cfg(feature = "tls")]
fn tls(variable: &'static str, path: &std::path::Path) -> Result<ureq::tls::TlsConfig, HubError> {
    use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
    let wrong = |reason: String| HubError::Certificates {
        variable,
        path: path.to_path_buf(),
        reason,
    };
    let pem = std::fs::read(path).map_err(|cause| wrong(cause.to_string()))?;
    let items = parse_pem(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| wrong(error.to_string()))?;
    let certificates: Vec<_> = items
        .into_iter()
        .filter_map(|item| match item {
            PemItem::Certificate(certificate) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(wrong("no certificate in it".into()));
    }
    let roots = RootCerts::new_with_certs(&certificates);
    Ok(TlsConfig::builder().root_certs(roots).build())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_leads_where_it_says() {
        let from: Uri = "https://hub.org/a/b?c=d".parse().unwrap();
        for (target, url) in [
            ("https://cdn.org/x?y", "https://cdn.org/x?y"),
            ("//cdn.org/x", "https://cdn.org/x"),
            ("/x", "https://hub.org/x"),
            ("x", "https://hub.org/a/x"),
        ] {
            assert_eq!(redirected(&from, target).as_deref(), Some(url));
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let of = |url: &str| Origin::of(&url.parse().unwrap());
        assert_eq!(of("https://Hub.org/a"), of("https://hub.org:443/b"));
        for other in [
            "http://hub.org/",
            "https://hub.org:8443/",
            "https://x.hub.org/",
        ] {
            assert_ne!(of("https://hub.org/"), of(other), "{other}");
        }
    }

    #[test]
    fn waits_grow_and_end_and_a_server_may_name_them() {
        let mut attempts = Attempts::default();
        let waits: Vec<_> = std::iter::from_fn(|| attempts.next_wait(None)).collect();
        assert_eq!(waits.len(), 4);
        assert!(waits.windows(2).all(|pair| pair[1] == pair[0] * 2));
        attempts.reset();
        let named = Duration::from_secs(7);
        assert_eq!(attempts.next_wait(Some(named)), Some(named));
        let endless = Duration::from_secs(1 << 40);
        assert_eq!(attempts.next_wait(Some(endless)), Some(LONGEST_WAIT));
        assert_eq!(retry_after("7"), Some(named));
        assert_eq!(
            retry_after("Wed, 21 Oct 2015 07:28:00 GMT"),
            Some(Duration::ZERO)
        );
        assert_eq!(retry_after("soon"), None);
    }

    #[test]
    fn names_of_files_are_encoded() {
        assert_eq!(encoded("a b/胸.json", true), "a%20b/%E8%83%B8.json");
        assert_eq!(encoded("refs/pr/1", false), "refs%2Fpr%2F1");
    }
}
