//! File formats of pictures, and the endings of their files.

use std::fmt;

use image::ImageFormat;

/// The formats that are read, for a sentence.
pub const NAMES: &str =
    "PNG, JPEG, WebP, BMP, GIF, TIFF, JPEG 2000, JPEG-LS, PNM, NIfTI, NRRD or DICOM";

/// Endings of files that are read, in lower case; DICOM files have any, or none.
///
/// A gzipped NIfTI file ends in `nii.gz`; see [`has_picture_ending`].
pub const ENDINGS: [&str; 23] = [
    "png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "gif", "tif", "tiff", "jp2", "j2k", "j2c",
    "jpc", "jls", "pbm", "pgm", "ppm", "pnm", "nii", "nrrd", "dcm", "dicom",
];

/// Whether the file name `name` has an ending of a picture that is read.
pub fn has_picture_ending(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let ending = name
        .strip_suffix(".gz")
        .filter(|name| name.ends_with(".nii"));
    let ending = ending.unwrap_or(&name).rsplit_once('.');
    ending.is_some_and(|(_, ending)| ENDINGS.contains(&ending))
}

/// File formats that [`super::decode`] reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PictureFormat {
    /// Portable Network Graphics.
    Png,
    /// JPEG: baseline, progressive, of 12 bits, lossless.
    Jpeg,
    /// WebP, with and without loss; the first frame of an animation.
    WebP,
    /// Windows bitmap.
    Bmp,
    /// GIF; the first frame of an animation.
    Gif,
    /// TIFF and BigTIFF.
    Tiff,
    /// JPEG 2000, in a JP2 file or as a bare stream, HTJ2K included.
    Jpeg2000,
    /// JPEG-LS.
    JpegLs,
    /// Portable bitmap, graymap and pixmap.
    Pnm,
    /// NIfTI-1 and NIfTI-2 of one plane.
    Nifti,
    /// NRRD of one plane.
    Nrrd,
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
            Self::Gif => "GIF",
            Self::Tiff => "TIFF",
            Self::Jpeg2000 => "JPEG 2000",
            Self::JpegLs => "JPEG-LS",
            Self::Pnm => "PNM",
            Self::Nifti => "NIfTI",
            Self::Nrrd => "NRRD",
            Self::Dicom => "DICOM",
        })
    }
}

impl PictureFormat {
    /// The decoder of the `image` crate; `None` for what is decoded otherwise.
    pub(super) fn decoder_format(self) -> Option<ImageFormat> {
        match self {
            Self::Png => Some(ImageFormat::Png),
            Self::Jpeg => Some(ImageFormat::Jpeg),
            Self::WebP => Some(ImageFormat::WebP),
            Self::Bmp => Some(ImageFormat::Bmp),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_are_those_of_pictures() {
        for name in ["a.PNG", "x/b.jp2", "c.nii.gz", "d.e.nrrd", "1.2.dcm"] {
            assert!(has_picture_ending(name), "{name}");
        }
        for name in ["a.gz", "b.txt", "png", "c.nii.bz2", ""] {
            assert!(!has_picture_ending(name), "{name}");
        }
    }
}
