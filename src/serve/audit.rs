//! One line of the log for a request: who, what, how it ended, how much. Nothing of its content.
//!
//! Every answered question has its line. Lines about anything else, refused requests above all, have a
//! budget, so that who sends nothing but nonsense does not fill a disk.

use std::{
    fmt::Write,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use axum::extract::{MatchedPath, Request};

use super::{auth::Peer, routes::API_ALIASES};

/// Lines of the budget: so many at once, and so many more a second.
const BURST: f64 = 50.0;
const PER_SECOND: f64 = 10.0;

/// Longest id of a request that is taken from its client.
const LONGEST_ID: usize = 128;

/// The budget of lines.
#[derive(Debug)]
pub(super) struct Audit {
    budget: Mutex<Budget>,
}

#[derive(Debug)]
struct Budget {
    lines: f64,
    at: Instant,
    left_out: u64,
}

impl Default for Audit {
    fn default() -> Self {
        Self {
            budget: Mutex::new(Budget {
                lines: BURST,
                at: Instant::now(),
                left_out: 0,
            }),
        }
    }
}

impl Budget {
    /// Takes a line: the number of lines left out before it, or `None` where this one is left out.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.lines = (self.lines + passed * PER_SECOND).min(BURST);
        if self.lines < 1.0 {
            self.left_out += 1;
            return None;
        }
        self.lines -= 1.0;
        Some(std::mem::take(&mut self.left_out))
    }
}

/// What is known of a request; its line is written when the last handle on it is dropped.
pub(super) struct RequestRecord {
    audit: Arc<Audit>,
    id: String,
    started: Instant,
    client: u64,
    method: String,
    /// The route's pattern; a path of the client's own making is not written.
    route: Option<String>,
    facts: Mutex<Facts>,
}

/// What becomes known while a request is answered.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// Status of the response, when there is one.
    pub(super) status: Option<u16>,
    /// Code of the error.
    pub(super) code: Option<&'static str>,
    /// Name of a model there is.
    pub(super) model: Option<String>,
    pub(super) images: usize,
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    /// How an answer ended, once there is one.
    pub(super) outcome: Option<&'static str>,
}

/// The `x-request-id` of a client, if it is fit for a line of the log.
fn sent_id(request: &Request) -> Option<String> {
    let id = request.headers().get("x-request-id")?.to_str().ok()?;
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    let fits = (1..=LONGEST_ID).contains(&id.len()) && id.bytes().all(letter);
    fits.then(|| id.to_owned())
}

impl RequestRecord {
    pub(super) fn begin(audit: &Arc<Audit>, request: &Request) -> Arc<Self> {
        let route = request.extensions().get::<MatchedPath>();
        let peer = request.extensions().get::<Peer>();
        Arc::new(Self {
            audit: audit.clone(),
            id: sent_id(request).unwrap_or_else(|| format!("{:032x}", rand::random::<u128>())),
            started: Instant::now(),
            client: peer.map_or(0, |peer| peer.client),
            method: request.method().as_str().chars().take(16).collect(),
            route: route.map(|route| route.as_str().to_owned()),
            facts: Mutex::default(),
        })
    }

    /// The request's id, in the log and in `x-request-id`: the client's own where it sent one.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(&self, facts: &Facts) -> String {
        let mut line = format!("request id={} peer={:016x}", self.id, self.client);
        let route = self.route.as_deref().unwrap_or("-");
        let _ = write!(line, " method={} route={route}", self.method);
        let status = facts.status.map_or("-".into(), |status| status.to_string());
        let outcome = facts.outcome.unwrap_or(match facts.status {
            None => "left",
            Some(..400) => "done",
            Some(..500) => "refused",
            Some(_) => "failed",
        });
        let _ = write!(line, " status={status} outcome={outcome}");
        if let Some(code) = facts.code {
            let _ = write!(line, " code={code}");
        }
        if let Some(model) = &facts.model {
            let _ = write!(
                line,
                " model={} images={} prompt_tokens={} completion_tokens={}",
                serde_json::Value::from(model.as_str()),
                facts.images,
                facts.prompt_tokens,
                facts.completion_tokens,
            );
        }
        let _ = write!(line, " seconds={:.3}", self.started.elapsed().as_secs_f64());
        line
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let facts = self.facts();
        let refused = facts.status.is_none_or(|status| status >= 400);
        let answered = facts.outcome.is_some();
        let of_api = self.route.as_deref().is_some_and(|route| {
            route.starts_with("/v1/") || API_ALIASES.contains(&route.trim_end_matches('/'))
        });
        if !refused && !of_api {
            return;
        }
        let left_out = if answered {
            0
        } else {
            let mut budget = self
                .audit
                .budget
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            match budget.take(Instant::now()) {
                Some(left_out) => left_out,
                None => return,
            }
        };
        if left_out > 0 {
            log::warn!("lines about {left_out} more requests were left out");
        }
        log::info!("{}", self.line(&facts));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_flood_of_refused_requests_has_a_bounded_number_of_lines() {
        let start = Instant::now();
        let mut budget = Budget {
            lines: BURST,
            at: start,
            left_out: 0,
        };
        let written = (0..1000).filter(|_| budget.take(start).is_some()).count();
        assert_eq!(written, 50);
        // A second later there are ten more, and the first of them says what is missing.
        let later = start + Duration::from_secs(1);
        assert_eq!(budget.take(later), Some(950));
        assert_eq!((0..100).filter_map(|_| budget.take(later)).sum::<u64>(), 0);
        assert_eq!(budget.left_out, 91);
    }

    #[test]
    fn an_id_of_the_client_is_taken_where_it_fits_a_line() {
        let id = |text: &str| {
            let request = Request::builder()
                .header("x-request-id", text)
                .body(axum::body::Body::empty())
                .unwrap();
            RequestRecord::begin(&Arc::default(), &request)
                .id()
                .to_owned()
        };
        assert_eq!(id("7f-A_b.c:1"), "7f-A_b.c:1");
        for other in ["", "a b", "x\ty", "\u{e9}", &"a".repeat(129)] {
            assert_eq!(id(other).len(), 32, "{other}");
        }
    }

    #[test]
    fn a_line_names_the_route_and_never_the_path() {
        let request = Request::builder()
            .uri("/v1/models/zhangsan-1985")
            .body(axum::body::Body::empty())
            .unwrap();
        let record = RequestRecord::begin(&Arc::default(), &request);
        record.facts().status = Some(401);
        record.facts().code = Some("invalid_api_key");
        let line = record.line(&record.facts());
        assert!(
            line.contains("status=401 outcome=refused code=invalid_api_key"),
            "{line}"
        );
        assert!(
            line.contains(record.id()) && !line.contains("zhangsan"),
            "{line}"
        );
    }
}
