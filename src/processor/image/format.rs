//! File formats of pictures, recognised by content.

use std::fmt;

use image::ImageFormat;

use super::error::ImageError;
use super::tiff::Tiff;
use super::{nifti, nrrd, pnm};
use crate::processor::dicom::looks_like_dicom;
use crate::processor::{jpeg_2000, jpeg_ls};

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

/// A format that is not read, and how a file of it is made one that is.
struct Foreign {
    name: &'static str,
    hint: &'static str,
}

/// The hint for pictures that Pillow opens.
const BY_PILLOW: &str = "convert it to PNG, for instance with Python and Pillow: `from PIL import Image; Image.open(IN).convert(\"RGB\").save(\"OUT.png\")`";

/// The format of `head` if it is one that is not read.
fn foreign(head: &[u8]) -> Option<Foreign> {
    const AVIF: &str = "convert it to PNG, for instance with libavif's `avifdec IN OUT.png`";
    const HEIF: &str = "convert it to PNG, for instance with libheif's `heif-convert IN OUT.png`";
    const JPEG_XL: &str = "convert it to PNG, for instance with libjxl's `djxl IN OUT.png`";
    const PDF: &str =
        "convert its page to PNG, for instance with poppler's `pdftoppm -png -singlefile IN OUT`";
    const META: &str = "save it as NRRD, for instance with Python and SimpleITK: `sitk.WriteImage(sitk.ReadImage(IN), \"OUT.nrrd\")`";
    const PAM: &str = "convert it to PNG, for instance with netpbm's `pamtopng IN > OUT.png`";
    const PFM: &str =
        "convert it to PNG, for instance with netpbm's `pfmtopam IN | pamtopng > OUT.png`";
    const UNPACK: &str = "unpack it first with `gunzip`";
    const SIGNATURES: [(usize, &[u8], &str, &str); 14] = [
        (4, b"ftypavif", "AVIF", AVIF),
        (4, b"ftypavis", "AVIF", AVIF),
        (4, b"ftypheic", "HEIC", HEIF),
        (4, b"ftypheix", "HEIC", HEIF),
        (4, b"ftypmif1", "HEIF", HEIF),
        (0, b"\0\0\0\x0cJXL ", "JPEG XL", JPEG_XL),
        (0, b"\xff\x0a", "JPEG XL", JPEG_XL),
        // The length of a bitmap's second header; its first, of 14 bytes, is missing.
        (
            0,
            b"\x28\0\0\0",
            "DIB, a bitmap without its file header",
            BY_PILLOW,
        ),
        (0, b"%PDF", "PDF", PDF),
        (0, b"ObjectType = Image", "MetaImage", META),
        (0, b"\x1f\x8b", "compressed with gzip", UNPACK),
        (0, b"P7\n", "PAM", PAM),
        (0, b"Pf\n", "PFM", PFM),
        (0, b"PF\n", "PFM", PFM),
    ];
    let found = SIGNATURES.iter().find(|(at, signature, ..)| {
        head.get(*at..)
            .is_some_and(|rest| rest.starts_with(signature))
    })?;
    Some(Foreign {
        name: found.2,
        hint: found.3,
    })
}

impl PictureFormat {
    /// The format by the first bytes (a thousand are enough); a file's extension may be wrong.
    ///
    /// # Errors
    /// [`ImageError::Empty`] and [`ImageError::UnknownFormat`], both with `name`.
    pub fn of(head: &[u8], name: &str) -> Result<Self, ImageError> {
        let unknown = |found, hint| {
            Err(ImageError::UnknownFormat {
                name: name.to_owned(),
                found,
                hint,
            })
        };
        // First, since the preamble of a DICOM file may be the header of another format.
        if looks_like_dicom(head) {
            return Ok(Self::Dicom);
        }
        let own = [
            (jpeg_2000::is_jpeg_2000(head), Self::Jpeg2000),
            (jpeg_ls::is_jpeg_ls(head), Self::JpegLs),
            (pnm::is_pnm(head), Self::Pnm),
            (nrrd::is_nrrd(head), Self::Nrrd),
            (nifti::is_nifti(head), Self::Nifti),
            (Tiff::new(head).is_some(), Self::Tiff),
        ];
        if let Some((_, format)) = own.into_iter().find(|(is_it, _)| *is_it) {
            return Ok(format);
        }
        if let Some(Foreign { name, hint }) = foreign(head) {
            return unknown(format!("the content is {name}"), hint);
        }
        match image::guess_format(head) {
            Ok(ImageFormat::Png) => Ok(Self::Png),
            Ok(ImageFormat::Jpeg) => Ok(Self::Jpeg),
            Ok(ImageFormat::WebP) => Ok(Self::WebP),
            Ok(ImageFormat::Bmp) => Ok(Self::Bmp),
            Ok(ImageFormat::Gif) => Ok(Self::Gif),
            Ok(other) => unknown(
                format!("the content is {}", other.to_mime_type()),
                BY_PILLOW,
            ),
            Err(_) if head.is_empty() => Err(ImageError::Empty {
                name: name.to_owned(),
            }),
            Err(_) => unknown(
                format!(
                    "it begins with the bytes {:02x?}",
                    &head[..head.len().min(4)]
                ),
                "convert it to PNG",
            ),
        }
    }

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
