//! What decoding a picture takes, by its header, before anything is decoded.

use super::error::ImageError;
use super::format::PictureFormat;
use super::header::{announced, check_file_size, dicom_refusal, guarded};
use crate::processor::decode_limits::DecodeLimits;
use crate::processor::dicom;

/// Most bytes that deflate makes of one.
///
/// Source: zlib's technical details, "Maximum Compression Factor".
const LARGEST_INFLATION: u64 = 1032;

/// The transfer syntax of a DICOM file that is deflated as a whole, and the bytes it is named within.
const DEFLATED: &[u8] = b"1.2.840.10008.1.2.1.99";
const META_BYTES: usize = 2048;

/// What decoding a picture takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodingCost {
    /// Pixels.
    pub pixels: u64,
    /// Bytes of memory, the 8-bit RGB picture that remains included.
    pub bytes: u64,
}

/// What decoding the picture in `bytes` takes; `name` is its name in messages.
///
/// # Errors
/// Those of [`super::decode`] that a header can show.
pub fn decoding_cost(
    bytes: &[u8],
    name: &str,
    limits: &DecodeLimits,
) -> Result<DecodingCost, ImageError> {
    check_file_size(bytes.len() as u64, name, limits)?;
    let format = PictureFormat::of(bytes, name)?;
    guarded(format, name, || {
        if format != PictureFormat::Dicom {
            let found = announced(bytes, format, name, limits)?;
            return Ok(DecodingCost {
                pixels: (found.width * found.height) as u64,
                bytes: found.bytes,
            });
        }
        let meta = &bytes[..bytes.len().min(META_BYTES)];
        if meta.windows(DEFLATED.len()).any(|part| part == DEFLATED) {
            // Nothing is known before it is inflated.
            let inflated = (bytes.len() as u64)
                .saturating_mul(LARGEST_INFLATION)
                .min(limits.max_decoded_bytes);
            let pixels = inflated.min(limits.max_decoded_pixels);
            return Ok(DecodingCost {
                pixels,
                bytes: inflated + 8 * pixels,
            });
        }
        let (width, height, _) =
            dicom::probe(bytes, limits).map_err(|cause| dicom_refusal(cause, name, limits))?;
        let pixels = u64::from(width) * u64::from(height);
        Ok(DecodingCost {
            pixels,
            // Samples of 16 bits, of a codec and in order; grey levels; RGB.
            bytes: 8 * pixels,
        })
    })
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn the_cost_comes_from_the_header_alone() {
        let mut png = Cursor::new(Vec::new());
        image::DynamicImage::new_rgb16(300, 200)
            .write_to(&mut png, image::ImageFormat::Png)
            .unwrap();
        let mut png = png.into_inner();
        let limits = DecodeLimits::default();
        let cost = decoding_cost(&png, "x", &limits).unwrap();
        assert_eq!(cost.pixels, 60_000);
        assert_eq!(cost.bytes, 60_000 * (6 + 3));
        // The pixels are not looked at.
        let end = png.len() - 40;
        png[end..].fill(0);
        assert_eq!(decoding_cost(&png, "x", &limits).unwrap(), cost);
        let small = DecodeLimits {
            max_decoded_pixels: 59_999,
            ..limits
        };
        assert!(matches!(
            decoding_cost(&png, "x", &small),
            Err(ImageError::TooManyPixels { .. })
        ));
    }
}
