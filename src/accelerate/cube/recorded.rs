//! Decoding on Vulkan with a step that is recorded once ([`super::recording`]) and replayed for each token.
//!
//! The launches are those of [`super::decode`], its argmax included; tokens, place in the cache and rotary tables
//! are on the device, which moves on by itself.

use std::ops::Range;

use burn::{
    backend::{Vulkan as Backend, wgpu::WgpuRuntime},
    tensor::DType,
};
use cubecl::{client::ComputeClient, wgpu::WgpuResource};
use cubecl_runtime::storage::ManagedResource;

use super::{
    super::wgpu_setup::wgpu_setup,
    decode::{self, FusedStep, Layer, Reading, integers, layers, norm, read, rotary_tables, wait},
    embed,
    launch::{Buffer, contiguous, empty},
    likeliest::likeliest_into,
    matrix::Matrix,
    matvec::InputNorm,
    recording::{Recorder, Replay, can_record, record, resource, to_device, to_recorder},
    rotary::{HeadNorms, Place},
};
use crate::{
    qwen3_vl::{
        Qwen3Vl, config::Qwen3VlConfig, key_values::KeyValueCache, layer::decoder_layers,
        rope::inverse_frequencies,
    },
    runtime::accelerator::{DecodeStart, Decoder},
};

/// Steps that may be queued beyond those whose tokens were requested.
const AHEAD: usize = 1;

/// Most rotary tables, of one row and step each, that are made at the start.
const MOST_TABLES: usize = 1 << 16;

type Client = ComputeClient<Recorder>;
type OfRecorder = Buffer<Recorder>;

/// A layer's buffers for the recording.
fn layer_of(layer: &Layer<WgpuRuntime>, client: &Client) -> Layer<Recorder> {
    let buffer = |buffer: &Buffer<WgpuRuntime>| to_recorder(buffer, client);
    let matrix = |matrix: &Matrix<WgpuRuntime>| matrix_of(matrix, client);
    let norms = &layer.head_norms;
    Layer {
        input_norm: norm_of(&layer.input_norm, client),
        qkv: layer.qkv.each_ref().map(matrix),
        head_norms: HeadNorms {
            q: buffer(&norms.q),
            q_epsilon: norms.q_epsilon,
            k: buffer(&norms.k),
            k_epsilon: norms.k_epsilon,
        },
        output: matrix(&layer.output),
        mlp_norm: norm_of(&layer.mlp_norm, client),
        gate: matrix(&layer.gate),
        up: matrix(&layer.up),
        down: matrix(&layer.down),
        keys: buffer(&layer.keys),
        values: buffer(&layer.values),
    }
}

fn norm_of(norm: &InputNorm<WgpuRuntime>, client: &Client) -> InputNorm<Recorder> {
    InputNorm {
        weight: to_recorder(&norm.weight, client),
        epsilon: norm.epsilon,
    }
}

fn matrix_of(matrix: &Matrix<WgpuRuntime>, client: &Client) -> Matrix<Recorder> {
    match matrix {
        Matrix::Floats(buffer) => Matrix::Floats(to_recorder(buffer, client)),
        Matrix::Quantised(weight) => {
            Matrix::Quantised(weight.with_buffers(|buffer| to_recorder(buffer, client)))
        }
    }
}

/// Buffers that a step reads and writes again and again.
struct Buffers {
    tokens: Buffer<WgpuRuntime>,
    for_host: Buffer<WgpuRuntime>,
    logits: Buffer<WgpuRuntime>,
}

struct Engine {
    replay: Replay,
    buffers: Buffers,
    tokens_at: ManagedResource<WgpuResource>,
    launched: usize,
    most: usize,
    /// Async read of the tokens of the last requested step.
    reading: Option<Reading>,
    /// Launches the steps that verify drafted tokens, where these are wanted.
    verifier: Option<Box<dyn Decoder>>,
    /// What the recorded launches read.
    _held: Vec<Buffer<WgpuRuntime>>,
    _layers: Vec<Layer<WgpuRuntime>>,
    _ends: [Matrix<WgpuRuntime>; 2],
}

/// The engine for a prefilled cache; `None` where the kernels do not cover the model or nothing can be recorded.
pub(super) fn start(
    model: &Qwen3Vl<Backend>,
    config: &Qwen3VlConfig,
    cache: &KeyValueCache<Backend>,
    start: &DecodeStart,
) -> Option<Box<dyn Decoder>> {
    let (layers, first) = layers(model, config, cache, start)?;
    let language = &model.model.language_model;
    let last = norm(&language.norm);
    let like = contiguous(language.norm.weight.val());
    let (rows, text) = (start.tokens.len(), &config.text_config);
    let table = Matrix::of(&language.embed_tokens.weight);
    let steps = 0..start.most_steps + AHEAD + 1;
    let covered = can_record(&like.client)
        && embed::covers(&table, text.hidden_size, model.dtype())
        && rows * steps.len() <= MOST_TABLES;
    if !covered {
        return None;
    }
    let setup = wgpu_setup(&like.device).ok()?;
    let ends = [table, Matrix::of(model.head())];
    let recorded = Recording {
        layers: &layers,
        first: &first,
        last: &last,
        ends: &ends,
        cached: cache.len(),
        steps,
    };
    let made = recorded.make(
        &like,
        config,
        model.dtype(),
        start,
        (setup.device, setup.queue),
    );
    let (replay, buffers, held) = match made {
        Ok(made) => made,
        Err(error) => {
            log::warn!("steps are launched one by one: {error}");
            return None;
        }
    };
    let tokens_at = resource(&buffers.tokens).ok()?;
    Some(Box::new(Engine {
        replay,
        buffers,
        tokens_at,
        launched: 0,
        most: start.most_steps,
        reading: None,
        verifier: decode::start(model, config, cache, start),
        _held: held.into_iter().chain([last.weight]).collect(),
        _layers: layers,
        _ends: ends,
    }))
}

/// What is recorded.
struct Recording<'a> {
    layers: &'a [Layer<WgpuRuntime>],
    /// First visible key of each row.
    first: &'a [i32],
    last: &'a InputNorm<WgpuRuntime>,
    /// Table of token vectors, and head.
    ends: &'a [Matrix<WgpuRuntime>; 2],
    /// Tokens in the cache.
    cached: usize,
    /// Steps that may come.
    steps: Range<usize>,
}

impl Recording<'_> {
    fn make(
        &self,
        like: &Buffer<WgpuRuntime>,
        config: &Qwen3VlConfig,
        dtype: DType,
        start: &DecodeStart,
        handles: (wgpu::Device, wgpu::Queue),
    ) -> Result<(Replay, Buffers, Vec<Buffer<WgpuRuntime>>), String> {
        let (device, text) = (&like.device, &config.text_config);
        let rows = start.tokens.len();
        let frequencies = inverse_frequencies(text.head_dim, text.rope_theta);
        let tables = rotary_tables(&frequencies, &start.positions, self.steps.clone(), device);
        let step_width = 2 * rows * text.head_dim;
        let tokens: Vec<i32> = start.tokens.iter().map(|token| *token as i32).collect();
        let tokens: Buffer<WgpuRuntime> = integers(&tokens, device);
        let first = integers(self.first, device);
        let end = integers(&vec![i32::MAX; rows], device);
        // Where the step is: its place in the cache, and that of its cosines.
        let step = integers(&[self.cached as i32, 0], device);
        let held = vec![tables, tokens, first, end, step];
        let (recorded, replay) = record(device, handles, |client| {
            let [tables, tokens, first, end, step] =
                [0, 1, 2, 3, 4].map(|at: usize| to_recorder(&held[at], client));
            let layers: Vec<_> = (self.layers.iter())
                .map(|layer| layer_of(layer, client))
                .collect();
            let [table, head] = self.ends.each_ref().map(|one| matrix_of(one, client));
            let x = embed::embed(&tokens, &table, text.hidden_size, dtype);
            let mut run = FusedStep {
                layers: &layers,
                layer: &layers[0],
                heads: text.num_attention_heads,
                ranges: &[first, end],
                tables: &tables,
                place: Place::OnDevice(&step),
                rows,
                keys: self.cached + self.steps.len(),
                one_sequence: false,
            };
            let x = decoder_layers(&mut run, 0..layers.len(), x);
            let last = norm_of(self.last, client);
            let logits: OfRecorder = head.matmul(&x, Some(&last), None, DType::F32);
            let for_host = empty(&logits, [rows], DType::I32);
            let moved = Some((&step, step_width));
            likeliest_into(&logits, [&tokens, &for_host], moved);
            [for_host, logits]
        })?;
        // All that the step reads has to be there before its first run, which cubecl knows nothing of.
        like.client.flush().map_err(|error| error.to_string())?;
        let [for_host, logits] = recorded.map(|buffer| to_device(&buffer, &like.client));
        let buffers = Buffers {
            tokens: held[1].clone(),
            for_host,
            logits,
        };
        Ok((replay, buffers, held))
    }
}

impl Engine {
    fn run(&mut self) -> Result<(), String> {
        if self.launched > self.most + AHEAD {
            return Err(format!(
                "more than the {} steps there is room for",
                self.most
            ));
        }
        self.replay.run();
        self.launched += 1;
        Ok(())
    }
}

impl Drop for Engine {
    /// A copy that nobody awaits would leave its buffer mapped, and the next copy would fail.
    fn drop(&mut self) {
        if let Some(reading) = self.reading.take() {
            let _ = wait(reading);
        }
    }
}

impl Decoder for Engine {
    fn next_tokens(&mut self) -> Result<Vec<Option<u32>>, String> {
        let reading = match self.reading.take() {
            Some(reading) => reading,
            None => {
                self.run()?;
                read(self.buffers.for_host.clone())
            }
        };
        // The device goes on while the host waits. Two copies to the host at once would share a buffer
        // there, so the next step's tokens are requested once these have arrived.
        let ahead = self.launched <= self.most;
        if ahead {
            self.run()?;
        }
        let tokens = bytemuck::pod_collect_to_vec::<u8, i32>(&wait(reading)?);
        self.reading = ahead.then(|| read(self.buffers.for_host.clone()));
        let known = |token| u32::try_from(token).ok();
        Ok(tokens.into_iter().map(known).collect())
    }

    fn next_logits(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, String> {
        self.replay
            .write(self.tokens_at.resource(), bytemuck::cast_slice(tokens));
        self.run()?;
        let [_, vocab] = self.buffers.logits.meta.shape().dims();
        let bytes = wait(read(self.buffers.logits.clone()))?;
        let values = bytemuck::pod_collect_to_vec::<u8, f32>(&bytes);
        Ok(values.chunks(vocab).map(<[f32]>::to_vec).collect())
    }

    fn most_verified(&self) -> usize {
        let verifier = self.verifier.as_ref();
        verifier.map_or(0, |verifier| verifier.most_verified())
    }

    fn verify(&mut self, tokens: &[u32]) -> Result<Vec<Option<u32>>, String> {
        match &mut self.verifier {
            Some(verifier) => verifier.verify(tokens),
            None => Err("this decoder verifies nothing".into()),
        }
    }

    fn keep(&mut self, tokens: usize) {
        if let Some(verifier) = &mut self.verifier {
            verifier.keep(tokens);
        }
    }
}
