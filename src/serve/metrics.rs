//! Counters of the server in Prometheus' text form.

use std::{
    fmt::Write,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::base::system::resident_memory;

/// A number that goes up, or one that is set.
#[derive(Debug, Default)]
pub struct Number(AtomicU64);

impl Number {
    /// Counts up.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// Counts down.
    pub fn subtract(&self, less: u64) {
        self.0.fetch_sub(less, Ordering::Relaxed);
    }

    /// Replaces the value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the buckets, in seconds.
const BOUNDS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0,
];

/// A distribution of durations.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Number; BOUNDS.len()],
    count: Number,
    microseconds: Number,
}

impl Histogram {
    /// Adds one duration.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        if let Some(bucket) = BOUNDS.iter().position(|bound| seconds <= *bound) {
            self.buckets[bucket].add(1);
        }
        self.count.add(1);
        self.microseconds.add(duration.as_micros() as u64);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut below = 0;
        for (bound, bucket) in BOUNDS.iter().zip(&self.buckets) {
            below += bucket.get();
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {below}");
        }
        let count = self.count.get().max(below);
        let sum = self.microseconds.get() as f64 / 1e6;
        let _ = writeln!(
            out,
            "{name}_bucket{{le=\"+Inf\"}} {count}\n{name}_sum {sum}\n{name}_count {count}"
        );
    }
}

/// Status codes that are counted by themselves.
const STATUSES: [u16; 14] = [
    200, 204, 400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503, 504,
];

/// Everything that is counted.
#[derive(Debug, Default)]
#[allow(missing_docs, reason = "`text` says what each counts")]
pub struct Metrics {
    pub running: Number,
    pub cache_running_tokens: Number,
    pub cache_kept_tokens: Number,
    pub cache_kept_sequences: Number,
    pub prompt_tokens: Number,
    pub cached_tokens: Number,
    pub generated_tokens: Number,
    pub images_encoded: Number,
    pub prefix_lookups: Number,
    pub prefix_hits: Number,
    pub finished: Number,
    pub cancelled: Number,
    pub failed: Number,
    pub preempted: Number,
    pub connections: Number,
    pub waiting_memory: Number,
    pub first_token: Histogram,
    pub per_token: Histogram,
    responses: [Number; STATUSES.len()],
    other_responses: Number,
    waiting: OnceLock<Arc<AtomicUsize>>,
}

impl Metrics {
    /// Reads the length of the queue from the engine's own counter.
    pub fn watch_queue(&self, waiting: Arc<AtomicUsize>) {
        let _ = self.waiting.set(waiting);
    }

    /// Counts one response.
    pub fn response(&self, status: u16) {
        match STATUSES.iter().position(|known| *known == status) {
            Some(place) => self.responses[place].add(1),
            None => self.other_responses.add(1),
        }
    }

    /// Everything in Prometheus' text form; `cache_tokens` is the size of the cache.
    pub fn text(&self, cache_tokens: usize) -> String {
        let mut out = String::new();
        let waiting = self
            .waiting
            .get()
            .map_or(0, |waiting| waiting.load(Ordering::Relaxed));
        let mut number = |kind: &str, name: &str, help: &str, value: u64| {
            let _ = writeln!(
                out,
                "# HELP xray_{name} {help}\n# TYPE xray_{name} {kind}\nxray_{name} {value}"
            );
        };
        let gauge = "gauge";
        let counter = "counter";
        number(gauge, "queue", "Sequences that wait.", waiting as u64);
        number(
            gauge,
            "running",
            "Sequences in the batch.",
            self.running.get(),
        );
        number(
            gauge,
            "connections",
            "Open connections.",
            self.connections.get(),
        );
        number(
            gauge,
            "waiting_memory_bytes",
            "Memory counted for bodies, pictures and prompts.",
            self.waiting_memory.get(),
        );
        number(
            gauge,
            "cache_tokens",
            "Size of the key/value cache.",
            cache_tokens as u64,
        );
        number(
            gauge,
            "cache_running_tokens",
            "Of these set aside for the batch.",
            self.cache_running_tokens.get(),
        );
        number(
            gauge,
            "cache_kept_tokens",
            "Of these kept from finished sequences.",
            self.cache_kept_tokens.get(),
        );
        number(
            gauge,
            "cache_kept_sequences",
            "Finished sequences kept.",
            self.cache_kept_sequences.get(),
        );
        number(
            counter,
            "prompt_tokens_total",
            "Prompt tokens computed.",
            self.prompt_tokens.get(),
        );
        number(
            counter,
            "cached_prompt_tokens_total",
            "Prompt tokens taken from the cache.",
            self.cached_tokens.get(),
        );
        number(
            counter,
            "generated_tokens_total",
            "Tokens generated.",
            self.generated_tokens.get(),
        );
        number(
            counter,
            "images_encoded_total",
            "Images put through the vision tower.",
            self.images_encoded.get(),
        );
        number(
            counter,
            "prefix_lookups_total",
            "Prompts looked up in the cache.",
            self.prefix_lookups.get(),
        );
        number(
            counter,
            "prefix_hits_total",
            "Prompts that began in the cache.",
            self.prefix_hits.get(),
        );
        number(
            counter,
            "sequences_finished_total",
            "Answers that came to their end.",
            self.finished.get(),
        );
        number(
            counter,
            "sequences_cancelled_total",
            "Answers nobody waited for.",
            self.cancelled.get(),
        );
        number(
            counter,
            "sequences_failed_total",
            "Answers that broke off.",
            self.failed.get(),
        );
        number(
            counter,
            "sequences_preempted_total",
            "Times an answer gave its place in the batch or cache to another and went on later.",
            self.preempted.get(),
        );
        if let Some(bytes) = resident_memory() {
            number(
                gauge,
                "resident_memory_bytes",
                "Host memory of the process.",
                bytes,
            );
        }
        let _ = writeln!(
            out,
            "# HELP xray_responses_total Responses by status.\n# TYPE xray_responses_total counter"
        );
        for (status, count) in STATUSES.iter().zip(&self.responses) {
            let _ = writeln!(
                out,
                "xray_responses_total{{status=\"{status}\"}} {}",
                count.get()
            );
        }
        let _ = writeln!(
            out,
            "xray_responses_total{{status=\"other\"}} {}",
            self.other_responses.get()
        );
        self.first_token.write(
            &mut out,
            "xray_time_to_first_token_seconds",
            "From submission to the first token.",
        );
        self.per_token.write(
            &mut out,
            "xray_time_per_token_seconds",
            "Between two tokens of an answer.",
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_add_up() {
        let histogram = Histogram::default();
        for milliseconds in [1, 30, 30, 700_000] {
            histogram.observe(Duration::from_millis(milliseconds));
        }
        let mut out = String::new();
        histogram.write(&mut out, "x", "help");
        assert!(out.contains("x_bucket{le=\"0.001\"} 1\n"), "{out}");
        assert!(out.contains("x_bucket{le=\"0.05\"} 3\n"), "{out}");
        assert!(out.contains("x_bucket{le=\"+Inf\"} 4\n"), "{out}");
        assert!(out.contains("x_count 4"), "{out}");
    }
}
