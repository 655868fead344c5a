//! A tensor as a checkpoint stores it: floats of a file, or numbers that are dequantised row by row.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use burn::tensor::DType;
use safetensors::Dtype;

use super::{TensorFile, WeightsError};
use crate::ops::quantised::Format;

/// A tensor of a checkpoint.
pub(super) struct Stored {
    /// Its file, for messages.
    pub(super) path: PathBuf,
    /// Shape of the floats.
    pub(super) shape: Vec<usize>,
    /// Place of its bytes: file and offset, the order of reading.
    pub(super) place: (usize, usize),
    /// Where the elements come from.
    pub(super) source: Source,
}

/// Where the elements of a tensor come from.
pub(super) enum Source {
    /// Floats in the file under this key.
    Plain(Arc<TensorFile>, String),
    /// Dequantised, row by row.
    Decoded(Box<dyn Decode>),
}

/// A tensor as a file holds it, before it is known what it belongs to.
pub(super) struct RawTensor {
    /// Its file.
    pub(super) file: Arc<TensorFile>,
    /// Number of the file.
    pub(super) number: usize,
    /// Key in the file.
    pub(super) key: String,
}

/// All tensors of the files, by their name in the module tree.
pub(super) type RawTensors = BTreeMap<String, RawTensor>;

impl RawTensor {
    /// Type, shape and bytes in the file.
    pub(super) fn stored(&self) -> Result<(Dtype, &[usize], &[u8]), WeightsError> {
        let entry = self.file.entry(&self.key)?;
        if entry.strides.is_some() {
            return Err(WeightsError::PyTorch {
                path: self.file.path.clone(),
                reason: format!(
                    "tensor `{}` of quantised weights is stored as a view with its elements in another order; save the checkpoint in safetensors form",
                    self.key
                ),
            });
        }
        Ok((
            entry.dtype,
            &entry.shape,
            &self.file.map[entry.bytes.clone()],
        ))
    }
}

/// Gives the floats of a matrix.
pub(super) trait Decode: Send + Sync {
    /// Writes whole rows from `first` on, as many as `out` holds.
    fn rows(&self, first: usize, out: &mut [f32]);

    /// Type of the floats in the file, where they are stored as floats.
    fn dtype(&self) -> Option<DType> {
        None
    }

    /// Whether `format` holds whole numbers and scales as they are stored.
    fn keeps(&self, _format: Format) -> bool {
        false
    }

    /// The stored numbers of a row, each plus the offset of `format` where that is symmetric, the scale of
    /// each of its groups and, where the format has them, their zero points. Called where [`Decode::keeps`]
    /// is true.
    fn levels(&self, _row: usize, _format: Format, _levels: &mut [u32], _groups: Groups<'_>) {}
}

/// What the groups of a row have, to be written.
pub(super) struct Groups<'a> {
    /// Scales.
    pub(super) scales: &'a mut [f32],
    /// Zero points; empty where the format is symmetric.
    pub(super) zeros: &'a mut [f32],
}

impl Groups<'_> {
    /// Fills both from the first column of each group of `format`, in rows of `columns`.
    pub(super) fn fill(
        self,
        format: Format,
        columns: usize,
        scale: impl Fn(usize) -> f32,
        zero: impl Fn(usize) -> f32,
    ) {
        let group = format.group(columns);
        for (at, out) in self.scales.iter_mut().enumerate() {
            *out = scale(at * group);
        }
        for (at, out) in self.zeros.iter_mut().enumerate() {
            *out = zero(at * group);
        }
    }
}

/// Whether groups of `own` columns that share a scale are whole groups of `format`, in rows of `columns`.
pub(super) fn groups_fit(own: usize, columns: usize, format: Format) -> bool {
    own == columns || own.is_multiple_of(format.group(columns))
}

/// Length of a row as [`Decode`] counts: all but the first dimension; of a vector, all of it.
pub(super) fn columns(shape: &[usize]) -> usize {
    match shape {
        [_, rest @ ..] if !rest.is_empty() => rest.iter().product::<usize>().max(1),
        _ => shape.iter().product::<usize>().max(1),
    }
}
