//! Windows of samples, one an optimizer step, made by worker threads ahead of the device.

mod packing;
mod share;
mod stream;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
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
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::{encode::EncodedSample, error::DatasetError, length::SampleLength, samples::Dataset};
use crate::{
    base::{seeds::mix, trace::Trace},
    batch::{
        images::ImageInput,
        micro_batch::{IGNORE_INDEX, MicroBatch},
        positions::PositionError,
        sequences::{SequenceCounts, Sequences},
        text::{Padding, TextInput},
        window::Window,
    },
    runtime::pipeline::TextAndImages,
};
use packing::fill_rows;

pub use share::Share;
pub use stream::WindowStream;

/// Frames, rows and columns of each image of a sample, in patches.
type Grids = Vec<[usize; 3]>;

/// A row of a window.
struct WindowSample {
    row: usize,
    length: SampleLength,
    /// Until it is taken into a micro-batch; `None` also where it is not read yet.
    encoded: Option<EncodedSample>,
}

/// Windows that each worker makes in advance.
const AHEAD: usize = 2;

/// What is done with samples longer than `max_length`; nothing is ever cut.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Overlong {
    /// Stop and name the row.
    #[default]
    Error,
    /// Leave it out and count it.
    Skip,
}

/// What of each row goes into a window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WindowKind {
    /// Question and answer.
    #[default]
    Answers,
    /// Question with the chosen and with the rejected answer.
    Pairs,
    /// Its number alone: answers are drawn later.
    Rows,
}

/// How samples become windows.
#[derive(Debug, Clone, PartialEq)]
pub struct WindowPlan {
    /// Passes over the data; need not be whole.
    pub epochs: f64,
    /// Samples of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of a window and device.
    pub accumulation: usize,
    /// Devices that share a window.
    pub devices: usize,
    /// Tokens of a row that samples of the whole window are joined into, in place of padded
    /// micro-batches; 0 pads.
    pub packing_tokens: usize,
    /// Longest sample in tokens.
    pub max_length: usize,
    /// What is done with longer ones.
    pub overlong: Overlong,
    /// Decides the order; every epoch has its own.
    pub seed: u64,
    /// Keeps the order of the file: for validation.
    pub in_order: bool,
    /// What of each row goes into a window.
    pub kind: WindowKind,
}

impl WindowPlan {
    /// Samples of a full window.
    pub fn window_samples(&self) -> usize {
        self.batch_size * self.accumulation * self.devices
    }

    /// Optimizer steps of an epoch over `samples`.
    pub fn steps_per_epoch(&self, samples: usize) -> usize {
        crate::schedule::steps_per_epoch(
            samples as u64,
            self.devices as u64,
            self.batch_size as u64,
            self.accumulation as u64,
        ) as usize
    }

    /// Optimizer steps of the run.
    pub fn total_steps(&self, samples: usize) -> usize {
        crate::schedule::total_steps(self.steps_per_epoch(samples) as u64, self.epochs) as usize
    }

    /// Rows of the data set in the first `steps` windows.
    pub fn rows_before(&self, steps: usize, samples: usize) -> BTreeSet<usize> {
        (0..steps)
            .flat_map(|step| self.rows(step, samples))
            .collect()
    }

    /// Rows of the data set that make window `step`.
    fn rows(&self, step: usize, samples: usize) -> Vec<usize> {
        let per_epoch = self.steps_per_epoch(samples);
        let (epoch, at) = (step / per_epoch, step % per_epoch);
        let mut order: Vec<usize> = (0..samples).collect();
        if !self.in_order {
            order.shuffle(&mut ChaCha8Rng::seed_from_u64(mix(self.seed, epoch as u64)));
        }
        let from = at * self.window_samples();
        order[from.min(samples)..(from + self.window_samples()).min(samples)].to_vec()
    }
}

/// Samples as micro-batches.
#[derive(Debug, Clone, Default)]
pub struct Batches {
    /// Tokens of all, padding left out.
    pub tokens: usize,
    /// The micro-batches.
    pub batches: Vec<MicroBatch>,
    /// The sequences of each.
    pub sequences: Vec<Sequences>,
    /// Which groups are in each.
    pub groups: Vec<Vec<usize>>,
}

/// Parts of a window for each device, in their order, so that what devices add up one after the other is what one
/// device would add up; a partial window is shared as well.
pub fn dealt_out<T>(all: Vec<T>, devices: usize) -> Vec<Vec<T>> {
    let items = all.len();
    let mut all = all.into_iter();
    (0..devices)
        .map(|device| {
            let part = Share::part(items, device, devices);
            all.by_ref().take(part.len()).collect()
        })
        .collect()
}

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

    /// What `read` makes of the rows of a window, without those that are too long where these are skipped.
    fn each_row<T>(
        &self,
        step: usize,
        read: impl Fn(usize) -> Result<T, DatasetError>,
    ) -> Result<Vec<T>, DatasetError> {
        let rows = self.plan.rows(step, self.dataset.len());
        let mut all = Vec::with_capacity(rows.len());
        for row in rows {
            match read(row) {
                Ok(one) => all.push(one),
                Err(DatasetError::TooLong { .. }) if self.plan.overlong == Overlong::Skip => {
                    self.skipped.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// First and number of the devices of this process.
    fn own_devices(&self) -> (usize, usize) {
        match self.share {
            Some(share) => (share.first, share.count),
            None => (0, self.plan.devices),
        }
    }

    fn epoch(&self, step: usize) -> f64 {
        let per_epoch = self.plan.steps_per_epoch(self.dataset.len()).max(1);
        (step + 1) as f64 / per_epoch as f64
    }

    fn window_of_answers(&self, step: usize) -> Result<Window, DatasetError> {
        let mut samples = self.each_row(step, |row| self.sample(row))?;
        let rows = samples.iter().map(|sample| sample.row).collect();
        let lengths: Vec<usize> = samples.iter().map(|sample| sample.length.tokens).collect();
        let batches = self.places(&lengths);
        let micro_batches = batches.len();
        let devices = self.plan.devices;
        let (first, count) = self.own_devices();
        let mut parts = Vec::with_capacity(count);
        for device in first..first + count {
            let own = &batches[Share::part(micro_batches, device, devices)];
            let own = own
                .iter()
                .map(|places| self.micro_batch(&mut samples, places));
            parts.push(own.collect::<Result<Vec<_>, _>>()?);
        }
        Ok(Window {
            step,
            epoch: self.epoch(step),
            parts,
            sequences: Vec::new(),
            counts: SequenceCounts::default(),
            rows,
            targets: samples.iter().map(|sample| sample.length.targets).sum(),
            micro_batches,
            first_micro_batch: Share::part(micro_batches, first, devices).start,
            tokens: lengths.iter().sum(),
        })
    }

    /// A window of pairs, or of numbers of rows alone. Every process reads all of it: an objective weighs a sequence
    /// by all others.
    fn window_of_groups(&self, step: usize) -> Result<Window, DatasetError> {
        let samples = self.each_row(step, |row| {
            let encoded = match self.plan.kind {
                WindowKind::Pairs => self
                    .dataset
                    .encode_pair(row, &self.parts, self.plan.max_length)?
                    .into(),
                _ => Vec::new(),
            };
            Ok((row, encoded))
        })?;
        let rows = samples.iter().map(|(row, _)| *row).collect();
        // Both answers of a pair are in one micro-batch.
        let groups: Vec<Vec<(usize, EncodedSample)>> = samples
            .into_iter()
            .filter(|(_, encoded)| !encoded.is_empty())
            .map(|(row, encoded)| encoded.into_iter().map(|one| (row, one)).collect())
            .collect();
        let made = self.batches(&groups)?;
        let counts = SequenceCounts::of(&made.sequences);
        let targets = made.batches.iter().map(MicroBatch::targets).sum();
        let micro_batches = made.batches.len();
        let devices = self.plan.devices;
        let (first, count) = self.own_devices();
        let mut parts = dealt_out(made.batches, devices);
        let mut sequences = dealt_out(made.sequences, devices);
        Ok(Window {
            step,
            epoch: self.epoch(step),
            parts: parts.drain(first..first + count).collect(),
            sequences: sequences.drain(first..first + count).collect(),
            counts,
            rows,
            targets,
            micro_batches,
            first_micro_batch: Share::part(micro_batches, first, devices).start,
            tokens: made.tokens,
        })
    }

    /// Which of samples of these lengths make each micro-batch.
    fn places(&self, lengths: &[usize]) -> Vec<Vec<usize>> {
        match self.plan.packing_tokens {
            0 => {
                let places: Vec<usize> = (0..lengths.len()).collect();
                let batches = places.chunks(self.plan.batch_size);
                batches.map(<[usize]>::to_vec).collect()
            }
            tokens => fill_rows(lengths, tokens),
        }
    }

    /// Joins groups of samples to micro-batches, packed or padded; a group is not divided.
    ///
    /// # Errors
    /// [`DatasetError`] names the row.
    pub fn batches(&self, groups: &[Vec<(usize, EncodedSample)>]) -> Result<Batches, DatasetError> {
        let length = |group: &Vec<(usize, EncodedSample)>| -> usize {
            group.iter().map(|(_, sample)| sample.input_ids.len()).sum()
        };
        let lengths: Vec<usize> = groups.iter().map(length).collect();
        let rows = self.places(&lengths);
        let mut made = Batches {
            tokens: lengths.iter().sum(),
            batches: Vec::with_capacity(rows.len()),
            sequences: Vec::with_capacity(rows.len()),
            groups: Vec::with_capacity(rows.len()),
        };
        for places in rows {
            let row: Vec<_> = places.iter().flat_map(|place| &groups[*place]).collect();
            made.batches.push(match self.plan.packing_tokens {
                0 => self.padded(&row)?,
                _ => self.packed(&row)?,
            });
            let targets = row.iter().map(|(_, sample)| {
                let labels = sample.labels.iter().skip(1);
                labels.filter(|label| **label != IGNORE_INDEX).count()
            });
            made.sequences.push(Sequences {
                targets: targets.collect(),
                ..Sequences::default()
            });
            made.groups.push(places);
        }
        Ok(made)
    }

    /// A row as far as this process reads it at once: with a share only how long it is.
    fn sample(&self, row: usize) -> Result<WindowSample, DatasetError> {
        if self.share.is_none() {
            let encoded = self
                .dataset
                .encode(row, &self.parts, self.plan.max_length)?;
            return Ok(WindowSample {
                row,
                length: SampleLength::of(&encoded.input_ids, &encoded.labels),
                encoded: Some(encoded),
            });
        }
        let length = self.dataset.measure(row, &self.parts)?;
        if length.tokens > self.plan.max_length {
            if self.plan.overlong == Overlong::Error {
                // Its own error says more.
                self.dataset
                    .encode(row, &self.parts, self.plan.max_length)?;
            }
            return Err(DatasetError::TooLong {
                file: self.dataset.file(row),
                row: self.dataset.row(row),
                tokens: length.tokens,
                image: 0,
                max_length: self.plan.max_length,
            });
        }
        Ok(WindowSample {
            row,
            length,
            encoded: None,
        })
    }

    /// Some samples of a window as a micro-batch; those that were only measured are read.
    fn micro_batch(
        &self,
        samples: &mut [WindowSample],
        places: &[usize],
    ) -> Result<MicroBatch, DatasetError> {
        let mut own = Vec::with_capacity(places.len());
        for place in places {
            let WindowSample {
                row,
                length,
                encoded,
            } = &mut samples[*place];
            let encoded = match encoded.take() {
                Some(encoded) => encoded,
                None => self
                    .dataset
                    .encode(*row, &self.parts, self.plan.max_length)?,
            };
            let found = SampleLength::of(&encoded.input_ids, &encoded.labels);
            if found != *length {
                let text = |length: &SampleLength| {
                    format!("{} tokens with {} targets", length.tokens, length.targets)
                };
                return Err(DatasetError::Measured {
                    file: self.dataset.file(*row),
                    row: self.dataset.row(*row),
                    found: text(&found),
                    measured: text(length),
                });
            }
            own.push((*row, encoded));
        }
        let own: Vec<_> = own.iter().collect();
        match self.plan.packing_tokens {
            0 => self.padded(&own),
            _ => self.packed(&own),
        }
    }

    /// Ids and image grids of some samples, and all their images.
    fn joined(samples: &[&(usize, EncodedSample)]) -> (Vec<Vec<u32>>, Vec<Grids>, ImageInput) {
        let mut images = ImageInput::default();
        let (ids, grids) = samples
            .iter()
            .map(|(_, sample)| {
                images.extend(&sample.images);
                (
                    sample.input_ids.clone(),
                    sample.images.image_grid_thw.clone(),
                )
            })
            .unzip();
        (ids, grids, images)
    }

    fn positions_error(
        &self,
        samples: &[&(usize, EncodedSample)],
        cause: PositionError,
    ) -> DatasetError {
        DatasetError::Positions {
            file: self.dataset.name().to_string(),
            row: samples.first().map_or(0, |(row, _)| self.dataset.row(*row)),
            cause,
        }
    }

    /// Some samples one after another in one row.
    fn packed(&self, samples: &[&(usize, EncodedSample)]) -> Result<MicroBatch, DatasetError> {
        let (ids, grids, images) = Self::joined(samples);
        let text = TextInput::packed(&ids, &grids, &self.parts.config)
            .map_err(|cause| self.positions_error(samples, cause))?;
        let labels = samples
            .iter()
            .flat_map(|(_, sample)| sample.labels.clone())
            .collect();
        Ok(MicroBatch {
            text,
            labels: vec![labels],
            images,
        })
    }

    /// Some samples below each other, padded to the longest.
    fn padded(&self, samples: &[&(usize, EncodedSample)]) -> Result<MicroBatch, DatasetError> {
        let (ids, grids, images) = Self::joined(samples);
        let pad = self.parts.tokenizer.special().endoftext;
        let (text, _) = TextInput::padded(&ids, &grids, &self.parts.config, Padding::Right, pad)
            .map_err(|cause| self.positions_error(samples, cause))?;
        let seq = text.seq();
        let labels = samples
            .iter()
            .map(|(_, sample)| {
                let mut labels = sample.labels.clone();
                labels.resize(seq, IGNORE_INDEX);
                labels
            })
            .collect();
        Ok(MicroBatch {
            text,
            labels,
            images,
        })
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
