//! A checkpoint of any form as tensors of floats under the names of the module tree.
//!
//! Forms are safetensors and PyTorch's files (`pytorch`), one file or shards, with floats or published quantised weights
//! (`forms`), and llama.cpp's GGUF (`gguf`). Quantised tensors are dequantised
//! piece by piece while they are read; only headers are in memory before.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::tensor::DType;
use rayon::prelude::*;
use safetensors::Dtype;

use crate::ops::quantised::{Format, GROUPS, pack::QuantisedMatrix};

use super::{
    HEAD, TensorFile, WeightsError, checkpoint_files,
    convert::{Problem, convert},
    forms::{self, Scheme},
    gguf::{self, GgufParts},
    keys::canonical,
    stored::{Decode, Groups, RawTensor, RawTensors, Source, Stored, columns},
};

/// Rows of a quantised matrix that one core dequantises at once.
const ROWS: usize = 64;

/// An open checkpoint.
pub struct Checkpoint {
    path: PathBuf,
    tensors: BTreeMap<String, Stored>,
    remarks: Vec<String>,
}

impl Checkpoint {
    /// Opens the checkpoint in a folder, or the GGUF file `model`.
    ///
    /// # Errors
    /// [`WeightsError`] names the file, and the key or the tensor.
    pub fn open(model: &Path) -> Result<Self, WeightsError> {
        Self::open_with(model, &GgufParts::default())
    }

    /// [`Self::open`], with the other files of a GGUF named.
    ///
    /// # Errors
    /// [`WeightsError`] names the file, and the key or the tensor.
    pub fn open_with(model: &Path, parts: &GgufParts) -> Result<Self, WeightsError> {
        if let Some(pair) = gguf::find(model, parts)? {
            let (tensors, remarks) = gguf::tensors(&pair)?;
            return Ok(Self {
                path: model.to_path_buf(),
                tensors,
                remarks,
            });
        }
        let mut raw = RawTensors::new();
        let mut renamed = (0, None);
        for (number, path) in checkpoint_files(model)?.iter().enumerate() {
            let file = Arc::new(TensorFile::open(path)?);
            for key in file.entries.keys() {
                let name = canonical(key).into_owned();
                if name != *key {
                    renamed.0 += 1;
                    renamed.1.get_or_insert_with(|| (key.clone(), name.clone()));
                }
                let tensor = RawTensor {
                    file: file.clone(),
                    number,
                    key: key.clone(),
                };
                match raw.get(&name) {
                    // The same name in a second file counts for nothing.
                    Some(other) if other.key == *key => {}
                    Some(other) => {
                        return Err(WeightsError::SameTensor {
                            path: model.to_path_buf(),
                            first: other.key.clone(),
                            second: key.clone(),
                            name,
                        });
                    }
                    None => {
                        raw.insert(name, tensor);
                    }
                }
            }
        }
        let mut remarks = Vec::new();
        if let (count, Some((old, new))) = renamed {
            remarks.push(format!(
                "{count} keys of the checkpoint are names of older releases, read as transformers does: `{old}` is `{new}`"
            ));
        }
        let mut tensors = BTreeMap::new();
        if let Some(scheme) = forms::read(model)? {
            tensors = scheme.tensors(model, &mut raw, &mut remarks)?;
        }
        for (name, tensor) in raw {
            let entry = tensor.file.entry(&tensor.key)?;
            let stored = Stored {
                path: tensor.file.path().to_path_buf(),
                shape: entry.shape.clone(),
                place: (tensor.number, entry.bytes.start),
                source: Source::Plain(tensor.file.clone(), tensor.key),
            };
            tensors.insert(name, stored);
        }
        Ok(Self {
            path: model.to_path_buf(),
            tensors,
            remarks,
        })
    }

    /// Folder or file it was opened as.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What a reader of the results should know about how the weights were read.
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names and shapes in the order of the bytes.
    pub fn in_order(&self) -> Vec<(&str, &[usize])> {
        let mut all: Vec<_> = self.tensors.iter().collect();
        all.sort_by_key(|(_, stored)| stored.place);
        all.into_iter()
            .map(|(name, stored)| (name.as_str(), stored.shape.as_slice()))
            .collect()
    }

    /// The file that holds most of a tensor, for messages.
    pub fn file_of(&self, name: &str) -> &Path {
        self.tensors
            .get(name)
            .map_or(&self.path, |stored| &stored.path)
    }

    /// Type of a tensor's floats in the file; `None` if it is dequantised.
    pub fn stored_dtype(&self, name: &str) -> Option<DType> {
        match &self.tensors.get(name)?.source {
            Source::Plain(file, key) => match file.entry(key).ok()?.dtype {
                Dtype::BF16 => Some(DType::BF16),
                Dtype::F16 => Some(DType::F16),
                Dtype::F32 => Some(DType::F32),
                _ => None,
            },
            Source::Decoded(decoder) => decoder.dtype(),
        }
    }

    /// Whether a bias of a quantised layer is all zeros: some tools write one where the layer has none.
    pub(super) fn is_empty_bias(&self, name: &str) -> bool {
        let Some(layer) = name.strip_suffix(".bias") else {
            return false;
        };
        let (Some(weight), Some(bias)) = (
            self.tensors.get(&format!("{layer}.weight")),
            self.tensors.get(name),
        ) else {
            return false;
        };
        let count: usize = bias.shape.iter().product();
        let mut bytes = vec![0; count.min(1 << 24) * 4];
        matches!(weight.source, Source::Decoded(_))
            && self.read_into(name, 0, DType::F32, &mut bytes).is_ok()
            && bytes.iter().all(|byte| *byte == 0)
    }

    /// Names and shapes of all parameters `expected` of a model, in the order of the bytes.
    ///
    /// # Errors
    /// [`WeightsError::Shape`], [`WeightsError::Missing`], [`WeightsError::Surplus`].
    pub fn of_model(
        &self,
        expected: &BTreeMap<String, Vec<usize>>,
    ) -> Result<Vec<(String, Vec<usize>)>, WeightsError> {
        let mut missing = expected.clone();
        let mut surplus = Vec::new();
        let mut found = Vec::new();
        for (name, shape) in self.in_order() {
            match expected.get(name) {
                Some(want) if want == shape => {
                    missing.remove(name);
                    found.push((name.to_string(), shape.to_vec()));
                }
                Some(want) => {
                    return Err(WeightsError::Shape {
                        path: self.file_of(name).to_path_buf(),
                        name: name.to_string(),
                        found: shape.to_vec(),
                        expected: want.clone(),
                    });
                }
                // The copy of a tied embedding; another head makes the model untied.
                None if name == HEAD || self.is_empty_bias(name) => {}
                None => surplus.push(name.to_string()),
            }
        }
        if let Some((first, _)) = missing.first_key_value() {
            return Err(WeightsError::Missing {
                path: self.path.clone(),
                count: missing.len(),
                first: first.clone(),
            });
        }
        surplus.sort();
        match surplus.first() {
            None => Ok(found),
            Some(first) => Err(WeightsError::Surplus {
                path: self.path.clone(),
                count: surplus.len(),
                first: first.clone(),
            }),
        }
    }

    /// Whether `format` holds a matrix as it is stored: its whole numbers and their scales.
    pub fn keeps(&self, name: &str, format: Format) -> bool {
        match self.tensors.get(name).map(|stored| &stored.source) {
            Some(Source::Decoded(decoder)) => decoder.keeps(format),
            _ => false,
        }
    }

    /// The format with the largest groups that holds a matrix as it is stored, symmetric where it is; `None`
    /// where no format does.
    pub fn own_format(&self, name: &str) -> Option<Format> {
        let groups = || GROUPS.into_iter().rev();
        std::iter::once(Format::Int8)
            .chain(groups().map(|group| Format::Int4 { group }))
            .chain(groups().map(|group| Format::Int4Zeros { group }))
            .find(|format| self.keeps(name, *format))
    }

    /// A matrix `[rows, d_input]` packed as it is stored, where [`Self::keeps`] says that it can be.
    ///
    /// # Errors
    /// [`WeightsError::NotFinite`] of a scale.
    pub fn kept(
        &self,
        name: &str,
        [rows, d_input]: [usize; 2],
        format: Format,
    ) -> Result<Option<QuantisedMatrix>, WeightsError> {
        let Some(stored) = self.tensors.get(name) else {
            return Ok(None);
        };
        let Source::Decoded(decoder) = &stored.source else {
            return Ok(None);
        };
        if stored.shape != [rows, d_input] || !decoder.keeps(format) {
            return Ok(None);
        }
        let matrix =
            QuantisedMatrix::from_levels(rows, d_input, format, |row, levels, scales, zeros| {
                decoder.levels(row, format, levels, Groups { scales, zeros });
            });
        match matrix.scales.iter().position(|scale| !scale.is_finite()) {
            None => Ok(Some(matrix)),
            Some(index) => Err(WeightsError::NotFinite {
                path: stored.path.clone(),
                name: format!("the scales of {name}"),
                index,
            }),
        }
    }

    /// Elements of a tensor from `first` on, as many as `out` holds, as `dtype` (f32, bf16 or f16), checked
    /// for NaN and infinity, on all cores.
    ///
    /// # Errors
    /// [`WeightsError::Missing`], [`WeightsError::Dtype`], [`WeightsError::NotFinite`],
    /// [`WeightsError::TooLarge`]; the file cannot be read.
    pub fn read_into(
        &self,
        name: &str,
        first: usize,
        dtype: DType,
        out: &mut [u8],
    ) -> Result<(), WeightsError> {
        let stored = self
            .tensors
            .get(name)
            .ok_or_else(|| WeightsError::Missing {
                path: self.path.clone(),
                count: 1,
                first: name.to_string(),
            })?;
        match &stored.source {
            Source::Plain(file, key) => file.read_into(key, first, dtype, out),
            Source::Decoded(decoder) => {
                decode_into(&stored.shape, decoder.as_ref(), first, dtype, out).map_err(|problem| {
                    let (path, name) = (stored.path.clone(), name.to_string());
                    match problem {
                        Problem::NotFinite(index) => WeightsError::NotFinite { path, name, index },
                        Problem::TooLarge(index) => WeightsError::TooLarge { path, name, index },
                        Problem::Dtype => WeightsError::Dtype {
                            path,
                            name,
                            found: format!("{dtype:?}"),
                        },
                    }
                })
            }
        }
    }
}

/// Dequantises elements from `first` on, whole rows on each core.
fn decode_into(
    shape: &[usize],
    decoder: &dyn Decode,
    first: usize,
    dtype: DType,
    out: &mut [u8],
) -> Result<(), Problem> {
    let (size, columns) = (dtype.size(), columns(shape));
    let mut pieces = Vec::new();
    let (mut rest, mut at) = (out, first);
    while !rest.is_empty() {
        let end = (at / columns / ROWS + 1) * ROWS * columns;
        let bytes = (end - at).saturating_mul(size).min(rest.len());
        let (piece, after) = rest.split_at_mut(bytes);
        pieces.push((at, piece));
        rest = after;
        at = end;
    }
    let decoded: Vec<Result<(), Problem>> = pieces
        .into_par_iter()
        .map(|(at, piece)| {
            let count = piece.len() / size;
            let (row, last) = (at / columns, (at + count).div_ceil(columns));
            let mut values = vec![0.0f32; (last - row) * columns];
            decoder.rows(row, &mut values);
            let values = &values[at - row * columns..][..count];
            if let Some(bad) = values.iter().position(|value| !value.is_finite()) {
                return Err(Problem::NotFinite(at + bad));
            }
            convert(bytemuck::cast_slice(values), Dtype::F32, dtype, piece).map_err(|problem| {
                match problem {
                    Problem::TooLarge(index) => Problem::TooLarge(at + index),
                    other => other,
                }
            })
        })
        .collect();
    decoded.into_iter().collect()
}

impl Scheme {
    /// All quantised tensors of `raw`, taken out of it.
    fn tensors(
        &self,
        model: &Path,
        raw: &mut RawTensors,
        remarks: &mut Vec<String>,
    ) -> Result<BTreeMap<String, Stored>, WeightsError> {
        let tensors = self.take(model, raw)?;
        let wide: usize = tensors
            .values()
            .map(|stored| stored.shape.iter().product::<usize>())
            .sum();
        let (name, count) = (self.name(), tensors.len());
        if count == 0 {
            remarks.push(format!(
                "`config.json` says that the weights are quantised ({name}), but the files hold floats"
            ));
        } else {
            remarks.push(format!(
                "{count} matrices are stored as {name} and dequantised while they are loaded, to {} in 16 bits (with `--quantize keep` they stay packed where that is exact){}",
                gigabytes(2 * wide as u64),
                self.note(),
            ));
        }
        Ok(tensors)
    }
}

fn gigabytes(bytes: u64) -> String {
    match bytes {
        ..100_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}
