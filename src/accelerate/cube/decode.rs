//! Decoding after a prefilled cache in six or seven launches a layer.
//!
//! Norm and QKV; head norms, rotation and cache; attention; output and residual; norm, gate, up and SwiGLU;
//! down and residual ([`FusedStep`]). The argmax of the logits is taken on the device and feeds the next step,
//! which is queued before the host has read the token.

use std::{
    future::{Future, ready},
    ops::Range,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use burn::{
    prelude::*,
    tensor::{DType, TensorData},
};
use burn_cubecl::CubeRuntime;
use cubecl::{bytes::Bytes, server::ServerError};

use super::{
    attention,
    launch::{Buffer, Cache, Cube, contiguous, strided, tensor},
    likeliest::likeliest,
    matrix::Matrix,
    matvec::{self, InputNorm},
    rotary::{self, HeadNorms, Place},
    words::Packing,
};
use crate::{
    qwen3_vl::{
        Qwen3Vl,
        config::Qwen3VlConfig,
        key_values::KeyValueCache,
        layer::{Executor, StreamNorm, decoder_layers},
        nn::{Embedding, Linear, RmsNorm},
        rope::inverse_frequencies,
    },
    runtime::{
        accelerator::{Accelerator, DecodeStart, Decoder},
        generate::drafts::MOST_DRAFTED,
    },
};

/// Steps that may be queued beyond those whose tokens were requested.
const AHEAD: usize = 1;

/// Rows of a step that verifies drafted tokens, whether there are so many or not: which kernels run, and so how sums are
/// rounded, is then the same for all drafts.
const VERIFIED: usize = 1 + MOST_DRAFTED;

/// Steps whose rotary tables are made at once.
const TABLES: usize = 64;

/// A layer's weights and its part of the cache.
pub(super) struct Layer<R: CubeRuntime> {
    pub(super) input_norm: InputNorm<R>,
    pub(super) qkv: [Matrix<R>; 3],
    pub(super) head_norms: HeadNorms<R>,
    pub(super) output: Matrix<R>,
    pub(super) mlp_norm: InputNorm<R>,
    pub(super) gate: Matrix<R>,
    pub(super) up: Matrix<R>,
    pub(super) down: Matrix<R>,
    pub(super) keys: Buffer<R>,
    pub(super) values: Buffer<R>,
}

pub(super) type Reading = Pin<Box<dyn Future<Output = Result<Vec<Bytes>, ServerError>> + Send>>;

struct Engine<R: CubeRuntime> {
    layers: Vec<Layer<R>>,
    norm: InputNorm<R>,
    embedding: Embedding<Cube<R>>,
    head: Matrix<R>,
    heads: usize,
    frequencies: Vec<f32>,
    /// First visible key of the first row.
    first: i32,
    /// That of each row, and a number no row's keys reach.
    ranges: [Buffer<R>; 2],
    /// Tokens of the next step, one a row.
    tokens: Buffer<R>,
    /// Position of the first step of each row.
    positions: Vec<i64>,
    /// Rotary tables of the steps `made` and the following, `[TABLES, 2, rows, d]`.
    tables: Option<(usize, Buffer<R>)>,
    /// Tokens in the cache before the first step.
    cached: usize,
    launched: usize,
    most: usize,
    /// Rows that tokens of one sequence are verified in; 0 where that is not covered.
    verified: usize,
    /// Async read of the tokens of the last requested step.
    reading: Option<Reading>,
}

pub(super) fn norm<R: CubeRuntime>(norm: &RmsNorm<Cube<R>>) -> InputNorm<R>
where
    Cube<R>: Accelerator,
{
    InputNorm {
        weight: contiguous(norm.weight.val()),
        epsilon: norm.epsilon(),
    }
}

fn weight<R: CubeRuntime>(linear: &Linear<Cube<R>>) -> Matrix<R> {
    Matrix::of(&linear.weight)
}

/// Whether the model's text layers are plain matrices of shapes the kernels cover.
fn covers<R: CubeRuntime>(model: &Qwen3Vl<Cube<R>>, config: &Qwen3VlConfig, rows: usize) -> bool
where
    Cube<R>: Accelerator,
{
    let text = &config.text_config;
    let dtype = model.dtype();
    let Some(packing) = Packing::of(dtype) else {
        return false;
    };
    let plain = |linear: &Linear<Cube<R>>| {
        linear.lora.is_none() && linear.bias.is_none() && weight(linear).covers(dtype)
    };
    let widths = [
        text.hidden_size,
        text.intermediate_size,
        text.head_dim * text.num_attention_heads,
        text.head_dim * text.num_key_value_heads,
        text.head_dim,
    ];
    let client = strided(model.model.language_model.norm.weight.val()).client;
    let [_, _, q, key_value, _] = widths;
    let most = matvec::most_rows(&client, dtype, [q, key_value, key_value]);
    (1..=most).contains(&rows)
        && widths
            .iter()
            .all(|width| width.is_multiple_of(packing.piece()))
        && text.head_dim <= 256
        && text.num_attention_heads / text.num_key_value_heads <= 8
        && model.lm_head.as_ref().is_none_or(plain)
        && Matrix::of(model.head()).covers(dtype)
        && model.model.language_model.layers.iter().all(|layer| {
            // What is multiplied in one launch has one format.
            let [q, k, v, _, gate, up, _] = layer.projections().map(weight);
            layer.projections().into_iter().all(plain)
                && q.is_like(&k)
                && q.is_like(&v)
                && gate.is_like(&up)
        })
}

/// The layers with a prefilled cache, and the first visible key of each row; `None` where the kernels do not cover
/// the model.
#[allow(clippy::type_complexity)]
pub(super) fn layers<R: CubeRuntime>(
    model: &Qwen3Vl<Cube<R>>,
    config: &Qwen3VlConfig,
    cache: &KeyValueCache<Cube<R>>,
    start: &DecodeStart,
) -> Option<(Vec<Layer<R>>, Vec<i32>)>
where
    Cube<R>: Accelerator,
{
    let rows = start.tokens.len();
    let room = cache
        .capacity()
        .is_some_and(|capacity| cache.len() + start.most_steps + AHEAD < capacity);
    // Only the likeliest token is found on the device.
    let likeliest = start.draws.is_empty() && start.seen.is_empty();
    if !room || !likeliest || !covers(model, config, rows) {
        return None;
    }
    let text = &model.model.language_model;
    let dtype = model.dtype();
    let layers = text
        .layers
        .iter()
        .zip(&cache.layers)
        .map(|(layer, cache)| {
            let (keys, values) = cache.buffers()?;
            let (keys, values) = (strided(keys.clone()), strided(values.clone()));
            let [q, k, v, output, gate, up, down] = layer.projections().map(weight);
            let attn = &layer.self_attn;
            let fits = keys.is_contiguous() && values.is_contiguous();
            (fits && keys.dtype == dtype).then(|| Layer {
                input_norm: norm(&layer.input_layernorm),
                qkv: [q, k, v],
                head_norms: HeadNorms {
                    q: contiguous(attn.q_norm.weight.val()),
                    q_epsilon: attn.q_norm.epsilon(),
                    k: contiguous(attn.k_norm.weight.val()),
                    k_epsilon: attn.k_norm.epsilon(),
                },
                output,
                mlp_norm: norm(&layer.post_attention_layernorm),
                gate,
                up,
                down,
                keys,
                values,
            })
        })
        .collect::<Option<Vec<_>>>()?;
    let first: Vec<i32> = cache
        .segments
        .iter()
        .map(|row| row.iter().take_while(|segment| **segment < 0).count() as i32)
        .collect();
    Some((layers, first))
}

/// The engine for a prefilled cache; `None` where the kernels do not cover the model.
pub(in crate::accelerate) fn start<R: CubeRuntime>(
    model: &Qwen3Vl<Cube<R>>,
    config: &Qwen3VlConfig,
    cache: &KeyValueCache<Cube<R>>,
    start: &DecodeStart,
) -> Option<Box<dyn Decoder>>
where
    Cube<R>: Accelerator,
{
    let (layers, first) = layers(model, config, cache, start)?;
    let text = &model.model.language_model;
    let rows = start.tokens.len();
    let verified = match rows == 1 && covers(model, config, VERIFIED) {
        true => VERIFIED,
        false => 0,
    };
    let device = contiguous(text.norm.weight.val()).device;
    let tokens: Vec<i32> = start.tokens.iter().map(|token| *token as i32).collect();
    let config = &config.text_config;
    Some(Box::new(Engine {
        layers,
        norm: norm(&text.norm),
        embedding: text.embed_tokens.clone(),
        head: Matrix::of(model.head()),
        heads: config.num_attention_heads,
        frequencies: inverse_frequencies(config.head_dim, config.rope_theta),
        first: first[0],
        ranges: [
            integers(&first, &device),
            integers(&vec![i32::MAX; rows], &device),
        ],
        tokens: integers(&tokens, &device),
        positions: start.positions.clone(),
        tables: None,
        cached: cache.len(),
        launched: 0,
        most: start.most_steps,
        verified,
        reading: None,
    }))
}

pub(super) fn integers<R: CubeRuntime>(values: &[i32], device: &R::Device) -> Buffer<R> {
    Tensor::<Cube<R>, 1, Int>::from_data(
        TensorData::new(values.to_vec(), [values.len()]),
        (device, DType::I32),
    )
    .into_primitive()
}

fn indices<R: CubeRuntime>(buffer: Buffer<R>) -> Tensor<Cube<R>, 1, Int> {
    Tensor::from_primitive(buffer)
}

/// Cosines and sines of some steps `[steps, 2, rows, d]` after these positions of each row.
pub(super) fn rotary_tables<R: CubeRuntime>(
    frequencies: &[f32],
    positions: &[i64],
    steps: Range<usize>,
    device: &R::Device,
) -> Buffer<R> {
    let mut values = Vec::with_capacity(steps.len() * 4 * positions.len() * frequencies.len());
    for step in steps {
        for of in [f32::cos, f32::sin] {
            for position in positions {
                let position = (*position + step as i64) as f32;
                let start = values.len();
                values.extend(frequencies.iter().map(|one| of(position * one)));
                values.extend_from_within(start..);
            }
        }
    }
    let shape = [values.len()];
    let data = TensorData::new(values, shape);
    contiguous(Tensor::<Cube<R>, 1>::from_data(data, (device, DType::F32)))
}

impl<R: CubeRuntime> Engine<R>
where
    Cube<R>: Accelerator,
{
    /// Rotary tables that hold the next step, and the offset of its cosines there.
    fn table(&mut self) -> (Buffer<R>, usize) {
        let width = 2 * self.positions.len() * 2 * self.frequencies.len();
        if let Some((made, tables)) = &self.tables
            && self.launched < made + TABLES
        {
            return (tables.clone(), (self.launched - made) * width);
        }
        let steps = self.launched..self.launched + TABLES;
        let device = self.tokens.device.clone();
        let tables = rotary_tables(&self.frequencies, &self.positions, steps, &device);
        self.tables = Some((self.launched, tables.clone()));
        (tables, 0)
    }

    /// Queues a step on tokens of the one sequence, the newest and those drafted after it; returns its logits
    /// `[verified, vocab]`.
    fn verify_step(&mut self, tokens: &[u32]) -> Buffer<R> {
        let (rows, at) = (self.verified, self.cached + self.launched);
        let padded = |row: usize| tokens[row.min(tokens.len() - 1)] as i32;
        let ids: Vec<i32> = (0..rows).map(padded).collect();
        let device = self.tokens.device.clone();
        let position = self.positions[0] + self.launched as i64;
        let positions: Vec<i64> = (position..).take(rows).collect();
        let tables = rotary_tables(&self.frequencies, &positions, 0..1, &device);
        let ends: Vec<i32> = (at + 1..).take(rows).map(|end| end as i32).collect();
        let first = vec![self.first; rows];
        let ranges = [integers(&first, &device), integers(&ends, &device)];
        let indices = indices(integers(&ids, &device));
        let x = contiguous(self.embedding.forward(indices));
        let mut run = FusedStep {
            layers: &self.layers,
            layer: &self.layers[0],
            heads: self.heads,
            ranges: &ranges,
            tables: &tables,
            place: Place::Known { at, cosines: 0 },
            rows,
            keys: at + rows,
            one_sequence: true,
        };
        let x = decoder_layers(&mut run, 0..self.layers.len(), x);
        self.head.matmul(&x, Some(&self.norm), None, DType::F32)
    }

    /// Queues a step on the current tokens; returns its logits `[rows, vocab]`.
    fn step(&mut self) -> Buffer<R> {
        let (tables, cosines) = self.table();
        let at = self.cached + self.launched;
        let indices = indices(self.tokens.clone());
        let x = contiguous(self.embedding.forward(indices));
        let [rows, _] = x.meta.shape().dims();
        let mut run = FusedStep {
            layers: &self.layers,
            layer: &self.layers[0],
            heads: self.heads,
            ranges: &self.ranges,
            tables: &tables,
            place: Place::Known { at, cosines },
            rows,
            keys: at + 1,
            one_sequence: false,
        };
        let x = decoder_layers(&mut run, 0..self.layers.len(), x);
        let logits = self.head.matmul(&x, Some(&self.norm), None, DType::F32);
        self.launched += 1;
        logits
    }

    /// Queues a step and the argmax whose tokens go into the next; returns these for the host.
    fn step_to_tokens(&mut self) -> Buffer<R> {
        let [next, for_host] = likeliest(&self.step());
        self.tokens = next;
        for_host
    }
}

/// The layers of one step in fused launches.
pub(super) struct FusedStep<'a, R: CubeRuntime> {
    pub(super) layers: &'a [Layer<R>],
    pub(super) layer: &'a Layer<R>,
    /// Query heads.
    pub(super) heads: usize,
    /// First visible key of each row, and the end of its keys.
    pub(super) ranges: &'a [Buffer<R>; 2],
    pub(super) tables: &'a Buffer<R>,
    pub(super) place: Place<'a, R>,
    pub(super) rows: usize,
    /// Keys with the step's own, or the most there will be.
    pub(super) keys: usize,
    /// Whether the rows are tokens of one sequence, one after another.
    pub(super) one_sequence: bool,
}

/// The residual stream, whose norm the next matmul applies to its input.
pub(super) struct Normed<'a, R: CubeRuntime> {
    x: Buffer<R>,
    norm: &'a InputNorm<R>,
}

impl<'a, R: CubeRuntime> Executor for FusedStep<'a, R> {
    type Hidden = Buffer<R>;
    type Normed = Normed<'a, R>;
    type Projected = Buffer<R>;
    /// Queries; keys and values are in the cache.
    type Rotated = Buffer<R>;
    type Attended = Buffer<R>;
    type Activated = Buffer<R>;

    fn enter(&mut self, layer: usize) {
        self.layer = &self.layers[layer];
    }

    fn norm(&mut self, norm: StreamNorm, x: &Buffer<R>) -> Normed<'a, R> {
        let norm = match norm {
            StreamNorm::Input => &self.layer.input_norm,
            StreamNorm::PostAttention => &self.layer.mlp_norm,
        };
        Normed { x: x.clone(), norm }
    }

    fn project_heads(&mut self, h: Normed<'a, R>) -> Buffer<R> {
        Matrix::three_matmuls(&h.x, h.norm, self.layer.qkv.each_ref())
    }

    fn rotate(&mut self, qkv: Buffer<R>) -> Buffer<R> {
        let cache = [&self.layer.keys, &self.layer.values];
        let (norms, one) = (&self.layer.head_norms, self.one_sequence);
        rotary::rotate_into_cache(&qkv, norms, self.tables, &self.place, cache, one)
    }

    fn attend(&mut self, q: Buffer<R>) -> Buffer<R> {
        let (keys, values) = (&self.layer.keys, &self.layer.values);
        let (rows, heads, head_dim) = (self.rows, self.heads, keys.meta.shape()[3]);
        let q = strided(tensor::<R, 2>(q).reshape([rows, heads, 1, head_dim]));
        let step = match &self.place {
            Place::Known { .. } => None,
            Place::OnDevice(step) => Some(*step),
        };
        let (cache, one) = (Cache { keys, values }, self.one_sequence);
        let y = attention::attended(&q, &cache, self.ranges.each_ref(), (self.keys, step), one);
        strided(tensor::<R, 4>(y).reshape([rows, heads * head_dim]))
    }

    fn project_attended(&mut self, y: Buffer<R>, residual: Buffer<R>) -> Buffer<R> {
        self.layer
            .output
            .matmul(&y, None, Some(&residual), residual.dtype)
    }

    fn swiglu(&mut self, h: Normed<'a, R>) -> Buffer<R> {
        Matrix::swiglu_matmul(&h.x, h.norm, &self.layer.gate, &self.layer.up)
    }

    fn project_down(&mut self, y: Buffer<R>, residual: Buffer<R>) -> Buffer<R> {
        self.layer
            .down
            .matmul(&y, None, Some(&residual), residual.dtype)
    }
}

/// Queues the copy of a buffer to the host.
pub(super) fn read<R: CubeRuntime>(buffer: Buffer<R>) -> Reading {
    let Buffer { client, handle, .. } = buffer;
    let mut reading: Reading = Box::pin(async move { client.read_async(vec![handle]).await });
    // The first poll queues the copy, before any later work is queued.
    match reading
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(read) => Box::pin(ready(read)),
        Poll::Pending => reading,
    }
}

pub(super) fn wait(reading: Reading) -> Result<Bytes, String> {
    let read = cubecl::future::block_on(reading).map_err(|error| error.to_string())?;
    read.into_iter()
        .next()
        .ok_or_else(|| "the device returned nothing".to_string())
}

impl<R: CubeRuntime> Drop for Engine<R> {
    /// A copy that nobody awaits would leave its buffer mapped, and the next copy would fail.
    fn drop(&mut self) {
        if let Some(reading) = self.reading.take() {
            let _ = wait(reading);
        }
    }
}

impl<R: CubeRuntime> Decoder for Engine<R>
where
    Cube<R>: Accelerator,
{
    fn next_tokens(&mut self) -> Result<Vec<Option<u32>>, String> {
        let reading = match self.reading.take() {
            Some(reading) => reading,
            None => read(self.step_to_tokens()),
        };
        // The device goes on while the host waits. Two copies to the host at once would share a buffer
        // there, so the next step's tokens are requested once these have arrived.
        let ahead = (self.launched <= self.most).then(|| self.step_to_tokens());
        let tokens = bytemuck::pod_collect_to_vec::<u8, i32>(&wait(reading)?);
        self.reading = ahead.map(read);
        let known = |token| u32::try_from(token).ok();
        Ok(tokens.into_iter().map(known).collect())
    }

    fn next_logits(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, String> {
        let tokens: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
        self.tokens = integers(&tokens, &self.tokens.device);
        let logits = self.step();
        let [_, vocab] = logits.meta.shape().dims();
        let bytes = wait(read(logits))?;
        let values = bytemuck::pod_collect_to_vec::<u8, f32>(&bytes);
        Ok(values.chunks(vocab).map(<[f32]>::to_vec).collect())
    }

    fn most_verified(&self) -> usize {
        self.verified
    }

    fn verify(&mut self, tokens: &[u32]) -> Result<Vec<Option<u32>>, String> {
        assert!((1..=self.verified).contains(&tokens.len()), "too many rows");
        let [_, for_host] = likeliest(&self.verify_step(tokens));
        let chosen = bytemuck::pod_collect_to_vec::<u8, i32>(&wait(read(for_host))?);
        let known = |token| u32::try_from(token).ok();
        Ok(chosen.into_iter().take(tokens.len()).map(known).collect())
    }

    fn keep(&mut self, tokens: usize) {
        self.launched += tokens;
    }
}
