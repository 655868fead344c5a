//! What is compiled, captured and run once before the first request.

use super::{PAGE, PagedDecoder};
use crate::{
    accelerate::cuda::decode::module::DriverError,
    batch::{images::ImageInput, positions::rope_index},
    runtime::generate::backend::{AdapterId, Chunk, DecodeBackend, Pick, ServingLimits, StepRow},
};

impl PagedDecoder {
    /// Compiles and captures what later requests need, and runs it once.
    pub(super) fn warm_up(
        &mut self,
        limits: &ServingLimits,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(), DriverError> {
        let sizes = self.sizes();
        let adapted_base = self.models[&AdapterId::BASE].place.is_some();
        let kinds: &[bool] = if limits.adapters || adapted_base {
            &[false, true]
        } else {
            &[false]
        };
        let lengths: Vec<usize> = [16, 64, 128, 256, 384, 512, 1024, 2048]
            .into_iter()
            .filter(|length| *length < limits.prefill_chunk)
            .chain([limits.prefill_chunk])
            .filter(|length| *length < limits.cache_tokens.min(self.table_width * PAGE))
            .collect();
        let all = sizes.len() * kinds.len() + lengths.len() + 1;
        let mut done = 0;
        let mut went_on = || {
            done += 1;
            on_progress(done, all);
        };
        for adapted in kinds {
            for size in &sizes {
                self.graph(*size, *adapted)?;
                went_on();
            }
        }
        for length in lengths {
            self.rehearse(length);
            went_on();
        }
        let vision = &self.config.vision_config;
        let side = 16.max(vision.spatial_merge_size);
        let patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size.pow(2);
        let image = ImageInput {
            pixel_values: vec![0.0; side * side * patch].into(),
            image_grid_thw: vec![[1, side, side]],
        };
        drop(self.encode_image(AdapterId::BASE, &image));
        self.sync();
        went_on();
        Ok(())
    }

    /// Warm-up: a prompt of this length and one token after it; the result is dropped.
    fn rehearse(&mut self, length: usize) {
        let tokens = vec![0; length];
        let Ok((positions, _)) = rope_index(&tokens, &[], u32::MAX, 2) else {
            return;
        };
        let slot = self.start(AdapterId::BASE, length + 1);
        let chunk = Chunk {
            input_ids: &tokens,
            positions,
            features: Vec::new(),
            wants_logits: true,
        };
        self.prefill(slot, &chunk);
        let row = StepRow {
            slot,
            token: 0,
            position: length as i64,
            pick: Pick::Token(Default::default()),
        };
        self.step(&[row]);
        self.free(slot);
    }
}
