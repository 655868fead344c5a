//! Text metrics for Chinese and English reports, each on characters and on words, with intervals over studies.
//!
//! [`TextEvaluation`] takes pairs of texts and gives every score at once ([`TextScores`]), their
//! bootstrap intervals, and the paired comparison of two runs; the metrics themselves are one a
//! file and can be used alone. They equal the published Python packages (`tests/fixtures/metrics`).
//! They count shared text, not right findings: a report that drops one "no" scores nearly full, so
//! they come beside the score of findings, never in its place, and always beside
//! [`baselines`](super::baselines).
//!
//! Units: `characters` takes every character but white space for a token, Latin letters and digits
//! too; `words` takes the words of [`jieba::cut`], of English reports those of [`language::english_words`]; `sacrebleu_zh` takes Chinese characters alone
//! and Latin runs whole. The training programs' own scores, under their names, keep their own
//! tokens ([`published`]).

pub mod bleu;
pub mod chrf;
pub mod cider;
pub mod jieba;
pub mod language;
pub mod lcs;
pub mod meteor;
pub mod ngrams;
pub mod pairs;
pub mod published;
pub mod rouge;
pub mod scores;
pub mod segment;
mod sums;

pub use language::TextLanguage;
pub use pairs::{TextEvaluation, TextPair};
pub use scores::{PublishedScores, SacrebleuZhScores, TextScores, UnitScores};
