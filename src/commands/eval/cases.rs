//! Predictions and test sets brought together.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};

use crate::{
    dataset::{Dataset, SampleText},
    eval::{
        cases::{Case, WrittenReport},
        caveat::Caveat,
        predictions::{Prediction, REFERENCE_KEYS},
    },
    processor::message::split_thinking,
    study::{STUDY_KEYS, StudyFacts, StudyRow, StudyRule, counted},
};

/// The cases to score, and where each comes from.
#[derive(Debug, Clone, Default)]
pub(super) struct TestSet {
    pub(super) cases: Vec<Case>,
    /// Row of the data set, from 0; `None` where the prediction holds its reference.
    pub(super) rows: Vec<Option<usize>>,
    /// Image files as the prediction names them.
    pub(super) images: Vec<Vec<PathBuf>>,
    /// What each says of its study.
    pub(super) of: Vec<StudyRow>,
}

impl TestSet {
    /// All samples of a data set.
    pub(super) fn of(data: &Dataset) -> Result<Self> {
        let mut set = Self::default();
        for row in 0..data.len() {
            let text = data.text(row);
            set.cases.push(case_of_row(data, row, &text)?);
            set.images.push(text.images);
            set.rows.push(Some(row));
            set.of.push(data.study_row(row));
        }
        Ok(set)
    }

    /// Gives each case its study.
    pub(super) fn find_studies(
        &mut self,
        rule: &StudyRule,
        warnings: &mut Vec<Caveat>,
    ) -> Result<StudyFacts> {
        let studies = rule.studies(&self.of)?;
        for (case, study) in self.cases.iter_mut().zip(studies.ids) {
            case.study = study;
        }
        let doubts = studies.doubts.iter();
        warnings.extend(doubts.map(|doubt| Caveat::new(doubt.chinese(), doubt.english())));
        Ok(studies.facts)
    }

    pub(super) fn truncate(&mut self, most: usize) {
        self.cases.truncate(most);
        self.rows.truncate(most);
        self.images.truncate(most);
        self.of.truncate(most);
    }

    /// Rows of the data set, one a case.
    pub(super) fn data_rows(&self) -> Result<Vec<usize>> {
        let rows: Option<Vec<usize>> = self.rows.iter().copied().collect();
        match rows {
            Some(rows) => Ok(rows),
            None => bail!("the predictions are not joined with a data set; name it with --data"),
        }
    }
}

fn case_of_row(data: &Dataset, row: usize, text: &SampleText) -> Result<Case> {
    let Some(answer) = &text.answer else {
        bail!(
            "{}: the last question has no answer; expected the true report as the last message",
            data.study_row(row).name
        );
    };
    Ok(Case {
        // Found later, from all rows together.
        study: String::new(),
        name: text.name.clone(),
        question: text.question.clone(),
        truth: split_thinking(answer, false).1,
    })
}

/// The true reports of a training set, in its order.
pub(super) fn reports(data: &Dataset) -> Result<Vec<String>> {
    (0..data.len())
        .map(|row| {
            let text = data.text(row);
            Ok(case_of_row(data, row, &text)?.truth)
        })
        .collect()
}

/// Warns if a study or a patient of the test set is in the training set.
pub(super) fn warn_of_leaks(
    set: &TestSet,
    train: Option<&Dataset>,
    rule: &StudyRule,
    warnings: &mut Vec<Caveat>,
) -> Result<()> {
    let Some(train) = train else {
        return Ok(());
    };
    // Together, so that a guess is the same on both sides.
    let mut rows = set.of.clone();
    rows.extend((0..train.len()).map(|row| train.study_row(row)));
    let studies = rule.studies(&rows)?;
    let (test, seen) = (0..set.of.len(), set.of.len()..rows.len());
    // Predictions without data set may name the same images by other folders.
    let by_name = set.rows.iter().any(Option::is_none);
    let study = |at: usize| {
        if by_name {
            &studies.names[at]
        } else {
            &studies.ids[at]
        }
    };
    let seen_studies: HashSet<&String> = seen.clone().map(study).collect();
    let seen_patients: HashSet<&String> = seen
        .filter_map(|at| studies.patients[at].as_ref())
        .collect();
    let leaks = |at: &usize| {
        let patient = studies.patients[*at].as_ref();
        seen_studies.contains(study(*at)) || patient.is_some_and(|one| seen_patients.contains(one))
    };
    let leaked: Vec<usize> = test.filter(leaks).collect();
    if let Some(first) = leaked.first() {
        let name = &set.cases[*first].name;
        warnings.push(Caveat::new(
            format!(
                "测试集中 {} 份报告的检查或患者也在训练集中，例如 `{name}`：分数与基线不可信",
                leaked.len()
            ),
            format!(
                "{} of studies or patients of the training set, the first `{name}`: scores and baselines are not to be believed",
                counted(leaked.len(), "report is", "reports are")
            ),
        ));
    }
    let named = |row: &StudyRow| STUDY_KEYS.iter().any(|key| row.keys.contains_key(*key));
    let (test_named, train_named) = (
        set.of.iter().any(named),
        rows[set.of.len()..].iter().any(named),
    );
    if test_named != train_named && !rule.is_given() {
        warnings.push(Caveat::new(
            "测试集和训练集只有一方用键写明检查：无法确定是否有检查同时在两方",
            "only one of test set and training set names its studies by a key: whether a study is in both cannot be told; hint: `--study-regex` or `--study-key`",
        ));
    }
    Ok(())
}

/// The base names of a list of images, by which predictions and rows find each other.
pub(super) fn key_of<'a>(images: impl IntoIterator<Item = &'a str>) -> String {
    let base = |image: &'a str| image.rsplit(['/', '\\']).next().unwrap_or(image);
    let names: Vec<&str> = images.into_iter().map(base).collect();
    names.join(";")
}

/// Rows of a data set by the base names of their images.
fn rows_by_image(data: &Dataset) -> Result<HashMap<String, usize>> {
    let mut rows = HashMap::new();
    for row in 0..data.len() {
        let key = key_of(data.text(row).name.split(';'));
        if let Some(other) = rows.insert(key.clone(), row) {
            bail!(
                "`{}`: rows {} and {} have images of the same name, `{key}`; predictions cannot be told apart",
                data.name(),
                other + 1,
                row + 1
            );
        }
    }
    Ok(rows)
}

/// Row of the data set for each prediction: by the names of its images, else by order.
fn find_rows(path: &Path, predictions: &[Prediction], data: &Dataset) -> Result<Vec<usize>> {
    if predictions.iter().all(|one| one.images.is_empty()) {
        if predictions.len() != data.len() {
            bail!(
                "`{}` names no images and has {} rows, `{}` has {}; expected an `image` in each row, or as many rows",
                path.display(),
                predictions.len(),
                data.name(),
                data.len()
            );
        }
        return Ok((0..data.len()).collect());
    }
    let rows = rows_by_image(data)?;
    predictions
        .iter()
        .map(|one| {
            let key = key_of(one.images.iter().map(String::as_str));
            match rows.get(&key) {
                Some(row) => Ok(*row),
                None => bail!(
                    "`{}` row {}: no row of `{}` has the image `{key}`",
                    path.display(),
                    one.row,
                    data.name()
                ),
            }
        })
        .collect()
}

/// As [`find_rows`], each row once; warns where rows have no prediction.
fn distinct_rows(
    path: &Path,
    predictions: &[Prediction],
    data: &Dataset,
    warnings: &mut Vec<Caveat>,
) -> Result<Vec<usize>> {
    let rows = find_rows(path, predictions, data)?;
    let mut seen: BTreeMap<usize, usize> = BTreeMap::new();
    for (one, row) in predictions.iter().zip(&rows) {
        if let Some(first) = seen.insert(*row, one.row) {
            bail!(
                "`{}`: rows {first} and {} are about the same image, `{}`; expected one prediction each",
                path.display(),
                one.row,
                one.name()
            );
        }
    }
    if rows.len() < data.len() {
        warnings.push(Caveat::new(
            format!("测试集 {} 份中只有 {} 份有预测", data.len(), rows.len()),
            format!(
                "only {} of {} of the test set have a prediction",
                rows.len(),
                counted(data.len(), "report", "reports")
            ),
        ));
    }
    Ok(rows)
}

/// Warns of predictions that failed, are empty, or hold no Chinese.
fn warn_of_odd_answers(predictions: &[Prediction], warnings: &mut Vec<Caveat>) {
    let failed = predictions.iter().filter(|one| one.error.is_some());
    if let Some(first) = failed.clone().next() {
        warnings.push(Caveat::new(
            format!(
                "{} 份预测失败，按空回答计，第一份在第 {} 行",
                failed.clone().count(),
                first.row
            ),
            format!(
                "{} and count as empty answers, the first in row {}: {}",
                counted(failed.count(), "prediction failed", "predictions failed"),
                first.row,
                first.error.as_deref().unwrap_or_default()
            ),
        ));
    }
    let empty = predictions
        .iter()
        .filter(|one| one.error.is_none() && one.answer.is_empty());
    if let Some(first) = empty.clone().next() {
        warnings.push(Caveat::new(
            format!(
                "{} 份回答为空（空白、null 等），既不算正常也不算异常，第一份在第 {} 行",
                empty.clone().count(),
                first.row
            ),
            format!(
                "{} (white space, null and the like) and count as neither normal nor abnormal, the first in row {}",
                counted(empty.count(), "answer is empty", "answers are empty"),
                first.row
            ),
        ));
    }
    let is_chinese = |text: &str| text.chars().any(|c| ('\u{3400}'..='\u{9fff}').contains(&c));
    let foreign = predictions
        .iter()
        .filter(|one| !one.answer.is_empty() && !is_chinese(&one.answer));
    if let Some(first) = foreign.clone().next() {
        warnings.push(Caveat::new(
            format!(
                "{} 份回答没有汉字，读不出所见，第一份在第 {} 行",
                foreign.clone().count(),
                first.row
            ),
            format!(
                "{} no Chinese, and no finding is read from them, the first in row {}",
                counted(foreign.count(), "answer holds", "answers hold"),
                first.row
            ),
        ));
    }
}

/// Puts predictions beside their references: those of the data set where there is one, else their own.
pub(super) fn join(
    path: &Path,
    predictions: Vec<Prediction>,
    data: Option<&Dataset>,
    warnings: &mut Vec<Caveat>,
) -> Result<(TestSet, Vec<WrittenReport>)> {
    warn_of_odd_answers(&predictions, warnings);
    let mut set = TestSet::default();
    let mut written = Vec::new();
    let rows = match data {
        Some(data) => {
            let rows = distinct_rows(path, &predictions, data, warnings)?;
            rows.into_iter().map(Some).collect()
        }
        None => vec![None; predictions.len()],
    };
    for (one, row) in predictions.into_iter().zip(rows) {
        set.of.push(study_row(path, &one, data.zip(row)));
        let case = match (data, row, &one.reference) {
            (Some(data), Some(row), _) => case_of_row(data, row, &data.text(row))?,
            (_, _, Some(truth)) => Case {
                study: String::new(),
                name: one.name(),
                question: String::new(),
                truth: truth.clone(),
            },
            _ => bail!(
                "`{}` row {}: no reference; expected the true report under one of `{}`, or the test set in --data",
                path.display(),
                one.row,
                REFERENCE_KEYS.join("`, `")
            ),
        };
        let images = match (data, row) {
            (Some(data), Some(row)) => data.text(row).images,
            _ => one.images.iter().map(PathBuf::from).collect(),
        };
        set.cases.push(case);
        set.rows.push(row);
        set.images.push(images);
        written.push(WrittenReport {
            answer: one.answer,
            thinking: one.thinking,
        });
    }
    Ok((set, written))
}

/// What a prediction says of its study; the row of the data set counts where there is one.
fn study_row(path: &Path, one: &Prediction, data: Option<(&Dataset, usize)>) -> StudyRow {
    let Some((data, row)) = data else {
        return StudyRow {
            name: format!("`{}` row {}", path.display(), one.row),
            keys: one.keys.clone(),
            images: one.images.clone(),
            folder: String::new(),
        };
    };
    let mut found = data.study_row(row);
    if !STUDY_KEYS.iter().any(|key| found.keys.contains_key(*key)) {
        for (key, value) in &one.keys {
            found
                .keys
                .entry(key.clone())
                .or_insert_with(|| value.clone());
        }
    }
    found
}

/// Another run's answers in the order of the cases.
pub(super) fn align(
    path: &Path,
    predictions: Vec<Prediction>,
    set: &TestSet,
    data: Option<&Dataset>,
) -> Result<Vec<WrittenReport>> {
    let mut warnings = Vec::new();
    let (other, written) = join(path, predictions, data, &mut warnings)?;
    for warning in warnings {
        eprintln!("note: `{}`: {}", path.display(), warning.english);
    }
    let key = |case: &Case| key_of(case.name.split(';'));
    let mut by_name: HashMap<String, Vec<usize>> = HashMap::new();
    for (at, case) in other.cases.iter().enumerate().rev() {
        by_name.entry(key(case)).or_default().push(at);
    }
    let texts = set.cases.iter().map(|case| {
        let Some(at) = by_name.get_mut(&key(case)).and_then(Vec::pop) else {
            bail!(
                "`{}` has no answer about `{}`; expected both runs on the same test set",
                path.display(),
                case.name
            );
        };
        if other.cases[at].truth != case.truth {
            bail!(
                "`{}`: the reference of `{}` is another one; expected both runs on the same test set",
                path.display(),
                case.name
            );
        }
        Ok(written[at].clone())
    });
    texts.collect()
}
