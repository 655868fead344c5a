//! Answers of a given form, JSON of a schema among them: which tokens may come next, by `llguidance`.

use std::sync::Arc;

use llguidance::{
    Matcher,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};

use super::{
    engine::TokenConstraint,
    form_parser::{FormError, FormParser, check_size},
    gbnf::to_lark,
    schema::close_objects,
    token_rules::BadWords,
    tool_grammar::{calls, of_tools},
    types::{AnswerForm, AnswerRemark, ToolUse},
};
use crate::processor::{tokenizer::Tokenizer, tools::CALL_OPEN};

/// Makes constraints for one tokenizer.
pub struct GrammarFactory {
    parser: FormParser,
    env: TokEnv,
    eos: u32,
    think_end: u32,
    /// The token that opens a call, where the vocabulary has it.
    call_open: Option<u32>,
}

/// What an answer is held to.
pub struct Constraint {
    form: Option<FormConstraint>,
    /// What the client should know of it.
    pub remarks: Vec<AnswerRemark>,
}

impl Constraint {
    /// The constraint of one answer; `None` where everything is allowed.
    pub fn of_answer(&self) -> Option<Box<dyn TokenConstraint>> {
        let form = self.form.as_ref()?;
        Some(Box::new(form.fork()))
    }
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
        Ok(Self {
            parser: FormParser::new(&env)?,
            env,
            eos: special.im_end,
            think_end: special.think_end,
            call_open: tokenizer.token_to_id(CALL_OPEN),
        })
    }

    /// Tokens that would complete one of `texts`, none of which is empty.
    pub fn bad_words(&self, texts: &[String]) -> BadWords {
        BadWords::new(self.env.clone(), texts)
    }

    /// A constraint to `form` and to calls of the functions of `tools`; `after_thinking` lets everything
    /// pass up to the end of the reasoning.
    ///
    /// # Errors
    /// Which field cannot be followed, and why.
    pub fn constraint(
        &self,
        form: Option<&AnswerForm>,
        tools: &ToolUse,
        after_thinking: bool,
    ) -> Result<Constraint, FormError> {
        let mut remarks = Vec::new();
        let calls = calls(&self.parser, tools, &mut remarks)?;
        let of_form = |reason: String| {
            let what = match form {
                Some(AnswerForm::Regex(_)) => "the regular expression",
                Some(AnswerForm::Choice(_)) => "the list of choices",
                Some(AnswerForm::Grammar(_)) => "the grammar",
                Some(AnswerForm::Json(_)) | None => "the JSON schema",
            };
            FormError {
                param: "response_format".into(),
                reason: format!("{what} cannot be followed: {reason}"),
            }
        };
        let mut waits_for = Vec::new();
        waits_for.extend(after_thinking.then_some(self.think_end));
        let matcher = match (form, calls) {
            (None, None) => None,
            (Some(form), None) => {
                let grammar = grammar(form, &mut remarks).map_err(of_form)?;
                Some(self.parser.matcher(grammar).map_err(of_form)?)
            }
            (_, Some(calls)) if tools.is_forced() => {
                let start = format!("start: \"{CALL_OPEN}\" calls\n{calls}");
                let grammar = TopLevelGrammar::from_lark(start);
                Some(self.parser.matcher(grammar).map_err(of_tools)?)
            }
            (Some(form), Some(calls)) => {
                let answer = answer_rule(form, &mut remarks).map_err(of_form)?;
                let start = format!("start: answer | \"{CALL_OPEN}\" calls\n{answer}\n{calls}");
                let grammar = TopLevelGrammar::from_lark(start);
                Some(self.parser.matcher(grammar).map_err(of_form)?)
            }
            // Words until a call is opened. Without a token for that, whatever is written is read.
            (None, Some(calls)) => match self.call_open {
                None => None,
                Some(open) => {
                    waits_for.push(open);
                    let grammar = TopLevelGrammar::from_lark(format!("start: calls\n{calls}"));
                    Some(self.parser.matcher(grammar).map_err(of_tools)?)
                }
            },
        };
        let form = matcher.map(|matcher| FormConstraint {
            matcher,
            eos: self.eos,
            waits_for,
        });
        Ok(Constraint { form, remarks })
    }
}

/// A schema as the parser takes it.
fn closed_schema(schema: &Value, remarks: &mut Vec<AnswerRemark>) -> Result<Value, String> {
    check_size("the schema", schema.to_string().len())?;
    let Value::Object(schema) = schema else {
        return Err("a schema is an object".into());
    };
    let mut schema = schema.clone();
    if close_objects(&mut schema) {
        remarks.push(AnswerRemark::closed("answer"));
    }
    // Free white space invites a model that was not trained on JSON to write nothing else.
    schema.insert("x-guidance".into(), json!({"whitespace_flexible": false}));
    Ok(schema.into())
}

/// An expression without the anchors: the whole answer is matched in any case.
fn plain_regex(regex: &str) -> Result<&str, String> {
    check_size("the expression", regex.len())?;
    let inner = regex.strip_prefix('^').unwrap_or(regex);
    let inner = match inner.strip_suffix('$') {
        Some(before) if !before.ends_with('\\') => before,
        _ => inner,
    };
    match inner.is_empty() {
        true => Err("the expression is empty".into()),
        false => Ok(inner),
    }
}

fn alternatives(texts: &[String]) -> Result<String, String> {
    check_size("the list", texts.iter().map(String::len).sum())?;
    if texts.is_empty() || texts.iter().any(String::is_empty) {
        return Err("expected at least one text, and none that is empty".into());
    }
    let texts: Vec<String> = texts.iter().map(|text| json!(text).to_string()).collect();
    Ok(texts.join(" | "))
}

fn grammar(form: &AnswerForm, remarks: &mut Vec<AnswerRemark>) -> Result<TopLevelGrammar, String> {
    match form {
        AnswerForm::Json(schema) => {
            let schema = closed_schema(schema, remarks)?;
            Ok(TopLevelGrammar::from_json_schema(schema))
        }
        AnswerForm::Regex(regex) => Ok(TopLevelGrammar::from_regex(plain_regex(regex)?)),
        AnswerForm::Choice(texts) => {
            let start = format!("start: {}", alternatives(texts)?);
            Ok(TopLevelGrammar::from_lark(start))
        }
        AnswerForm::Grammar(text) => {
            check_size("the grammar", text.len())?;
            let lark = match text.contains("::=") {
                true => to_lark(text)?,
                false => text.clone(),
            };
            Ok(TopLevelGrammar::from_lark(lark))
        }
    }
}

/// The form as a rule of a grammar that has others.
fn answer_rule(form: &AnswerForm, remarks: &mut Vec<AnswerRemark>) -> Result<String, String> {
    match form {
        AnswerForm::Json(schema) => {
            let schema = closed_schema(schema, remarks)?;
            Ok(format!("answer: %json {schema}"))
        }
        AnswerForm::Regex(regex) => {
            let mut escaped = String::new();
            let mut after_backslash = false;
            for letter in plain_regex(regex)?.chars() {
                if letter == '/' && !after_backslash {
                    escaped.push('\\');
                }
                after_backslash = letter == '\\' && !after_backslash;
                escaped.push(letter);
            }
            Ok(format!("answer: /{escaped}/"))
        }
        AnswerForm::Choice(texts) => Ok(format!("answer: {}", alternatives(texts)?)),
        AnswerForm::Grammar(_) => Err(
            "it cannot stand beside `tools`; send `tool_choice` of `none`, or no grammar".into(),
        ),
    }
}

struct FormConstraint {
    matcher: Matcher,
    eos: u32,
    /// Tokens before whose last the answer is free, in order.
    waits_for: Vec<u32>,
}

impl FormConstraint {
    /// The same constraint for another answer.
    fn fork(&self) -> Self {
        Self {
            matcher: self.matcher.deep_clone(),
            eos: self.eos,
            waits_for: self.waits_for.clone(),
        }
    }
}

impl TokenConstraint for FormConstraint {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        if self.is_free() {
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
        if let Some(awaited) = self.waits_for.first() {
            if token == *awaited {
                self.waits_for.remove(0);
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
        !self.waits_for.is_empty()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use super::*;

    pub(in crate::serve) fn factory() -> (Tokenizer, GrammarFactory) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny");
        let tokenizer = Tokenizer::from_folder(folder).unwrap();
        let factory = GrammarFactory::new(&tokenizer, tokenizer.vocab_size() + 5).unwrap();
        (tokenizer, factory)
    }

    fn refusal(factory: &GrammarFactory, form: AnswerForm) -> String {
        match factory.constraint(Some(&form), &ToolUse::default(), false) {
            Err(error) => error.reason,
            Ok(_) => panic!("{form:?} is taken"),
        }
    }

    /// Writes with the likeliest allowed token, liking `wish` in turn.
    fn write(schema: Value, wish: &str) -> String {
        write_form(&AnswerForm::Json(schema), wish)
    }

    fn write_form(form: &AnswerForm, wish: &str) -> String {
        let (_, factory) = factory();
        let constraint = factory.constraint(Some(form), &ToolUse::default(), false);
        write_by(&constraint.unwrap(), wish)
    }

    pub(in crate::serve) fn write_by(constraint: &Constraint, wish: &str) -> String {
        let (tokenizer, _) = factory();
        let vocab = tokenizer.vocab_size();
        let mut constraint = constraint.of_answer().unwrap();
        let wishes = tokenizer.encode_plain(wish).unwrap();
        let mut tokens = Vec::new();
        for step in 0..2000 {
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
            let form = AnswerForm::Json(schema);
            if let Err(error) = factory.constraint(Some(&form), &ToolUse::default(), false) {
                assert!(!error.reason.is_empty());
            }
        }
    }
}
