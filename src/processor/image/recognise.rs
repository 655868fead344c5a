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
    const VIDEO: &str =
        "take a picture from it, for instance with `ffmpeg -i IN -frames:v 1 OUT.png`";
    const LFS: &str = "bring the file itself with `git lfs pull`, or download it again";
    const SIGNATURES: [(usize, &[u8], &str, &str); 24] = [
        (
            0,
            b"version https://git-lfs",
            "a pointer of git-lfs in place of a file",
            LFS,
        ),
        (4, b"ftypisom", "a video", VIDEO),
        (4, b"ftypmp4", "a video", VIDEO),
        (4, b"ftypqt", "a video", VIDEO),
        (0, b"\x1aE\xdf\xa3", "a video", VIDEO),
        (0, b"8BPS", "a document of Photoshop", BY_PILLOW),
        (0, b"%!PS", "PostScript", BY_PILLOW),
        (0, b"\x0a\x05\x01\x08", "PCX", BY_PILLOW),
        (0, b"\x01\xda", "SGI", BY_PILLOW),
        (0, b"icns", "an icon", BY_PILLOW),
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
    if let Some(text) = foreign_text(head) {
        return Some(text);
    }
    let found = SIGNATURES.iter().find(|(at, signature, ..)| {
        head.get(*at..)
            .is_some_and(|rest| rest.starts_with(signature))
    })?;
    Some(Foreign {
        name: found.2,
        hint: found.3,
    })
}

/// Text under the name of a picture: what a server answers in place of one, or a drawing.
fn foreign_text(head: &[u8]) -> Option<Foreign> {
    const AGAIN: &str = "look at it in an editor, it may say why the picture was not given, and download the picture again";
    const SVG: &str = "convert it to PNG, for instance with librsvg's `rsvg-convert IN -o OUT.png`";
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    let start = head.trim_ascii_start().to_ascii_lowercase();
    let begins = |word: &str| start.starts_with(word.as_bytes());
    let holds = |word: &str| {
        start
            .windows(word.len())
            .any(|part| part == word.as_bytes())
    };
    let (name, hint) = if begins("<svg") || begins("<?xml") && holds("<svg") {
        ("SVG, a drawing", SVG)
    } else if begins("<!doctype html") || begins("<html") {
        (
            "a web page (HTML), most likely an error of a download",
            AGAIN,
        )
    } else if begins("<?xml") {
        ("XML, most likely an error of a download", AGAIN)
    } else if begins("{\"") || begins("[{\"") {
        ("JSON, most likely an error of a download", AGAIN)
    } else {
        return None;
    };
    Some(Foreign { name, hint })
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
