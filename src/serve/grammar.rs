//! JSON that follows a schema: which tokens may come next, by `llguidance`.

use std::sync::Arc;

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};

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
        let Value::Object(mut schema) = schema else {
            return Err("a schema is an object".into());
        };
        // Free white space invites a model that was not trained on JSON to write nothing else.
        schema.insert("x-guidance".into(), json!({"whitespace_flexible": false}));
        let grammar = TopLevelGrammar::from_json_schema(schema.into());
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Writes with the likeliest allowed token, liking `wish` in turn.
    fn write(schema: Value, wish: &str) -> String {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny");
        let tokenizer = Tokenizer::from_folder(folder).unwrap();
        let vocab = tokenizer.vocab_size();
        let factory = GrammarFactory::new(&tokenizer, vocab + 5).unwrap();
        let mut constraint = factory.json(schema, false).unwrap();
        let wishes = tokenizer.encode_plain(wish).unwrap();
        let mut tokens = Vec::new();
        for step in 0..200 {
            let mut logits: Vec<f32> = (0..vocab + 5).map(|id| -(id as f32) / 1e4).collect();
            if let Some(id) = wishes.get(step) {
                logits[*id as usize] = 10.0;
            }
            constraint.mask(&mut logits).unwrap();
            assert!(
                logits[vocab..].iter().all(|logit| logit.is_infinite()),
                "a token beyond the vocabulary is allowed"
            );
            let token = crate::generate::sampler::argmax(&logits);
            if token != tokenizer.special().im_end {
                tokens.push(token);
            }
            if constraint.accept(token).unwrap() {
                return tokenizer.decode(&tokens, true).unwrap();
            }
        }
        panic!("no end: {}", tokenizer.decode(&tokens, true).unwrap());
    }

    #[test]
    fn what_is_written_follows_the_schema_whatever_the_model_likes() {
        let schema = json!({
            "type": "object",
            "properties": {"side": {"enum": ["左侧", "右侧"]}, "n": {"type": "integer", "minimum": 2, "maximum": 4}},
            "required": ["side", "n"],
            "additionalProperties": false,
        });
        for wish in [
            "",
            "{\"side\":\"右侧\",\"n\":3}",
            "心影正常。双肺清晰。",
            "\n\n\n\n\n",
        ] {
            let text = write(schema.clone(), wish);
            let value: Value = serde_json::from_str(&text).unwrap();
            assert!(
                ["左侧", "右侧"].contains(&value["side"].as_str().unwrap()),
                "{text}"
            );
            assert!((2..=4).contains(&value["n"].as_i64().unwrap()), "{text}");
        }
        assert!(write(schema, "{\"side\":\"右侧\",\"n\":3}").contains("右侧"));
    }

    #[test]
    fn a_schema_that_cannot_be_followed_is_refused() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny");
        let tokenizer = Tokenizer::from_folder(folder).unwrap();
        let factory = GrammarFactory::new(&tokenizer, tokenizer.vocab_size()).unwrap();
        for bad in [
            json!({"type": "nothing"}),
            json!({"type": "string", "pattern": "("}),
            json!([1]),
            json!({"$ref": "#/nowhere"}),
            json!({"type": "integer", "minimum": 5, "maximum": 4}),
        ] {
            assert!(factory.json(bad.clone(), false).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_schema_as_deep_as_a_body_can_be_does_not_end_the_process() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny");
        let tokenizer = Tokenizer::from_folder(folder).unwrap();
        let factory = GrammarFactory::new(&tokenizer, tokenizer.vocab_size()).unwrap();
        for (open, close) in [
            ("{\"not\":", "}"),
            ("{\"items\":", "}"),
            ("{\"anyOf\":[{\"type\":\"null\"},", "]}"),
            ("{\"properties\":{\"a\":", "}}"),
        ] {
            let depth = 60;
            let text = format!("{}{{}}{}", open.repeat(depth), close.repeat(depth));
            let schema: Value = serde_json::from_str(&text).unwrap();
            // Taken or refused: either is an answer.
            if let Err(reason) = factory.json(schema, false) {
                assert!(!reason.is_empty());
            }
        }
    }
}
