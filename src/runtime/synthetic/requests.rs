//! Requests and training windows in the shape of OpenI: one square image, by default of 512×512 pixels, and a
//! short report each.
//!
//! Tokens and pixels are random; only their number matters to the time.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::lengths::{Lengths, TextLength};
use crate::{
    batch::window::Window,
    batch::{
        images::ImageInput,
        micro_batch::{IGNORE_INDEX, MicroBatch},
        positions::PositionError,
        text::{Padding, TextInput},
    },
    qwen3_vl::config::Qwen3VlConfig,
    runtime::generate::Prompt,
};

/// Side of the image, in pixels, by default.
pub const IMAGE_SIDE: usize = 512;
/// Text tokens in front of the image's start token.
const BEFORE_IMAGE: usize = 3;

/// Makes requests, one after another.
#[derive(Debug, Clone)]
pub struct Requests<'a> {
    config: &'a Qwen3VlConfig,
    lengths: Lengths,
    random: ChaCha8Rng,
    /// Pixels of the first image; others are the same ones, rotated by some places.
    pixels: Vec<f32>,
    /// Tokens of every prompt, in place of those of `lengths`.
    tokens: Option<usize>,
    image_side: usize,
}

/// A conversation with its answer.
#[derive(Debug, Clone)]
pub struct Sample {
    /// All of it as one prompt.
    pub prompt: Prompt,
    /// Tokens of the answer at its end.
    pub answer: usize,
}

impl<'a> Requests<'a> {
    /// Requests for a model; of lengths as OpenI-zh has them when `mixed`, else of one length.
    pub fn new(config: &'a Qwen3VlConfig, mixed: bool, seed: u64) -> Self {
        let lengths = if mixed {
            Lengths::mixed(seed)
        } else {
            Lengths::fixed()
        };
        Self {
            config,
            lengths,
            random: ChaCha8Rng::seed_from_u64(seed),
            pixels: Vec::new(),
            tokens: None,
            image_side: IMAGE_SIDE,
        }
    }

    /// Images of so many pixels a side, at least one merged patch.
    pub fn with_image_side(mut self, pixels: usize) -> Self {
        self.image_side = pixels;
        self
    }

    /// Prompts of so many tokens, at least [`Self::shortest`].
    pub fn with_tokens(mut self, tokens: Option<usize>) -> Self {
        self.tokens = tokens;
        self
    }

    /// Tokens of an image with its marks, of the text before it and one token after.
    pub fn shortest(&self) -> usize {
        let merge = self.config.vision_config.spatial_merge_size;
        (self.grid_side() / merge).pow(2) + BEFORE_IMAGE + 3
    }

    /// Patches on each side of the image.
    fn grid_side(&self) -> usize {
        let vision = &self.config.vision_config;
        let merged = vision.patch_size * vision.spatial_merge_size;
        (self.image_side / merged).max(1) * vision.spatial_merge_size
    }

    /// One image: at patch size 16, 1,024 patches.
    pub fn image(&mut self) -> ImageInput {
        let side = self.grid_side();
        let values = side * side * self.config.vision_config.patch_dim();
        if self.pixels.is_empty() {
            self.pixels = (0..values)
                .map(|_| self.random.random_range(-1.0..1.0))
                .collect();
        }
        let (left, right) = self.pixels.split_at(self.random.random_range(0..values));
        ImageInput {
            pixel_values: [right, left].concat().into(),
            image_grid_thw: vec![[1, side, side]],
        }
    }

    /// One conversation: three tokens, the image between its marks, then text.
    pub fn sample(&mut self) -> Sample {
        let TextLength { mut text, answer } = self.lengths.draw();
        let config = self.config;
        let images = self.image();
        let merge = config.vision_config.spatial_merge_size.pow(2);
        if let Some(tokens) = self.tokens {
            text = tokens - images.patches() / merge;
        }
        let mut ids = Vec::new();
        self.words(BEFORE_IMAGE, &mut ids);
        ids.push(config.vision_start_token_id);
        ids.extend(std::iter::repeat_n(
            config.image_token_id,
            images.patches() / merge,
        ));
        ids.push(config.vision_end_token_id);
        self.words(text - BEFORE_IMAGE - 2, &mut ids);
        Sample {
            prompt: Prompt {
                input_ids: ids,
                images,
            },
            answer,
        }
    }

    /// Some prompts.
    pub fn prompts(&mut self, count: usize) -> Vec<Prompt> {
        (0..count).map(|_| self.sample().prompt).collect()
    }

    /// Appends tokens that mean nothing to the model.
    fn words(&mut self, count: usize, ids: &mut Vec<u32>) {
        let config = self.config;
        let special = [
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        ];
        let vocab = config.text_config.vocab_size as u32;
        let end = ids.len() + count;
        while ids.len() < end {
            let id = self.random.random_range(0..vocab);
            if !special.contains(&id) {
                ids.push(id);
            }
        }
    }

    /// One optimizer step's samples, in micro-batches of `micro_batch`, each padded or packed into one
    /// row.
    ///
    /// # Errors
    /// [`PositionError`] when the model's merge size does not fit its patches.
    pub fn window(
        &mut self,
        samples: usize,
        micro_batch: usize,
        packing: bool,
    ) -> Result<Window, PositionError> {
        let samples: Vec<Sample> = (0..samples).map(|_| self.sample()).collect();
        let batches = samples
            .chunks(micro_batch)
            .map(|samples| self.micro_batch(samples, packing))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Window {
            step: 0,
            epoch: 0.0,
            rows: (0..samples.len()).collect(),
            targets: batches.iter().map(MicroBatch::targets).sum(),
            micro_batches: batches.len(),
            first_micro_batch: 0,
            tokens: samples
                .iter()
                .map(|sample| sample.prompt.input_ids.len())
                .sum(),
            parts: vec![batches],
            sequences: Vec::new(),
            counts: Default::default(),
        })
    }

    fn micro_batch(&self, samples: &[Sample], packing: bool) -> Result<MicroBatch, PositionError> {
        let ids: Vec<Vec<u32>> = samples
            .iter()
            .map(|sample| sample.prompt.input_ids.clone())
            .collect();
        let grids: Vec<_> = samples
            .iter()
            .map(|sample| sample.prompt.images.image_grid_thw.clone())
            .collect();
        let mut images = ImageInput::default();
        samples
            .iter()
            .for_each(|sample| images.extend(&sample.prompt.images));
        let mut labels: Vec<Vec<i64>> = samples
            .iter()
            .map(|sample| {
                let ids = &sample.prompt.input_ids;
                let question = ids.len() - sample.answer;
                std::iter::repeat_n(IGNORE_INDEX, question)
                    .chain(ids[question..].iter().map(|id| i64::from(*id)))
                    .collect()
            })
            .collect();
        let text = if packing {
            labels = vec![labels.concat()];
            TextInput::packed(&ids, &grids, self.config)?
        } else {
            let padded = TextInput::padded(&ids, &grids, self.config, Padding::Right, 0)?.0;
            labels
                .iter_mut()
                .for_each(|labels| labels.resize(padded.seq(), IGNORE_INDEX));
            padded
        };
        Ok(MicroBatch {
            text,
            labels,
            images,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fixed_request_has_the_shape_of_the_published_data() {
        let config = Qwen3VlConfig::published("2b").unwrap();
        let mut requests = Requests::new(&config, false, 1);
        let sample = requests.sample();
        assert_eq!(sample.prompt.images.patches(), 1024);
        assert_eq!(sample.prompt.input_ids.len(), 368);
        assert_eq!(sample.answer, 92);
        let window = requests.window(16, 5, false).unwrap();
        assert_eq!((window.micro_batches, window.tokens), (4, 16 * 368));
        assert_eq!(window.targets, 16 * 92);
    }

    #[test]
    fn packing_and_padding_hold_the_same_samples() {
        let config = Qwen3VlConfig::published("2b").unwrap();
        let padded = Requests::new(&config, true, 3).window(6, 3, false).unwrap();
        let packed = Requests::new(&config, true, 3).window(6, 3, true).unwrap();
        assert_eq!(padded.tokens, packed.tokens);
        assert_eq!(padded.targets, packed.targets);
        assert_eq!(padded.micro_batches, packed.micro_batches);
        let rows = |window: &Window| window.parts[0][0].text.batch();
        assert_eq!((rows(&padded), rows(&packed)), (3, 1));
    }
}
