//! Device memory of a training step, estimated, and which form of the step fits a budget.
//!
//! Only the form of a step is chosen: how many tokens go through the model in one row, and what is kept
//! for the backward pass. Samples, their weights in the loss and the optimizer's step stay what the
//! config says.

use super::{
    config::{LossReduction, TrainConfig, Tuner},
    parameters::{TrainedParameters, base_bytes},
    tape::Recorded,
};
use crate::{
    adapters::lora::config::AdapterError, ops::quantised::Quantization,
    qwen3_vl::config::Qwen3VlConfig, study::counted,
};

pub use crate::ops::memory::Budget;

const GIB: f64 = (1u64 << 30) as f64;

impl Recorded {
    /// As a config says it.
    pub fn of(config: &TrainConfig) -> Self {
        Self::from_flags(config.gradient_checkpointing, config.recompute_pointwise)
    }

    /// Work of a step beside that with everything kept, in percent: the matmuls of a layer's forward
    /// pass are a third of all, less the last one; pointwise operations only move memory.
    fn work(self) -> u64 {
        match self {
            Self::Everything => 100,
            Self::Matmuls => 103,
            Self::Inputs => 128,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Everything => "everything kept for the backward pass",
            Self::Matmuls => "norms, rotation and gate run again in the backward pass",
            Self::Inputs => "every layer run again in the backward pass",
        }
    }
}

/// Memory of a device in a step, by part, in bytes; an estimate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepMemory {
    /// What does not depend on the step's form.
    fixed: Vec<(&'static str, u64)>,
    hidden: u64,
    layers: u64,
    /// Bytes a token and layer by what is kept, in the order of [`Recorded`].
    tape: [u64; 3],
    /// Bytes a token while one layer is worked on, forward or backward, vision tower included.
    working: u64,
    vocab: u64,
    dtype_bytes: u64,
}

/// Rows of logits at once.
const LOSS_ROWS: u64 = super::loss::LOSS_ROWS as u64;

impl StepMemory {
    /// Of a run, weights in types of `dtype_bytes` or quantised; `longest` is its longest sample in tokens.
    ///
    /// # Errors
    /// A pattern in `target_modules` that cannot be read.
    pub fn new(
        config: &TrainConfig,
        model: &Qwen3VlConfig,
        longest: usize,
        dtype_bytes: u64,
        quantization: Option<Quantization>,
    ) -> Result<Self, AdapterError> {
        let (text, vision) = (&model.text_config, &model.vision_config);
        let base = base_bytes(model, quantization, dtype_bytes);
        let trained = TrainedParameters::of(config, model)?;
        let hidden = text.hidden_size as u64;
        let wide = text.intermediate_size as u64;
        let queries = (text.num_attention_heads * text.head_dim) as u64;
        let keys = (text.num_key_value_heads * text.head_dim) as u64;
        let patches = (vision.spatial_merge_size as u64).pow(2);
        let image = patches * (10 * vision.hidden_size + 2 * vision.intermediate_size) as u64;
        let frozen = match quantization.map(|quantization| quantization.layers.bits()) {
            None => "frozen weights",
            Some(8) => "frozen weights, int8",
            Some(_) => "frozen weights, int4",
        };
        let (mut fixed, tape, working);
        if config.writes_gradients_out() {
            let elements = |recorded: Recorded| recorded.elements_per_token(text) as u64;
            tape = [Recorded::Everything, Recorded::Matmuls, Recorded::Inputs]
                .map(|recorded| elements(recorded) * dtype_bytes);
            // A layer's tape, the gradients through it, the low-rank parts' partial sums.
            let gradients = 5 * hidden + 3 * wide;
            working = (elements(Recorded::Everything) + gradients + image) * dtype_bytes;
            fixed = vec![
                (frozen, base),
                ("adapters, f32", trained.adapters * 4),
                ("gradients, f32", trained.adapters * 4),
                ("optimizer moments, f32", trained.adapters * 8),
                // New values and moments beside the old ones.
                ("optimizer step, f32", trained.adapters * 12),
            ];
        } else {
            // Inputs of the projections and norms, rotated heads, gate, up and their SwiGLU, and three
            // times the scores, in f32: what the recorded operations hold.
            let scores = 3 * text.num_attention_heads as u64 * longest as u64;
            let all = 4 * (6 * hidden + 4 * (queries + 2 * keys) + 5 * wide + scores);
            tape = [all, all, hidden * dtype_bytes];
            working = all + image * 4;
            let weights = match config.tuner {
                Tuner::Lora => (frozen, base),
                Tuner::Full => ("weights", base),
            };
            fixed = vec![
                weights,
                (
                    "trained values",
                    trained.adapters * 4 + trained.copied * dtype_bytes,
                ),
                (
                    "gradients",
                    trained.adapters * 4 + trained.whole * dtype_bytes,
                ),
                ("optimizer moments, f32", trained.all() * 8),
            ];
        }
        if quantization.is_some() {
            // Of the matrices that one launch multiplies by, gate and up; smaller ones have memory of their own.
            let matrices = hidden * (queries + 2 * keys + 2 * wide);
            fixed.push(("dequantised matrices", matrices * dtype_bytes));
        }
        Ok(Self {
            fixed,
            hidden,
            layers: text.num_hidden_layers as u64,
            tape,
            working,
            vocab: text.vocab_size as u64,
            dtype_bytes,
        })
    }

    /// By part, for rows of so many tokens.
    pub fn parts(&self, tokens: u64, kept: Recorded) -> Vec<(&'static str, u64)> {
        let tape = self.tape[kept as usize] * self.layers;
        let rows = LOSS_ROWS.min(tokens);
        let mut parts = self.fixed.clone();
        parts.push(("kept activations", tokens * tape));
        parts.push(("one layer at work", tokens * self.working));
        // Logits in f32, their gradient in the weights' type, and the exponentials of plain operations.
        let logits = rows * self.vocab * (4 + self.dtype_bytes.max(4));
        parts.push(("logits of the loss", logits + tokens * self.hidden * 4));
        parts
    }

    /// All parts, with what the driver holds and what is left between tensors.
    ///
    /// On CUDA a step's tensors are allocated at their exact size (`DeviceOps::in_exact_memory`), whatever
    /// the card; only small ones are in pages of cubecl's pools.
    pub fn bytes(&self, tokens: u64, kept: Recorded) -> u64 {
        /// A CUDA context with its modules (0.55 GiB on an H200), and the pools' smallest pages.
        const DRIVER: u64 = 1 << 30;
        let sum: u64 = self
            .parts(tokens, kept)
            .iter()
            .map(|(_, bytes)| bytes)
            .sum();
        let weights = self.fixed.first().map_or(0, |(_, bytes)| *bytes);
        sum + (sum - weights) / 32 + DRIVER
    }
}

/// A budget that no form of the step fits.
#[derive(Debug, thiserror::Error)]
pub enum BudgetError {
    /// Too little even for one sample at a time.
    #[error(
        "a memory budget of {budget:.1} GiB is too small: one sample of {longest} tokens at a time, every layer run again in the backward pass, takes about {need:.1} GiB ({weights:.1} GiB of it weights); lower max_pixels or max_length, use `--dtype bf16`, quantise the weights (`--set quantize=int4`), or take a smaller model"
    )]
    TooSmall {
        /// GiB.
        budget: f64,
        /// Tokens.
        longest: usize,
        /// GiB.
        need: f64,
        /// GiB.
        weights: f64,
    },
    /// The adapter's pattern.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
}

/// The form of a step that was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepForm {
    /// Tokens of a row that samples are joined into; 0 leaves padded micro-batches as configured.
    pub row_tokens: usize,
    /// What is kept.
    pub kept: Recorded,
    /// Bytes it takes, about.
    pub bytes: u64,
}

impl StepForm {
    /// The fastest form within `gib` GiB; with `row_tokens`, of those with rows of so many tokens.
    ///
    /// `longest` is the longest sample in tokens; weights are in types of so many bytes, or quantised. Rows are several times as long where that fits: a
    /// matmul over few rows wastes the device. The choice is a function of the arguments alone.
    ///
    /// # Errors
    /// [`BudgetError`].
    pub fn choose(
        config: &TrainConfig,
        model: &Qwen3VlConfig,
        longest: usize,
        (dtype_bytes, quantization): (u64, Option<Quantization>),
        gib: f64,
        row_tokens: Option<usize>,
    ) -> Result<Self, BudgetError> {
        let budget = (gib * GIB) as u64;
        let memory = StepMemory::new(config, model, longest, dtype_bytes, quantization)?;
        let samples = config.per_device_train_batch_size * config.gradient_accumulation_steps;
        // A mean over micro-batches is another loss when they are cut otherwise.
        let joins = config.loss_reduction == LossReduction::Token;
        let padded = (config.per_device_train_batch_size * longest) as u64;
        let rows: Vec<(usize, u64)> = match row_tokens {
            Some(0) => vec![(0, padded)],
            Some(tokens) => vec![(tokens, tokens.max(longest) as u64)],
            None if joins => (1..=samples)
                .map(|together| (together * longest, (together * longest) as u64))
                .collect(),
            None => vec![(0, padded)],
        };
        let forms: &[Recorded] = if config.writes_gradients_out() {
            &[Recorded::Everything, Recorded::Matmuls, Recorded::Inputs]
        } else {
            &[Recorded::Everything, Recorded::Inputs]
        };
        /// Tokens' worth of time that a row takes whatever its length: launches, and weights that are
        /// read for few rows.
        const FIXED: u64 = 300;
        let all = rows.iter().flat_map(|&(row_tokens, tokens)| {
            let form = |kept: Recorded| Self {
                row_tokens,
                kept,
                bytes: memory.bytes(tokens, kept),
            };
            // Of all samples of a step, in rows of this length.
            let count = ((samples * longest) as u64).div_ceil(tokens);
            let time = count * (tokens + FIXED);
            forms
                .iter()
                .map(|kept| (time * kept.work(), form(*kept)))
                .collect::<Vec<_>>()
        });
        let least = memory.bytes(rows[0].1, Recorded::Inputs);
        all.filter(|(_, form)| form.bytes <= budget)
            .min_by_key(|(time, form)| (*time, form.bytes))
            .map(|(_, form)| form)
            .ok_or_else(|| BudgetError::TooSmall {
                budget: gib,
                longest,
                need: least as f64 / GIB,
                weights: memory.fixed[0].1 as f64 / GIB,
            })
    }

    /// Writes the form into a config.
    pub fn apply(&self, config: &mut TrainConfig) {
        if self.row_tokens > 0 {
            config.packing = true;
            config.packing_tokens = self.row_tokens;
        }
        config.gradient_checkpointing = self.kept == Recorded::Inputs;
        config.recompute_pointwise = self.kept == Recorded::Matmuls;
    }

    /// The form in words.
    pub fn words(&self, longest: usize) -> String {
        let rows = match self.row_tokens {
            0 => "micro-batches as configured".to_string(),
            tokens => format!(
                "rows of {tokens} tokens ({} of {longest})",
                counted(tokens / longest, "sample", "samples")
            ),
        };
        format!(
            "{rows}, {}; about {:.1} GiB",
            self.kept.words(),
            self.bytes as f64 / GIB
        )
    }

    /// The choice and its reason in one line.
    pub fn explain(&self, gib: f64, longest: usize) -> String {
        format!(
            "memory budget {gib:.1} GiB: {}. Samples of a step, loss and optimizer stay as configured",
            self.words(longest)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(gib: f64) -> Result<StepForm, BudgetError> {
        quantised_form(gib, None)
    }

    fn quantised_form(gib: f64, format: Option<&str>) -> Result<StepForm, BudgetError> {
        let model = Qwen3VlConfig::published("8b").unwrap();
        let weights = (2, format.and_then(|format| format.parse().ok()));
        StepForm::choose(&TrainConfig::default(), &model, 368, weights, gib, None)
    }

    #[test]
    fn cards_of_8_and_12_gb_train_the_8b_on_quantised_weights() {
        // What a desktop and its driver leave of a card.
        let on_card = |gib: f64, format| quantised_form(0.95 * gib, format);
        for (format, least) in [(None, 24.0), (Some("int8"), 12.0), (Some("int4"), 8.0)] {
            for card in [8.0, 12.0, 16.0, 24.0] {
                let form = on_card(card, format);
                assert_eq!(
                    form.is_ok(),
                    card >= least,
                    "{format:?} on {card} GB: {form:?}"
                );
            }
        }
        // The floats are gone, the rows of one launch are there: 16.3 GiB of weights become 4.9.
        let least = |format| match quantised_form(1.0, format) {
            Err(BudgetError::TooSmall { need, weights, .. }) => [need, weights],
            other => panic!("{other:?}"),
        };
        let ([all, floats], [quantised, words]) = (least(None), least(Some("int4")));
        assert!((4.8..5.0).contains(&words), "{words}");
        let matrices = all - floats - (quantised - words);
        assert!((-0.26..-0.22).contains(&matrices), "{matrices}");
    }

    #[test]
    fn estimates_are_near_what_an_h200_showed() {
        let model = Qwen3VlConfig::published("8b").unwrap();
        let memory = StepMemory::new(&TrainConfig::default(), &model, 368, 2, None).unwrap();
        // `bench train` of the 8B, 2026-11-30: GiB in use on the card, driver included.
        for (tokens, kept, seen) in [
            (368, Recorded::Inputs, 17.90),
            (1472, Recorded::Inputs, 18.86),
            (1472, Recorded::Matmuls, 22.61),
            (2944, Recorded::Matmuls, 27.65),
            (5888, Recorded::Inputs, 22.24),
            (5888, Recorded::Matmuls, 37.21),
            (5888, Recorded::Everything, 47.05),
        ] {
            let gib = memory.bytes(tokens, kept) as f64 / GIB;
            // Never less than it takes: a budget holds.
            assert!(
                (1.0..1.06).contains(&(gib / seen)),
                "{tokens} {kept:?}: {gib}"
            );
        }
    }

    #[test]
    fn more_memory_is_never_slower_and_is_kept_to() {
        assert!(matches!(form(17.0), Err(BudgetError::TooSmall { .. })));
        let mut before = 0;
        for gib in [20.0, 22.0, 24.0, 32.0, 40.0, 48.0, 80.0] {
            let form = form(gib).unwrap();
            assert!(form.bytes as f64 <= gib * GIB, "{gib}: {form:?}");
            // Faster forms only: tokens in a row and what is kept both cost memory.
            assert!(form.bytes >= before, "{gib}: {form:?}");
            before = form.bytes;
        }
        let all = form(80.0).unwrap();
        assert_eq!((all.row_tokens, all.kept), (16 * 368, Recorded::Everything));
        // A card of 24 GiB need not run the layers twice.
        assert_ne!(form(24.0).unwrap().kept, Recorded::Inputs);
    }

    #[test]
    fn the_form_changes_no_key_that_changes_the_step() {
        let mut config = TrainConfig::default();
        form(24.0).unwrap().apply(&mut config);
        config.validate().unwrap();
        let free = ["packing", "packing_tokens"];
        for (key, ..) in TrainConfig::default().differences(&config) {
            assert!(free.contains(&key.as_str()), "{key}");
        }
        assert_eq!(
            config.window_plan(1).window_samples(),
            TrainConfig::default().window_plan(1).window_samples()
        );
        // With a mean over micro-batches their cut is part of the loss.
        let micro = TrainConfig {
            loss_reduction: LossReduction::Micro,
            ..TrainConfig::default()
        };
        let model = Qwen3VlConfig::published("8b").unwrap();
        let form = StepForm::choose(&micro, &model, 368, (2, None), 40.0, None).unwrap();
        assert_eq!(form.row_tokens, 0);
        let line = form.explain(40.0, 368);
        assert!(
            line.contains("40.0 GiB") && line.contains("micro"),
            "{line}"
        );
        // A continued run keeps its rows: they decide the dropout masks.
        let rows = Some(736);
        let config = TrainConfig::default();
        let again = StepForm::choose(&config, &model, 368, (2, None), 80.0, rows).unwrap();
        assert_eq!((again.row_tokens, again.kept), (736, Recorded::Everything));
    }
}
