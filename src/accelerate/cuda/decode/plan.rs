//! The launches of one decode step, in order, with all their pointers.

use burn::tensor::DType;

use super::{
    super::{
        fragments::{FragmentLaunch, FragmentMatmul, Fused},
        launch::{Defines, Kernel, float_bits},
        plan::card,
        rows,
    },
    module::{DriverError, load, load_all},
    stream::Step,
    weights::{LAYER_MATRICES, LayerWeights, Matrix, SHARES, Scratch, Weights},
};
use crate::qwen3_vl::{
    config::TextConfig,
    layer::{Executor, Projection, StreamNorm, decoder_layers},
};

const SCALAR: &str = include_str!("../scalar.cuh");
const ADAPTER: &str = include_str!("adapter.cuh");
const OVERLAP: &str = include_str!("overlap.cuh");
const GEMV: &[&str] = &[SCALAR, OVERLAP, include_str!("gemv.cu")];
const SKINNY: &[&str] = &[SCALAR, ADAPTER, include_str!("skinny.cu")];
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

/// Rows of the control words; `CONTROL_ROWS` of `control.cuh`.
pub(super) const CONTROL_ROWS: usize = 64;

/// The control words of a row, in the order of `control.cuh`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Field {
    Token,
    Position,
    End,
    First,
    Table,
    Adapter,
    TopK,
    Temperature,
    TopP,
    MinP,
    Penalty,
    Uniform,
    Step,
    Mask,
}

/// Control words of all rows.
pub(super) const CONTROL_WORDS: usize = (Field::Mask as usize + 1) * CONTROL_ROWS;

/// The keys and values of one layer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LayerCache {
    pub keys: u64,
    pub values: u64,
    /// Of a sequence (or a page), a head and a token, in elements.
    pub key_strides: [u64; 3],
    pub value_strides: [u64; 3],
    /// Of a quantised cache: scales of keys and of values, one for each row.
    pub scales: Option<[u64; 2]>,
    /// Tokens a sequence may hold.
    pub capacity: usize,
}

/// Page tables, where the cache is paged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pages {
    /// Tokens of a page.
    pub tokens: usize,
    /// `[tables, width]`.
    pub tables: u64,
    pub width: usize,
}

/// Where the sampled tokens go.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ending {
    /// To the host only.
    Host,
    /// Into the next step's input as well; the host reads them from a ring of `slots` steps.
    Feedback { uniforms: u64, slots: usize },
}

/// A step's inputs and outputs besides weights and scratch: cache, control words, results.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepIo<'a> {
    /// Rows of the batch, one token each.
    pub rows: usize,
    /// Key/value cache, one entry a layer.
    pub cache: &'a [LayerCache],
    /// Page tables of a paged cache.
    pub pages: Option<Pages>,
    /// Address of the control words.
    pub control: u64,
    /// Address of the masks of tokens seen (repetition penalty), which a control word of a row numbers.
    pub seen: u64,
    /// Address of the adapter table, where rows may have an adapter.
    pub adapters: Option<u64>,
    /// Address of the sampled tokens.
    pub results: u64,
    /// Whether the tokens are fed back into the next step.
    pub ending: Ending,
    /// Whether a single row uses the matrix-vector kernel (`gemv.cu`): 6 % faster, and not bit for bit
    /// the same as in a batch.
    pub gemv: bool,
}

impl<'a> StepIo<'a> {
    /// For a batch after a prefilled cache; the addresses are zero until the caller sets them.
    pub(super) fn of_batch(rows: usize, cache: &'a [LayerCache]) -> Self {
        Self {
            rows,
            cache,
            pages: None,
            control: 0,
            seen: 0,
            adapters: None,
            results: 0,
            ending: Ending::Feedback {
                uniforms: 0,
                slots: 0,
            },
            gemv: true,
        }
    }

    fn field(&self, field: Field) -> u64 {
        self.control + (field as usize * CONTROL_ROWS * size_of::<u32>()) as u64
    }
}

/// 32-bit words of a mask of tokens.
pub(super) fn mask_words(vocab: usize) -> usize {
    vocab.div_ceil(32)
}

/// Options of a matmul: what is fused before and after it.
#[derive(Default, Clone, Copy)]
struct Matmul {
    norm: Option<(u64, f64)>,
    gate: bool,
    residual: Option<u64>,
    /// Weight of the norm that is applied to the result.
    next: Option<u64>,
    out_f32: bool,
    /// Index of its first matrix among those that may have an adapter.
    matrix: usize,
}

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

    /// `y = x [W…]ᵀ`, `x` `[rows, k]`.
    fn matmul(&mut self, x: u64, k: usize, matrices: &[Matrix], y: u64, matmul: Matmul) {
        if let Some(of) = FragmentMatmul::of(matrices, k, matmul.gate, self.io.rows) {
            self.quantised_matmul(x, matrices, y, matmul, of);
            return;
        }
        let mut defines: Defines = vec![
            ("SCALAR_BF16", 1),
            ("WEIGHTS", matrices.len() as i64),
            ("GATE", i64::from(matmul.gate)),
            ("RESIDUAL", i64::from(matmul.residual.is_some())),
            ("OUT_F32", i64::from(matmul.out_f32)),
        ];
        let rows_of = |at: usize| matrices.get(at).map_or(0, |matrix| matrix.rows as u64);
        let count: usize = if matmul.gate {
            matrices[0].rows
        } else {
            matrices.iter().map(|matrix| matrix.rows).sum()
        };
        let addresses = matrices.iter().map(|matrix| matrix.address);
        let mut parameters = vec![k as u64, rows_of(0), rows_of(1), rows_of(2)];
        let rows = self.io.rows;
        if self.io.gemv && rows == 1 {
            defines.push(("NORM", i64::from(matmul.norm.is_some())));
            let pointers = [x]
                .into_iter()
                .chain(matmul.norm.map(|norm| norm.0))
                .chain(addresses)
                .chain(matmul.residual)
                .chain([y])
                .collect();
            parameters.push(float_bits(matmul.norm.map_or(0.0, |norm| norm.1)));
            let kernel = Kernel::new("gemv", GEMV, defines, 256);
            let a_block = if matmul.gate { 2 } else { 4 };
            let grid = [count.div_ceil(a_block), 1, 1];
            self.push_early(kernel, grid, pointers, parameters);
            return;
        }
        let mut input = x;
        if let Some((weight, epsilon)) = matmul.norm {
            input = self.scratch.normed;
            self.push(
                rows::kernel("rms_norm", "NORM_RMS", k, DType::BF16),
                [rows, 1, 1],
                vec![x, weight, input],
                vec![rows as u64, float_bits(epsilon)],
            );
        }
        let mut adapter = Vec::new();
        parameters.push(rows as u64);
        if let Some(table) = self.io.adapters {
            let place = self.adapter_place(matmul);
            parameters.extend(place.map(|place| place as u64));
            adapter = self.shrink(input, k, matrices.len(), table, place, None);
        }
        defines.push(("ADAPTERS", i64::from(!adapter.is_empty())));
        defines.push(("TILES", rows.div_ceil(8) as i64));
        // A sum's order depends on the warps: they are chosen by the matrix, never by the batch.
        let few = !matmul.gate && count / 16 <= 2 * self.weights.processors;
        let warps = if few { 8 } else { 4 };
        defines.push(("BLOCK_WARPS", warps));
        defines.push(("WHOLE", i64::from(k.is_multiple_of(128))));
        let pointers = [input]
            .into_iter()
            .chain(addresses)
            .chain(matmul.residual)
            .chain(adapter)
            .chain([y])
            .collect();
        let kernel = Kernel::new("skinny", SKINNY, defines, 32 * warps as u32);
        self.push(kernel, [count / 16, 1, 1], pointers, parameters);
    }

    /// [`Builder::matmul`] with quantised matrices: the norm before it is part of it, and the one after it of the
    /// result's epilogue (`fragments.cuh`).
    fn quantised_matmul(
        &mut self,
        x: u64,
        matrices: &[Matrix],
        y: u64,
        matmul: Matmul,
        of: FragmentMatmul,
    ) {
        let scratch = self.scratch;
        let fused = Fused {
            norm: matmul.norm.is_some(),
            next: matmul.next.is_some(),
            bias: false,
            residual: matmul.residual.is_some(),
            out_f32: matmul.out_f32,
            adapters: self.io.adapters.is_some(),
        };
        let input = if fused.norm { scratch.normed } else { x };
        let squares = fused.norm.then_some(scratch.squares);
        let epsilon = matmul.norm.map_or(0.0, |(_, epsilon)| epsilon);
        let mut adapter = Vec::new();
        let place = self.adapter_place(matmul);
        if let Some(table) = self.io.adapters {
            let norm = squares.map(|squares| (squares, epsilon));
            adapter = self.shrink(input, of.k, matrices.len(), table, place, norm);
        }
        let FragmentLaunch {
            kernel,
            grid,
            splits,
        } = of.launch(fused, &card(self.weights.device));
        let matrices = matrices.iter().flat_map(|matrix| {
            let scales = matrix.quantised.map(|(scales, _)| scales);
            [matrix.address].into_iter().chain(scales)
        });
        let exchanged = splits.then_some([scratch.sums, scratch.counters]);
        let next = matmul
            .next
            .map(|weight| [weight, scratch.normed, scratch.squares]);
        let pointers = [input]
            .into_iter()
            .chain(matrices)
            .chain(squares)
            .chain(matmul.residual)
            .chain(adapter)
            .chain(exchanged.into_iter().flatten())
            .chain([y])
            .chain(next.into_iter().flatten())
            .collect();
        let parameters = of.parameters(epsilon, fused.adapters.then_some(place));
        self.push_early(kernel, grid, pointers, parameters);
    }

    /// Number of matrices of a table of adapters, and the index of a matmul's first.
    fn adapter_place(&self, matmul: Matmul) -> [usize; 2] {
        [self.weights.matrices(), matmul.matrix]
    }

    /// `x Aᵀ` of each row's adapter for the matmuls of one input, with the factor of a norm where one is applied to `x`.
    /// Returns what a matmul's epilogue reads.
    fn shrink(
        &mut self,
        x: u64,
        k: usize,
        matmuls: usize,
        table: u64,
        place: [usize; 2],
        norm: Option<(u64, f64)>,
    ) -> Vec<u64> {
        let adapter_of = self.io.field(Field::Adapter);
        let low = self.scratch.low;
        let epsilon = norm.map_or(0.0, |(_, epsilon)| epsilon);
        let mut parameters = small(k, [0; 2], [0; 3], epsilon, 0);
        parameters.extend(place.map(|place| place as u64));
        let pointers = [x, table, adapter_of]
            .into_iter()
            .chain(norm.map(|(squares, _)| squares))
            .chain([low])
            .collect();
        let defines = vec![
            ("SHRINK", 1),
            ("SCALAR_BF16", 1),
            ("NORMED", i64::from(norm.is_some())),
        ];
        let kernel = Kernel::new("SHRINK", STEP, defines, 256);
        let grid = [4, matmuls, self.io.rows];
        self.push_early(kernel, grid, pointers, parameters);
        vec![table, adapter_of, low]
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
pub(super) fn kernels(text: &TextConfig, device: usize, rows: usize) -> Vec<Kernel> {
    let weights = Weights::nowhere(text, device);
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
