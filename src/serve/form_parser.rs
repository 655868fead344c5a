//! Parsers of grammars by `llguidance`, and why a form cannot be followed.

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{InferenceCapabilities, TokEnv},
};

/// Longest schema, in bytes of JSON; as much for an expression or a list of choices.
const LONGEST_SCHEMA: usize = 64 << 10;

/// A form that cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormError {
    /// The field at fault.
    pub param: String,
    /// In a sentence.
    pub reason: String,
}

/// Makes parsers for the tokens of one tokenizer.
pub(super) struct FormParser(ParserFactory);

impl FormParser {
    /// # Errors
    /// A reason, when the vocabulary cannot be used.
    pub(super) fn new(env: &TokEnv) -> Result<Self, String> {
        let mut parsers = ParserFactory::new(env, InferenceCapabilities::default(), &[])
            .map_err(|error| error.to_string())?;
        parsers.quiet();
        Ok(Self(parsers))
    }

    /// The parser of a grammar that can be followed.
    ///
    /// # Errors
    /// Why it cannot.
    pub(super) fn matcher(&self, grammar: TopLevelGrammar) -> Result<Matcher, String> {
        let mut matcher = Matcher::new(self.0.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            return Err(in_words(&error));
        }
        // The first mask shows whether anything can be written at all.
        let mask = matcher.compute_mask();
        mask.map_err(|error| in_words(&error.to_string()))?;
        Ok(matcher)
    }
}

/// Refuses what is too long to be read.
pub(super) fn check_size(what: &str, bytes: usize) -> Result<(), String> {
    match bytes > LONGEST_SCHEMA {
        true => Err(format!("{what} has more than {LONGEST_SCHEMA} bytes")),
        false => Ok(()),
    }
}

/// The parser's reason in a sentence, without its internal state.
fn in_words(error: &str) -> String {
    if error.contains("oneOf constraints are not supported") {
        return "the alternatives of a `oneOf` may hold at once; make them exclude each other, \
                or use `anyOf`"
            .into();
    }
    let first = error.lines().next().unwrap_or_default().trim();
    let inside = [
        "<state>", "Bias", "Token", "Lexer", "lexer", "grammar", "⟦", "::",
    ];
    if first.is_empty()
        || inside.iter().any(|word| error.contains(word)) && !speaks_of_schema(first)
    {
        log::info!("a form that cannot be followed: {first}");
        return "no answer of an end can be written by it, or it is too large".into();
    }
    // A regular expression is shown with a mark under it, and the reason in the last line.
    let why = error
        .lines()
        .find_map(|line| line.trim().strip_prefix("error: "))
        .filter(|_| first.ends_with(':'));
    let whole = match why {
        Some(why) => format!("{first} {why}"),
        None => first.to_owned(),
    };
    let mut text: String = whole.chars().take(200).collect();
    if text.starts_with(|letter: char| letter.is_ascii_uppercase()) {
        text[..1].make_ascii_lowercase();
    }
    text
}

/// Whether a reason is about the words of a schema.
fn speaks_of_schema(reason: &str) -> bool {
    [
        "Unimplemented",
        "Unsatisfiable",
        "Invalid type",
        "must be",
        "Expected",
        "format",
        "regex",
    ]
    .iter()
    .any(|word| reason.contains(word))
}
