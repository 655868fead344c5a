//! Pixels of 8-bit red, green and blue.

use std::fmt;

use super::error::ImageError;

/// A picture of 8-bit red, green and blue, row by row from the top left.
#[derive(Clone, PartialEq, Eq)]
pub struct RgbImage {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl fmt::Debug for RgbImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RgbImage({} × {})", self.width, self.height)
    }
}

impl RgbImage {
    /// Takes `pixels` of layout `[height, width, 3]`.
    ///
    /// # Errors
    /// [`ImageError::PixelCount`] if a side is zero or the length is not `height × width × 3`.
    pub fn from_rgb(width: usize, height: usize, pixels: Vec<u8>) -> Result<Self, ImageError> {
        let expected = width
            .checked_mul(height)
            .and_then(|count| count.checked_mul(3));
        if pixels.is_empty() || expected != Some(pixels.len()) {
            return Err(ImageError::PixelCount {
                width,
                height,
                bytes: pixels.len(),
            });
        }
        Ok(Self {
            width,
            height,
            pixels,
        })
    }

    /// Spreads grey `pixels` of layout `[height, width]` over the three channels.
    ///
    /// # Errors
    /// [`ImageError::PixelCount`] if a side is zero or the length is not `height × width`.
    pub fn from_gray(width: usize, height: usize, pixels: &[u8]) -> Result<Self, ImageError> {
        Self::from_rgb(width, height, spread(pixels.iter().copied()))
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Pixels `[height, width, 3]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Gives the pixels `[height, width, 3]` away.
    pub fn into_pixels(self) -> Vec<u8> {
        self.pixels
    }
}

/// Grey levels as pixels of three equal channels.
pub(super) fn spread(gray: impl ExactSizeIterator<Item = u8>) -> Vec<u8> {
    let mut pixels = vec![0; gray.len() * 3];
    for (pixel, value) in pixels.as_chunks_mut::<3>().0.iter_mut().zip(gray) {
        *pixel = [value; 3];
    }
    pixels
}
