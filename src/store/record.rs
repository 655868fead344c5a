//! What is kept of a study: who and when, its films, the draft, the report, and what is sent out.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How far a study has come.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum StudyState {
    /// Films are coming in.
    #[default]
    Received,
    /// No more films are expected; a draft may be written.
    Complete,
    /// The model has written a draft.
    Drafted,
    /// Somebody has signed a report.
    Signed,
    /// Everything that goes out about the signed report has arrived.
    Sent,
    /// There is no draft, and `failure` says why.
    Failed,
}

impl StudyState {
    /// All states, in their order.
    pub const ALL: [Self; 6] = [
        Self::Received,
        Self::Complete,
        Self::Drafted,
        Self::Signed,
        Self::Sent,
        Self::Failed,
    ];

    /// The state's name in JSON and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Received => "received",
            Self::Complete => "complete",
            Self::Drafted => "drafted",
            Self::Signed => "signed",
            Self::Sent => "sent",
            Self::Failed => "failed",
        }
    }
}

/// Whom a study is of, as the films or the upload say; empty where they say nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Patient {
    /// PatientID.
    pub id: String,
    /// PatientName.
    pub name: String,
    /// PatientBirthDate, `YYYYMMDD`.
    pub birth_date: String,
    /// PatientSex: `M`, `F`, `O`.
    pub sex: String,
    /// PatientAge, as `045Y`.
    pub age: String,
}

/// One film of a study; its bytes are kept beside the record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Film {
    /// Our name of it, 32 hexadecimal digits; what addresses and files carry.
    pub id: String,
    /// SOPInstanceUID; empty for what is no DICOM file.
    pub instance_uid: String,
    /// SeriesInstanceUID.
    pub series_uid: String,
    /// SOPClassUID.
    pub class_uid: String,
    /// `PA`, `AP`, `LAT`, `LL`, `RL`, or empty.
    pub view: String,
    /// Date of the film, `YYYYMMDD`, or empty.
    pub date: String,
    /// Hash of the bytes as they came.
    pub sha256: String,
    /// Number of those bytes.
    pub bytes: u64,
    /// Why the model does not read it, where it is no chest radiograph; in words without patient data.
    pub kept_out: Option<String>,
}

/// What the model wrote.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Draft {
    /// Name of the model, as requests call it.
    pub model: String,
    /// Version of this program.
    pub program: String,
    /// The question.
    pub prompt: String,
    /// The report.
    pub text: String,
    /// Reasoning before it.
    pub reasoning: String,
    /// How it ended: `stop`, `length`, `repetition`.
    pub finish_reason: String,
    /// The `findings` object of the API (`calibrated`, `classes`), or null.
    pub findings: Value,
    /// `remarks` of the API.
    pub remarks: Vec<Value>,
    /// When, in milliseconds since 1970.
    pub at: i64,
    /// Ids of the films that the model read, in their order; the prior's films are not among them.
    pub films: Vec<String>,
    /// The earlier study that was read beside it.
    pub prior: Option<String>,
}

/// A report as somebody left it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// The words.
    pub text: String,
    /// Name of who wrote or signed it.
    pub by: String,
    /// When, in milliseconds since 1970.
    pub at: i64,
}

/// Something that goes out about a study, and how far it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Outgoing {
    /// Our name of it, 32 hexadecimal digits.
    pub id: String,
    /// Where to: a name of the server's configuration, never an address with a password.
    pub target: String,
    /// `sr`, `pdf`, `fhir`, `hl7`.
    pub kind: String,
    /// Number of the report's version: 0 for the draft, then 1 for the first signature, 2 for its amendment.
    pub version: u32,
    /// The SOPInstanceUID or message id, fixed before the first attempt, so that a second one is the same object.
    pub uid: String,
    /// Attempts so far.
    pub attempts: u32,
    /// When the next attempt is due, in milliseconds since 1970.
    pub due_at: i64,
    /// Why the last one failed; without patient data.
    pub error: Option<String>,
    /// When it arrived.
    pub sent_at: Option<i64>,
}

/// Classes of findings that make nobody hurry.
const NOT_URGENT: [&str; 2] = ["no_finding", "support_devices"];

/// One study.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Study {
    /// Our name of it, 32 hexadecimal digits.
    pub id: String,
    /// StudyInstanceUID; empty for an upload without one.
    pub study_uid: String,
    /// How far it is.
    pub state: StudyState,
    /// Why it failed, without patient data.
    pub failure: Option<String>,
    /// Where it came from: `upload`, `dicom`, `dicomweb`, `folder`.
    pub source: String,
    /// Whom it is of.
    pub patient: Patient,
    /// AccessionNumber.
    pub accession: String,
    /// StudyDate and StudyTime, `YYYYMMDD` or `YYYYMMDDHHMMSS`.
    pub date: String,
    /// StudyDescription.
    pub description: String,
    /// Why the study was asked for.
    pub indication: String,
    /// The films, in the order in which they came.
    pub films: Vec<Film>,
    /// Id of the study shown and read beside it.
    pub prior: Option<String>,
    /// When the first film came, in milliseconds since 1970.
    pub received_at: i64,
    /// When anything changed last; `quiet since`.
    pub changed_at: i64,
    /// What the model wrote; the first draft stays.
    pub draft: Option<Draft>,
    /// The report as it is being edited.
    pub edited: Option<Report>,
    /// Signed reports, the last one valid; earlier ones were amended.
    pub signed: Vec<Report>,
    /// What goes out.
    pub outbox: Vec<Outgoing>,
    /// Number of the record's version, which grows by one with each change.
    pub revision: u64,
    /// Whether the report and its films may be used for training, and who said so.
    pub consent: Option<Report>,
}

impl Study {
    /// The report that is valid now: the signed one, else the edited one, else the draft.
    pub fn text(&self) -> &str {
        let signed = self.signed.last().map(|report| report.text.as_str());
        let edited = self.edited.as_ref().map(|report| report.text.as_str());
        let draft = self.draft.as_ref().map(|draft| draft.text.as_str());
        signed.or(edited).or(draft).unwrap_or_default()
    }

    /// The finding that makes the study urgent, with its probability: the likeliest one of the draft that is no
    /// device and not the absence of all others.
    pub fn urgent_finding(&self) -> Option<(&str, &Value, f64)> {
        let classes = self.draft.as_ref()?.findings["classes"].as_object()?;
        classes
            .iter()
            .filter(|(key, _)| !NOT_URGENT.contains(&key.as_str()))
            .filter_map(|(key, one)| Some((key.as_str(), one, one["probability"].as_f64()?)))
            .max_by(|(.., one), (.., other)| one.total_cmp(other))
    }

    /// How urgent the study is: the probability of [`Study::urgent_finding`], 0 to 1.
    pub fn urgency(&self) -> f64 {
        self.urgent_finding().map_or(0.0, |(.., chance)| chance)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_normal_film_with_a_line_is_not_urgent() {
        let classes = json!({
            "no_finding": {"probability": 0.99},
            "support_devices": {"probability": 0.98},
            "pneumothorax": {"probability": 0.02},
            "fracture": {"probability": null},
        });
        let study = Study {
            draft: Some(Draft {
                findings: json!({"classes": classes}),
                ..Draft::default()
            }),
            ..Study::default()
        };
        let (key, _, chance) = study.urgent_finding().unwrap();
        assert_eq!((key, chance), ("pneumothorax", 0.02));
        assert_eq!(Study::default().urgency(), 0.0);
    }
}
