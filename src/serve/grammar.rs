//! JSON that follows a schema: which tokens may come next, by `llguidance`.

use std::sync::Arc;

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::Value;

use super::engine::TokenConstraint;
use crate::processor::tokenizer::Tokenizer;

/// Longest schema, in bytes of JSON.
const LONGEST_SCHEMA: usize = 64 << 10;

/// Makes constraints for one tokenizer.
pub struct GrammarFactory {
    parsers: ParserFactory,
    eos: u32,
    think_end: u32,
}

impl GrammarFactory {
    /// Reads the bytes of every token; `vocab_size` is the model's number of logits.
    ///
    /// # Errors
    /// A reason, when the vocabulary cannot be used.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize) -> Result<Self, String> {
        let special = tokenizer.special();
        let words: Vec<Vec<u8>> = (0..vocab_size as u32)
            .map(|id| {
                let bytes = tokenizer.bytes_of(id, true);
                if bytes.is_empty() || id == special.think_start || id == special.think_end {
                    // Never to be matched by text.
                    let mut marked = vec![TokTrie::SPECIAL_TOKEN_MARKER];
                    marked.extend(format!("<[{id}]>").into_bytes());
                    marked
                } else {
                    bytes
                }
            })
            .collect();
        let info = TokRxInfo::new(vocab_size as u32, special.im_end);
        let trie = TokTrie::from(&info, &words);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut parsers = ParserFactory::new(&env, InferenceCapabilities::default(), &[])
            .map_err(|error| error.to_string())?;
        parsers.quiet();
        Ok(Self {
            parsers,
            eos: special.im_end,
            think_end: special.think_end,
        })
    }

    /// A constraint to the JSON of `schema`; `after_thinking` lets everything pass up to the end of
    /// the reasoning.
    ///
    /// # Errors
    /// What is wrong with the schema.
    pub fn json(
        &self,
        schema: Value,
        after_thinking: bool,
    ) -> Result<Box<dyn TokenConstraint>, String> {
        if schema.to_string().len() > LONGEST_SCHEMA {
            return Err(format!("the schema has more than {LONGEST_SCHEMA} bytes"));
        }
        let grammar = TopLevelGrammar::from_json_schema(schema);
        let mut matcher = Matcher::new(self.parsers.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            return Err(error);
        }
        // The first mask shows whether anything can be written at all.
        matcher.compute_mask().map_err(|error| error.to_string())?;
        Ok(Box::new(JsonConstraint {
            matcher,
            eos: self.eos,
            think_end: after_thinking.then_some(self.think_end),
        }))
    }
}

struct JsonConstraint {
    matcher: Matcher,
    eos: u32,
    /// The token that ends the reasoning, while it has not come.
    think_end: Option<u32>,
}

impl TokenConstraint for JsonConstraint {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        if self.think_end.is_some() {
            return Ok(());
        }
        let mask = self
            .matcher
            .compute_mask_or_eos()
            .map_err(|error| error.to_string())?;
        let mut allowed = 0;
        for (id, logit) in logits.iter_mut().enumerate() {
            if id < mask.len() && mask.is_allowed(id as u32) {
                allowed += 1;
            } else {
                *logit = f32::NEG_INFINITY;
            }
        }
        if allowed == 0 {
            return Err("no token is allowed".into());
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<bool, String> {
        if let Some(end) = self.think_end {
            if token == end {
                self.think_end = None;
            }
            return Ok(false);
        }
        if token == self.eos {
            return Ok(true);
        }
        self.matcher
            .consume_token(token)
            .map_err(|error| error.to_string())?;
        Ok(self.matcher.is_stopped())
    }
}
