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
use half::f16;
use safetensors::{Dtype, tensor::TensorView};

use super::{
    Formats,
    files::{Part, formats_of},
};
use crate::{
    adapters::lora::attach::LinearMapper,
    ops::{
        Ops,
        quantised::{
            Format, Packing, QuantisedWeight, Quantization,
            pack::{QuantisedMatrix, pack},
        },
        upload::UNDERWAY_BYTES,
    },
    qwen3_vl::{
        Qwen3Vl,
        nn::Linear,
        weights::{
            Checkpoint, LoadProgress, TensorFile, WeightsError, checkpoint_files, parameter_shapes,
        },
    },
    weights::Weight,
};

/// Replaces every matrix that has a format by the result of `make` for its path, shape and format.
///
/// # Errors
/// The first error of `make`.
pub fn replace_weights<B: Ops, E>(
    model: Qwen3Vl<B>,
    formats: impl Into<Formats>,
    make: impl FnMut(&str, [usize; 2], Format) -> Result<QuantisedWeight<B>, E>,
) -> Result<Qwen3Vl<B>, E> {
    struct Replace<M, E> {
        formats: Formats,
        make: M,
        error: Option<E>,
    }
    impl<M, E> Replace<M, E> {
        fn replaced<B: Backend>(&mut self, layer: &str, weight: Weight<B>) -> Weight<B>
        where
            M: FnMut(&str, [usize; 2], Format) -> Result<QuantisedWeight<B>, E>,
        {
            let path = format!("{layer}.weight");
            let format = self.formats.of(&path);
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
        formats: formats.into(),
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

/// Compares all keys, shapes and types of a checkpoint that is quantised already with a model of `shapes`.
fn look_through(
    dir: &Path,
    shapes: &BTreeMap<String, Vec<usize>>,
    formats: &Formats,
) -> Result<Contents, WeightsError> {
    if let Some(layer) = formats.own.keys().find(
        |layer| !matches!(shapes.get(&format!("{layer}.weight")), Some(shape) if shape.len() == 2),
    ) {
        return Err(WeightsError::Quantization {
            path: dir.join("config.json"),
            reason: format!(
                "key `quantization_config.modules` names `{layer}`, which is no matrix of this model"
            ),
        });
    }
    let mut missing: BTreeMap<String, ()> = BTreeMap::new();
    for path in shapes.keys() {
        match formats.of(path) {
            Some(format) => {
                for part in Part::of_format(format) {
                    missing.insert(part.key(path), ());
                }
            }
            None => {
                missing.insert(path.clone(), ());
            }
        }
    }
    let files = checkpoint_files(dir)?;
    let (mut place, mut surplus, mut bytes) = (BTreeMap::new(), Vec::new(), 0);
    for (number, path) in files.iter().enumerate() {
        let file = TensorFile::open(path)?;
        bytes += file.len();
        for (key, view) in file.tensors()?.iter() {
            let (part, parameter) = match Part::of_key(key) {
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
            let format = formats.of(parameter);
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

/// Checks that `dir` holds a whole quantised checkpoint for a model of `shapes`.
///
/// # Errors
/// [`WeightsError`] names the file and the tensor.
pub fn check(
    dir: &Path,
    shapes: &BTreeMap<String, Vec<usize>>,
    formats: &Formats,
) -> Result<(), WeightsError> {
    look_through(dir, shapes, formats).map(|_| ())
}

/// The formats in which the matrices that another tool quantised are held exactly; nothing else is
/// quantised.
pub fn kept_formats(checkpoint: &Checkpoint) -> Formats {
    let mut formats = Formats::default();
    for (name, shape) in checkpoint.in_order() {
        let layer = name.strip_suffix(".weight");
        if let (Some(layer), [_, _]) = (layer, shape) {
            formats.set(layer, checkpoint.own_format(name));
        }
    }
    formats
}

/// What becomes of matrices that another tool quantised when the checkpoint is loaded as `packing`; `None`
/// where there is nothing to say.
pub fn kept_remark(checkpoint: &Checkpoint, packing: Packing) -> Option<String> {
    let formats = match packing {
        Packing::To(quantization) => Formats::from(quantization),
        Packing::Keep => kept_formats(checkpoint),
    };
    let (mut kept, mut anew, mut floats) = (0, 0, 0);
    for (name, shape) in checkpoint.in_order() {
        match formats.of(name) {
            Some(format) if checkpoint.keeps(name, format) => kept += 1,
            Some(_) if checkpoint.stored_dtype(name).is_none() => anew += 1,
            None if checkpoint.stored_dtype(name).is_none() && shape.len() == 2 => floats += 1,
            _ => {}
        }
    }
    if packing == Packing::Keep {
        let dequantised = match floats {
            0 => String::new(),
            _ => format!(
                "; {floats} are dequantised to 16 bits, for they do not have 4 bits with whole groups of 32, 64 or 128 inputs in order and f16 scales, nor symmetric 8 bits with a scale a row"
            ),
        };
        return Some(match kept {
            0 => format!(
                "no matrix stays packed: the checkpoint has none that another tool quantised in a form that is held exactly{dequantised}"
            ),
            _ => {
                format!("{kept} matrices stay packed exactly as they are ({formats}){dequantised}")
            }
        });
    }
    let hint = match anew {
        0 => "",
        _ => {
            "; a format that holds more of them loses less: `keep` leaves all as they are that can be held exactly"
        }
    };
    (kept + anew > 0).then(|| {
        format!(
            "packed as {packing}: {kept} matrices keep the numbers and scales of the tool that quantised them, {anew} are dequantised and quantised anew{hint}"
        )
    })
}

/// Elements that are read as f32 at once before they are quantised.
const READ_AT_ONCE: usize = 8 << 20;

/// Quantises the matrix `name` `[rows, d_input]` of a checkpoint, some rows at a time.
///
/// # Errors
/// [`WeightsError::Dtype`], [`WeightsError::NotFinite`].
pub fn pack_tensor(
    checkpoint: &Checkpoint,
    name: &str,
    [rows, d_input]: [usize; 2],
    format: Format,
) -> Result<QuantisedMatrix, WeightsError> {
    // Numbers and scales that another tool chose are kept where the format has room for them.
    if let Some(kept) = checkpoint.kept(name, [rows, d_input], format)? {
        return Ok(kept);
    }
    let mut matrix = QuantisedMatrix::with_capacity(rows, d_input, format);
    let at_once = (READ_AT_ONCE / d_input).max(1);
    for first in (0..rows).step_by(at_once) {
        let count = at_once.min(rows - first);
        let mut values = vec![0f32; count * d_input];
        let bytes = bytemuck::cast_slice_mut(&mut values);
        checkpoint.read_into(name, first * d_input, DType::F32, bytes)?;
        let part = pack(count, d_input, format, |row, out: &mut [f32]| {
            out.copy_from_slice(&values[row * d_input..][..d_input]);
            Ok::<_, WeightsError>(())
        })?;
        matrix.extend(part);
    }
    Ok(matrix)
}

/// The words of a matrix as stored in a file.
fn read_words(words: &TensorView<'_>) -> Vec<i32> {
    let words = words.data().chunks_exact(4);
    words
        .map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

/// Scales or zero points as stored in a file.
fn read_floats(contents: &Contents, key: &str) -> Result<Vec<f32>, WeightsError> {
    let path = &contents.files[contents.place[key]];
    let file = TensorFile::open(path)?;
    let tensors = file.tensors()?;
    let view = tensors.tensor(key).map_err(|cause| WeightsError::Format {
        path: path.clone(),
        reason: cause.to_string(),
    })?;
    let bytes = view.data();
    let values: Vec<f32> = match view.dtype() {
        Dtype::F16 => bytes
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        _ => bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
    };
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(index) => Err(WeightsError::NotFinite {
            path: path.clone(),
            name: key.to_string(),
            index,
        }),
    }
}

/// The zero points of the parameter `path`, which must be levels; none where the format is symmetric.
fn read_zeros(contents: &Contents, path: &str, format: Format) -> Result<Vec<f32>, WeightsError> {
    if format.is_symmetric() {
        return Ok(Vec::new());
    }
    let key = Part::Zeros.key(path);
    let zeros = read_floats(contents, &key)?;
    let is_level = |zero: &f32| zero.fract() == 0.0 && (0.0..=15.0).contains(zero);
    match zeros.iter().position(|zero| !is_level(zero)) {
        None => Ok(zeros),
        Some(index) => Err(WeightsError::Format {
            path: contents.files[contents.place[&key]].clone(),
            reason: format!(
                "tensor `{key}`: zero point {index} is {}, expected a whole number from 0 to 15",
                zeros[index]
            ),
        }),
    }
}

/// Puts tensors into the parameters of their paths in a module; the others stay as they are.
pub(super) fn fill<B: Backend, M: Module<B>>(module: M, tensors: HashMap<String, TensorData>) -> M {
    module.map(&mut Fill {
        tensors,
        path: Vec::new(),
    })
}

/// See [`fill`].
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
/// `packed` says whether this program quantised the files already; their `config.json` then says which matrix
/// has which format. All keys, shapes and types are compared
/// before the first tensor is read. `on_progress` gets bytes done and in all.
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
    match packed {
        true => {
            let formats = formats_of(dir)?.unwrap_or(quantization.into());
            load_packed(model, dir, formats, dtype, on_progress)
        }
        false => quantise(
            model,
            &Checkpoint::open(dir)?,
            quantization,
            dtype,
            on_progress,
        ),
    }
}

/// Fills a fresh model from a checkpoint of floats, whatever form its files have: matrices quantised, the
/// rest as `dtype`.
///
/// # Errors
/// [`WeightsError`] names the file and the tensor.
pub fn quantise<B: Ops>(
    model: Qwen3Vl<B>,
    checkpoint: &Checkpoint,
    formats: impl Into<Formats>,
    dtype: DType,
    on_progress: LoadProgress<'_>,
) -> Result<Qwen3Vl<B>, WeightsError> {
    let formats = formats.into();
    let tensors = checkpoint.of_model(&parameter_shapes(&model))?;
    let mut filling = Filling::new(&model);
    let size = |shape: &[usize]| shape.iter().product::<usize>() as u64;
    let total = tensors.iter().map(|(_, shape)| size(shape)).sum();
    let mut done = 0;
    on_progress(0, total);
    for (name, shape) in &tensors {
        match (formats.of(name), shape.as_slice()) {
            (Some(format), [rows, d_input]) => {
                let dims = [*rows, *d_input];
                let matrix = pack_tensor(checkpoint, name, dims, format)?;
                filling.matrix(name, matrix, dims, format, dtype);
            }
            _ => {
                let mut bytes = vec![0; size(shape) as usize * dtype.size()];
                checkpoint.read_into(name, 0, dtype, &mut bytes)?;
                let data = TensorData::from_bytes_vec(bytes, shape.clone(), dtype);
                filling.rest.insert(name.clone(), data);
            }
        }
        done += size(shape);
        on_progress(done, total);
    }
    filling.into_model(model, formats, checkpoint.path())
}

/// What a model is filled with.
struct Filling<B: Backend> {
    device: B::Device,
    matrices: HashMap<String, QuantisedWeight<B>>,
    rest: HashMap<String, TensorData>,
    underway: usize,
}

impl<B: Ops> Filling<B> {
    fn new(model: &Qwen3Vl<B>) -> Self {
        Self {
            device: model.devices().into_iter().next().unwrap_or_default(),
            matrices: HashMap::new(),
            rest: HashMap::new(),
            underway: 0,
        }
    }

    /// Sends a matrix to the device.
    fn matrix(
        &mut self,
        name: &str,
        matrix: QuantisedMatrix,
        [rows, d_input]: [usize; 2],
        format: Format,
        dtype: DType,
    ) {
        let weight =
            QuantisedWeight::<B>::upload(matrix, rows, d_input, format, dtype, &self.device);
        self.underway += weight.bytes();
        if self.underway > UNDERWAY_BYTES {
            self.underway = 0;
            let _ = B::sync(&self.device);
        }
        self.matrices.insert(name.to_string(), weight);
    }

    fn into_model(
        mut self,
        model: Qwen3Vl<B>,
        formats: Formats,
        path: &Path,
    ) -> Result<Qwen3Vl<B>, WeightsError> {
        let model = fill(model, self.rest);
        replace_weights(model, formats, |name, _, _| {
            self.matrices
                .remove(name)
                .ok_or_else(|| WeightsError::Missing {
                    path: path.to_path_buf(),
                    count: 1,
                    first: name.to_string(),
                })
        })
    }
}

/// Fills a fresh model from files that this program quantised, in the formats that their `config.json` says.
///
/// # Errors
/// [`WeightsError`] names the file and the tensor.
pub fn load_packed<B: Ops>(
    model: Qwen3Vl<B>,
    dir: &Path,
    formats: Formats,
    dtype: DType,
    on_progress: LoadProgress<'_>,
) -> Result<Qwen3Vl<B>, WeightsError> {
    let shapes = parameter_shapes(&model);
    let contents = look_through(dir, &shapes, &formats)?;
    let mut filling = Filling::new(&model);
    let mut done = 0u64;
    on_progress(0, contents.bytes);
    for (number, path) in contents.files.iter().enumerate() {
        let file = TensorFile::open(path)?;
        for (key, view) in file.tensors()?.iter() {
            done += view.data().len() as u64;
            if contents.place.get(key) != Some(&number) {
                continue;
            }
            let (part, parameter) = match Part::of_key(key) {
                Some((part, parameter)) => (Some(part), parameter),
                None => (None, key),
            };
            let Some(format) = formats.of(parameter) else {
                filling.rest.insert(key.to_string(), file.read(key, dtype)?);
                continue;
            };
            // Scales and zero points are read with their words.
            if part != Some(Part::Words) {
                continue;
            }
            let matrix = QuantisedMatrix {
                words: read_words(&view),
                scales: read_floats(&contents, &Part::Scales.key(parameter))?,
                zeros: read_zeros(&contents, parameter, format)?,
            };
            let dims = [shapes[parameter][0], shapes[parameter][1]];
            filling.matrix(parameter, matrix, dims, format, dtype);
            on_progress(done, contents.bytes);
        }
    }
    let model = filling.into_model(model, formats, dir)?;
    on_progress(contents.bytes, contents.bytes);
    Ok(model)
}
