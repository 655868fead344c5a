//! What the host did when: spans of loader, launches and waits, in the form Chrome's tracing reads.
//!
//! Open the file in `chrome://tracing` or <https://ui.perfetto.dev>.

use std::{
    io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;

use crate::base::files::{FileError, write_atomic};

/// Lane of the thread that drives the device; loader threads have the lanes after it.
pub const HOST: usize = 0;

/// One span.
#[derive(Debug, Clone, Copy)]
struct Span {
    name: &'static str,
    lane: usize,
    step: usize,
    start: Duration,
    length: Duration,
}

/// Takes spans in, where it is on; clones share them. Waiting for data is added up in any case.
#[derive(Debug, Clone)]
pub struct Trace {
    start: Instant,
    spans: Option<Arc<Mutex<Vec<Span>>>>,
    waited_nanos: Arc<AtomicU64>,
}

impl Default for Trace {
    fn default() -> Self {
        Self::new(false)
    }
}

impl Trace {
    /// Starts the clock; spans are kept only where `on`.
    pub fn new(on: bool) -> Self {
        Self {
            start: Instant::now(),
            spans: on.then(Arc::default),
            waited_nanos: Arc::default(),
        }
    }

    /// Does `work` as a span of step `step` (from 0) in a lane.
    pub fn span<T>(
        &self,
        lane: usize,
        name: &'static str,
        step: usize,
        work: impl FnOnce() -> T,
    ) -> T {
        let start = Instant::now();
        let result = work();
        self.note(lane, name, step, start);
        result
    }

    /// Waits for step `step`'s samples as a span.
    pub fn wait_for_data<T>(&self, step: usize, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        let waited = start.elapsed().as_nanos() as u64;
        self.waited_nanos.fetch_add(waited, Ordering::Relaxed);
        self.note(HOST, "wait for samples", step, start);
        result
    }

    fn note(&self, lane: usize, name: &'static str, step: usize, start: Instant) {
        if let Some(spans) = &self.spans {
            let span = Span {
                name,
                lane,
                step,
                start: start.saturating_duration_since(self.start),
                length: start.elapsed(),
            };
            spans
                .lock()
                .unwrap_or_else(|lock| lock.into_inner())
                .push(span);
        }
    }

    /// How long the driving thread has waited for samples: at most so long the device had no work.
    pub fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited_nanos.load(Ordering::Relaxed))
    }

    /// The wait in words, beside the time since the clock was started.
    pub fn summary(&self) -> String {
        format!(
            "{:.1} s of {:.1} s were spent waiting for samples",
            self.waited().as_secs_f64(),
            self.start.elapsed().as_secs_f64()
        )
    }

    /// Writes the spans so far; nothing where none are kept.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        let Some(spans) = &self.spans else {
            return Ok(());
        };
        let spans = spans
            .lock()
            .unwrap_or_else(|lock| lock.into_inner())
            .clone();
        let lanes = spans.iter().map(|span| span.lane).max().unwrap_or(HOST);
        let names = (HOST..=lanes).map(|lane| {
            let name = match lane {
                HOST => "device's host thread".to_string(),
                loader => format!("loader {loader}"),
            };
            json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": lane, "args": {"name": name}})
        });
        let microseconds = |time: Duration| time.as_nanos() as f64 / 1e3;
        let events: Vec<_> = names
            .chain(spans.iter().map(|span| {
                json!({
                    "name": span.name,
                    "ph": "X",
                    "pid": 1,
                    "tid": span.lane,
                    "ts": microseconds(span.start),
                    "dur": microseconds(span.length),
                    "args": {"step": span.step + 1},
                })
            }))
            .collect();
        write_atomic(path, |out| {
            serde_json::to_writer(&mut *out, &json!({"traceEvents": events}))
                .map_err(io::Error::from)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_written_with_lane_step_and_length() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let trace = Trace::new(true);
        let pause = Duration::from_millis(5);
        trace.wait_for_data(0, || std::thread::sleep(pause));
        let seven = trace.span(2, "window", 3, || 7);
        assert_eq!(seven, 7);
        trace.write(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let all: serde_json::Value = serde_json::from_str(&text).unwrap();
        let events = all["traceEvents"].as_array().unwrap();
        let spans: Vec<_> = events.iter().filter(|one| one["ph"] == "X").collect();
        assert_eq!(events.len(), 3 + spans.len());
        assert_eq!((spans.len(), &spans[1]["tid"]), (2, &json!(2)));
        assert_eq!(spans[1]["args"]["step"], 4);
        assert!(spans[0]["dur"].as_f64().unwrap() >= 5e3);
        assert!(trace.waited() >= pause && trace.summary().contains("waiting for samples"));
        // Off, nothing is kept; the wait still counts.
        let off = Trace::default();
        off.wait_for_data(0, || std::thread::sleep(pause));
        off.write(&folder.path().join("none.json")).unwrap();
        assert!(off.waited() >= pause && !folder.path().join("none.json").exists());
    }
}
