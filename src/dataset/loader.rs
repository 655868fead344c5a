//! Windows of samples, one an optimizer step, made by worker threads ahead of the device.

mod packing;
mod plan;
mod share;
mod stream;
#[cfg(test)]
mod tests;
mod windows;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    time::Duration,
};

use burn::{
    data::dataloader::{DataLoader, DataLoaderIterator},
    prelude::Backend,
};

use super::{error::DatasetError, samples::Dataset};
use crate::{base::trace::Trace, batch::window::Window, runtime::pipeline::TextAndImages};

pub use plan::{Overlong, WindowKind, WindowPlan};
pub use share::{Share, dealt_out};
pub use stream::WindowStream;
pub use windows::Batches;

/// Windows that each worker makes in advance.
const AHEAD: usize = 2;

/// Makes the windows of a run.
#[derive(Debug, Clone)]
pub struct WindowLoader {
    dataset: Dataset,
    parts: Arc<TextAndImages>,
    plan: WindowPlan,
    /// First step.
    start: usize,
    /// Step after the last.
    end: usize,
    workers: usize,
    /// Of each window, what this process reads.
    share: Option<Share>,
    /// Of the windows, which this process makes at all.
    dealt: Option<Share>,
    patience: Option<Duration>,
    trace: Trace,
    skipped: Arc<AtomicUsize>,
    error: Arc<Mutex<Option<DatasetError>>>,
}

impl WindowLoader {
    /// A loader for steps `start..` of the run.
    pub fn new(
        dataset: Dataset,
        parts: Arc<TextAndImages>,
        plan: WindowPlan,
        start: usize,
        workers: usize,
    ) -> Self {
        let end = plan.total_steps(dataset.len());
        Self {
            dataset,
            parts,
            plan,
            start,
            end,
            workers: workers.max(1),
            share: None,
            dealt: None,
            patience: None,
            trace: Trace::default(),
            skipped: Arc::default(),
            error: Arc::default(),
        }
    }

    /// Ends the run after `steps` steps at the latest.
    #[must_use]
    pub fn up_to(mut self, steps: usize) -> Self {
        self.end = self.end.min(steps);
        self
    }

    /// Reads only what the devices of this process take of each window; the rest is counted by text and headers.
    #[must_use]
    pub fn shared(mut self, share: Option<Share>) -> Self {
        self.share = share;
        self
    }

    /// Makes only the windows that fall to this process when they are dealt out in turn, each of them whole.
    #[must_use]
    pub fn dealt(mut self, share: Option<Share>) -> Self {
        self.dealt = share;
        self
    }

    /// Makes a window that is not ready in this time an error in place of waiting on.
    #[must_use]
    pub fn with_patience(mut self, patience: Option<Duration>) -> Self {
        self.patience = patience;
        self
    }

    /// Notes in `trace` when each worker makes which window.
    #[must_use]
    pub fn with_trace(mut self, trace: Trace) -> Self {
        self.trace = trace;
        self
    }

    /// Step after the last one.
    pub fn end(&self) -> usize {
        self.end
    }

    /// Samples left out so far because they are too long.
    pub fn skipped(&self) -> usize {
        self.skipped.load(Ordering::Relaxed)
    }

    /// What ended the last stream before its time.
    pub fn take_error(&self) -> Option<DatasetError> {
        self.error
            .lock()
            .unwrap_or_else(|lock| lock.into_inner())
            .take()
    }

    /// Makes one window.
    ///
    /// # Errors
    /// [`DatasetError`] names the row.
    pub fn window(&self, step: usize) -> Result<Window, DatasetError> {
        match self.plan.kind {
            WindowKind::Answers => self.window_of_answers(step),
            WindowKind::Pairs | WindowKind::Rows => self.window_of_groups(step),
        }
    }

    /// Windows in order, made in advance by worker threads.
    pub fn stream(&self) -> WindowStream {
        let stop = Arc::new(AtomicBool::new(false));
        let channels = (0..self.workers)
            .map(|worker| {
                let (sender, receiver) = sync_channel(AHEAD);
                let (loader, stop) = (self.clone(), stop.clone());
                std::thread::spawn(move || loader.work(worker, &sender, &stop));
                receiver
            })
            .collect();
        WindowStream {
            channels,
            steps: self.steps(),
            next: 0,
            stop,
            loader: self.clone(),
        }
    }

    /// The steps whose windows are made.
    fn steps(&self) -> Vec<usize> {
        let steps = self.start..self.end;
        let takes = |step: &usize| self.dealt.is_none_or(|dealt| dealt.takes(*step));
        steps.filter(takes).collect()
    }

    fn work(
        &self,
        worker: usize,
        sender: &SyncSender<Result<Window, DatasetError>>,
        stop: &AtomicBool,
    ) {
        for step in self.steps().into_iter().skip(worker).step_by(self.workers) {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let window = (self.trace).span(1 + worker, "samples", step, || self.window(step));
            if sender.send(window).is_err() {
                return;
            }
        }
    }
}

impl<B: Backend> DataLoader<B, Window> for WindowLoader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<Window> + 'a> {
        Box::new(self.stream())
    }

    fn num_items(&self) -> usize {
        self.end - self.start.min(self.end)
    }

    // Windows are host data: every device takes them as they are.
    fn to_device(&self, _device: &B::Device) -> Arc<dyn DataLoader<B, Window>> {
        Arc::new(self.clone())
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, Window>> {
        let mut part = self.clone();
        part.end = (self.start + end).min(self.end);
        part.start = self.start + start;
        Arc::new(part)
    }
}
