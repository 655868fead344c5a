//! TIFF pages to pixels: strips and tiles, all usual compressions, kinds of numbers and colours.
//!
//! Read are one bit to 16 bits a sample, whole numbers of 32 and 64 bits and fractions of 16, 32 and 64;
//! grey, RGB, palettes, CMYK, YCbCr and CIELab; chunky and planar; BigTIFF; uncompressed, LZW, deflate, PackBits,
//! CCITT (Huffman, Group 3, Group 4), JPEG and old JPEG. Pixels become what Pillow makes of them; numbers
//! with a sign and fractions are shown as [`super::measured`] says.

mod chunks;
mod directory;
mod fax;
mod layout;
mod old_jpeg;
mod pixels;

use image::DynamicImage;
use image::metadata::Orientation;

pub(super) use directory::Tiff;
use directory::{Directory, tag};
use layout::Layout;

use super::refusal::Refusal;
use crate::processor::decode_limits::DecodeLimits;
use crate::processor::remark::Remark;

/// A decoded page.
pub(super) struct Page {
    /// The pixels as stored; grey of 16 bits as if its lowest level were black.
    pub(super) picture: DynamicImage,
    /// How it has to be rotated or mirrored.
    pub(super) orientation: Orientation,
    /// Whether its lowest level is white.
    pub(super) white_is_zero: bool,
    /// Bits of a level.
    pub(super) precision: u32,
}

/// What a page's directory says.
pub(super) struct PageHeader {
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) orientation: Orientation,
    /// Bytes that decoding it holds.
    pub(super) bytes: u64,
}

impl Tiff<'_> {
    /// How many pages there are, 1 at least.
    pub(super) fn page_count(&self) -> usize {
        self.pages().len().max(1)
    }

    /// The directory of page `page`, counted from 0.
    fn page_directory(&self, page: usize) -> Result<Directory, Refusal> {
        let mut pages = self.pages().into_iter();
        let first = "its first directory is not where it says";
        pages.nth(page).ok_or_else(|| Refusal::damaged(first))
    }

    /// What the directory of page `page`, counted from 0, says, checked against the limits.
    ///
    /// # Errors
    /// A page of a kind that is not read, or one of the limits.
    pub(super) fn header(&self, page: usize, limits: &DecodeLimits) -> Result<PageHeader, Refusal> {
        let directory = self.page_directory(page)?;
        let layout = Layout::new(self, &directory, limits)?;
        Ok(PageHeader {
            width: layout.width,
            height: layout.height,
            orientation: orientation(self, &directory),
            bytes: layout.bytes_needed(),
        })
    }

    /// Decodes page `page`, counted from 0; remarks on it are added to `remarks`.
    ///
    /// # Errors
    /// Any [`Refusal`].
    pub(super) fn page(
        &self,
        page: usize,
        limits: &DecodeLimits,
        remarks: &mut Vec<Remark>,
    ) -> Result<Page, Refusal> {
        let directory = self.page_directory(page)?;
        let layout = Layout::new(self, &directory, limits)?;
        let numbers = chunks::numbers(self, &directory, &layout, limits, remarks)?;
        Ok(Page {
            picture: pixels::picture(self, &directory, &layout, numbers, remarks)?,
            orientation: orientation(self, &directory),
            white_is_zero: layout.white_is_zero(),
            precision: layout.bits,
        })
    }
}

/// The orientation in the directory; a broken tag is no reason to refuse sound pixels.
fn orientation(tiff: &Tiff<'_>, directory: &Directory) -> Orientation {
    let found = tiff.value(directory, tag::ORIENTATION);
    let found = found.and_then(|found| u8::try_from(found).ok());
    found
        .and_then(Orientation::from_exif)
        .unwrap_or(Orientation::NoTransforms)
}
