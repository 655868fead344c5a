//! The launches of one decode step, in order, with all their pointers.

mod matmuls;

use super::{
    super::launch::{Kernel, float_bits},
    module::{DriverError, load, load_all},
    step_io::{Ending, Field, LayerCache, StepIo, mask_words},
    stream::Step,
    weights::{LAYER_MATRICES, LayerWeights, Matrix, SHARES, Scratch, Weights},
};
use crate::{
    ops::quantised::Quantization,
    qwen3_vl::{
        config::TextConfig,
        layer::{Executor, Projection, StreamNorm, decoder_layers},
    },
};

use matmuls::Matmul;

const SCALAR: &str = include_str!("../scalar.cuh");
const ADAPTER: &str = include_str!("adapter.cuh");
const OVERLAP: &str = include_str!("overlap.cuh");
const EMBED: &[&str] = &[SCALAR, OVERLAP, include_str!("../fragments/embed.cu")];
const STEP: &[&str] = &[SCALAR, ADAPTER, OVERLAP, include_str!("step.cu")];
const SAMPLE: &[&str] = &[
    SCALAR,
    OVERLAP,
    include_str!("control.cuh"),
    include_str!("sample.cu"),
];
const ATTENTION: &[&str] = &[
    include_str!("../common.cuh"),
    include_str!("../attention_common.cuh"),
    OVERLAP,
    include_str!("../attention_decode.cu"),
];

/// A launch whose kernel is not loaded yet.
struct Launch {
    kernel: Kernel,
    /// Whether it may begin before the previous one has ended.
    early: bool,
    grid: [usize; 3],
    pointers: Vec<u64>,
    parameters: Vec<u64>,
}

/// The launches of a step.
pub(super) struct Builder<'a> {
    weights: &'a Weights,
    scratch: &'a Scratch,
    io: StepIo<'a>,
    /// Whether kernels let the next one begin early; it gains nothing with a batch of 16-bit weights.
    overlaps: bool,
    launches: Vec<Launch>,
    /// The current layer, and its index.
    layer: (&'a LayerWeights, usize),
    /// The buffer that the next residual sum is written to.
    free: u64,
}

impl Builder<'_> {
    /// A kernel that waits for what it reads, see `overlap.cuh`.
    fn push_early(
        &mut self,
        kernel: Kernel,
        grid: [usize; 3],
        pointers: Vec<u64>,
        parameters: Vec<u64>,
    ) {
        self.push(kernel, grid, pointers, parameters);
        if let Some(launch) = self.launches.last_mut() {
            launch.early = self.overlaps;
        }
    }

    fn push(&mut self, kernel: Kernel, grid: [usize; 3], pointers: Vec<u64>, parameters: Vec<u64>) {
        let kernel = if self.overlaps {
            kernel.with_define("OVERLAP", 1)
        } else {
            kernel
        };
        self.launches.push(Launch {
            kernel,
            early: false,
            grid,
            pointers,
            parameters,
        });
    }

    pub(super) fn kernels(&self) -> impl Iterator<Item = &Kernel> {
        self.launches.iter().map(|launch| &launch.kernel)
    }

    /// The launches with their kernels, which are compiled in parallel where they are not cached: they
    /// take seconds.
    fn loaded(self) -> Result<Vec<Step>, DriverError> {
        let (device, arch) = (self.weights.device, &self.weights.arch);
        load_all(self.kernels(), device, arch)?;
        let steps = self.launches.into_iter().map(|launch| {
            Ok(Step {
                function: load(&launch.kernel, device, arch)?,
                early: launch.early,
                grid: launch.grid.map(|size| size as u32),
                maps: Vec::new(),
                pointers: launch.pointers,
                parameters: launch.parameters,
            })
        });
        steps.collect()
    }

    /// The token vectors of the rows.
    fn embed(&mut self, x: u64) {
        let (weights, scratch, io) = (self.weights, self.scratch, self.io);
        let (table, token) = (weights.table, io.field(Field::Token));
        let (hidden, grid) = (weights.text.hidden_size, [io.rows, 1, 1]);
        let Some((scales, arranged)) = table.quantised else {
            let pointers = vec![table.address, token, x];
            let parameters = small(hidden, [0; 2], [0; 3], 0.0, 0);
            self.small("EMBED", 256, grid, pointers, parameters);
            return;
        };
        let defines = vec![("SCALAR_BF16", 1), ("FRAGMENTS", i64::from(arranged))];
        let kernel = Kernel::new("embed", EMBED, defines, 256);
        let (norm, _) = self.layer.0.input_norm;
        let pointers = vec![
            table.address,
            scales,
            token,
            x,
            norm,
            scratch.normed,
            scratch.squares,
        ];
        self.push_early(kernel, grid, pointers, vec![hidden as u64]);
    }

    fn small(
        &mut self,
        variant: &'static str,
        threads: u32,
        grid: [usize; 3],
        pointers: Vec<u64>,
        parameters: Vec<u64>,
    ) {
        let defines = vec![
            (variant, 1),
            ("SCALAR_BF16", 1),
            ("HEAD_DIM", self.weights.text.head_dim as i64),
            ("PAGE", self.page()),
            ("CACHE_INT8", i64::from(self.cache().scales.is_some())),
        ];
        let kernel = Kernel::new(variant, STEP, defines, threads);
        self.push_early(kernel, grid, pointers, parameters);
    }

    fn page(&self) -> i64 {
        self.io.pages.map_or(0, |pages| pages.tokens as i64)
    }

    /// Addresses of the rows' page tables; none without pages.
    fn tables(&self) -> Vec<u64> {
        self.io.pages.map_or(Vec::new(), |pages| {
            vec![self.io.field(Field::Table), pages.tables]
        })
    }

    fn cache(&self) -> LayerCache {
        self.io.cache[self.layer.1]
    }

    /// Head norms, rotation, and keys and values into the cache.
    fn rotate_into_cache(&mut self) {
        let (layer, cache) = (self.layer.0, self.cache());
        let text = &self.weights.text;
        let (heads, kv_heads) = (text.num_attention_heads, text.num_key_value_heads);
        let rows = self.io.rows;
        let width = self.io.pages.map_or(0, |pages| pages.width);
        let [position, end] = [Field::Position, Field::End].map(|field| self.io.field(field));
        let (q_norm, epsilon) = layer.q_norm;
        let scratch = self.scratch;
        let pointers = [
            scratch.qkv,
            q_norm,
            layer.k_norm,
            self.weights.frequencies,
            position,
            end,
        ]
        .into_iter()
        .chain(self.tables())
        .chain([scratch.queries, cache.keys, cache.values])
        .chain(cache.scales.into_iter().flatten())
        .collect();
        let grid = [(heads + 2 * kv_heads).div_ceil(4), rows, 1];
        let parameters = small(0, [heads, kv_heads], cache.key_strides, epsilon, width);
        self.small("HEADS", 128, grid, pointers, parameters);
    }

    /// Attention over the cache.
    fn attend_to_cache(&mut self) {
        let cache = self.cache();
        let text = &self.weights.text;
        let (heads, kv_heads) = (text.num_attention_heads, text.num_key_value_heads);
        let (head_dim, rows) = (text.head_dim, self.io.rows);
        let width = self.io.pages.map_or(0, |pages| pages.width);
        let [end, first] = [Field::End, Field::First].map(|field| self.io.field(field));
        let scratch = self.scratch;
        let defines = vec![
            ("HEAD_DIM", head_dim as i64),
            ("GROUP", (heads / kv_heads) as i64),
            ("PART", 0),
            ("PAGE", self.page()),
            ("CACHE_INT8", i64::from(cache.scales.is_some())),
        ];
        let kernel =
            Kernel::new("attention_decode", ATTENTION, defines, 128).with_entry_macro("ATTN_NAME");
        let mut parameters = vec![(heads * head_dim) as u64, head_dim as u64];
        parameters.extend(cache.key_strides);
        parameters.extend(cache.value_strides);
        parameters.extend([kv_heads, cache.capacity, scratch.splits].map(|size| size as u64));
        parameters.push(float_bits((head_dim as f64).powf(-0.5)));
        if width > 0 {
            parameters.push(width as u64);
        }
        let pointers = [scratch.queries, cache.keys, cache.values]
            .into_iter()
            .chain(cache.scales.into_iter().flatten())
            .chain([scratch.attended, first, end])
            .chain(self.tables())
            .chain([scratch.partial, scratch.statistics, scratch.finished])
            .collect();
        self.push(
            kernel,
            [scratch.splits, kv_heads, rows],
            pointers,
            parameters,
        );
    }

    /// The next token of each row.
    fn choose(&mut self) {
        let vocab = self.weights.text.vocab_size;
        let (io, scratch) = (self.io, self.scratch);
        let (feedback, slots) = match io.ending {
            Ending::Host => (None, 0),
            Ending::Feedback { uniforms, slots } => (Some(uniforms), slots),
        };
        let parameters: Vec<u64> = [vocab, SHARES, mask_words(vocab), slots]
            .map(|size| size as u64)
            .to_vec();
        let defines = vec![("PICK", 1), ("SCALAR_BF16", 1)];
        self.push_early(
            Kernel::new("PICK", SAMPLE, defines, 256),
            [SHARES, io.rows, 1],
            vec![scratch.logits, scratch.best_values, scratch.best_indices],
            parameters.clone(),
        );
        let defines = vec![
            ("CHOOSE", 1),
            ("FEED", i64::from(feedback.is_some())),
            ("SCALAR_BF16", 1),
        ];
        let pointers = [
            scratch.logits,
            scratch.best_values,
            scratch.best_indices,
            io.control,
            io.seen,
        ]
        .into_iter()
        .chain(feedback)
        .chain([io.results])
        .collect();
        let kernel = Kernel::new("CHOOSE", SAMPLE, defines, 1024);
        self.push_early(kernel, [io.rows, 1, 1], pointers, parameters);
    }
}

/// Parameters of the kernels in `step.cu`.
fn small(
    width: usize,
    [heads, kv_heads]: [usize; 2],
    strides: [u64; 3],
    epsilon: f64,
    table_width: usize,
) -> Vec<u64> {
    vec![
        width as u64,
        heads as u64,
        kv_heads as u64,
        strides[0],
        strides[1],
        strides[2],
        float_bits(epsilon),
        table_width as u64,
    ]
}

/// All launches of a step.
pub(super) fn step(
    weights: &Weights,
    scratch: &Scratch,
    io: StepIo<'_>,
) -> Result<Vec<Step>, DriverError> {
    launches(weights, scratch, io).loaded()
}

/// The kernels of a step of so many rows over a contiguous cache.
pub(super) fn kernels(
    text: &TextConfig,
    quantization: Option<Quantization>,
    device: usize,
    rows: usize,
) -> Vec<Kernel> {
    let weights = Weights::nowhere(text, quantization, device);
    let cache = [LayerCache::default()];
    let io = StepIo::of_batch(rows, &cache);
    launches(&weights, &Scratch::default(), io)
        .kernels()
        .cloned()
        .collect()
}

pub(super) fn launches<'a>(
    weights: &'a Weights,
    scratch: &'a Scratch,
    io: StepIo<'a>,
) -> Builder<'a> {
    let text = &weights.text;
    let hidden = text.hidden_size;
    let [x, free] = scratch.x;
    let mut build = Builder {
        weights,
        scratch,
        io,
        overlaps: weights.begins_early && (weights.is_quantised() || (io.gemv && io.rows == 1)),
        launches: Vec::new(),
        layer: (&weights.layers[0], 0),
        free,
    };
    let b = &mut build;
    b.embed(x);
    let x = decoder_layers(b, 0..weights.layers.len(), x);
    let matmul = Matmul {
        norm: Some(weights.norm),
        out_f32: true,
        matrix: weights.layers.len() * LAYER_MATRICES,
        ..Matmul::default()
    };
    b.matmul(x, hidden, &[weights.head], scratch.logits, matmul);
    b.choose();
    build
}

/// The residual stream and the norm that the next matmul applies, fused or as a kernel before it.
pub(super) struct Normed {
    x: u64,
    norm: (u64, f64),
}

/// Values are device addresses; where a value has a scratch buffer of its own, it is `()`.
impl Executor for Builder<'_> {
    type Hidden = u64;
    type Normed = Normed;
    type Projected = ();
    type Rotated = ();
    type Attended = ();
    type Activated = ();

    fn enter(&mut self, layer: usize) {
        self.layer = (&self.weights.layers[layer], layer);
    }

    fn norm(&mut self, norm: StreamNorm, x: &u64) -> Normed {
        let norm = match norm {
            StreamNorm::Input => self.layer.0.input_norm,
            StreamNorm::PostAttention => self.layer.0.post_norm,
        };
        Normed { x: *x, norm }
    }

    fn project_heads(&mut self, h: Normed) {
        let qkv = self.layer.0.matrices::<3>(Projection::Query);
        self.normed_matmul(h, qkv, self.scratch.qkv, false);
    }

    fn rotate(&mut self, (): ()) {
        self.rotate_into_cache();
    }

    fn attend(&mut self, (): ()) {
        self.attend_to_cache();
    }

    fn project_attended(&mut self, (): (), residual: u64) -> u64 {
        let text = &self.weights.text;
        let width = text.num_attention_heads * text.head_dim;
        self.residual_matmul(self.scratch.attended, width, Projection::Output, residual)
    }

    fn swiglu(&mut self, h: Normed) {
        let gate_up = self.layer.0.matrices::<2>(Projection::Gate);
        self.normed_matmul(h, gate_up, self.scratch.swiglu, true);
    }

    fn project_down(&mut self, (): (), residual: u64) -> u64 {
        let width = self.weights.text.intermediate_size;
        self.residual_matmul(self.scratch.swiglu, width, Projection::Down, residual)
    }
}

impl Builder<'_> {
    fn normed_matmul<const N: usize>(
        &mut self,
        h: Normed,
        (matrices, place): ([Matrix; N], usize),
        y: u64,
        gate: bool,
    ) {
        let matmul = Matmul {
            norm: Some(h.norm),
            gate,
            matrix: self.layer.1 * LAYER_MATRICES + place,
            ..Matmul::default()
        };
        self.matmul(h.x, self.weights.text.hidden_size, &matrices, y, matmul);
    }

    /// Writes to the free one of the two residual-stream buffers; the residual's is free afterwards.
    fn residual_matmul(
        &mut self,
        x: u64,
        width: usize,
        projection: Projection,
        residual: u64,
    ) -> u64 {
        let ([matrix], place) = self.layer.0.matrices::<1>(projection);
        let norm = match projection {
            Projection::Down => self.weights.norm_after(self.layer.1),
            _ => self.layer.0.post_norm,
        };
        let matmul = Matmul {
            residual: Some(residual),
            next: Some(norm.0),
            matrix: self.layer.1 * LAYER_MATRICES + place,
            ..Matmul::default()
        };
        let y = std::mem::replace(&mut self.free, residual);
        self.matmul(x, width, &[matrix], y, matmul);
        y
    }
}
