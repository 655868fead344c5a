//! `--export`: references and answers in the forms that other programs read.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

use crate::{
    base::files::write_atomic, commands::usage::UsageError, eval::findings::Labeler,
    eval::findings::Section, eval::outcome::EvalOutcome, eval::text::TextLanguage,
};

/// A form that another program reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExportForm {
    /// `{"references": [..], "hypotheses": [..]}`: <https://github.com/jbdel/RadEval>.
    RadEval,
    /// Study → `section_findings`, `section_impression`, `model_prediction`: <https://github.com/rajpurkarlab/ReXrank>.
    ReXrank,
}

impl ExportForm {
    /// # Errors
    /// Another name.
    pub(super) fn named(name: &str) -> Result<Self> {
        match name {
            "radeval" => Ok(Self::RadEval),
            "rexrank" => Ok(Self::ReXrank),
            _ => bail!(UsageError(format!(
                "--export: `{name}` is no form, expected radeval or rexrank"
            ))),
        }
    }
}

/// Writes the first system's reports to `path`, and says what of them does not fit.
///
/// # Errors
/// A file that cannot be written; for ReXrank a study with several reports, whose keys would be one.
pub(super) fn write_export(form: ExportForm, path: &Path, outcome: &EvalOutcome) -> Result<()> {
    let value = match form {
        ExportForm::RadEval => radeval(outcome),
        ExportForm::ReXrank => rexrank(outcome)?,
    };
    write_atomic(path, |out| {
        serde_json::to_writer_pretty(&mut *out, &value)?;
        out.write_all(b"\n")
    })?;
    let chinese = outcome.settings.language == TextLanguage::Chinese;
    eprintln!(
        "export: {} reports in `{}`{}",
        outcome.cases.len(),
        path.display(),
        if chinese {
            "; note: they are Chinese, and the clinical metrics of RadEval and ReXrank (CheXbert, RadGraph, GREEN) read English"
        } else {
            ""
        }
    );
    Ok(())
}

/// Two lists of one length; an answer that is empty stays, so that rows keep their places.
fn radeval(outcome: &EvalOutcome) -> Value {
    let references: Vec<&str> = outcome
        .cases
        .iter()
        .map(|case| case.truth.as_str())
        .collect();
    let hypotheses: Vec<&str> = outcome
        .texts
        .iter()
        .map(|text| text.answer.as_str())
        .collect();
    json!({ "references": references, "hypotheses": hypotheses })
}

/// What ReXrank's `split_json` reads; `findings` and `impression` are the same under the names of its example.
fn rexrank(outcome: &EvalOutcome) -> Result<Value> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for case in &outcome.cases {
        *counts.entry(&case.study).or_default() += 1;
    }
    if let Some((study, count)) = counts.into_iter().find(|(_, count)| *count > 1) {
        bail!(
            "--export rexrank: study `{study}` has {count} reports, and ReXrank holds one a study; evaluate one report a study"
        );
    }
    let labeler = match outcome.settings.language {
        TextLanguage::Chinese => Labeler::hospital(),
        TextLanguage::English => Labeler::english(),
    };
    let mut studies = Map::new();
    for (case, text) in outcome.cases.iter().zip(&outcome.texts) {
        let (findings, impression) = sections(labeler, &case.truth);
        studies.insert(
            case.study.clone(),
            json!({
                "image_path": [case.name],
                "section_findings": findings,
                "section_impression": impression,
                "findings": findings,
                "impression": impression,
                "report": case.truth,
                "model_prediction": text.answer,
            }),
        );
    }
    Ok(Value::Object(studies))
}

/// Findings and impression of a reference by its headings; without them the whole is the findings, and the impression is
/// empty.
fn sections(labeler: &Labeler, report: &str) -> (String, String) {
    let (mut findings, mut impression) = (Vec::new(), Vec::new());
    for (section, text) in labeler.named_sections(report) {
        match section {
            Section::Impression => impression.push(text),
            Section::Findings | Section::Unnamed => findings.push(text),
            Section::History | Section::Technique | Section::Comparison => {}
        }
    }
    (findings.join("\n"), impression.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_falls_into_findings_and_impression() {
        let split = |text: &str| sections(Labeler::english(), text);
        assert_eq!(
            split("HISTORY: cough. FINDINGS: Clear lungs. IMPRESSION: Normal chest."),
            ("Clear lungs.".to_owned(), "Normal chest.".to_owned())
        );
        assert_eq!(
            split("Clear lungs."),
            ("Clear lungs.".to_owned(), String::new())
        );
        assert_eq!(
            sections(Labeler::hospital(), "所见：双肺清晰。\n印象：未见异常。"),
            ("双肺清晰。".to_owned(), "未见异常。".to_owned())
        );
        assert!(ExportForm::named("csv").is_err());
    }
}
