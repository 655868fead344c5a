//! Scores of parts of a test set: by view, age, sex, site, or any key of its rows.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    bootstrap::Interval,
    error::EvaluateError,
    findings::{LabelledPair, evaluation::FindingEvaluation},
    outcome::{CaseReview, EvalOutcome, EvalSettings, NamedValues, Subgroup, SubgroupKey},
};

/// Fewer reports than this have no interval.
pub const FEW: usize = 10;

/// Most values of a key.
const MOST_VALUES: usize = 20;

/// Upper ends of the bands of age, in years, and their names.
const AGES: [(f64, &str); 4] = [
    (18.0, "0–17"),
    (40.0, "18–39"),
    (65.0, "40–64"),
    (f64::INFINITY, "65+"),
];

/// Keys that are looked for where none is named: what they say, and their names in lower case, without marks.
const GUESSES: [(&str, &[&str]); 4] = [
    (
        "view",
        &[
            "view",
            "viewposition",
            "projection",
            "position",
            "体位",
            "投照体位",
        ],
    ),
    ("age", AGE_KEYS),
    ("sex", &["sex", "gender", "patientsex", "性别"]),
    (
        "site",
        &[
            "site",
            "hospital",
            "institution",
            "institutionname",
            "dataset",
            "source",
            "机构",
            "医院",
            "数据集",
        ],
    ),
];

const AGE_KEYS: &[&str] = &["age", "patientage", "ageyears", "年龄"];

/// Scores of a group.
pub const SCORES: [&str; 5] = [
    "findings.micro.f1",
    "findings.macro.f1",
    "findings.false_normal",
    "findings.invented",
    "characters.rouge_l",
];

/// Why a test set cannot be divided.
#[derive(Debug, thiserror::Error)]
pub enum SubgroupError {
    /// No row has the key.
    #[error("--subgroup: no row has the key `{key}`; the rows have {}", named(.keys))]
    NoKey {
        /// The key.
        key: String,
        /// Keys that there are.
        keys: BTreeSet<String>,
    },
    /// The key names rows rather than groups.
    #[error(
        "--subgroup: `{key}` has {count} values, at most {MOST_VALUES} are groups; expected a key such as the view, age or site"
    )]
    Values {
        /// The key.
        key: String,
        /// Its values.
        count: usize,
    },
}

fn named(keys: &BTreeSet<String>) -> String {
    if keys.is_empty() {
        return "no key with a short text or a number".to_owned();
    }
    let quoted: Vec<String> = keys.iter().map(|key| format!("`{key}`")).collect();
    quoted.join(", ")
}

/// A name without marks, in lower case.
fn plain(key: &str) -> String {
    let letters = key.chars().filter(|c| c.is_alphanumeric());
    letters.flat_map(char::to_lowercase).collect()
}

/// Groups of the rows: the values of each, one a case.
#[derive(Debug, Clone, PartialEq)]
pub struct Division {
    key: String,
    guessed: bool,
    /// One a case.
    values: Vec<Option<String>>,
}

impl Division {
    /// What is said of it before it is used.
    pub fn told(&self) -> Option<String> {
        self.guessed.then(|| {
            format!(
                "subgroups by `{}`, as its name says; --subgroup names others",
                self.key
            )
        })
    }
}

/// Divides rows by the `wanted` keys, or where none is named by those whose names are known.
///
/// # Errors
/// [`SubgroupError`] for a key that was named.
pub fn divide(
    rows: &[&BTreeMap<String, String>],
    wanted: &[String],
) -> Result<Vec<Division>, SubgroupError> {
    let keys: BTreeSet<String> = rows.iter().flat_map(|row| row.keys()).cloned().collect();
    let of = |key: &str, guessed| {
        let is_age = AGE_KEYS.contains(&&*plain(key));
        let value = |row: &&BTreeMap<String, String>| {
            let value = row.get(key)?.trim();
            if is_age {
                band(value)
            } else {
                Some(value.to_owned())
            }
        };
        let values: Vec<Option<String>> = rows.iter().map(value).collect();
        let distinct: BTreeSet<&String> = values.iter().flatten().collect();
        let count = distinct.len();
        let key = key.to_owned();
        let division = Division {
            key,
            guessed,
            values,
        };
        (division, count)
    };
    if wanted.is_empty() {
        let guesses = GUESSES.iter().filter_map(|(_, names)| {
            let known = |name: &&str| keys.iter().find(|key| plain(key) == **name);
            let (division, count) = of(names.iter().find_map(known)?, true);
            // One value divides nothing, and many are names.
            (2..=MOST_VALUES).contains(&count).then_some(division)
        });
        return Ok(guesses.collect());
    }
    wanted
        .iter()
        .map(|key| {
            if !keys.contains(key) {
                let key = key.clone();
                return Err(SubgroupError::NoKey {
                    key,
                    keys: keys.clone(),
                });
            }
            let (division, count) = of(key, false);
            if count > MOST_VALUES {
                let key = key.clone();
                return Err(SubgroupError::Values { key, count });
            }
            Ok(division)
        })
        .collect()
}

/// The band of an age such as `63`, `063Y`, `63岁`, `10M` (months, as DICOM has it).
fn band(text: &str) -> Option<String> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    let years = match text[end..].trim() {
        "" | "Y" | "y" | "岁" | "years" | "year" => number,
        "M" | "m" | "月" | "个月" => number / 12.0,
        "W" | "w" | "周" => number / 52.0,
        "D" | "d" | "天" | "日" => number / 365.0,
        _ => return None,
    };
    let found = AGES.iter().find(|(end, _)| years < *end);
    found.map(|(_, name)| (*name).to_owned())
}

/// Scores the groups of `divisions` and puts them into `outcome`.
///
/// # Errors
/// [`EvaluateError`] for settings of the bootstrap out of range.
///
/// # Panics
/// If a division has not one value a case.
pub fn score_subgroups(
    outcome: &mut EvalOutcome,
    divisions: Vec<Division>,
) -> Result<(), EvaluateError> {
    // In the order of the cases.
    let mut reviews = outcome.reviews.clone();
    reviews.sort_by_key(|review| review.case);
    let mut all = Vec::with_capacity(divisions.len());
    for division in divisions {
        assert_eq!(
            division.values.len(),
            outcome.cases.len(),
            "values and cases disagree"
        );
        let mut places: BTreeMap<(bool, Option<&String>), Vec<usize>> = BTreeMap::new();
        for (at, value) in division.values.iter().enumerate() {
            let value = value.as_ref();
            places.entry((value.is_none(), value)).or_default().push(at);
        }
        let mut groups = Vec::with_capacity(places.len());
        for ((_, value), places) in places {
            let of = |labels, reviews| scores(labels, reviews, &places, &outcome.settings);
            let other = outcome.other.as_ref();
            let studies: BTreeSet<&str> =
                places.iter().map(|at| &*outcome.cases[*at].study).collect();
            groups.push(Subgroup {
                value: value.cloned(),
                reports: places.len(),
                studies: studies.len(),
                few: places.len() < FEW,
                scores: of(&outcome.labels, &reviews)?,
                other: other.map(|run| of(&run.labels, &run.reviews)).transpose()?,
            });
        }
        all.push(SubgroupKey {
            key: division.key,
            guessed: division.guessed,
            groups,
        });
    }
    outcome.subgroups = all;
    Ok(())
}

/// Scores of the cases at `places`.
fn scores(
    labels: &[LabelledPair],
    reviews: &[CaseReview],
    places: &[usize],
    settings: &EvalSettings,
) -> Result<NamedValues<Interval>, EvaluateError> {
    let pairs: Vec<LabelledPair> = places.iter().map(|at| labels[*at].clone()).collect();
    let evaluation = FindingEvaluation::new(&pairs, settings.policies);
    let found = evaluation.intervals(&settings.bootstrap)?;
    let mut scores: Vec<(String, Interval)> = found
        .into_iter()
        .map(|(name, value)| (format!("findings.{name}"), value))
        .filter(|(name, _)| SCORES.contains(&&**name))
        .collect();
    // In the order of `TextEvaluation`, so that a group of all rows is drawn as all rows are.
    let names: BTreeSet<&str> = places.iter().map(|at| &*labels[*at].study).collect();
    let studies: BTreeMap<&str, usize> = names.into_iter().zip(0..).collect();
    let rouge: Vec<(usize, f64)> = places
        .iter()
        .map(|at| (studies[&*labels[*at].study], 100.0 * reviews[*at].rouge_l))
        .collect();
    let mean = |times: &[f64]| {
        let [mut sum, mut count] = [0.0; 2];
        for (study, value) in &rouge {
            sum += times[*study] * value;
            count += times[*study];
        }
        vec![sum / count]
    };
    let of_text = settings.bootstrap.intervals(studies.len(), mean)?;
    scores.extend(
        of_text
            .into_iter()
            .map(|one| ("characters.rouge_l".to_owned(), one)),
    );
    if places.len() < FEW {
        for (_, score) in &mut scores {
            (score.low, score.high) = (f64::NAN, f64::NAN);
        }
    }
    Ok(NamedValues(scores))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let owned = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        owned.collect()
    }

    #[test]
    fn known_names_are_found_and_ages_become_bands() {
        let rows = [
            row(&[("PatientAge", "063Y"), ("View_Position", "PA"), ("id", "1")]),
            row(&[("PatientAge", "10M"), ("View_Position", "AP"), ("id", "2")]),
            row(&[("PatientAge", "?"), ("View_Position", "PA"), ("sex", "F")]),
        ];
        let rows: Vec<_> = rows.iter().collect();
        let found = divide(&rows, &[]).unwrap();
        let keys: Vec<&str> = found.iter().map(|one| one.key.as_str()).collect();
        // One sex divides nothing.
        assert_eq!(keys, ["View_Position", "PatientAge"]);
        let ages = [Some("40–64"), Some("0–17"), None].map(|age| age.map(str::to_owned));
        assert_eq!(found[1].values, ages);
        assert!(
            found[0]
                .told()
                .is_some_and(|told| told.contains("View_Position"))
        );
        for (text, expected) in [
            ("17.9", "0–17"),
            ("18", "18–39"),
            ("65岁", "65+"),
            ("40", "40–64"),
        ] {
            assert_eq!(band(text).as_deref(), Some(expected), "{text}");
        }
        assert_eq!((band("old"), band("4 of 5")), (None, None));
    }

    #[test]
    fn a_named_key_has_to_be_there_and_to_have_few_values() {
        let rows: Vec<_> = (0..30)
            .map(|at| row(&[("id", &at.to_string()), ("ward", "a")]))
            .collect();
        let rows: Vec<_> = rows.iter().collect();
        assert_eq!(divide(&rows, &["ward".into()]).unwrap()[0].told(), None);
        let error = divide(&rows, &["view".into()]).unwrap_err().to_string();
        assert!(
            error.contains("`view`") && error.contains("`id`, `ward`"),
            "{error}"
        );
        let error = divide(&rows, &["id".into()]).unwrap_err().to_string();
        assert!(error.contains("30 values"), "{error}");
    }
}
