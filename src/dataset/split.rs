//! Which rows are held out for validation.

use std::collections::{BTreeMap, BTreeSet};

use super::python_random::PythonRandom;
use crate::study::counted;

/// How many rows are wanted for validation: `ratio` of `rows`, and at least one if it is above 0.
pub(super) fn wanted(rows: usize, ratio: f64) -> Result<usize, String> {
    let wanted = if ratio > 0.0 {
        ((rows as f64 * ratio) as usize).max(1)
    } else {
        0
    };
    if wanted >= rows {
        return Err(format!(
            "validation would take all of {}",
            counted(rows, "row", "rows")
        ));
    }
    Ok(wanted)
}

/// Whether each row is held out, whole groups at a time: `groups` holds a number a row, equal for rows that belong
/// together.
///
/// # Errors
/// In words, if every group would be taken.
pub(super) fn hold_out(
    groups: &[usize],
    ratio: f64,
    random: &mut PythonRandom,
) -> Result<Vec<bool>, String> {
    let wanted = wanted(groups.len(), ratio)?;
    if wanted == 0 {
        return Ok(vec![false; groups.len()]);
    }
    let mut sizes: BTreeMap<usize, usize> = BTreeMap::new();
    for group in groups {
        *sizes.entry(*group).or_default() += 1;
    }
    let mut order: Vec<usize> = sizes.keys().copied().collect();
    random.shuffle(&mut order);
    let mut chosen = BTreeSet::new();
    let mut taken = 0;
    for group in order {
        if taken >= wanted {
            break;
        }
        taken += sizes[&group];
        chosen.insert(group);
    }
    if chosen.len() == sizes.len() {
        return Err(format!(
            "validation would take all of {}",
            counted(sizes.len(), "study or patient", "studies or patients")
        ));
    }
    Ok(groups.iter().map(|group| chosen.contains(group)).collect())
}
