//! Counters of the server, for Prometheus.

use std::{fmt, time::Duration};

use prometheus_client::{
    encoding::prometheus_text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Metric, Registry},
};

use crate::base::system::resident_memory;

/// Type of the response that holds [`Metrics::text`].
pub const CONTENT_TYPE: &str = prometheus_text::CONTENT_TYPE;

/// Upper bounds of the buckets, in seconds.
const BUCKETS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0,
];

/// Status codes with a series of their own; all others share one.
const STATUSES: [(u16, &str); 14] = [
    (200, "200"),
    (204, "204"),
    (400, "400"),
    (401, "401"),
    (403, "403"),
    (404, "404"),
    (405, "405"),
    (408, "408"),
    (413, "413"),
    (415, "415"),
    (429, "429"),
    (500, "500"),
    (503, "503"),
    (504, "504"),
];
const OTHER_STATUS: &str = "other";

/// The one label of `xray_responses_total`.
type Status = [(&'static str, &'static str); 1];

/// Everything that is counted.
#[allow(
    missing_docs,
    reason = "`Default` has the text that `/metrics` shows for each"
)]
pub struct Metrics {
    pub queue: Gauge,
    pub running: Gauge,
    pub connections: Gauge,
    pub waiting_memory: Gauge,
    pub cache_tokens: Gauge,
    pub cache_running_tokens: Gauge,
    pub cache_kept_tokens: Gauge,
    pub cache_kept_sequences: Gauge,
    pub prompt_tokens: Counter,
    pub cached_tokens: Counter,
    pub generated_tokens: Counter,
    pub images_encoded: Counter,
    pub prefix_lookups: Counter,
    pub prefix_hits: Counter,
    pub finished: Counter,
    pub cancelled: Counter,
    pub failed: Counter,
    pub preempted: Counter,
    pub scored_tokens: Counter,
    pub drafted_tokens: Counter,
    pub accepted_tokens: Counter,
    resident_memory: Option<Gauge>,
    responses: Family<Status, Counter>,
    first_token: Histogram,
    per_token: Histogram,
    findings: Histogram,
    registry: Registry,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

fn register<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

impl Default for Metrics {
    fn default() -> Self {
        // The encoder adds the prefix, the full stop of a help text, and `_total` to a counter.
        let mut registry = Registry::with_prefix("xray");
        let mut gauge = |name, help| register(&mut registry, name, help, Gauge::default());
        let queue = gauge("queue", "Sequences that wait");
        let running = gauge("running", "Sequences in the batch");
        let connections = gauge("connections", "Open connections");
        let waiting_memory = gauge(
            "waiting_memory_bytes",
            "Memory counted for bodies, pictures and prompts",
        );
        let cache_tokens = gauge("cache_tokens", "Size of the key/value cache");
        let cache_running_tokens =
            gauge("cache_running_tokens", "Of these set aside for the batch");
        let cache_kept_tokens = gauge("cache_kept_tokens", "Of these kept from finished sequences");
        let cache_kept_sequences = gauge("cache_kept_sequences", "Finished sequences kept");
        let resident_memory =
            resident_memory().map(|_| gauge("resident_memory_bytes", "Host memory of the process"));
        let mut counter = |name, help| register(&mut registry, name, help, Counter::default());
        let prompt_tokens = counter("prompt_tokens", "Prompt tokens computed");
        let cached_tokens = counter("cached_prompt_tokens", "Prompt tokens taken from the cache");
        let generated_tokens = counter("generated_tokens", "Tokens generated");
        let images_encoded = counter("images_encoded", "Images put through the vision tower");
        let prefix_lookups = counter("prefix_lookups", "Prompts looked up in the cache");
        let prefix_hits = counter("prefix_hits", "Prompts that began in the cache");
        let finished = counter("sequences_finished", "Answers that came to their end");
        let cancelled = counter("sequences_cancelled", "Answers nobody waited for");
        let failed = counter("sequences_failed", "Answers that broke off");
        let preempted = counter(
            "sequences_preempted",
            "Times an answer gave its place in the batch or cache to another and went on later",
        );
        let scored_tokens = counter(
            "findings_tokens",
            "Tokens computed for probabilities of findings, besides prompts and answers",
        );
        let drafted_tokens = counter("drafted_tokens", "Tokens drafted and computed ahead");
        let accepted_tokens = counter(
            "accepted_drafted_tokens",
            "Of these those that were right, and are among the generated ones",
        );
        let responses = Family::<Status, Counter>::default();
        // A series that is there from the start can be seen to stay at 0.
        for (_, status) in STATUSES {
            drop(responses.get_or_create(&[("status", status)]));
        }
        drop(responses.get_or_create(&[("status", OTHER_STATUS)]));
        let responses = register(&mut registry, "responses", "Responses by status", responses);
        let mut histogram =
            |name, help| register(&mut registry, name, help, Histogram::new(BUCKETS));
        let first_token = histogram(
            "time_to_first_token_seconds",
            "From submission to the first token",
        );
        let per_token = histogram("time_per_token_seconds", "Between two tokens of an answer");
        let findings = histogram(
            "time_to_findings_seconds",
            "From the end of an answer to its probabilities of findings",
        );
        Self {
            queue,
            running,
            connections,
            waiting_memory,
            cache_tokens,
            cache_running_tokens,
            cache_kept_tokens,
            cache_kept_sequences,
            prompt_tokens,
            cached_tokens,
            generated_tokens,
            images_encoded,
            prefix_lookups,
            prefix_hits,
            finished,
            cancelled,
            failed,
            preempted,
            scored_tokens,
            drafted_tokens,
            accepted_tokens,
            resident_memory,
            responses,
            first_token,
            per_token,
            findings,
            registry,
        }
    }
}

impl Metrics {
    /// Counts one response.
    pub fn response(&self, status: u16) {
        let known = STATUSES.iter().find(|(known, _)| *known == status);
        let status = known.map_or(OTHER_STATUS, |(_, text)| text);
        self.responses.get_or_create(&[("status", status)]).inc();
    }

    /// Takes the time from a sequence's submission to its first token.
    pub fn first_token(&self, took: Duration) {
        self.first_token.observe(took.as_secs_f64());
    }

    /// Takes the time between two tokens of an answer.
    pub fn per_token(&self, took: Duration) {
        self.per_token.observe(took.as_secs_f64());
    }

    /// Takes the time from the end of an answer to its probabilities of findings.
    pub fn scored(&self, took: Duration) {
        self.findings.observe(took.as_secs_f64());
    }

    /// Everything in Prometheus' text form.
    ///
    /// # Errors
    /// None in practice: the encoder fails only where the text it writes to does.
    pub fn text(&self) -> Result<String, fmt::Error> {
        if let (Some(gauge), Some(bytes)) = (&self.resident_memory, resident_memory()) {
            gauge.set(as_gauge(bytes));
        }
        let mut text = String::new();
        prometheus_text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// A count as a gauge has it.
pub(super) fn as_gauge(count: impl TryInto<i64>) -> i64 {
    count.try_into().unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_the_names_of_the_dashboards() {
        let metrics = Metrics::default();
        metrics.connections.set(3);
        metrics.prompt_tokens.inc_by(7);
        metrics.response(200);
        metrics.response(418);
        for milliseconds in [1, 30, 30, 700_000] {
            metrics.per_token(Duration::from_millis(milliseconds));
        }
        let text = metrics.text().unwrap();
        for line in [
            "# HELP xray_connections Open connections.",
            "# TYPE xray_connections gauge",
            "xray_connections 3",
            "# TYPE xray_prompt_tokens_total counter",
            "xray_prompt_tokens_total 7",
            "xray_cached_prompt_tokens_total 0",
            "xray_responses_total{status=\"200\"} 1",
            "xray_responses_total{status=\"504\"} 0",
            "xray_responses_total{status=\"other\"} 1",
            "xray_time_per_token_seconds_bucket{le=\"0.001\"} 1",
            "xray_time_per_token_seconds_bucket{le=\"0.05\"} 3",
            "xray_time_per_token_seconds_bucket{le=\"+Inf\"} 4",
            "xray_time_per_token_seconds_count 4",
            "xray_time_to_first_token_seconds_count 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
    }
}
