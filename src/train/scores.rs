//! Log-probabilities of the targets of a micro-batch, and what a loss makes of them.
//!
//! Cross-entropy weights all targets alike. Preferences and policy gradients need the log-probability of each
//! target first, and give the derivative of their loss by each of them: the gradient is that of the cross-entropy
//! with one weight a target, so one forward and one backward pass serve both, and the tape is kept in between.

use burn::prelude::*;

use super::loss::LOSS_ROWS;
use crate::{
    batch::micro_batch::MicroBatch,
    ops::plain::target_scores,
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig},
    runtime::{accelerator::Accelerator, vision::encode_images},
};

/// What the model says of each target of a micro-batch, in their order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenScores {
    /// Log-probability of the target, in nats.
    pub log_probabilities: Vec<f32>,
    /// Entropy of the distribution that it is drawn from, in nats.
    pub entropies: Vec<f32>,
    /// Number of targets that are the likeliest token.
    pub correct: f64,
}

/// The derivative of a loss by the log-probability of each target.
pub type LossDerivative<'a> = dyn Fn(&TokenScores) -> Vec<f32> + 'a;

/// How much each target counts in the loss.
#[derive(Clone, Copy)]
pub enum TargetWeights<'a> {
    /// The loss is the sum of the negative log likelihoods times this.
    Same(f64),
    /// The loss is any function of the log-probabilities.
    Each {
        /// Divides the logits, as in sampling.
        temperature: f64,
        /// Its derivative.
        derivative: &'a LossDerivative<'a>,
    },
}

/// Hidden states as the head takes them where logits are divided by `temperature`.
pub(super) fn divided<B: Backend>(hidden: Tensor<B, 2>, temperature: f64) -> Tensor<B, 2> {
    if temperature == 1.0 {
        hidden
    } else {
        hidden / temperature
    }
}

/// Scores targets, some rows of logits at a time; waits for the device.
///
/// `hidden` gives the hidden states of flat rows after the last norm, `[rows, hidden]`.
pub(super) fn score_targets<B: Accelerator>(
    model: &Qwen3Vl<B>,
    targets: &[(i32, i32)],
    temperature: f64,
    hidden: impl Fn(Tensor<B, 1, Int>) -> Tensor<B, 2>,
    device: &B::Device,
) -> TokenScores {
    let mut scores = TokenScores::default();
    for piece in targets.chunks(LOSS_ROWS) {
        let (rows, ids): (Vec<i32>, Vec<i32>) = piece.iter().copied().unzip();
        let rows = Tensor::<B, 1, Int>::from_ints(rows.as_slice(), device);
        let ids = Tensor::<B, 1, Int>::from_ints(ids.as_slice(), device);
        let logits = model.logits(divided(hidden(rows), temperature));
        let values: Vec<f32> = target_scores(logits, ids).into_data().iter().collect();
        let (logs, rest) = values.split_at(piece.len());
        let (entropies, correct) = rest.split_at(piece.len());
        scores.log_probabilities.extend_from_slice(logs);
        scores.entropies.extend_from_slice(entropies);
        scores.correct += correct.iter().map(|one| f64::from(*one)).sum::<f64>();
    }
    scores
}

/// Scores of all targets of a micro-batch without gradients: what `score` prints, and the reference of an objective.
pub fn token_scores<B: Accelerator>(
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    batch: &MicroBatch,
    temperature: f64,
    device: &B::Device,
) -> TokenScores {
    let targets = batch.targets_with_rows();
    if targets.is_empty() {
        return TokenScores::default();
    }
    let vision = (!batch.images.image_grid_thw.is_empty())
        .then(|| encode_images(model, &batch.images, config, device));
    let hidden = model.hidden_states(&batch.text, vision.as_ref(), config, None, None, device);
    let rows = |rows| hidden.clone().select(0, rows);
    score_targets(model, &targets, temperature, rows, device)
}
