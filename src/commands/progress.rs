//! Progress of long work: a bar on a terminal, plain lines otherwise.

use std::{
    io::{IsTerminal, stderr},
    sync::Mutex,
    time::{Duration, Instant},
};

use burn::tensor::DType;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    ops::quantised::Quantization, qwen3_vl::config::Qwen3VlConfig,
    runtime::accelerator::Accelerator,
};

/// Time between plain lines.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Progress over a known amount of work.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    what: String,
    unit: Unit,
    total: u64,
    /// What was done before the work began.
    skipped: u64,
    started: Instant,
    printed: Instant,
}

/// What is counted.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Unit {
    Bytes,
    Items,
}

impl Progress {
    pub(crate) fn new(what: &str, total: u64, unit: Unit) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let count = match unit {
                Unit::Bytes => "{bytes}/{total_bytes} {bytes_per_sec}",
                Unit::Items => "{pos}/{len}",
            };
            let template = format!("{{msg}} {{wide_bar}} {count}, {{eta}} left");
            let bar = ProgressBar::new(total).with_message(what.to_string());
            match ProgressStyle::with_template(&template) {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        Self {
            bar,
            what: what.to_string(),
            unit,
            total,
            skipped: 0,
            started: Instant::now(),
            printed: Instant::now(),
        }
    }

    /// Leaves what was there before out of the estimate of the time.
    pub(crate) fn skip(&mut self, done: u64) {
        self.skipped = done;
    }

    /// Prints a line above the bar.
    pub(crate) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    pub(crate) fn set(&mut self, done: u64, total: u64) {
        self.total = total;
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            return;
        }
        if self.printed.elapsed() < LINE_EVERY || done == 0 {
            return;
        }
        self.printed = Instant::now();
        let left = self.started.elapsed().as_secs_f64() * (total.saturating_sub(done)) as f64
            / done.saturating_sub(self.skipped).max(1) as f64;
        let (done, total, unit) = match self.unit {
            Unit::Bytes => (done >> 20, total >> 20, " MiB"),
            Unit::Items => (done, total, ""),
        };
        eprintln!("{}: {done} of {total}{unit}, {left:.0} s left", self.what);
    }

    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Shows how far the images of addresses on the web are fetched.
pub(crate) fn show_fetching(done: usize, total: usize) {
    static PROGRESS: Mutex<Option<Progress>> = Mutex::new(None);
    let Ok(mut shown) = PROGRESS.lock() else {
        return;
    };
    let progress = shown.get_or_insert_with(|| Progress::new("images of the web", 0, Unit::Items));
    progress.set(done as u64, total as u64);
    if done == total
        && let Some(progress) = shown.take()
    {
        progress.finish();
    }
}

/// Calls `load` with the progress of bytes that are loaded.
pub(crate) fn loading<T>(load: impl FnOnce(&mut dyn FnMut(u64, u64)) -> T) -> T {
    let mut progress = Progress::new("loading", 0, Unit::Bytes);
    let loaded = load(&mut |done, total| progress.set(done, total));
    progress.finish();
    loaded
}

/// Compiles what the model's kernels need on this card, with progress; at once where it was done before.
/// Batches of up to `largest_batch` are to be decoded; none where a serving engine does it.
pub(crate) fn prepare_kernels<B: Accelerator>(
    config: &Qwen3VlConfig,
    weights: (DType, Option<Quantization>),
    device: &B::Device,
    largest_batch: usize,
) {
    let mut progress = Progress::new("compiling kernels, once a card", 0, Unit::Items);
    B::prepare(config, weights, device, largest_batch, &mut |done, all| {
        progress.set(done, all)
    });
    progress.finish();
}
