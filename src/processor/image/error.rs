//! Why a picture could not be used, and the formats a message names.

use std::fmt;
use std::io;
use std::path::PathBuf;

use image::ImageFormat;

use super::tiff::Tiff;
use crate::processor::dicom::{DicomError, looks_like_dicom};

/// Why a picture could not be read, sized or cut into patches.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file could not be opened or read.
    #[error("cannot read picture `{name}`")]
    Read {
        /// File that was being read.
        name: String,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// The file holds no byte.
    #[error("picture `{name}` is empty (0 bytes); hint: copy or export it again")]
    Empty {
        /// File or upload.
        name: String,
    },
    /// The file is larger than the limit.
    #[error(
        "picture `{name}` has {bytes} bytes, more than the limit of {limit}; hint: save it smaller, for instance as PNG"
    )]
    FileTooLarge {
        /// File or upload.
        name: String,
        /// Its size.
        bytes: u64,
        /// [`super::DecodeLimits::max_file_bytes`].
        limit: u64,
    },
    /// The content is none of the formats read here.
    #[error(
        "`{name}` is not a PNG, JPEG, WebP, BMP, TIFF or DICOM picture ({found}); hint: convert it to PNG"
    )]
    UnknownFormat {
        /// File or upload.
        name: String,
        /// What the content looks like.
        found: String,
    },
    /// The header announces more pixels than the limit.
    #[error(
        "picture `{name}` is {width} × {height} pixels, more than the limit of {limit} pixels; hint: scale it down first"
    )]
    TooManyPixels {
        /// File or upload.
        name: String,
        /// Width in the header.
        width: u32,
        /// Height in the header.
        height: u32,
        /// [`super::DecodeLimits::max_decoded_pixels`].
        limit: u64,
    },
    /// Decoding would take more memory than the limit.
    #[error(
        "picture `{name}` needs more than {limit} bytes of memory to decode; hint: scale it down, or save it with 8 bits a channel"
    )]
    TooMuchMemory {
        /// File or upload.
        name: String,
        /// [`super::DecodeLimits::max_decoded_bytes`].
        limit: u64,
    },
    /// A known format holds pixels of a kind that is not read.
    #[error(
        "{format} picture `{name}` holds pixels of a kind that is not read ({found}); hint: save it as 8 or 16 bit grey or RGB"
    )]
    UnsupportedPixels {
        /// File or upload.
        name: String,
        /// File format.
        format: PictureFormat,
        /// The kind of pixels.
        found: String,
    },
    /// The file ends before its pixels do.
    #[error("{format} picture `{name}` is cut off before its end; hint: copy or export it again")]
    Truncated {
        /// File or upload.
        name: String,
        /// File format.
        format: PictureFormat,
    },
    /// The content breaks the rules of its format.
    #[error("{format} picture `{name}` is damaged ({reason}); hint: copy or export it again")]
    Damaged {
        /// File or upload.
        name: String,
        /// File format.
        format: PictureFormat,
        /// What the decoder said.
        reason: String,
    },
    /// A DICOM file gave no picture for a reason that other formats do not have.
    #[error("DICOM picture `{name}` {cause}")]
    Dicom {
        /// File or upload.
        name: String,
        /// The reason; it repeats no free text of the file.
        cause: Box<DicomError>,
    },
    /// DICOM tags of a file of another format.
    #[error("`{name}` is a {format} picture and has no DICOM tags; hint: leave out --show-tags")]
    NotDicom {
        /// File or upload.
        name: String,
        /// File format.
        format: PictureFormat,
    },
    /// The chosen frame does not exist.
    #[error(
        "{format} picture `{name}` has no frame {frame}, expected {}; hint: leave out --frame",
        expected_frames(*.frames)
    )]
    NoFrame {
        /// File or upload.
        name: String,
        /// File format.
        format: PictureFormat,
        /// The chosen frame, counted from 1.
        frame: usize,
        /// How many can be chosen.
        frames: usize,
    },
    /// A buffer does not hold as many pixels as its size says.
    #[error("{bytes} bytes of pixels do not make a picture of {width} × {height} pixels")]
    PixelCount {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
        /// Length of the buffer.
        bytes: usize,
    },
    /// The picture is too long for its width, or has no extent.
    #[error(
        "a picture of {width} × {height} pixels has no usable shape; expected one side at most 200 times the other; hint: crop it"
    )]
    AspectRatio {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
    },
    /// `preprocessor_config.json` could not be read.
    #[error("cannot read `{}`; hint: copy it from the published checkpoint", .path.display())]
    ConfigRead {
        /// File that was being read.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// `preprocessor_config.json` is not what its name says.
    #[error("`{}` is not an image processor's configuration; hint: copy it from the published checkpoint", .path.display())]
    ConfigParse {
        /// File that was being read.
        path: PathBuf,
        /// What the parser said.
        #[source]
        cause: serde_json::Error,
    },
    /// A value of the configuration cannot be used.
    #[error("image processor: `{key}` is `{found}`, expected {expected}")]
    ConfigValue {
        /// Key in `preprocessor_config.json`.
        key: &'static str,
        /// What it holds.
        found: String,
        /// What it may hold.
        expected: &'static str,
    },
}

impl ImageError {
    /// [`Self::UnsupportedPixels`] with what was found.
    pub(super) fn unsupported(format: PictureFormat, name: &str, found: impl ToString) -> Self {
        Self::UnsupportedPixels {
            name: name.to_owned(),
            format,
            found: found.to_string(),
        }
    }
}

/// The frames that can be chosen, in words.
fn expected_frames(frames: usize) -> String {
    match frames {
        0 | 1 => "1".to_owned(),
        frames => format!("1 to {frames}"),
    }
}

/// File formats that [`super::decode`] reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PictureFormat {
    /// Portable Network Graphics.
    Png,
    /// JPEG, baseline and progressive.
    Jpeg,
    /// WebP, with and without loss; the first frame of an animation.
    WebP,
    /// Windows bitmap.
    Bmp,
    /// TIFF and BigTIFF.
    Tiff,
    /// DICOM, with and without preamble; see [`crate::processor::dicom`].
    Dicom,
}

impl fmt::Display for PictureFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Png => "PNG",
            Self::Jpeg => "JPEG",
            Self::WebP => "WebP",
            Self::Bmp => "BMP",
            Self::Tiff => "TIFF",
            Self::Dicom => "DICOM",
        })
    }
}

/// The name of a format that is not read and that the `image` crate would name wrongly or not at all.
fn foreign(head: &[u8]) -> Option<&'static str> {
    const SIGNATURES: [(&[u8], &str); 9] = [
        (b"\xff\xd8\xff\xf7", "JPEG-LS"),
        (b"\xff\x4f\xff\x51", "JPEG 2000"),
        (b"\0\0\0\x0cjP  ", "JPEG 2000"),
        (b"\0\0\0\x0cJXL ", "JPEG XL"),
        (b"\xff\x0a", "JPEG XL"),
        // The length of a bitmap's second header; its first, of 14 bytes, is missing.
        (b"\x28\0\0\0", "DIB, a bitmap without its file header"),
        (b"%PDF", "PDF"),
        (b"NRRD", "NRRD"),
        (b"\x1f\x8b", "compressed with gzip"),
    ];
    let found = SIGNATURES
        .iter()
        .find(|(start, _)| head.starts_with(start))?;
    Some(found.1)
}

impl PictureFormat {
    /// The format by the first bytes (132 are enough); a file's extension may be wrong.
    ///
    /// # Errors
    /// [`ImageError::Empty`] and [`ImageError::UnknownFormat`], both with `name`.
    pub fn of(head: &[u8], name: &str) -> Result<Self, ImageError> {
        let unknown = |found| {
            Err(ImageError::UnknownFormat {
                name: name.to_owned(),
                found,
            })
        };
        // First, since the preamble of a DICOM file may be the header of another format.
        if looks_like_dicom(head) {
            return Ok(Self::Dicom);
        }
        if let Some(found) = foreign(head) {
            return unknown(format!("the content is {found}"));
        }
        match image::guess_format(head) {
            Ok(ImageFormat::Png) => Ok(Self::Png),
            Ok(ImageFormat::Jpeg) => Ok(Self::Jpeg),
            Ok(ImageFormat::WebP) => Ok(Self::WebP),
            Ok(ImageFormat::Bmp) => Ok(Self::Bmp),
            Ok(ImageFormat::Tiff) => Ok(Self::Tiff),
            Ok(other) => unknown(format!("the content is {}", other.to_mime_type())),
            Err(_) if Tiff::new(head).is_some() => Ok(Self::Tiff),
            Err(_) if head.is_empty() => Err(ImageError::Empty {
                name: name.to_owned(),
            }),
            Err(_) => unknown(format!(
                "it begins with the bytes {:02x?}",
                &head[..head.len().min(4)]
            )),
        }
    }

    /// The decoder of the `image` crate; DICOM has one of its own.
    pub(super) fn decoder_format(self) -> Option<ImageFormat> {
        match self {
            Self::Png => Some(ImageFormat::Png),
            Self::Jpeg => Some(ImageFormat::Jpeg),
            Self::WebP => Some(ImageFormat::WebP),
            Self::Bmp => Some(ImageFormat::Bmp),
            Self::Tiff => Some(ImageFormat::Tiff),
            Self::Dicom => None,
        }
    }
}
