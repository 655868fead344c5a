//! NRRD files of one plane, or a plane of a volume, their numbers in the file itself.
//!
//! Source: "Definition of NRRD File Format", Teem.

use std::borrow::Cow;

use image::DynamicImage;
use image::metadata::Orientation;

use super::plane::{MOST_TO_SKIP, NumberKind, Plane, PlanePlace, bytes_a_pixel, gunzipped, hung};
use super::refusal::Refusal;
use crate::processor::decode_limits::DecodeLimits;
use crate::processor::remark::Remark;

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Raw,
    /// Words of digits.
    Text,
    Gzip,
}

/// What precedes the numbers.
struct Header<'a> {
    plane: Plane,
    /// Planes in the file.
    planes: usize,
    encoding: Encoding,
    lines_to_skip: usize,
    /// `None`: the numbers are the last bytes.
    bytes_to_skip: Option<usize>,
    data: &'a [u8],
}

/// Whether `bytes` begin as such a file does.
pub(super) fn is_nrrd(bytes: &[u8]) -> bool {
    bytes.starts_with(b"NRRD000")
}

/// Fields of a header by name, in lower case.
type Fields<'a> = Vec<(String, &'a str)>;

/// The fields of a header, and what follows its empty line.
fn fields(bytes: &[u8]) -> Result<(Fields<'_>, &[u8]), Refusal> {
    /// Far more than any header has.
    const LONGEST: usize = 1 << 20;
    let mut fields = Vec::new();
    let mut rest = bytes;
    let mut is_first = true;
    loop {
        let searched = &rest[..rest.len().min(LONGEST)];
        let end = searched.iter().position(|byte| *byte == b'\n');
        let line = &rest[..end.ok_or(Refusal::Truncated)?];
        rest = &rest[line.len() + 1..];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            return Ok((fields, rest));
        }
        let line =
            std::str::from_utf8(line).map_err(|_| Refusal::damaged("its header is no text"))?;
        // Comments, and keys that anybody may add, say nothing of the numbers.
        if !is_first && !line.starts_with('#') && !line.contains(":=") {
            let field = line.split_once(':');
            let (name, value) = field.ok_or_else(|| Refusal::damaged("a field has no value"))?;
            fields.push((name.trim().to_ascii_lowercase(), value.trim()));
        }
        is_first = false;
    }
}

fn kind(name: &str) -> Option<NumberKind> {
    Some(match name {
        "signed char" | "int8" | "int8_t" => NumberKind::I8,
        "uchar" | "unsigned char" | "uint8" | "uint8_t" => NumberKind::U8,
        "short" | "short int" | "signed short" | "signed short int" | "int16" | "int16_t" => {
            NumberKind::I16
        }
        "ushort" | "unsigned short" | "unsigned short int" | "uint16" | "uint16_t" => {
            NumberKind::U16
        }
        "int" | "signed int" | "int32" | "int32_t" => NumberKind::I32,
        "uint" | "unsigned int" | "uint32" | "uint32_t" => NumberKind::U32,
        "longlong"
        | "long long"
        | "long long int"
        | "signed long long"
        | "signed long long int"
        | "int64"
        | "int64_t" => NumberKind::I64,
        "ulonglong" | "unsigned long long" | "unsigned long long int" | "uint64" | "uint64_t" => {
            NumberKind::U64
        }
        "float" => NumberKind::F32,
        "double" => NumberKind::F64,
        _ => return None,
    })
}

/// Where each axis runs to in the patient: right, front and head are positive; `None` for an axis of colours.
fn directions(space: &str, text: &str) -> Vec<Option<[f64; 3]>> {
    let signs = match space.to_ascii_lowercase().as_str() {
        "right-anterior-superior" | "ras" => [1.0, 1.0, 1.0],
        "left-anterior-superior" | "las" => [-1.0, 1.0, 1.0],
        "left-posterior-superior" | "lps" => [-1.0, -1.0, 1.0],
        // Other spaces are none of a patient.
        _ => return Vec::new(),
    };
    let mut axes = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix("none") {
            axes.push(None);
            rest = after.trim_start();
            continue;
        }
        let inside = rest.strip_prefix('(').and_then(|rest| rest.split_once(')'));
        let Some((inside, after)) = inside else {
            return Vec::new();
        };
        let numbers: Vec<f64> = inside
            .split(',')
            .filter_map(|number| number.trim().parse().ok())
            .collect();
        let Ok(numbers) = <[f64; 3]>::try_from(numbers) else {
            return Vec::new();
        };
        axes.push(Some([0, 1, 2].map(|axis| numbers[axis] * signs[axis])));
        rest = after.trim_start();
    }
    axes
}

fn parse<'a>(
    bytes: &'a [u8],
    frame: Option<usize>,
    limits: &DecodeLimits,
) -> Result<Header<'a>, Refusal> {
    let (fields, data) = fields(bytes)?;
    let field = |names: &[&str]| {
        let found = fields
            .iter()
            .find(|(name, _)| names.contains(&name.as_str()));
        found.map(|(_, value)| *value)
    };
    let missing = |name: &str| Refusal::Damaged(format!("its header lacks `{name}`"));
    if field(&["data file", "datafile"]).is_some() {
        return Err(Refusal::unsupported(
            "a header alone, whose numbers are in another file",
        ));
    }
    let encoding = match field(&["encoding"]).ok_or_else(|| missing("encoding"))? {
        "raw" => Encoding::Raw,
        "txt" | "text" | "ascii" => Encoding::Text,
        "gz" | "gzip" => Encoding::Gzip,
        other => {
            let known = ["hex", "bz2", "bzip2"]
                .iter()
                .find(|known| **known == other);
            let found = known.map_or("unknown", |known| known);
            return Err(Refusal::Unsupported(format!("encoding {found}")));
        }
    };
    let kind = field(&["type"]).ok_or_else(|| missing("type"))?;
    let kind = self::kind(kind).ok_or_else(|| Refusal::unsupported("numbers of another type"))?;
    let sizes = field(&["sizes"]).ok_or_else(|| missing("sizes"))?;
    let lengths = sizes.split_ascii_whitespace().map(str::parse);
    let mut lengths: Vec<u64> = lengths
        .collect::<Result<_, _>>()
        .map_err(|_| Refusal::damaged("its sizes are no numbers"))?;
    let text = field(&["space directions"]).unwrap_or("");
    let mut axes = directions(field(&["space"]).unwrap_or(""), text);
    let colour = field(&["kinds"]).and_then(|kinds| kinds.split_ascii_whitespace().next());
    let is_colour = matches!(
        colour,
        Some("RGB-color" | "RGBA-color" | "3-color" | "4-color" | "vector" | "list")
    );
    let channels = match lengths.first() {
        Some(&count @ (3 | 4)) if is_colour && lengths.len() > 2 => {
            lengths.remove(0);
            if !axes.is_empty() {
                axes.remove(0);
            }
            count as usize
        }
        _ => 1,
    };
    if channels > 1 && kind != NumberKind::U8 {
        return Err(Refusal::unsupported("colours of more than 8 bits"));
    }
    // Words become numbers of eight bytes, twice.
    let words = if encoding == Encoding::Text { 16 } else { 0 };
    let memory = bytes_a_pixel(kind, channels) + words * channels as u64;
    let place = PlanePlace::new(&lengths, frame, memory, limits)?;
    let orientation = match axes.as_slice() {
        [Some(first), Some(second), ..] => hung(*first, *second),
        _ => Orientation::NoTransforms,
    };
    let skip = |names: &[&str]| {
        let skip = field(names).map_or(Ok(0), str::parse::<i64>);
        skip.map_err(|_| Refusal::damaged("a number to skip is none"))
    };
    let (lines, skipped) = (
        skip(&["line skip", "lineskip"])?,
        skip(&["byte skip", "byteskip"])?,
    );
    let lines = usize::try_from(lines).map_err(|_| Refusal::damaged("its line skip is none"))?;
    if !(-1..=MOST_TO_SKIP as i64).contains(&skipped)
        || (skipped == -1 && encoding != Encoding::Raw)
    {
        return Err(Refusal::damaged("its byte skip is none"));
    }
    Ok(Header {
        plane: Plane {
            width: place.width,
            height: place.height,
            before: place.before,
            kind,
            channels,
            big_endian: field(&["endian"]) == Some("big"),
            scale: (1.0, 0.0),
            orientation,
        },
        planes: place.planes,
        encoding,
        lines_to_skip: lines,
        bytes_to_skip: usize::try_from(skipped).ok(),
        data,
    })
}

/// What the header of a file says, checked against the limits.
///
/// # Errors
/// A header that is cut off, damaged or of a kind that is not read, a volume, or one of the limits.
pub(super) fn header(bytes: &[u8], limits: &DecodeLimits) -> Result<Plane, Refusal> {
    parse(bytes, None, limits).map(|header| header.plane)
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
    let header = parse(bytes, frame, limits)?;
    let mut data = header.data;
    for _ in 0..header.lines_to_skip {
        let end = data.iter().position(|byte| *byte == b'\n');
        data = &data[end.ok_or(Refusal::Truncated)? + 1..];
    }
    let mut plane = header.plane;
    let length = plane.stored_bytes();
    let before = match header.encoding {
        Encoding::Text => 0,
        _ => plane.bytes_before()?,
    };
    let skip = header.bytes_to_skip.unwrap_or(0);
    let mut whole = match header.encoding {
        Encoding::Gzip => {
            let most = skip.saturating_add(before).saturating_add(length) as u64;
            if most > limits.max_decoded_bytes {
                return Err(Refusal::TooMuchMemory);
            }
            gunzipped(data, most)?
        }
        _ => Cow::Borrowed(data),
    };
    if header.bytes_to_skip.is_none() {
        let all = length.checked_mul(header.planes);
        let from = all.and_then(|all| data.len().checked_sub(all));
        whole = Cow::Borrowed(&data[from.ok_or(Refusal::Truncated)?..]);
    }
    let data = skip.checked_add(before).and_then(|from| whole.get(from..));
    let data = data.ok_or(Refusal::Truncated)?;
    if header.encoding == Encoding::Text {
        let kind = plane.kind;
        // Words become numbers of one kind; bytes stay levels as they are.
        let numbers = words(
            data,
            plane.before,
            plane.width * plane.height * plane.channels,
        )?;
        if kind == NumberKind::U8 {
            let bytes: Vec<u8> = numbers.iter().map(|number| *number as u8).collect();
            return Ok((plane.picture(&bytes, remarks)?, plane));
        }
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        (plane.kind, plane.big_endian) = (NumberKind::F64, false);
        return Ok((plane.picture(&bytes, remarks)?, plane));
    }
    Ok((plane.picture(data, remarks)?, plane))
}

/// `count` numbers in words, after `before` times as many.
fn words(data: &[u8], before: usize, count: usize) -> Result<Vec<f64>, Refusal> {
    let skipped = before.checked_mul(count).ok_or(Refusal::Truncated)?;
    // The shortest takes a digit and a blank.
    let all = skipped.saturating_add(count);
    if data.len() < all.saturating_mul(2) - 1 {
        return Err(Refusal::Truncated);
    }
    let text =
        std::str::from_utf8(data).map_err(|_| Refusal::damaged("its numbers are no text"))?;
    let separated = text.split([' ', '\t', '\r', '\n', ',']);
    let words = separated.filter(|word| !word.is_empty());
    let words = words.skip(skipped).take(count);
    let numbers: Vec<f64> = words
        .map(str::parse)
        .collect::<Result<_, _>>()
        .map_err(|_| Refusal::damaged("a number is none"))?;
    if numbers.len() < count {
        return Err(Refusal::Truncated);
    }
    Ok(numbers)
}
