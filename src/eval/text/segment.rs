//! Text into tokens: characters, words, and the two ways in which Python splits at white space.

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::Regex;

use super::jieba;

/// Ranges of characters that sacrebleu sets apart.
///
/// `2001–2A6D` and `2F81–2FA1` are no misprint: upstream writes five-digit escapes as `\u20000`,
/// which Python reads as a four-digit escape and a `0`, so this is what it truly compares with.
const SACREBLEU_CHINESE: [(char, char); 22] = [
    ('\u{3400}', '\u{4db5}'),
    ('\u{4e00}', '\u{9fa5}'),
    ('\u{9fa6}', '\u{9fbb}'),
    ('\u{f900}', '\u{fa2d}'),
    ('\u{fa30}', '\u{fa6a}'),
    ('\u{fa70}', '\u{fad9}'),
    ('\u{2001}', '\u{2a6d}'),
    ('\u{2f81}', '\u{2fa1}'),
    ('\u{ff00}', '\u{ffef}'),
    ('\u{2e80}', '\u{2eff}'),
    ('\u{3000}', '\u{303f}'),
    ('\u{31c0}', '\u{31ef}'),
    ('\u{2f00}', '\u{2fdf}'),
    ('\u{2ff0}', '\u{2fff}'),
    ('\u{3100}', '\u{312f}'),
    ('\u{31a0}', '\u{31bf}'),
    ('\u{fe10}', '\u{fe1f}'),
    ('\u{fe30}', '\u{fe4f}'),
    ('\u{2600}', '\u{26ff}'),
    ('\u{2700}', '\u{27bf}'),
    ('\u{3200}', '\u{32ff}'),
    ('\u{3300}', '\u{33ff}'),
];

/// The steps of sacrebleu's `TokenizerRegexp`, in order.
static SACREBLEU_STEPS: LazyLock<[(Regex, &str); 4]> = LazyLock::new(|| {
    [
        (constant_regex(r"([\{-~\[-` -\&\(-\+:-@/])"), " $1 "),
        (constant_regex(r"([^0-9])([.,])"), "$1 $2 "),
        (constant_regex(r"([.,])([^0-9])"), " $1 $2"),
        (constant_regex(r"([0-9])(-)"), "$1 $2 "),
    ]
});

/// A pattern written in this program.
#[expect(
    clippy::expect_used,
    reason = "the pattern is a constant, and a test runs each"
)]
pub(super) fn constant_regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant pattern compiles")
}

/// Whether Python's `str.isspace` and `str.split` take `c` for white space: four control characters
/// more than Rust.
pub(super) fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The parts of `text` between white space, as Python's `str.split()`.
pub(super) fn python_split(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_python_space).filter(|part| !part.is_empty())
}

/// Every character of `text` but white space; sacrebleu's tokenization `char`.
#[must_use]
pub fn characters(text: &str) -> Vec<&str> {
    text.char_indices()
        .filter(|&(_, c)| !is_python_space(c))
        .map(|(at, c)| &text[at..at + c.len_utf8()])
        .collect()
}

/// The words of `text` as [`jieba::cut`] finds them, without those of white space.
#[must_use]
pub fn words(text: &str) -> Vec<&str> {
    CutText::new(text).words()
}

/// A text with its words, cut once for the metrics that share them.
#[derive(Debug, Clone)]
pub struct CutText<'a> {
    /// The text as it is.
    pub text: &'a str,
    /// Everything [`jieba::cut`] finds in it, white space too.
    pub tokens: Vec<&'a str>,
}

impl<'a> CutText<'a> {
    /// Cuts `text`.
    #[must_use]
    pub fn new(text: &'a str) -> Self {
        Self {
            text,
            tokens: jieba::cut(text),
        }
    }

    /// The tokens that are not white space.
    #[must_use]
    pub fn words(&self) -> Vec<&'a str> {
        self.tokens
            .iter()
            .copied()
            .filter(|word| !word.chars().all(is_python_space))
            .collect()
    }
}

/// sacrebleu's tokenization `zh`: tokens separated by a space, Chinese characters and signs alone,
/// Latin by rules.
///
/// Source: `TokenizerZh` and `TokenizerRegexp`, sacrebleu 2.6.0.
#[must_use]
pub fn sacrebleu_zh(text: &str) -> String {
    let mut line = String::with_capacity(text.len() * 2);
    for c in text.trim_matches(is_python_space).chars() {
        if SACREBLEU_CHINESE
            .iter()
            .any(|range| (range.0..=range.1).contains(&c))
        {
            line.extend([' ', c, ' ']);
        } else {
            line.push(c);
        }
    }
    for (pattern, replacement) in &*SACREBLEU_STEPS {
        line = pattern.replace_all(&line, *replacement).into_owned();
    }
    python_split(&line).collect::<Vec<_>>().join(" ")
}

/// Numbers for tokens, so that n-grams are compared and hashed as integers.
#[derive(Debug, Default)]
pub struct Vocabulary {
    numbers: HashMap<String, u32>,
    /// By number, the number of the same token in lower case.
    lower: Vec<u32>,
}

impl Vocabulary {
    /// The numbers of `tokens`, counting from 0; a token not seen before gets the next one.
    pub fn numbers(&mut self, tokens: &[&str]) -> Vec<u32> {
        tokens.iter().map(|token| self.number(token)).collect()
    }

    /// The numbers of the same tokens in lower case, for numbers of this vocabulary.
    ///
    /// # Panics
    /// If a number is not of this vocabulary.
    #[must_use]
    pub fn lowercase(&self, numbers: &[u32]) -> Vec<u32> {
        numbers
            .iter()
            .map(|&number| self.lower[number as usize])
            .collect()
    }

    /// How many tokens have a number.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lower.len()
    }

    /// Whether no token has a number.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lower.is_empty()
    }

    fn number(&mut self, token: &str) -> u32 {
        if let Some(&number) = self.numbers.get(token) {
            return number;
        }
        let number = self.lower.len() as u32;
        self.numbers.insert(token.to_owned(), number);
        self.lower.push(number);
        let lower = token.to_lowercase();
        if lower != token {
            self.lower[number as usize] = self.number(&lower);
        }
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_leave_out_white_space() {
        assert_eq!(characters(" 左\u{3000}肺\n2 "), ["左", "肺", "2"]);
        assert!(characters("\u{1c}").is_empty());
    }

    #[test]
    fn words_leave_out_white_space() {
        assert_eq!(words("双肺 纹理\n清晰"), ["双肺", "纹理", "清晰"]);
    }

    #[test]
    fn sacrebleu_keeps_decimals_and_latin_words_whole() {
        assert_eq!(sacrebleu_zh("约1.5cm，CT-A。"), "约 1.5cm ， CT-A 。");
        assert_eq!(sacrebleu_zh("3-5,a"), "3 - 5 , a");
        assert_eq!(sacrebleu_zh(" \n"), "");
    }

    #[test]
    fn a_vocabulary_knows_the_lower_case() {
        let mut vocabulary = Vocabulary::default();
        let numbers = vocabulary.numbers(&["CT", "肺", "ct", "CT"]);
        assert_eq!(numbers, [0, 2, 1, 0]);
        assert_eq!(vocabulary.lowercase(&numbers), [1, 2, 1, 1]);
        assert_eq!(vocabulary.len(), 3);
    }
}
