//! What keeps a corpus from being read or corrected.

/// What can be wrong with terms, accepted defects or corpus files.
#[derive(Debug, thiserror::Error)]
pub enum CleanError {
    /// The term table is not TOML of the expected form.
    #[error(
        "cannot read the term table; expected `[[term]]` with `defect`, `pattern`, `reason` and `reviewed`"
    )]
    Table(#[from] toml::de::Error),
    /// A pattern is not a regular expression.
    #[error("pattern `{pattern}` of the defect `{defect}` is not a regular expression")]
    Pattern {
        /// Name of the defect.
        defect: String,
        /// The pattern.
        pattern: String,
        /// What the compiler of patterns says.
        #[source]
        cause: Box<regex::Error>,
    },
    /// An accepted defect names a row that is not there.
    #[error("`{file}` has no row {}; expected the rows the defects were found in", .row + 1)]
    NoSuchRow {
        /// File of the defect.
        file: String,
        /// CorpusReport of the defect.
        row: usize,
    },
    /// The text has changed since the defect was found.
    #[error(
        "`{file}` row {}: expected `{expected}` at byte {start}; hint: find the defects again", .row + 1
    )]
    TextChanged {
        /// File of the defect.
        file: String,
        /// CorpusReport of the defect.
        row: usize,
        /// Byte where the words were.
        start: usize,
        /// The words.
        expected: String,
    },
    /// Two accepted defects want the same bytes.
    #[error(
        "`{file}` row {}: two accepted defects overlap at byte {start}; hint: accept one of them", .row + 1
    )]
    Overlap {
        /// File of the defects.
        file: String,
        /// CorpusReport of the defects.
        row: usize,
        /// Byte where the second one starts.
        start: usize,
    },
    /// A corpus file is not JSON.
    #[error("`{file}` is not JSON")]
    Json {
        /// The file.
        file: String,
        /// What the reader says.
        #[source]
        cause: serde_json::Error,
    },
    /// A line of a corpus file is not JSON.
    #[error("`{file}` row {} is not JSON", .row + 1)]
    Line {
        /// The file.
        file: String,
        /// CorpusReport, from 0.
        row: usize,
        /// What the reader says.
        #[source]
        cause: serde_json::Error,
    },
    /// A corpus file lacks a row or its text.
    #[error(
        "`{file}` row {}: expected `label` and `img` in a list, `caption` and `image_id` in `annotations`, or `messages` with an answer at the end", .row + 1
    )]
    Schema {
        /// The file.
        file: String,
        /// CorpusReport, from 0.
        row: usize,
    },
}
