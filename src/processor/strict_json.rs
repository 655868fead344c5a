//! JSON in which no object has a key twice, with errors in plain words.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// A value whose objects have each key once: of two, one would be lost.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(Strict(entry)) = from.next_element()? {
            entries.push(entry);
        }
        Ok(Value::Array(entries))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = from.next_key::<String>()? {
            if fields.contains_key(&key) {
                let words = format!("the key `{key}` is given twice in one object");
                return Err(A::Error::custom(words));
            }
            let Strict(value) = from.next_value()?;
            fields.insert(key, value);
        }
        Ok(Value::Object(fields))
    }
}

/// Reads a line or a whole text; the error is a reason in plain words, with the column.
pub(crate) fn parse(text: &str) -> Result<Value, String> {
    match serde_json::from_str(text) {
        Ok(Strict(value)) => Ok(value),
        Err(error) => Err(reason(&error)),
    }
}

/// Reads all values of a text, with white space between them.
pub(crate) fn parse_all(text: &str) -> Result<Vec<Value>, String> {
    let values = serde_json::Deserializer::from_str(text).into_iter::<Strict>();
    let values = values.map(|value| value.map(|Strict(value)| value));
    values
        .collect::<Result<_, _>>()
        .map_err(|error| reason(&error))
}

/// What a parser of JSON says; a line of a file is always line 1 to it.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let words = match text.rfind(" at line ") {
        Some(end) => &text[..end],
        None => &text,
    };
    let words = words.replace("EOF while parsing", "the line ends inside");
    match error.line() {
        0 | 1 => format!("{words} (column {})", error.column()),
        line => format!("{words} (line {line}, column {})", error.column()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_twice_is_an_error_wherever_it_is() {
        let value = parse(r#"{"a":[1,-2,0.5,{"b":null,"c":true}],"d":"x"}"#).unwrap();
        assert_eq!(
            value.to_string(),
            r#"{"a":[1,-2,0.5,{"b":null,"c":true}],"d":"x"}"#
        );
        for (line, word) in [
            (r#"{"a":1,"a":2}"#, "the key `a` is given twice"),
            (r#"{"m":[{"a":1,"a":2}]}"#, "the key `a` is given twice"),
            ("{\"a\":", "the line ends inside"),
            ("{\"a\":1,}", "trailing comma (column 8)"),
            ("// x", "expected value (column 1)"),
        ] {
            let reason = parse(line).unwrap_err();
            assert!(reason.contains(word), "{reason}");
            assert!(!reason.contains(" line 1"), "{reason}");
        }
    }
}
