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
    words::duration,
};
use crate::{
    adapters::{lora::config::AdapterError, quantised::format_of},
    ops::quantised::Quantization,
    qwen3_vl::{config::Qwen3VlConfig, layer::Projection},
    train::tape::Recorded,
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
    /// Samples of an epoch.
    pub samples: usize,
    /// Optimizer steps of the run.
    pub steps: usize,
}

/// Input and output widths of the linear layers that can be adapted, with their published paths.
fn linear_layers(config: &Qwen3VlConfig) -> Vec<(String, u64, u64)> {
    let (text, vision) = (&config.text_config, &config.vision_config);
    let mut layers = Vec::new();
    let mut add =
        |path: String, from: usize, to: usize| layers.push((path, from as u64, to as u64));
    let joined = vision.hidden_size * vision.spatial_merge_size.pow(2);
    for i in 0..vision.depth {
        let at = format!("model.visual.blocks.{i}");
        add(
            format!("{at}.attn.qkv"),
            vision.hidden_size,
            3 * vision.hidden_size,
        );
        add(
            format!("{at}.attn.proj"),
            vision.hidden_size,
            vision.hidden_size,
        );
        add(
            format!("{at}.mlp.linear_fc1"),
            vision.hidden_size,
            vision.intermediate_size,
        );
        add(
            format!("{at}.mlp.linear_fc2"),
            vision.intermediate_size,
            vision.hidden_size,
        );
    }
    let deepstack = (0..vision.deepstack_visual_indexes.len())
        .map(|i| format!("model.visual.deepstack_merger_list.{i}"));
    for at in std::iter::once("model.visual.merger".to_string()).chain(deepstack) {
        add(format!("{at}.linear_fc1"), joined, joined);
        add(format!("{at}.linear_fc2"), joined, vision.out_hidden_size);
    }
    for i in 0..text.num_hidden_layers {
        for projection in Projection::ALL {
            let [d_output, d_input] = projection.shape(text);
            let path = projection.path();
            add(
                format!("model.language_model.layers.{i}.{path}"),
                d_input,
                d_output,
            );
        }
    }
    layers
}

/// Parameters of a model by what the freeze flags hold, norms and biases included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartParameters {
    /// The vision tower without its mergers: `freeze_vit`.
    pub vit: u64,
    /// The mergers: `freeze_aligner`.
    pub aligner: u64,
    /// The language model, embedding and head: `freeze_llm`.
    pub llm: u64,
}

/// Paths of all parameters with their sizes, norms and biases included.
fn parameters(config: &Qwen3VlConfig) -> Vec<(String, u64)> {
    let (text, vision) = (&config.text_config, &config.vision_config);
    let mut all = Vec::new();
    let mut add = |path: &str, leaf: &str, count: usize| {
        all.push((format!("{path}.{leaf}"), count as u64));
    };
    for (path, from, to) in linear_layers(config) {
        add(&path, "weight", (from * to) as usize);
        // The vision tower's linear layers have biases, those of attention in the language model by the config.
        let in_attention = text.attention_bias && path.contains(".self_attn.");
        if path.starts_with("model.visual") || in_attention {
            add(&path, "bias", to as usize);
        }
    }
    let hidden = vision.hidden_size;
    let joined = hidden * vision.spatial_merge_size.pow(2);
    let mut norm = |path: String, width: usize| {
        add(&path, "weight", width);
        add(&path, "bias", width);
    };
    for i in 0..vision.depth {
        norm(format!("model.visual.blocks.{i}.norm1"), hidden);
        norm(format!("model.visual.blocks.{i}.norm2"), hidden);
    }
    norm("model.visual.merger.norm".to_string(), hidden);
    for i in 0..vision.deepstack_visual_indexes.len() {
        norm(
            format!("model.visual.deepstack_merger_list.{i}.norm"),
            joined,
        );
    }
    let patches = "model.visual.patch_embed.proj";
    add(patches, "weight", hidden * vision.patch_dim());
    add(patches, "bias", hidden);
    let positions = vision.num_position_embeddings * hidden;
    add("model.visual.pos_embed", "weight", positions);
    for i in 0..text.num_hidden_layers {
        let at = format!("model.language_model.layers.{i}");
        for name in ["input_layernorm", "post_attention_layernorm"] {
            add(&format!("{at}.{name}"), "weight", text.hidden_size);
        }
        for name in ["q_norm", "k_norm"] {
            add(&format!("{at}.self_attn.{name}"), "weight", text.head_dim);
        }
    }
    add("model.language_model.norm", "weight", text.hidden_size);
    let table = text.vocab_size * text.hidden_size;
    add("model.language_model.embed_tokens", "weight", table);
    if !config.tie_word_embeddings {
        add("lm_head", "weight", table);
    }
    all
}

impl PartParameters {
    /// Of a model of these sizes.
    pub fn of(config: &Qwen3VlConfig) -> Self {
        let mut parts = Self {
            vit: 0,
            aligner: 0,
            llm: 0,
        };
        let is_aligner = |path: &str| path.contains(".merger") || path.contains(".deepstack");
        for (path, count) in parameters(config) {
            match path.starts_with("model.visual") {
                true if is_aligner(&path) => parts.aligner += count,
                true => parts.vit += count,
                false => parts.llm += count,
            }
        }
        parts
    }

    /// All of them.
    pub fn all(&self) -> u64 {
        self.vit + self.aligner + self.llm
    }

    /// Those that full training of a config moves.
    fn trained(&self, config: &TrainConfig) -> u64 {
        [
            (config.freeze_vit, self.vit),
            (config.freeze_aligner, self.aligner),
            (config.freeze_llm, self.llm),
        ]
        .iter()
        .filter(|(frozen, _)| !frozen)
        .map(|(_, count)| count)
        .sum()
    }
}

/// Parameters of both towers, norms and biases included.
pub fn base_parameters(config: &Qwen3VlConfig) -> u64 {
    PartParameters::of(config).all()
}

/// Bytes of the base on a device, `dtype_bytes` an element where it is not quantised.
pub fn base_bytes(
    config: &Qwen3VlConfig,
    quantization: Option<Quantization>,
    dtype_bytes: u64,
) -> u64 {
    let text = &config.text_config;
    let floats = base_parameters(config) * dtype_bytes;
    let Some(quantization) = quantization else {
        return floats;
    };
    let tables = match config.tie_word_embeddings {
        true => &["model.language_model.embed_tokens"][..],
        false => &["model.language_model.embed_tokens", "lm_head"],
    };
    let (width, vocab) = (text.hidden_size as u64, text.vocab_size as u64);
    let tables = tables.iter().map(|path| (path.to_string(), width, vocab));
    (linear_layers(config).into_iter().chain(tables)).fold(floats, |bytes, (path, from, to)| {
        match format_of(quantization, &format!("{path}.weight")) {
            Some(format) => {
                bytes - from * to * dtype_bytes + format.bytes(to as usize, from as usize) as u64
            }
            None => bytes,
        }
    })
}

/// Parameters that a run moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TrainedParameters {
    /// Of low-rank adapters, f32.
    pub adapters: u64,
    /// Of the model itself, in the type of its weights: all that full training moves, or `modules_to_save`.
    pub whole: u64,
    /// Of those, what a tied table takes that becomes two.
    pub copied: u64,
}

impl TrainedParameters {
    /// Of a run.
    ///
    /// # Errors
    /// A pattern in `target_modules` that cannot be read.
    pub fn of(config: &TrainConfig, model: &Qwen3VlConfig) -> Result<Self, AdapterError> {
        if config.tuner == Tuner::Full {
            return Ok(Self {
                whole: PartParameters::of(model).trained(config),
                ..Self::default()
            });
        }
        let lora = config.lora_config();
        let matcher = lora.matcher()?;
        let text = &model.text_config;
        let table = (text.vocab_size * text.hidden_size) as u64;
        let head = (
            "lm_head".to_string(),
            text.hidden_size as u64,
            text.vocab_size as u64,
        );
        let adapters = linear_layers(model)
            .iter()
            .chain([&head])
            .filter(|(path, ..)| matcher.matches(path))
            .map(|(_, from, to)| {
                let magnitude = if lora.use_dora { *to } else { 0 };
                lora.r as u64 * (from + to) + magnitude
            })
            .sum();
        let saved = |path: &str| lora.saves(path);
        let tables = ["lm_head", "model.language_model.embed_tokens"];
        let copied = model.tie_word_embeddings && tables.iter().any(|path| saved(path));
        let own = parameters(model).into_iter().filter(|(path, _)| {
            let module = path.rsplit_once('.').map_or("", |(module, _)| module);
            saved(module)
        });
        let own: u64 = own.map(|(_, count)| count).sum();
        // A tied head is in no list of the base's parameters.
        let tied_head = model.tie_word_embeddings && saved("lm_head");
        Ok(Self {
            adapters,
            whole: own + if tied_head { table } else { 0 },
            copied: if copied { table } else { 0 },
        })
    }

    /// All of them.
    pub fn all(self) -> u64 {
        self.adapters + self.whole
    }
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
    #[cfg(feature = "flex")]
    fn parameters_are_counted_as_the_module_has_them() {
        use crate::{
            adapters::quantised::memory::weight_bytes,
            qwen3_vl::{Qwen3Vl, nn::InitOptions, weights::parameter_shapes},
        };
        for size in ["2b", "4b", "8b", "32b"] {
            let config = Qwen3VlConfig::published(size).unwrap();
            let model = Qwen3Vl::<burn_flex::Flex>::new(
                &config,
                &InitOptions::default(),
                &Default::default(),
            );
            let count: u64 = parameter_shapes(&model)
                .values()
                .map(|shape| shape.iter().product::<usize>() as u64)
                .sum();
            assert_eq!(base_parameters(&config), count, "{size}");
            for quantization in [None, "int8".parse().ok(), "int4:32".parse().ok()] {
                let bytes = weight_bytes(&parameter_shapes(&model), quantization, 2) as u64;
                assert_eq!(base_bytes(&config, quantization, 2), bytes, "{size}");
            }
            let of = |wanted: fn(&str) -> bool| -> u64 {
                parameter_shapes(&model)
                    .iter()
                    .filter(|(path, _)| wanted(path))
                    .map(|(_, shape)| shape.iter().product::<usize>() as u64)
                    .sum()
            };
            let parts = PartParameters::of(&config);
            let aligner = of(|path| path.contains("visual.merger.") || path.contains("deepstack"));
            assert_eq!(parts.aligner, aligner, "{size}");
            assert_eq!(parts.vit + aligner, of(|path| path.contains("visual.")));
        }
    }

    #[test]
    fn full_training_counts_what_no_flag_freezes() {
        let model = Qwen3VlConfig::published("2b").unwrap();
        let parts = PartParameters::of(&model);
        let mut config = TrainConfig {
            tuner: Tuner::Full,
            freeze_llm: true,
            freeze_aligner: false,
            ..TrainConfig::default()
        };
        let plan = |config: &TrainConfig| Plan::new(config, &model, 10, 300, 1, 2, None).unwrap();
        assert_eq!(plan(&config).trained_parameters, parts.aligner);
        config.freeze_vit = false;
        config.freeze_llm = false;
        assert_eq!(plan(&config).trained_parameters, base_parameters(&model));
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
