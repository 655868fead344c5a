//! A grey film with all its levels, for a viewer that has a window of its own.

use dicom_dictionary_std::tags;
use image::{DynamicImage, ImageBuffer, Luma};

use super::{
    DicomError, codec,
    header::{Header, Photometric},
    levels::{self, Histogram},
    reader::{DataSet, DicomFile},
    samples::Samples,
    upright,
};
use crate::processor::decode_limits::DecodeLimits;

/// A film's levels, upright, and how they are shown first.
#[derive(Debug, Clone, PartialEq)]
pub struct GreyFilm {
    /// Pixels of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `[height, width]`: a level is `first + step · number`.
    pub numbers: Vec<u16>,
    /// Level of the number 0, in the file's units after its rescale.
    pub first: f64,
    /// Levels between two numbers.
    pub step: f64,
    /// Width and centre of the window in those units: the file's, else that of its percentiles.
    pub window: (f64, f64),
    /// Whether low levels are white.
    pub inverted: bool,
    /// Millimetres between rows and between columns, and whether they are measured in the body (`PixelSpacing`)
    /// or on the detector (`ImagerPixelSpacing`), where lengths are larger than in the body.
    pub spacing: Option<([f64; 2], bool)>,
    /// View position, as the file says it, in capital letters; empty where it does not.
    pub view: String,
}

/// Rows and columns, if both are above zero.
fn spacing(set: &DataSet<'_>) -> Option<([f64; 2], bool)> {
    let of = |tag| match set.numbers(tag).as_deref() {
        Some([row, column, ..]) if *row > 0.0 && *column > 0.0 => Some([*row, *column]),
        _ => None,
    };
    let body = of(tags::PIXEL_SPACING).map(|spacing| (spacing, true));
    body.or_else(|| of(tags::IMAGER_PIXEL_SPACING).map(|spacing| (spacing, false)))
}

/// Reads the film in `bytes` with all its levels; `None` where it has colours or more than 16 bits.
///
/// # Errors
/// Those of decoding, and several frames.
pub fn grey(bytes: &[u8], limits: &DecodeLimits) -> Result<Option<GreyFilm>, DicomError> {
    let opened = DicomFile::new(bytes, limits.max_decoded_bytes)?;
    let set = opened.data_set()?;
    Header::size(&set, limits)?;
    let header = Header::new(&set, opened.syntax.codec()?, limits)?;
    if header.frames != 1 {
        return Err(DicomError::ManyFrames {
            frames: header.frames,
        });
    }
    if header.photometric == Photometric::Palette {
        return Ok(None);
    }
    let mut remarks = Vec::new();
    let samples = codec::decode(&header, &set, &opened.syntax, 0, &mut remarks)?;
    let Samples::Gray(stored) = samples else {
        return Ok(None);
    };
    let histogram = Histogram::of_all(&header, &set, &stored);
    let scale = levels::scale(&header, &set, &histogram)?;
    let (first, last) = scale
        .values
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (low.min(*value), high.max(*value))
        });
    let whole = scale.values.iter().all(|value| value.fract() == 0.0);
    let step = match whole && last - first <= 65535.0 {
        true => 1.0,
        false => ((last - first) / 65535.0).max(f64::MIN_POSITIVE),
    };
    let table: Vec<u16> = scale
        .values
        .iter()
        .map(|value| ((value - first) / step).round() as u16)
        .collect();
    let numbers = stored.iter().map(|number| table[usize::from(*number)]);
    let (width, height) = (header.columns as u32, header.rows as u32);
    let picture = ImageBuffer::<Luma<u16>, _>::from_raw(width, height, numbers.collect())
        .ok_or(DicomError::Truncated)?;
    let mut picture = DynamicImage::ImageLuma16(picture);
    picture.apply_orientation(upright::orientation(&set));
    let turned = (picture.width(), picture.height()) != (width, height);
    let picture = picture.into_luma16();
    let spacing = spacing(&set).map(|([row, column], body)| match turned {
        true => ([column, row], body),
        false => ([row, column], body),
    });
    let view = set
        .codes(tags::VIEW_POSITION)
        .first()
        .map(|view| view.to_uppercase());
    Ok(Some(GreyFilm {
        width: picture.width() as usize,
        height: picture.height() as usize,
        numbers: picture.into_raw(),
        first,
        step,
        window: scale.window,
        inverted: scale.inverted,
        spacing,
        view: view.unwrap_or_default(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::dicom::decode;

    #[test]
    fn through_its_window_a_film_is_what_the_model_sees() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/dicom");
        let limits = DecodeLimits::default();
        for name in [
            "gray_8u_1",
            "gray_12u_1",
            "gray_16s_1",
            "rescale_window",
            "rescale_negative",
            "modality_table",
        ] {
            let bytes = std::fs::read(format!("{folder}/{name}.dcm")).unwrap();
            let film = grey(&bytes, &limits).unwrap().unwrap();
            let mut seen = decode(&bytes, None, &limits).unwrap();
            seen.picture.apply_orientation(seen.orientation);
            let seen = seen.picture.into_luma8();
            assert_eq!(
                (film.width, film.height),
                (seen.width() as usize, seen.height() as usize)
            );
            let (width, center) = film.window;
            for (number, expected) in film.numbers.iter().zip(seen.as_raw()) {
                let value = film.first + film.step * f64::from(*number);
                let share = ((value - center) / width + 0.5).clamp(0.0, 1.0) * 255.0;
                let grey = if film.inverted { 255.0 - share } else { share };
                // DICOM's window function has half a level and one level off its ends.
                let near = (grey - f64::from(*expected)).abs() <= 1.0 + 255.0 / width;
                assert!(near, "{name}: {value} is {grey}, not {expected}");
            }
        }
        let colours = std::fs::read(format!("{folder}/colour_rgb.dcm")).unwrap();
        assert_eq!(grey(&colours, &limits).unwrap(), None);
    }
}
