//! The language of a set of reports: it decides what a word is.

use std::{fmt, sync::LazyLock};

use regex::Regex;
use serde::Serialize;

use super::segment::constant_regex;

/// A language whose words are known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TextLanguage {
    /// Words are those of jieba.
    #[default]
    Chinese,
    /// Words are in lower case, without signs: what COCO's tokenizer makes of a caption.
    English,
}

/// Latin letters that one Chinese character outweighs.
const LETTERS_A_CHARACTER: usize = 10;

/// A word with its inner hyphens, points and strokes; `'s` is a word of its own.
static ENGLISH_WORD: LazyLock<Regex> = LazyLock::new(|| {
    constant_regex(r"[\p{L}\p{N}]+(?:[-./_][\p{L}\p{N}]+)*%?|['’](?:s|re|ve|ll|d|m)\b")
});

impl TextLanguage {
    /// English where nearly all letters are Latin; Chinese reports hold Latin abbreviations, and a character says as much as
    /// many letters.
    pub fn guess<'t>(texts: impl IntoIterator<Item = &'t str>) -> Self {
        let (mut latin, mut other) = (0_usize, 0_usize);
        for c in texts.into_iter().flat_map(str::chars) {
            if c.is_ascii_alphabetic() {
                latin += 1;
            } else if c.is_alphabetic() {
                other += LETTERS_A_CHARACTER;
            }
        }
        if latin > other {
            Self::English
        } else {
            Self::Chinese
        }
    }

    /// The name as it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chinese => "chinese",
            Self::English => "english",
        }
    }
}

impl fmt::Display for TextLanguage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The English words of `text`, as they are written, without signs.
///
/// Near to the Stanford tokenizer of the COCO caption metrics, without the signs that those take out; compare the words
/// in lower case.
#[must_use]
pub fn english_words(text: &str) -> Vec<&str> {
    ENGLISH_WORD
        .find_iter(text)
        .map(|word| word.as_str())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn english_words_are_whole() {
        assert_eq!(
            english_words("A right-sided 1.5 cm nodule (the patient's), and/or x-ray."),
            [
                "A",
                "right-sided",
                "1.5",
                "cm",
                "nodule",
                "the",
                "patient",
                "'s",
                "and/or",
                "x-ray"
            ]
        );
        assert!(english_words(" .,;()").is_empty());
    }

    #[test]
    fn letters_decide() {
        assert_eq!(TextLanguage::guess(["No effusion."]), TextLanguage::English);
        assert_eq!(
            TextLanguage::guess(["CT：COPD，PICC在位。"]),
            TextLanguage::Chinese
        );
        assert_eq!(TextLanguage::guess([]), TextLanguage::Chinese);
        assert_eq!(
            TextLanguage::guess(["", "未见异常。"]),
            TextLanguage::Chinese
        );
    }
}
