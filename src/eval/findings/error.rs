//! What can be wrong with a table of words or of labels.

/// What can be wrong with a table of words or with the labels of the Indiana collection.
#[derive(Debug, thiserror::Error)]
pub enum FindingsError {
    /// The table is not TOML of the expected form.
    #[error(
        "cannot read the table of findings; expected `[cues]`, `[sides]`, `[severities]` and `[[rule]]`"
    )]
    WordTable(#[from] toml::de::Error),
    /// A pattern is not a regular expression.
    #[error(
        "pattern `{pattern}` of {place} is not a regular expression; hint: look-around is written as `only_before` and the like"
    )]
    Pattern {
        /// Where the pattern is.
        place: String,
        /// The pattern.
        pattern: String,
        /// What the compiler of patterns says.
        #[source]
        cause: Box<regex::Error>,
    },
    /// A misspelt word and the one that is meant are of different length.
    #[error(
        "`spelling` maps `{wrong}` to `{meant}`; expected a word of as many bytes, so that places in the report stay what they are"
    )]
    Spelling {
        /// The misspelt word.
        wrong: String,
        /// What is meant.
        meant: String,
    },
    /// A rule names a class that does not exist.
    #[error(
        "rule {rule} names the finding `{name}`; expected a class such as `pneumothorax`, or `other`, or `mask`"
    )]
    UnknownFinding {
        /// Number of the rule, from 1.
        rule: usize,
        /// The name.
        name: String,
    },
    /// A table of labels cannot be read.
    #[error("cannot read the labels in row {row}; expected CSV with the columns `uid` and `MeSH`")]
    Labels {
        /// Row, the header being 1.
        row: u64,
        /// What the CSV reader says.
        #[source]
        cause: csv::Error,
    },
    /// A table of labels lacks a column.
    #[error("the label table has no column `{0}`; hint: it is `indiana_reports.csv`")]
    MissingColumn(&'static str),
}
