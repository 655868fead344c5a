//! Continuous batching for the serving engine: sequences in slots over a pool of pages, one captured step
//! for each batch size.
//!
//! A step of `n` rows runs the graph of the next power of two; unused rows write to page 0, which no
//! sequence owns. A row's arithmetic does not depend on the size: matmuls run on the same tiles in
//! the same order, and attention splits a cache by its length alone, so that a sequence alone and in
//! a batch gets the same bits.
//!
//! Rows of several adapters share a step: low-rank terms are added to the base's matmuls row by row,
//! not merged, so an adapter costs its own matrices and nothing is computed in a separate step. An adapter that is
//! served alone is merged when the model is loaded (`--adapter`) and runs as the base.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use burn::{prelude::*, tensor::DType};

use super::{
    Control, LARGEST_BATCH,
    adapters::AdapterTable,
    covers, linears, mask_of,
    module::{DriverError, driver},
    pages::{HeldPages, PAGE, PagePool},
    plan::step,
    step_io::{CONTROL_WORDS, Ending, Field, Pages, StepIo, mask_words},
    stream::{Context, DeviceMemory, DeviceWords, PinnedMemory, Repeated, Stream},
    weights::{Scratch, Weights, like},
};
use crate::{
    accelerate::cuda::launch::{Backend, Client},
    adapters::lora::{config::AdapterError, files::attach_adapter},
    batch::{images::ImageInput, positions::rope_index},
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, key_values::KeyValues, vision::VisionOutput},
    runtime::{
        generate::{
            backend::{
                AdapterId, Chunk, DecodeBackend, LoadedAdapter, Pick, ServingDecoder,
                ServingLimits, SlotId, StepRow, Stepped,
            },
            slots::{NewTokens, join_features, pass},
        },
        vision::encode_images,
    },
};

/// Most parts that attention splits a sequence's cache into; the same for every batch size.
const SPLITS: usize = 16;

/// Least tokens that a sequence counts for in the engine's budget.
const LEAST_COST: usize = 256;

/// One sequence.
#[derive(Debug)]
struct Slot {
    adapter: AdapterId,
    pages: HeldPages,
    /// All tokens held, for the repetition penalty; without those of a step that panicked.
    tokens: Vec<u32>,
    /// Its row of the page tables on the device, after its first step.
    table: Option<usize>,
    /// Pages already sent to that table.
    sent_pages: usize,
    /// Whether its mask of tokens seen was sent too.
    masked: bool,
}

/// Base or adapter.
struct Served {
    model: Qwen3Vl<Backend>,
    /// Index in the adapter table.
    place: Option<usize>,
}

/// The engine of the serving worker on CUDA.
struct PagedDecoder {
    graphs: HashMap<(usize, bool), Repeated>,
    pool: PagePool,
    adapters: AdapterTable,
    tables: DeviceMemory,
    seen: DeviceMemory,
    control: DeviceMemory,
    /// Page-locked staging memory, copied to `control` before a step.
    staging: PinnedMemory,
    results: DeviceWords,
    scratch: Scratch,
    weights: Weights,
    context: Context,
    stream: Stream,
    client: Client,
    models: BTreeMap<AdapterId, Served>,
    slots: HashMap<SlotId, Slot>,
    free_tables: Vec<usize>,
    table_width: usize,
    vocab: usize,
    config: Qwen3VlConfig,
    device: Device<Backend>,
    next: u64,
    largest: usize,
    /// Rows of the running step.
    begun: Vec<StepRow>,
}

/// The engine for a model; `None` where the kernels do not cover it.
pub(in super::super) fn start(
    model: &Qwen3Vl<Backend>,
    config: &Qwen3VlConfig,
    limits: &ServingLimits,
    on_progress: &mut dyn FnMut(usize, usize),
) -> Result<Option<ServingDecoder<Backend>>, String> {
    if !covers(model, config, false) {
        return Ok(None);
    }
    let mut decoder = PagedDecoder::new(model, config, limits).map_err(|error| {
        format!(
            "{error}; lower `--cache-tokens` (now {})",
            limits.cache_tokens
        )
    })?;
    decoder
        .warm_up(limits, on_progress)
        .map_err(|error| error.to_string())?;
    Ok(Some(Box::new(decoder)))
}

impl PagedDecoder {
    fn new(
        model: &Qwen3Vl<Backend>,
        config: &Qwen3VlConfig,
        limits: &ServingLimits,
    ) -> Result<Self, DriverError> {
        let text = &config.text_config;
        let like = like(model);
        let context = Context::of(like.device.index)?;
        context.enter()?;
        let largest = limits.max_running.min(LARGEST_BATCH).next_power_of_two();
        let longest = limits.cache_tokens.min(text.max_position_embeddings);
        // Table 0 belongs to unused rows and holds page 0 only.
        let table_count = limits.cache_tokens.div_ceil(LEAST_COST) + 2;
        let table_width = longest.div_ceil(PAGE) + 1;
        let words = |count: usize| DeviceMemory::zeroed(context, count * size_of::<u32>());
        let weights = Weights::new(model, config, &like.client)?;
        let (stream, mut adapters) = (
            Stream::new(context)?,
            AdapterTable::new(weights.matrices(), context)?,
        );
        // Beside quantised weights the base's own adapter is not merged.
        let adapted = linears(model).any(|linear| linear.lora.is_some());
        let place = adapted.then(|| {
            let place = adapters.insert(model, &like.client, &stream);
            driver("placing the adapter", place)
        });
        let base = Served {
            model: model.clone(),
            place: place.transpose()?,
        };
        let scratch = Scratch::new(&weights, largest, SPLITS, &like)?;
        Ok(Self {
            graphs: HashMap::new(),
            pool: PagePool::new(text, limits.cache_tokens, limits.kv_cache, context)?,
            adapters,
            tables: words(table_count * table_width)?,
            seen: words(table_count * mask_words(text.vocab_size))?,
            control: words(CONTROL_WORDS)?,
            staging: PinnedMemory::new(context, CONTROL_WORDS * size_of::<u32>())?,
            results: DeviceWords::new(context, largest)?,
            scratch,
            weights,
            context,
            stream,
            client: like.client.clone(),
            models: BTreeMap::from([(AdapterId::BASE, base)]),
            slots: HashMap::new(),
            free_tables: (1..table_count).rev().collect(),
            table_width,
            vocab: text.vocab_size,
            config: config.clone(),
            device: like.device.clone(),
            next: 0,
            largest,
            begun: Vec::new(),
        })
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Synchronises cubecl's queue: the two streams are not ordered with each other.
    fn sync(&self) {
        let synced = cubecl_common::future::block_on(self.client.sync());
        if let Err(error) = synced {
            panic!("the device failed: {error:?}");
        }
    }

    /// Compiles and captures what later requests need, and runs it once.
    fn warm_up(
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

    /// Batch sizes that have a captured step.
    fn sizes(&self) -> Vec<usize> {
        let powers = (0..).map(|power| 1 << power);
        powers.take_while(|size| *size <= self.largest).collect()
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

    /// The captured step of this batch size.
    fn graph(&mut self, rows: usize, adapted: bool) -> Result<&Repeated, DriverError> {
        if !self.graphs.contains_key(&(rows, adapted)) {
            let caches = self.pool.caches();
            let io = StepIo {
                rows,
                cache: &caches,
                pages: Some(Pages {
                    tokens: PAGE,
                    tables: self.tables.address,
                    width: self.table_width,
                }),
                control: self.control.address,
                seen: self.seen.address,
                adapters: adapted.then(|| self.adapters.address()),
                results: self.results.address(),
                ending: Ending::Host,
                gemv: false,
            };
            let step = step(&self.weights, &self.scratch, io)?;
            let repeated = Repeated::new(&self.stream, step);
            self.graphs.insert((rows, adapted), repeated);
        }
        Ok(&self.graphs[&(rows, adapted)])
    }

    /// Allocates room for one more token of a sequence, and sends its new pages to the device.
    fn prepare(&mut self, id: SlotId, pick: &Pick) -> Result<usize, DriverError> {
        let slot = self.slots.get_mut(&id).expect("the slot is in use");
        slot.pages.grow(slot.tokens.len() + 1);
        let table = match slot.table {
            Some(table) => table,
            None => {
                let table = self.free_tables.pop().expect("a table for every sequence");
                slot.table = Some(table);
                slot.sent_pages = 0;
                slot.masked = false;
                table
            }
        };
        let penalised = matches!(pick, Pick::Token(choice) if choice.repetition_penalty != 1.0);
        // SAFETY: a table has `table_width` entries, more than the longest sequence has pages; a mask
        // has its words.
        #[allow(unsafe_code)]
        unsafe {
            let sent = slot.sent_pages;
            if sent < slot.pages.len() {
                let at = (table * self.table_width + sent) * size_of::<u32>();
                self.stream
                    .send(self.tables.address + at as u64, &slot.pages[sent..])?;
                slot.sent_pages = slot.pages.len();
            }
            if penalised && !slot.masked {
                let mask = mask_of(&slot.tokens, self.vocab);
                let at = (table * mask.len() * size_of::<u32>()) as u64;
                self.stream.send(self.seen.address + at, &mask)?;
                slot.masked = true;
            }
        }
        Ok(table)
    }

    /// Queues the step of at most [`LARGEST_BATCH`] rows.
    fn launch(&mut self, rows: &[StepRow]) -> Result<(), DriverError> {
        self.context.enter()?;
        // A previous step may still read the control words, if nobody waited for it: synchronise first.
        self.stream.wait()?;
        let mut control = Control::idle();
        let mut adapted = false;
        for (at, row) in rows.iter().enumerate() {
            let table = self.prepare(row.slot, &row.pick)?;
            let slot = &self.slots[&row.slot];
            control.set(Field::Token, at, row.token);
            control.set(Field::Position, at, row.position as u32);
            control.set(Field::End, at, slot.tokens.len() as u32 + 1);
            control.set(Field::Table, at, table as u32);
            if let Some(place) = self.models[&slot.adapter].place {
                control.set(Field::Adapter, at, place as u32);
                adapted = true;
            }
            if let Pick::Token(choice) = &row.pick {
                control.set_choice(at, choice);
            }
        }
        // SAFETY: the stream was synchronised above, and nothing has been queued on it since that reads
        // the control words.
        #[allow(unsafe_code)]
        unsafe {
            let staging = self.staging.bytes_mut();
            staging.copy_from_slice(bytemuck::cast_slice(&control.0));
        }
        let size = rows.len().next_power_of_two();
        self.graph(size, adapted)?;
        // SAFETY: the control words have this length.
        #[allow(unsafe_code)]
        unsafe {
            self.stream
                .send(self.control.address, self.staging.bytes())?;
        }
        self.graphs[&(size, adapted)].run(&self.stream)
    }

    /// Waits for the step of these rows.
    fn finish(&mut self, rows: &[StepRow]) -> Result<Vec<Stepped>, DriverError> {
        self.context.enter()?;
        let mut logits: Vec<Vec<f32>> = Vec::new();
        // SAFETY: the logits have this length.
        #[allow(unsafe_code)]
        unsafe {
            for (at, row) in rows.iter().enumerate() {
                if row.pick == Pick::Logits {
                    let mut values = vec![0f32; self.vocab];
                    let from = self.scratch.logits + (at * self.vocab * size_of::<f32>()) as u64;
                    self.stream.fetch(&mut values, from)?;
                    logits.push(values);
                }
            }
        }
        self.stream.wait()?;
        let mut logits = logits.into_iter();
        let results = self.results.read(0..rows.len());
        Ok(rows
            .iter()
            .enumerate()
            .map(|(at, row)| match row.pick {
                Pick::Logits => Stepped::Logits(logits.next().unwrap_or_default()),
                Pick::Token(_) => Stepped::Token(u32::try_from(results[at]).ok()),
            })
            .collect())
    }
}

/// A chunk of a prompt whose keys and values go into the pool.
struct IntoPages<'a> {
    pool: &'a PagePool,
    table: Tensor<Backend, 1, Int>,
    past: usize,
}

impl KeyValues<Backend> for IntoPages<'_> {
    fn append(
        &mut self,
        _group: usize,
        layer: usize,
        k: Tensor<Backend, 4>,
        v: Tensor<Backend, 4>,
    ) -> (Tensor<Backend, 4>, Tensor<Backend, 4>) {
        self.pool.append(layer, &self.table, self.past, [k, v])
    }
}

impl DecodeBackend for PagedDecoder {
    type Features = VisionOutput<Backend>;

    fn encode_image(&mut self, adapter: AdapterId, image: &ImageInput) -> Self::Features {
        let model = &self.models[&adapter].model;
        encode_images(model, image, &self.config, &self.device)
    }

    fn start(&mut self, adapter: AdapterId, _capacity: usize) -> SlotId {
        let id = SlotId(self.fresh());
        let slot = Slot {
            adapter,
            pages: self.pool.hold(),
            tokens: Vec::new(),
            table: None,
            sent_pages: 0,
            masked: false,
        };
        self.slots.insert(id, slot);
        id
    }

    fn fork(&mut self, source: SlotId, tokens: usize, capacity: usize) -> SlotId {
        let from = &self.slots[&source];
        assert!(tokens <= from.tokens.len(), "the source holds fewer tokens");
        let (adapter, held) = (from.adapter, from.tokens[..tokens].to_vec());
        let forked = self
            .context
            .enter()
            .and_then(|()| self.pool.fork(&from.pages, tokens, &self.stream));
        let pages = forked.unwrap_or_else(|error| panic!("{error}"));
        let id = self.start(adapter, capacity);
        let slot = self.slots.get_mut(&id).expect("just made");
        slot.pages = pages;
        slot.tokens = held;
        id
    }

    fn prefill(&mut self, slot: SlotId, chunk: &Chunk<'_, Self::Features>) -> Option<Vec<f32>> {
        let new = chunk.input_ids.len();
        let held = self.slots.get_mut(&slot).expect("the slot is in use");
        let past = held.tokens.len();
        held.pages.grow(past + new);
        let pages: Vec<i32> = held.pages.iter().map(|page| *page as i32).collect();
        let table = burn::tensor::TensorData::new(pages, [held.pages.len()]);
        let key_values = IntoPages {
            pool: &self.pool,
            table: Tensor::from_data(table, (&self.device, DType::I32)),
            past,
        };
        let wanted = [new - 1];
        let logits = pass(
            &self.models[&held.adapter].model,
            &self.config,
            &self.device,
            key_values,
            &[NewTokens {
                held: past,
                input_ids: chunk.input_ids,
            }],
            &chunk.positions,
            join_features(&chunk.features),
            if chunk.wants_logits { &wanted } else { &[] },
        );
        let logits = logits.map(|logits| logits.into_data().iter::<f32>().collect());
        self.sync();
        if let Some(slot) = self.slots.get_mut(&slot) {
            slot.tokens.extend_from_slice(chunk.input_ids);
        }
        logits
    }

    fn begin_step(&mut self, rows: &[StepRow]) {
        // More rows than a step has take several steps, one after another.
        if rows.len() <= self.largest && self.launch(rows).is_ok() {
            self.begun = rows.to_vec();
        }
    }

    fn step(&mut self, rows: &[StepRow]) -> Vec<Stepped> {
        let begun = std::mem::take(&mut self.begun) == rows;
        let mut stepped = Vec::with_capacity(rows.len());
        for some in rows.chunks(self.largest) {
            let launched = if begun { Ok(()) } else { self.launch(some) };
            let done = launched.and_then(|()| self.finish(some));
            stepped.extend(done.unwrap_or_else(|error| panic!("{error}")));
        }
        for row in rows {
            if let Some(slot) = self.slots.get_mut(&row.slot) {
                slot.tokens.push(row.token);
            }
        }
        stepped
    }

    fn free(&mut self, slot: SlotId) {
        if let Some(slot) = self.slots.remove(&slot) {
            self.free_tables.extend(slot.table);
        }
    }

    fn load_adapter(&mut self, dir: &Path) -> Result<LoadedAdapter, AdapterError> {
        let base = self.models[&AdapterId::BASE].model.clone();
        let adapted = attach_adapter(base, dir)?;
        if adapted.changes_text {
            return Err(AdapterError::ChangesBase {
                dir: dir.to_path_buf(),
                changed: adapted.changed.iter().map(ToString::to_string).collect(),
                reason: "sequences of all adapters share the base's weights in a step of this device",
            });
        }
        for note in &adapted.notes {
            log::info!("adapter `{}`: {note}", dir.display());
        }
        let model = adapted.model;
        let refused = |reason| AdapterError::Mismatch {
            path: dir.to_path_buf(),
            reason,
        };
        let mut entered = self.context.enter();
        // Steps with adapters are captured when the first adapter is loaded, so that requests do not wait.
        for size in self.sizes() {
            entered = entered.and_then(|()| self.graph(size, true).map(|_| ()));
        }
        let place = entered
            .map_err(|error| error.to_string())
            .and_then(|()| self.adapters.insert(&model, &self.client, &self.stream))
            .map_err(refused)?;
        let id = AdapterId(self.fresh());
        let place = Some(place);
        self.models.insert(id, Served { model, place });
        Ok(LoadedAdapter {
            id,
            notes: adapted.notes,
        })
    }

    fn unload_adapter(&mut self, adapter: AdapterId) {
        if adapter != AdapterId::BASE
            && let Some(served) = self.models.remove(&adapter)
            && let Some(place) = served.place
        {
            self.adapters.remove(place);
        }
    }
}

impl Drop for PagedDecoder {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            let _ = self.stream.wait();
        }
    }
}
