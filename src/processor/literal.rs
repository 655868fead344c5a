//! Values written as text in a cell of a table: JSON, or Python's literals as pandas writes lists and dicts.

use std::iter::Peekable;
use std::str::Chars;

use serde_json::{Map, Number, Value};

use super::strict_json;

/// Deepest nesting of lists and dicts.
const MAX_DEPTH: usize = 32;

/// The value of a text that is a list or an object in JSON or in Python; `None` for any other text.
pub(super) fn parse(text: &str) -> Option<Value> {
    let text = text.trim();
    let ends = text.chars().next().zip(text.chars().next_back());
    if !matches!(ends, Some(('[', ']') | ('{', '}') | ('(', ')'))) {
        return None;
    }
    if let Ok(value) = strict_json::parse(text) {
        return Some(value);
    }
    let mut reader = Reader {
        rest: text.chars().peekable(),
    };
    let value = reader.value(0)?;
    reader.blank();
    reader.rest.next().is_none().then_some(value)
}

struct Reader<'a> {
    rest: Peekable<Chars<'a>>,
}

impl Reader<'_> {
    fn blank(&mut self) {
        while self.rest.next_if(|c| c.is_whitespace()).is_some() {}
    }

    /// Whether the next character, blanks passed over, is `wanted`; it is taken.
    fn takes(&mut self, wanted: char) -> bool {
        self.blank();
        self.rest.next_if_eq(&wanted).is_some()
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.blank();
        match self.rest.peek()? {
            '[' => self.list(']', depth),
            '(' => self.list(')', depth),
            '{' => self.dict(depth),
            '\'' | '"' => self.text().map(Value::String),
            _ => self.word(),
        }
    }

    fn list(&mut self, end: char, depth: usize) -> Option<Value> {
        self.rest.next();
        let mut entries = Vec::new();
        loop {
            if self.takes(end) {
                return Some(Value::Array(entries));
            }
            entries.push(self.value(depth + 1)?);
            if self.takes(',') {
                continue;
            }
            if self.takes(end) {
                return Some(Value::Array(entries));
            }
            // NumPy writes no commas between texts.
            if !matches!(self.rest.peek(), Some('\'' | '"')) {
                return None;
            }
        }
    }

    fn dict(&mut self, depth: usize) -> Option<Value> {
        self.rest.next();
        let mut fields = Map::new();
        loop {
            if self.takes('}') {
                return Some(Value::Object(fields));
            }
            let Value::String(key) = self.value(depth + 1)? else {
                return None;
            };
            if !self.takes(':') || fields.contains_key(&key) {
                return None;
            }
            let value = self.value(depth + 1)?;
            fields.insert(key, value);
            if !self.takes(',') {
                return self.takes('}').then_some(Value::Object(fields));
            }
        }
    }

    fn text(&mut self) -> Option<String> {
        let quote = self.rest.next()?;
        let mut text = String::new();
        loop {
            match self.rest.next()? {
                '\\' => match self.rest.next()? {
                    'n' => text.push('\n'),
                    't' => text.push('\t'),
                    'r' => text.push('\r'),
                    'x' => text.push(self.code(2)?),
                    'u' => text.push(self.code(4)?),
                    'U' => text.push(self.code(8)?),
                    other @ ('\\' | '\'' | '"' | '/') => text.push(other),
                    _ => return None,
                },
                c if c == quote => return Some(text),
                c => text.push(c),
            }
        }
    }

    fn code(&mut self, digits: usize) -> Option<char> {
        let mut code = 0;
        for _ in 0..digits {
            code = code * 16 + self.rest.next()?.to_digit(16)?;
        }
        char::from_u32(code)
    }

    fn word(&mut self) -> Option<Value> {
        let mut word = String::new();
        while let Some(c) = self
            .rest
            .next_if(|c| c.is_ascii_alphanumeric() || "+-._".contains(*c))
        {
            word.push(c);
        }
        Some(match word.as_str() {
            "None" | "null" | "nan" => Value::Null,
            "True" | "true" => Value::Bool(true),
            "False" | "false" => Value::Bool(false),
            number => Value::Number(number.parse::<Number>().ok()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lists_of_json_and_of_python_are_read() {
        for (text, value) in [
            (r#"["a.png", 2]"#, json!(["a.png", 2])),
            (
                "['a.png', \"b's\", None, True, -1.5]",
                json!(["a.png", "b's", null, true, -1.5]),
            ),
            (
                "[{'role': 'user', 'content': '<image>问\\n'}, {'role': 'assistant', 'content': '答\\u3002'}]",
                json!([{"role": "user", "content": "<image>问\n"}, {"role": "assistant", "content": "答。"}]),
            ),
            ("('a', 'b',)", json!(["a", "b"])),
            ("['a' 'b']", json!(["a", "b"])),
            ("[]", json!([])),
            ("{}", json!({})),
        ] {
            assert_eq!(parse(text), Some(value), "{text}");
        }
        for text in [
            "a.png",
            "[a.png]",
            "['a'",
            "['a']]",
            "[1 2]",
            "{'a': 1, 'a': 2}",
            "",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
        let deep = "[".repeat(90) + &"]".repeat(90);
        assert!(parse(&deep).is_some(), "JSON allows 128");
        let deep = "(".repeat(90) + &")".repeat(90);
        assert_eq!(parse(&deep), None);
    }
}
