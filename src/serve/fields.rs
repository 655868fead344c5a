//! The fields of a JSON object in a request: taken by name and kind, and none passed over.
//!
//! A field that is of another kind than expected, or that nobody takes, is refused by its name, in
//! words about JSON.

use std::{collections::BTreeSet, fmt};

use axum::http::StatusCode;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value, error::Category};

use super::error::ApiError;
use crate::base::files::nearest::nearest;

/// Most letters of a value that are repeated in a message.
const SHOWN: usize = 40;

/// What is done with a field that is known elsewhere and changes nothing here, or cannot be honoured.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rule {
    /// Any value: it does not bear on the answer.
    Harmless,
    /// Only these values, as JSON: with them the answer is the same as without the field.
    Only(&'static [&'static str]),
    /// Only these values; the text is what to do for another.
    Else(&'static [&'static str], &'static str),
    /// Never; the text is what to do instead, or empty.
    Refused(&'static str),
}

/// Fields with what is done with each.
pub(super) type Rules = &'static [(&'static str, Rule)];

/// A JSON object whose fields are taken one by one.
#[derive(Debug, Default)]
pub(super) struct Fields {
    map: Map<String, Value>,
    /// A name that came twice.
    repeated: Option<String>,
    /// What the object is called in messages: nothing, or `messages[0]`.
    path: String,
    /// Names that were taken, there or not.
    taken: BTreeSet<&'static str>,
}

/// A value as a message shows it.
fn shown(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        Value::String(text) if text.chars().count() > SHOWN => "a long text".into(),
        other => format!("`{other}`"),
    }
}

impl Fields {
    /// The fields of `value`, which is called `path`.
    ///
    /// # Errors
    /// [`ApiError`] of status 400, when it is no object.
    pub(super) fn of(value: Value, path: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self {
                map,
                path: path.to_owned(),
                ..Self::default()
            }),
            other => Err(wrong_kind(path, &other, "an object")),
        }
    }

    /// The whole name of a field.
    pub(super) fn name(&self, field: &str) -> String {
        match self.path.as_str() {
            "" => field.to_owned(),
            path => format!("{path}.{field}"),
        }
    }

    /// A value of any kind; `null` is as good as absent.
    pub(super) fn value(&mut self, field: &'static str) -> Option<Value> {
        self.taken.insert(field);
        self.map.remove(field).filter(|value| !value.is_null())
    }

    fn of_kind<T>(
        &mut self,
        field: &'static str,
        expected: &str,
        read: impl FnOnce(Value) -> Result<T, Value>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.value(field) else {
            return Ok(None);
        };
        read(value)
            .map(Some)
            .map_err(|value| wrong_kind(&self.name(field), &value, expected))
    }

    /// Whether a field is there and not `null`.
    pub(super) fn has(&self, field: &str) -> bool {
        self.map.get(field).is_some_and(|value| !value.is_null())
    }

    /// A value that is not taken by this; `null` is as good as absent.
    pub(super) fn peek(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// A number of things.
    pub(super) fn count(&mut self, field: &'static str) -> Result<Option<usize>, ApiError> {
        let expected = "a whole number of 0 or more";
        self.of_kind(field, expected, |value| count_of(&value).ok_or(value))
    }

    /// A whole number with a sign.
    pub(super) fn integer(&mut self, field: &'static str) -> Result<Option<i64>, ApiError> {
        self.of_kind(field, "a whole number of at most 64 bits", |value| {
            integer_of(&value).ok_or(value)
        })
    }

    /// A number.
    pub(super) fn number(&mut self, field: &'static str) -> Result<Option<f32>, ApiError> {
        self.of_kind(field, "a number", |value| {
            value.as_f64().map(|number| number as f32).ok_or(value)
        })
    }

    /// Yes or no.
    pub(super) fn flag(&mut self, field: &'static str) -> Result<Option<bool>, ApiError> {
        self.of_kind(field, "`true` or `false`", |value| {
            value.as_bool().ok_or(value)
        })
    }

    /// A text.
    pub(super) fn text(&mut self, field: &'static str) -> Result<Option<String>, ApiError> {
        self.of_kind(field, "a text", |value| match value {
            Value::String(text) => Ok(text),
            other => Err(other),
        })
    }

    /// A list of anything.
    pub(super) fn list(&mut self, field: &'static str) -> Result<Option<Vec<Value>>, ApiError> {
        self.of_kind(field, "a list", |value| match value {
            Value::Array(list) => Ok(list),
            other => Err(other),
        })
    }

    /// A list of texts.
    pub(super) fn texts(&mut self, field: &'static str) -> Result<Option<Vec<String>>, ApiError> {
        self.of_kind(field, "a list of texts", texts_of)
    }

    /// A list of token ids.
    pub(super) fn ids(&mut self, field: &'static str) -> Result<Option<Vec<u32>>, ApiError> {
        self.of_kind(field, "a list of token ids", |value| {
            let ids = value.as_array().and_then(|list| {
                let id = |value| u32::try_from(count_of(value)?).ok();
                list.iter().map(id).collect::<Option<Vec<u32>>>()
            });
            ids.ok_or(value)
        })
    }

    /// An object.
    pub(super) fn object(&mut self, field: &'static str) -> Result<Option<Fields>, ApiError> {
        let path = self.name(field);
        self.value(field)
            .map(|value| Fields::of(value, &path))
            .transpose()
    }

    /// A field that has to be there.
    pub(super) fn needed<T>(&self, field: &str, found: Option<T>) -> Result<T, ApiError> {
        let name = self.name(field);
        found.ok_or_else(|| ApiError::invalid(&name, format!("`{name}` is missing")))
    }

    /// Checks the fields that were not taken: `rules` has what is done with known ones, and any other is
    /// unknown. With `ignored`, those that would be refused are named there instead.
    ///
    /// # Errors
    /// [`ApiError`] of status 400 that names the field, and one that is spelt alike.
    pub(super) fn finish(
        self,
        rules: Rules,
        ignored: Option<&mut Vec<String>>,
    ) -> Result<(), ApiError> {
        self.finish_all(&[rules], ignored)
    }

    /// [`Self::finish`] by several tables of rules, the first that has a name.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub(super) fn finish_all(
        self,
        tables: &[Rules],
        mut ignored: Option<&mut Vec<String>>,
    ) -> Result<(), ApiError> {
        let rules = || tables.iter().flat_map(|rules| rules.iter());
        #[cfg(test)]
        known::record(&self.path, &self.taken, rules().map(|(name, _)| *name));
        if let Some(name) = &self.repeated {
            let name = self.name(name);
            let name = short(&name);
            return Err(ApiError::invalid(
                &name,
                format!("`{name}` is there more than once"),
            ));
        }
        for (field, value) in &self.map {
            let rule = rules().find(|(name, _)| name == field);
            let name = short(&self.name(field));
            let message = match rule {
                Some(_) if value.is_null() => continue,
                Some((_, Rule::Harmless)) => continue,
                Some((_, Rule::Only(values) | Rule::Else(values, _))) if allows(values, value) => {
                    continue;
                }
                Some((_, Rule::Only(values))) => {
                    let values: Vec<String> = values.iter().map(|one| format!("`{one}`")).collect();
                    format!(
                        "`{name}` is {}; this server takes {} only",
                        shown(value),
                        values.join(" or ")
                    )
                }
                Some((_, Rule::Else(_, cure))) => {
                    format!("`{name}` is {}; {cure}", shown(value))
                }
                Some((_, Rule::Refused(""))) => format!("`{name}` is not supported"),
                Some((_, Rule::Refused(cure))) => format!("`{name}` is not supported; {cure}"),
                None => match self.nearest(field, rules().map(|(name, _)| *name)) {
                    Some(near) => format!("there is no field `{name}`; did you mean `{near}`?"),
                    None => format!("there is no field `{name}`"),
                },
            };
            match &mut ignored {
                Some(ignored) => ignored.push(name),
                None => return Err(ApiError::invalid(name, message)),
            }
        }
        Ok(())
    }

    /// The known name that this one is likely a misspelling of.
    fn nearest(
        &self,
        field: &str,
        in_rules: impl Iterator<Item = &'static str>,
    ) -> Option<&'static str> {
        nearest(&short(field), self.taken.iter().copied().chain(in_rules))
    }
}

fn allows(values: &[&str], value: &Value) -> bool {
    let mut parsed = values.iter().filter_map(|one| parse(one));
    parsed.any(|one| same(&one, value))
}

fn parse(json: &str) -> Option<Value> {
    serde_json::from_str(json).ok()
}

/// Whether two values are equal; 1 and 1.0 are.
fn same(one: &Value, other: &Value) -> bool {
    one == other || one.as_f64().is_some_and(|one| Some(one) == other.as_f64())
}

/// Enough of a name to recognise it.
fn short(name: &str) -> String {
    name.chars().take(100).collect()
}

fn integer_of(value: &Value) -> Option<i64> {
    // 4.0 is a whole number in JSON.
    let whole = |number: f64| (number.fract() == 0.0 && number.abs() < 9e15).then_some(number);
    value
        .as_i64()
        .or_else(|| value.as_f64().and_then(whole).map(|number| number as i64))
}

fn count_of(value: &Value) -> Option<usize> {
    integer_of(value).and_then(|number| usize::try_from(number).ok())
}

/// The texts of a list.
///
/// # Errors
/// The value itself, when it is something else.
pub(super) fn texts_of(value: Value) -> Result<Vec<String>, Value> {
    let texts = value.as_array().and_then(|list| {
        let text = |value: &Value| value.as_str().map(ToOwned::to_owned);
        list.iter().map(text).collect::<Option<Vec<String>>>()
    });
    texts.ok_or(value)
}

/// A value of another kind than expected.
pub(super) fn wrong_kind(name: &str, found: &Value, expected: &str) -> ApiError {
    let found = shown(found);
    ApiError::invalid(name, format!("`{name}` is {found}, expected {expected}"))
}

/// Reads the body of a request.
///
/// # Errors
/// [`ApiError`] of status 400: not JSON, or no object.
pub(super) fn parse_body(bytes: &[u8]) -> Result<Fields, ApiError> {
    serde_json::from_slice(bytes).map_err(|error| {
        let reason = match error.classify() {
            Category::Eof => "its JSON ends in the middle of a value".to_owned(),
            // The only type that is required here is the object itself.
            Category::Data => "expected a JSON object".to_owned(),
            _ => {
                let (line, column) = (error.line(), error.column());
                format!("line {line}, column {column} is no valid JSON")
            }
        };
        let message = format!("the body is not a request: {reason}");
        ApiError::new(StatusCode::BAD_REQUEST, message)
    })
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Fields::default();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if fields.map.insert(name.clone(), value).is_some() {
                        fields.repeated = Some(name);
                    }
                }
                Ok(fields)
            }
        }

        deserializer.deserialize_map(Object)
    }
}

/// Which names the objects of a request have, as reading one shows it: for a comparison with the document.
#[cfg(test)]
pub(super) mod known {
    use std::{cell::RefCell, collections::BTreeMap};

    use super::BTreeSet;

    /// Names of one object.
    #[derive(Debug, Default)]
    pub(in crate::serve) struct Names {
        pub(in crate::serve) taken: BTreeSet<&'static str>,
        pub(in crate::serve) in_rules: BTreeSet<&'static str>,
    }

    thread_local! {
        static NAMES: RefCell<BTreeMap<String, Names>> = RefCell::default();
    }

    pub(super) fn record(
        path: &str,
        taken: &BTreeSet<&'static str>,
        in_rules: impl Iterator<Item = &'static str>,
    ) {
        // `messages[0]` is one of `messages[]`.
        let path = path.replace(|letter: char| letter.is_ascii_digit(), "");
        NAMES.with_borrow_mut(|all| {
            let names = all.entry(path).or_default();
            names.taken.extend(taken);
            names.in_rules.extend(in_rules);
        });
    }

    /// Names of all objects that this thread has read since the last call, by path.
    pub(in crate::serve) fn take() -> BTreeMap<String, Names> {
        NAMES.take()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const RULES: Rules = &[
        ("user", Rule::Harmless),
        ("best_of", Rule::Only(&["1"])),
        ("tools", Rule::Refused("this server writes text only")),
    ];

    fn fields(value: Value) -> Fields {
        parse_body(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn an_unknown_field_is_refused_by_its_name_and_the_nearest_is_suggested() {
        let finish = |value: Value| {
            let mut fields = fields(value);
            let _ = fields.number("temperature");
            fields.finish(RULES, None)
        };
        assert!(finish(json!({"user": "x", "best_of": 1.0, "tools": null})).is_ok());
        for (body, param, says) in [
            (
                json!({"typo_temperatur": 1}),
                "typo_temperatur",
                "there is no field",
            ),
            (
                json!({"temperatur": 1}),
                "temperatur",
                "did you mean `temperature`?",
            ),
            (
                json!({"best_of": 2}),
                "best_of",
                "`best_of` is `2`; this server takes `1` only",
            ),
            (
                json!({"tools": []}),
                "tools",
                "not supported; this server writes text only",
            ),
            (json!({"TEMPERATURE": null}), "TEMPERATURE", "did you mean"),
        ] {
            let error = finish(body).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param));
            assert!(error.message.contains(says), "{}", error.message);
        }
    }

    #[test]
    fn what_is_ignored_is_named() {
        let mut ignored = Vec::new();
        fields(json!({"x": 1, "tools": [1], "user": "u"}))
            .finish(RULES, Some(&mut ignored))
            .unwrap();
        ignored.sort();
        assert_eq!(ignored, ["tools", "x"]);
    }

    #[test]
    fn a_body_that_is_no_object_of_single_fields_is_refused() {
        for (body, says) in [
            ("[\"tiny\",[[\"user\",\"hi\"]],5]", "expected a JSON object"),
            ("5", "expected a JSON object"),
            ("{\"a\": ", "ends in the middle"),
            ("{\"a\": 1,}", "line 1, column 9"),
        ] {
            let error = parse_body(body.as_bytes()).unwrap_err();
            assert!(error.message.contains(says), "{}", error.message);
        }
        let twice = parse_body(b"{\"user\": 1, \"user\": 2}").unwrap();
        let error = twice.finish(RULES, None).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("user"));
        assert!(error.message.contains("more than once"));
    }

    #[test]
    fn a_value_of_another_kind_is_described_in_words_of_json() {
        let mut body = fields(
            json!({"n": -1, "k": 1.5, "t": "warm", "s": [1], "ids": [1, -2], "o": 1, "ok": 4.0}),
        );
        let messages = [
            body.count("n").unwrap_err().message,
            body.integer("k").unwrap_err().message,
            body.number("t").unwrap_err().message,
            body.text("s").unwrap_err().message,
            body.ids("ids").unwrap_err().message,
            body.object("o").unwrap_err().message,
        ];
        assert_eq!(
            messages,
            [
                "`n` is `-1`, expected a whole number of 0 or more",
                "`k` is `1.5`, expected a whole number of at most 64 bits",
                "`t` is `\"warm\"`, expected a number",
                "`s` is a list, expected a text",
                "`ids` is a list, expected a list of token ids",
                "`o` is `1`, expected an object",
            ]
        );
        assert_eq!(body.count("ok").unwrap(), Some(4));
    }
}
