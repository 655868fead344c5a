//! Functions of a request, in the forms of chat requests and of `/v1/responses`.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Reader, rules::CALL_RULES};
use crate::serve::{
    error::ApiError,
    fields::{Fields, wrong_kind},
    types::{Tool, ToolCall, ToolChoice, ToolUse},
};

/// Most functions of a request.
const MAX_TOOLS: usize = 128;

/// Longest name of a function, as OpenAI has it.
const LONGEST_NAME: usize = 64;

/// How a request writes a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ToolForm {
    /// `{"type": "function", "function": {"name": …}}`
    Nested,
    /// `{"type": "function", "name": …}`
    Flat,
}

fn is_name(name: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    (1..=LONGEST_NAME).contains(&name.len()) && name.bytes().all(letter)
}

fn function_type(fields: &mut Fields) -> Result<(), ApiError> {
    let kind = fields.text("type")?;
    // Several clients leave it out.
    match kind.as_deref() {
        None | Some("function") => Ok(()),
        Some(kind) => {
            let name = fields.name("type");
            let kind: String = kind.chars().take(40).collect();
            Err(ApiError::invalid(
                &name,
                format!(
                    "`{name}` is `{kind}`, expected `function`; this server runs no tools of its own"
                ),
            ))
        }
    }
}

impl Reader {
    /// The functions and whether they are called.
    pub(super) fn tool_use(
        &mut self,
        fields: &mut Fields,
        form: ToolForm,
    ) -> Result<ToolUse, ApiError> {
        let mut tools = Vec::new();
        let mut names = BTreeSet::new();
        let list = fields.list("tools")?.unwrap_or_default();
        if list.len() > MAX_TOOLS {
            return Err(ApiError::invalid(
                "tools",
                format!(
                    "`tools` has {} entries, at most {MAX_TOOLS} are taken",
                    list.len()
                ),
            ));
        }
        for (index, tool) in list.into_iter().enumerate() {
            let path = format!("tools[{index}]");
            let tool = self.tool(tool, &path, form)?;
            if !names.insert(tool.name.clone()) {
                return Err(ApiError::invalid(
                    &path,
                    format!("`{path}` has the name `{}` of another", tool.name),
                ));
            }
            tools.push(tool);
        }
        let mut tool_use = ToolUse {
            tools,
            parallel: fields.flag("parallel_tool_calls")?.unwrap_or(true),
            ..ToolUse::default()
        };
        if let Some(choice) = fields.value("tool_choice") {
            self.tool_choice(choice, form, &mut tool_use)?;
        }
        let mut needed: Vec<&String> = tool_use.allowed.iter().flatten().collect();
        if let ToolChoice::Named(name) = &tool_use.choice {
            needed.push(name);
        }
        if let Some(name) = needed.into_iter().find(|name| !names.contains(*name)) {
            let name: String = name.chars().take(LONGEST_NAME).collect();
            return Err(ApiError::invalid(
                "tool_choice",
                format!("`tool_choice` names `{name}`, which is none of `tools`"),
            ));
        }
        if tool_use.is_forced() && tool_use.tools.is_empty() {
            return Err(ApiError::invalid(
                "tool_choice",
                "`tool_choice` asks for a call, and there are no `tools`",
            ));
        }
        Ok(tool_use)
    }

    fn tool(&mut self, value: Value, path: &str, form: ToolForm) -> Result<Tool, ApiError> {
        let mut outer = Fields::of(value, path)?;
        function_type(&mut outer)?;
        let tool = match form {
            ToolForm::Flat => self.function(outer)?,
            ToolForm::Nested => {
                let function = outer.object("function")?;
                let function = outer.needed("function", function)?;
                self.finish(outer, &[])?;
                self.function(function)?
            }
        };
        Ok(tool)
    }

    fn function(&mut self, mut fields: Fields) -> Result<Tool, ApiError> {
        let name = fields.text("name")?;
        let name = fields.needed("name", name)?;
        if !is_name(&name) {
            let path = fields.name("name");
            return Err(ApiError::invalid(
                &path,
                format!(
                    "`{path}` is no name of a function: expected 1 to {LONGEST_NAME} of the letters a-z, A-Z, 0-9, `_`, `-` and `.`"
                ),
            ));
        }
        let parameters = fields.value("parameters");
        if let Some(other) = parameters.as_ref().filter(|value| !value.is_object()) {
            return Err(wrong_kind(
                &fields.name("parameters"),
                other,
                "a JSON schema",
            ));
        }
        let tool = Tool {
            name,
            description: fields.text("description")?,
            parameters,
            strict: fields.flag("strict")?.unwrap_or(false),
        };
        self.finish(fields, &[])?;
        Ok(tool)
    }

    fn tool_choice(
        &mut self,
        value: Value,
        form: ToolForm,
        tool_use: &mut ToolUse,
    ) -> Result<(), ApiError> {
        let path = "tool_choice";
        let by_word = |word: &str| match word {
            "none" => Some(ToolChoice::None),
            "auto" => Some(ToolChoice::Auto),
            "required" | "any" => Some(ToolChoice::Required),
            _ => None,
        };
        let expected = "`none`, `auto`, `required`, or an object that names a function";
        if let Value::String(word) = &value {
            tool_use.choice = by_word(word).ok_or_else(|| wrong_kind(path, &value, expected))?;
            return Ok(());
        }
        if !value.is_object() {
            return Err(wrong_kind(path, &value, expected));
        }
        let mut fields = Fields::of(value, path)?;
        if fields.has("allowed_tools") || fields.has("tools") {
            let kind = fields.text("type")?;
            let (mut inner, outer) = match form {
                ToolForm::Flat => (fields, None),
                ToolForm::Nested => {
                    let inner = fields.object("allowed_tools")?;
                    (fields.needed("allowed_tools", inner)?, Some(fields))
                }
            };
            let mode = inner.text("mode")?.unwrap_or_else(|| "auto".into());
            tool_use.choice = by_word(&mode)
                .filter(|choice| matches!(choice, ToolChoice::Auto | ToolChoice::Required))
                .filter(|_| kind.as_deref().is_none_or(|kind| kind == "allowed_tools"))
                .ok_or_else(|| {
                    let name = inner.name("mode");
                    ApiError::invalid(&name, format!("`{name}` is neither `auto` nor `required`"))
                })?;
            let list = inner.list("tools")?;
            let mut names = Vec::new();
            for (index, tool) in inner.needed("tools", list)?.into_iter().enumerate() {
                let tool_path = format!("{}[{index}]", inner.name("tools"));
                names.push(self.named(Fields::of(tool, &tool_path)?, form)?);
            }
            tool_use.allowed = Some(names);
            self.finish(inner, &[])?;
            return outer.map_or(Ok(()), |outer| self.finish(outer, &[]));
        }
        tool_use.choice = ToolChoice::Named(self.named(fields, form)?);
        Ok(())
    }

    /// The name of `{"type": "function", "function": {"name": …}}`, or of the flat form.
    fn named(&mut self, mut fields: Fields, form: ToolForm) -> Result<String, ApiError> {
        function_type(&mut fields)?;
        match form {
            ToolForm::Flat => {
                let name = fields.text("name")?;
                let name = fields.needed("name", name)?;
                self.finish(fields, &[])?;
                Ok(name)
            }
            ToolForm::Nested => {
                let inner = fields.object("function")?;
                let mut inner = fields.needed("function", inner)?;
                let name = inner.text("name")?;
                let name = inner.needed("name", name)?;
                self.finish(inner, &[])?;
                self.finish(fields, &[])?;
                Ok(name)
            }
        }
    }

    /// One of `tool_calls` of an earlier answer, and its id.
    pub(super) fn call(
        &mut self,
        value: Value,
        path: &str,
    ) -> Result<(Option<String>, ToolCall), ApiError> {
        let mut fields = Fields::of(value, path)?;
        function_type(&mut fields)?;
        let id = fields.text("id")?;
        let function = fields.object("function")?;
        let mut function = fields.needed("function", function)?;
        let name = function.text("name")?;
        let call = ToolCall {
            name: function.needed("name", name)?,
            arguments: arguments(&mut function)?,
        };
        self.finish(function, &[])?;
        self.finish(fields, CALL_RULES)?;
        Ok((id, call))
    }
}

/// The arguments of a call: a text of JSON, or lately the object itself.
pub(super) fn arguments(fields: &mut Fields) -> Result<String, ApiError> {
    match fields.value("arguments") {
        None => Ok("{}".into()),
        Some(Value::String(text)) if text.trim().is_empty() => Ok("{}".into()),
        Some(Value::String(text)) => Ok(text),
        Some(object @ Value::Object(_)) => Ok(object.to_string()),
        Some(other) => Err(wrong_kind(
            &fields.name("arguments"),
            &other,
            "a text of JSON",
        )),
    }
}
