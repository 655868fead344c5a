//! Numbers with a sign, fractions, and numbers of many bits as grey levels.
//!
//! They have no range of their own, so they are shown as DICOM without a window is: from the 1st to the 99th
//! percentile, with a remark.

use crate::processor::percentiles;
use crate::processor::remark::{Remark, RemarkKind};

/// Grey levels of `values`; `inverted` where the lowest is white. A remark says which range is shown.
pub(super) fn levels(values: &[f64], inverted: bool, remarks: &mut Vec<Remark>) -> Vec<u8> {
    let mut finite: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    let missing = values.len() - finite.len();
    let total = finite.len();
    let (low, high) = percentiles::shown_range(total, |rank| {
        let (_, value, _) = finite.select_nth_unstable_by(rank, f64::total_cmp);
        *value
    });
    let span = if high > low { high - low } else { 1.0 };
    let mut text = format!(
        "its levels state no range; the 1st to 99th percentile, {} to {}, is shown",
        short(low),
        short(high)
    );
    if missing > 0 {
        text += &format!("; {missing} of its pixels are no numbers and are shown black");
    }
    remarks.push(Remark::new(RemarkKind::PercentileRange, text));
    let level = |value: &f64| {
        if !value.is_finite() {
            return 0;
        }
        let level = percentiles::level((value - low) / span);
        if inverted { 255 - level } else { level }
    };
    values.iter().map(level).collect()
}

/// A number in few digits.
fn short(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e9 {
        format!("{value}")
    } else if value.abs() >= 1e-3 && value.abs() < 1e9 {
        format!("{value:.3}")
    } else {
        format!("{value:.3e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_is_that_of_the_percentiles_and_is_remarked_on() {
        let mut values: Vec<f64> = (-500..=500).map(f64::from).collect();
        values.push(f64::NAN);
        let mut remarks = Vec::new();
        let shown = levels(&values, false, &mut remarks);
        // numpy.percentile(range(-500, 501), [1, 99]) is -490, 490.
        assert_eq!((shown[10], shown[500], shown[990]), (0, 128, 255));
        assert_eq!((shown[0], shown[1000], shown[1001]), (0, 255, 0));
        assert_eq!(
            remarks[0].text(),
            "its levels state no range; the 1st to 99th percentile, -490 to 490, is shown; \
             1 of its pixels are no numbers and are shown black"
        );
        let inverted = levels(&values, true, &mut remarks);
        assert_eq!((inverted[10], inverted[990]), (255, 0));
        assert_eq!(levels(&[f64::NAN; 3], false, &mut remarks), [0; 3]);
        assert_eq!(levels(&[7.5; 3], false, &mut remarks), [0; 3]);
    }
}
