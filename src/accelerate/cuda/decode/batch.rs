//! One batch after a prefilled cache: the step feeds its tokens into the next one, which is queued before
//! the host has read the last.

use burn::tensor::DType;

use super::{
    Control, LARGEST_BATCH,
    adapters::AdapterTable,
    covers, linears, mask_of,
    module::{DriverError, driver},
    plan::step,
    step_io::{CONTROL_WORDS, Ending, Field, LayerCache, StepIo, mask_words},
    stream::{Context, DeviceMemory, DeviceWords, Event, Repeated, Stream},
    weights::{Addresses, Scratch, Weights, like},
};
use crate::{
    accelerate::cuda::{
        launch::{Backend, Buffer, strided},
        operand::Operand,
        plan::card,
    },
    ops::quantised::cache::QuantisedCache,
    qwen3_vl::{
        Qwen3Vl,
        config::{Qwen3VlConfig, TextConfig},
        key_values::KeyValueCache,
    },
    runtime::{
        accelerator::{DecodeStart, Decoder},
        generate::sampler::TokenChoice,
    },
};

/// Steps whose tokens the ring in the host's memory holds.
const RING: usize = 8;

/// Steps queued at once: the one waited for and the next.
const AHEAD: usize = 2;

/// A captured step and all it reads and writes; dropped in this order, after the stream is synchronised.
struct Engine {
    step: Repeated,
    events: Vec<Event>,
    ring: DeviceWords,
    control: DeviceMemory,
    _seen: DeviceMemory,
    _uniforms: DeviceMemory,
    scratch: Scratch,
    _weights: Weights,
    _adapters: Option<AdapterTable>,
    _cache: Vec<Buffer>,
    context: Context,
    stream: Stream,
    rows: usize,
    vocab: usize,
    launched: usize,
    read: usize,
    most: usize,
}

// SAFETY: the handles belong to this engine alone; every call makes the context current first.
#[allow(unsafe_code)]
unsafe impl Send for Engine {}

/// The engine for a prefilled cache; `None` where the kernels do not cover the model.
pub(in super::super) fn start(
    model: &Qwen3Vl<Backend>,
    config: &Qwen3VlConfig,
    cache: &KeyValueCache<Backend>,
    start: &DecodeStart,
) -> Option<Box<dyn Decoder>> {
    let rows = start.tokens.len();
    let room = cache
        .capacity()
        .is_some_and(|capacity| cache.len() + start.most_steps + AHEAD < capacity);
    if !room || !(1..=LARGEST_BATCH).contains(&rows) || !covers(model, config, rows == 1) {
        return None;
    }
    match Engine::new(model, config, cache, start) {
        Ok(engine) => Some(Box::new(engine)),
        Err(error) => {
            log::warn!("decoding without the captured step: {error}");
            None
        }
    }
}

impl Engine {
    fn new(
        model: &Qwen3Vl<Backend>,
        config: &Qwen3VlConfig,
        cache: &KeyValueCache<Backend>,
        start: &DecodeStart,
    ) -> Result<Self, DriverError> {
        let text = &config.text_config;
        let (rows, vocab) = (start.tokens.len(), text.vocab_size);
        let like = like(model);
        let context = Context::of(like.device.index)?;
        context.enter()?;
        let stream = Stream::new(context)?;
        let ring = DeviceWords::new(context, RING * rows)?;
        let events = (0..RING)
            .map(|_| Event::new(context))
            .collect::<Result<_, _>>()?;
        let weights = Weights::new(model, config, &like.client)?;
        // Two blocks for each processor.
        let blocks = 2 * card(like.device.index).processors;
        let splits = (blocks / (text.num_key_value_heads * rows)).clamp(1, 64);
        let scratch = Scratch::new(&weights, rows, splits, &like)?;
        let (layers, kept) = layers_of(cache, text, rows, &like)?;

        let words = |count: usize| DeviceMemory::zeroed(context, count * size_of::<u32>());
        let control = words(CONTROL_WORDS)?;
        // Beside quantised weights an adapter is not merged.
        let mut adapters = None;
        if linears(model).any(|linear| linear.lora.is_some()) {
            let mut table = AdapterTable::new(weights.matrices(), context)?;
            let place = table.insert(model, &like.client, &stream);
            adapters = Some((driver("placing the adapter", place)?, table));
        }
        let penalised = start.sampling.repetition_penalty != 1.0;
        let seen = words(if penalised {
            rows * mask_words(vocab)
        } else {
            0
        })?;
        let steps = start.draws.iter().map(Vec::len).max().unwrap_or(0) + RING;
        let uniforms = words(steps * rows)?;
        let mut draws = vec![0f32; steps * rows];
        let mut initial = Control::idle();
        for row in 0..rows {
            let padding = cache.segments[row].iter().take_while(|one| **one < 0);
            initial.set(Field::Token, row, start.tokens[row]);
            initial.set(Field::Position, row, start.positions[row] as u32);
            // The new token counts as held; padding is on the left.
            initial.set(Field::End, row, cache.len() as u32 + 1);
            initial.set(Field::First, row, padding.count() as u32);
            initial.set(Field::Table, row, row as u32);
            if let Some((place, _)) = &adapters {
                initial.set(Field::Adapter, row, *place as u32);
            }
            initial.set_choice(row, &TokenChoice::new(&start.sampling, 0.0));
            for (at, draw) in start.draws.get(row).into_iter().flatten().enumerate() {
                draws[at * rows + row] = *draw;
            }
        }
        // SAFETY: the buffers were made with these lengths.
        #[allow(unsafe_code)]
        unsafe {
            stream.send(control.address, &initial.0)?;
            stream.send(uniforms.address, &draws)?;
            for row in 0..if penalised { rows } else { 0 } {
                let mask = mask_of(&start.seen[row], vocab);
                stream.send(seen.address + (row * mask.len() * 4) as u64, &mask)?;
            }
        }
        stream.wait()?;
        // Synchronise cubecl's queue before the stream reads its buffers.
        let synced = cubecl_common::future::block_on(like.client.sync());
        driver("waiting for the prefill", synced)?;
        let io = StepIo {
            control: control.address,
            seen: seen.address,
            adapters: adapters.as_ref().map(|(_, table)| table.address()),
            results: ring.address(),
            ending: Ending::Feedback {
                uniforms: uniforms.address,
                slots: RING,
            },
            ..StepIo::of_batch(rows, &layers)
        };
        let step = Repeated::new(&stream, step(&weights, &scratch, io)?);
        Ok(Self {
            step,
            events,
            ring,
            control,
            _seen: seen,
            _uniforms: uniforms,
            scratch,
            _weights: weights,
            _adapters: adapters.map(|(_, table)| table),
            _cache: kept,
            context,
            stream,
            rows,
            vocab,
            launched: 0,
            read: 0,
            most: start.most_steps,
        })
    }

    fn launch(&mut self) -> Result<(), DriverError> {
        self.step.run(&self.stream)?;
        self.events[self.launched % RING].record(&self.stream)?;
        self.launched += 1;
        Ok(())
    }

    /// Waits for the oldest step not read yet and reads its tokens.
    fn read(&mut self) -> Result<Vec<Option<u32>>, DriverError> {
        self.events[self.read % RING].wait()?;
        // The steps queued after this one write other entries.
        let from = self.read % RING * self.rows;
        self.read += 1;
        let tokens = self.ring.read(from..from + self.rows);
        Ok(tokens
            .into_iter()
            .map(|token| u32::try_from(token).ok())
            .collect())
    }

    fn next_logits(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, DriverError> {
        self.context.enter()?;
        let mut values = vec![0f32; self.rows * self.vocab];
        // SAFETY: both copies stay inside buffers that live as long as the engine.
        #[allow(unsafe_code)]
        unsafe {
            self.stream.send(self.control.address, tokens)?;
            self.launch()?;
            self.stream.fetch(&mut values, self.scratch.logits)?;
        }
        self.stream.wait()?;
        self.read += 1;
        Ok(values.chunks(self.vocab).map(<[f32]>::to_vec).collect())
    }
}

/// Addresses and strides of a cache's buffers.
fn layers_of(
    cache: &KeyValueCache<Backend>,
    text: &TextConfig,
    rows: usize,
    like: &Buffer,
) -> Result<(Vec<LayerCache>, Vec<Buffer>), DriverError> {
    let mut addresses = Addresses::new(&like.client);
    let mut layers = Vec::with_capacity(cache.layers.len());
    for packed in cache.layers.iter().filter_map(|layer| layer.packed()) {
        layers.push(quantised_layer(packed, text, rows, &mut addresses)?);
    }
    for (keys, values) in cache.layers.iter().filter_map(|layer| layer.buffers()) {
        let (keys, values) = (strided(keys.clone()), strided(values.clone()));
        let strides = |buffer: &Buffer| [0, 1, 2].map(|axis| buffer.meta.strides()[axis] as u64);
        let capacity = keys.meta.shape()[2];
        let shape = [rows, text.num_key_value_heads, capacity, text.head_dim];
        for buffer in [&keys, &values] {
            let _ = Operand::contiguous_rows(buffer, DType::BF16, shape);
        }
        layers.push(LayerCache {
            key_strides: strides(&keys),
            value_strides: strides(&values),
            scales: None,
            capacity,
            keys: addresses.of(keys)?,
            values: addresses.of(values)?,
        });
    }
    Ok((layers, addresses.kept()))
}

/// Addresses and strides of a quantised layer.
fn quantised_layer(
    packed: &QuantisedCache<Backend>,
    text: &TextConfig,
    rows: usize,
    addresses: &mut Addresses<'_>,
) -> Result<LayerCache, DriverError> {
    let (heads, width, capacity) = (text.num_key_value_heads, text.head_dim, packed.capacity());
    let [keys, values] = packed.buffers().map(|(words, scales)| {
        let words = words.clone().into_primitive();
        let shape = [rows, heads, capacity, width / 4];
        let words = addresses.contiguous(words, DType::I32, shape)?;
        let scales = strided(scales.clone());
        let shape = [rows, heads, capacity, 1];
        Ok::<_, DriverError>((words, addresses.contiguous(scales, DType::F32, shape)?))
    });
    let ((keys, of_keys), (values, of_values)) = (keys?, values?);
    let strides = [heads * capacity * width, capacity * width, width].map(|stride| stride as u64);
    Ok(LayerCache {
        keys,
        values,
        key_strides: strides,
        value_strides: strides,
        scales: Some([of_keys, of_values]),
        capacity,
    })
}

impl Decoder for Engine {
    fn next_tokens(&mut self) -> Result<Vec<Option<u32>>, String> {
        let mut step = || {
            self.context.enter()?;
            while self.launched < (self.read + AHEAD).min(self.most + 1).max(self.read + 1) {
                self.launch()?;
            }
            self.read()
        };
        step().map_err(|error: DriverError| error.to_string())
    }

    fn next_logits(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, String> {
        Engine::next_logits(self, tokens).map_err(|error| error.to_string())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            let _ = self.stream.wait();
        }
    }
}
