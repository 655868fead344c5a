//! The range of numbers that is shown where a file names none.

/// Share of pixels below and above the range.
const PERCENTILES: (f64, f64) = (0.01, 0.99);

/// The values between which nearly all of `total` are; if these are one, the lowest and highest value.
///
/// `at_rank` gives the value of a rank, counted from 0 at the lowest. Between ranks as numpy's `percentile`.
pub(super) fn shown_range(total: usize, mut at_rank: impl FnMut(usize) -> f64) -> (f64, f64) {
    if total == 0 {
        return (0.0, 0.0);
    }
    let mut percentile = |share: f64| {
        let rank = share * (total - 1) as f64;
        let (below, part) = (rank.floor(), rank.fract());
        let (low, high) = (at_rank(below as usize), at_rank(rank.ceil() as usize));
        low + (high - low) * part
    };
    let (low, high) = (percentile(PERCENTILES.0), percentile(PERCENTILES.1));
    if low < high {
        (low, high)
    } else {
        (percentile(0.0), percentile(1.0))
    }
}

/// A share of the range shown as one of 8 bits.
pub(super) fn level(share: f64) -> u8 {
    (share.clamp(0.0, 1.0) * 255.0).round() as u8
}
