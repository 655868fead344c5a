//! Whether the answers suit the chat template: with reasoning for a Thinking model, without for others.

use std::path::Path;

use super::data_file::CheckedRow;
use super::finding::{Finding, Kind, Severity};

/// The opening of a block of reasoning.
const OPENING: &str = "<think>";

/// One finding for the file if answers and template disagree.
///
/// `opens` says that the template opens a block of reasoning before each answer.
pub(super) fn disagreement(
    file: &Path,
    rows: &[CheckedRow],
    opens: Option<bool>,
) -> Option<Finding> {
    let opens = opens?;
    let answers = rows.iter().filter_map(|row| {
        let answer = row.sample.conversation.last_answer()?;
        Some((row.line, answer.trim_start().starts_with(OPENING)))
    });
    let answers: Vec<(usize, bool)> = answers.collect();
    let odd = answers.iter().filter(|(_, thinks)| *thinks != opens);
    let (line, count) = (odd.clone().next()?.0, odd.count());
    let of = answers.len();
    let message = if opens {
        format!(
            "{count} of {of} answers do not begin with `{OPENING}`, but the chat template of the model opens a block of reasoning before each; expected `{OPENING}\\n…\\n</think>\\n\\n` before the report, or an Instruct model"
        )
    } else {
        format!(
            "{count} of {of} answers begin with `{OPENING}`, but the chat template of the model knows no reasoning; expected answers without it, or a Thinking model"
        )
    };
    let (warning, kind) = (Severity::Warning, Kind::Thinking);
    Some(Finding::new(warning, kind, file, line, message))
}
