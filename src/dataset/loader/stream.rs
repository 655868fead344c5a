//! The windows of a run as they come from the threads that make them.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
    mpsc::{Receiver, RecvTimeoutError},
};

use burn::data::dataloader::{DataLoaderIterator, Progress};

use super::WindowLoader;
use crate::{batch::window::Window, dataset::error::DatasetError};

/// The windows of a run in order; an error ends it (see [`WindowLoader::take_error`]).
pub struct WindowStream {
    pub(super) channels: Vec<Receiver<Result<Window, DatasetError>>>,
    pub(super) steps: Vec<usize>,
    /// Place of the next one in `steps`.
    pub(super) next: usize,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) loader: WindowLoader,
}

impl WindowStream {
    /// Waits for the next window of a worker; `None` if the worker is gone.
    fn receive(&self, worker: usize) -> Option<Result<Window, DatasetError>> {
        let channel = &self.channels[worker];
        let Some(patience) = self.loader.patience else {
            return channel.recv().ok();
        };
        match channel.recv_timeout(patience) {
            Ok(window) => Some(window),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                let WindowLoader { plan, dataset, .. } = &self.loader;
                let step = self.steps[self.next];
                let rows = plan.rows(step, dataset.len());
                Some(Err(DatasetError::Slow {
                    file: dataset.name().to_string(),
                    step: step + 1,
                    rows: rows.into_iter().map(|row| dataset.row(row)).collect(),
                    seconds: patience.as_secs_f64(),
                }))
            }
        }
    }
}

impl Iterator for WindowStream {
    type Item = Window;

    fn next(&mut self) -> Option<Window> {
        if self.next >= self.steps.len() {
            return None;
        }
        // Worker `k` makes every k-th window: receiving in turn keeps the order.
        let worker = self.next % self.channels.len();
        match self.receive(worker)? {
            Ok(window) => {
                self.next += 1;
                Some(window)
            }
            Err(error) => {
                *self
                    .loader
                    .error
                    .lock()
                    .unwrap_or_else(|lock| lock.into_inner()) = Some(error);
                None
            }
        }
    }
}

impl DataLoaderIterator<Window> for WindowStream {
    fn progress(&self) -> Progress {
        Progress::new(self.next, self.steps.len())
    }
}

impl Drop for WindowStream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
