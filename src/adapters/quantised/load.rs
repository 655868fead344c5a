//! Loads checkpoints as quantised models: quantised while loading, or on the disk already.
//!
//! One tensor is in the host's memory at a time, and the device never holds as floats a matrix
//! that is to be quantised.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use burn::{
    module::{Module, ModuleMapper, Param},
    prelude::*,
    tensor::DType,
};
use half::{bf16, f16};
use safetensors::{Dtype, tensor::TensorView};

use super::files::Part;
use crate::{
    adapters::{lora::attach::LinearMapper, quantised::format_of},
    ops::{
        Ops,
        quantised::{
            Format, QuantisedWeight, Quantization,
            pack::{QuantisedMatrix, pack},
        },
        upload::UNDERWAY_BYTES,
    },
    qwen3_vl::{
        Qwen3Vl,
        nn::Linear,
        weights::{LoadProgress, TensorFile, WeightsError, checkpoint_files, parameter_shapes},
    },
    weights::Weight,
};

/// Replaces every matrix that `quantization` covers by the result of `make` for its path, shape and format.
///
/// # Errors
/// The first error of `make`.
pub fn replace_weights<B: Ops, E>(
    model: Qwen3Vl<B>,
    quantization: Quantization,
    make: impl FnMut(&str, [usize; 2], Format) -> Result<QuantisedWeight<B>, E>,
) -> Result<Qwen3Vl<B>, E> {
    struct Replace<M, E> {
        quantization: Quantization,
        make: M,
        error: Option<E>,
    }
    impl<M, E> Replace<M, E> {
        fn replaced<B: Backend>(&mut self, layer: &str, weight: Weight<B>) -> Weight<B>
        where
            M: FnMut(&str, [usize; 2], Format) -> Result<QuantisedWeight<B>, E>,
        {
            let path = format!("{layer}.weight");
            let format = format_of(self.quantization, &path);
            let Some(format) = format.filter(|_| self.error.is_none()) else {
                return weight;
            };
            match (self.make)(&path, weight.lazy_shape().dims(), format) {
                Ok(packed) => Weight::Packed(packed),
                Err(error) => {
                    self.error = Some(error);
                    weight
                }
            }
        }
    }
    impl<B: Backend, M, E> LinearMapper<B> for Replace<M, E>
    where
        M: FnMut(&str, [usize; 2], Format) -> Result<QuantisedWeight<B>, E>,
    {
        fn map_linear(&mut self, path: &str, mut linear: Linear<B>) -> Linear<B> {
            linear.weight = self.replaced(path, linear.weight);
            linear
        }
    }
    let mut replace = Replace {
        quantization,
        make,
        error: None,
    };
    let mut model = model.map_linears(&mut replace);
    let table = &mut model.model.language_model.embed_tokens;
    table.weight = replace.replaced("model.language_model.embed_tokens", table.weight.clone());
    match replace.error {
        None => Ok(model),
        Some(error) => Err(error),
    }
}

/// What a file must hold for each parameter, and where that is.
struct Contents {
    files: Vec<PathBuf>,
    /// File of each key.
    place: BTreeMap<String, usize>,
    /// Bytes of all files.
    bytes: u64,
}

/// Compares all keys, shapes and types of a checkpoint with a model of `shapes`.
///
/// `packed` says whether the files are quantised already, or hold floats.
fn look_through(
    dir: &Path,
    shapes: &BTreeMap<String, Vec<usize>>,
    quantization: Quantization,
    packed: bool,
) -> Result<Contents, WeightsError> {
    let mut missing: BTreeMap<String, ()> = BTreeMap::new();
    for path in shapes.keys() {
        if packed && format_of(quantization, path).is_some() {
            missing.insert(Part::Words.key(path), ());
            missing.insert(Part::Scales.key(path), ());
        } else {
            missing.insert(path.clone(), ());
        }
    }
    let files = checkpoint_files(dir)?;
    let (mut place, mut surplus, mut bytes) = (BTreeMap::new(), Vec::new(), 0);
    for (number, path) in files.iter().enumerate() {
        let file = TensorFile::open(path)?;
        bytes += file.len();
        for (key, view) in file.tensors()?.iter() {
            let (part, parameter) = match Part::of_key(key).filter(|_| packed) {
                Some((part, parameter)) => (Some(part), parameter),
                None => (None, key),
            };
            if missing.remove(key).is_none() {
                // Beside a tied embedding, as in checkpoints of floats.
                if parameter != "lm_head.weight" || shapes.contains_key(parameter) {
                    surplus.push(key.to_string());
                }
                continue;
            }
            let full = &shapes[parameter];
            let format = format_of(quantization, parameter);
            let (shape, dtype) = match (part, format, full.as_slice()) {
                (Some(part), Some(format), [rows, d_input]) => (
                    part.shape([*rows, *d_input], format),
                    Some(part.dtype(format).1),
                ),
                _ => (full.clone(), None),
            };
            if view.shape() != shape {
                return Err(WeightsError::Shape {
                    path: path.clone(),
                    name: key.to_string(),
                    found: view.shape().to_vec(),
                    expected: shape,
                });
            }
            if let Some(expected) = dtype.filter(|dtype| *dtype != view.dtype()) {
                return Err(WeightsError::PackedDtype {
                    path: path.clone(),
                    name: key.to_string(),
                    found: format!("{:?}", view.dtype()),
                    expected: format!("{expected:?}"),
                });
            }
            place.insert(key.to_string(), number);
        }
    }
    if let Some((first, ())) = missing.first_key_value() {
        return Err(WeightsError::Missing {
            path: dir.to_path_buf(),
            count: missing.len(),
            first: first.clone(),
        });
    }
    surplus.sort();
    if let Some(first) = surplus.first() {
        return Err(WeightsError::Surplus {
            path: dir.to_path_buf(),
            count: surplus.len(),
            first: first.clone(),
        });
    }
    Ok(Contents {
        files,
        place,
        bytes,
    })
}

/// Checks that `dir` holds a whole checkpoint for a model of `shapes`, quantised or to be quantised.
///
/// # Errors
/// [`WeightsError`] names the file and the tensor.
pub fn check(
    dir: &Path,
    shapes: &BTreeMap<String, Vec<usize>>,
    quantization: Quantization,
    packed: bool,
) -> Result<(), WeightsError> {
    look_through(dir, shapes, quantization, packed).map(|_| ())
}

/// Quantises a tensor of floats, stored in `path` under `name`.
///
/// # Errors
/// [`WeightsError::Dtype`], [`WeightsError::NotFinite`].
pub fn pack_view(
    view: &TensorView<'_>,
    path: &Path,
    name: &str,
    format: Format,
) -> Result<QuantisedMatrix, WeightsError> {
    let [rows, d_input] = view.shape() else {
        return Err(WeightsError::Shape {
            path: path.to_path_buf(),
            name: name.to_string(),
            found: view.shape().to_vec(),
            expected: vec![0, 0],
        });
    };
    let (rows, d_input) = (*rows, *d_input);
    let element = match view.dtype() {
        Dtype::BF16 | Dtype::F16 => 2,
        Dtype::F32 => 4,
        other => {
            return Err(WeightsError::Dtype {
                path: path.to_path_buf(),
                name: name.to_string(),
                found: format!("{other:?}"),
            });
        }
    };
    let (bytes, dtype) = (view.data(), view.dtype());
    let read = |row: usize, out: &mut [f32]| {
        let bytes = &bytes[row * d_input * element..][..d_input * element];
        let pairs = bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        match dtype {
            Dtype::BF16 => pairs
                .zip(&mut *out)
                .for_each(|(b, out)| *out = bf16::from_le_bytes(b).to_f32()),
            Dtype::F16 => pairs
                .zip(&mut *out)
                .for_each(|(b, out)| *out = f16::from_le_bytes(b).to_f32()),
            _ => bytes
                .chunks_exact(4)
                .zip(&mut *out)
                .for_each(|(b, out)| *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        }
        match out.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(at) => Err(row * d_input + at),
        }
    };
    pack(rows, d_input, format, read).map_err(|index| WeightsError::NotFinite {
        path: path.to_path_buf(),
        name: name.to_string(),
        index,
    })
}

/// Words and scales as stored in files.
fn read_packed(
    words: &TensorView<'_>,
    scales: &TensorView<'_>,
    scales_path: &Path,
    scales_name: &str,
) -> Result<QuantisedMatrix, WeightsError> {
    let words = words
        .data()
        .chunks_exact(4)
        .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let bytes = scales.data();
    let scales: Vec<f32> = match scales.dtype() {
        Dtype::F16 => bytes
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        _ => bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
    };
    match scales.iter().position(|scale| !scale.is_finite()) {
        None => Ok(QuantisedMatrix { words, scales }),
        Some(index) => Err(WeightsError::NotFinite {
            path: scales_path.to_path_buf(),
            name: scales_name.to_string(),
            index,
        }),
    }
}

/// Puts tensors into the parameters of their paths.
struct Fill {
    tensors: HashMap<String, TensorData>,
    path: Vec<String>,
}

impl<B: Backend> ModuleMapper<B> for Fill {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        match self.tensors.remove(&self.path.join(".")) {
            Some(data) => {
                let (dtype, device) = (data.dtype, param.lazy_device());
                Param::initialized(param.id, Tensor::from_data(data, (&device, dtype)))
            }
            None => param,
        }
    }
}

/// Fills a fresh model from the checkpoint in `dir`: matrices quantised, the rest as `dtype`.
///
/// `packed` says whether the files are quantised already. All keys, shapes and types are compared before
/// the first tensor is read. `on_progress` gets bytes done and in all.
///
/// # Errors
/// [`WeightsError`] names the file and the tensor.
pub fn load_quantised<B: Ops>(
    model: Qwen3Vl<B>,
    dir: &Path,
    quantization: Quantization,
    packed: bool,
    dtype: DType,
    on_progress: LoadProgress<'_>,
) -> Result<Qwen3Vl<B>, WeightsError> {
    let shapes = parameter_shapes(&model);
    let contents = look_through(dir, &shapes, quantization, packed)?;
    let device = model.devices().into_iter().next().unwrap_or_default();
    let (mut matrices, mut rest) = (HashMap::new(), HashMap::new());
    let (mut done, mut underway) = (0u64, 0);
    on_progress(0, contents.bytes);
    for (number, path) in contents.files.iter().enumerate() {
        let file = TensorFile::open(path)?;
        for (key, view) in file.tensors()?.iter() {
            done += view.data().len() as u64;
            if contents.place.get(key) != Some(&number) {
                continue;
            }
            let (part, parameter) = match Part::of_key(key).filter(|_| packed) {
                Some((part, parameter)) => (Some(part), parameter),
                None => (None, key),
            };
            let Some(format) = format_of(quantization, parameter) else {
                rest.insert(key.to_string(), file.read(key, dtype)?);
                continue;
            };
            let matrix = match part {
                None => pack_view(&view, path, key, format)?,
                Some(Part::Words) => {
                    let scales = Part::Scales.key(parameter);
                    let other = &contents.files[contents.place[&scales]];
                    let other_file = TensorFile::open(other)?;
                    let tensors = other_file.tensors()?;
                    let scale_view =
                        tensors
                            .tensor(&scales)
                            .map_err(|cause| WeightsError::Format {
                                path: other.clone(),
                                reason: cause.to_string(),
                            })?;
                    read_packed(&view, &scale_view, other, &scales)?
                }
                // Read with their words.
                Some(Part::Scales) => continue,
            };
            let (rows, d_input) = (shapes[parameter][0], shapes[parameter][1]);
            let weight =
                QuantisedWeight::<B>::upload(matrix, rows, d_input, format, dtype, &device);
            underway += weight.bytes();
            if underway > UNDERWAY_BYTES {
                underway = 0;
                let _ = B::sync(&device);
            }
            matrices.insert(parameter.to_string(), weight);
            on_progress(done, contents.bytes);
        }
    }
    let model = model.map(&mut Fill {
        tensors: rest,
        path: Vec::new(),
    });
    let model = replace_weights(model, quantization, |path, _, _| {
        matrices.remove(path).ok_or_else(|| WeightsError::Missing {
            path: dir.to_path_buf(),
            count: 1,
            first: path.to_string(),
        })
    })?;
    on_progress(contents.bytes, contents.bytes);
    Ok(model)
}
