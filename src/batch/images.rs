//! The images of a batch as normalised patches.

use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::pixels::Pixels;

/// The images of a batch, on the host: all patches one after another.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ImageInput {
    /// Normalised patches, `[patches, patch_dim]` row-major, in merge-block order.
    pub pixel_values: Pixels,
    /// Patches of each image: `(time, height, width)`.
    pub image_grid_thw: Vec<[usize; 3]>,
}

impl ImageInput {
    /// Appends the images of `other`.
    pub fn extend(&mut self, other: &Self) {
        self.pixel_values.extend_from_slice(&other.pixel_values);
        self.image_grid_thw.extend_from_slice(&other.image_grid_thw);
    }

    /// Number of patches of all images.
    pub fn patches(&self) -> usize {
        self.image_grid_thw.iter().map(|[t, h, w]| t * h * w).sum()
    }

    /// Writes the values of all patches, rounded to bf16.
    ///
    /// # Panics
    /// If there is not room for exactly that many.
    pub fn write_half_values(&self, half: &mut [half::bf16]) {
        const PIECE: usize = 1 << 15;
        assert_eq!(half.len(), self.pixel_values.len(), "room for the pixels");
        half.par_chunks_mut(PIECE)
            .zip(self.pixel_values.par_chunks(PIECE))
            .for_each(|(half, values)| half.convert_from_f32_slice(values));
    }
}
