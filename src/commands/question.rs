//! Questions of a data set about images of its rows, a row's own or another's.

use anyhow::{Context, Result};

use crate::{
    batch::images::ImageInput,
    dataset::{Dataset, RawSample},
    processor::{image::RgbImage, supervised::encode_prompt},
    runtime::{generate::Prompt, pipeline::TextAndImages},
};

/// The question of one row about the images of another.
pub(super) fn question_about(
    data: &Dataset,
    parts: &TextAndImages,
    row: usize,
    shown: usize,
) -> Result<Prompt> {
    if row == shown {
        return Ok(data.question(row, parts)?.0);
    }
    let RawSample { conversation, .. } = data.read(row, parts)?;
    let images = patches(parts, &data.read(shown, parts)?.pictures)?;
    let merge = parts.config.vision_config.spatial_merge_size;
    let input_ids = encode_prompt(
        &parts.tokenizer,
        &conversation,
        &images.image_grid_thw,
        merge,
    )
    .with_context(|| format!("`{}`, row {}", data.name(), row + 1))?;
    Ok(Prompt { input_ids, images })
}

/// The images of a row, ready for the model.
pub(super) fn patches(parts: &TextAndImages, images: &[RgbImage]) -> Result<ImageInput> {
    let mut input = ImageInput::default();
    for image in images {
        input.extend(&parts.image_input(image)?);
    }
    Ok(input)
}

/// How many images each of `rows` has.
pub(super) fn image_counts(
    data: &Dataset,
    rows: impl IntoIterator<Item = usize>,
    parts: &TextAndImages,
) -> Result<Vec<usize>> {
    rows.into_iter()
        .map(|row| match data.text(row).images.len() {
            // Drawn, or without an image.
            0 => Ok(data.read(row, parts)?.pictures.len()),
            count => Ok(count),
        })
        .collect()
}
