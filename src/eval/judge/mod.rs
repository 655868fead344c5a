//! A language model as judge, through any endpoint of OpenAI's form: GREEN's six kinds of error, asked for in Chinese.
//!
//! Nothing here runs by itself: [`ask`] sends the reports of a test set, reference and answer, to the address it is given.
//! A judge is another model with errors of its own; [`check`] measures them on errors that were planted by rule.
//!
//! Source: Ostmeier et al., GREEN (2024): matched findings / (matched findings + significant errors), 0 without a match.

pub mod ask;
mod cache;
pub mod check;
mod client;
mod error;
mod outcome;
mod prompt;

pub use client::Endpoint;
pub use error::JudgeError;
pub use outcome::{JudgeOutcome, KindCounts};
pub use prompt::{ErrorKind, JudgedError, Judgement};
