//! Lossless JPEG to numbers, by the `jpeg-decoder` crate.

use jpeg_decoder::{ColorTransform, Decoder, Error, PixelFormat};

use super::jpeg::JpegError;

/// Numbers row by row.
pub(super) enum LosslessPixels {
    /// Grey of 16 bits at most.
    Gray(Vec<u16>),
    /// Red, green, blue.
    Rgb(Vec<u8>),
}

/// Decodes the lossless JPEG in `bytes` into `max_bytes` at most; `colour` says what three channels mean.
///
/// # Errors
/// A stream that is cut off, damaged, or of a kind that is not read.
pub(super) fn decode(
    bytes: &[u8],
    colour: ColorTransform,
    max_bytes: usize,
) -> Result<LosslessPixels, JpegError> {
    let refused = |cause| match cause {
        Error::Unsupported(_) => JpegError::Unsupported("lossless JPEG of its kind"),
        Error::Io(cause) if cause.kind() == std::io::ErrorKind::UnexpectedEof => {
            JpegError::Truncated
        }
        other => JpegError::Damaged(other.to_string()),
    };
    let mut decoder = Decoder::new(bytes);
    decoder.read_info().map_err(refused)?;
    let info = decoder.info();
    let info = info.ok_or_else(|| JpegError::Damaged("it has no header".to_owned()))?;
    decoder.set_color_transform(colour);
    decoder.set_max_decoding_buffer_size(max_bytes);
    let decoded = decoder.decode().map_err(refused)?;
    match info.pixel_format {
        PixelFormat::L8 => Ok(LosslessPixels::Gray(
            decoded.into_iter().map(u16::from).collect(),
        )),
        PixelFormat::L16 => {
            let words = decoded.as_chunks::<2>().0.iter();
            let words = words.map(|word| u16::from_ne_bytes(*word));
            Ok(LosslessPixels::Gray(words.collect()))
        }
        PixelFormat::RGB24 => Ok(LosslessPixels::Rgb(decoded)),
        PixelFormat::CMYK32 => Err(JpegError::Unsupported("lossless JPEG of four channels")),
    }
}
