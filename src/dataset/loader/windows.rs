//! The rows of a window read, encoded and joined to micro-batches.

use std::sync::atomic::Ordering;

use super::{Overlong, Share, WindowKind, WindowLoader, dealt_out, packing::fill_rows};
use crate::{
    batch::{
        images::ImageInput,
        micro_batch::{IGNORE_INDEX, MicroBatch},
        positions::PositionError,
        sequences::{SequenceCounts, Sequences},
        text::{Padding, TextInput},
        window::Window,
    },
    dataset::{encode::EncodedSample, error::DatasetError, length::SampleLength},
};

/// Frames, rows and columns of each image of a sample, in patches.
type Grids = Vec<[usize; 3]>;

/// A row of a window.
struct WindowSample {
    row: usize,
    length: SampleLength,
    /// Until it is taken into a micro-batch; `None` also where it is not read yet.
    encoded: Option<EncodedSample>,
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

impl WindowLoader {
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

    pub(super) fn window_of_answers(&self, step: usize) -> Result<Window, DatasetError> {
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
    pub(super) fn window_of_groups(&self, step: usize) -> Result<Window, DatasetError> {
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
}
