//! What a run will take, before anything is loaded.

use std::fmt::Write;

use super::config::{TrainConfig, Tuner};
use crate::qwen3_vl::config::Qwen3VlConfig;

/// Counts and bytes of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Parameters of the base.
    pub base_parameters: u64,
    /// Parameters that are trained; with `tuner = "full"` all of them, whatever is frozen.
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
    let query = text.num_attention_heads * text.head_dim;
    let key = text.num_key_value_heads * text.head_dim;
    for i in 0..text.num_hidden_layers {
        let at = format!("model.language_model.layers.{i}");
        add(format!("{at}.self_attn.q_proj"), text.hidden_size, query);
        add(format!("{at}.self_attn.k_proj"), text.hidden_size, key);
        add(format!("{at}.self_attn.v_proj"), text.hidden_size, key);
        add(format!("{at}.self_attn.o_proj"), query, text.hidden_size);
        add(
            format!("{at}.mlp.gate_proj"),
            text.hidden_size,
            text.intermediate_size,
        );
        add(
            format!("{at}.mlp.up_proj"),
            text.hidden_size,
            text.intermediate_size,
        );
        add(
            format!("{at}.mlp.down_proj"),
            text.intermediate_size,
            text.hidden_size,
        );
    }
    layers
}

/// Parameters of both towers, norms and biases included.
pub fn base_parameters(config: &Qwen3VlConfig) -> u64 {
    let (text, vision) = (&config.text_config, &config.vision_config);
    let weights: u64 = linear_layers(config)
        .iter()
        .map(|(_, from, to)| from * to)
        .sum();
    let visual_biases: u64 = linear_layers(config)
        .iter()
        .filter(|(path, ..)| path.starts_with("model.visual"))
        .map(|(_, _, to)| to)
        .sum();
    let hidden = vision.hidden_size as u64;
    let joined = hidden * (vision.spatial_merge_size as u64).pow(2);
    let visual_norms = vision.depth as u64 * 4 * hidden
        + 2 * hidden
        + vision.deepstack_visual_indexes.len() as u64 * 2 * joined;
    let embeds =
        hidden * (vision.patch_dim() as u64 + 1) + vision.num_position_embeddings as u64 * hidden;
    let table = (text.vocab_size * text.hidden_size) as u64;
    let tables = if config.tie_word_embeddings {
        table
    } else {
        2 * table
    };
    let layers = text.num_hidden_layers as u64;
    let text_norms =
        layers * (2 * text.hidden_size + 2 * text.head_dim) as u64 + text.hidden_size as u64;
    let text_biases = if text.attention_bias {
        let heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim;
        layers * (heads + text.hidden_size) as u64
    } else {
        0
    };
    weights + visual_biases + visual_norms + embeds + tables + text_norms + text_biases
}

impl Plan {
    /// Plans a run over `samples` samples of at most `longest` tokens on `devices` devices, weights
    /// in types of `dtype_bytes`.
    ///
    /// Activations are estimated: what the backward pass of plain operations keeps a token and
    /// layer, once for the layers computed at a time, plus the logits of the loss.
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
    ) -> Result<Self, crate::lora::config::AdapterError> {
        let base = base_parameters(model);
        let trained = match config.tuner {
            Tuner::Lora => {
                let lora = config.lora_config();
                let matcher = lora.matcher()?;
                linear_layers(model)
                    .iter()
                    .filter(|(path, ..)| matcher.matches(path))
                    .map(|(_, from, to)| {
                        let magnitude = if lora.use_dora { *to } else { 0 };
                        lora.r as u64 * (from + to) + magnitude
                    })
                    .sum()
            }
            Tuner::Full => base,
        };
        let text = &model.text_config;
        let tokens = match config.row_tokens() {
            Some(tokens) => tokens.max(longest),
            None => longest * config.per_device_train_batch_size,
        } as u64;
        let heads =
            ((text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim) as u64;
        // Inputs of the projections and norms, rotated heads, gate, up and their product, in f32.
        let a_token =
            4 * (6 * text.hidden_size as u64 + 4 * heads + 5 * text.intermediate_size as u64);
        let scores = 4 * 3 * text.num_attention_heads as u64 * longest as u64;
        let layers = text.num_hidden_layers as u64;
        let kept_layers = if config.gradient_checkpointing {
            1
        } else {
            layers
        };
        let activations = tokens * (a_token + scores) * kept_layers
            + tokens * layers * text.hidden_size as u64 * dtype_bytes;
        let logits = 512.min(tokens) * text.vocab_size as u64 * 4 * 3;
        let memory = match config.tuner {
            Tuner::Lora => vec![
                ("frozen weights", base * dtype_bytes),
                ("adapters, f32", trained * 4),
                ("gradients, f32", trained * 4),
                ("optimizer moments, f32", trained * 8),
                ("activations", activations),
                ("logits of the loss", logits),
            ],
            Tuner::Full => vec![
                ("weights", base * dtype_bytes),
                ("gradients", trained * dtype_bytes),
                ("optimizer moments, f32", trained * 8),
                ("activations", activations),
                ("logits of the loss", logits),
            ],
        };
        Ok(Self {
            base_parameters: base,
            trained_parameters: trained,
            memory,
            samples,
            steps: config.total_steps(samples, devices),
        })
    }

    /// The plan as lines of text; `samples_per_second` adds the time it takes.
    pub fn to_text(&self, epochs: f64, samples_per_second: Option<f64>) -> String {
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
        if let Some(rate) = samples_per_second {
            let hours = self.samples as f64 * epochs / rate / 3600.0;
            let _ = writeln!(text, "time         {hours:>14.2} h at {rate} samples/s");
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
        let plan = Plan::new(&TrainConfig::default(), &model, 6102, 368, 2, 2).unwrap();
        // r·(in + out) of seven projections in 36 layers.
        let a_layer = 8 * ((4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 12288) * 3);
        assert_eq!(plan.trained_parameters, 36 * a_layer);
        assert_eq!(plan.steps, 573);
        assert!((plan.base_parameters as f64 / 8.77e9 - 1.0).abs() < 0.01);
    }

    #[test]
    #[cfg(feature = "flex")]
    fn parameters_are_counted_as_the_module_has_them() {
        use crate::qwen3_vl::{Qwen3Vl, nn::InitOptions, weights::parameter_shapes};
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
        }
    }
}
