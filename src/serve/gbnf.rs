//! GBNF, the grammars of llama.cpp and of vLLM's `guided_grammar`, to Lark's form.
//!
//! Source: `grammars/README.md`, llama.cpp.

use std::{collections::BTreeMap, fmt::Write, iter::Peekable, str::Chars};

use serde_json::json;

/// Deepest nesting of parentheses.
const MAX_DEPTH: usize = 64;

struct Reader<'a> {
    letters: Peekable<Chars<'a>>,
    line: usize,
    depth: usize,
    /// Names of rules, in the order in which they are met, by their names here.
    rules: BTreeMap<String, String>,
}

fn is_name(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || letter == '-' || letter == '_'
}

impl Reader<'_> {
    fn wrong<T>(&self, what: &str) -> Result<T, String> {
        Err(format!("line {} {what}", self.line))
    }

    fn next(&mut self) -> Option<char> {
        let letter = self.letters.next();
        if letter == Some('\n') {
            self.line += 1;
        }
        letter
    }

    fn next_is(&mut self, wanted: char) -> bool {
        let found = self.letters.peek() == Some(&wanted);
        if found {
            self.next();
        }
        found
    }

    /// Passes over blanks and comments, and over ends of lines too if `lines`.
    fn skip(&mut self, lines: bool) {
        while let Some(&letter) = self.letters.peek() {
            match letter {
                ' ' | '\t' | '\r' => {
                    self.next();
                }
                '\n' if lines => {
                    self.next();
                }
                '#' => {
                    while self.letters.peek().is_some_and(|letter| *letter != '\n') {
                        self.next();
                    }
                }
                _ => return,
            }
        }
    }

    fn name(&mut self) -> Result<String, String> {
        let mut name = String::new();
        while let Some(letter) = self.letters.next_if(|letter| is_name(*letter)) {
            name.push(letter);
        }
        match name.is_empty() {
            true => self.wrong("has something else than a rule's name where one is expected"),
            false => Ok(name),
        }
    }

    /// Lark's name of a rule.
    fn rule(&mut self, name: String) -> String {
        if name == "root" {
            return "start".into();
        }
        let next = format!("r{}", self.rules.len());
        self.rules.entry(name).or_insert(next).clone()
    }

    /// One letter of a text or a class; escapes are read.
    fn letter(&mut self) -> Result<char, String> {
        let Some(letter) = self.next() else {
            return self.wrong("ends in the middle of a text or class");
        };
        if letter != '\\' {
            return Ok(letter);
        }
        let escape = self.next();
        let digits = match escape {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(other) => return Ok(other),
            None => return self.wrong("ends in the middle of a text or class"),
        };
        let mut code = 0;
        for _ in 0..digits {
            match self.next().and_then(|letter| letter.to_digit(16)) {
                Some(digit) => code = code * 16 + digit,
                None => return self.wrong("has an escape of too few digits"),
            }
        }
        char::from_u32(code).map_or_else(|| self.wrong("has an escape that is no letter"), Ok)
    }

    /// A text after its quote.
    fn text(&mut self) -> Result<String, String> {
        let mut text = String::new();
        while !self.next_is('"') {
            text.push(self.letter()?);
        }
        Ok(json!(text).to_string())
    }

    /// A class after its bracket, as an expression.
    fn class(&mut self) -> Result<String, String> {
        let mut class = String::from("/[");
        if self.next_is('^') {
            class.push('^');
        }
        let mut empty = true;
        while !self.next_is(']') {
            let first = self.letter()?;
            let mut last = first;
            if self.next_is('-') {
                if self.letters.peek() == Some(&']') {
                    let _ = write!(class, r"\x{{2d}}");
                } else {
                    last = self.letter()?;
                }
            }
            if last < first {
                return self.wrong("has a range that ends before its beginning");
            }
            let _ = write!(class, r"\x{{{:x}}}-\x{{{:x}}}", first as u32, last as u32);
            empty = false;
        }
        if empty {
            return self.wrong("has an empty class");
        }
        class.push_str("]/");
        Ok(class)
    }

    /// Alternatives, up to the end of the rule or the group.
    fn alternatives(&mut self) -> Result<String, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return self.wrong("nests too deep");
        }
        let mut out = String::new();
        loop {
            let lines = self.depth > 1;
            self.skip(lines);
            let Some(&letter) = self.letters.peek() else {
                break;
            };
            let piece = match letter {
                '|' => {
                    self.next();
                    self.skip(true);
                    out.push_str(" |");
                    continue;
                }
                ')' | '\n' => break,
                '"' => {
                    self.next();
                    self.text()?
                }
                '[' => {
                    self.next();
                    self.class()?
                }
                '.' => {
                    self.next();
                    r"/[\x{0}-\x{10ffff}]/".into()
                }
                '(' => {
                    self.next();
                    let inner = self.alternatives()?;
                    if !self.next_is(')') {
                        return self.wrong("has a group without its end");
                    }
                    format!("({inner} )")
                }
                _ if is_name(letter) => {
                    let name = self.name()?;
                    self.rule(name)
                }
                _ => return self.wrong(&format!("has `{letter}` where none is expected")),
            };
            // An empty text is nothing, which Lark does not write.
            let piece = if piece == "\"\"" {
                "(\"\")".into()
            } else {
                piece
            };
            out.push(' ');
            out.push_str(&piece);
            out.push_str(&self.repetition()?);
        }
        self.depth -= 1;
        Ok(out)
    }

    fn repetition(&mut self) -> Result<String, String> {
        for operator in ['*', '+', '?'] {
            if self.next_is(operator) {
                return Ok(operator.into());
            }
        }
        if !self.next_is('{') {
            return Ok(String::new());
        }
        let mut range = String::from("{");
        loop {
            match self.next() {
                Some('}') => break,
                Some(' ') => {}
                Some(letter) if letter.is_ascii_digit() || letter == ',' => range.push(letter),
                _ => return self.wrong("has a repetition that is not of the form {m,n}"),
            }
        }
        range.push('}');
        Ok(range)
    }
}

/// The same grammar in Lark's form.
///
/// # Errors
/// What is wrong, by line.
pub(super) fn to_lark(text: &str) -> Result<String, String> {
    let mut reader = Reader {
        letters: text.chars().peekable(),
        line: 1,
        depth: 0,
        rules: BTreeMap::new(),
    };
    let mut lark = String::new();
    let mut defined = Vec::new();
    loop {
        reader.skip(true);
        if reader.letters.peek().is_none() {
            break;
        }
        let name = reader.name()?;
        reader.skip(false);
        if !"::=".chars().all(|letter| reader.next_is(letter)) {
            return reader.wrong("has a rule without `::=`");
        }
        reader.skip(true);
        let rule = reader.rule(name.clone());
        if defined.contains(&rule) {
            return reader.wrong(&format!("defines the rule `{name}` again"));
        }
        let body = reader.alternatives()?;
        if !matches!(reader.letters.peek(), None | Some('\n')) {
            return reader.wrong("has `)` without a group");
        }
        lark.push_str(&format!("{rule}:{body}\n"));
        defined.push(rule);
    }
    if !defined.iter().any(|rule| rule == "start") {
        return Err("there is no rule `root`".into());
    }
    let missing = reader
        .rules
        .iter()
        .find(|(_, rule)| !defined.contains(rule));
    if let Some((name, _)) = missing {
        return Err(format!("there is no rule `{name}`"));
    }
    Ok(lark)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_texts_classes_and_repetitions_are_written_in_larks_form() {
        let lark = to_lark(
            "# an answer\nroot ::= side \"侧\\n\" (digit{2,3} | \"无\")? # more\nside ::= \"左\" |\n  \"右\"\ndigit ::= [0-9a]\n",
        )
        .unwrap();
        assert_eq!(
            lark,
            "start: r0 \"侧\\n\" ( r1{2,3} | \"无\" )?\nr0: \"左\" | \"右\"\nr1: /[\\x{30}-\\x{39}\\x{61}-\\x{61}]/\n"
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, says) in [
            ("a ::= \"x\"", "no rule `root`"),
            ("root ::= b", "no rule `b`"),
            ("root ::= \"x", "line 1 ends in the middle"),
            ("root ::= (\"x\"", "line 1 has a group without its end"),
            (
                "root ::= \"x\"\nroot ::= \"y\"",
                "defines the rule `root` again",
            ),
            ("root ::= []", "empty class"),
            ("root = \"x\"", "without `::=`"),
            ("root ::= \"x\")", "without a group"),
        ] {
            let error = to_lark(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!(to_lark(&format!("root ::= {}", "(".repeat(1000))).is_err());
    }
}
