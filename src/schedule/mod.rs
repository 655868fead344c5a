//! Learning-rate schedules, and how many optimizer steps a run takes.
//!
//! Everything is `f64` and in the order of operations of the reference, so that the rates agree to
//! the last digits. This module knows no optimizer.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// Shape of the learning rate after warm-up.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Half a cosine from the peak to 0.
    #[default]
    Cosine,
    /// A straight line from the peak to 0.
    Linear,
    /// The peak to the end (`constant_with_warmup` in transformers).
    Constant,
}

/// The learning rate at each optimizer step of a run.
///
/// Source: `get_cosine_schedule_with_warmup`, `get_linear_schedule_with_warmup` and
/// `get_constant_schedule_with_warmup`, transformers, `optimization.py`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    kind: ScheduleKind,
    peak: f64,
    warmup_steps: u64,
    total_steps: u64,
}

impl Schedule {
    /// A schedule over `total_steps` optimizer steps that climbs to `peak` during the first
    /// `ceil(total_steps × warmup_ratio)` of them.
    ///
    /// `warmup_ratio` is 0 to 1; values outside, and NaN, count as the nearer end or 0.
    pub fn new(kind: ScheduleKind, peak: f64, warmup_ratio: f64, total_steps: u64) -> Self {
        let ratio = if warmup_ratio.is_nan() {
            0.0
        } else {
            warmup_ratio.clamp(0.0, 1.0)
        };
        // Rounded up as it comes, as the reference does: 100 × 0.07 is 7.000000000000001, so 8.
        let warmup_steps = (total_steps as f64 * ratio).ceil() as u64;
        Self {
            kind,
            peak,
            warmup_steps,
            total_steps,
        }
    }

    /// Length of the warm-up in optimizer steps.
    pub fn warmup_steps(&self) -> u64 {
        self.warmup_steps
    }

    /// Length of the run in optimizer steps.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// The rate that optimizer step `step` uses, counted from 0; step 0 of a warm-up has rate 0.
    ///
    /// From `total_steps` on, where no run goes, cosine and linear stay at 0.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step as f64 / self.warmup_steps as f64);
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / decay_steps).min(1.0);
        let factor = match self.kind {
            ScheduleKind::Cosine => (0.5 * (1.0 + (PI * progress).cos())).max(0.0),
            ScheduleKind::Linear => self.total_steps.saturating_sub(step) as f64 / decay_steps,
            ScheduleKind::Constant => 1.0,
        };
        self.peak * factor
    }
}

/// Optimizer steps of one pass over the data.
///
/// Each device gets `ceil(samples / (devices × batch))` micro-batches, the last ones filled up with
/// samples from the start so that all devices have the same number; every `accumulation` of them
/// make a step, and the rest at the end of the pass, if any, makes a step of its own. For instance
/// 6,102 samples on 2 devices, batch 1, accumulation 16: 3,051 micro-batches a device, that is 190
/// full windows (3,040) and one of 11, so 191 steps, and 573 in 3 epochs.
///
/// 0 without samples; `devices`, `batch` and `accumulation` of 0 count as 1.
///
/// Source: `Trainer.set_initial_training_values`, transformers, `trainer.py`, which ms-swift uses.
pub fn steps_per_epoch(samples: u64, devices: u64, batch: u64, accumulation: u64) -> u64 {
    let together = devices.max(1).saturating_mul(batch.max(1));
    samples.div_ceil(together).div_ceil(accumulation.max(1))
}

/// Optimizer steps of a run of `epochs` passes, which need not be whole: rounded up.
///
/// Source: `max_steps` in transformers, `trainer.py`.
pub fn total_steps(steps_per_epoch: u64, epochs: f64) -> u64 {
    // The cast turns NaN and negative values into 0.
    (epochs * steps_per_epoch as f64).ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_partial_window_counts() {
        assert_eq!(steps_per_epoch(6102, 2, 1, 16), 191);
        assert_eq!(total_steps(191, 3.0), 573);
        // One device more makes the micro-batches, not the windows, uneven: 2,034 = 127 × 16 + 2.
        assert_eq!(steps_per_epoch(6102, 3, 1, 16), 128);
        assert_eq!(total_steps(steps_per_epoch(6102, 1, 1, 16), 3.0), 1146);
    }

    #[test]
    fn edges_of_the_count() {
        assert_eq!(steps_per_epoch(0, 2, 1, 16), 0);
        assert_eq!(steps_per_epoch(1, 2, 4, 16), 1);
        assert_eq!(steps_per_epoch(32, 2, 1, 16), 1);
        assert_eq!(steps_per_epoch(33, 2, 1, 16), 2);
        assert_eq!(steps_per_epoch(5, 0, 0, 0), 5);
        assert_eq!(total_steps(3, 0.5), 2);
        assert_eq!(total_steps(3, -1.0), 0);
        assert_eq!(total_steps(3, f64::NAN), 0);
    }

    #[test]
    fn warm_up_rounds_up_as_floating_point_does() {
        let warmup =
            |ratio, total| Schedule::new(ScheduleKind::Cosine, 1.0, ratio, total).warmup_steps();
        assert_eq!(warmup(0.05, 573), 29);
        assert_eq!(warmup(0.05, 100), 5);
        assert_eq!(warmup(0.07, 100), 8);
        assert_eq!(warmup(f64::NAN, 100), 0);
        assert_eq!(warmup(7.0, 100), 100);
    }

    #[test]
    fn shapes_at_their_corners() {
        let at = |kind, step| Schedule::new(kind, 2.0, 0.2, 10).lr(step);
        for kind in [
            ScheduleKind::Cosine,
            ScheduleKind::Linear,
            ScheduleKind::Constant,
        ] {
            assert_eq!([at(kind, 0), at(kind, 1), at(kind, 2)], [0.0, 1.0, 2.0]);
        }
        assert!((at(ScheduleKind::Cosine, 6) - 1.0).abs() < 1e-15);
        assert_eq!(at(ScheduleKind::Linear, 6), 1.0);
        assert_eq!(at(ScheduleKind::Constant, 9), 2.0);
        for step in [10, 11, 1000] {
            assert_eq!(at(ScheduleKind::Cosine, step), 0.0);
            assert_eq!(at(ScheduleKind::Linear, step), 0.0);
        }
        assert_eq!(Schedule::new(ScheduleKind::Cosine, 1.0, 1.0, 3).lr(3), 1.0);
        assert_eq!(Schedule::new(ScheduleKind::Linear, 1.0, 0.0, 0).lr(0), 0.0);
    }
}
