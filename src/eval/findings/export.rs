//! Labels as files hold them: a JSON object a text, and CheXpert's table.

use std::ops::Range;

use serde_json::{Map, Value, json};

use super::{
    finding::Finding,
    labeler::Labeler,
    labels::{FindingLabel, Mention, ReportLabels, Status},
    sections::Section,
};

/// The columns of CheXpert's table, in its order.
pub const CHEXPERT: [(&str, Finding); 14] = [
    ("No Finding", Finding::NoFinding),
    (
        "Enlarged Cardiomediastinum",
        Finding::EnlargedCardiomediastinum,
    ),
    ("Cardiomegaly", Finding::Cardiomegaly),
    ("Lung Lesion", Finding::LungLesion),
    ("Lung Opacity", Finding::LungOpacity),
    ("Edema", Finding::Edema),
    ("Consolidation", Finding::Consolidation),
    ("Pneumonia", Finding::Pneumonia),
    ("Atelectasis", Finding::Atelectasis),
    ("Pneumothorax", Finding::Pneumothorax),
    ("Pleural Effusion", Finding::PleuralEffusion),
    ("Pleural Other", Finding::PleuralOther),
    ("Fracture", Finding::Fracture),
    ("Support Devices", Finding::SupportDevices),
];

/// What CheXpert writes for a status: 1.0, 0.0, -1.0 for doubt, nothing where there is no word of it.
///
/// *No Finding* is 1.0 or empty there.
pub fn chexpert_value(finding: Finding, status: Status) -> &'static str {
    match status {
        Status::Present => "1.0",
        Status::Absent if finding != Finding::NoFinding => "0.0",
        Status::Uncertain if finding != Finding::NoFinding => "-1.0",
        _ => "",
    }
}

/// Turns bytes of a text into characters, in ascending order.
struct Characters<'t> {
    text: &'t str,
}

impl Characters<'_> {
    fn at(&self, byte: usize) -> usize {
        self.text
            .get(..byte)
            .map_or(0, |before| before.chars().count())
    }

    fn words(&self, span: &Range<usize>) -> Value {
        json!({
            "text": self.text.get(span.clone()).unwrap_or_default(),
            "start": self.at(span.start),
            "end": self.at(span.end),
        })
    }
}

/// Labels of `text` as JSON: `findings` (class → `status`, `side`, `severity`, `lobe`, `evidence`), `other` (the same by
/// the names of the table), `normal`, `unread`, `unread_share`. Places are counted in characters.
///
/// `labels` are those of `text`.
pub fn to_json(labeler: &Labeler, text: &str, labels: &ReportLabels) -> Value {
    let characters = Characters { text };
    let findings: Map<String, Value> = labels
        .findings
        .iter()
        .map(|(finding, label)| {
            let mentions = labels.mentions.iter().filter(|mention| {
                mention.finding == Some(*finding) && mention.status == label.status
            });
            let value = entry(&characters, label, mentions);
            (finding.key().to_owned(), value)
        })
        .collect();
    let names = labeler.others();
    let other: Map<String, Value> = labels
        .others
        .iter()
        .map(|(key, label)| {
            let mentions = labels.mentions.iter().filter(|mention| {
                mention.other.as_deref() == Some(key) && mention.status == label.status
            });
            let mut value = entry(&characters, label, mentions);
            let name = names.iter().find(|name| name.key == *key);
            if let (Some(value), Some(name)) = (value.as_object_mut(), name) {
                value.insert("name".to_owned(), json!(name.chinese));
            }
            (key.clone(), value)
        })
        .collect();
    let unread: Vec<Value> = labels
        .unread
        .iter()
        .map(|span| characters.words(span))
        .collect();
    json!({
        "findings": findings,
        "other": other,
        "normal": labels.status(Finding::NoFinding) == Status::Present,
        "contradictions": labels.contradictions,
        "compares": labels.compares,
        "unread": unread,
        "unread_share": labels.unread_share(),
    })
}

fn entry<'m>(
    characters: &Characters<'_>,
    label: &FindingLabel,
    mentions: impl Iterator<Item = &'m Mention>,
) -> Value {
    let mut value = Map::new();
    value.insert("status".to_owned(), json!(label.status));
    if let Some(side) = label.laterality {
        value.insert("side".to_owned(), json!(side));
    }
    if let Some(severity) = label.severity {
        value.insert("severity".to_owned(), json!(severity));
    }
    if !label.zones.is_empty() {
        value.insert("lobe".to_owned(), json!(label.zones));
    }
    let mut evidence: Vec<Value> = mentions
        .map(|mention| {
            let mut words = characters.words(&mention.span);
            if mention.section != Section::Unnamed
                && let Some(words) = words.as_object_mut()
            {
                words.insert("section".to_owned(), json!(mention.section));
            }
            words
        })
        .collect();
    if evidence.is_empty()
        && let Some(span) = &label.evidence
    {
        evidence.push(characters.words(span));
    }
    value.insert("evidence".to_owned(), Value::Array(evidence));
    Value::Object(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_status_side_severity_lobe_and_words() {
        let text = "（１）右肺下叶少量胸腔積液。心影不大。";
        let labeler = Labeler::hospital();
        let row = to_json(labeler, text, &labeler.label(text));
        let effusion = &row["findings"]["pleural_effusion"];
        assert_eq!(effusion["status"], "present");
        assert_eq!(effusion["side"], "right");
        assert_eq!(effusion["severity"], "mild");
        assert_eq!(effusion["lobe"], json!(["lower"]));
        let words = &effusion["evidence"][0];
        let start = words["start"]
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(0);
        let end = words["end"]
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(0);
        let cut: String = text.chars().skip(start).take(end - start).collect();
        assert_eq!(words["text"], json!(cut));
        assert!(cut.contains("積液"));
        assert_eq!(row["findings"]["cardiomegaly"]["status"], "absent");
        assert!(row["findings"]["fracture"].is_null());
        assert_eq!(row["normal"], false);
    }

    #[test]
    fn unread_words_are_told_and_keep_a_report_from_being_normal() {
        let text = "心影不大。右上肺见一奇特征。";
        let labeler = Labeler::hospital();
        let row = to_json(labeler, text, &labeler.label(text));
        assert_eq!(row["normal"], false);
        assert_eq!(row["unread"][0]["start"], 5);
        assert!(
            row["unread_share"]
                .as_f64()
                .is_some_and(|share| share > 0.4)
        );
    }

    #[test]
    fn chexpert_has_no_denied_no_finding() {
        assert_eq!(chexpert_value(Finding::NoFinding, Status::Absent), "");
        assert_eq!(chexpert_value(Finding::Edema, Status::Absent), "0.0");
        assert_eq!(chexpert_value(Finding::Edema, Status::Uncertain), "-1.0");
    }
}
