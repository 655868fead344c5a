//! Optimizer steps of the published recipe.

use std::{sync::Arc, time::Instant};

use burn::{
    module::Module,
    optim::Optimizer,
    tensor::backend::AutodiffBackend,
    train::{TrainOutput, TrainStep},
};

use super::{
    Bench, BenchError, SEED,
    clock::{Lap, measure},
    count::{TrainWork, Work, train_sample, train_weight_bytes},
    report::Record,
    requests::Requests,
};
use crate::{
    dataset::loader::Window,
    kernels::{Kernels, TrainKernels},
    lora::{attach::attach, config::LoraConfig},
    qwen3_vl::Qwen3Vl,
    train::{
        config::TrainConfig,
        gradients::MicroBatch,
        learner::{StepSettings, Trainee},
        optimizer::{AdamW, clip_global_norm},
    },
};

/// Samples of one optimizer step, as published.
pub const STEP_SAMPLES: usize = 16;
/// Unmeasured steps behind the first.
pub(super) const WARM_UP: usize = 1;
/// Steps of the schedule the measured ones are the first of; only the learning rate depends on it.
const SCHEDULE_STEPS: usize = 1000;

/// What of the recipe can be chosen: it changes no loss, only time and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainShape {
    /// Samples of a micro-batch; 1 is the published one.
    pub micro_batch: usize,
    /// A micro-batch lies in one row in place of one row a sample.
    pub packing: bool,
    /// Every layer is run again in the backward pass.
    pub recompute: bool,
}

impl<B: Kernels> Bench<B> {
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
    ) -> Result<Record, BenchError>
    where
        A: TrainKernels + AutodiffBackend<InnerBackend = B> + Kernels<Device = B::Device>,
    {
        let settings = TrainConfig {
            per_device_train_batch_size: shape.micro_batch,
            gradient_accumulation_steps: STEP_SAMPLES.div_ceil(shape.micro_batch),
            packing: shape.packing,
            gradient_checkpointing: shape.recompute,
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
            }),
        );

        let micro_batches = STEP_SAMPLES.div_ceil(shape.micro_batch);
        let name = format!("train_m{}x{micro_batches}", shape.micro_batch);
        let mut record = self.record("train", name, shape.micro_batch);
        record.packing = Some(shape.packing);
        record.recompute = Some(shape.recompute);
        record.load_seconds = Some(load_seconds);

        let mut requests = Requests::new(&self.config, self.mixed, SEED);
        let mut window = requests.window(STEP_SAMPLES, shape.micro_batch, shape.packing)?;
        let mut losses = Vec::new();
        let mut norms = Vec::new();
        let mut recompute_flop = Vec::new();
        let laps = measure(WARM_UP, self.samples(5), |step| {
            if self.mixed && step > 0 {
                window = requests.window(STEP_SAMPLES, shape.micro_batch, shape.packing)?;
            }
            let input = Window {
                step,
                ..window.clone()
            };
            if step == WARM_UP + 1 {
                self.mark_operations();
            }
            let start = Instant::now();
            let (loss, norm) = one_step(
                &mut trainee,
                &mut optimizer,
                input,
                schedule.lr(step as u64),
                max_grad_norm,
            );
            let _ = B::sync(&self.device);
            let seconds = start.elapsed().as_secs_f64();
            losses.push(loss);
            norms.push(norm);
            let counted = window_work(self, &lora, &window);
            recompute_flop.push(counted.recompute_flop);
            // The language model's weights are read forward, backward, and once more to recompute.
            let passes = window.micro_batches * if shape.recompute { 3 } else { 2 };
            Ok::<_, BenchError>(Lap {
                seconds,
                stall_seconds: seconds,
                samples: window.rows.len() as f64,
                tokens: window.tokens as f64,
                work: Work {
                    flop: counted.model_flop,
                    bytes: train_weight_bytes(&self.config, passes, self.element()),
                },
            })
        })?;
        record.set_laps(&laps);
        self.note_operations(&mut record);
        self.note_memory(&mut record);
        if shape.recompute {
            let measured = &recompute_flop[recompute_flop.len() - laps.measured.len()..];
            record.recompute_flop = Some(measured.iter().sum::<f64>() / measured.len() as f64);
        }
        record.loss_first = losses.first().copied();
        record.loss_last = losses.last().copied();
        record.finite = Some(losses.iter().chain(&norms).all(|value| value.is_finite()));
        Ok(record)
    }
}

/// Gradients, clipping, optimizer; gives the loss and the gradient's norm.
fn one_step<A: TrainKernels>(
    trainee: &mut Trainee<A>,
    optimizer: &mut AdamW<A>,
    window: Window,
    learning_rate: f64,
    max_grad_norm: f64,
) -> (f64, f64) {
    let TrainOutput { mut grads, item } = TrainStep::step(trainee, window);
    let loss = item.objective();
    let norm = clip_global_norm(trainee, &mut grads, max_grad_norm);
    *trainee = optimizer.step(learning_rate, trainee.clone(), grads);
    (loss, norm)
}

/// The model's work in one window, padding left out.
pub(super) fn window_work<B: Kernels>(
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
