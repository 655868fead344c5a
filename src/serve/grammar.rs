//! Answers of a given form, JSON of a schema among them: which tokens may come next, by `llguidance`.

use std::sync::Arc;

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};

use super::{engine::TokenConstraint, schema::close_objects, types::AnswerForm};
use crate::processor::tokenizer::Tokenizer;

/// Longest schema, in bytes of JSON; as much for an expression or a list of choices.
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

    /// A constraint to `form`; `after_thinking` lets everything pass up to the end of the reasoning.
    ///
    /// # Errors
    /// What is wrong with the form.
    pub fn constraint(
        &self,
        form: &AnswerForm,
        after_thinking: bool,
    ) -> Result<Box<dyn TokenConstraint>, String> {
        let matcher = self.matcher(grammar(form)?)?;
        Ok(Box::new(FormConstraint {
            matcher,
            eos: self.eos,
            think_end: after_thinking.then_some(self.think_end),
        }))
    }

    fn matcher(&self, grammar: TopLevelGrammar) -> Result<Matcher, String> {
        let mut matcher = Matcher::new(self.parsers.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            return Err(in_words(&error));
        }
        // The first mask shows whether anything can be written at all.
        let mask = matcher.compute_mask();
        mask.map_err(|error| in_words(&error.to_string()))?;
        Ok(matcher)
    }
}

fn grammar(form: &AnswerForm) -> Result<TopLevelGrammar, String> {
    let check = |what: &str, bytes: usize| match bytes > LONGEST_SCHEMA {
        true => Err(format!("{what} has more than {LONGEST_SCHEMA} bytes")),
        false => Ok(()),
    };
    match form {
        AnswerForm::Json(schema) => {
            check("the schema", schema.to_string().len())?;
            let Value::Object(schema) = schema else {
                return Err("a schema is an object".into());
            };
            let mut schema = schema.clone();
            close_objects(&mut schema);
            // Free white space invites a model that was not trained on JSON to write nothing else.
            schema.insert("x-guidance".into(), json!({"whitespace_flexible": false}));
            Ok(TopLevelGrammar::from_json_schema(schema.into()))
        }
        AnswerForm::Regex(regex) => {
            check("the expression", regex.len())?;
            // The whole answer is matched in any case.
            let inner = regex.strip_prefix('^').unwrap_or(regex);
            let inner = match inner.strip_suffix('$') {
                Some(before) if !before.ends_with('\\') => before,
                _ => inner,
            };
            if inner.is_empty() {
                return Err("the expression is empty".into());
            }
            Ok(TopLevelGrammar::from_regex(inner))
        }
        AnswerForm::Choice(texts) => {
            check("the list", texts.iter().map(String::len).sum())?;
            if texts.is_empty() || texts.iter().any(String::is_empty) {
                return Err("expected at least one text, and none that is empty".into());
            }
            let texts: Vec<String> = texts.iter().map(|text| json!(text).to_string()).collect();
            let grammar = format!("start: {}", texts.join(" | "));
            Ok(TopLevelGrammar::from_lark(grammar))
        }
    }
}

/// The parser's reason in a sentence, without its internal state.
fn in_words(error: &str) -> String {
    if error.contains("oneOf constraints are not supported") {
        return "the alternatives of a `oneOf` may hold at once; make them exclude each other, \
                or use `anyOf`"
            .into();
    }
    let first = error.lines().next().unwrap_or_default().trim();
    let inside = [
        "<state>", "Bias", "Token", "Lexer", "lexer", "grammar", "⟦", "::",
    ];
    if first.is_empty()
        || inside.iter().any(|word| error.contains(word)) && !speaks_of_schema(first)
    {
        log::info!("a form that cannot be followed: {first}");
        return "no answer of an end can be written by it, or it is too large".into();
    }
    // A regular expression is shown with a mark under it, and the reason in the last line.
    let why = error
        .lines()
        .find_map(|line| line.trim().strip_prefix("error: "))
        .filter(|_| first.ends_with(':'));
    let whole = match why {
        Some(why) => format!("{first} {why}"),
        None => first.to_owned(),
    };
    let mut text: String = whole.chars().take(200).collect();
    if text.starts_with(|letter: char| letter.is_ascii_uppercase()) {
        text[..1].make_ascii_lowercase();
    }
    text
}

/// Whether a reason is about the words of a schema.
fn speaks_of_schema(reason: &str) -> bool {
    [
        "Unimplemented",
        "Unsatisfiable",
        "Invalid type",
        "must be",
        "Expected",
        "format",
        "regex",
    ]
    .iter()
    .any(|word| reason.contains(word))
}

struct FormConstraint {
    matcher: Matcher,
    eos: u32,
    /// The token that ends the reasoning, while it has not come.
    think_end: Option<u32>,
}

impl TokenConstraint for FormConstraint {
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

    fn is_free(&self) -> bool {
        self.think_end.is_some()
    }
}

/// A constraint on single tokens, with or without a form beside it.
pub struct TokenRules {
    /// None of these before `min_new_tokens`.
    pub end_tokens: Vec<u32>,
    /// Fewest tokens of the answer.
    pub min_new_tokens: usize,
    /// The only tokens there are besides the end tokens, if not all.
    pub allowed: Option<Vec<u32>>,
    /// Form of the answer.
    pub form: Option<Box<dyn TokenConstraint>>,
    /// Tokens of the answer so far.
    pub written: usize,
}

impl TokenConstraint for TokenRules {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        if let Some(form) = &mut self.form {
            form.mask(logits)?;
        }
        if let Some(allowed) = &self.allowed {
            let mut kept = vec![f32::NEG_INFINITY; logits.len()];
            for id in allowed.iter().chain(&self.end_tokens) {
                if let Some(logit) = logits.get(*id as usize) {
                    kept[*id as usize] = *logit;
                }
            }
            logits.copy_from_slice(&kept);
        }
        if self.written < self.min_new_tokens {
            let before = self.form.is_some().then(|| logits.to_vec());
            for id in &self.end_tokens {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            // A form that is complete cannot be made longer.
            if let Some(before) = before
                && logits.iter().all(|logit| *logit == f32::NEG_INFINITY)
            {
                logits.copy_from_slice(&before);
            }
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<bool, String> {
        self.written += 1;
        match &mut self.form {
            Some(form) => form.accept(token),
            None => Ok(false),
        }
    }

    fn is_free(&self) -> bool {
        self.written >= self.min_new_tokens
            && self.allowed.is_none()
            && self.form.as_ref().is_none_or(|form| form.is_free())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn factory() -> (Tokenizer, GrammarFactory) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny");
        let tokenizer = Tokenizer::from_folder(folder).unwrap();
        let factory = GrammarFactory::new(&tokenizer, tokenizer.vocab_size() + 5).unwrap();
        (tokenizer, factory)
    }

    fn refusal(factory: &GrammarFactory, form: AnswerForm) -> String {
        match factory.constraint(&form, false) {
            Err(reason) => reason,
            Ok(_) => panic!("{form:?} is taken"),
        }
    }

    /// Writes with the likeliest allowed token, liking `wish` in turn.
    fn write(schema: Value, wish: &str) -> String {
        write_form(&AnswerForm::Json(schema), wish)
    }

    fn write_form(form: &AnswerForm, wish: &str) -> String {
        let (tokenizer, factory) = factory();
        let vocab = tokenizer.vocab_size();
        let mut constraint = factory.constraint(form, false).unwrap();
        assert!(!constraint.is_free());
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
            let token = crate::runtime::generate::sampler::argmax(&logits);
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
    fn an_object_that_names_its_properties_has_no_others() {
        let schema = json!({
            "type": "object",
            "properties": {"normal": {"type": "boolean"}, "side": {"enum": ["左", "右"]}},
            "required": ["normal", "side"],
        });
        let wish = "{\"normal\":true,\"side\":\"左\",\"更多\":\"心影有增大。\"}";
        assert_eq!(
            write(schema.clone(), wish),
            "{\"normal\":true,\"side\":\"左\"}"
        );
        let mut open = schema;
        open["additionalProperties"] = true.into();
        assert!(write(open, wish).contains("更多"));
    }

    #[test]
    fn an_expression_and_a_choice_are_followed() {
        let regex = AnswerForm::Regex("^(左|右)侧[0-9]{2}$".into());
        assert_eq!(write_form(&regex, "右侧12 more"), "右侧12");
        let choice = AnswerForm::Choice(vec!["正常".into(), "异常 \"x\"\n".into()]);
        assert_eq!(write_form(&choice, "异常"), "异常 \"x\"\n");
    }

    #[test]
    fn no_reason_shows_the_insides_of_the_parser() {
        let (_, factory) = factory();
        for (schema, says) in [
            (json!({"$ref": "#"}), "no answer"),
            (
                json!({"oneOf": [{"type": "integer"}, {"minimum": 1}]}),
                "`oneOf`",
            ),
            (json!({"type": "nothing"}), "nothing"),
            (json!({"type": "string", "pattern": "("}), ""),
            (json!([1]), "a schema is an object"),
            (json!({"$ref": "#/nowhere"}), "nowhere"),
            (json!({"type": "integer", "minimum": 5, "maximum": 4}), ""),
            (json!({"type": "array", "uniqueItems": true}), "uniqueItems"),
            (json!({"not": {"type": "string"}}), "not"),
        ] {
            let reason = refusal(&factory, AnswerForm::Json(schema.clone()));
            println!("{schema}: {reason}");
            assert!(reason.contains(says), "{schema}: {reason}");
            for inside in ["<state>", "Bias", "coerce", "⟦", "\n"] {
                assert!(!reason.contains(inside), "{schema}: {reason}");
            }
        }
        for regex in ["(", "", "^$", "(?=a)b"] {
            let reason = refusal(&factory, AnswerForm::Regex(regex.into()));
            println!("{regex}: {reason}");
            assert!(!reason.is_empty() && !reason.contains('\n'), "{reason}");
            assert!(!reason.contains("build"), "{reason}");
        }
        refusal(&factory, AnswerForm::Choice(Vec::new()));
    }

    #[test]
    fn no_end_token_comes_before_the_fewest_tokens() {
        let mut rules = TokenRules {
            end_tokens: vec![1],
            min_new_tokens: 2,
            allowed: Some(vec![0, 3]),
            form: None,
            written: 0,
        };
        let masked = |rules: &mut TokenRules| {
            let mut logits = [0.5; 4];
            rules.mask(&mut logits).unwrap();
            rules.accept(0).unwrap();
            logits.map(|logit| logit == 0.5)
        };
        assert_eq!(masked(&mut rules), [true, false, false, true]);
        assert!(!rules.is_free());
        assert_eq!(masked(&mut rules), [true, false, false, true]);
        assert_eq!(masked(&mut rules), [true, true, false, true]);
    }

    #[test]
    fn a_schema_as_deep_as_a_body_can_be_does_not_end_the_process() {
        let (_, factory) = factory();
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
            if let Err(reason) = factory.constraint(&AnswerForm::Json(schema), false) {
                assert!(!reason.is_empty());
            }
        }
    }
}
