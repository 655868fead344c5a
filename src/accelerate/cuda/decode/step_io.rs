//! What a decode step reads and writes besides weights: control words of its rows, caches, results.

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
    /// Steps done; the kernels count them.
    #[expect(dead_code, reason = "only the kernels read and write it")]
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

    pub(super) fn field(&self, field: Field) -> u64 {
        self.control + (field as usize * CONTROL_ROWS * size_of::<u32>()) as u64
    }
}

/// 32-bit words of a mask of tokens.
pub(super) fn mask_words(vocab: usize) -> usize {
    vocab.div_ceil(32)
}
