//! How a table's language joins words: Chinese by default, or one that sets words apart by spaces.

use std::borrow::Cow;

use regex::Regex;
use serde::Deserialize;

use super::error::FindingsError;

/// `[syntax]` of a table.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TableSyntaxFile {
    /// Negations among the words of a finding.
    inner_negation: Vec<String>,
    /// Join the members of a list.
    list_words: Vec<String>,
    /// What a bare list holds beside its findings.
    list_fillers: Vec<String>,
    /// What may be between two members of a list.
    between: Vec<String>,
    /// Join two findings of which either may be there.
    alternatives: Vec<String>,
    /// After a finding they open a new thought, so that a cue after them is not about it.
    opens: Vec<String>,
    /// Limit a denial to the rest, or to what is new.
    rest: Vec<String>,
    /// End with a full stop that ends no sentence.
    abbreviations: Vec<String>,
    /// Begin a clause that only says where.
    places: Vec<String>,
}

/// The same, compiled, with the distances that fit the language, in characters.
pub(super) struct TableSyntax {
    /// Whole words in letters of any case; lists without a joining word; full stops end sentences.
    pub(super) words: bool,
    pub(super) inner_negation: Regex,
    /// At the start of a clause.
    pub(super) list_start: Regex,
    pub(super) list_word: Regex,
    /// The whole of what is left of a clause.
    pub(super) only_fillers: Regex,
    /// The whole text between two members of a list.
    pub(super) between: Regex,
    /// The whole text between two findings.
    pub(super) alternative: Regex,
    pub(super) opens: Regex,
    pub(super) rest: Regex,
    pub(super) abbreviation: Option<Regex>,
    pub(super) place: Regex,
    /// Most characters between the end of a finding and a cue after it.
    pub(super) after: usize,
    /// How far a question mark may be.
    pub(super) question: usize,
    /// Most characters before and after a finding where its degree may be.
    pub(super) degree: (usize, usize),
    /// How far apart two sides of one finding may be.
    pub(super) sides: usize,
    /// How long a clause that only says where may be.
    pub(super) place_length: usize,
}

const CHINESE_FILLERS: &str =
    "以及|或|及|和|与|、|，|。|的证据|的迹象|的存在|存在|大量|大面积|明显的|明显|局灶性|任何";

impl TableSyntax {
    /// # Errors
    /// [`FindingsError::Pattern`].
    pub(super) fn of(file: Option<&TableSyntaxFile>) -> Result<Self, FindingsError> {
        match file {
            Some(file) => Self::of_words(file),
            None => Self::chinese(),
        }
    }

    fn chinese() -> Result<Self, FindingsError> {
        let compile = |pattern: &str| Spelling::CHARACTERS.compile(pattern, "the Chinese words");
        Ok(Self {
            words: false,
            inner_negation: compile("没有|未|无|不[见大增扩肿肥]")?,
            list_start: compile("^[或及和、]")?,
            list_word: compile("[或及和、]")?,
            only_fillers: compile(&format!("^(?:{CHINESE_FILLERS})*$"))?,
            between: compile("^[、及和与]$")?,
            alternative: compile("^(?s:或.{0,2})$")?,
            opens: compile("由|代表|提示|表明|继发|因|伴|致|为|有|与|但")?,
            rest: compile("[余其新]")?,
            abbreviation: None,
            place: compile("^(?:以|位于|主要|[左右双两][侧上中下肺])")?,
            after: 16,
            question: 6,
            degree: (12, 8),
            sides: 8,
            place_length: 8,
        })
    }

    fn of_words(file: &TableSyntaxFile) -> Result<Self, FindingsError> {
        let spelling = Spelling::WORDS;
        let compile = |pattern: String| spelling.compile(&pattern, "`syntax`");
        let list = |words: &[String]| spelling.any(words);
        Ok(Self {
            words: true,
            inner_negation: compile(list(&file.inner_negation))?,
            list_start: compile(format!(r"^\W*{}", list(&file.list_words)))?,
            list_word: compile(list(&file.list_words))?,
            only_fillers: compile(format!(
                r"^(?:\W|{}|{})*$",
                list(&file.list_words),
                list(&file.list_fillers)
            ))?,
            between: compile(format!(
                r"^(?:\W|{}|{})*$",
                list(&file.list_words),
                list(&file.between)
            ))?,
            alternative: compile(format!(
                r"^\s*{}(?:\s+[0-9a-z_-]+){{0,2}}\s*$",
                list(&file.alternatives)
            ))?,
            opens: compile(list(&file.opens))?,
            rest: compile(list(&file.rest))?,
            abbreviation: Some(compile(format!(r"{}$", list(&file.abbreviations)))?),
            place: compile(format!(r"^\s*{}", list(&file.places)))?,
            after: 48,
            question: 24,
            degree: (32, 24),
            sides: 32,
            place_length: 48,
        })
    }

    /// Whether a cue after a finding still speaks of it: few characters between, and no word that opens a new thought.
    pub(super) fn leads_to(&self, between: &str, most_chars: usize) -> bool {
        between.chars().count() <= most_chars && !self.opens.is_match(between)
    }
}

/// How the patterns of a table are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spelling {
    words: bool,
}

impl Spelling {
    /// As they stand.
    pub(super) const CHARACTERS: Self = Self { words: false };
    /// Whole words in small letters, which [`fold`] makes of a text; a space is any white space or a hyphen, `~` makes a word
    /// plural too.
    pub(super) const WORDS: Self = Self { words: true };

    /// One of `words`.
    pub(super) fn any(self, words: &[String]) -> String {
        if !self.words {
            return words.join("|");
        }
        let whole = |word: &String| match word.strip_prefix('^') {
            Some(_) => word.clone(),
            None => format!(r"(?-u:\b)(?:{word})(?-u:\b)"),
        };
        let words: Vec<String> = words.iter().map(whole).collect();
        format!("(?:{})", words.join("|"))
    }

    /// `pattern` as whole words.
    pub(super) fn whole(self, pattern: &str) -> String {
        if self.words {
            self.any(&[pattern.to_owned()])
        } else {
            pattern.to_owned()
        }
    }

    /// # Errors
    /// [`FindingsError::Pattern`] with `place`.
    pub(super) fn compile(self, pattern: &str, place: &str) -> Result<Regex, FindingsError> {
        let spelled = if self.words {
            spelled(pattern)
        } else {
            pattern.to_owned()
        };
        Regex::new(&spelled).map_err(|cause| FindingsError::Pattern {
            place: place.to_owned(),
            pattern: pattern.to_owned(),
            cause: Box::new(cause),
        })
    }
}

/// Letters and digits are those of ASCII: Unicode's classes make English patterns several times slower.
fn spelled(pattern: &str) -> String {
    plural(&pattern.replace(' ', r"[ \t\r\n\-]+"))
        .replace(r"\w", "[0-9a-z_]")
        .replace(r"\W", "[^0-9a-z_]")
        .replace(r"(?-u:\b)", r"\b")
        .replace(r"\b", r"(?-u:\b)")
}

/// `text` as the patterns of [`Spelling::WORDS`] expect it, byte for byte.
pub(super) fn fold(text: Cow<'_, str>) -> Cow<'_, str> {
    if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Cow::Owned(text.to_ascii_lowercase())
    } else {
        text
    }
}

/// `opacity~` is opacity or opacities, `pneumothorax~` pneumothorax or pneumothoraces, `mass~` mass or masses.
fn plural(pattern: &str) -> String {
    pattern
        .replace("y~", "(?:y|ies)")
        .replace("x~", "(?:x|xes|ces)")
        .replace('~', "(?:s|es)?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_whole_of_any_case_and_number() {
        let pattern = Spelling::WORDS.whole("air space opacity~|pneumothorax~|mass~");
        let pattern = Spelling::WORDS
            .compile(&pattern, "a test")
            .expect("compiles");
        for text in [
            "Air-space opacities",
            "air\nspace OPACITY",
            "pneumothoraces",
            "two masses.",
        ] {
            assert!(pattern.is_match(&fold(Cow::Borrowed(text))), "{text}");
        }
        for text in ["massive", "hydropneumothorax", "air space opacification"] {
            assert!(!pattern.is_match(text), "{text}");
        }
        assert_eq!(Spelling::CHARACTERS.whole("a b~"), "a b~");
    }
}
