//! Why a picture could not be used.

use std::io;
use std::path::PathBuf;

use super::format::PictureFormat;
use crate::processor::dicom::DicomError;

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
        "`{name}` is not a {} picture ({found}); hint: {hint}",
        super::format::NAMES
    )]
    UnknownFormat {
        /// File or upload.
        name: String,
        /// What the content looks like.
        found: String,
        /// How it is made one that is read.
        hint: &'static str,
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
        "{format} picture `{name}` holds pixels of a kind that is not read ({found}); hint: save it as PNG, in 8 or 16 bit grey or RGB"
    )]
    UnsupportedPixels {
        /// File or upload.
        name: String,
        /// File format.
        format: PictureFormat,
        /// The kind of pixels.
        found: String,
    },
    /// A file of more than two dimensions.
    #[error(
        "{format} file `{name}` is a volume of {sides}, expected one plane; hint: `--frame N` of `infer` and `preview` takes plane N of {planes}; else save it as a file of its own, for instance with Python and {}",
        if *.format == PictureFormat::Nrrd {
            "pynrrd: `nrrd.write(OUT, nrrd.read(IN)[0][:, :, N])`"
        } else {
            "nibabel: `nibabel.load(IN).slicer[:, :, N:N + 1].to_filename(OUT)`"
        }
    )]
    Volume {
        /// File or upload.
        name: String,
        /// File format.
        format: PictureFormat,
        /// Lengths of its axes.
        sides: String,
        /// Planes along all axes but the first two.
        planes: u32,
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
        "{format} picture `{name}` has no frame {frame}, expected {}",
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
        0 | 1 => "1; hint: leave out --frame".to_owned(),
        frames => format!("1 to {frames}"),
    }
}
