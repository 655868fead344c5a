//! The form of the answer, from whichever of the fields for it is set.

use serde_json::{Value, json};

use super::{
    Reader,
    rules::{SCHEMA_RULES, STRUCTURED_RULES},
};
use crate::serve::{error::ApiError, fields::Fields, types::AnswerForm};

fn any_object() -> AnswerForm {
    AnswerForm::Json(json!({"type": "object"}))
}

fn unknown_form(fields: &Fields, kind: &str) -> ApiError {
    let name = fields.name("type");
    let kind: String = kind.chars().take(40).collect();
    ApiError::invalid(
        &name,
        format!("`{name}` is `{kind}`, expected `text`, `json_object` or `json_schema`"),
    )
}

/// Names of vLLM's fields for a form.
struct Guided {
    schema: &'static str,
    any_object: &'static str,
    regex: &'static str,
    choice: &'static str,
    grammar: &'static str,
}

const OLDER: Guided = Guided {
    schema: "guided_json",
    any_object: "guided_json_object",
    regex: "guided_regex",
    choice: "guided_choice",
    grammar: "guided_grammar",
};

const NEWER: Guided = Guided {
    schema: "json",
    any_object: "json_object",
    regex: "regex",
    choice: "choice",
    grammar: "grammar",
};

impl Guided {
    fn take(&self, fields: &mut Fields, forms: &mut Vec<AnswerForm>) -> Result<(), ApiError> {
        match fields.value(self.schema) {
            None => {}
            // vLLM takes the schema as text, too.
            Some(Value::String(text)) => {
                let name = fields.name(self.schema);
                let schema = serde_json::from_str(&text).map_err(|_| {
                    ApiError::invalid(&name, format!("`{name}` is a text that is not JSON"))
                })?;
                forms.push(AnswerForm::Json(schema));
            }
            Some(value) => forms.push(AnswerForm::Json(value)),
        }
        if fields.flag(self.any_object)? == Some(true) {
            forms.push(any_object());
        }
        forms.extend(fields.text(self.regex)?.map(AnswerForm::Regex));
        forms.extend(fields.texts(self.choice)?.map(AnswerForm::Choice));
        forms.extend(fields.text(self.grammar)?.map(AnswerForm::Grammar));
        Ok(())
    }
}

impl Reader {
    /// The form of the answer.
    pub(super) fn form(&mut self, fields: &mut Fields) -> Result<Option<AnswerForm>, ApiError> {
        let mut forms = Vec::new();
        if let Some(mut format) = fields.object("response_format")? {
            let kind = format.text("type")?;
            let kind = format.needed("type", kind)?;
            match kind.as_str() {
                "text" => {}
                "json_object" => forms.push(any_object()),
                "json_schema" => {
                    let named = format.object("json_schema")?;
                    let mut named = format.needed("json_schema", named)?;
                    let schema = named.value("schema");
                    forms.push(AnswerForm::Json(named.needed("schema", schema)?));
                    self.finish(named, SCHEMA_RULES)?;
                }
                _ => return Err(unknown_form(&format, &kind)),
            }
            self.finish(format, &[])?;
        }
        OLDER.take(fields, &mut forms)?;
        if let Some(mut structured) = fields.object("structured_outputs")? {
            NEWER.take(&mut structured, &mut forms)?;
            self.finish(structured, STRUCTURED_RULES)?;
        }
        if forms.len() > 1 {
            return Err(ApiError::invalid(
                "response_format",
                "the request asks for several forms of the answer; expected one of \
                 `response_format`, `structured_outputs`, `guided_json`, `guided_regex`, `guided_choice` \
                 and `guided_grammar`",
            ));
        }
        Ok(forms.pop())
    }

    /// The form of the answer, of the field `text.format` of `/v1/responses`.
    pub(super) fn text_format(
        &mut self,
        mut format: Fields,
    ) -> Result<Option<AnswerForm>, ApiError> {
        let kind = format.text("type")?;
        let kind = format.needed("type", kind)?;
        let form = match kind.as_str() {
            "text" => None,
            "json_object" => Some(any_object()),
            "json_schema" => {
                let schema = format.value("schema");
                Some(AnswerForm::Json(format.needed("schema", schema)?))
            }
            _ => return Err(unknown_form(&format, &kind)),
        };
        self.finish(format, SCHEMA_RULES)?;
        Ok(form)
    }
}
