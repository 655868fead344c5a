//! Probabilities of findings in a file of predictions, one JSON object a line, as `infer --findings` writes them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::thresholds::Decision;
use crate::eval::{
    findings::{Finding, Status},
    predictions::images,
};

/// What a record says of one class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FindingRecord {
    /// Probability that it is there, from 0 to 1.
    pub probability: f64,
    /// Logit before calibration.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub logit: Option<f64>,
    /// What the probability decides.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub decision: Option<Decision>,
    /// What the report says.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub in_report: Option<Status>,
    /// The report says otherwise than the decision.
    #[serde(default)]
    pub conflict: bool,
}

/// The probabilities of one report.
#[derive(Debug, Clone, PartialEq)]
pub struct ProbabilityRow {
    /// Row in the file, from 1.
    pub row: usize,
    /// Images as the row names them.
    pub images: Vec<String>,
    /// Whether the probabilities are calibrated; a row that does not say is taken for calibrated.
    pub calibrated: bool,
    /// By class; empty where the row has none.
    pub findings: BTreeMap<Finding, FindingRecord>,
}

/// Why a file of probabilities cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProbabilitiesError {
    /// The file cannot be read.
    #[error("cannot read the probabilities `{}`: {cause}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// A row holds something else.
    #[error("`{}` row {row}: {what}; expected `findings` as `infer --findings` writes it: class → object with `probability` from 0 to 1", .path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Row, from 1.
        row: usize,
        /// What is there.
        what: String,
    },
}

/// Reads the probabilities of a file; rows without `findings` are there with an empty map.
///
/// # Errors
/// [`ProbabilitiesError`] names the file, the row and the key.
pub fn read_probabilities(path: &Path) -> Result<Vec<ProbabilityRow>, ProbabilitiesError> {
    let text = std::fs::read_to_string(path).map_err(|cause| ProbabilitiesError::Read {
        path: path.to_owned(),
        cause,
    })?;
    let lines = text.trim_start_matches('\u{feff}').lines().enumerate();
    lines
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            let wrong = |what: String| ProbabilitiesError::Row {
                path: path.to_owned(),
                row: index + 1,
                what,
            };
            match serde_json::from_str(line) {
                Ok(Value::Object(fields)) => read_row(index + 1, &fields).map_err(wrong),
                Ok(_) => Err(wrong("not a JSON object".to_owned())),
                Err(cause) => Err(wrong(format!("not a JSON object ({cause})"))),
            }
        })
        .collect()
}

fn read_row(row: usize, fields: &Map<String, Value>) -> Result<ProbabilityRow, String> {
    let calibrated = match fields.get("calibrated") {
        None | Some(Value::Null) => true,
        Some(Value::Bool(calibrated)) => *calibrated,
        Some(other) => return Err(format!("`calibrated` is {other}, not true or false")),
    };
    let mut findings = BTreeMap::new();
    let classes = match fields.get("findings") {
        // Text under this key is a section of a report.
        None | Some(Value::Null | Value::String(_)) => None,
        Some(Value::Object(classes)) => Some(classes),
        Some(other) => return Err(format!("`findings` is {other}")),
    };
    for (key, value) in classes.into_iter().flatten() {
        // Labels of reports have the same shape without a probability.
        if value.get("probability").is_none() {
            continue;
        }
        let Some(finding) = Finding::ALL.into_iter().find(|f| f.key() == key) else {
            return Err(format!("`findings` has an unknown class `{key}`"));
        };
        let record: FindingRecord = serde_json::from_value(value.clone())
            .map_err(|cause| format!("`findings.{key}`: {cause}"))?;
        if !(0.0..=1.0).contains(&record.probability) {
            let found = record.probability;
            return Err(format!("`findings.{key}.probability` is {found}"));
        }
        findings.insert(finding, record);
    }
    Ok(ProbabilityRow {
        row,
        images: images(fields),
        calibrated,
        findings,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<ProbabilityRow>, ProbabilitiesError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.jsonl");
        std::fs::write(&path, text).unwrap();
        read_probabilities(&path)
    }

    #[test]
    fn rows_with_and_without_probabilities_are_read() {
        let rows = read(concat!(
            r#"{"image":"a.png;b.png","report":"x","calibrated":false,"findings":{"pneumothorax":{"probability":0.25,"logit":-1.5,"decision":"undecided","in_report":"not_mentioned","conflict":false}}}"#,
            "\n\n",
            r#"{"image":"c.png","findings":{"edema":{"status":"present"}}}"#,
            "\n",
            r#"{"image":"d.png","findings":"text of a section"}"#,
        ))
        .unwrap();
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[0].images, ["a.png", "b.png"]);
        assert!(!rows[0].calibrated && rows[1].calibrated);
        let one = &rows[0].findings[&Finding::Pneumothorax];
        assert_eq!((one.probability, one.logit), (0.25, Some(-1.5)));
        assert!(rows[1].findings.is_empty() && rows[2].findings.is_empty());
        assert_eq!(rows[2].row, 4);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, part) in [
            (r#"{"findings":{"pneumo":{"probability":0.2}}}"#, "`pneumo`"),
            (r#"{"findings":{"edema":{"probability":1.2}}}"#, "1.2"),
            (
                r#"{"findings":{"edema":{"probability":"high"}}}"#,
                "`findings.edema`",
            ),
            (r#"{"findings":[1]}"#, "`findings` is"),
            (r#"{"calibrated":"yes"}"#, "`calibrated`"),
            ("[1]", "not a JSON object"),
        ] {
            let error = read(&format!("{{}}\n{line}")).unwrap_err().to_string();
            assert!(error.contains("row 2") && error.contains(part), "{error}");
        }
    }
}
