//! How much signed reports differ from their drafts: of each finding, by month.

use std::collections::BTreeMap;

use chrono::{DateTime, Datelike};

use super::Study;
use crate::{
    base::plot::{Mark, Panel, Series, figure},
    eval::findings::{Finding, RuleSet, Status},
};

/// Reports of a month, and those in which each finding was changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Month {
    /// Signed reports that have a draft.
    pub reports: usize,
    /// Those that differ from the draft in any letter.
    pub edited: usize,
    /// Those that state a finding which the draft did not, or the reverse.
    pub changed: BTreeMap<Finding, usize>,
}

/// All months, by year and month.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Edits(BTreeMap<(i32, u32), Month>);

/// Whether a report states a finding, certain or not.
fn is_stated(status: Status) -> bool {
    matches!(status, Status::Present | Status::Uncertain)
}

impl Edits {
    /// Counts a study that is signed and has a draft.
    pub fn add(&mut self, study: &Study) {
        let (Some(draft), Some(signed)) = (&study.draft, study.signed.last()) else {
            return;
        };
        let Some(time) = DateTime::from_timestamp_millis(signed.at) else {
            return;
        };
        let month = self.0.entry((time.year(), time.month())).or_default();
        month.reports += 1;
        if draft.text.trim() == signed.text.trim() {
            return;
        }
        month.edited += 1;
        let texts = [draft.text.as_str(), signed.text.as_str()];
        let rules = RuleSet::guess(texts);
        let [before, after] = texts.map(|text| rules.label(text));
        for finding in Finding::ALL {
            if is_stated(before.status(finding)) != is_stated(after.status(finding)) {
                *month.changed.entry(finding).or_default() += 1;
            }
        }
    }

    /// Signed reports with drafts.
    pub fn reports(&self) -> usize {
        self.0.values().map(|month| month.reports).sum()
    }

    /// Months in their order.
    #[cfg(test)]
    pub fn months(&self) -> &BTreeMap<(i32, u32), Month> {
        &self.0
    }
}

/// Colours that differ clearly on white.
const COLORS: [&str; 8] = [
    "#0b5a75", "#b3541e", "#2f7d32", "#7b3fa0", "#a3201c", "#8a6d00", "#3a5fcd", "#5f6a72",
];

/// Most findings that are drawn: those that were changed most.
const MAX_DRAWN: usize = 8;

/// The share of reports that were edited, and in which each finding was changed, by month, as SVG.
pub fn plot(edits: &Edits) -> String {
    let x = |(year, month): &(i32, u32)| f64::from(*year) + f64::from(month - 1) / 12.0;
    let series = |name: String, color: &str, count: &dyn Fn(&Month) -> usize| Series {
        name,
        color: color.to_owned(),
        mark: Mark::Points,
        points: edits
            .0
            .iter()
            .map(|(at, month)| (x(at), 100.0 * count(month) as f64 / month.reports as f64))
            .collect(),
        ..Series::default()
    };
    let mut totals: BTreeMap<Finding, usize> = BTreeMap::new();
    for month in edits.0.values() {
        for (finding, count) in &month.changed {
            *totals.entry(*finding).or_default() += count;
        }
    }
    let mut most: Vec<(Finding, usize)> = totals.into_iter().collect();
    most.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    most.truncate(MAX_DRAWN);
    let found = most.iter().zip(COLORS).map(|((finding, count), color)| {
        let name = format!("{} ({count})", finding.key());
        series(name, color, &|month| {
            month.changed.get(finding).copied().unwrap_or(0)
        })
    });
    let panel = |title: &str, series: Vec<Series>| Panel {
        title: title.to_owned(),
        x_label: "year".into(),
        y_label: "% of signed reports".into(),
        series,
        ..Panel::default()
    };
    figure(&[
        panel(
            "Reports that were edited before they were signed",
            vec![series("edited".into(), COLORS[0], &|month| month.edited)],
        ),
        panel("Findings that were added or removed", found.collect()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Draft, Report};

    fn study(draft: &str, signed: &str, at: i64) -> Study {
        Study {
            draft: Some(Draft {
                text: draft.into(),
                ..Draft::default()
            }),
            signed: vec![Report {
                text: signed.into(),
                by: "x".into(),
                at,
            }],
            ..Study::default()
        }
    }

    #[test]
    fn a_finding_counts_where_it_is_added_or_removed() {
        let mut edits = Edits::default();
        // 2026-01-15 and 2026-02-15.
        let (january, february) = (1_768_435_200_000, 1_771_113_600_000);
        edits.add(&study("双肺未见明显异常。", "右侧气胸。", january));
        edits.add(&study("右侧气胸。", "右侧气胸。", january));
        edits.add(&study("右侧气胸。", "右侧少量气胸。", february));
        edits.add(&Study::default());
        assert_eq!(edits.reports(), 3);
        let january = &edits.months()[&(2026, 1)];
        assert_eq!((january.reports, january.edited), (2, 1));
        assert_eq!(january.changed.get(&Finding::Pneumothorax), Some(&1));
        let february = &edits.months()[&(2026, 2)];
        assert_eq!((february.edited, february.changed.len()), (1, 0));
        let svg = plot(&edits);
        assert!(svg.starts_with("<svg") && svg.contains("pneumothorax (1)"));
    }
}
