//! Sizes and pixels of the scaled picture: `smart_resize` and Pillow's bicubic filter, bit for bit.
//!
//! The reference pipeline scales 8-bit pixels with Pillow, so the model was trained on Pillow's
//! rounding. Crates that follow a faster fixed-point scheme differ by one level here and there, hence
//! this small convolution of our own. This module knows nothing of files, patches or tensors.

use std::borrow::Cow;

use super::image::{ImageError, RgbImage};

/// Longest side over shortest side that the reference still accepts.
const MAX_ASPECT_RATIO: f64 = 200.0;

/// Which of the two published `smart_resize` functions chooses the size.
///
/// They differ only where a side rounds to zero patches: the first grows such a picture to
/// `min_pixels` keeping its shape, the second first lifts the short side to one `factor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ResizeRule {
    /// `smart_resize` of transformers, Qwen2-VL image processing.
    Transformers,
    /// `smart_resize` of `qwen_vl_utils` 0.0.14, which ms-swift trains with.
    #[default]
    QwenVlUtils,
}

/// Chooses the size an image is scaled to before it is cut into patches.
///
/// Keeps the aspect ratio as far as both sides stay multiples of `factor` (patch size times merge
/// size) and their product stays between `min_pixels` and `max_pixels`. `height` and `width` are in
/// pixels, and so is the returned `(height, width)`. Halves round to the even multiple. A side is
/// never less than `factor`, so a very long picture may pass `max_pixels` by a little.
///
/// # Errors
/// [`ImageError::AspectRatio`] if one side is more than 200 times the other, or zero.
///
/// Source: `smart_resize`, transformers (Qwen2-VL image processing) and `qwen_vl_utils`.
pub fn smart_resize(
    height: usize,
    width: usize,
    factor: usize,
    min_pixels: usize,
    max_pixels: usize,
    rule: ResizeRule,
) -> Result<(usize, usize), ImageError> {
    let (h, w) = (height as f64, width as f64);
    if height == 0 || width == 0 || factor == 0 || h.max(w) / h.min(w) > MAX_ASPECT_RATIO {
        return Err(ImageError::AspectRatio { width, height });
    }
    let unit = factor as f64;
    let nearest = |side: f64| (side / unit).round_ties_even() as usize * factor;
    let (mut new_height, mut new_width) = (nearest(h), nearest(w));
    if rule == ResizeRule::QwenVlUtils {
        (new_height, new_width) = (new_height.max(factor), new_width.max(factor));
    }
    if new_height * new_width > max_pixels {
        let beta = (h * w / max_pixels as f64).sqrt();
        let down = |side: f64| ((side / beta / unit).floor() as usize * factor).max(factor);
        (new_height, new_width) = (down(h), down(w));
    } else if new_height * new_width < min_pixels {
        let beta = (min_pixels as f64 / (h * w)).sqrt();
        let up = |side: f64| (side * beta / unit).ceil() as usize * factor;
        (new_height, new_width) = (up(h), up(w));
    }
    // Only `min_pixels` of zero leaves a side at zero here.
    Ok((new_height.max(factor), new_width.max(factor)))
}

/// Fraction bits of a weight: 8 bits of pixel and 2 of overshoot leave 22 of 32.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// Half a level, so that the shift at the end rounds.
const ROUNDING: i32 = 1 << (PRECISION_BITS - 1);

/// Reach of the bicubic kernel in source pixels at scale one.
const SUPPORT: f64 = 2.0;

/// Catmull-Rom kernel (a = -0.5), its operations in Pillow's order.
fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// Weights of one axis: output `i` is the sum of `count` inputs from `first` on.
struct AxisWeights {
    /// `(first, count)` per output.
    bounds: Vec<(usize, usize)>,
    /// `stride` weights per output, fixed point.
    values: Vec<i32>,
    stride: usize,
}

impl AxisWeights {
    /// Source: `precompute_coeffs` and `normalize_coeffs_8bpc`, Pillow, `Resample.c`.
    fn new(input: usize, output: usize) -> Self {
        let scale = input as f64 / output as f64;
        let filter_scale = scale.max(1.0);
        let support = SUPPORT * filter_scale;
        let inverse = 1.0 / filter_scale;
        let stride = support.ceil() as usize * 2 + 1;
        let mut bounds = Vec::with_capacity(output);
        let mut values = vec![0; output * stride];
        let mut exact = Vec::with_capacity(stride);
        for (index, row) in values.chunks_exact_mut(stride).enumerate() {
            let center = (index as f64 + 0.5) * scale;
            // The casts truncate as C's do; below zero they give zero, where C is clamped to zero.
            let first = (center - support + 0.5) as usize;
            let last = ((center + support + 0.5) as usize).min(input);
            exact.clear();
            exact.extend((first..last).map(|x| bicubic((x as f64 - center + 0.5) * inverse)));
            let total: f64 = exact.iter().sum();
            for (value, weight) in row.iter_mut().zip(&exact) {
                let weight = if total != 0.0 {
                    weight / total
                } else {
                    *weight
                };
                let fixed = weight * f64::from(1 << PRECISION_BITS);
                *value = if weight < 0.0 {
                    (fixed - 0.5) as i32
                } else {
                    (fixed + 0.5) as i32
                };
            }
            bounds.push((first, exact.len()));
        }
        Self {
            bounds,
            values,
            stride,
        }
    }

    /// First input, and the weights of the inputs from there on, of output `index`.
    fn of(&self, index: usize) -> (usize, &[i32]) {
        let (first, count) = self.bounds[index];
        let start = index * self.stride;
        (first, &self.values[start..start + count])
    }
}

fn to_u8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Scales `image` to `width` × `height` pixels exactly as Pillow's `Image.resize` with `BICUBIC`.
///
/// Rows are scaled first, then columns, with 8-bit pixels between; where the height shrinks by more
/// than twice as many pixels as the width, columns come first. (Pillow before 13 always began with
/// the rows, which differs by one level here and there.) An axis that keeps its size is left out.
/// Downscaling widens the filter, so nothing aliases.
///
/// # Errors
/// [`ImageError::PixelCount`] if a wanted side is zero.
///
/// Source: `ImagingResampleInner`, Pillow 13.0.0, `Resample.c`.
pub fn resize_bicubic(
    image: &RgbImage,
    width: usize,
    height: usize,
) -> Result<RgbImage, ImageError> {
    let (from_width, from_height) = (image.width(), image.height());
    if width == 0 || height == 0 {
        return Err(ImageError::PixelCount {
            width,
            height,
            bytes: 0,
        });
    }
    let mut pixels = Cow::Borrowed(image.pixels());
    let columns_first = from_height > height
        && (from_height - height) as i64 > 2 * (from_width as i64 - width as i64);
    if columns_first {
        pixels = Cow::Owned(scale_columns(&pixels, from_width * 3, from_height, height));
    }
    if width != from_width {
        pixels = Cow::Owned(scale_rows(&pixels, from_width, width));
    }
    if height != from_height && !columns_first {
        pixels = Cow::Owned(scale_columns(&pixels, width * 3, from_height, height));
    }
    RgbImage::from_rgb(width, height, pixels.into_owned())
}

/// Scales every row of `pixels` from `from` to `to` pixels.
fn scale_rows(pixels: &[u8], from: usize, to: usize) -> Vec<u8> {
    let weights = AxisWeights::new(from, to);
    let rows = pixels.len() / (from * 3);
    let mut out = vec![0; rows * to * 3];
    for (source, target) in pixels
        .chunks_exact(from * 3)
        .zip(out.chunks_exact_mut(to * 3))
    {
        for (index, pixel) in target.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            let (first, weights) = weights.of(index);
            let mut sums = [ROUNDING; 3];
            for (rgb, weight) in source[first * 3..].as_chunks::<3>().0.iter().zip(weights) {
                for (sum, value) in sums.iter_mut().zip(rgb) {
                    *sum += i32::from(*value) * weight;
                }
            }
            *pixel = sums.map(to_u8);
        }
    }
    out
}

/// Scales the columns of rows of `stride` bytes from `from` to `to` rows.
fn scale_columns(pixels: &[u8], stride: usize, from: usize, to: usize) -> Vec<u8> {
    // As many sums as stay in registers; the rest of a row follows one by one.
    const LANES: usize = 32;
    let weights = AxisWeights::new(from, to);
    let mut out = vec![0; to * stride];
    for (index, target) in out.chunks_exact_mut(stride).enumerate() {
        let (first, weights) = weights.of(index);
        let source = &pixels[first * stride..];
        let (blocks, rest) = target.as_chunks_mut::<LANES>();
        for (block, lanes) in blocks.iter_mut().enumerate() {
            let mut sums = [ROUNDING; LANES];
            for (row, weight) in source[block * LANES..].chunks(stride).zip(weights) {
                for (sum, value) in sums.iter_mut().zip(&row[..LANES]) {
                    *sum += i32::from(*value) * weight;
                }
            }
            *lanes = sums.map(to_u8);
        }
        let done = blocks.len() * LANES;
        for (lane, value) in rest.iter_mut().enumerate() {
            let column = source[done + lane..].iter().step_by(stride);
            *value = to_u8(
                column
                    .zip(weights)
                    .fold(ROUNDING, |sum, (v, w)| sum + i32::from(*v) * w),
            );
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(height: usize, width: usize, rule: ResizeRule) -> Option<(usize, usize)> {
        smart_resize(height, width, 32, 4096, 1_003_520, rule).ok()
    }

    #[test]
    fn sizes_are_multiples_between_the_limits() {
        for rule in [ResizeRule::Transformers, ResizeRule::QwenVlUtils] {
            assert_eq!(size(1, 1, rule), Some((64, 64)));
            assert_eq!(size(514, 512, rule), Some((512, 512)));
            // 80 / 32 is 2.5 and 112 / 32 is 3.5: halves go to the even multiple.
            assert_eq!(size(80, 112, rule), Some((64, 128)));
            assert_eq!(size(20_000, 20_000, rule), Some((992, 992)));
            assert_eq!(size(1, 201, rule), None);
            assert_eq!(size(0, 5, rule), None);
        }
        assert_eq!(size(1, 200, ResizeRule::Transformers), Some((32, 928)));
        assert_eq!(size(1, 200, ResizeRule::QwenVlUtils), Some((32, 192)));
        let (height, width) = smart_resize(1, 200, 32, 1, 1024, ResizeRule::QwenVlUtils).unwrap();
        assert_eq!((height, width), (32, 448));
    }

    #[test]
    fn weights_of_an_output_add_up_to_one() {
        for (from, to) in [
            (1, 64),
            (97, 96),
            (70, 64),
            (1500, 352),
            (9, 96),
            (20_000, 1_001),
        ] {
            let weights = AxisWeights::new(from, to);
            for index in 0..to {
                let (first, weights) = weights.of(index);
                assert!(first + weights.len() <= from);
                // Each weight is rounded by half a unit at most.
                let sum: i32 = weights.iter().sum();
                assert!((sum - (1 << PRECISION_BITS)).unsigned_abs() as usize <= weights.len());
            }
        }
    }

    #[test]
    fn a_flat_picture_stays_flat_and_an_equal_size_stays_itself() {
        let flat = RgbImage::from_rgb(37, 41, vec![201; 37 * 41 * 3]).unwrap();
        let scaled = resize_bicubic(&flat, 96, 32).unwrap();
        assert_eq!((scaled.width(), scaled.height()), (96, 32));
        assert!(scaled.pixels().iter().all(|value| *value == 201));
        let pixels = (0..6 * 4 * 3).map(|value| value as u8).collect();
        let picture = RgbImage::from_rgb(6, 4, pixels).unwrap();
        assert_eq!(resize_bicubic(&picture, 6, 4).unwrap(), picture);
        assert!(resize_bicubic(&picture, 0, 4).is_err());
    }
}
