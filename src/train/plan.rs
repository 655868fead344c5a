//! Plans a run before anything is loaded: parameters, memory, steps and time.

use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    budget::StepMemory,
    config::{TrainConfig, Tuner},
    objective::settings::Objective,
    parameters::{TrainedParameters, base_bytes, base_parameters, linear_layers},
    words::duration,
};
use crate::{
    adapters::lora::config::AdapterError, ops::quantised::Quantization,
    qwen3_vl::config::Qwen3VlConfig, train::tape::Recorded,
};

/// A throughput that was measured, and what on.
#[derive(Debug, Clone, PartialEq)]
pub struct Throughput {
    /// Samples a second, all devices together.
    pub samples_per_second: f64,
    /// The device as the bench names it; `None` for a figure that the user gave.
    pub device: Option<String>,
}

/// Why a bench's file gives no throughput.
#[derive(Debug, thiserror::Error)]
pub enum BenchFileError {
    /// The file cannot be read.
    #[error("cannot read `{}`: {cause}; `bench train --json` writes it", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// No line of it holds a throughput of training.
    #[error(
        "`{}` holds no JSON object with a positive number under `samples_per_second` and a text under `device`; expected what `bench train --json` writes", .0.display()
    )]
    NoFigure(PathBuf),
}

impl Throughput {
    /// Reads the last figure of a file that `bench train --json` wrote: one JSON object a line, or
    /// one object or list in all; other lines are ignored.
    ///
    /// # Errors
    /// [`BenchFileError`].
    pub fn from_bench(path: &Path) -> Result<Self, BenchFileError> {
        let text = fs::read_to_string(path).map_err(|cause| BenchFileError::Read {
            path: path.to_path_buf(),
            cause,
        })?;
        let whole = serde_json::from_str::<Value>(&text).ok();
        let values: Vec<Value> = match whole {
            Some(Value::Array(list)) => list,
            Some(one) => vec![one],
            None => text
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok())
                .collect(),
        };
        values
            .iter()
            .rev()
            .find_map(|value| {
                let samples_per_second = value.get("samples_per_second")?.as_f64()?;
                let device = value.get("device")?.as_str()?.to_string();
                (samples_per_second > 0.0).then_some(Self {
                    samples_per_second,
                    device: Some(device),
                })
            })
            .ok_or_else(|| BenchFileError::NoFigure(path.to_path_buf()))
    }
}

/// Counts and bytes of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Parameters of the base.
    pub base_parameters: u64,
    /// Parameters that are trained; with `tuner = "full"` those that no freeze flag holds.
    pub trained_parameters: u64,
    /// Device memory by part, in bytes.
    pub memory: Vec<(&'static str, u64)>,
    /// Device memory by part while answers are drawn, in bytes; empty where none are.
    pub rollout: Vec<(&'static str, u64)>,
    /// Samples of an epoch.
    pub samples: usize,
    /// Optimizer steps of the run.
    pub steps: usize,
}

/// Memory while the answers of a rollout are drawn: weights, their merged copy, optimizer, keys and values.
fn rollout_memory(
    config: &TrainConfig,
    model: &Qwen3VlConfig,
    longest: usize,
    dtype_bytes: u64,
    quantization: Option<Quantization>,
) -> Result<Vec<(&'static str, u64)>, AdapterError> {
    if config.objective != Objective::Grpo {
        return Ok(Vec::new());
    }
    let trained = TrainedParameters::of(config, model)?;
    let mut parts = vec![
        ("weights", base_bytes(model, quantization, dtype_bytes)),
        (
            "trained values, moments",
            trained.adapters * 12 + trained.whole * (dtype_bytes + 8),
        ),
    ];
    if config.tuner == Tuner::Lora && quantization.is_none() {
        // The weights of adapted layers are composed for the time of a rollout.
        let matcher = config.lora_config().matcher()?;
        let adapted = linear_layers(model).into_iter();
        let adapted = adapted.filter(|(path, ..)| matcher.matches(path));
        let elements: u64 = adapted.map(|(_, from, to)| from * to).sum();
        parts.push(("merged weights", elements * dtype_bytes));
    }
    let text = &model.text_config;
    let group = config.num_generations;
    let answers = (config.per_device_eval_batch_size / group).max(1) * group;
    let a_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim;
    let tokens = (answers * longest) as u64;
    parts.push(("keys and values", tokens * a_token as u64 * dtype_bytes));
    parts.push(("logits", answers as u64 * text.vocab_size as u64 * 8));
    Ok(parts)
}

impl Plan {
    /// Plans a run over `samples` samples of at most `longest` tokens on `devices` devices, weights
    /// in types of `dtype_bytes` or quantised.
    ///
    /// Activations are estimated, see [`StepMemory`].
    ///
    /// # Errors
    /// A pattern in `target_modules` that cannot be read.
    pub fn new(
        config: &TrainConfig,
        model: &Qwen3VlConfig,
        samples: usize,
        longest: usize,
        devices: usize,
        dtype_bytes: u64,
        quantization: Option<Quantization>,
    ) -> Result<Self, AdapterError> {
        let tokens = match config.row_tokens() {
            Some(tokens) => tokens.max(longest),
            None => longest * config.per_device_train_batch_size,
        };
        let memory = StepMemory::new(config, model, longest, dtype_bytes, quantization)?
            .parts(tokens as u64, Recorded::of(config));
        Ok(Self {
            base_parameters: base_parameters(model),
            trained_parameters: TrainedParameters::of(config, model)?.all(),
            memory,
            rollout: rollout_memory(config, model, longest, dtype_bytes, quantization)?,
            samples,
            steps: config.total_steps(samples, devices),
        })
    }

    /// The plan as lines of text; a throughput adds the time it takes.
    pub fn to_text(&self, epochs: f64, throughput: Option<&Throughput>) -> String {
        const GIB: f64 = (1u64 << 30) as f64;
        let mut text = String::new();
        let _ = writeln!(text, "parameters   {:>14}", self.base_parameters);
        let _ = writeln!(
            text,
            "trained      {:>14}  ({:.3} % of the base)",
            self.trained_parameters,
            self.trained_parameters as f64 / self.base_parameters as f64 * 100.0
        );
        let _ = writeln!(text, "memory of a device, estimated:");
        for (part, bytes) in &self.memory {
            let _ = writeln!(text, "  {part:<24} {:>9.3} GiB", *bytes as f64 / GIB);
        }
        let total: u64 = self.memory.iter().map(|(_, bytes)| bytes).sum();
        let _ = writeln!(text, "  {:<24} {:>9.3} GiB", "together", total as f64 / GIB);
        if !self.rollout.is_empty() {
            let _ = writeln!(
                text,
                "memory of a device while answers are drawn, estimated:"
            );
            for (part, bytes) in &self.rollout {
                let _ = writeln!(text, "  {part:<24} {:>9.3} GiB", *bytes as f64 / GIB);
            }
            let total: u64 = self.rollout.iter().map(|(_, bytes)| bytes).sum();
            let _ = writeln!(text, "  {:<24} {:>9.3} GiB", "together", total as f64 / GIB);
        }
        let _ = writeln!(text, "samples      {:>14}", self.samples);
        let _ = writeln!(text, "steps        {:>14}", self.steps);
        match throughput {
            Some(Throughput {
                samples_per_second: rate,
                device,
            }) => {
                let time = duration(self.samples as f64 * epochs / rate);
                let measured = match device {
                    Some(device) => format!(", measured on {device}"),
                    None => String::new(),
                };
                let _ = writeln!(
                    text,
                    "time         {time:>14} at {rate} samples/s{measured}"
                );
            }
            None => text.push_str(
                "time            not estimated; give a figure of `bench train --json` with --bench, or --samples-per-second\n",
            ),
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_recipe_trains_22_million_of_8_8_billion_parameters() {
        let model = Qwen3VlConfig::published("8b").unwrap();
        let plan = Plan::new(&TrainConfig::default(), &model, 6102, 368, 2, 2, None).unwrap();
        // r·(in + out) of seven projections in 36 layers.
        let a_layer = 8 * ((4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 12288) * 3);
        assert_eq!(plan.trained_parameters, 36 * a_layer);
        assert_eq!(plan.steps, 573);
        assert!((plan.base_parameters as f64 / 8.77e9 - 1.0).abs() < 0.01);
    }

    #[test]
    fn a_bench_gives_the_time_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bench.json");
        let lines = "warming up\n\
                     {\"what\": \"train\", \"device\": \"H200\", \"samples_per_second\": 4.0}\n\
                     {\"what\": \"decode\", \"device\": \"H200\", \"samples_per_second\": null}\n";
        fs::write(&path, lines).unwrap();
        let found = Throughput::from_bench(&path).unwrap();
        assert_eq!(found.samples_per_second, 4.0);
        let model = Qwen3VlConfig::published("8b").unwrap();
        let plan = Plan::new(&TrainConfig::default(), &model, 7200, 368, 1, 2, None).unwrap();
        let text = plan.to_text(2.0, Some(&found));
        assert!(
            text.contains("1.00 h at 4 samples/s, measured on H200"),
            "{text}"
        );
        // Fifteen samples at two a second are no hour.
        let few = Plan::new(&TrainConfig::default(), &model, 15, 368, 1, 2, None).unwrap();
        let given = Throughput {
            samples_per_second: 2.0,
            device: None,
        };
        let text = few.to_text(1.0, Some(&given));
        assert!(text.contains(" 7.5 s at 2 samples/s\n"), "{text}");
        assert!(plan.to_text(2.0, None).contains("not estimated"));
        fs::write(&path, "{\"device\": \"H200\", \"samples_per_second\": 0}").unwrap();
        let error = Throughput::from_bench(&path).unwrap_err().to_string();
        assert!(error.contains("samples_per_second"), "{error}");
    }
}
