//! Optimizer steps of the published recipe on several devices.

use std::{sync::Arc, time::Instant};

use burn::{module::Module, optim::Optimizer, tensor::backend::AutodiffBackend};

use super::{
    Bench, BenchError, SEED,
    clock::{Lap, measure},
    count::Work,
    report::Record,
    train::{STEP_SAMPLES, TrainShape, WARM_UP, window_work},
};
use crate::{
    adapters::lora::attach::attach,
    batch::positions::PositionError,
    batch::window::Window,
    qwen3_vl::Qwen3Vl,
    runtime::{
        accelerator::{Accelerator, TrainAccelerator},
        synthetic::requests::Requests,
    },
    train::{
        config::TrainConfig,
        learner::{StepSettings, Trainee},
        loss_scale::LossScale,
        optimizer::AdamW,
        ranks::RankError,
        replicas::Replicas,
    },
};

impl<B: Accelerator> Bench<B> {
    /// What [`Bench::train`] measures, on several devices with [`STEP_SAMPLES`] samples each; `base` is on
    /// the first. In the end all must have the same weights, bit for bit.
    ///
    /// # Errors
    /// [`BenchError::TrainConfig`], [`BenchError::Adapter`], [`BenchError::Rank`].
    pub fn train_on<A>(
        &self,
        base: Qwen3Vl<A>,
        load_seconds: f64,
        shape: TrainShape,
        devices: &[B::Device],
    ) -> Result<Record, BenchError>
    where
        A: TrainAccelerator + AutodiffBackend<InnerBackend = B> + Accelerator<Device = B::Device>,
    {
        let TrainShape {
            micro_batch,
            packing,
            recompute,
            recompute_pointwise,
        } = shape;
        let settings = TrainConfig {
            per_device_train_batch_size: micro_batch,
            gradient_accumulation_steps: STEP_SAMPLES.div_ceil(micro_batch),
            packing,
            gradient_checkpointing: recompute,
            recompute_pointwise,
            seed: SEED,
            ..TrainConfig::default()
        };
        settings.validate()?;
        let lora = settings.lora_config();
        let (model, _) = attach(base.no_grad(), &lora, settings.seed)?;
        let learning_rate = settings.learning_rate;
        let max_grad_norm = settings.max_grad_norm;
        let patience = settings.patience();
        let mut optimizer = AdamW::<A>::new(settings.adamw());
        let mut trainee = Trainee::new(
            model,
            Arc::new(StepSettings {
                config: self.config.clone(),
                train: settings,
                loss_scale: LossScale::of(self.dtype, None),
                reference: Default::default(),
            }),
        );
        let name = format!(
            "train_m{micro_batch}x{}_d{}",
            STEP_SAMPLES.div_ceil(micro_batch),
            devices.len()
        );
        let mut record = self.record("train", name, micro_batch);
        record.packing = Some(packing);
        record.recompute = Some(recompute);
        record.load_seconds = Some(load_seconds);

        let mut replicas = Replicas::start(
            devices,
            &[],
            &trainee,
            &optimizer,
            max_grad_norm,
            None,
            patience,
        )?;
        let mut requests = self.requests();
        let mut window = shared_window(&mut requests, devices.len(), micro_batch, packing)?;
        // The micro-batches of a window that went ahead are no longer in it.
        let facts = |window: &Window| Lap {
            samples: window.rows.len() as f64,
            tokens: window.tokens as f64,
            work: Work {
                flop: window_work(self, &lora, window).model_flop,
                bytes: 0.0,
            },
            ..Lap::default()
        };
        let mut next = (facts(&window), window.clone());
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        let laps = measure(WARM_UP, self.samples(5), |step| {
            if self.mixed {
                window = shared_window(&mut requests, devices.len(), micro_batch, packing)?;
            }
            let following = Window {
                step: step + 1,
                ..window.clone()
            };
            let (facts, input) = std::mem::replace(&mut next, (facts(&window), following));
            let start = Instant::now();
            let (loss, norm) = {
                let learnt = replicas.learn(&trainee, input, Some(&mut next.1))?;
                let grads = replicas.reduce(&trainee, learning_rate)?;
                let clip = optimizer.clip_next(&trainee, &grads, max_grad_norm);
                let norm = clip.map(B::read_async);
                trainee = optimizer.step(learning_rate, trainee.clone(), grads);
                let norm = norm.and_then(|norm| norm().first().copied());
                replicas.finish_step()?;
                let loss: f64 = learnt
                    .iter()
                    .flat_map(|part| &part.pieces)
                    .map(|piece| piece.objective)
                    .sum();
                let norm = norm.map_or(0.0, f64::from);
                Ok::<_, RankError>((loss, norm))
            }?;
            let seconds = start.elapsed().as_secs_f64();
            losses.push(loss);
            norms.push(norm);
            Ok::<_, BenchError>(Lap {
                seconds,
                stall_seconds: seconds,
                ..facts
            })
        })?;
        replicas.compare(&trainee, losses.len())?;
        record.set_laps(&laps);
        self.note_memory(&mut record);
        record.loss_first = losses.first().copied();
        record.loss_last = losses.last().copied();
        record.finite = Some(losses.iter().chain(&norms).all(|value| value.is_finite()));
        Ok(record)
    }
}

/// One step's samples for all devices, each with its own.
fn shared_window(
    requests: &mut Requests<'_>,
    devices: usize,
    micro_batch: usize,
    packing: bool,
) -> Result<Window, PositionError> {
    let mut shared = requests.window(STEP_SAMPLES, micro_batch, packing)?;
    for _ in 1..devices {
        let other = requests.window(STEP_SAMPLES, micro_batch, packing)?;
        shared.targets += other.targets;
        shared.micro_batches += other.micro_batches;
        shared.tokens += other.tokens;
        shared.parts.extend(other.parts);
    }
    shared.rows = (0..devices * STEP_SAMPLES).collect();
    Ok(shared)
}
