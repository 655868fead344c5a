//! What keeps a set of reports from being scored.

/// Pairs or settings that cannot be evaluated.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EvaluateError {
    /// No pairs or no studies.
    #[error("there is nothing to evaluate, expected at least one pair")]
    Empty,
    /// A bootstrap that draws nothing.
    #[error("the bootstrap has `0` resamples, expected at least 1 (1000 is usual)")]
    Resamples,
    /// An interval that holds nothing, everything, or is not a number.
    #[error("the bootstrap's confidence is `{0}`, expected a value between 0 and 1 such as 0.95")]
    Confidence(f64),
    /// Two runs that were not made on the same studies.
    #[error(
        "study `{study}` has other references in one run than in the other, expected both runs \
         on the same test set"
    )]
    DifferentStudies {
        /// The first study, by name, in which they differ.
        study: String,
    },
}
