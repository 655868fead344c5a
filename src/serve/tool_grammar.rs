//! Which calls of functions an answer may have, as rules of a grammar: Hermes' form.

use llguidance::api::TopLevelGrammar;
use serde_json::{Map, Value, json};

use super::{
    form_parser::{FormError, FormParser, check_size},
    schema::close_objects,
    types::{AnswerRemark, Tool, ToolChoice, ToolUse},
};
use crate::processor::tools::{CALL_CLOSE, CALL_OPEN};

/// Most calls of functions in an answer.
const MAX_CALLS: usize = 16;

/// Longest schemas of all functions together, in bytes of JSON.
const LONGEST_SCHEMAS: usize = 256 << 10;

/// Calls that cannot be followed.
pub(super) fn of_tools(reason: String) -> FormError {
    FormError {
        param: "tools".into(),
        reason: format!("calls of these `tools` cannot be followed: {reason}"),
    }
}

/// Rules of what follows the opening of the first call; `None` where no function can be called.
pub(super) fn calls(
    parser: &FormParser,
    tools: &ToolUse,
    remarks: &mut Vec<AnswerRemark>,
) -> Result<Option<String>, FormError> {
    let callable = tools.callable();
    if callable.is_empty() {
        return Ok(None);
    }
    let mut rules = String::new();
    let mut names = Vec::with_capacity(callable.len());
    for (index, tool) in callable {
        let schema = arguments(parser, index, tool, remarks)?;
        let head = format!("\n{{\"name\": {}, \"arguments\": ", json!(tool.name));
        rules.push_str(&format!(
            "tool{index}: {} arguments{index}\narguments{index}: %json {schema}\n",
            json!(head)
        ));
        names.push(format!("tool{index}"));
    }
    if rules.len() > LONGEST_SCHEMAS {
        return Err(of_tools(format!(
            "their schemas have more than {LONGEST_SCHEMAS} bytes together"
        )));
    }
    let close = json!(format!("}}\n{CALL_CLOSE}"));
    let next = json!(format!("\n{CALL_OPEN}"));
    // A function that is named is called once, as OpenAI does it.
    let may_repeat = tools.parallel && !matches!(tools.choice, ToolChoice::Named(_));
    let more = match may_repeat {
        true => format!(" ({next} call){{0,{}}}", MAX_CALLS - 1),
        false => String::new(),
    };
    Ok(Some(format!(
        "calls: call{more}\ncall: ({}) {close}\n{rules}",
        names.join(" | ")
    )))
}

/// The schema of a function's arguments. One that cannot be followed is an error where the function is
/// strict, and else any object with a remark.
fn arguments(
    parser: &FormParser,
    index: usize,
    tool: &Tool,
    remarks: &mut Vec<AnswerRemark>,
) -> Result<Value, FormError> {
    let mut object = match &tool.parameters {
        Some(Value::Object(schema)) => schema.clone(),
        _ => Map::new(),
    };
    object.entry("type").or_insert("object".into());
    if tool.parameters.is_none() {
        object.insert("properties".into(), json!({}));
    }
    let closed = close_objects(&mut object);
    // As calls were written in the model's training.
    let separators = json!({
        "whitespace_flexible": false,
        "item_separator": ", ",
        "key_separator": ": ",
    });
    object.insert("x-guidance".into(), separators.clone());
    let schema = Value::from(object);
    let checked = check_size("the schema", schema.to_string().len())
        .and_then(|()| parser.matcher(TopLevelGrammar::from_json_schema(schema.clone())));
    match checked {
        Ok(_) => {
            if closed && tool.parameters.is_some() {
                remarks.push(AnswerRemark::closed(&format!(
                    "arguments of `{}`",
                    tool.name
                )));
            }
            Ok(schema)
        }
        Err(reason) if tool.strict => Err(FormError {
            param: format!("tools[{index}].function.parameters"),
            reason: format!(
                "the arguments of `{}` cannot be followed: {reason}",
                tool.name
            ),
        }),
        Err(reason) => {
            remarks.push(AnswerRemark {
                code: "schema_not_followed",
                text: format!(
                    "the arguments of `{}` are a JSON object, and may differ from its schema: {reason}",
                    tool.name
                ),
            });
            Ok(json!({"type": "object", "x-guidance": separators}))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            grammar::tests::{factory, write_by},
            types::AnswerForm,
        },
        *,
    };

    fn tools(choice: ToolChoice, parallel: bool) -> ToolUse {
        let report = json!({"type": "object", "properties": {"side": {"enum": ["左", "右"]}}, "required": ["side"]});
        let tool = |name: &str, parameters: Option<Value>| Tool {
            name: name.into(),
            description: None,
            parameters,
            strict: false,
        };
        ToolUse {
            tools: vec![tool("report", Some(report)), tool("look", None)],
            choice,
            allowed: None,
            parallel,
        }
    }

    #[test]
    fn a_forced_call_is_written_in_the_form_of_the_models_training() {
        let (_, factory) = factory();
        let named = tools(ToolChoice::Named("report".into()), true);
        let constraint = factory.constraint(None, &named, false).unwrap();
        assert_eq!(constraint.remarks.len(), 1);
        let wish =
            "<tool_call>\n{\"name\": \"report\", \"arguments\": {\"side\": \"右\"}}\n</tool_call>";
        assert_eq!(write_by(&constraint, wish), wish);
        assert_eq!(
            write_by(&constraint, "心影正常。")
                .matches("<tool_call>")
                .count(),
            1
        );

        let required = tools(ToolChoice::Required, true);
        let constraint = factory.constraint(None, &required, false).unwrap();
        let look = "<tool_call>\n{\"name\": \"look\", \"arguments\": {}}\n</tool_call>";
        let both = format!("{look}\n{look}");
        assert!(write_by(&constraint, &both).starts_with(&both));
    }

    #[test]
    fn words_are_free_until_a_call_is_opened() {
        let (tokenizer, factory) = factory();
        let auto = tools(ToolChoice::Auto, false);
        let constraint = factory.constraint(None, &auto, false).unwrap();
        let mut answer = constraint.of_answer().unwrap();
        let open = tokenizer.token_to_id("<tool_call>").unwrap();
        for id in tokenizer.encode_plain("先查。").unwrap() {
            assert!(answer.is_free() && !answer.accept(id).unwrap());
        }
        answer.accept(open).unwrap();
        assert!(!answer.is_free());
        let mut logits = vec![0.0; tokenizer.vocab_size() + 5];
        answer.mask(&mut logits).unwrap();
        assert!(logits[open as usize].is_infinite());
        // The calls of another answer are its own.
        assert!(constraint.of_answer().unwrap().is_free());
        let none = ToolUse {
            choice: ToolChoice::None,
            ..auto
        };
        let free = factory.constraint(None, &none, false).unwrap();
        assert!(free.of_answer().is_none());
    }

    #[test]
    fn a_form_stands_beside_calls() {
        let (_, factory) = factory();
        let auto = tools(ToolChoice::Auto, false);
        for (form, text) in [
            (AnswerForm::Json(json!({"const": "无"})), "\"无\""),
            (AnswerForm::Regex("a/b[0-9]".into()), "a/b7"),
            (AnswerForm::Choice(vec!["正常".into()]), "正常"),
        ] {
            let constraint = factory.constraint(Some(&form), &auto, false).unwrap();
            assert_eq!(write_by(&constraint, text), text);
            let call = "<tool_call>\n{\"name\": \"look\", \"arguments\": {}}\n</tool_call>";
            assert_eq!(write_by(&constraint, call), call);
        }
        let grammar = AnswerForm::Grammar("start: \"a\"".into());
        assert!(factory.constraint(Some(&grammar), &auto, false).is_err());
    }

    #[test]
    fn arguments_that_cannot_be_followed_are_told_or_refused() {
        let (_, factory) = factory();
        let mut auto = tools(ToolChoice::Auto, false);
        auto.tools[0].parameters = Some(
            json!({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": true}}}),
        );
        let told = factory.constraint(None, &auto, false).unwrap();
        assert_eq!(told.remarks[0].code, "schema_not_followed");
        auto.tools[0].strict = true;
        let refused = factory.constraint(None, &auto, false);
        let error = refused.err().map(|error| error.param);
        assert_eq!(error.as_deref(), Some("tools[0].function.parameters"));
    }
}
