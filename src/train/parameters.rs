//! Parameters of a model and of a run, counted from the sizes alone.

use super::config::{TrainConfig, Tuner};
use crate::{
    adapters::{lora::config::AdapterError, quantised::format_of},
    ops::quantised::Quantization,
    qwen3_vl::{config::Qwen3VlConfig, layer::Projection},
};

/// Input and output widths of the linear layers that can be adapted, with their published paths.
pub fn linear_layers(config: &Qwen3VlConfig) -> Vec<(String, u64, u64)> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
        let trained = |config: &TrainConfig| TrainedParameters::of(config, &model).unwrap().all();
        assert_eq!(trained(&config), parts.aligner);
        config.freeze_vit = false;
        config.freeze_llm = false;
        assert_eq!(trained(&config), base_parameters(&model));
    }
}
