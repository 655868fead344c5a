//! `plan --cards`: what fits on cards of several sizes, before anything is loaded.

use anyhow::Result;
use burn::tensor::DType;

use crate::{
    accelerate::devices::DeviceTask,
    base::device_name::DeviceKind,
    ops::quantised::{Quantization, cache::CacheFormat},
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, nn::InitOptions, weights::parameter_shapes},
    runtime::{
        accelerator::Accelerator,
        fit::{CacheWish, InferenceMemory},
    },
    train::{
        budget::StepForm,
        config::{TrainConfig, Tuner},
    },
};

/// Sizes of cards that workstations have, in GB.
pub(super) const CARDS: &str = "8,12,16,24";

/// Share of a card that its desktop and driver leave.
const USABLE: f64 = 0.95;

/// Tokens of a prompt with a large film and its answer.
const ANSWER: usize = 2048;

/// Tokens that go through quantised layers at once.
const AT_ONCE: usize = 512;

/// Makes the table.
pub(super) struct Cards<'a> {
    /// Memory of the cards, GB.
    pub(super) cards: &'a [f64],
    /// The model.
    pub(super) model: &'a Qwen3VlConfig,
    /// The run whose rows are planned.
    pub(super) config: &'a TrainConfig,
    /// Tokens of the longest sample.
    pub(super) longest: usize,
    /// Patches of the largest image.
    pub(super) patches: usize,
}

impl DeviceTask for Cards<'_> {
    type Output = Result<String>;

    fn run<B: Accelerator>(self, device: B::Device, _dtype: DType) -> Result<String> {
        let options = InitOptions::default();
        let shapes = parameter_shapes(&Qwen3Vl::<B>::new(self.model, &options, &device));
        let memory = InferenceMemory::new(self.model, shapes, 2, DeviceKind::Cuda);
        let forms: [(&str, Option<Quantization>); 3] = [
            ("16 bits", None),
            ("int8", Some("int8".parse().map_err(anyhow::Error::msg)?)),
            ("int4", Some("int4".parse().map_err(anyhow::Error::msg)?)),
        ];
        let mut lines = vec![
            format!(
                "what fits on a card (CUDA, estimates): GiB of weights; longest context; answers of {ANSWER} tokens at once; \
                 training of samples of {} tokens",
                self.longest
            ),
            format!(
                "{:>7}  {:<8} {:>7} {:>9} {:>8}  training",
                "card", "weights", "GiB", "context", "at once"
            ),
        ];
        for card in self.cards {
            // Cards are sold in GB of 2³⁰ bytes.
            let budget = (card * USABLE * (1u64 << 30) as f64) as u64;
            for (name, quantization) in forms {
                let wish = CacheWish {
                    tokens: self.model.text_config.max_position_embeddings,
                    least: 256,
                    format: Some(CacheFormat::Float),
                    at_once: AT_ONCE,
                    patches: self.patches,
                };
                let gib = memory.weights(quantization) as f64 / (1u64 << 30) as f64;
                let fit = memory.fit(budget, quantization, CacheFormat::Float, &wish);
                let (context, together) = match fit {
                    Some(fit) => (
                        fit.cache_tokens.to_string(),
                        (fit.cache_tokens / ANSWER).to_string(),
                    ),
                    None => ("–".to_string(), "–".to_string()),
                };
                lines.push(format!(
                    "{card:>5} GB  {name:<8} {gib:>7.1} {context:>9} {together:>8}  {}",
                    self.training(card * USABLE, quantization)
                ));
            }
        }
        Ok(lines.join("\n"))
    }
}

impl Cards<'_> {
    /// The form of a training step on a card.
    fn training(&self, gib: f64, quantization: Option<Quantization>) -> String {
        // Full training moves the floats themselves.
        if quantization.is_some() && self.config.tuner == Tuner::Full {
            return "–".to_string();
        }
        let weights = (2, quantization);
        match StepForm::choose(self.config, self.model, self.longest, weights, gib, None) {
            Ok(form) => form.words(self.longest),
            Err(_) => "–".to_string(),
        }
    }
}
