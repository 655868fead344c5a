//! Agreement of the rules with labels made by hand.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    finding::Finding,
    labels::{ReportLabels, Status},
};

const STATUSES: [Status; 4] = [
    Status::Present,
    Status::Uncertain,
    Status::Absent,
    Status::NotMentioned,
];

/// Labels by hand of one text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HandLabels {
    /// Status by class; a class that is not listed is not mentioned.
    pub statuses: BTreeMap<Finding, Status>,
    /// Classes that may be read either way; they are left out.
    pub ambiguous: BTreeSet<Finding>,
}

/// Reads hand labels: an object of class → status, class → `{status}`, or the lists `present`, `absent`, `uncertain`;
/// with either the list `ambiguous`.
/// `None` if the row holds none of them.
///
/// # Errors
/// A class or status that does not exist, as a sentence.
pub fn hand_labels(row: &Map<String, Value>, key: &str) -> Result<Option<HandLabels>, String> {
    let parse = |name: &str, status: &str| -> Result<(Finding, Status), String> {
        let finding = Finding::ALL
            .into_iter()
            .find(|finding| finding.key() == name)
            .ok_or_else(|| format!("`{name}` is no class; expected one such as `pneumothorax`"))?;
        let status = serde_json::from_value(Value::String(status.to_owned())).map_err(|_| {
            format!("`{status}` of `{name}` is no status; expected present, absent, uncertain or not_mentioned")
        })?;
        Ok((finding, status))
    };
    let mut labels = HandLabels::default();
    let list = |name: &str| row.get(name).and_then(Value::as_array);
    for name in list("ambiguous")
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
    {
        labels.ambiguous.insert(parse(name, "present")?.0);
    }
    if let Some(Value::Object(classes)) = row.get(key) {
        for (name, value) in classes {
            let status = value.as_str().or_else(|| value["status"].as_str());
            let status = status.ok_or_else(|| format!("`{key}.{name}` has no status"))?;
            labels.statuses.extend([parse(name, status)?]);
        }
        return Ok(Some(labels));
    }
    let mut any = false;
    for status in ["present", "absent", "uncertain"] {
        let Some(names) = list(status) else {
            continue;
        };
        any = true;
        for name in names.iter().filter_map(Value::as_str) {
            labels.statuses.extend([parse(name, status)?]);
        }
    }
    Ok(any.then_some(labels))
}

/// Agreement in one class.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClassAgreement {
    /// Texts in which the hand labels name the class present.
    pub support: usize,
    /// Share of texts with the same status of four.
    pub accuracy: f64,
    /// Cohen's kappa over the four statuses; `None` where chance alone agrees always.
    pub kappa: Option<f64>,
    /// F1 of *present*; `None` where neither has it.
    pub f1: Option<f64>,
}

/// Compares labels of the rules with those by hand, text by text, class by class.
pub fn agreement(pairs: &[(&ReportLabels, &HandLabels)]) -> BTreeMap<Finding, ClassAgreement> {
    let class = |finding: Finding| {
        let mut table = [[0_usize; 4]; 4];
        let judged = pairs
            .iter()
            .filter(|(_, hand)| !hand.ambiguous.contains(&finding));
        for (read, hand) in judged.clone() {
            let place = |status| STATUSES.iter().position(|s| *s == status).unwrap_or(3);
            let truth = hand.statuses.get(&finding).copied().unwrap_or_default();
            table[place(truth)][place(read.status(finding))] += 1;
        }
        let row = |n: usize| table[n].iter().sum::<usize>() as f64;
        let column = |n: usize| table.iter().map(|row| row[n]).sum::<usize>() as f64;
        let all = judged.count().max(1) as f64;
        let same = (0..4).map(|n| table[n][n]).sum::<usize>() as f64 / all;
        let chance: f64 = (0..4).map(|n| row(n) * column(n) / (all * all)).sum();
        let positive = row(0) + column(0);
        ClassAgreement {
            support: table[0].iter().sum(),
            accuracy: same,
            kappa: (chance < 1.0).then(|| (same - chance) / (1.0 - chance)),
            f1: (positive > 0.0).then(|| 2.0 * table[0][0] as f64 / positive),
        }
    };
    Finding::ALL
        .into_iter()
        .map(|finding| (finding, class(finding)))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::eval::findings::Labeler;

    #[test]
    fn kappa_is_that_of_scikit_learn() {
        // cohen_kappa_score of [p, p, a, n, n, u] and [p, a, a, n, n, p] is 0.5384615384615384 (scikit-learn 1.7.2).
        let hand = [
            "present",
            "present",
            "absent",
            "not_mentioned",
            "not_mentioned",
            "uncertain",
        ];
        let read = [
            "右侧气胸。",
            "未见气胸。",
            "未见气胸。",
            "心影不大。",
            "心影不大。",
            "右侧气胸。",
        ];
        let read: Vec<ReportLabels> = read
            .iter()
            .map(|text| Labeler::hospital().label(text))
            .collect();
        let hand: Vec<HandLabels> = hand
            .iter()
            .map(|status| {
                let row = json!({"labels": {"pneumothorax": status}});
                let row = row.as_object().cloned().unwrap_or_default();
                hand_labels(&row, "labels")
                    .ok()
                    .flatten()
                    .unwrap_or_default()
            })
            .collect();
        let pairs: Vec<_> = read.iter().zip(&hand).collect();
        let class = &agreement(&pairs)[&Finding::Pneumothorax];
        assert_eq!(class.support, 2);
        assert!(
            (class.kappa.unwrap_or(0.0) - 0.538_461_538_461_538_4).abs() < 1e-12,
            "{class:?}"
        );
        assert_eq!(class.f1, Some(0.5));
    }

    #[test]
    fn an_unknown_class_is_named() {
        let row = json!({"labels": {"stroke": "present"}});
        let row = row.as_object().cloned().unwrap_or_default();
        assert!(hand_labels(&row, "labels").is_err_and(|error| error.contains("`stroke`")));
    }
}
