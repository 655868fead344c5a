//! Checkpoint files to modules and back, tensor by tensor.
//!
//! A parameter's path in the module tree is its key in the file, so there is no key map. Files are
//! memory-mapped and one shard is open at a time: host memory stays below one shard and the tensor
//! in hand.

use crate::kernels::Kernels;
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    rc::Rc,
};

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    prelude::*,
    tensor::{DType, Shape, TensorData},
};
use burn_store::{ModuleSnapshot, TensorSnapshot, TensorSnapshotError};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::files::{FileError, write_atomic};

/// What can be wrong with the weights of a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// Neither a single file nor an index is there.
    #[error(
        "`{}` holds neither `{single}` nor `{single}.index.json`; expected the folder of a checkpoint in safetensors form",
        .dir.display()
    )]
    NoFile {
        /// The folder.
        dir: PathBuf,
        /// Name of the single file.
        single: String,
    },
    /// A file cannot be opened or mapped.
    #[error("cannot read `{}`: {cause}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// A file is cut short or not in safetensors form.
    #[error(
        "`{}` is not a whole safetensors file: {reason}; download or copy it again",
        .path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Tensors that the model needs are not there.
    #[error("`{}` lacks {count} tensor(s) of the model, first `{first}`; does `config.json` belong to these weights?", .path.display())]
    Missing {
        /// Checkpoint folder or file.
        path: PathBuf,
        /// How many.
        count: usize,
        /// The first in order of name.
        first: String,
    },
    /// Tensors that the model does not know.
    #[error("`{}` holds {count} tensor(s) the model has no place for, first `{first}`; does `config.json` belong to these weights?", .path.display())]
    Surplus {
        /// Checkpoint folder or file.
        path: PathBuf,
        /// How many.
        count: usize,
        /// The first in order of name.
        first: String,
    },
    /// A tensor of another shape.
    #[error("`{}`: tensor `{name}` has shape {found:?}, the model expects {expected:?}", .path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape in the model.
        expected: Vec<usize>,
    },
    /// A tensor of a type that is no plain float.
    #[error("`{}`: tensor `{name}` is stored as {found}, expected BF16, F16 or F32; of quantised checkpoints those that `quantize` wrote are read", .path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Type in the file.
        found: String,
    },
    /// A tensor of a packed matrix of another type.
    #[error("`{}`: tensor `{name}` is stored as {found}, expected {expected}; was the file written by `quantize`?", .path.display())]
    PackedDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Type in the file.
        found: String,
        /// Type that belongs there.
        expected: String,
    },
    /// The weights are packed in another way than was asked for, or than is read here.
    #[error("`{}`: {reason}", .path.display())]
    Quantization {
        /// The file or folder.
        path: PathBuf,
        /// What was found, and what to do.
        reason: String,
    },
    /// A weight that is no number.
    #[error("`{}`: tensor `{name}` holds NaN or infinity at element {index}; the file is damaged or the training that wrote it diverged", .path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// First element at fault, row-major.
        index: usize,
    },
    /// A weight that f16 cannot hold.
    #[error("`{}`: element {index} of tensor `{name}` is too large for f16; use `--dtype bf16` or `--dtype f32`", .path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// First element at fault, row-major.
        index: usize,
    },
    /// Writing failed.
    #[error(transparent)]
    Write(#[from] FileError),
}

/// Progress of loading, in bytes of the files.
pub type LoadProgress<'a> = &'a mut dyn FnMut(u64, u64);

/// A memory-mapped safetensors file.
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
}

impl TensorFile {
    /// Maps a file and checks its header.
    ///
    /// # Errors
    /// [`WeightsError::Read`], [`WeightsError::Format`].
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let read = |cause| WeightsError::Read {
            path: path.to_path_buf(),
            cause,
        };
        let file = File::open(path).map_err(read)?;
        // Safety: the map is read-only; a checkpoint that is rewritten while it is read gives
        // wrong numbers here as it would anywhere.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        let this = Self {
            path: path.to_path_buf(),
            map,
        };
        this.tensors()?;
        Ok(this)
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    #[allow(
        clippy::len_without_is_empty,
        reason = "a file that opens is not empty"
    )]
    pub fn len(&self) -> u64 {
        self.map.len() as u64
    }

    /// The parsed header over the mapped bytes.
    ///
    /// # Errors
    /// [`WeightsError::Format`].
    pub fn tensors(&self) -> Result<SafeTensors<'_>, WeightsError> {
        SafeTensors::deserialize(&self.map).map_err(|cause| WeightsError::Format {
            path: self.path.clone(),
            reason: cause.to_string(),
        })
    }

    /// Names and shapes of all tensors.
    ///
    /// # Errors
    /// [`WeightsError::Format`].
    pub fn shapes(&self) -> Result<BTreeMap<String, Vec<usize>>, WeightsError> {
        Ok(self
            .tensors()?
            .iter()
            .map(|(name, view)| (name.to_string(), view.shape().to_vec()))
            .collect())
    }

    /// One tensor, converted to `dtype` (f32, bf16 or f16) and checked for NaN and infinity.
    ///
    /// # Errors
    /// [`WeightsError::Missing`], [`WeightsError::Dtype`], [`WeightsError::NotFinite`].
    pub fn read(&self, name: &str, dtype: DType) -> Result<TensorData, WeightsError> {
        let tensors = self.tensors()?;
        let view = tensors.tensor(name).map_err(|_| WeightsError::Missing {
            path: self.path.clone(),
            count: 1,
            first: name.to_string(),
        })?;
        let bytes = convert(view.data(), view.dtype(), dtype).map_err(|problem| match problem {
            Problem::Dtype => WeightsError::Dtype {
                path: self.path.clone(),
                name: name.to_string(),
                found: format!("{:?}", view.dtype()),
            },
            Problem::NotFinite(index) => WeightsError::NotFinite {
                path: self.path.clone(),
                name: name.to_string(),
                index,
            },
            Problem::TooLarge(index) => WeightsError::TooLarge {
                path: self.path.clone(),
                name: name.to_string(),
                index,
            },
        })?;
        Ok(TensorData::from_bytes_vec(
            bytes,
            Shape::from(view.shape().to_vec()),
            dtype,
        ))
    }
}

enum Problem {
    Dtype,
    NotFinite(usize),
    TooLarge(usize),
}

fn convert(bytes: &[u8], from: Dtype, to: DType) -> Result<Vec<u8>, Problem> {
    fn pairs(bytes: &[u8]) -> impl Iterator<Item = u16> + '_ {
        bytes
            .chunks_exact(2)
            .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
    }
    fn quads(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
        bytes
            .chunks_exact(4)
            .map(|quad| f32::from_le_bytes([quad[0], quad[1], quad[2], quad[3]]))
    }
    // The exponent bits are all ones in NaN and infinity only.
    let bad = match from {
        Dtype::BF16 => pairs(bytes).position(|bits| bits & 0x7f80 == 0x7f80),
        Dtype::F16 => pairs(bytes).position(|bits| bits & 0x7c00 == 0x7c00),
        Dtype::F32 => quads(bytes).position(|value| !value.is_finite()),
        _ => return Err(Problem::Dtype),
    };
    if let Some(index) = bad {
        return Err(Problem::NotFinite(index));
    }
    fn from_f32(values: impl Iterator<Item = f32>, to: DType) -> Result<Vec<u8>, Problem> {
        Ok(match to {
            DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
            DType::BF16 => values
                .flat_map(|v| bf16::from_f32(v).to_le_bytes())
                .collect(),
            DType::F16 => {
                let mut bytes = Vec::new();
                for (index, value) in values.enumerate() {
                    let half = f16::from_f32(value);
                    if !half.is_finite() {
                        return Err(Problem::TooLarge(index));
                    }
                    bytes.extend(half.to_le_bytes());
                }
                bytes
            }
            _ => return Err(Problem::Dtype),
        })
    }
    match (from, to) {
        (Dtype::BF16, DType::BF16) | (Dtype::F16, DType::F16) | (Dtype::F32, DType::F32) => {
            Ok(bytes.to_vec())
        }
        (Dtype::BF16, _) => from_f32(pairs(bytes).map(|b| bf16::from_bits(b).to_f32()), to),
        (Dtype::F16, _) => from_f32(pairs(bytes).map(|b| f16::from_bits(b).to_f32()), to),
        _ => from_f32(quads(bytes), to),
    }
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

/// The files of a checkpoint: `model.safetensors`, or the shards its index names.
///
/// # Errors
/// [`WeightsError::NoFile`], or the index cannot be read.
pub fn checkpoint_files(dir: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    let single = dir.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index = dir.join("model.safetensors.index.json");
    if !index.is_file() {
        return Err(WeightsError::NoFile {
            dir: dir.to_path_buf(),
            single: "model.safetensors".to_string(),
        });
    }
    let text = std::fs::read_to_string(&index).map_err(|cause| WeightsError::Read {
        path: index.clone(),
        cause,
    })?;
    let parsed: ShardIndex = serde_json::from_str(&text).map_err(|cause| WeightsError::Format {
        path: index.clone(),
        reason: cause.to_string(),
    })?;
    let mut files: Vec<PathBuf> = parsed
        .weight_map
        .values()
        .map(|file| dir.join(file))
        .collect();
    files.sort();
    files.dedup();
    Ok(files)
}

struct ShapeVisitor {
    path: Vec<String>,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl<B: Backend> ModuleVisitor<B> for ShapeVisitor {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.shapes
            .insert(self.path.join("."), param.lazy_shape().to_vec());
    }
}

/// Paths and shapes of a module's parameters, without drawing any.
pub fn parameter_shapes<B: Kernels, M: Module<B>>(module: &M) -> BTreeMap<String, Vec<usize>> {
    let mut visitor = ShapeVisitor {
        path: Vec::new(),
        shapes: BTreeMap::new(),
    };
    module.visit(&mut visitor);
    visitor.shapes
}

/// Fills a fresh module from the checkpoint in `dir`, converting to `dtype`.
///
/// All names and shapes are compared before the first tensor is read. A `lm_head.weight` beside a
/// tied embedding is passed over, as transformers does. `on_progress` gets bytes done and in all.
///
/// # Errors
/// [`WeightsError`] names the file and the tensor.
pub fn load_checkpoint<B: Kernels, M: Module<B>>(
    module: &mut M,
    dir: &Path,
    dtype: DType,
    on_progress: LoadProgress<'_>,
) -> Result<(), WeightsError> {
    let files = checkpoint_files(dir)?;
    let expected = parameter_shapes(&*module);
    let mut missing = expected.clone();
    let mut surplus = Vec::new();
    let mut total = 0;
    for path in &files {
        let file = TensorFile::open(path)?;
        total += file.map.len() as u64;
        for (name, shape) in file.shapes()? {
            match expected.get(&name) {
                Some(want) if *want == shape => {
                    missing.remove(&name);
                }
                Some(want) => {
                    return Err(WeightsError::Shape {
                        path: path.clone(),
                        name,
                        found: shape,
                        expected: want.clone(),
                    });
                }
                None if name == "lm_head.weight" => {}
                None => surplus.push(name),
            }
        }
    }
    if let Some((first, _)) = missing.first_key_value() {
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
    let device = module.devices().into_iter().next();
    let mut done = 0;
    on_progress(done, total);
    for path in &files {
        let file = Rc::new(TensorFile::open(path)?);
        let problem: Rc<RefCell<Option<WeightsError>>> = Rc::default();
        let underway: Rc<Cell<usize>> = Rc::default();
        let snapshots: Vec<TensorSnapshot> = file
            .shapes()?
            .into_iter()
            .filter(|(name, _)| expected.contains_key(name))
            .map(|(name, shape)| {
                let path_stack = name.split('.').map(str::to_string).collect();
                let (file, problem) = (file.clone(), problem.clone());
                let (underway, device) = (underway.clone(), device.clone());
                TensorSnapshot::from_closure(
                    Rc::new(move || match file.read(&name, dtype) {
                        Ok(data) => {
                            // A device takes copies faster than it empties them; waiting now and
                            // then bounds the host's memory.
                            underway.set(underway.get() + data.bytes.len());
                            if underway.get() > UNDERWAY_BYTES {
                                underway.set(data.bytes.len());
                                let _ = device.as_ref().map(B::sync);
                            }
                            Ok(data)
                        }
                        Err(error) => {
                            let message = error.to_string();
                            problem.borrow_mut().get_or_insert(error);
                            Err(TensorSnapshotError::DataError(message))
                        }
                    }),
                    dtype,
                    Shape::from(shape),
                    path_stack,
                    Vec::new(),
                    ParamId::new(),
                )
            })
            .collect();
        module.apply(snapshots, None, None, false);
        if let Some(error) = problem.borrow_mut().take() {
            return Err(error);
        }
        done += file.map.len() as u64;
        on_progress(done, total);
    }
    Ok(())
}

/// Bytes on their way to a device before the host waits for it.
pub(crate) const UNDERWAY_BYTES: usize = 512 << 20;

/// One tensor to be written, read from the device when its turn comes.
pub struct LazyTensor {
    /// Key in the file.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Stored type: f32, bf16, f16 or i32.
    pub dtype: DType,
    /// Gives the elements, in the stored type.
    pub data: Box<dyn Fn() -> TensorData>,
}

impl LazyTensor {
    fn byte_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
}

struct TensorVisitor {
    path: Vec<String>,
    tensors: Vec<LazyTensor>,
}

impl<B: Backend> ModuleVisitor<B> for TensorVisitor {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let tensor = param.val();
        self.tensors.push(LazyTensor {
            name: self.path.join("."),
            shape: tensor.dims().to_vec(),
            dtype: tensor.dtype(),
            data: Box::new(move || tensor.to_data()),
        });
    }
}

/// All parameters of a module as tensors to be written.
pub fn lazy_tensors<B: Kernels, M: Module<B>>(module: &M) -> Vec<LazyTensor> {
    let mut visitor = TensorVisitor {
        path: Vec::new(),
        tensors: Vec::new(),
    };
    module.visit(&mut visitor);
    visitor.tensors
}

fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "BF16",
        DType::F16 => "F16",
        DType::I32 => "I32",
        _ => "F32",
    }
}

/// Writes one safetensors file, tensor by tensor, in order of name.
///
/// # Errors
/// [`FileError`] names the file; what was there before stays.
pub fn write_safetensors(path: &Path, tensors: &[&LazyTensor]) -> Result<(), FileError> {
    let mut sorted = tensors.to_vec();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
    let mut offset = 0;
    for tensor in &sorted {
        let end = offset + tensor.byte_len();
        header.insert(
            tensor.name.clone(),
            serde_json::json!({
                "dtype": dtype_name(tensor.dtype),
                "shape": tensor.shape,
                "data_offsets": [offset, end],
            }),
        );
        offset = end;
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    // The data starts on a multiple of eight bytes.
    header.resize(header.len().next_multiple_of(8), b' ');
    write_atomic(path, |out: &mut dyn Write| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for tensor in &sorted {
            out.write_all(&(tensor.data)().bytes)?;
        }
        Ok(())
    })
}

/// Largest shard that the published checkpoints use, in bytes.
pub const MAX_SHARD_BYTES: usize = 5_000_000_000;

/// Writes a module in the published layout: one file, or shards of at most `max_shard_bytes` with
/// their index. The values are those of the module, bit for bit.
///
/// # Errors
/// [`FileError`] names the file.
pub fn save_checkpoint<B: Kernels, M: Module<B>>(
    module: &M,
    dir: &Path,
    max_shard_bytes: usize,
) -> Result<(), FileError> {
    save_tensors(&lazy_tensors(module), dir, max_shard_bytes)
}

/// Writes tensors as a checkpoint: one file, or shards of at most `max_shard_bytes` with their index.
///
/// # Errors
/// [`FileError`] names the file.
pub fn save_tensors(
    tensors: &[LazyTensor],
    dir: &Path,
    max_shard_bytes: usize,
) -> Result<(), FileError> {
    let mut shards: Vec<Vec<&LazyTensor>> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in tensors {
        let bytes = tensor.byte_len();
        if filled > 0 && filled + bytes > max_shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    if let [all] = shards.as_slice() {
        return write_safetensors(&dir.join("model.safetensors"), all);
    }
    let mut weight_map = BTreeMap::new();
    for (index, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", index + 1, shards.len());
        write_safetensors(&dir.join(&name), shard)?;
        for tensor in shard {
            weight_map.insert(tensor.name.clone(), name.clone());
        }
    }
    let total: usize = tensors.iter().map(LazyTensor::byte_len).sum();
    let index = serde_json::json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    write_atomic(&dir.join("model.safetensors.index.json"), |out| {
        serde_json::to_writer_pretty(&mut *out, &index)?;
        out.write_all(b"\n")
    })
}
