//! The sentences of all classes as tokens, and the places of an answer that they are put in.

use std::sync::Arc;

use super::wordings::WORDINGS;
use crate::processor::tokenizer::{Tokenizer, TokenizerError};

/// Most clauses of a report after which classes are asked for: a bound on the time that an endless one takes.
const MOST_PLACES: usize = 24;

/// Tokens between prompt and sentences, and after how many of them the sentences are put.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SentencePlaces {
    /// The end of an empty reasoning, the lead, and the clauses of a report.
    pub tokens: Vec<u32>,
    /// Ends in `tokens`, rising; at least one.
    pub ends: Vec<usize>,
}

/// The sentences of all classes as tokens of one model.
#[derive(Debug, Clone)]
pub struct FindingSentences {
    tokenizer: Tokenizer,
    opening: Vec<u32>,
    sentences: Arc<Vec<Vec<u32>>>,
}

impl FindingSentences {
    /// Encodes the sentences. `opens_thinking`: the prompt begins a reasoning, which is closed before them, as reports
    /// follow it; `lead` begins the answer before each of them.
    ///
    /// # Errors
    /// [`TokenizerError`].
    pub fn new(
        tokenizer: &Tokenizer,
        opens_thinking: bool,
        lead: &str,
    ) -> Result<Self, TokenizerError> {
        let mut opening = Vec::new();
        if opens_thinking {
            // An empty reasoning is what the template writes where there is none.
            opening = tokenizer.encode("\n</think>\n\n")?;
        }
        opening.extend(tokenizer.encode_plain(lead)?);
        let texts = WORDINGS
            .iter()
            .flat_map(|class| class.stated.iter().chain(class.denied));
        let sentences = texts
            .map(|text| tokenizer.encode_plain(text))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            tokenizer: tokenizer.clone(),
            opening,
            sentences: Arc::new(sentences),
        })
    }

    /// The sentences, in the order of [`WORDINGS`], stated before denied.
    pub fn tokens(&self) -> &Arc<Vec<Vec<u32>>> {
        &self.sentences
    }

    /// Tokens between prompt and sentences, without a report.
    pub fn opening(&self) -> usize {
        self.opening.len()
    }

    /// Tokens of the longest sentence.
    pub fn longest(&self) -> usize {
        self.sentences.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Where the sentences are put: at the beginning of the answer, and with `report` after each clause of that.
    ///
    /// # Errors
    /// [`TokenizerError`].
    pub fn places(&self, report: Option<&str>) -> Result<SentencePlaces, TokenizerError> {
        let mut tokens = self.opening.clone();
        let mut ends = vec![tokens.len()];
        let clauses = report.map(clauses).unwrap_or_default();
        for clause in clauses.into_iter().take(MOST_PLACES) {
            tokens.extend(self.tokenizer.encode_plain(clause)?);
            ends.push(tokens.len());
        }
        Ok(SentencePlaces { tokens, ends })
    }
}

/// Sentences and clauses of a report, each with its end: normal reports deny findings after a comma.
fn clauses(report: &str) -> Vec<&str> {
    let ends = ['。', '；', ';', '\n', '，', ',', '：'];
    report.split_inclusive(ends).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_end_at_clauses() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny");
        let tokenizer = Tokenizer::from_folder(folder).unwrap();
        let sentences = FindingSentences::new(&tokenizer, false, "").unwrap();
        let all: usize = WORDINGS
            .iter()
            .map(|w| w.stated.len() + w.denied.len())
            .sum();
        assert_eq!(sentences.tokens().len(), all);
        assert!(sentences.tokens().iter().all(|tokens| !tokens.is_empty()));
        let start = sentences.places(None).unwrap();
        assert_eq!((start.tokens.len(), &start.ends[..]), (0, &[0][..]));
        let report = sentences.places(Some("心影不大，未见气胸。")).unwrap();
        assert_eq!(report.ends.len(), 3);
        assert_eq!(report.ends[2], report.tokens.len());
        let lead = FindingSentences::new(&tokenizer, true, "印象：").unwrap();
        let opening = lead.places(None).unwrap();
        assert_eq!(opening.ends, [opening.tokens.len()]);
        assert!(
            tokenizer
                .decode(&opening.tokens, false)
                .unwrap()
                .contains("印象：")
        );
    }
}
