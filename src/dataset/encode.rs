//! Samples as the model takes them: token ids, labels and patches.

use std::{borrow::Cow, path::PathBuf};

use super::{
    data_part::SampleSource,
    error::DatasetError,
    samples::{Dataset, RawSample},
};
use crate::{
    batch::images::ImageInput,
    processor::{
        patches::ImageProcessor,
        sample::{Conversation, PixelLimits, RowFault, SampleError},
        supervised::{encode_prompt, encode_supervised},
    },
    runtime::{generate::Prompt, pipeline::TextAndImages},
};

/// One sample as the model takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedSample {
    /// Token ids, image placeholders expanded.
    pub input_ids: Vec<u32>,
    /// What each token should be; -100 where it is not a target.
    pub labels: Vec<i64>,
    /// Images in the order of their tokens.
    pub images: ImageInput,
}

impl Dataset {
    /// Reads and encodes one sample for training.
    ///
    /// # Errors
    /// [`DatasetError`] names the row.
    pub fn encode(
        &self,
        index: usize,
        parts: &TextAndImages,
        max_length: usize,
    ) -> Result<EncodedSample, DatasetError> {
        let raw = self.read(index, parts)?;
        let images = self.patches(index, &raw, parts)?;
        self.encode_conversation(index, &raw.conversation, images, parts, max_length)
    }

    /// Reads and encodes the chosen and the rejected answer of one sample.
    ///
    /// # Errors
    /// [`DatasetError`] names the row; a row without a rejected answer is one.
    pub fn encode_pair(
        &self,
        index: usize,
        parts: &TextAndImages,
        max_length: usize,
    ) -> Result<[EncodedSample; 2], DatasetError> {
        let rejected = self.rejected(index)?;
        let raw = self.read(index, parts)?;
        let images = self.patches(index, &raw, parts)?;
        let encode = |conversation, images| {
            self.encode_conversation(index, conversation, images, parts, max_length)
        };
        Ok([
            encode(&raw.conversation, images.clone())?,
            encode(&rejected, images)?,
        ])
    }

    /// The conversation of a sample with its rejected answer.
    ///
    /// # Errors
    /// [`DatasetError::Sample`] for a row that has none, [`DatasetError::Rejected`] for drawn ones.
    pub fn rejected(&self, index: usize) -> Result<Conversation, DatasetError> {
        let (part, place) = self.part(index);
        let SampleSource::Rows { samples, .. } = &part.source else {
            return Err(DatasetError::Rejected(part.name.clone()));
        };
        let fault = match samples[place].rejected_conversation() {
            Ok(Some(rejected)) => return Ok(rejected),
            Ok(None) => RowFault::key(
                "rejected_response",
                "missing",
                "an answer that is not to be given: `objective = \"dpo\"` learns from pairs; `prefer` makes them",
            ),
            Err(fault) => fault,
        };
        Err(DatasetError::Sample(SampleError {
            file: PathBuf::from(self.file(index)),
            row: self.row(index),
            fault,
        }))
    }

    /// Encodes a conversation about the images of a sample.
    fn encode_conversation(
        &self,
        index: usize,
        conversation: &Conversation,
        images: ImageInput,
        parts: &TextAndImages,
        max_length: usize,
    ) -> Result<EncodedSample, DatasetError> {
        let merge = parts.images.config().merge_size;
        let ids = encode_supervised(
            &parts.tokenizer,
            conversation,
            &images.image_grid_thw,
            merge,
        )
        .map_err(|cause| self.encode_error(index, cause))?;
        if ids.input_ids.len() > max_length {
            return Err(DatasetError::TooLong {
                file: self.file(index),
                row: self.row(index),
                tokens: ids.input_ids.len(),
                image: images.patches() / (merge * merge),
                max_length,
            });
        }
        Ok(EncodedSample {
            input_ids: ids.input_ids,
            labels: ids.labels,
            images,
        })
    }

    /// Reads one sample as a question: the prompt's ids, the images, and the true answer.
    ///
    /// # Errors
    /// [`DatasetError`] names the row.
    pub fn question(
        &self,
        index: usize,
        parts: &TextAndImages,
    ) -> Result<(Prompt, String), DatasetError> {
        let raw = self.read(index, parts)?;
        let images = self.patches(index, &raw, parts)?;
        let input_ids = encode_prompt(
            &parts.tokenizer,
            &raw.conversation,
            &images.image_grid_thw,
            parts.images.config().merge_size,
        )
        .map_err(|cause| self.encode_error(index, cause))?;
        let answer = raw
            .conversation
            .last_answer()
            .unwrap_or_default()
            .to_string();
        Ok((Prompt { input_ids, images }, answer))
    }

    fn patches(
        &self,
        index: usize,
        raw: &RawSample,
        parts: &TextAndImages,
    ) -> Result<ImageInput, DatasetError> {
        let mut images = ImageInput::default();
        let processor = self.processor(index, raw.limits, parts)?;
        for (place, picture) in raw.pictures.iter().enumerate() {
            let patches = processor
                .process(picture)
                .map_err(|cause| self.image_error(index, format!("number {}", place + 1), cause))?;
            images.extend(&ImageInput {
                pixel_values: patches.pixel_values.into(),
                image_grid_thw: vec![patches.grid_thw],
            });
        }
        Ok(images)
    }

    /// The image processor at the pixel limits of a row.
    pub(super) fn processor<'a>(
        &self,
        index: usize,
        limits: PixelLimits,
        parts: &'a TextAndImages,
    ) -> Result<Cow<'a, ImageProcessor>, DatasetError> {
        parts.images.with_pixels(limits).map_err(|cause| {
            DatasetError::Sample(SampleError {
                file: PathBuf::from(self.file(index)),
                row: self.row(index),
                fault: RowFault::Limits(cause.to_string()),
            })
        })
    }
}
