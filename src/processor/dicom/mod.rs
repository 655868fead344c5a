//! DICOM files to grey or colour pictures of 8 bits, as a viewer shows them first.
//!
//! Read are data sets with and without preamble; implicit and explicit, little and big endian,
//! deflated; native, RLE, JPEG (8 or 12 bits with loss, any without), JPEG-LS, JPEG 2000, HTJ2K and deflated
//! pixels, of 1 to 32 bits, grey, of a palette or in colour. What else there is ends in an error that names the transfer syntax. Frames are counted from 1 here.
//!
//! Nothing is known of the patient but in `identity`: `reader` keeps technical attributes only, and neither errors,
//! remarks nor [`technical`] repeat free text. Nothing is allocated for pixels before the announced
//! size has passed the limits. Not read are the windows of single frames of enhanced objects.

mod codec;
mod encoding;
mod error;
mod grey;
mod header;
mod identity;
mod levels;
mod native;
mod palette;
mod reader;
mod remark;
mod samples;
mod syntax;
#[cfg(test)]
mod tests;
mod upright;

use image::metadata::Orientation;
use image::{DynamicImage, GrayImage, RgbImage};

pub use encoding::looks_like_dicom;
pub use error::DicomError;
pub use grey::{GreyFilm, grey};
pub use identity::{Identity, identity, transfer_syntaxes};

use super::decode_limits::DecodeLimits;
use super::remark::{Remark, RemarkKind};
use header::{Header, Photometric};
use levels::Histogram;
use reader::{DataSet, DicomFile};
use samples::Samples;

/// A decoded file.
#[derive(Debug)]
pub(super) struct DecodedDicom {
    /// 8-bit grey or colour, as stored.
    pub(super) picture: DynamicImage,
    /// How it has to be rotated or mirrored.
    pub(super) orientation: Orientation,
    /// What the reader of a report should know.
    pub(super) remarks: Vec<Remark>,
}

/// Decodes one frame of the file in `bytes`: the only one, or number `frame`, counted from 1.
///
/// # Errors
/// Any [`DicomError`].
pub(super) fn decode(
    bytes: &[u8],
    frame: Option<usize>,
    limits: &DecodeLimits,
) -> Result<DecodedDicom, DicomError> {
    let opened = DicomFile::new(bytes, limits.max_decoded_bytes)?;
    let set = opened.data_set()?;
    // A picture's size is checked against the limits before anything else is reported of it.
    Header::size(&set, limits)?;
    let header = Header::new(&set, opened.syntax.codec()?, limits)?;
    let frame = match (frame, header.frames) {
        (None, 1) => 0,
        (None, frames) => return Err(DicomError::ManyFrames { frames }),
        (Some(frame), frames) if (1..=frames).contains(&frame) => frame - 1,
        (Some(frame), frames) => return Err(DicomError::NoFrame { frame, frames }),
    };
    let mut remarks = remark::subject(&set);
    let samples = codec::decode(&header, &set, &opened.syntax, frame, &mut remarks)?;
    let (width, height) = (header.columns as u32, header.rows as u32);
    if !header.photometric_is_stated {
        let taken = if header.samples == 1 {
            "MONOCHROME2"
        } else {
            "RGB"
        };
        remarks.push(Remark::new(
            RemarkKind::PhotometricAssumed,
            format!("it does not say its Photometric Interpretation, taken for {taken}"),
        ));
    }
    let gray = |levels| GrayImage::from_raw(width, height, levels).map(DynamicImage::ImageLuma8);
    let rgb = |pixels| RgbImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8);
    let picture = match samples {
        Samples::Gray(numbers) if header.photometric == Photometric::Palette => {
            rgb(palette::colours(&header, &set, &numbers)?)
        }
        Samples::Gray(numbers) => {
            let histogram = Histogram::of_all(&header, &set, &numbers);
            let levels = levels::levels(&header, &set, &histogram, &mut remarks)?;
            let pixels = numbers.iter().map(|number| levels[usize::from(*number)]);
            gray(pixels.collect())
        }
        Samples::Wide(numbers) => {
            let histogram = Histogram::of_occurring(&numbers);
            let levels = levels::levels(&header, &set, &histogram, &mut remarks)?;
            let pixels = numbers
                .iter()
                .map(|number| levels[histogram.place(*number)]);
            gray(pixels.collect())
        }
        Samples::Rgb(pixels) => rgb(pixels),
    };
    let orientation = upright::orientation(&set);
    if orientation != Orientation::NoTransforms {
        remarks.push(Remark::new(RemarkKind::Turned,
            "it is turned or mirrored as its Patient Orientation says, to head up and left on the right",
        ));
    }
    Ok(DecodedDicom {
        picture: picture.ok_or(DicomError::Truncated)?,
        orientation,
        remarks,
    })
}

/// Width and height of the file's picture as stored, and how it has to be rotated or mirrored.
///
/// # Errors
/// Those of [`decode`] that its attributes can show.
pub(super) fn probe(
    bytes: &[u8],
    limits: &DecodeLimits,
) -> Result<(u16, u16, Orientation), DicomError> {
    let opened = DicomFile::new(bytes, limits.max_decoded_bytes)?;
    let set = opened.data_set()?;
    let (columns, rows) = Header::size(&set, limits)?;
    let header = Header::new(&set, opened.syntax.codec()?, limits)?;
    if header.frames > 1 {
        return Err(DicomError::ManyFrames {
            frames: header.frames,
        });
    }
    Ok((columns, rows, upright::orientation(&set)))
}

/// The technical attributes of the file in `bytes`, by name: size, storage, kind and grey levels.
///
/// Nothing of the patient, the place, the time or the machine is among them.
///
/// # Errors
/// Those of a file that is no whole data set; pixels are not looked at.
pub fn technical(
    bytes: &[u8],
    limits: &DecodeLimits,
) -> Result<Vec<(&'static str, String)>, DicomError> {
    let opened = DicomFile::new(bytes, limits.max_decoded_bytes)?;
    let set: DataSet<'_> = opened.data_set()?;
    Ok(remark::technical(&opened, &set))
}
