//! Numbers of a step as metrics of Burn's dashboard.

use std::sync::Arc;

use burn::train::metric::{
    Adaptor, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes,
    NumericEntry, SerializedEntry,
    state::{FormatOptions, NumericMetricState},
};

use super::{objective::sums::ObjectiveSums, step_numbers::StepNumbers};

/// One number of [`StepNumbers`] as a metric of the dashboard.
#[derive(Clone)]
pub struct Gauge {
    name: MetricName,
    unit: Option<&'static str>,
    higher_is_better: bool,
    precision: usize,
    read: fn(&StepNumbers) -> f64,
    state: NumericMetricState,
}

impl Gauge {
    fn new(
        name: &str,
        unit: Option<&'static str>,
        higher_is_better: bool,
        precision: usize,
        read: fn(&StepNumbers) -> f64,
    ) -> Self {
        Self {
            name: Arc::new(name.to_string()),
            unit,
            higher_is_better,
            precision,
            read,
            state: NumericMetricState::default(),
        }
    }

    /// Mean loss.
    pub fn loss() -> Self {
        Self::new("Loss", None, false, 4, |numbers| numbers.loss)
    }

    /// Token accuracy in percent.
    pub fn token_accuracy() -> Self {
        Self::new("Token accuracy", Some("%"), true, 2, |numbers| {
            numbers.token_acc * 100.0
        })
    }

    /// Learning rate.
    pub fn learning_rate() -> Self {
        Self::new("Learning rate", None, true, 8, |numbers| {
            numbers.learning_rate
        })
    }

    /// Norm of the gradient before clipping.
    pub fn gradient_norm() -> Self {
        Self::new("Gradient norm", None, false, 4, |numbers| numbers.grad_norm)
    }

    /// Samples a second.
    pub fn samples_per_second() -> Self {
        Self::new("Samples", Some("/s"), true, 2, |numbers| {
            numbers.samples_per_second
        })
    }

    /// Tokens a second.
    pub fn tokens_per_second() -> Self {
        Self::new("Tokens", Some("/s"), true, 0, |numbers| {
            numbers.tokens_per_second
        })
    }

    /// Mean reward of the rollout that a step learns from.
    pub fn reward() -> Self {
        Self::new("Reward", None, true, 4, |numbers| {
            numbers.reward.unwrap_or(f64::NAN)
        })
    }

    /// Estimated divergence from the reference, a token.
    pub fn divergence() -> Self {
        Self::new("KL", None, false, 5, |numbers| {
            of_targets(numbers, |sums| sums.kl)
        })
    }

    /// Entropy at the targets, a token.
    pub fn entropy() -> Self {
        Self::new("Entropy", None, true, 4, |numbers| {
            of_targets(numbers, |sums| sums.entropy)
        })
    }

    /// Mean margin between the implicit rewards of the answers of a pair.
    pub fn margin() -> Self {
        Self::new("Reward margin", None, true, 4, |numbers| {
            numbers.sequences.map_or(f64::NAN, |sums| {
                (sums.chosen - sums.rejected) / sums.sequences.max(1.0)
            })
        })
    }

    /// Most memory so far in GiB.
    pub fn memory() -> Self {
        Self::new("Memory", Some(" GiB"), false, 2, |numbers| {
            numbers.memory_gib
        })
    }
}

/// A mean over targets; no number where a step has none.
fn of_targets(numbers: &StepNumbers, sum: fn(&ObjectiveSums) -> f64) -> f64 {
    let mean = |sums: ObjectiveSums| sum(&sums) / sums.targets.max(1.0);
    numbers.sequences.map_or(f64::NAN, mean)
}

impl Adaptor<StepNumbers> for StepNumbers {
    fn adapt(&self) -> StepNumbers {
        *self
    }
}

impl Metric for Gauge {
    type Input = StepNumbers;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes {
            unit: self.unit.map(str::to_string),
            higher_is_better: self.higher_is_better,
        }
        .into()
    }

    fn update(&mut self, numbers: &StepNumbers, _: &MetricMetadata) -> SerializedEntry {
        if numbers.starts_validation {
            self.state.reset();
        }
        let format = FormatOptions::new(self.name()).precision(self.precision);
        let format = match self.unit {
            Some(unit) => format.unit(unit),
            None => format,
        };
        self.state
            .update((self.read)(numbers), numbers.targets.max(1), format)
    }

    fn clear(&mut self) {
        self.state.reset();
    }
}

impl Numeric for Gauge {
    fn value(&self) -> NumericEntry {
        self.state.current_value()
    }

    fn running_value(&self) -> NumericEntry {
        self.state.running_value()
    }
}

#[cfg(test)]
mod tests {
    use burn::data::dataloader::Progress;

    use super::*;

    #[test]
    fn a_second_validation_of_an_epoch_has_a_mean_of_its_own() {
        let metadata = MetricMetadata {
            progress: Progress::new(1, 2),
            global_progress: Progress::new(1, 1),
            iteration: None,
            lr: None,
        };
        let mut gauge = Gauge::loss();
        let mut text = String::new();
        for (loss, starts_validation) in [(7.0, true), (6.0, false), (0.5, true), (0.4, false)] {
            let numbers = StepNumbers {
                loss,
                targets: 10,
                starts_validation,
                ..StepNumbers::default()
            };
            text = gauge.update(&numbers, &metadata).formatted;
        }
        assert_eq!(text, "epoch 0.4500 - batch 0.4000");
    }
}
