//! Probabilities of findings brought together with the cases of a test set.

use std::{collections::HashMap, path::Path};

use anyhow::{Result, bail};

use super::{
    args::EvalArgs,
    cases::{TestSet, key_of},
};
use crate::{
    eval::{
        caveat::Caveat,
        probability::{
            evaluation::CaseProbabilities,
            read::{ProbabilityRow, read_probabilities},
        },
    },
    study::counted,
};

/// The probabilities of each case: those of the file that was named, else those of the predictions; `None` where
/// there are none.
///
/// # Errors
/// A file that cannot be read, that has no probability, or that names another set of images.
pub(super) fn find(
    args: &EvalArgs,
    set: &TestSet,
    warnings: &mut Vec<Caveat>,
) -> Result<Option<Vec<CaseProbabilities>>> {
    let found = match (&args.probabilities, &args.predictions) {
        (Some(path), _) => {
            let rows = read_probabilities(path)?;
            if rows.iter().all(|row| row.findings.is_empty()) {
                bail!(
                    "`{}` has no probability of a finding; expected the file that `infer --findings --output` writes",
                    path.display()
                );
            }
            by_image(path, rows, set)?
        }
        // Cases are the rows of the predictions, in their order.
        (None, Some(path)) => {
            let rows = read_probabilities(path)?;
            let found = rows.into_iter().take(set.cases.len());
            found.map(of_row).collect()
        }
        (None, None) => return Ok(None),
    };
    let missing = found.iter().filter(|case| case.findings.is_empty()).count();
    if missing == found.len() {
        return Ok(None);
    }
    if missing > 0 {
        warnings.push(Caveat::new(
            format!("{missing} 份没有所见概率，不计入概率的分数"),
            format!(
                "{} no probabilities of findings and {} left out of their scores",
                counted(missing, "report has", "reports have"),
                if missing == 1 { "is" } else { "are" }
            ),
        ));
    }
    let uncalibrated = found.iter().filter(|case| !case.calibrated).count();
    if uncalibrated > 0 {
        warnings.push(Caveat::new(
            format!("{uncalibrated} 份的所见概率没有校准"),
            format!(
                "the probabilities of {} are not calibrated",
                counted(uncalibrated, "report", "reports")
            ),
        ));
    }
    Ok(Some(found))
}

/// The probabilities of another run, in the order of the cases; `None` where it has none.
///
/// # Errors
/// As [`find`].
pub(super) fn of_other(path: &Path, set: &TestSet) -> Result<Option<Vec<CaseProbabilities>>> {
    let rows = read_probabilities(path)?;
    if rows.iter().all(|row| row.findings.is_empty()) {
        return Ok(None);
    }
    let found = by_image(path, rows, set)?;
    let without = found.iter().filter(|case| case.findings.is_empty()).count();
    if without > 0 {
        eprintln!(
            "note: `{}`: {} no probabilities of findings",
            path.display(),
            counted(without, "report has", "reports have")
        );
    }
    Ok(Some(found))
}

fn of_row(row: ProbabilityRow) -> CaseProbabilities {
    CaseProbabilities {
        calibrated: row.calibrated,
        findings: row.findings,
    }
}

/// Rows in the order of the cases: by the names of their images, else by order.
fn by_image(
    path: &Path,
    rows: Vec<ProbabilityRow>,
    set: &TestSet,
) -> Result<Vec<CaseProbabilities>> {
    if rows.iter().all(|row| row.images.is_empty()) {
        if rows.len() != set.cases.len() {
            bail!(
                "`{}` names no images and has {} rows, the test set has {}; expected an `image` in each row, or as many rows",
                path.display(),
                rows.len(),
                set.cases.len()
            );
        }
        return Ok(rows.into_iter().map(of_row).collect());
    }
    let mut by_name: HashMap<String, ProbabilityRow> = HashMap::new();
    for row in rows {
        let key = key_of(row.images.iter().map(String::as_str));
        let number = row.row;
        if let Some(other) = by_name.insert(key.clone(), row) {
            bail!(
                "`{}`: rows {} and {number} are about the same image, `{key}`; expected one each",
                path.display(),
                other.row
            );
        }
    }
    let found: Vec<Option<ProbabilityRow>> = set
        .cases
        .iter()
        .map(|case| by_name.remove(&key_of(case.name.split(';'))))
        .collect();
    if found.iter().all(Option::is_none) {
        bail!(
            "`{}` is about none of the images of the test set, the first of which is `{}`",
            path.display(),
            set.cases.first().map_or("", |case| &case.name)
        );
    }
    let found = found.into_iter();
    Ok(found
        .map(|row| row.map(of_row).unwrap_or_default())
        .collect())
}
