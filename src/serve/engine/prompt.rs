//! A prompt as the engine takes it: ids, positions, images, and keys by which equal beginnings are found.

use std::{
    any::Any,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use sha2::{Digest, Sha256};

use crate::{
    batch::{
        images::ImageInput,
        positions::{Positions, rope_index},
    },
    qwen3_vl::config::Qwen3VlConfig,
    runtime::generate::GenerateError,
    serve::types::ImageRemark,
};

/// Memory that is counted somewhere for as long as this is kept.
pub type HeldMemory = Box<dyn Any + Send + Sync>;

/// Patches of one image: given up when the device has seen them, and made again if they are wanted
/// again, which a preempted sequence may do.
pub struct Patches {
    made: Mutex<Option<Arc<ImageInput>>>,
    again: Box<dyn Fn() -> ImageInput + Send + Sync>,
}

impl fmt::Debug for Patches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Patches")
    }
}

impl Patches {
    /// Patches, and how the same ones are made again.
    pub fn new(made: ImageInput, again: impl Fn() -> ImageInput + Send + Sync + 'static) -> Self {
        Self {
            made: Mutex::new(Some(Arc::new(made))),
            again: Box::new(again),
        }
    }

    /// The patches.
    pub fn get(&self) -> Arc<ImageInput> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.get_or_insert_with(|| Arc::new((self.again)())).clone()
    }

    fn give_up(&self) {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        *made = None;
    }
}

/// One image of a prompt.
#[derive(Debug)]
pub struct PreparedImage {
    /// Patches of this image alone.
    pub patches: Patches,
    /// Place of its first token in the prompt.
    pub first_token: usize,
    /// Its number of tokens.
    pub tokens: usize,
}

/// A checked prompt.
#[derive(Debug)]
pub struct PreparedPrompt {
    /// Token ids, image placeholders expanded.
    pub input_ids: Vec<u32>,
    /// Positions of all tokens.
    pub positions: Positions,
    /// The position after the prompt less its number of tokens.
    pub delta: i64,
    /// Images in order.
    pub images: Vec<PreparedImage>,
    /// One key a token: two prompts with equal first keys have equal first keys and values.
    pub keys: Vec<u128>,
    /// What is counted for the patches.
    pub patch_memory: Mutex<Option<HeldMemory>>,
    /// What is counted for all the rest.
    pub memory: Option<HeldMemory>,
    /// What a reader of the answer should know about the images; the worker does not look at it.
    pub remarks: Vec<ImageRemark>,
}

/// Key of a text token.
pub(super) fn token_key(id: u32) -> u128 {
    u128::from(id)
}

/// Key of one token of an image; its high bits keep it apart from every text token.
fn image_key(hash: &[u8; 32], index: usize) -> u128 {
    let mut hasher = Sha256::new();
    hasher.update(hash);
    hasher.update((index as u64).to_le_bytes());
    let digest = hasher.finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    u128::from_le_bytes(bytes) | 1 << 127
}

impl PreparedPrompt {
    /// Checks a prompt and works out all that needs no device.
    ///
    /// `images` holds one image each, in the order of their places.
    ///
    /// # Errors
    /// [`GenerateError`]: no token, a token that the model does not have, or images that do not
    /// agree with their places.
    pub fn new(
        input_ids: Vec<u32>,
        images: Vec<Patches>,
        config: &Qwen3VlConfig,
    ) -> Result<Self, GenerateError> {
        if input_ids.is_empty() {
            return Err(GenerateError::Empty);
        }
        let vocab_size = config.text_config.vocab_size;
        if let Some(id) = input_ids.iter().find(|id| **id as usize >= vocab_size) {
            return Err(GenerateError::UnknownToken {
                id: *id,
                vocab_size,
            });
        }
        let merge = config.vision_config.spatial_merge_size;
        let grids: Vec<[usize; 3]> = images
            .iter()
            .flat_map(|image| image.get().image_grid_thw.clone())
            .collect();
        let (positions, delta) = rope_index(&input_ids, &grids, config.image_token_id, merge)?;
        let mut keys: Vec<u128> = input_ids.iter().map(|id| token_key(*id)).collect();
        let mut prepared = Vec::with_capacity(images.len());
        let mut at = 0;
        for patches in images {
            let input = patches.get();
            let tokens = input.patches() / (merge * merge);
            while at < input_ids.len() && input_ids[at] != config.image_token_id {
                at += 1;
            }
            let hash = hash_of(&input);
            for (index, key) in keys.iter_mut().skip(at).take(tokens).enumerate() {
                *key = image_key(&hash, index);
            }
            prepared.push(PreparedImage {
                patches,
                first_token: at,
                tokens,
            });
            at += tokens;
        }
        Ok(Self {
            input_ids,
            positions,
            delta,
            images: prepared,
            keys,
            patch_memory: Mutex::new(None),
            memory: None,
            remarks: Vec::new(),
        })
    }

    /// Gives the patches up, and what is counted for them: the prompt is in the cache.
    pub fn give_up_patches(&self) {
        self.images.iter().for_each(|image| image.patches.give_up());
        let mut memory = self
            .patch_memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *memory = None;
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.input_ids.len()
    }

    /// Whether its last token is text, so that a step can take it.
    pub fn ends_in_text(&self) -> bool {
        let last = self.len() as i64 - 1 + self.delta;
        let axes = self.positions.axes.iter();
        axes.into_iter().all(|axis| axis.last() == Some(&last))
    }

    /// Positions of the tokens in `range`.
    pub fn positions_of(&self, range: std::ops::Range<usize>) -> Positions {
        Positions {
            axes: std::array::from_fn(|axis| self.positions.axes[axis][range.clone()].to_vec()),
        }
    }
}

fn hash_of(image: &ImageInput) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for grid in &image.image_grid_thw {
        for side in grid {
            hasher.update((*side as u64).to_le_bytes());
        }
    }
    hasher.update(bytemuck::cast_slice::<f32, u8>(&image.pixel_values));
    hasher.finalize().into()
}
