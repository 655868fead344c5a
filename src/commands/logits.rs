//! Logits of a fixed prompt, by which two states of a model are compared.

use anyhow::{Context, Result};

use super::progress::loading;
use crate::{
    batch::{
        images::ImageInput,
        text::{Padding, TextInput},
    },
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig},
    runtime::{
        accelerator::Accelerator,
        pipeline::{PipelineOptions, load_model},
    },
};

/// Loads a model, with progress.
pub(super) fn read<B: Accelerator>(
    options: &PipelineOptions,
    config: &Qwen3VlConfig,
    device: &B::Device,
) -> Result<Qwen3Vl<B>> {
    loading(|on_progress| load_model::<B>(options, config, device, on_progress))
        .with_context(|| format!("cannot load `{}`", options.model.display()))
}

/// Logits for a fixed prompt with an image of smooth stripes; exercises both towers.
pub(super) fn probe<B: Accelerator>(
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    device: &B::Device,
) -> Vec<f32> {
    let vision = &config.vision_config;
    let merge = vision.spatial_merge_size;
    let grid = [1, 4 * merge, 3 * merge];
    let patches = grid[1] * grid[2];
    let values = patches * vision.patch_dim();
    let images = ImageInput {
        pixel_values: (0..values).map(|i| (i as f32 * 0.013).sin()).collect(),
        image_grid_thw: vec![grid],
    };
    let text = |i: usize| (i * 7919 % config.image_token_id.max(2) as usize) as u32;
    let mut ids: Vec<u32> = (0..8).map(text).collect();
    ids.extend(std::iter::repeat_n(
        config.image_token_id,
        patches / (merge * merge),
    ));
    ids.extend((8..24).map(text));
    match TextInput::padded(&[ids], &[vec![grid]], config, Padding::Right, 0) {
        Ok((input, _)) => {
            let logits = model.forward(&input, &images, config, device);
            logits.into_data().iter::<f32>().collect()
        }
        Err(_) => vec![f32::NAN],
    }
}

/// Euclidean norm of the differences over that of `want`; NaN where the lengths differ.
pub(super) fn relative_distance(ours: &[f32], want: &[f32]) -> f64 {
    if ours.len() != want.len() {
        return f64::NAN;
    }
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = ours.iter().zip(want).map(|(a, b)| square(a - b)).sum();
    let norm: f64 = want.iter().map(|value| square(*value)).sum();
    (difference / norm.max(f64::MIN_POSITIVE)).sqrt()
}

/// The larger of two distances; NaN is the largest of all.
pub(super) fn larger_or_nan(a: f64, b: f64) -> f64 {
    if a.is_nan() || b <= a { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_is_the_largest_distance_in_any_place() {
        for distances in [
            [0.5, f64::NAN, 0.001],
            [f64::NAN, 0.5, 0.001],
            [0.001, 0.5, f64::NAN],
        ] {
            assert!(
                distances.into_iter().fold(0.0, larger_or_nan).is_nan(),
                "{distances:?}"
            );
        }
        assert_eq!([0.1, 0.5, 0.2].into_iter().fold(0.0, larger_or_nan), 0.5);
    }

    #[test]
    fn distance_is_relative_and_nan_for_other_lengths() {
        assert_eq!(relative_distance(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(relative_distance(&[6.0, 8.0], &[3.0, 4.0]), 1.0);
        assert!(relative_distance(&[1.0], &[1.0, 2.0]).is_nan());
        assert!(relative_distance(&[f32::NAN], &[1.0]).is_nan());
    }
}
