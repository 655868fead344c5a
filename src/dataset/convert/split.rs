//! Which rows are for validation.

use std::collections::{BTreeMap, BTreeSet};

use super::corpus::study_of;
use super::python_random::PythonRandom;
use super::{ConvertError, ConvertOptions, Split, Usable};

/// Number of the study of each row. A row with images of two studies makes them one.
pub(super) fn studies(rows: &[Usable]) -> Vec<usize> {
    let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
    // The study each study was joined to; itself if to none.
    let mut joined: Vec<usize> = Vec::new();
    let mut first = Vec::with_capacity(rows.len());
    for usable in rows {
        let mut of_row = None;
        for image in &usable.row.images {
            let number = *numbers.entry(study_of(image)).or_insert_with(|| {
                joined.push(joined.len());
                joined.len() - 1
            });
            let own = root(&joined, number);
            let other = root(&joined, *of_row.get_or_insert(number));
            joined[own.max(other)] = own.min(other);
        }
        first.extend(of_row);
    }
    first.iter().map(|study| root(&joined, *study)).collect()
}

fn root(joined: &[usize], mut study: usize) -> usize {
    while joined[study] != study {
        study = joined[study];
    }
    study
}

/// Whether each row is for validation.
pub(super) fn choose(
    options: &ConvertOptions,
    random: &mut PythonRandom,
    studies: &[usize],
) -> Result<Vec<bool>, ConvertError> {
    let rows = studies.len();
    let wanted = if options.val_ratio > 0.0 {
        ((rows as f64 * options.val_ratio) as usize).max(1)
    } else {
        0
    };
    if wanted >= rows {
        let reason = format!("validation would take all of {rows} rows");
        return Err(ConvertError::CannotSplit(reason));
    }
    if wanted == 0 || options.split == Split::Image {
        return Ok((0..rows).map(|index| index < wanted).collect());
    }
    let mut sizes: BTreeMap<usize, usize> = BTreeMap::new();
    for study in studies {
        *sizes.entry(*study).or_default() += 1;
    }
    let mut order: Vec<usize> = sizes.keys().copied().collect();
    random.shuffle(&mut order);
    let mut chosen = BTreeSet::new();
    let mut taken = 0;
    for study in order {
        if taken >= wanted {
            break;
        }
        taken += sizes[&study];
        chosen.insert(study);
    }
    if chosen.len() == sizes.len() {
        let reason = format!("validation would take all of {} studies", sizes.len());
        return Err(ConvertError::CannotSplit(reason));
    }
    Ok(studies.iter().map(|study| chosen.contains(study)).collect())
}
