//! What a decode step's launches point to: the model's weights on the device, and scratch buffers.

use burn::{module::Param, prelude::*, tensor::DType};

use super::{
    super::{
        fragments::{FragmentMatmul, Fragments},
        launch::{Backend, Buffer, Client, contiguous, empty, strided},
        operand::Operand,
        plan::{Device, card},
    },
    module::{DriverError, architecture, driver},
};
use crate::{
    ops::quantised::{Format, Quantization},
    qwen3_vl::{
        Qwen3Vl,
        config::{Qwen3VlConfig, TextConfig},
        layer::Projection,
        rope::inverse_frequencies,
    },
    weights::Weight,
};

/// Blocks that search a row's logits for the largest (argmax).
pub(super) const SHARES: usize = 64;

/// Matmuls of a layer that may have an adapter; the head's index follows the last layer's.
pub(super) const LAYER_MATRICES: usize = Projection::ALL.len();

/// Most matmuls of one input, and the largest rank; as in `adapter.cuh`.
const ADAPTER_SHARES: usize = 3;
pub(super) const ADAPTER_RANK: usize = 256;

/// The address of one matrix, and its rows.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Matrix {
    pub(super) address: u64,
    pub(super) rows: usize,
    /// Of a quantised one in fragment order: the address of its scales, and its format.
    pub(super) quantised: Option<(u64, Format)>,
}

/// The address of the table of token vectors, and how it is stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    pub(super) address: u64,
    /// Of one in 8 bits: the address of its scales, and whether it is in fragment order.
    pub(super) quantised: Option<(u64, bool)>,
}

impl FragmentMatmul {
    /// Of quantised matrices of one input; `None` of floats.
    pub(super) fn of(matrices: &[Matrix], k: usize, gate: bool, vectors: usize) -> Option<Self> {
        let (_, format) = matrices[0].quantised?;
        let rows = |at: usize| matrices.get(at).map_or(0, |matrix: &Matrix| matrix.rows);
        Some(Self {
            format,
            k,
            rows: [rows(0), rows(1), rows(2)],
            gate,
            vectors,
        })
    }
}

/// Addresses of one layer's weights; a norm with its epsilon.
#[derive(Debug)]
pub(super) struct LayerWeights {
    pub(super) input_norm: (u64, f64),
    pub(super) q_norm: (u64, f64),
    pub(super) k_norm: u64,
    pub(super) post_norm: (u64, f64),
    /// In the order of [`Projection::ALL`].
    matrices: [Matrix; LAYER_MATRICES],
}

impl LayerWeights {
    /// Consecutive matrices of [`Projection::ALL`], and the first one's index in the layer.
    pub(super) fn matrices<const N: usize>(&self, first: Projection) -> ([Matrix; N], usize) {
        let place = first as usize;
        (std::array::from_fn(|at| self.matrices[place + at]), place)
    }
}

/// Addresses of a model's weights on the device.
#[derive(Debug)]
pub(super) struct Weights {
    pub(super) text: TextConfig,
    pub(super) device: usize,
    pub(super) arch: String,
    pub(super) processors: usize,
    pub(super) begins_early: bool,
    pub(super) table: Table,
    pub(super) layers: Vec<LayerWeights>,
    pub(super) norm: (u64, f64),
    pub(super) head: Matrix,
    pub(super) frequencies: u64,
    /// Keeps the memory of the addresses alive.
    _kept: Vec<Buffer>,
}

/// Finds the addresses of Burn's buffers and keeps them alive.
pub(super) struct Addresses<'a> {
    client: &'a Client,
    kept: Vec<Buffer>,
}

impl<'a> Addresses<'a> {
    pub(super) fn new(client: &'a Client) -> Self {
        Self {
            client,
            kept: Vec::new(),
        }
    }

    pub(super) fn of(&mut self, buffer: Buffer) -> Result<u64, DriverError> {
        let resource = self.client.get_resource(buffer.handle.clone());
        let address = driver("finding a buffer", resource)?.resource().ptr;
        self.kept.push(buffer);
        Ok(address)
    }

    pub(super) fn kept(self) -> Vec<Buffer> {
        self.kept
    }

    /// The address of a contiguous tensor of this type and shape.
    ///
    /// # Panics
    /// If type, shape or layout differ: kernels get sizes, and check none.
    pub(super) fn contiguous<const D: usize>(
        &mut self,
        buffer: Buffer,
        dtype: DType,
        shape: [usize; D],
    ) -> Result<u64, DriverError> {
        let _ = Operand::contiguous(&buffer, dtype, shape);
        self.of(buffer)
    }

    fn matrix(
        &mut self,
        weight: Tensor<Backend, 2>,
        [rows, columns]: [usize; 2],
    ) -> Result<Matrix, DriverError> {
        let address = self.contiguous(contiguous(weight), DType::BF16, [rows, columns])?;
        Ok(Matrix {
            address,
            rows,
            quantised: None,
        })
    }

    /// A matrix of floats, or quantised in fragment order.
    fn weight(
        &mut self,
        weight: &Weight<Backend>,
        [rows, columns]: [usize; 2],
    ) -> Result<Matrix, DriverError> {
        let packed = match weight {
            Weight::Dense(param) => return self.matrix(param.val(), [rows, columns]),
            Weight::Packed(packed) => packed,
        };
        let fragments = Fragments::of(packed).expect("`covers` accepts no other order");
        assert_eq!(fragments.dims, [rows, columns], "a quantised matrix");
        // Checked for its panic.
        let _ = fragments.operands();
        Ok(Matrix {
            address: self.of(fragments.words)?,
            rows,
            quantised: Some((self.of(fragments.scales)?, fragments.format)),
        })
    }

    fn table(&mut self, weight: &Weight<Backend>, shape: [usize; 2]) -> Result<Table, DriverError> {
        let packed = weight.packed().filter(|packed| !packed.is_arranged());
        let Some(packed) = packed else {
            let Matrix {
                address, quantised, ..
            } = self.weight(weight, shape)?;
            return Ok(Table {
                address,
                quantised: quantised.map(|(scales, _)| (scales, true)),
            });
        };
        let ([rows, width], format) = (shape, packed.format());
        assert_eq!(format, Format::Int8, "the table of token vectors");
        let words = packed.words().clone().into_primitive();
        let words = burn_cubecl::kernel::into_contiguous(words);
        let scales = contiguous(packed.scales().clone());
        Ok(Table {
            address: self.contiguous(words, DType::I32, [rows, format.words(width)])?,
            quantised: Some((self.contiguous(scales, DType::F32, [rows, 1])?, false)),
        })
    }

    fn vector(
        &mut self,
        param: &Param<Tensor<Backend, 1>>,
        length: usize,
    ) -> Result<u64, DriverError> {
        self.contiguous(contiguous(param.val()), DType::BF16, [length])
    }
}

impl Weights {
    pub(super) fn new(
        model: &Qwen3Vl<Backend>,
        config: &Qwen3VlConfig,
        client: &Client,
    ) -> Result<Self, DriverError> {
        let text = &config.text_config;
        let like = like(model);
        let device = like.device.index;
        let mut addresses = Addresses::new(client);
        let a = &mut addresses;
        let language = &model.model.language_model;
        let (hidden, width) = (text.hidden_size, text.head_dim);
        let layers = language
            .layers
            .iter()
            .map(|layer| {
                let attn = &layer.self_attn;
                let (before, after) = (&layer.input_layernorm, &layer.post_attention_layernorm);
                let mut matrices = [Matrix::default(); LAYER_MATRICES];
                for (matrix, projection) in matrices.iter_mut().zip(Projection::ALL) {
                    let linear = layer.projection(projection);
                    *matrix = a.weight(&linear.weight, projection.shape(text))?;
                }
                Ok(LayerWeights {
                    input_norm: (a.vector(&before.weight, hidden)?, before.epsilon()),
                    q_norm: (a.vector(&attn.q_norm.weight, width)?, attn.q_norm.epsilon()),
                    k_norm: a.vector(&attn.k_norm.weight, width)?,
                    post_norm: (a.vector(&after.weight, hidden)?, after.epsilon()),
                    matrices,
                })
            })
            .collect::<Result<_, DriverError>>()?;
        let frequencies = inverse_frequencies(text.head_dim, text.rope_theta);
        let vocab = [text.vocab_size, hidden];
        let table = a.table(&language.embed_tokens.weight, vocab)?;
        let norm = (
            a.vector(&language.norm.weight, hidden)?,
            language.norm.epsilon(),
        );
        let head = a.weight(model.head(), vocab)?;
        let frequencies = a.of(floats(&frequencies, &like))?;
        Ok(Self {
            text: text.clone(),
            device,
            arch: architecture(device),
            processors: card(device).processors,
            begins_early: card(device).begins_early(),
            table,
            layers,
            norm,
            head,
            frequencies,
            _kept: addresses.kept(),
        })
    }

    /// One layer with null addresses, whose launches use the same kernels as a loaded model's; quantised ones
    /// in fragment order.
    pub(super) fn nowhere(
        text: &TextConfig,
        quantization: Option<Quantization>,
        device: usize,
    ) -> Self {
        let of_layers = quantization.map(|quantization| (0, quantization.layers));
        let layer = LayerWeights {
            input_norm: (0, 0.0),
            q_norm: (0, 0.0),
            k_norm: 0,
            post_norm: (0, 0.0),
            matrices: Projection::ALL.map(|projection| Matrix {
                address: 0,
                rows: projection.shape(text)[0],
                quantised: of_layers,
            }),
        };
        Self {
            text: text.clone(),
            device,
            arch: architecture(device),
            processors: card(device).processors,
            begins_early: card(device).begins_early(),
            table: Table {
                address: 0,
                quantised: quantization.map(|_| (0, false)),
            },
            layers: vec![layer],
            norm: (0, 0.0),
            head: Matrix {
                address: 0,
                rows: text.vocab_size,
                quantised: quantization.map(|_| (0, Format::Int8)),
            },
            frequencies: 0,
            _kept: Vec::new(),
        }
    }

    /// Whether the matrices are quantised.
    pub(super) fn is_quantised(&self) -> bool {
        self.head.quantised.is_some()
    }

    /// The norm that follows a layer: the next one's, or the one before the head.
    pub(super) fn norm_after(&self, layer: usize) -> (u64, f64) {
        self.layers
            .get(layer + 1)
            .map_or(self.norm, |next| next.input_norm)
    }

    /// The matmuls of a step of quantised weights with so many rows; layers have the same shapes, and may have
    /// several formats.
    fn matmuls(&self, rows: usize) -> impl Iterator<Item = FragmentMatmul> {
        let text = &self.text;
        let one = move |matrices: &[Matrix], k, gate| FragmentMatmul::of(matrices, k, gate, rows);
        let [hidden, attended, wide] = [
            text.hidden_size,
            text.num_attention_heads * text.head_dim,
            text.intermediate_size,
        ];
        let in_layers = self.layers.iter().flat_map(move |layer| {
            [
                one(&layer.matrices::<3>(Projection::Query).0, hidden, false),
                one(&layer.matrices::<1>(Projection::Output).0, attended, false),
                one(&layer.matrices::<2>(Projection::Gate).0, hidden, true),
                one(&layer.matrices::<1>(Projection::Down).0, wide, false),
            ]
        });
        in_layers
            .chain([one(&[self.head], hidden, false)])
            .flatten()
    }

    /// Number of matmuls that may have an adapter.
    pub(super) fn matrices(&self) -> usize {
        self.layers.len() * LAYER_MATRICES + 1
    }
}

/// A buffer of the model, for its client, device and type.
pub(super) fn like(model: &Qwen3Vl<Backend>) -> Buffer {
    strided(model.model.language_model.norm.weight.val())
}

/// A buffer with these floats.
fn floats(values: &[f32], like: &Buffer) -> Buffer {
    contiguous(Tensor::<Backend, 1>::from_data(
        burn::tensor::TensorData::new(values.to_vec(), [values.len()]),
        (&like.device, DType::F32),
    ))
}

/// Intermediate values between the kernels of a step.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) x: [u64; 2],
    pub(super) normed: u64,
    pub(super) qkv: u64,
    pub(super) queries: u64,
    pub(super) attended: u64,
    pub(super) swiglu: u64,
    pub(super) low: u64,
    /// Sums of squares of every 16 elements of the residual stream, f32; quantised weights alone, as the two that follow.
    pub(super) squares: u64,
    /// Sums that blocks of a matmul exchange, and a counter for each block.
    pub(super) sums: u64,
    pub(super) counters: u64,
    /// `[rows, vocab]`, f32.
    pub(super) logits: u64,
    pub(super) splits: usize,
    pub(super) partial: u64,
    pub(super) statistics: u64,
    pub(super) finished: u64,
    pub(super) best_values: u64,
    pub(super) best_indices: u64,
    _kept: Vec<Buffer>,
}

impl Scratch {
    /// Scratch for so many rows, whose caches attention splits into at most `splits` parts.
    pub(super) fn new(
        weights: &Weights,
        rows: usize,
        splits: usize,
        like: &Buffer,
    ) -> Result<Self, DriverError> {
        let text = &weights.text;
        let card = card(weights.device);
        let most = |of: fn(&FragmentMatmul, &Device) -> usize| {
            let all = weights.matmuls(rows).map(|one| of(&one, &card));
            all.max().unwrap_or(0)
        };
        let sums = most(|one, card| one.partial(card));
        let counters = most(|one, _| one.counters());
        let squares = match weights.is_quantised() {
            true => rows * text.hidden_size / 16,
            false => 0,
        };
        let (heads, kv_heads) = (text.num_attention_heads, text.num_key_value_heads);
        let head_dim = text.head_dim;
        let mut addresses = Addresses::new(&like.client);
        let a = &mut addresses;
        let half =
            |a: &mut Addresses<'_>, width: usize| a.of(empty(like, [rows * width], DType::BF16));
        let single = |a: &mut Addresses<'_>, count: usize| a.of(empty(like, [count], DType::F32));
        let ints = |a: &mut Addresses<'_>, count: usize| {
            let zeros = Tensor::<Backend, 1, Int>::zeros([count], (&like.device, DType::I32));
            a.of(zeros.into_primitive())
        };
        Ok(Self {
            x: [half(a, text.hidden_size)?, half(a, text.hidden_size)?],
            normed: half(a, text.hidden_size)?,
            qkv: half(a, (heads + 2 * kv_heads) * head_dim)?,
            queries: half(a, heads * head_dim)?,
            attended: half(a, heads * head_dim)?,
            swiglu: half(a, text.intermediate_size)?,
            low: single(a, rows * ADAPTER_SHARES * ADAPTER_RANK)?,
            squares: single(a, squares.max(1))?,
            sums: single(a, sums.max(1))?,
            counters: ints(a, counters.max(1))?,
            logits: single(a, rows * text.vocab_size)?,
            splits,
            partial: single(a, rows * heads * splits * head_dim)?,
            statistics: single(a, rows * heads * splits * 2)?,
            finished: ints(a, rows * kv_heads)?,
            best_values: single(a, rows * SHARES)?,
            best_indices: ints(a, rows * SHARES)?,
            _kept: addresses.kept(),
        })
    }
}
