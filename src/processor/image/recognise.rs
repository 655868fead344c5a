//! The format of a picture by its first bytes.

use image::ImageFormat;

use super::error::ImageError;
use super::format::PictureFormat;
use super::tiff::Tiff;
use super::{nifti, nrrd, pnm};
use crate::processor::dicom::looks_like_dicom;
use crate::processor::{jpeg_2000, jpeg_ls};

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
}
