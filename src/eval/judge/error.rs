//! Why a judge cannot be asked.

use std::path::PathBuf;

/// What keeps a judge from answering.
#[derive(Debug, thiserror::Error)]
pub enum JudgeError {
    /// The address is none.
    #[error("`{0}` is no address of a judge; expected http://HOST:PORT/v1 or https://HOST/v1")]
    Address(String),
    /// The server does not answer, or not to this request.
    #[error("the judge at `{url}`: {reason}")]
    Answer {
        /// Where it was asked.
        url: String,
        /// What happened.
        reason: String,
    },
    /// The server has several models, or none.
    #[error("the judge at `{url}` offers {}; name one with --judge-model", .models)]
    Model {
        /// Where it was asked.
        url: String,
        /// What it offers.
        models: String,
    },
    /// The file of answers cannot be read or written.
    #[error("cannot keep the judge's answers in `{}`", .path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// The summary cannot be made.
    #[error(transparent)]
    Score(#[from] crate::eval::error::EvaluateError),
}
