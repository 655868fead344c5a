//! Writes the parameters of a module as safetensors, tensor by tensor.

use std::{collections::BTreeMap, io::Write, path::Path};

use burn::{
    module::{Module, ModuleVisitor, Param},
    prelude::*,
    tensor::{DType, TensorData},
};

use crate::{
    base::files::{FileError, write_atomic},
    ops::Ops,
};

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
