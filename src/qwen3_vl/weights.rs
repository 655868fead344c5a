//! Reads checkpoints (safetensors, PyTorch's files, GGUF) into modules and writes them (safetensors), tensor by tensor.
//!
//! [`Checkpoint`] is a checkpoint of any form as floats under the paths of the module tree. Those are the keys of
//! today's files; `keys` leads older ones there, [`gguf`] llama.cpp's. What is read goes to the device piece by
//! piece, what is written comes from it tensor by tensor: host memory stays far below a shard.

pub mod checkpoint;
mod convert;
mod error;
mod forms;
pub mod gguf;
mod keys;
mod load;
mod pytorch;
mod save;
mod stored;

use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
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

use crate::ops::Ops;
pub use checkpoint::Checkpoint;
use convert::{Problem, check, convert, is_same, stored_size};
pub use error::WeightsError;
pub use forms::OWN_METHOD;
use gguf::GgufParts;
pub use load::{load_checkpoint, load_checkpoints, load_opened};
pub use save::{
    LazyTensor, MAX_SHARD_BYTES, lazy_tensors, save_checkpoint, save_tensors, write_safetensors,
};

/// Progress of loading, in bytes of the files.
pub type LoadProgress<'a> = &'a mut dyn FnMut(u64, u64);

/// A tensor's entry in the header.
#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Its bytes in the file.
    bytes: Range<usize>,
    /// Elements between neighbours of each dimension, where they are not in order, as in a transposed view.
    strides: Option<Vec<usize>>,
}

/// An open file of safetensors, or of PyTorch by its name, its header read.
pub struct TensorFile {
    path: PathBuf,
    map: Arc<Mmap>,
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
    /// [`WeightsError::Read`], [`WeightsError::Format`], [`WeightsError::PyTorch`].
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
            map: Arc::new(map),
            #[cfg(unix)]
            file,
            entries: BTreeMap::new(),
        };
        if pytorch::is_named(path) {
            this.entries = pytorch::entries(path, &this.map)?;
            return Ok(this);
        }
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
                    strides: None,
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

    /// Names, types, shapes and bytes of all tensors; those of a view as they are in the file, from its first
    /// element to its last.
    pub fn stored(&self) -> impl Iterator<Item = (&str, Dtype, &[usize], &[u8])> {
        self.entries.iter().map(|(name, entry)| {
            let bytes = &self.map[entry.bytes.clone()];
            (name.as_str(), entry.dtype, entry.shape.as_slice(), bytes)
        })
    }

    /// The parsed header of a safetensors file over the mapped bytes.
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
        let fetch = |first: usize, out: &mut [u8]| match &entry.strides {
            None => self.bytes_into(entry.bytes.start + first * size, out),
            Some(strides) => {
                let (bytes, sizes) = (&self.map[entry.bytes.clone()], [&entry.shape, strides]);
                pytorch::gather(bytes, sizes.map(Vec::as_slice), size, first, out);
                Ok(())
            }
        };
        let shares: Vec<Result<(), WeightsError>> = out
            .par_chunks_mut(share * dtype.size())
            .enumerate()
            .map(|(number, out)| {
                let first = first + number * share;
                let counted = |problem| match problem {
                    Problem::NotFinite(at) => error(Problem::NotFinite(first + at)),
                    Problem::TooLarge(at) => error(Problem::TooLarge(first + at)),
                    Problem::Dtype => error(Problem::Dtype),
                };
                if is_same(entry.dtype, dtype) {
                    fetch(first, out)?;
                    return check(out, entry.dtype).map_err(counted);
                }
                let mut stored = vec![0; out.len() / dtype.size() * size];
                fetch(first, &mut stored)?;
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

/// Names of a checkpoint's single file; an index of shards has the same with `.index.json`. The first that is
/// there counts, as in transformers.
const SINGLE: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];

/// The file of a whole checkpoint in `dir`, or the index of its shards.
fn single_or_index(dir: &Path) -> Option<PathBuf> {
    SINGLE
        .into_iter()
        .flat_map(|single| [single.to_string(), format!("{single}.index.json")])
        .map(|name| dir.join(name))
        .find(|path| path.is_file())
}

/// The files of a checkpoint: `model.safetensors` or `pytorch_model.bin`, the shards that the index of either
/// names, or the files of a GGUF.
///
/// # Errors
/// [`WeightsError::NoFile`], [`WeightsError::MissingShard`], or the index cannot be read.
pub fn checkpoint_files(dir: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    checkpoint_files_with(dir, &GgufParts::default())
}

/// [`checkpoint_files`], with the other files of a GGUF named.
///
/// # Errors
/// As [`checkpoint_files`].
pub fn checkpoint_files_with(dir: &Path, parts: &GgufParts) -> Result<Vec<PathBuf>, WeightsError> {
    let Some(index) = single_or_index(dir) else {
        if let Some(pair) = gguf::find(dir, parts)? {
            return Ok(pair.files().into_iter().map(Path::to_path_buf).collect());
        }
        return Err(WeightsError::NoFile {
            dir: dir.to_path_buf(),
            single: SINGLE[0].to_string(),
        });
    };
    if index.extension().is_none_or(|ending| ending != "json") {
        return Ok(vec![index]);
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
    let mut missing = files.iter().filter(|file| !file.exists());
    match missing.next() {
        None => Ok(files),
        Some(first) => Err(WeightsError::MissingShard {
            first: first.display().to_string(),
            count: 1 + missing.count(),
            index,
        }),
    }
}

/// Key of the head.
const HEAD: &str = "lm_head.weight";

/// Key of the embedding.
const EMBEDDING: &str = "model.language_model.embed_tokens.weight";

/// What the weights say about the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// There is none.
    Absent,
    /// It is the embedding, element by element.
    Copy,
    /// It differs from the embedding.
    Own,
}

/// Compares the head of the checkpoint in `dir` with its embedding. A folder without weights, or with those
/// that this program quantised, has none.
///
/// # Errors
/// [`WeightsError`] names the file and the tensor.
pub fn head(dir: &Path) -> Result<Head, WeightsError> {
    match Checkpoint::open(dir) {
        Ok(checkpoint) => head_of(&checkpoint),
        Err(WeightsError::NoFile { .. }) => Ok(Head::Absent),
        Err(error) => Err(error),
    }
}

/// Whether the checkpoint in `dir` holds a `lm_head.weight` that differs from the embedding in any element.
/// A folder without weights, or with those that this program quantised, holds none.
///
/// # Errors
/// [`WeightsError`] names the file and the tensor.
pub fn holds_another_head(dir: &Path) -> Result<bool, WeightsError> {
    Ok(head(dir)? == Head::Own)
}

fn head_of(checkpoint: &Checkpoint) -> Result<Head, WeightsError> {
    let shape = |wanted: &str| {
        let tensors = checkpoint.in_order();
        let found = tensors.into_iter().find(|(name, _)| *name == wanted);
        found.map(|(_, shape)| shape.to_vec())
    };
    let Some(head) = shape(HEAD) else {
        return Ok(Head::Absent);
    };
    if shape(EMBEDDING).as_ref() != Some(&head) {
        return Ok(Head::Own);
    }
    let elements: usize = head.iter().product();
    let share = SHARE_BYTES / size_of::<f32>();
    let mut ours = vec![0; SHARE_BYTES];
    let mut theirs = vec![0; SHARE_BYTES];
    for first in (0..elements).step_by(share) {
        let bytes = share.min(elements - first) * size_of::<f32>();
        checkpoint.read_into(HEAD, first, DType::F32, &mut ours[..bytes])?;
        checkpoint.read_into(EMBEDDING, first, DType::F32, &mut theirs[..bytes])?;
        if ours[..bytes] != theirs[..bytes] {
            return Ok(Head::Own);
        }
    }
    Ok(Head::Copy)
}

/// Type of the weights in a checkpoint: that of the embedding; `None` where it is quantised.
///
/// # Errors
/// [`WeightsError`] names the file.
pub fn stored_dtype(dir: &Path, parts: &GgufParts) -> Result<Option<DType>, WeightsError> {
    Ok(Checkpoint::open_with(dir, parts)?.stored_dtype(EMBEDDING))
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
