//! Reads checkpoint files (safetensors) into modules and writes them, tensor by tensor.
//!
//! A parameter's path in the module tree is its key in the file, so there is no key map. What is read
//! goes to the device piece by piece, what is written comes from it tensor by tensor: host memory stays
//! far below a shard.

mod convert;
mod load;

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    ops::Range,
    path::{Path, PathBuf},
};

use burn::{
    module::{Module, ModuleVisitor, Param},
    prelude::*,
    tensor::{DType, Shape, TensorData},
};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::{
    base::files::{FileError, write_atomic},
    ops::Ops,
};
use convert::{Problem, check, convert, is_same, stored_size};
pub use load::{load_checkpoint, load_checkpoints};

/// What can be wrong with the weights of a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// Neither a single file nor an index is there.
    #[error(
        "`{}` holds neither `{single}` nor `{single}.index.json`{}; expected the folder of a checkpoint in safetensors form",
        .dir.display(), other_weights(.dir)
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
    /// A tensor of a quantised matrix of another type.
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
    /// The weights are quantised in another format than the chosen one, or than is supported.
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
    /// The device does not take them.
    #[error("the weights do not come to the device: {0}")]
    Upload(String),
    /// Writing failed.
    #[error(transparent)]
    Write(#[from] FileError),
}

/// Weights of another form in a folder, with what to do about them, as the middle of a sentence.
fn other_weights(dir: &Path) -> String {
    let names: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let found = |test: fn(&str) -> bool| names.iter().find(|name| test(name));
    if let Some(name) = found(|name| name.starts_with("pytorch_model") && name.ends_with(".bin")) {
        format!(
            ", but `{name}`, which is not read here (a pickle may run code); load it in transformers once and `save_pretrained` it"
        )
    } else if let Some(name) = found(|name| name.ends_with(".gguf")) {
        format!(
            ", but `{name}` in llama.cpp's form, which is not read here; take the original checkpoint"
        )
    } else {
        String::new()
    }
}

/// Progress of loading, in bytes of the files.
pub type LoadProgress<'a> = &'a mut dyn FnMut(u64, u64);

/// A tensor's entry in the header.
#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Its bytes in the file.
    bytes: Range<usize>,
}

/// An open safetensors file, its header read.
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    #[cfg(unix)]
    file: File,
    entries: BTreeMap<String, Entry>,
}

/// Bytes a core reads and checks at once: what its cache holds.
const SHARE_BYTES: usize = 1 << 20;

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
        let mut this = Self {
            path: path.to_path_buf(),
            map,
            #[cfg(unix)]
            file,
            entries: BTreeMap::new(),
        };
        let start = this.map.as_ptr() as usize;
        let entries = this
            .tensors()?
            .iter()
            .map(|(name, view)| {
                let from = view.data().as_ptr() as usize - start;
                let entry = Entry {
                    dtype: view.dtype(),
                    shape: view.shape().to_vec(),
                    bytes: from..from + view.data().len(),
                };
                (name.to_string(), entry)
            })
            .collect();
        this.entries = entries;
        Ok(this)
    }

    /// Path of the file.
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
            // What `git clone` leaves without Git LFS.
            reason: if self.map.starts_with(b"version https://git-lfs") {
                "it is a pointer of Git LFS and not the weights (`git lfs pull` brings them)"
                    .to_string()
            } else {
                cause.to_string()
            },
        })
    }

    /// Names and shapes of all tensors.
    ///
    /// # Errors
    /// None: the header was read when the file was opened.
    pub fn shapes(&self) -> Result<BTreeMap<String, Vec<usize>>, WeightsError> {
        Ok(self
            .entries
            .iter()
            .map(|(name, entry)| (name.clone(), entry.shape.clone()))
            .collect())
    }

    /// Names and shapes in the order of the bytes.
    fn shapes_in_order(&self) -> Vec<(&str, &[usize])> {
        let mut all: Vec<_> = self.entries.iter().collect();
        all.sort_by_key(|(_, entry)| entry.bytes.start);
        all.into_iter()
            .map(|(name, entry)| (name.as_str(), entry.shape.as_slice()))
            .collect()
    }

    /// One tensor, converted to `dtype` (f32, bf16 or f16) and checked for NaN and infinity.
    ///
    /// # Errors
    /// [`WeightsError::Missing`], [`WeightsError::Dtype`], [`WeightsError::NotFinite`].
    pub fn read(&self, name: &str, dtype: DType) -> Result<TensorData, WeightsError> {
        let entry = self.entry(name)?;
        let count: usize = entry.shape.iter().product();
        let mut bytes = vec![0; count * dtype.size()];
        self.read_into(name, 0, dtype, &mut bytes)?;
        Ok(TensorData::from_bytes_vec(
            bytes,
            Shape::from(entry.shape.clone()),
            dtype,
        ))
    }

    /// Elements of a tensor from `first` on, as many as `out` holds, converted and checked, on all cores.
    ///
    /// # Errors
    /// As [`TensorFile::read`]; the file cannot be read.
    fn read_into(
        &self,
        name: &str,
        first: usize,
        dtype: DType,
        out: &mut [u8],
    ) -> Result<(), WeightsError> {
        let entry = self.entry(name)?;
        let error = |problem| match problem {
            Problem::Dtype => WeightsError::Dtype {
                path: self.path.clone(),
                name: name.to_string(),
                found: format!("{:?}", entry.dtype),
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
        };
        let size = stored_size(entry.dtype).ok_or_else(|| error(Problem::Dtype))?;
        let share = SHARE_BYTES / size.max(dtype.size());
        let shares: Vec<Result<(), WeightsError>> = out
            .par_chunks_mut(share * dtype.size())
            .enumerate()
            .map(|(number, out)| {
                let first = first + number * share;
                let from = entry.bytes.start + first * size;
                let counted = |problem| match problem {
                    Problem::NotFinite(at) => error(Problem::NotFinite(first + at)),
                    Problem::TooLarge(at) => error(Problem::TooLarge(first + at)),
                    Problem::Dtype => error(Problem::Dtype),
                };
                if is_same(entry.dtype, dtype) {
                    self.bytes_into(from, out)?;
                    return check(out, entry.dtype).map_err(counted);
                }
                let mut stored = vec![0; out.len() / dtype.size() * size];
                self.bytes_into(from, &mut stored)?;
                check(&stored, entry.dtype)
                    .and_then(|()| convert(&stored, entry.dtype, dtype, out))
                    .map_err(counted)
            })
            .collect();
        // The first error in the order of the elements, whoever met one first.
        shares.into_iter().collect()
    }

    /// Bytes of the file. Read, not taken from the map, where the system can read at a place: a page of
    /// a map costs more to bring in than its bytes to copy, and stays with the process.
    fn bytes_into(&self, from: usize, out: &mut [u8]) -> Result<(), WeightsError> {
        #[cfg(unix)]
        return std::os::unix::fs::FileExt::read_exact_at(&self.file, out, from as u64).map_err(
            |cause| WeightsError::Read {
                path: self.path.clone(),
                cause,
            },
        );
        #[cfg(not(unix))]
        {
            out.copy_from_slice(&self.map[from..from + out.len()]);
            Ok(())
        }
    }

    fn entry(&self, name: &str) -> Result<&Entry, WeightsError> {
        self.entries.get(name).ok_or_else(|| WeightsError::Missing {
            path: self.path.clone(),
            count: 1,
            first: name.to_string(),
        })
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

/// Whether the checkpoint in `dir` holds a `lm_head.weight` that differs from the embedding in any element.
/// A folder without weights, or with quantised ones, holds none.
///
/// # Errors
/// [`WeightsError`] names the file and the tensor.
pub fn holds_another_head(dir: &Path) -> Result<bool, WeightsError> {
    const HEAD: &str = "lm_head.weight";
    const EMBEDDING: &str = "model.language_model.embed_tokens.weight";
    let files = match checkpoint_files(dir) {
        Ok(files) => files,
        Err(WeightsError::NoFile { .. }) => return Ok(false),
        Err(error) => return Err(error),
    };
    let files = files
        .iter()
        .map(|path| TensorFile::open(path))
        .collect::<Result<Vec<_>, _>>()?;
    let holder = |name: &str| {
        files
            .iter()
            .find_map(|file| Some((file, file.entries.get(name)?)))
    };
    let (Some((head_file, head)), Some((file, embedding))) = (holder(HEAD), holder(EMBEDDING))
    else {
        return Ok(false);
    };
    if head.shape != embedding.shape {
        return Ok(true);
    }
    let elements: usize = head.shape.iter().product();
    let share = SHARE_BYTES / size_of::<f32>();
    let mut ours = vec![0; SHARE_BYTES];
    let mut theirs = vec![0; SHARE_BYTES];
    for first in (0..elements).step_by(share) {
        let bytes = share.min(elements - first) * size_of::<f32>();
        head_file.read_into(HEAD, first, DType::F32, &mut ours[..bytes])?;
        file.read_into(EMBEDDING, first, DType::F32, &mut theirs[..bytes])?;
        if ours[..bytes] != theirs[..bytes] {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Type of the weights in a checkpoint: that of the embedding.
///
/// # Errors
/// [`WeightsError`] names the file.
pub fn stored_dtype(dir: &Path) -> Result<Option<DType>, WeightsError> {
    for path in checkpoint_files(dir)? {
        for (name, entry) in &TensorFile::open(&path)?.entries {
            if name.ends_with("embed_tokens.weight") {
                return Ok(match entry.dtype {
                    Dtype::BF16 => Some(DType::BF16),
                    Dtype::F16 => Some(DType::F16),
                    Dtype::F32 => Some(DType::F32),
                    _ => None,
                });
            }
        }
    }
    Ok(None)
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

/// Paths and shapes of a module's parameters, without initialising any.
pub fn parameter_shapes<B: Ops, M: Module<B>>(module: &M) -> BTreeMap<String, Vec<usize>> {
    let mut visitor = ShapeVisitor {
        path: Vec::new(),
        shapes: BTreeMap::new(),
    };
    module.visit(&mut visitor);
    visitor.shapes
}

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
pub fn lazy_tensors<B: Ops, M: Module<B>>(module: &M) -> Vec<LazyTensor> {
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
pub fn save_checkpoint<B: Ops, M: Module<B>>(
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
