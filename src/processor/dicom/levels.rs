//! Stored grey numbers to 8 bits: modality, window or table, percentiles, polarity.
//!
//! The level of each number that there can be, or that occurs, is computed once. With `x` a stored number
//! after its sign:
//!
//! 1. modality: the Modality LUT, or `slope · x + intercept`;
//! 2. of interest: the first VOI LUT; or the first window by its function; or, where the file has
//!    neither and more than 8 bits, the 1st to 99th percentile of the picture; 8-bit pictures
//!    without a window are shown whole, as they were made to be looked at; a table or window that
//!    shows all pixels as one level is passed over with a remark;
//! 3. the range of step 2 on 0 to 255, rounded; inverted for `MONOCHROME1`, or as Presentation
//!    LUT Shape says.
//!
//! Source: PS3.3, C.11.1 and C.11.2. A table has precedence over a window where a file has both, as in
//! pydicom's `apply_voi_lut`.

use dicom_dictionary_std::tags;

use super::error::DicomError;
use super::header::{Header, Photometric};
use super::reader::{DataSet, StoredTable};
use crate::processor::percentiles::{level, shown_range};
use crate::processor::remark::{Remark, RemarkKind};

/// The numbers that a picture may hold, and how often each occurs.
pub(super) struct Histogram {
    /// In rising order, without their sign.
    pub(super) numbers: Vec<u32>,
    /// Padding around the picture does not count.
    counts: Vec<usize>,
}

impl Histogram {
    /// Of numbers with 16 bits at most: all that there can be, so that a number is its own place.
    pub(super) fn of_all(header: &Header, set: &DataSet<'_>, numbers: &[u16]) -> Self {
        Self {
            numbers: (0..=header.mask()).collect(),
            counts: counts(header, set, numbers),
        }
    }

    /// Of numbers with more bits: those that occur.
    pub(super) fn of_occurring(numbers: &[u32]) -> Self {
        let mut sorted = numbers.to_vec();
        sorted.sort_unstable();
        let runs = sorted.chunk_by(|a, b| a == b);
        let (numbers, counts) = runs.map(|run| (run[0], run.len())).unzip();
        Self { numbers, counts }
    }

    /// The place of `number` among those that occur.
    pub(super) fn place(&self, number: u32) -> usize {
        self.numbers.binary_search(&number).unwrap_or(0)
    }
}

/// The grey level of each number of `histogram`; remarks on them are added to `remarks`.
///
/// # Errors
/// A rescale or table that gives no picture.
pub(super) fn levels(
    header: &Header,
    set: &DataSet<'_>,
    histogram: &Histogram,
    remarks: &mut Vec<Remark>,
) -> Result<Vec<u8>, DicomError> {
    let modality = Modality::new(header, set)?;
    let Histogram { numbers, counts } = histogram;
    let values: Vec<f64> = numbers
        .iter()
        .map(|number| modality.apply(*number))
        .collect();
    let table = LevelTable::new(set.voi_table.as_ref(), values_signed(&values))?;
    let (name, chosen): (_, Option<Vec<f64>>) = if let Some(table) = table {
        let shares = values.iter().map(|value| table.share(*value));
        ("table of levels", Some(shares.collect()))
    } else {
        let window = LevelWindow::new(set, remarks);
        let shares =
            |window: LevelWindow| values.iter().map(|value| window.share(*value)).collect();
        ("window", window.map(shares))
    };
    let hides_all = chosen
        .as_ref()
        .is_some_and(|shares| hides_all(shares, counts));
    if hides_all {
        remarks.push(Remark::new(
            RemarkKind::WindowOutsideRange,
            format!("its {name} shows all its pixels black, or all white; {WITHOUT_WINDOW}"),
        ));
    }
    let shown = chosen.filter(|_| !hides_all).unwrap_or_else(|| {
        let (low, high) = if header.stored <= 8 && !modality.is_table() && !hides_all {
            modality.range(header)
        } else {
            percentiles(&values, counts)
        };
        let span = if high > low { high - low } else { 1.0 };
        values.iter().map(|value| (value - low) / span).collect()
    });
    let inverted = is_inverted(header, set, remarks);
    let level = |share: f64| {
        let level = level(share);
        if inverted { 255 - level } else { level }
    };
    Ok(shown.into_iter().map(level).collect())
}

/// The values of a film and its first window, for a viewer with a window of its own.
pub(super) struct Scale {
    /// Of each number of the histogram: after the modality's rescale and, where the file has one, its table of levels.
    pub(super) values: Vec<f64>,
    /// Width and centre.
    pub(super) window: (f64, f64),
    pub(super) inverted: bool,
}

/// The scale of a film; a window that hides everything gives way to the percentiles, as in [`levels`].
///
/// # Errors
/// As [`levels`].
pub(super) fn scale(
    header: &Header,
    set: &DataSet<'_>,
    histogram: &Histogram,
) -> Result<Scale, DicomError> {
    let mut remarks = Vec::new();
    let modality = Modality::new(header, set)?;
    let Histogram { numbers, counts } = histogram;
    let mut values: Vec<f64> = numbers
        .iter()
        .map(|number| modality.apply(*number))
        .collect();
    let table = LevelTable::new(set.voi_table.as_ref(), values_signed(&values))?;
    let chosen = match &table {
        Some(table) => {
            values = values.iter().map(|value| table.value(*value)).collect();
            let high = table.highest();
            Some((high, high / 2.0))
        }
        None => LevelWindow::new(set, &mut remarks).map(|window| (window.width, window.center)),
    };
    let hidden = |(width, center): &(f64, f64)| {
        let low = center - width / 2.0;
        let shares: Vec<f64> = values.iter().map(|value| (value - low) / width).collect();
        hides_all(&shares, counts)
    };
    let window = chosen.filter(|window| !hidden(window)).unwrap_or_else(|| {
        let (low, high) = match header.stored <= 8 && !modality.is_table() && chosen.is_none() {
            true => modality.range(header),
            false => percentiles(&values, counts),
        };
        ((high - low).max(1.0), f64::midpoint(low, high))
    });
    Ok(Scale {
        values,
        window,
        inverted: is_inverted(header, set, &mut remarks),
    })
}

/// What is shown where no window can be used.
const WITHOUT_WINDOW: &str = "the 1st to 99th percentile of its grey levels is shown";

/// Whether numbers that differ are all shown black, or all white.
fn hides_all(shares: &[f64], counts: &[usize]) -> bool {
    let occurring = || shares.iter().zip(counts).filter(|(_, count)| **count > 0);
    let all = |end: u8| occurring().all(|(share, _)| level(*share) == end);
    occurring().count() > 1 && (all(0) || all(255))
}

/// Whether the lowest value is white.
///
/// Presentation LUT Shape (2050,0020) describes the last step before the screen, so where it is
/// there it decides, as in DCMTK and dcm4che; pydicom does not look at it.
///
/// Source: PS3.3, C.11.6.
fn is_inverted(header: &Header, set: &DataSet<'_>, remarks: &mut Vec<Remark>) -> bool {
    let by_photometric = header.photometric == Photometric::Monochrome1;
    let inverted = match set.codes(tags::PRESENTATION_LUT_SHAPE).first() {
        Some(&"INVERSE") => true,
        Some(&"IDENTITY") => false,
        _ => by_photometric,
    };
    if inverted != by_photometric {
        let (photometric, shape, shown) = if by_photometric {
            ("MONOCHROME1", "IDENTITY", "low values are shown dark")
        } else {
            ("MONOCHROME2", "INVERSE", "low values are shown bright")
        };
        remarks.push(Remark::new(
            RemarkKind::PresentationShape,
            format!(
                "it is {photometric} with Presentation LUT Shape {shape}; the shape is followed: {shown}"
            ),
        ));
    }
    inverted
}

fn values_signed(values: &[f64]) -> bool {
    values.iter().any(|value| *value < 0.0)
}

/// A stored number with its sign.
fn with_sign(header: &Header, number: u32) -> i64 {
    let number = i64::from(number);
    if header.signed && number >> (header.stored - 1) != 0 {
        number - (1 << header.stored)
    } else {
        number
    }
}

/// From stored numbers to what the machine measured.
enum Modality<'a> {
    Table(LevelTable<'a>, &'a Header),
    Rescale {
        slope: f64,
        intercept: f64,
        header: &'a Header,
    },
}

impl<'a> Modality<'a> {
    fn new(header: &'a Header, set: &'a DataSet<'a>) -> Result<Self, DicomError> {
        if let Some(table) = LevelTable::new(set.modality_table.as_ref(), header.signed)? {
            return Ok(Self::Table(table, header));
        }
        let number = |tag, attribute, absent: f64| match set.numbers(tag).as_deref() {
            Some([]) => Ok(absent),
            Some([value, ..]) => Ok(*value),
            None => Err(DicomError::Value {
                attribute,
                found: "no number".to_owned(),
                expected: "a number",
            }),
        };
        let slope = number(tags::RESCALE_SLOPE, "Rescale Slope (0028,1053)", 1.0)?;
        let intercept = number(
            tags::RESCALE_INTERCEPT,
            "Rescale Intercept (0028,1052)",
            0.0,
        )?;
        if slope == 0.0 {
            return Err(DicomError::Value {
                attribute: "Rescale Slope (0028,1053)",
                found: "0".to_owned(),
                expected: "another number",
            });
        }
        Ok(Self::Rescale {
            slope,
            intercept,
            header,
        })
    }

    fn is_table(&self) -> bool {
        matches!(self, Self::Table(..))
    }

    fn apply(&self, number: u32) -> f64 {
        match self {
            Self::Table(table, header) => table.value(with_sign(header, number) as f64),
            Self::Rescale {
                slope,
                intercept,
                header,
            } => with_sign(header, number) as f64 * slope + intercept,
        }
    }

    /// Lowest and highest value there can be.
    fn range(&self, header: &Header) -> (f64, f64) {
        match self {
            Self::Table(table, _) => (0.0, table.highest()),
            Self::Rescale { .. } => {
                let (low, high) = if header.signed {
                    (1 << (header.stored - 1), (1 << (header.stored - 1)) - 1)
                } else {
                    (0, header.mask())
                };
                let (low, high) = (self.apply(low), self.apply(high));
                (low.min(high), low.max(high))
            }
        }
    }
}

/// A table of levels.
struct LevelTable<'a> {
    stored: &'a StoredTable<'a>,
    first: f64,
    entries: Vec<u16>,
}

impl<'a> LevelTable<'a> {
    /// `signed` says whether the table's input may be below zero.
    fn new(stored: Option<&'a StoredTable<'a>>, signed: bool) -> Result<Option<Self>, DicomError> {
        let Some(stored) = stored else {
            return Ok(None);
        };
        let [count, first, bits] = stored.descriptor;
        // 65,536 does not fit into the field.
        let count = if count == 0 {
            1 << 16
        } else {
            usize::from(count)
        };
        if !(8..=16).contains(&bits) {
            return Err(DicomError::Value {
                attribute: "LUT Descriptor (0028,3002)",
                found: format!("of {bits} bits"),
                expected: "8 to 16 bits",
            });
        }
        let words = stored.data.as_chunks::<2>().0;
        let entries: Vec<u16> = if words.len() >= count {
            words[..count]
                .iter()
                .map(|word| stored.encoding.u16(*word))
                .collect()
        } else if bits == 8 && stored.data.len() >= count {
            stored.data[..count]
                .iter()
                .map(|byte| u16::from(*byte))
                .collect()
        } else {
            return Err(DicomError::damaged(
                "a table of levels is shorter than it says",
            ));
        };
        let first = if stored.signed || signed {
            f64::from(first as i16)
        } else {
            f64::from(first)
        };
        Ok(Some(Self {
            stored,
            first,
            entries,
        }))
    }

    /// The entry of `value`, the nearest one outside the table.
    fn value(&self, value: f64) -> f64 {
        let last = (self.entries.len() - 1) as f64;
        let index = (value - self.first).trunc().clamp(0.0, last);
        f64::from(self.entries[index as usize])
    }

    fn highest(&self) -> f64 {
        f64::from((1_u32 << self.stored.descriptor[2]) - 1)
    }

    /// The entry of `value` as a share of the highest there can be.
    fn share(&self, value: f64) -> f64 {
        self.value(value) / self.highest()
    }
}

/// How values go through a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WindowFunction {
    Linear,
    LinearExact,
    Sigmoid,
}

/// The first window of a file.
struct LevelWindow {
    center: f64,
    width: f64,
    function: WindowFunction,
}

impl LevelWindow {
    /// `None` if there is none; one that cannot be used is remarked on.
    fn new(set: &DataSet<'_>, remarks: &mut Vec<Remark>) -> Option<Self> {
        let [center, width] = [tags::WINDOW_CENTER, tags::WINDOW_WIDTH].map(|tag| set.numbers(tag));
        if [&center, &width]
            .iter()
            .all(|numbers| numbers.as_deref() == Some(&[]))
        {
            return None;
        }
        let mut unusable = |reason: &str| {
            remarks.push(Remark::new(
                RemarkKind::WindowOutsideRange,
                format!("its window {reason}; {WITHOUT_WINDOW}"),
            ));
            None
        };
        let first = |numbers: Option<Vec<f64>>| numbers?.first().copied();
        let (Some(center), Some(width)) = (first(center), first(width)) else {
            return unusable("is no pair of numbers");
        };
        let function = match set.codes(tags::VOILUT_FUNCTION).first() {
            None | Some(&"LINEAR") => WindowFunction::Linear,
            Some(&"LINEAR_EXACT") => WindowFunction::LinearExact,
            Some(&"SIGMOID") => WindowFunction::Sigmoid,
            Some(_) => return unusable("has an unknown function"),
        };
        if width <= 0.0 || (function == WindowFunction::Linear && width < 1.0) {
            return unusable("has no width");
        }
        Some(Self {
            center,
            width,
            function,
        })
    }

    /// The place of `value` in the window, 0 to 1.
    ///
    /// Source: PS3.3, C.11.2.1.2 and C.11.2.1.3.
    fn share(&self, value: f64) -> f64 {
        let Self { center, width, .. } = *self;
        let (center, width) = match self.function {
            WindowFunction::Linear => (center - 0.5, width - 1.0),
            WindowFunction::LinearExact => (center, width),
            WindowFunction::Sigmoid => {
                return 1.0 / (1.0 + (-4.0 * (value - center) / width).exp());
            }
        };
        // In this order a width of nothing, which LINEAR may have, divides nothing.
        if value <= center - width / 2.0 {
            0.0
        } else if value > center + width / 2.0 {
            1.0
        } else {
            (value - center) / width + 0.5
        }
    }
}

/// How often each stored number occurs, `[2^stored]`; padding around the picture does not count.
fn counts(header: &Header, set: &DataSet<'_>, numbers: &[u16]) -> Vec<usize> {
    let mut counts = vec![0_usize; header.mask() as usize + 1];
    for number in numbers {
        counts[usize::from(*number)] += 1;
    }
    let Some(padding) = set.word(tags::PIXEL_PADDING_VALUE) else {
        return counts;
    };
    let limit = set.word(tags::PIXEL_PADDING_RANGE_LIMIT).unwrap_or(padding);
    let ends = [padding, limit].map(|end| with_sign(header, u32::from(end) & header.mask()));
    let (low, high) = (ends[0].min(ends[1]), ends[0].max(ends[1]));
    let unpadded = counts.iter().enumerate().map(|(number, count)| {
        let inside = (low..=high).contains(&with_sign(header, number as u32));
        if inside { 0 } else { *count }
    });
    let unpadded: Vec<usize> = unpadded.collect();
    if unpadded.iter().any(|count| *count > 0) {
        return unpadded;
    }
    counts
}

/// The values between which nearly all pixels are; see [`shown_range`].
fn percentiles(values: &[f64], counts: &[usize]) -> (f64, f64) {
    let mut found: Vec<(f64, usize)> = values.iter().copied().zip(counts.iter().copied()).collect();
    found.retain(|(_, count)| *count > 0);
    found.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let total: usize = found.iter().map(|(_, count)| count).sum();
    let at_rank = |rank: usize| {
        let mut before = 0;
        let at = found.iter().find(|(_, count)| {
            before += count;
            before > rank
        });
        at.or(found.last()).map_or(0.0, |(value, _)| *value)
    };
    shown_range(total, at_rank)
}
