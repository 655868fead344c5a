//! NIfTI-1 and NIfTI-2 files of one plane, or a plane of a volume, plain or gzipped.
//!
//! Source: `nifti1.h` and `nifti2.h` of the NIfTI Data Format Working Group.

use image::DynamicImage;

use super::plane::{
    self, MOST_TO_SKIP, NumberKind, Plane, PlanePlace, bytes_a_pixel, gunzipped, gunzipped_head,
    hung,
};
use super::refusal::Refusal;
use crate::processor::decode_limits::DecodeLimits;
use crate::processor::remark::Remark;

/// Bytes of the longer header.
const LONGEST_HEADER: usize = 540;

/// The two forms of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The form of a header and whether it is big endian; `None` if `head` is none.
fn version(head: &[u8]) -> Option<(Version, bool)> {
    let size = head.first_chunk::<4>()?;
    let found = match (i32::from_le_bytes(*size), i32::from_be_bytes(*size)) {
        (348, _) => (Version::One, false),
        (_, 348) => (Version::One, true),
        (540, _) => (Version::Two, false),
        (_, 540) => (Version::Two, true),
        _ => return None,
    };
    let magic = match found.0 {
        Version::One => head.get(344..347)?,
        Version::Two => head.get(4..7)?,
    };
    matches!(magic, b"n+1" | b"ni1" | b"n+2" | b"ni2").then_some(found)
}

/// Whether `bytes`, or the start of them, are a NIfTI file, plain or gzipped.
pub(super) fn is_nifti(bytes: &[u8]) -> bool {
    if bytes.starts_with(plane::GZIP) {
        return version(&gunzipped_head(bytes, LONGEST_HEADER)).is_some();
    }
    version(bytes).is_some()
}

/// Fields of a header.
struct Fields<'a> {
    head: &'a [u8],
    big_endian: bool,
}

impl Fields<'_> {
    fn whole(&self, at: usize, size: usize) -> Result<i64, Refusal> {
        let bytes = self.head.get(at..at + size).ok_or(Refusal::Truncated)?;
        let join = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
        let number = if self.big_endian {
            bytes.iter().fold(0, join)
        } else {
            bytes.iter().rev().fold(0, join)
        };
        let shift = 64 - 8 * size as u32;
        Ok(((number << shift) as i64) >> shift)
    }

    fn fraction(&self, at: usize, size: usize) -> Result<f64, Refusal> {
        let bits = self.whole(at, size)?;
        Ok(match size {
            4 => f32::from_bits(bits as u32).into(),
            _ => f64::from_bits(bits as u64),
        })
    }
}

/// Where fields are: of version 1, and of version 2.
struct Places {
    /// Bytes of whole numbers of the size, and of fractions.
    sizes: (usize, usize),
    dim: usize,
    datatype: usize,
    offset: usize,
    slope: usize,
    /// Bytes of a code.
    code: usize,
    qform: usize,
    sform: usize,
    quatern: usize,
    srow: usize,
    magic: usize,
}

const VERSION_1: Places = Places {
    sizes: (2, 4),
    dim: 40,
    datatype: 70,
    offset: 108,
    slope: 112,
    code: 2,
    qform: 252,
    sform: 254,
    quatern: 256,
    srow: 280,
    magic: 344,
};

const VERSION_2: Places = Places {
    sizes: (8, 8),
    dim: 16,
    datatype: 12,
    offset: 168,
    slope: 176,
    code: 4,
    qform: 344,
    sform: 348,
    quatern: 352,
    srow: 400,
    magic: 4,
};

/// The header of a file, checked against the limits, and where its numbers begin.
fn parse(
    bytes: &[u8],
    frame: Option<usize>,
    limits: &DecodeLimits,
) -> Result<(Plane, usize), Refusal> {
    let head;
    let start = if bytes.starts_with(plane::GZIP) {
        head = gunzipped_head(bytes, LONGEST_HEADER);
        &head[..]
    } else {
        bytes
    };
    let (version, big_endian) = version(start).ok_or(Refusal::Truncated)?;
    let places = match version {
        Version::One => &VERSION_1,
        Version::Two => &VERSION_2,
    };
    if start.get(places.magic + 1) == Some(&b'i') {
        return Err(Refusal::unsupported(
            "a header alone, whose numbers are in a file ending in .img",
        ));
    }
    let fields = Fields {
        head: start,
        big_endian,
    };
    let (whole, fraction) = places.sizes;
    let axes = fields.whole(places.dim, whole)?;
    if !(1..=7).contains(&axes) {
        return Err(Refusal::Damaged(format!("it has {axes} axes")));
    }
    let length = |axis| {
        let length = fields.whole(places.dim + axis * whole, whole)?;
        u64::try_from(length).map_err(|_| Refusal::damaged("an axis has a length below zero"))
    };
    let lengths: Vec<u64> = (1..=axes as usize).map(length).collect::<Result<_, _>>()?;
    let datatype = fields.whole(places.datatype, 2)?;
    let (kind, channels) = match datatype {
        2 => (NumberKind::U8, 1),
        4 => (NumberKind::I16, 1),
        8 => (NumberKind::I32, 1),
        16 => (NumberKind::F32, 1),
        64 => (NumberKind::F64, 1),
        128 => (NumberKind::U8, 3),
        256 => (NumberKind::I8, 1),
        512 => (NumberKind::U16, 1),
        768 => (NumberKind::U32, 1),
        1024 => (NumberKind::I64, 1),
        1280 => (NumberKind::U64, 1),
        2304 => (NumberKind::U8, 4),
        other => return Err(Refusal::Unsupported(format!("datatype {other}"))),
    };
    let place = PlanePlace::new(&lengths, frame, bytes_a_pixel(kind, channels), limits)?;
    let offset = match version {
        Version::One => fields.fraction(places.offset, 4)?,
        Version::Two => fields.whole(places.offset, 8)? as f64,
    };
    if !(0.0..=MOST_TO_SKIP as f64).contains(&offset) {
        return Err(Refusal::damaged("its numbers begin nowhere"));
    }
    let slope = fields.fraction(places.slope, fraction)?;
    let intercept = fields.fraction(places.slope + fraction, fraction)?;
    // A slope of zero says that there is no scale.
    let scaled = slope != 0.0 && slope.is_finite() && intercept.is_finite();
    let [first, second] = directions(&fields, places)?;
    Ok((
        Plane {
            width: place.width,
            height: place.height,
            before: place.before,
            kind,
            channels,
            big_endian,
            scale: if scaled {
                (slope, intercept)
            } else {
                (1.0, 0.0)
            },
            orientation: hung(first, second),
        },
        offset as usize,
    ))
}

/// Where the first two axes run to: right, front and head are positive. Zeros where the file does not say.
fn directions(fields: &Fields<'_>, places: &Places) -> Result<[[f64; 3]; 2], Refusal> {
    let (_, size) = places.sizes;
    if fields.whole(places.sform, places.code)? > 0 {
        let column = |column: usize| {
            let row = |row: usize| fields.fraction(places.srow + (4 * row + column) * size, size);
            Ok::<_, Refusal>([row(0)?, row(1)?, row(2)?])
        };
        return Ok([column(0)?, column(1)?]);
    }
    if fields.whole(places.qform, places.code)? > 0 {
        let part = |at: usize| fields.fraction(places.quatern + at * size, size);
        let (b, c, d) = (part(0)?, part(1)?, part(2)?);
        let a = (1.0 - b * b - c * c - d * d).max(0.0).sqrt();
        return Ok([
            [
                a * a + b * b - c * c - d * d,
                2.0 * (b * c + a * d),
                2.0 * (b * d - a * c),
            ],
            [
                2.0 * (b * c - a * d),
                a * a + c * c - b * b - d * d,
                2.0 * (c * d + a * b),
            ],
        ]);
    }
    Ok([[0.0; 3]; 2])
}

/// What the header of a file says, checked against the limits.
///
/// # Errors
/// A header that is cut off, damaged or of a kind that is not read, a volume, or one of the limits.
pub(super) fn header(bytes: &[u8], limits: &DecodeLimits) -> Result<Plane, Refusal> {
    parse(bytes, None, limits).map(|(plane, _)| plane)
}

/// Decodes a file, of a volume plane number `frame`, counted from 1; remarks on it are added to `remarks`.
///
/// # Errors
/// Any [`Refusal`].
pub(super) fn decode(
    bytes: &[u8],
    frame: Option<usize>,
    limits: &DecodeLimits,
    remarks: &mut Vec<Remark>,
) -> Result<(DynamicImage, Plane), Refusal> {
    let (plane, offset) = parse(bytes, frame, limits)?;
    let start = offset.saturating_add(plane.bytes_before()?);
    let end = start.saturating_add(plane.stored_bytes());
    // What is not packed is read where it is.
    if bytes.starts_with(plane::GZIP) && end as u64 > limits.max_decoded_bytes {
        return Err(Refusal::TooMuchMemory);
    }
    let whole = gunzipped(bytes, end as u64)?;
    let data = whole.get(start..end).ok_or(Refusal::Truncated)?;
    Ok((plane.picture(data, remarks)?, plane))
}
