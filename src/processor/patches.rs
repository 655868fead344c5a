//! RGB pictures to the vision tower's input: scaled, normalised, cut into patches in its order.
//!
//! Patches come in blocks of `merge_size` × `merge_size`, because the patch merger joins rows that
//! are adjacent in the sequence. A still picture counts as `temporal_patch_size` equal video frames.
//! This module knows nothing of tensors, tokens or prompts; it yields plain vectors.
//!
//! Shape letters: `patches` = grid time × height × width, `row` = channels × `temporal_patch_size` ×
//! `patch_size` × `patch_size`.

mod config;

use std::borrow::Cow;
use std::path::Path;

use config::CHANNELS;
pub use config::{ImageProcessorConfig, PREPROCESSOR_FILE, PROCESSOR_FILE, write_pixel_limits};

use super::image::{self, DecodeLimits, ImageError, Reading, RgbImage};
use super::resize::{resize_bicubic, smart_resize};
use super::sample::PixelLimits;

/// One picture, ready for the patch embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct ImagePatches {
    /// `[patches, row]`, row-major; a row is `[channels, temporal, patch, patch]`.
    pub pixel_values: Vec<f32>,
    /// Time, height and width in patches.
    pub grid_thw: [usize; 3],
}

/// Makes [`ImagePatches`] of pictures; cheap to share between threads.
#[derive(Debug, Clone)]
pub struct ImageProcessor {
    config: ImageProcessorConfig,
    limits: DecodeLimits,
    /// Normalised value of every level, per channel.
    levels: [[f32; 256]; CHANNELS],
}

impl ImageProcessor {
    /// Checks `config` and prepares its tables; pictures are decoded under [`DecodeLimits::default`].
    ///
    /// # Errors
    /// [`ImageError::ConfigValue`] if the configuration cannot be used.
    pub fn new(config: ImageProcessorConfig) -> Result<Self, ImageError> {
        config.validate()?;
        let levels = std::array::from_fn(|channel| {
            // The reference folds 1/255 into both numbers before it rounds to f32.
            let mean = config.image_mean[channel] * 255.0;
            let std = config.image_std[channel] * 255.0;
            std::array::from_fn(|level| (level as f32 - mean) / std)
        });
        Ok(Self {
            config,
            limits: DecodeLimits::default(),
            levels,
        })
    }

    /// Decodes pictures under other limits.
    #[must_use]
    pub fn with_limits(mut self, limits: DecodeLimits) -> Self {
        self.limits = limits;
        self
    }

    /// This processor at a row's own pixel limits.
    ///
    /// Where only one limit is given and the other contradicts it, the given one holds for both.
    ///
    /// # Errors
    /// [`ImageError::ConfigValue`] if the limits cannot be used.
    pub fn with_pixels(&self, limits: PixelLimits) -> Result<Cow<'_, Self>, ImageError> {
        if limits == PixelLimits::default() {
            return Ok(Cow::Borrowed(self));
        }
        let mut own = self.clone();
        let config = &mut own.config;
        config.max_pixels = limits.max_pixels.unwrap_or(config.max_pixels);
        config.min_pixels = limits.min_pixels.unwrap_or(config.min_pixels);
        if limits.min_pixels.is_none() {
            config.min_pixels = config.min_pixels.min(config.max_pixels);
        }
        if limits.max_pixels.is_none() {
            config.max_pixels = config.max_pixels.max(config.min_pixels);
        }
        own.config.validate()?;
        Ok(Cow::Owned(own))
    }

    /// The sizes this processor works with.
    pub fn config(&self) -> &ImageProcessorConfig {
        &self.config
    }

    /// Reads and decodes the picture at `path`; see [`image::load`].
    ///
    /// # Errors
    /// As [`image::load`]; each names the file.
    pub fn load(&self, path: &Path) -> Result<RgbImage, ImageError> {
        image::load(path, &self.limits)
    }

    /// Reads a frame of the picture at `path`, and what to know of it; see [`image::read`].
    ///
    /// # Errors
    /// As [`image::read`]; each names the file.
    pub fn read(&self, path: &Path, frame: Option<usize>) -> Result<Reading, ImageError> {
        image::read(path, frame, &self.limits)
    }

    /// Decodes the picture in `bytes`, called `name` in messages; see [`image::decode`].
    ///
    /// # Errors
    /// As [`image::decode`]; each carries `name`.
    pub fn decode(&self, bytes: &[u8], name: &str) -> Result<RgbImage, ImageError> {
        image::decode(bytes, name, &self.limits)
    }

    /// What decoding the picture in `bytes` takes; see [`image::decoding_cost`].
    ///
    /// # Errors
    /// As [`image::decoding_cost`]; each carries `name`.
    pub fn decoding_cost(
        &self,
        bytes: &[u8],
        name: &str,
    ) -> Result<image::DecodingCost, ImageError> {
        image::decoding_cost(bytes, name, &self.limits)
    }

    /// As [`Self::decode`], with what a reader of a report should know about the picture.
    ///
    /// # Errors
    /// As [`image::decode`]; each carries `name`.
    pub fn decode_with_remarks(&self, bytes: &[u8], name: &str) -> Result<Reading, ImageError> {
        image::decode_frame(bytes, name, None, &self.limits)
    }

    /// Width and height of the picture at `path`, from its header alone; see [`image::probe`].
    ///
    /// # Errors
    /// As [`image::probe`]; each names the file.
    pub fn probe(&self, path: &Path) -> Result<(usize, usize), ImageError> {
        image::probe(path, &self.limits)
    }

    /// The grid `[time, height, width]`, in patches, of a picture of `height` × `width` pixels.
    ///
    /// # Errors
    /// [`ImageError::AspectRatio`] if one side is more than 200 times the other.
    pub fn grid_for(&self, height: usize, width: usize) -> Result<[usize; 3], ImageError> {
        let (height, width) = self.size_for(height, width)?;
        Ok([
            1,
            height / self.config.patch_size,
            width / self.config.patch_size,
        ])
    }

    /// Tokens that a picture of grid `grid_thw` takes in the decoder's sequence.
    pub fn num_tokens(&self, grid_thw: [usize; 3]) -> usize {
        grid_thw.iter().product::<usize>() / self.config.merge_size.pow(2)
    }

    /// `picture` at the size the model sees; borrowed if it has that size already.
    ///
    /// # Errors
    /// [`ImageError::AspectRatio`] if one side is more than 200 times the other.
    pub fn resize<'a>(&self, picture: &'a RgbImage) -> Result<Cow<'a, RgbImage>, ImageError> {
        let (height, width) = self.size_for(picture.height(), picture.width())?;
        if (height, width) == (picture.height(), picture.width()) {
            return Ok(Cow::Borrowed(picture));
        }
        resize_bicubic(picture, width, height).map(Cow::Owned)
    }

    /// Scales `picture`, normalises it and cuts it into patches.
    ///
    /// # Errors
    /// [`ImageError::AspectRatio`] if one side is more than 200 times the other.
    ///
    /// Source: `Qwen2VLImageProcessor`, transformers.
    pub fn process(&self, picture: &RgbImage) -> Result<ImagePatches, ImageError> {
        let picture = self.resize(picture)?;
        let patch = self.config.patch_size;
        let grid_thw = [1, picture.height() / patch, picture.width() / patch];
        Ok(ImagePatches {
            pixel_values: self.cut(&picture),
            grid_thw,
        })
    }

    fn size_for(&self, height: usize, width: usize) -> Result<(usize, usize), ImageError> {
        let ImageProcessorConfig {
            min_pixels,
            max_pixels,
            resize_rule,
            ..
        } = self.config;
        smart_resize(
            height,
            width,
            self.config.factor(),
            min_pixels,
            max_pixels,
            resize_rule,
        )
    }

    /// Patches of a picture whose sides are multiples of the factor.
    fn cut(&self, picture: &RgbImage) -> Vec<f32> {
        let ImageProcessorConfig {
            patch_size: patch,
            merge_size: merge,
            ..
        } = self.config;
        let frames = self.config.temporal_patch_size;
        let (stride, area) = (picture.width() * CHANNELS, patch * patch);
        let (rows, columns) = (picture.height() / patch, picture.width() / patch);
        let row_len = self.config.row_len();
        let mut pixel_values = vec![0.0; rows * columns * row_len];
        // A block of merge × merge patches is contiguous in the output, and blocks follow each other
        // in reading order.
        for (index, out) in pixel_values.chunks_exact_mut(row_len).enumerate() {
            let (block, inside) = (index / (merge * merge), index % (merge * merge));
            let blocks_across = columns / merge;
            let top = (block / blocks_across * merge + inside / merge) * patch;
            let left = (block % blocks_across * merge + inside % merge) * patch;
            for y in 0..patch {
                let start = (top + y) * stride + left * CHANNELS;
                let source = picture.pixels()[start..start + patch * CHANNELS]
                    .as_chunks::<3>()
                    .0;
                for (channel, levels) in self.levels.iter().enumerate() {
                    let start = channel * frames * area + y * patch;
                    for (value, rgb) in out[start..start + patch].iter_mut().zip(source) {
                        *value = levels[usize::from(rgb[channel])];
                    }
                }
            }
            for frame in out.chunks_exact_mut(frames * area) {
                let (first, others) = frame.split_at_mut(area);
                others
                    .chunks_exact_mut(area)
                    .for_each(|other| other.copy_from_slice(first));
            }
        }
        pixel_values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_come_in_blocks_and_frames_repeat() {
        let config = ImageProcessorConfig {
            patch_size: 2,
            min_pixels: 16,
            max_pixels: 1024,
            ..Default::default()
        };
        let processor = ImageProcessor::new(config).unwrap();
        // 4 × 8 pixels of 2 × 4 patches; red counts pixels, green is 0, blue is 255.
        let pixels = (0..32).flat_map(|index| [index, 0, 255]).collect();
        let picture = RgbImage::from_rgb(8, 4, pixels).unwrap();
        let patches = processor.process(&picture).unwrap();
        assert_eq!(patches.grid_thw, [1, 2, 4]);
        assert_eq!(processor.num_tokens(patches.grid_thw), 2);
        let rows: Vec<&[f32]> = patches.pixel_values.chunks(24).collect();
        let red = |row: &[f32]| {
            row.iter()
                .map(|v| (v * 127.5 + 127.5).round())
                .collect::<Vec<_>>()
        };
        // The block on the left: two patches above, two below; then the block on the right.
        let corners: Vec<f32> = rows.iter().map(|row| red(row)[0]).collect();
        assert_eq!(corners, [0.0, 2.0, 16.0, 18.0, 4.0, 6.0, 20.0, 22.0]);
        assert_eq!(red(&rows[0][..8]), [0.0, 1.0, 8.0, 9.0, 0.0, 1.0, 8.0, 9.0]);
        assert!(rows[0][8..16].iter().all(|value| *value == -1.0));
        assert!(rows[0][16..].iter().all(|value| *value == 1.0));
    }

    #[test]
    fn a_single_pixel_becomes_the_smallest_picture() {
        let processor = ImageProcessor::new(ImageProcessorConfig::default()).unwrap();
        let pixel = RgbImage::from_gray(1, 1, &[255]).unwrap();
        let patches = processor.process(&pixel).unwrap();
        assert_eq!(patches.grid_thw, [1, 4, 4]);
        assert!(patches.pixel_values.iter().all(|value| *value == 1.0));
        let line = RgbImage::from_gray(201, 1, &[0; 201]).unwrap();
        let error = processor.process(&line).unwrap_err().to_string();
        assert!(error.contains("201 × 1"), "{error}");
    }
}
