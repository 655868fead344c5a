//! A conversation as training takes it: token ids, and labels on the answers.
//!
//! The convention is ms-swift's (template backend `swift`): questions and answers are encoded
//! apart, so no token spans the boundary; an answer, its `<|im_end|>` and the newline after it
//! are targets in every turn, all else is [`IGNORE_INDEX`]. The chat template of the checkpoint is
//! not used: past reasoning stays, and an answer is learnt with the spaces it has. An answer that is
//! not learnt is encoded together with the questions around it. One deviation: of a last answer that
//! is not learnt, ms-swift still learns the `<|im_end|>`; here its end is no target either.
//!
//! Source: `_swift_encode` and `_encode_context_list`, ms-swift 4.6, `template/base.py`.

use super::chat::{ChatError, ImageGrid, Part, expand_image_pads, refuse_control_tokens};
use super::sample::{Conversation, Turn};
use super::tokenizer::Tokenizer;
pub use crate::batch::micro_batch::IGNORE_INDEX;

/// Why a conversation could not be encoded for training.
#[derive(Debug, thiserror::Error)]
pub enum SupervisedError {
    /// There is nothing to learn.
    #[error("turn {turn} has no answer; expected every question of a training sample answered")]
    NoAnswer {
        /// Place of the turn, from 0.
        turn: usize,
    },
    /// There is no question.
    #[error("the conversation holds no turn; expected a question and its answer")]
    NoTurns,
    /// The text or the images do not fit.
    #[error(transparent)]
    Chat(#[from] ChatError),
}

/// A training sample as token ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SupervisedIds {
    /// Ids of the whole conversation, image placeholders expanded.
    pub input_ids: Vec<u32>,
    /// For each place its own id if it is a target, else [`IGNORE_INDEX`]. Not shifted: the loss
    /// compares the logits of place `i` with the label of place `i + 1`.
    pub labels: Vec<i64>,
}

impl SupervisedIds {
    /// Number of targets.
    pub fn target_count(&self) -> usize {
        self.labels
            .iter()
            .filter(|&&label| label != IGNORE_INDEX)
            .count()
    }

    fn push(&mut self, ids: &[u32], is_target: bool) {
        self.input_ids.extend_from_slice(ids);
        self.labels.extend(ids.iter().map(|&id| {
            if is_target {
                i64::from(id)
            } else {
                IGNORE_INDEX
            }
        }));
    }
}

/// Encodes a conversation for training.
///
/// `grids` are the images' patch grids in the order of their places; `merge_size` is the vision
/// config's `spatial_merge_size`.
///
/// # Errors
/// [`SupervisedError`]: a turn without answer, no turn at all, a control token in the text, or
/// images that do not fit their places.
pub fn encode_supervised(
    tokenizer: &Tokenizer,
    conversation: &Conversation,
    grids: &[ImageGrid],
    merge_size: usize,
) -> Result<SupervisedIds, SupervisedError> {
    if let Some(turn) = conversation
        .turns
        .iter()
        .position(|turn| turn.answer.is_none())
    {
        return Err(SupervisedError::NoAnswer { turn });
    }
    encode(tokenizer, conversation, grids, merge_size)
}

/// Encodes what precedes the last answer, exactly as training saw it: the prompt of an
/// evaluation that must not depend on a chat template.
///
/// # Errors
/// [`SupervisedError`], as [`encode_supervised`]; only the last turn may lack its answer.
pub fn encode_prompt(
    tokenizer: &Tokenizer,
    conversation: &Conversation,
    grids: &[ImageGrid],
    merge_size: usize,
) -> Result<Vec<u32>, SupervisedError> {
    let mut prompt = conversation.clone();
    if let Some(last) = prompt.turns.last_mut() {
        last.answer = None;
    }
    Ok(encode(tokenizer, &prompt, grids, merge_size)?.input_ids)
}

fn encode(
    tokenizer: &Tokenizer,
    conversation: &Conversation,
    grids: &[ImageGrid],
    merge_size: usize,
) -> Result<SupervisedIds, SupervisedError> {
    let last = conversation
        .turns
        .len()
        .checked_sub(1)
        .ok_or(SupervisedError::NoTurns)?;
    refuse_control_tokens(tokenizer, &conversation.messages())?;
    let image_pad = tokenizer.special().image_pad;
    if conversation.image_count() != grids.len() {
        return Err(SupervisedError::Chat(ChatError::ImageCount {
            placeholders: conversation.image_count(),
            images: grids.len(),
        }));
    }
    let mut encoded = SupervisedIds::default();
    let mut grids_left = grids;
    // Text that is no target, up to the next answer that is.
    let mut prompt = String::new();
    let mut push_prompt = |prompt: &mut String, encoded: &mut SupervisedIds| {
        let ids = tokenizer
            .encode(&std::mem::take(prompt))
            .map_err(ChatError::from)?;
        let images = ids.iter().filter(|&&id| id == image_pad).count();
        let (own, rest) = grids_left.split_at(images.min(grids_left.len()));
        grids_left = rest;
        encoded.push(&expand_image_pads(&ids, image_pad, own, merge_size)?, false);
        Ok::<_, SupervisedError>(())
    };
    for (index, turn) in conversation.turns.iter().enumerate() {
        let system = conversation.system.as_deref().filter(|_| index == 0);
        push_question(&mut prompt, system, turn);
        match &turn.answer {
            Some(answer) if turn.learns => {
                push_prompt(&mut prompt, &mut encoded)?;
                let ids = tokenizer
                    .encode(&format!("{answer}<|im_end|>\n"))
                    .map_err(ChatError::from)?;
                encoded.push(&ids, true);
            }
            Some(answer) => {
                prompt.push_str(answer);
                prompt.push_str("<|im_end|>\n");
            }
            None if index == last => {}
            None => return Err(SupervisedError::NoAnswer { turn: index }),
        }
    }
    if !prompt.is_empty() {
        push_prompt(&mut prompt, &mut encoded)?;
    }
    Ok(encoded)
}

/// Writes what precedes the answer of a turn.
fn push_question(text: &mut String, system: Option<&str>, turn: &Turn) {
    // ms-swift takes an empty system message for none.
    if let Some(system) = system.filter(|words| !words.is_empty()) {
        text.push_str("<|im_start|>system\n");
        text.push_str(system);
        text.push_str("<|im_end|>\n");
    }
    text.push_str("<|im_start|>user\n");
    for part in &turn.question {
        text.push_str(match part {
            Part::Image => "<|vision_start|><|image_pad|><|vision_end|>",
            Part::Text { text } => text,
        });
    }
    text.push_str("<|im_end|>\n<|im_start|>assistant\n");
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::processor::sample::parse_line;

    fn encode(line: &str, tokenizer: &Tokenizer) -> SupervisedIds {
        let sample = parse_line(line, Path::new("x"), 1).unwrap();
        let grids = vec![[1, 4, 4]; sample.images.len()];
        encode_supervised(tokenizer, &sample.conversation, &grids, 2).unwrap()
    }

    #[test]
    fn only_answers_that_are_learnt_have_labels() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny");
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        let row = |first: &str, last: &str| {
            format!(
                r#"{{"messages":[{{"role":"user","content":"<image>这张胸片有什么？"}},
                {{"role":"assistant","content":"有实变。"{first}}},{{"role":"user","content":"哪侧？"}},
                {{"role":"assistant","content":"左侧。"{last}}}],"images":["a"]}}"#
            )
        };
        let plain = encode(&row("", ""), &tokenizer);
        for (first, last, targets) in [
            ("", "", "有实变。<|im_end|>\n左侧。<|im_end|>\n"),
            (r#","loss":false"#, r#","loss":true"#, "左侧。<|im_end|>\n"),
            (r#","loss_scale":0"#, "", "左侧。<|im_end|>\n"),
            ("", r#","loss":false"#, "有实变。<|im_end|>\n"),
            (
                r#","loss_scale":1"#,
                r#","loss":true"#,
                "有实变。<|im_end|>\n左侧。<|im_end|>\n",
            ),
        ] {
            let found = encode(&row(first, last), &tokenizer);
            assert_eq!(found.input_ids, plain.input_ids, "{first} {last}");
            let learnt = found.labels.iter().filter(|label| **label != IGNORE_INDEX);
            let learnt: Vec<u32> = learnt.map(|label| *label as u32).collect();
            assert_eq!(tokenizer.decode(&learnt, false).unwrap(), targets);
            // Each label is the token of its own place.
            for (label, id) in found.labels.iter().zip(&found.input_ids) {
                assert!(*label == IGNORE_INDEX || *label == i64::from(*id));
            }
        }
    }
}
