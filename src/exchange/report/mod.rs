//! A report of a study in the forms in which it goes out.

mod document;
mod fhir;
mod font;
mod hl7;
mod pdf;
mod sr;

use chrono::{DateTime, Utc};

use super::uid::derived;
use crate::store::{Film, Study};

pub(super) use document::PDF_CLASS;
pub use document::encapsulated;
pub use fhir::diagnostic_report;
pub use font::PdfFont;
pub use hl7::message;
pub use pdf::pdf;
pub(super) use sr::SR_CLASS;
pub use sr::structured_report;

/// What a report of a draft says of itself.
pub const NOTICE: &str = "AI 草稿，未经医师审核签名，不构成诊断 / Draft written by a model, not reviewed or signed by a physician, not a diagnosis";

/// What goes out about a study: one version of its report.
pub struct Outgone<'a> {
    /// The study.
    pub study: &'a Study,
    /// 0 for the draft, then the number of the signature.
    pub version: u32,
    /// The words.
    pub text: &'a str,
    /// Who signed; `None` for a draft.
    pub signed_by: Option<&'a str>,
    /// When it was written or signed.
    pub at: DateTime<Utc>,
    /// Name of the model, as requests call it.
    pub model: &'a str,
    /// Version of the program that wrote the draft.
    pub program: &'a str,
    /// The films that the model read, in their order.
    pub films: Vec<&'a Film>,
}

impl<'a> Outgone<'a> {
    /// Version `version` of a study's report; `None` where there is none.
    pub fn new(study: &'a Study, version: u32) -> Option<Self> {
        let draft = study.draft.as_ref();
        let (text, by, at) = match version.checked_sub(1) {
            None => (draft?.text.as_str(), None, draft?.at),
            Some(index) => {
                let report = study.signed.get(index as usize)?;
                (report.text.as_str(), Some(report.by.as_str()), report.at)
            }
        };
        let read = |film: &&Film| match draft {
            Some(draft) => draft.films.contains(&film.id),
            None => film.kept_out.is_none(),
        };
        Some(Self {
            study,
            version,
            text,
            signed_by: by,
            at: DateTime::from_timestamp_millis(at)?,
            model: draft.map_or("", |draft| &draft.model),
            program: draft.map_or(env!("CARGO_PKG_VERSION"), |draft| &draft.program),
            films: study.films.iter().filter(read).collect(),
        })
    }

    /// Identifier of the report in a form; the same at every call.
    pub fn uid(&self, kind: &str) -> String {
        let (version, at) = (
            self.version.to_string(),
            self.at.timestamp_millis().to_string(),
        );
        derived(&["report", kind, &self.study.id, &version, &at])
    }

    /// StudyInstanceUID; of an upload without one, a derived one.
    pub fn study_uid(&self) -> String {
        match self.study.study_uid.is_empty() {
            true => derived(&["study", &self.study.id]),
            false => self.study.study_uid.clone(),
        }
    }

    /// Name of the model with that of the program.
    pub fn device(&self) -> String {
        format!("{} (xray-qwen3vl {})", self.model, self.program)
    }
}

#[cfg(test)]
pub(super) mod samples {
    use super::*;
    use crate::store::{Draft, Patient, Report};

    /// A study with a draft and a signature.
    pub(in crate::exchange) fn study() -> Study {
        Study {
            id: "00112233445566778899aabbccddeeff".into(),
            study_uid: "1.2.826.0.1.3680043.8.498.1".into(),
            patient: Patient {
                id: "P^77|x".into(),
                name: "Zhang^San=张^三".into(),
                birth_date: "19600102".into(),
                sex: "F".into(),
                age: "066Y".into(),
            },
            accession: "A&1".into(),
            date: "20261201101112".into(),
            films: vec![Film {
                id: "f1".into(),
                instance_uid: "1.2.826.0.1.3680043.8.498.3".into(),
                series_uid: "1.2.826.0.1.3680043.8.498.2".into(),
                class_uid: "1.2.840.10008.5.1.4.1.1.1.1".into(),
                ..Film::default()
            }],
            draft: Some(Draft {
                model: "tiny".into(),
                program: "0.1.0".into(),
                text: "两肺纹理清晰。\n右侧少量气胸。".into(),
                at: 1_780_000_000_000,
                films: vec!["f1".into()],
                ..Draft::default()
            }),
            signed: vec![Report {
                text: "右侧气胸，压缩约10%。\nFollow-up in 24 h & compare.".into(),
                by: "Dr. Li".into(),
                at: 1_780_000_100_000,
            }],
            ..Study::default()
        }
    }
}
