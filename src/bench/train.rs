//! Optimizer steps of the published recipe.

use std::{
    sync::{Arc, mpsc::sync_channel},
    thread,
    time::{Duration, Instant},
};

use burn::{
    module::Module,
    optim::Optimizer,
    tensor::{DType, backend::AutodiffBackend},
    train::{TrainOutput, TrainStep},
};
use sha2::{Digest, Sha256};

use super::{
    Bench, BenchError, SEED,
    clock::{Lap, Laps},
    count::{TrainWork, Work, train_sample, train_weight_bytes},
    report::Record,
};
use crate::{
    adapters::lora::{attach::attach, config::LoraConfig},
    base::{
        system::resident_memory,
        trace::{HOST, Trace},
    },
    batch::window::Window,
    batch::{images::ImageInput, micro_batch::MicroBatch},
    ops::quantised::Quantization,
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig},
    runtime::accelerator::{Accelerator, TrainAccelerator},
    schedule::Schedule,
    train::{
        budget::{BudgetError, StepForm},
        config::TrainConfig,
        learner::{StepSettings, Trainee},
        loss_scale::LossScale,
        optimizer::AdamW,
        step_clock::{LaunchTimes, StepClock},
        step_numbers::{StepReading, StepTotals},
        tape::Recorded,
    },
};

/// Samples of one optimizer step, as published.
pub const STEP_SAMPLES: usize = 16;
/// Tokens of a sample where lengths are not mixed.
const FIXED_TOKENS: usize = 368;
/// Unmeasured warm-up steps after the first.
pub(super) const WARM_UP: usize = 2;
/// Steps of the schedule the measured ones are the first of; only the learning rate depends on it.
const SCHEDULE_STEPS: usize = 1000;

/// What of the recipe can be chosen: it changes no loss, only time and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainShape {
    /// Samples of a micro-batch; 1 is the published one.
    pub micro_batch: usize,
    /// A micro-batch is packed into one row in place of one row a sample.
    pub packing: bool,
    /// Every layer is run again in the backward pass.
    pub recompute: bool,
    /// Where layers are not recomputed: norms, rotated heads and SwiGLU are.
    pub recompute_pointwise: bool,
}

impl TrainShape {
    /// The fastest shape within `gib` GiB, and why in one line.
    ///
    /// # Errors
    /// [`BudgetError`].
    pub fn fitting(
        config: &Qwen3VlConfig,
        dtype: DType,
        quantization: Option<Quantization>,
        gib: f64,
    ) -> Result<(Self, String), BudgetError> {
        const LONGEST: usize = FIXED_TOKENS;
        let settings = TrainConfig {
            gradient_accumulation_steps: STEP_SAMPLES,
            ..TrainConfig::default()
        };
        let weights = (dtype.size() as u64, quantization);
        let form = StepForm::choose(&settings, config, LONGEST, weights, gib, None)?;
        let shape = Self {
            micro_batch: (form.row_tokens / LONGEST).max(1),
            packing: form.row_tokens > 0,
            recompute: form.kept == Recorded::Inputs,
            recompute_pointwise: form.kept == Recorded::Matmuls,
        };
        Ok((shape, form.explain(gib, LONGEST)))
    }
}

impl<B: Accelerator> Bench<B> {
    /// Steps of LoRA (rank 8, alpha 32, dropout 0.05, all seven projections), the vision tower frozen,
    /// 16 samples each, one common norm for clipping, AdamW: gradients, clipping and the optimizer as a
    /// run does them, on windows made before.
    ///
    /// # Errors
    /// [`BenchError::TrainConfig`], [`BenchError::Adapter`].
    pub fn train<A>(
        &self,
        base: Qwen3Vl<A>,
        load_seconds: f64,
        shape: TrainShape,
        trace: &Trace,
    ) -> Result<Record, BenchError>
    where
        A: TrainAccelerator + AutodiffBackend<InnerBackend = B> + Accelerator<Device = B::Device>,
    {
        let settings = TrainConfig {
            per_device_train_batch_size: shape.micro_batch,
            gradient_accumulation_steps: STEP_SAMPLES.div_ceil(shape.micro_batch),
            packing: shape.packing,
            gradient_checkpointing: shape.recompute,
            recompute_pointwise: shape.recompute_pointwise,
            seed: SEED,
            ..TrainConfig::default()
        };
        settings.validate()?;
        let lora = settings.lora_config();
        let (model, _) = attach(base.no_grad(), &lora, settings.seed)?;
        let schedule = settings.schedule(SCHEDULE_STEPS);
        let mut optimizer = AdamW::<A>::new(settings.adamw());
        let max_grad_norm = settings.max_grad_norm;
        let mut trainee = Trainee::new(
            model,
            Arc::new(StepSettings {
                config: self.config.clone(),
                train: settings,
                loss_scale: LossScale::of(self.dtype, None),
                reference: Default::default(),
            }),
        );

        let micro_batches = STEP_SAMPLES.div_ceil(shape.micro_batch);
        let name = format!("train_m{}x{micro_batches}", shape.micro_batch);
        let mut record = self.record("train", name, shape.micro_batch);
        record.packing = Some(shape.packing);
        record.recompute = Some(shape.recompute);
        record.load_seconds = Some(load_seconds);

        let run = Run {
            bench: self,
            trace: trace.clone(),
            schedule,
            max_grad_norm,
            measured: self.samples(5),
        };
        let measured = run.steps(&mut trainee, &mut optimizer, &shape)?;
        let laps: Vec<Lap> = measured
            .windows
            .iter()
            .zip(&measured.seconds)
            .map(|(window, seconds)| {
                let counted = window_work(self, &lora, window);
                // The language model's weights are read forward, backward, and once more to recompute.
                let passes = window.micro_batches * if shape.recompute { 3 } else { 2 };
                Lap {
                    seconds: *seconds,
                    stall_seconds: *seconds,
                    samples: window.rows.len() as f64,
                    tokens: window.tokens as f64,
                    work: Work {
                        flop: counted.model_flop,
                        bytes: train_weight_bytes(&self.config, passes, self.element())
                            - passes as f64 * self.saved_bytes("model.language_model.layers."),
                    },
                }
            })
            .collect();
        record.set_laps(&Laps {
            first_call_seconds: measured.first_seconds,
            warm_up_calls: WARM_UP,
            measured: laps,
        });
        self.note_operations(&mut record);
        self.note_memory(&mut record);
        if shape.recompute {
            let flop = measured
                .windows
                .iter()
                .map(|window| window_work(self, &lora, window).recompute_flop);
            record.recompute_flop = Some(flop.sum::<f64>() / measured.windows.len() as f64);
        }
        let numbers = &measured.numbers;
        record.loss_first = numbers.first().map(|step| step.objective);
        record.loss_last = numbers.last().map(|step| step.objective);
        record.finite =
            Some((numbers.iter()).all(|step| step.objective.is_finite() && step.norm.is_finite()));
        record.losses_digest = Some(digest(numbers));
        [record.memory_first_gib, record.memory_last_gib] = measured.memory;
        record.data_wait_seconds = Some(measured.data_wait.as_secs_f64());
        Ok(record)
    }
}

/// A step whose numbers are on their way.
struct Pending {
    reading: StepReading,
    launched: LaunchTimes,
}

/// What the steps of one measurement share.
struct Run<'a, B: Accelerator> {
    bench: &'a Bench<B>,
    trace: Trace,
    schedule: Schedule,
    max_grad_norm: f64,
    measured: usize,
}

/// Results of the steps.
struct Measured {
    /// Of the first step, compilation included.
    first_seconds: f64,
    /// Of each measured step, see [`StepClock`].
    seconds: Vec<f64>,
    /// Of the measured steps, without their micro-batches' pixels.
    windows: Vec<Window>,
    /// Of all steps.
    numbers: Vec<StepTotals>,
    /// After the first and the last measured step, in GiB.
    memory: [Option<f64>; 2],
    /// Spent waiting for windows in the measured steps.
    data_wait: Duration,
}

impl<B: Accelerator> Run<'_, B> {
    /// Takes steps as a run does: windows come from a thread, and a step's numbers are waited for once
    /// the next one is launched. Only the first steps, which are not measured, are waited for at once.
    fn steps<A>(
        &self,
        trainee: &mut Trainee<A>,
        optimizer: &mut AdamW<A>,
        shape: &TrainShape,
    ) -> Result<Measured, BenchError>
    where
        A: TrainAccelerator + AutodiffBackend<InnerBackend = B> + Accelerator<Device = B::Device>,
    {
        let mixed = self.bench.mixed;
        let steps = 1 + WARM_UP + self.measured;
        let mut measured = Measured {
            first_seconds: 0.0,
            seconds: Vec::new(),
            windows: Vec::new(),
            numbers: Vec::new(),
            memory: [None; 2],
            data_wait: Duration::ZERO,
        };
        thread::scope(|scope| {
            let (sender, windows) = sync_channel(2);
            let trace = self.trace.clone();
            let mut requests = self.bench.requests();
            scope.spawn(move || {
                let mut make = |step: usize| {
                    trace.span(1, "samples", step, || {
                        requests.window(STEP_SAMPLES, shape.micro_batch, shape.packing)
                    })
                };
                let first = make(0);
                for step in 0..steps {
                    let window = match &first {
                        Ok(window) if step == 0 || !mixed => Ok(window.clone()),
                        _ => make(step),
                    };
                    if sender.send(window).is_err() {
                        return;
                    }
                }
            });
            let first = Instant::now();
            let mut clock = StepClock::start();
            let mut pending: Option<Pending> = None;
            let mut waited_before = Duration::ZERO;
            for step in 0..steps {
                if step == WARM_UP + 1 {
                    self.bench.mark_operations();
                    waited_before = self.trace.waited();
                    clock.skip();
                }
                let window = self
                    .trace
                    .wait_for_data(step, || windows.recv())
                    .map_err(|_| BenchError::Size("no window was made".into()))??;
                if step > WARM_UP {
                    measured.windows.push(without_pixels(&window));
                }
                let window = Window { step, ..window };
                let learning_rate = self.schedule.lr(step as u64);
                let (reading, launched) = LaunchTimes::of(|| {
                    self.trace.span(HOST, "launch", step, || {
                        launch(
                            trainee,
                            optimizer,
                            window,
                            learning_rate,
                            self.max_grad_norm,
                        )
                    })
                });
                let previous = pending.replace(Pending { reading, launched });
                if step == 0 || step == WARM_UP {
                    // All there is, in the order of the steps.
                    let all = previous.into_iter().chain(pending.take());
                    measured.numbers.extend(all.map(|one| one.reading.wait()));
                    let _ = B::sync(&self.bench.device);
                    if step == 0 {
                        measured.first_seconds = first.elapsed().as_secs_f64();
                    }
                } else if let Some(previous) = previous {
                    self.complete(previous, step - 1, &mut clock, &mut measured);
                }
            }
            if let Some(last) = pending {
                self.complete(last, steps - 1, &mut clock, &mut measured);
            }
            measured.data_wait = self.trace.waited() - waited_before;
            Ok(measured)
        })
    }

    /// Waits for a step's numbers.
    fn complete(
        &self,
        pending: Pending,
        step: usize,
        clock: &mut StepClock,
        measured: &mut Measured,
    ) {
        let wait_start = Instant::now();
        let wait = || pending.reading.wait();
        let numbers = (self.trace).span(HOST, "wait for the device", step, wait);
        measured.numbers.push(numbers);
        let seconds = clock.complete(pending.launched, wait_start);
        measured.seconds.push(seconds.as_secs_f64());
        let held = B::memory_in_use(&self.bench.device).map(|memory| memory.reserved);
        let gib = held
            .or_else(resident_memory)
            .map(|bytes| bytes as f64 / (1u64 << 30) as f64);
        if measured.seconds.len() == 1 {
            measured.memory[0] = gib;
        }
        measured.memory[1] = gib;
    }
}

/// Launches gradients, clipping and the optimizer on the device; the loss and the gradient's norm follow.
fn launch<A: TrainAccelerator>(
    trainee: &mut Trainee<A>,
    optimizer: &mut AdamW<A>,
    window: Window,
    learning_rate: f64,
    max_grad_norm: f64,
) -> StepReading {
    let TrainOutput { grads, item } = TrainStep::step(trainee, window);
    let clip = optimizer.clip_next(trainee, &grads, max_grad_norm);
    let reading = item.read_async(clip);
    *trainee = optimizer.step(learning_rate, trainee.clone(), grads);
    reading.expect("a training step's sums are on the device")
}

/// Counts of a window.
fn without_pixels(window: &Window) -> Window {
    let counted = |batch: &MicroBatch| MicroBatch {
        text: batch.text.clone(),
        labels: batch.labels.clone(),
        images: ImageInput {
            pixel_values: Vec::new().into(),
            image_grid_thw: batch.images.image_grid_thw.clone(),
        },
    };
    Window {
        parts: (window.parts.iter())
            .map(|part| part.iter().map(counted).collect())
            .collect(),
        rows: window.rows.clone(),
        sequences: window.sequences.clone(),
        ..*window
    }
}

/// A hash that differs where losses or norms differ in a single bit.
fn digest(numbers: &[StepTotals]) -> String {
    let mut hasher = Sha256::new();
    for step in numbers {
        hasher.update(step.objective.to_bits().to_le_bytes());
        hasher.update(step.norm.to_bits().to_le_bytes());
    }
    hasher.finalize()[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The model's work in one window, padding left out.
pub(super) fn window_work<B: Accelerator>(
    bench: &Bench<B>,
    lora: &LoraConfig,
    window: &Window,
) -> TrainWork {
    let mut all = TrainWork::default();
    for batch in window.parts.iter().flatten() {
        for (tokens, targets) in samples(batch) {
            let patches = batch.images.patches() / batch.images.image_grid_thw.len().max(1);
            let one = train_sample(&bench.config, lora, patches, tokens, targets);
            all.model_flop += one.model_flop;
            all.recompute_flop += one.recompute_flop;
        }
    }
    all
}

/// Tokens and targets of each sample of a micro-batch, padded or packed.
fn samples(batch: &MicroBatch) -> Vec<(usize, usize)> {
    let mut all = Vec::new();
    for (segments, labels) in batch.text.segments.iter().zip(&batch.labels) {
        let mut previous = -1;
        for (segment, label) in segments.iter().zip(labels) {
            if *segment < 0 {
                continue;
            }
            if *segment != previous {
                all.push((0, 0));
                previous = *segment;
            }
            if let Some((tokens, targets)) = all.last_mut() {
                *tokens += 1;
                *targets += usize::from(*label >= 0);
            }
        }
    }
    all
}
