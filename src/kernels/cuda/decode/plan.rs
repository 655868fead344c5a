//! The launches of one decode step, in order, with all their pointers.

use burn::{module::Param, prelude::*, tensor::DType};

use super::{
    super::{
        launch::{Backend, Buffer, Client, Defines, Kernel, contiguous, float_bits, strided},
        module::{DriverError, Function, architecture, driver, load},
        rows,
    },
    floats, integers, scratch,
};
use crate::{
    kernels::DecodeStart,
    qwen3_vl::{
        Qwen3Vl, cache::KeyValueCache, config::Qwen3VlConfig, nn::Linear, rope::inverse_frequencies,
    },
};

const SCALAR: &str = include_str!("../scalar.cuh");
const GEMV: &[&str] = &[SCALAR, include_str!("gemv.cu")];
const SKINNY: &[&str] = &[SCALAR, include_str!("skinny.cu")];
const STEP: &[&str] = &[SCALAR, include_str!("step.cu")];
const ATTENTION: &[&str] = &[
    include_str!("../common.cuh"),
    include_str!("../attention_common.cuh"),
    include_str!("../attention_decode.cu"),
];

/// Blocks that look for the likeliest token of a row.
const SHARES: usize = 64;

/// One launch.
pub(super) struct Step {
    pub function: Function,
    pub grid: [u32; 3],
    pub pointers: Vec<u64>,
    pub parameters: Vec<u64>,
}

/// All launches of a step, and what they point to.
pub(super) struct Plan {
    pub steps: Vec<Step>,
    /// Device address of the tokens that go in, one a row.
    pub token: u64,
    /// Device address of the logits, `[rows, vocab]` f32.
    pub logits: u64,
    /// Keeps the memory behind the pointers.
    _kept: Vec<Buffer>,
}

struct Builder<'a> {
    client: &'a Client,
    device: usize,
    arch: String,
    rows: usize,
    steps: Vec<Step>,
    kept: Vec<Buffer>,
}

/// What goes around a product.
#[derive(Default, Clone, Copy)]
struct Around {
    /// Norm weight and epsilon.
    norm: Option<(u64, f64)>,
    gate: bool,
    residual: Option<u64>,
    out_f32: bool,
}

impl Builder<'_> {
    fn address(&mut self, buffer: Buffer) -> Result<u64, DriverError> {
        let resource = self.client.get_resource(buffer.handle.clone());
        let address = driver("finding a buffer", resource)?.resource().ptr;
        self.kept.push(buffer);
        Ok(address)
    }

    fn weight(&mut self, linear: &Linear<Backend>) -> Result<(u64, usize), DriverError> {
        let buffer = contiguous(linear.weight.val());
        let [out, _] = buffer.meta.shape().dims();
        Ok((self.address(buffer)?, out))
    }

    fn vector(&mut self, param: &Param<Tensor<Backend, 1>>) -> Result<u64, DriverError> {
        self.address(contiguous(param.val()))
    }

    fn push(
        &mut self,
        kernel: Kernel,
        grid: [usize; 3],
        pointers: Vec<u64>,
        parameters: Vec<u64>,
    ) -> Result<(), DriverError> {
        let function = load(&kernel, self.device, &self.arch)?;
        self.steps.push(Step {
            function,
            grid: grid.map(|size| size as u32),
            pointers,
            parameters,
        });
        Ok(())
    }

    /// `y = x [W…]ᵀ`: `weights` are addresses and rows of matrices `[rows, k]`.
    fn product(
        &mut self,
        x: u64,
        k: usize,
        weights: &[(u64, usize)],
        y: u64,
        around: Around,
        normed: u64,
    ) -> Result<(), DriverError> {
        let mut defines: Defines = vec![
            ("SCALAR_BF16", 1),
            ("WEIGHTS", weights.len() as i64),
            ("GATE", i64::from(around.gate)),
            ("RESIDUAL", i64::from(around.residual.is_some())),
            ("OUT_F32", i64::from(around.out_f32)),
        ];
        let rows_of = |at: usize| weights.get(at).map_or(0, |weight| weight.1 as u64);
        let count: usize = if around.gate {
            weights[0].1
        } else {
            weights.iter().map(|weight| weight.1).sum()
        };
        let matrices = weights.iter().map(|weight| weight.0);
        let mut parameters = vec![k as u64, rows_of(0), rows_of(1), rows_of(2)];
        if self.rows == 1 {
            defines.push(("NORM", i64::from(around.norm.is_some())));
            let pointers = [x]
                .into_iter()
                .chain(around.norm.map(|norm| norm.0))
                .chain(matrices)
                .chain(around.residual)
                .chain([y])
                .collect();
            parameters.push(float_bits(around.norm.map_or(0.0, |norm| norm.1)));
            let kernel = Kernel::new("gemv", GEMV, defines, 256);
            let a_block = if around.gate { 2 } else { 4 };
            return self.push(
                kernel,
                [count.div_ceil(a_block), 1, 1],
                pointers,
                parameters,
            );
        }
        let mut input = x;
        if let Some((weight, epsilon)) = around.norm {
            let kernel = rows::kernel("rms_norm", "NORM_RMS", k, DType::BF16);
            self.push(
                kernel,
                [self.rows, 1, 1],
                vec![x, weight, normed],
                vec![self.rows as u64, float_bits(epsilon)],
            )?;
            input = normed;
        }
        defines.push(("TILES", self.rows.div_ceil(8) as i64));
        let pointers = [input]
            .into_iter()
            .chain(matrices)
            .chain(around.residual)
            .chain([y])
            .collect();
        parameters.push(self.rows as u64);
        let kernel = Kernel::new("skinny", SKINNY, defines, 256);
        self.push(kernel, [count / 16, 1, 1], pointers, parameters)
    }

    fn small(
        &mut self,
        form: &'static str,
        head_dim: usize,
        threads: u32,
        grid: [usize; 3],
        pointers: Vec<u64>,
        parameters: Vec<u64>,
    ) -> Result<(), DriverError> {
        let defines = vec![(form, 1), ("SCALAR_BF16", 1), ("HEAD_DIM", head_dim as i64)];
        let kernel = Kernel::new(form, STEP, defines, threads);
        self.push(kernel, grid, pointers, parameters)
    }
}

impl Plan {
    #[allow(
        clippy::too_many_arguments,
        reason = "one caller, and all of it is needed"
    )]
    pub(super) fn new(
        model: &Qwen3Vl<Backend>,
        config: &Qwen3VlConfig,
        cache: &KeyValueCache<Backend>,
        start: &DecodeStart,
        client: &Client,
        like: &Buffer,
        ring: u64,
        slots: usize,
    ) -> Result<Self, DriverError> {
        let text = &config.text_config;
        let (hidden, inner, vocab) = (text.hidden_size, text.intermediate_size, text.vocab_size);
        let (heads, kv_heads) = (text.num_attention_heads, text.num_key_value_heads);
        let head_dim = text.head_dim;
        let rows = start.tokens.len();
        let device = like.device.index;
        let mut build = Builder {
            client,
            device,
            arch: architecture(device),
            rows,
            steps: Vec::new(),
            kept: Vec::new(),
        };
        let b = &mut build;

        // What changes from step to step.
        let as_ints = |values: Vec<i64>| -> Vec<i32> {
            values.into_iter().map(|value| value as i32).collect()
        };
        let tokens = as_ints(start.tokens.iter().map(|token| i64::from(*token)).collect());
        let token = b.address(integers(&tokens, like))?;
        let position = b.address(integers(&as_ints(start.positions.clone()), like))?;
        // The new token counts as held; padding lies in front.
        let end = b.address(integers(&vec![cache.len() as i32 + 1; rows], like))?;
        let first: Vec<i32> = cache
            .segments
            .iter()
            .map(|row| row.iter().take_while(|segment| **segment < 0).count() as i32)
            .collect();
        let first = b.address(integers(&first, like))?;
        let step = b.address(integers(&vec![0; rows], like))?;
        let finished = b.address(integers(&vec![0; rows * kv_heads], like))?;
        let frequencies = inverse_frequencies(head_dim, text.rope_theta);
        let frequencies = b.address(floats(&frequencies, like))?;

        // Activations.
        let half = |b: &mut Builder<'_>, width| b.address(scratch(like, rows * width, DType::BF16));
        let single = |b: &mut Builder<'_>, count| b.address(scratch(like, count, DType::F32));
        let (mut x, mut x_next) = (half(b, hidden)?, half(b, hidden)?);
        let normed = half(b, hidden)?;
        let qkv = half(b, (heads + 2 * kv_heads) * head_dim)?;
        let queries = half(b, heads * head_dim)?;
        let attended = half(b, heads * head_dim)?;
        let gated = half(b, inner)?;
        let logits = single(b, rows * vocab)?;
        let splits = (2 * 132 / (kv_heads * rows)).clamp(1, 64);
        let partial = single(b, rows * heads * splits * head_dim)?;
        let statistics = single(b, rows * heads * splits * 2)?;
        let best_values = single(b, rows * SHARES)?;
        let best_indices = b.address(integers(&vec![0; rows * SHARES], like))?;

        let small = |width: usize, strides: [u64; 3], epsilon: f64| -> Vec<u64> {
            vec![
                width as u64,
                heads as u64,
                kv_heads as u64,
                strides[0],
                strides[1],
                strides[2],
                float_bits(epsilon),
                slots as u64,
            ]
        };
        let language = &model.model.language_model;
        let table = b.address(contiguous(language.embed_tokens.weight.val()))?;
        b.small(
            "EMBED",
            head_dim,
            256,
            [rows, 1, 1],
            vec![table, token, x],
            small(hidden, [0; 3], 0.0),
        )?;
        for (layer, cached) in language.layers.iter().zip(&cache.layers) {
            let (attn, mlp) = (&layer.self_attn, &layer.mlp);
            let Some((keys, values)) = cached.buffers() else {
                continue;
            };
            let (keys, values) = (strided(keys.clone()), strided(values.clone()));
            let strides =
                |buffer: &Buffer| [0, 1, 2].map(|axis| buffer.meta.strides()[axis] as u64);
            let (key_strides, value_strides) = (strides(&keys), strides(&values));
            let capacity = keys.meta.shape()[2];
            let (keys, values) = (b.address(keys)?, b.address(values)?);

            let projections = [
                b.weight(&attn.q_proj)?,
                b.weight(&attn.k_proj)?,
                b.weight(&attn.v_proj)?,
            ];
            let norm = b.vector(&layer.input_layernorm.weight)?;
            let around = Around {
                norm: Some((norm, layer.input_layernorm.epsilon())),
                ..Around::default()
            };
            b.product(x, hidden, &projections, qkv, around, normed)?;

            let (q_norm, k_norm) = (
                b.vector(&attn.q_norm.weight)?,
                b.vector(&attn.k_norm.weight)?,
            );
            b.small(
                "HEADS",
                head_dim,
                128,
                [(heads + 2 * kv_heads).div_ceil(4), rows, 1],
                vec![
                    qkv,
                    q_norm,
                    k_norm,
                    frequencies,
                    position,
                    end,
                    queries,
                    keys,
                    values,
                ],
                small(0, key_strides, attn.q_norm.epsilon()),
            )?;

            let defines = vec![
                ("HEAD_DIM", head_dim as i64),
                ("GROUP", (heads / kv_heads) as i64),
                ("PART", 0),
            ];
            let kernel = Kernel::new("attention_decode", ATTENTION, defines, 128)
                .with_entry_macro("ATTN_NAME");
            let mut parameters = vec![(heads * head_dim) as u64, head_dim as u64];
            parameters.extend(key_strides);
            parameters.extend(value_strides);
            parameters.extend([kv_heads, capacity, splits].map(|size| size as u64));
            parameters.push(float_bits((head_dim as f64).powf(-0.5)));
            b.push(
                kernel,
                [splits, kv_heads, rows],
                vec![
                    queries, keys, values, attended, first, end, partial, statistics, finished,
                ],
                parameters,
            )?;

            let weight = b.weight(&attn.o_proj)?;
            let around = Around {
                residual: Some(x),
                ..Around::default()
            };
            b.product(
                attended,
                heads * head_dim,
                &[weight],
                x_next,
                around,
                normed,
            )?;
            std::mem::swap(&mut x, &mut x_next);

            let weights = [b.weight(&mlp.gate_proj)?, b.weight(&mlp.up_proj)?];
            let norm = b.vector(&layer.post_attention_layernorm.weight)?;
            let around = Around {
                norm: Some((norm, layer.post_attention_layernorm.epsilon())),
                gate: true,
                ..Around::default()
            };
            b.product(x, hidden, &weights, gated, around, normed)?;
            let weight = b.weight(&mlp.down_proj)?;
            let around = Around {
                residual: Some(x),
                ..Around::default()
            };
            b.product(gated, inner, &[weight], x_next, around, normed)?;
            std::mem::swap(&mut x, &mut x_next);
        }
        let norm = b.vector(&language.norm.weight)?;
        let head = b.address(contiguous(model.head_weight()))?;
        let around = Around {
            norm: Some((norm, language.norm.epsilon())),
            out_f32: true,
            ..Around::default()
        };
        b.product(x, hidden, &[(head, vocab)], logits, around, normed)?;
        b.small(
            "PICK",
            head_dim,
            256,
            [SHARES, rows, 1],
            vec![logits, best_values, best_indices],
            small(vocab, [0; 3], 0.0),
        )?;
        b.small(
            "ADVANCE",
            head_dim,
            32,
            [rows, 1, 1],
            vec![best_values, best_indices, token, position, end, step, ring],
            small(SHARES, [0; 3], 0.0),
        )?;
        Ok(Self {
            steps: build.steps,
            token,
            logits,
            _kept: build.kept,
        })
    }
}
