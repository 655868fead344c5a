//! Predictions and test sets brought together.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};

use crate::{
    dataset::{Dataset, SampleText},
    evaluate::predictions::{Prediction, study_of},
    evaluation::{Case, Written},
    processor::message::split_thinking,
};

/// The cases to score, and where each comes from.
#[derive(Debug, Clone, Default)]
pub(super) struct TestSet {
    pub(super) cases: Vec<Case>,
    /// Row of the data set, from 0; `None` where the prediction holds its reference.
    pub(super) rows: Vec<Option<usize>>,
    /// Image files as the prediction names them.
    pub(super) images: Vec<Vec<PathBuf>>,
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
        }
        Ok(set)
    }

    pub(super) fn truncate(&mut self, most: usize) {
        self.cases.truncate(most);
        self.rows.truncate(most);
        self.images.truncate(most);
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

/// Study of a row, if its images name it.
pub(super) fn study_of_row(data: &Dataset, row: usize) -> Option<String> {
    let text = data.text(row);
    Some(study_of(&text.images.first()?.to_string_lossy()))
}

fn case_of_row(data: &Dataset, row: usize, text: &SampleText) -> Result<Case> {
    let Some(answer) = &text.answer else {
        bail!(
            "`{}`, row {}: the last question has no answer; expected the true report as the last message",
            data.name(),
            row + 1
        );
    };
    let study = match text.images.first() {
        Some(image) => study_of(&image.to_string_lossy()),
        None => text.name.clone(),
    };
    Ok(Case {
        study,
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

/// Warns if a study of the test set is in the training set.
pub(super) fn warn_of_leaks(set: &TestSet, train: Option<&Dataset>, warnings: &mut Vec<String>) {
    let Some(train) = train else {
        return;
    };
    let seen = super::studies(train);
    let leaked = set.cases.iter().filter(|case| seen.contains(&case.study));
    let leaked: Vec<&Case> = leaked.collect();
    if let Some(first) = leaked.first() {
        warnings.push(format!(
            "测试集中 {} 份报告的检查也在训练集中，例如 `{}`：分数与基线不可信 ({} reports are of studies of the training set: scores and baselines are not to be believed)",
            leaked.len(),
            first.name,
            leaked.len()
        ));
    }
}

/// The base names of a list of images, by which predictions and rows find each other.
fn key_of<'a>(images: impl IntoIterator<Item = &'a str>) -> String {
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

/// Puts predictions beside their references: those of the data set where there is one, else their own.
pub(super) fn join(
    path: &Path,
    predictions: Vec<Prediction>,
    data: Option<&Dataset>,
    warnings: &mut Vec<String>,
) -> Result<(TestSet, Vec<Written>)> {
    let failed = predictions.iter().filter(|one| one.error.is_some());
    if let Some(first) = failed.clone().next() {
        warnings.push(format!(
            "{} 份预测失败，按空报告计，第一份在第 {} 行 ({} predictions failed and count as empty reports, the first in row {}: {})",
            failed.clone().count(),
            first.row,
            failed.count(),
            first.row,
            first.error.as_deref().unwrap_or_default()
        ));
    }
    let mut set = TestSet::default();
    let mut written = Vec::new();
    let rows = match data {
        Some(data) => {
            let rows = find_rows(path, &predictions, data)?;
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
                warnings.push(format!(
                    "测试集 {} 份中只有 {} 份有预测 (only {} of {} reports of the test set have a prediction)",
                    data.len(),
                    rows.len(),
                    rows.len(),
                    data.len()
                ));
            }
            rows.into_iter().map(Some).collect()
        }
        None => vec![None; predictions.len()],
    };
    for (one, row) in predictions.into_iter().zip(rows) {
        let case = match (data, row, &one.reference) {
            (Some(data), Some(row), _) => case_of_row(data, row, &data.text(row))?,
            (_, _, Some(truth)) => Case {
                study: one.study_name(),
                name: one.name(),
                question: String::new(),
                truth: truth.clone(),
            },
            _ => bail!(
                "`{}` row {}: no reference; expected the true report under one of `{}`, or the test set in --data",
                path.display(),
                one.row,
                crate::evaluate::predictions::REFERENCE_KEYS.join("`, `")
            ),
        };
        let images = match (data, row) {
            (Some(data), Some(row)) => data.text(row).images,
            _ => one.images.iter().map(PathBuf::from).collect(),
        };
        set.cases.push(case);
        set.rows.push(row);
        set.images.push(images);
        written.push(Written {
            answer: one.answer,
            thinking: one.thinking,
        });
    }
    Ok((set, written))
}

/// Another run's answers in the order of the cases.
pub(super) fn align(
    path: &Path,
    predictions: Vec<Prediction>,
    set: &TestSet,
    data: Option<&Dataset>,
) -> Result<Vec<Written>> {
    let mut warnings = Vec::new();
    let (other, written) = join(path, predictions, data, &mut warnings)?;
    for warning in warnings {
        eprintln!("note: `{}`: {warning}", path.display());
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
