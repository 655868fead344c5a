//! Loading, the vision tower, prefill and decode.

use std::{convert::Infallible, time::Instant};

use super::{
    Bench, BenchError, SEED,
    clock::{Lap, Laps, measure, since_process_start},
    count::{Work, decode, text_prefill, vision},
    report::Record,
};
use crate::{
    batch::images::ImageInput,
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, weights::LoadProgress},
    runtime::{
        accelerator::Accelerator,
        generate::{GenerationConfig, Prompt, Timing, generate},
        spread::in_order,
        synthetic::requests::Requests,
        vision::encode_images,
    },
};

/// Tokens after the first that a decode call generates.
pub const DECODE_STEPS: usize = 128;

/// Unmeasured warm-up calls of the short measurements, after the first.
const WARM_UP: usize = 2;
/// The same for decode.
pub(super) const DECODE_WARM_UP: usize = 1;

impl<B: Accelerator> Bench<B> {
    /// Loads the model again and again, each time after freeing the one before; on several devices at
    /// once, where there are some.
    ///
    /// Files are read through the system's cache: all but the first call measure the way from memory
    /// to the device unless the cache is too small.
    ///
    /// # Errors
    /// [`BenchError`] of a load.
    pub fn load(
        &self,
        devices: &[B::Device],
        on_progress: LoadProgress<'_>,
    ) -> Result<Vec<Record>, BenchError> {
        let verb = match self.source {
            super::Source::Folder(..) => "load",
            super::Source::Random { .. } => "draw",
        };
        let bytes = self.source.load_bytes(self.weight_bytes())?;
        let mut records = Vec::new();
        for count in counts(devices) {
            let name = format!("{verb}{}", on_devices(count));
            let mut record = self.record("load", name, 1);
            let laps = measure(0, self.samples(3), |call| {
                if call == 1 {
                    self.mark_operations();
                }
                let (_, seconds) = self.models::<B>(&devices[..count], on_progress)?;
                Ok::<_, BenchError>(Lap {
                    seconds,
                    stall_seconds: seconds,
                    work: Work { flop: 0.0, bytes },
                    ..Lap::default()
                })
            })?;
            record.set_laps(&laps);
            self.note_operations(&mut record);
            self.note_memory(&mut record);
            records.push(record);
        }
        Ok(records)
    }

    /// Answers of [`DECODE_STEPS`] + 1 tokens to batches of requests, images prepared; on several
    /// devices, a batch each in turn, as `infer --output` does.
    ///
    /// # Errors
    /// [`BenchError::Generate`] when the model's output is not a number, [`BenchError::Spread`].
    pub fn answers(
        &self,
        models: Vec<(Qwen3Vl<B>, B::Device)>,
        load_seconds: f64,
        batches: &[usize],
        on_call: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<Record>, BenchError> {
        /// Batches of a call and device.
        const EACH: usize = 4;
        let devices: Vec<_> = models.iter().map(|(_, device)| device.clone()).collect();
        let mut models = models;
        let config = &self.config;
        let calls = 1 + DECODE_WARM_UP + self.samples(2).max(1);
        let all = (batches.len() * counts(&devices).len() * calls) as u64;
        let mut done = 0;
        on_call(0, all);
        let mut records = Vec::new();
        for batch in batches {
            for count in counts(&devices) {
                let mut requests = self.requests();
                let groups: Vec<Vec<Prompt>> = (0..EACH * count)
                    .map(|_| requests.prompts(*batch))
                    .collect();
                let name = format!("infer_b{batch}{}", on_devices(count));
                let mut record = self.record("infer", name, *batch);
                let laps = measure(DECODE_WARM_UP, self.samples(2), |_| {
                    let start = Instant::now();
                    let (mut answers, mut tokens) = (0, 0);
                    in_order(
                        &mut models[..count],
                        &groups,
                        |(model, device), prompts| {
                            let new = DECODE_STEPS + 1;
                            generate_on(model, config, device, prompts, new, &mut |_| {})
                                .map(|timing| (prompts.len(), timing.decoded_tokens))
                        },
                        |_, answered| {
                            let (more, decoded) = answered?;
                            answers += more;
                            tokens += decoded;
                            Ok::<_, BenchError>(())
                        },
                    )?;
                    let seconds = start.elapsed().as_secs_f64();
                    done += 1;
                    on_call(done, all);
                    Ok::<_, BenchError>(Lap {
                        seconds,
                        stall_seconds: seconds,
                        samples: answers as f64,
                        tokens: tokens as f64,
                        work: Work::default(),
                    })
                })?;
                self.finish(&mut record, &laps, load_seconds);
                records.push(record);
            }
        }
        Ok(records)
    }

    /// The vision tower alone, upload of pixels included.
    pub fn vision(&self, model: &Qwen3Vl<B>, load_seconds: f64, batches: &[usize]) -> Vec<Record> {
        let mut requests = Requests::new(&self.config, false, SEED);
        let mut run = |batch: usize| {
            let mut images = ImageInput::default();
            (0..batch).for_each(|_| images.extend(&requests.image()));
            let each = images.patches() / batch;
            let name = format!("vision_b{batch}_p{each}");
            let mut record = self.record("vision", name, batch);
            let mut work = vision(&self.config, &vec![each; batch], self.element());
            work.bytes -= self.saved_bytes("model.visual.");
            let work_once = |call| {
                if call == 1 {
                    B::wait_for_background(model);
                }
                if call == WARM_UP + 1 {
                    self.mark_operations();
                }
                let start = Instant::now();
                let output = encode_images(model, &images, &self.config, &self.device);
                let _ = B::sync(&self.device);
                drop(output);
                let seconds = start.elapsed().as_secs_f64();
                Ok::<_, Infallible>(Lap {
                    seconds,
                    stall_seconds: seconds,
                    samples: batch as f64,
                    tokens: 0.0,
                    work,
                })
            };
            let Ok(laps) = measure(WARM_UP, self.samples(20), work_once);
            self.finish(&mut record, &laps, load_seconds);
            record
        };
        batches.iter().map(|batch| run(*batch)).collect()
    }

    /// Requests up to their first token on the host, vision included.
    ///
    /// # Errors
    /// [`BenchError::Generate`] when the model's output is not a number.
    pub fn prefill(
        &self,
        model: &Qwen3Vl<B>,
        load_seconds: f64,
        batches: &[usize],
    ) -> Result<Vec<Record>, BenchError> {
        let mut requests = self.requests();
        let mut records = Vec::new();
        let saved = self.saved_bytes("model.visual.") + self.saved_text_bytes();
        for batch in batches {
            let mut prompts = requests.prompts(*batch);
            let name = format!("prefill_b{batch}{}", self.length_of(&prompts));
            let mut record = self.record("prefill", name, *batch);
            let first_of_all = records.is_empty();
            let laps = measure(WARM_UP, self.samples(20), |call| {
                if call == 1 {
                    // What the first call left to compile in the background is no part of its time.
                    B::wait_for_background(model);
                }
                if self.mixed {
                    prompts = requests.prompts(*batch);
                }
                if call == WARM_UP + 1 {
                    self.mark_operations();
                }
                let start = Instant::now();
                self.generate(model, &prompts, 1, &mut |_| {})?;
                let seconds = start.elapsed().as_secs_f64();
                if call == 0 && first_of_all {
                    record.first_token_seconds =
                        since_process_start().map(|time| time.as_secs_f64());
                }
                let lengths = lengths(&prompts);
                let mut work = vision(&self.config, &patches(&prompts), self.element())
                    .plus(text_prefill(&self.config, &lengths, self.element()));
                work.bytes -= saved;
                Ok::<_, BenchError>(Lap {
                    seconds,
                    stall_seconds: seconds,
                    samples: *batch as f64,
                    tokens: lengths.iter().sum::<usize>() as f64,
                    work,
                })
            })?;
            self.finish(&mut record, &laps, load_seconds);
            records.push(record);
        }
        Ok(records)
    }

    /// [`DECODE_STEPS`] cached decode steps after the first token of each request.
    ///
    /// A call's seconds are those of the steps alone; its first call's include the prefill.
    ///
    /// # Errors
    /// [`BenchError::Generate`] when the model's output is not a number.
    pub fn decode(
        &self,
        model: &Qwen3Vl<B>,
        load_seconds: f64,
        batches: &[usize],
    ) -> Result<Vec<Record>, BenchError> {
        let mut requests = self.requests();
        let mut records = Vec::new();
        let saved = DECODE_STEPS as f64 * self.saved_text_bytes();
        for batch in batches {
            let mut prompts = requests.prompts(*batch);
            let length = self.length_of(&prompts);
            let name = format!("decode_b{batch}{length}_n{DECODE_STEPS}");
            let mut record = self.record("decode", name, *batch);
            let first_of_all = records.is_empty();
            let laps = measure(DECODE_WARM_UP, self.samples(3), |call| {
                if self.mixed {
                    prompts = requests.prompts(*batch);
                }
                let mut before: Option<Instant> = None;
                let mut longest_gap = 0.0f64;
                let timing = self.generate(model, &prompts, DECODE_STEPS + 1, &mut |row| {
                    if row > 0 {
                        return;
                    }
                    match before {
                        Some(before) => {
                            longest_gap = longest_gap.max(before.elapsed().as_secs_f64())
                        }
                        None if call == 0 && first_of_all => {
                            record.first_token_seconds =
                                since_process_start().map(|time| time.as_secs_f64());
                        }
                        None => {}
                    }
                    if before.is_none() && call == DECODE_WARM_UP + 1 {
                        self.mark_operations();
                    }
                    before = Some(Instant::now());
                })?;
                let mut work = decode(
                    &self.config,
                    &lengths(&prompts),
                    DECODE_STEPS,
                    self.element(),
                );
                work.bytes -= saved;
                Ok::<_, BenchError>(Lap {
                    seconds: timing.decode_seconds,
                    stall_seconds: longest_gap,
                    samples: *batch as f64,
                    tokens: timing.decoded_tokens as f64,
                    work,
                })
            })?;
            self.finish(&mut record, &laps, load_seconds);
            // Of a decode call the steps are timed, not the request: requests a second would mislead.
            record.samples_per_second = None;
            let drafted = match self.drafts {
                Some(forced) => {
                    self.decode_drafted(model, load_seconds, &prompts, forced, &record)?
                }
                None => Vec::new(),
            };
            records.push(record);
            records.extend(drafted);
        }
        Ok(records)
    }

    /// The length in a measurement's name; mixed prompts have no single one.
    fn length_of(&self, prompts: &[Prompt]) -> String {
        match lengths(prompts).first() {
            Some(length) if !self.mixed => format!("_s{length}"),
            _ => String::new(),
        }
    }

    /// Exactly `new` tokens a row; `on_token` gets the row of each as it comes.
    fn generate(
        &self,
        model: &Qwen3Vl<B>,
        prompts: &[Prompt],
        new: usize,
        on_token: &mut dyn FnMut(usize),
    ) -> Result<Timing, BenchError> {
        generate_on(model, &self.config, &self.device, prompts, new, on_token)
    }

    pub(super) fn finish(&self, record: &mut Record, laps: &Laps, load_seconds: f64) {
        record.set_laps(laps);
        record.load_seconds = Some(load_seconds);
        self.note_operations(record);
        self.note_memory(record);
    }
}

/// Exactly `new` tokens a row on a device; `on_token` gets the row of each as it comes.
fn generate_on<B: Accelerator>(
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    device: &B::Device,
    prompts: &[Prompt],
    new: usize,
    on_token: &mut dyn FnMut(usize),
) -> Result<Timing, BenchError> {
    let settings = GenerationConfig {
        max_new_tokens: new,
        stop_on_repetition: false,
        ..GenerationConfig::default()
    };
    let (_, timing) = generate(model, config, prompts, &settings, device, &mut |row, _| {
        on_token(row);
        None
    })?;
    Ok(timing)
}

/// One device, and all where there are several.
fn counts<D>(devices: &[D]) -> Vec<usize> {
    let mut counts = vec![1, devices.len()];
    counts.dedup();
    counts
}

/// What a name says about the number of devices.
fn on_devices(count: usize) -> String {
    if count > 1 {
        format!("_d{count}")
    } else {
        String::new()
    }
}

fn lengths(prompts: &[Prompt]) -> Vec<usize> {
    prompts
        .iter()
        .map(|prompt| prompt.input_ids.len())
        .collect()
}

fn patches(prompts: &[Prompt]) -> Vec<usize> {
    prompts
        .iter()
        .map(|prompt| prompt.images.patches())
        .collect()
}
