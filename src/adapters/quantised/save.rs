//! Quantises a checkpoint of floats, file to file: no device, no model.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    fs,
    hash::{DefaultHasher, Hasher},
    io::Write,
    path::Path,
    rc::Rc,
};

use burn::tensor::{DType, TensorData};
use serde_json::Value;

use super::{
    files::{Part, of_checkpoint, to_config},
    load::{check, pack_tensor},
};
use crate::{
    adapters::quantised::format_of,
    base::files::{FileError, write_atomic},
    ops::quantised::{Format, Quantization},
    qwen3_vl::{
        config::Qwen3VlConfig,
        weights::{
            Checkpoint, LazyTensor, TensorFile, WeightsError, checkpoint_files,
            gguf::{self, GgufParts},
            save_tensors,
        },
    },
};

/// Makes one tensor from the shared state.
type Maker = Box<dyn Fn(&Making) -> Result<TensorData, WeightsError>>;

/// What the tensors of a checkpoint share while they are made, one after the other.
#[derive(Default)]
struct Making {
    /// Scales of matrices whose words are written, by path.
    scales: RefCell<HashMap<String, Vec<f32>>>,
    /// Hash of each tensor's bytes as they were made.
    hashes: RefCell<BTreeMap<String, u64>>,
    problem: RefCell<Option<WeightsError>>,
}

/// Checksum that shows bytes changed on the disk.
fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// A tensor that is made by `make` when its turn comes; after an error zeros are written, and the
/// caller deletes the file.
fn lazy(
    making: &Rc<Making>,
    name: String,
    shape: Vec<usize>,
    dtype: DType,
    make: impl Fn(&Making) -> Result<TensorData, WeightsError> + 'static,
) -> LazyTensor {
    let making = making.clone();
    let (key, size) = (name.clone(), shape.clone());
    let data = move || {
        let data = make(&making).unwrap_or_else(|error| {
            making.problem.borrow_mut().get_or_insert(error);
            let bytes = size.iter().product::<usize>() * dtype.size();
            TensorData::from_bytes_vec(vec![0; bytes], size.clone(), dtype)
        });
        let hash = hash(&data.bytes);
        making.hashes.borrow_mut().insert(key.clone(), hash);
        data
    };
    LazyTensor {
        name,
        shape,
        dtype,
        data: Box::new(data),
    }
}

/// Words and scales of one matrix. The scales are kept when the words are made, which come first.
fn lazy_parts(
    making: &Rc<Making>,
    checkpoint: &Rc<Checkpoint>,
    path: &str,
    dims: [usize; 2],
    format: Format,
) -> [LazyTensor; 2] {
    let packed = {
        let (checkpoint, path) = (checkpoint.clone(), path.to_string());
        Rc::new(move || pack_tensor(&checkpoint, &path, dims, format))
    };
    let part = |part: Part, make: Maker| {
        let dtype = part.dtype(format).0;
        lazy(
            making,
            part.key(path),
            part.shape(dims, format),
            dtype,
            make,
        )
    };
    let owned = path.to_string();
    let make_words = {
        let (packed, path) = (packed.clone(), owned.clone());
        let shape = Part::Words.shape(dims, format);
        move |making: &Making| {
            let matrix = packed()?;
            let mut scales = making.scales.borrow_mut();
            scales.insert(path.clone(), matrix.scales);
            Ok(TensorData::new(matrix.words, shape.clone()))
        }
    };
    let shape = Part::Scales.shape(dims, format);
    let make_scales = move |making: &Making| {
        let left = making.scales.borrow_mut().remove(&owned);
        let scales = match left {
            Some(scales) => scales,
            None => packed()?.scales,
        };
        let dtype = Part::Scales.dtype(format).0;
        Ok(TensorData::new(scales, shape.clone()).convert_dtype(dtype))
    };
    [
        part(Part::Words, Box::new(make_words)),
        part(Part::Scales, Box::new(make_scales)),
    ]
}

/// The tensors of the quantised checkpoint, in order of the files they come from.
fn packed_tensors(
    making: &Rc<Making>,
    (from, parts): (&Path, &GgufParts),
    shapes: &BTreeMap<String, Vec<usize>>,
    quantization: Quantization,
) -> Result<Vec<LazyTensor>, WeightsError> {
    let checkpoint = Rc::new(Checkpoint::open_with(from, parts)?);
    let mut tensors = Vec::new();
    for (name, shape) in checkpoint.of_model(shapes)? {
        if let (Some(format), [rows, d_input]) = (format_of(quantization, &name), shape.as_slice())
        {
            let dims = [*rows, *d_input];
            tensors.extend(lazy_parts(making, &checkpoint, &name, dims, format));
            continue;
        }
        let dtype = checkpoint.stored_dtype(&name).unwrap_or(DType::F32);
        let (checkpoint, key, size) = (checkpoint.clone(), name.clone(), shape.clone());
        let make = move |_: &Making| {
            let mut bytes = vec![0; size.iter().product::<usize>() * dtype.size()];
            checkpoint.read_into(&key, 0, dtype, &mut bytes)?;
            Ok(TensorData::from_bytes_vec(bytes, size.clone(), dtype))
        };
        tensors.push(lazy(making, name, shape, dtype, make));
    }
    Ok(tensors)
}

/// Writes the weights and `config.json` of the checkpoint in `from`, with the other files of a GGUF, quantised, into the folder `to`, and
/// reads every byte back.
///
/// `shapes` are those of the model.
///
/// # Errors
/// [`WeightsError`] names the file and the tensor; what is in `to` then is not a checkpoint.
pub fn write_quantised(
    (from, parts): (&Path, &GgufParts),
    to: &Path,
    shapes: &BTreeMap<String, Vec<usize>>,
    quantization: Quantization,
    max_shard_bytes: usize,
) -> Result<(), WeightsError> {
    if let Some(already) = of_checkpoint(from)? {
        return Err(WeightsError::Quantization {
            path: from.to_path_buf(),
            reason: format!(
                "the weights are packed as {already} already; take the checkpoint they were made from"
            ),
        });
    }
    let making = Rc::new(Making::default());
    let tensors = packed_tensors(&making, (from, parts), shapes, quantization)?;
    save_tensors(&tensors, to, max_shard_bytes)?;
    if let Some(error) = making.problem.borrow_mut().take() {
        return Err(error);
    }
    write_config(
        (from, parts),
        to,
        quantization,
        shapes.contains_key("lm_head.weight"),
    )?;

    // What counts is what is on the disk.
    check(to, shapes, quantization)?;
    let hashes = making.hashes.borrow();
    for path in checkpoint_files(to)? {
        let file = TensorFile::open(&path)?;
        for (name, view) in file.tensors()?.iter() {
            if hashes.get(name) != Some(&hash(view.data())) {
                return Err(WeightsError::Format {
                    path: path.clone(),
                    reason: format!("tensor `{name}` reads back differently from what was written"),
                });
            }
        }
    }
    Ok(())
}

/// The original's `config.json` with its entry about quantisation, and tied no more where the head is one
/// of its own in spite of the config.
fn write_config(
    (from, parts): (&Path, &GgufParts),
    to: &Path,
    quantization: Quantization,
    own_head: bool,
) -> Result<(), WeightsError> {
    let path = from.join("config.json");
    let text = match gguf::is_model(from) {
        false => fs::read_to_string(&path).map_err(|cause| FileError::read(&path, cause))?,
        true => Qwen3VlConfig::from_model(from, parts)
            .map_err(|cause| WeightsError::Gguf {
                path: from.to_path_buf(),
                reason: cause.to_string(),
            })?
            .to_published_json("bfloat16"),
    };
    let mut tree: Value = serde_json::from_str(&text).map_err(|cause| WeightsError::Format {
        path: path.clone(),
        reason: cause.to_string(),
    })?;
    tree["quantization_config"] = to_config(quantization);
    tree["tie_word_embeddings"] = Value::Bool(!own_head);
    write_atomic(&to.join("config.json"), |out: &mut dyn Write| {
        serde_json::to_writer_pretty(&mut *out, &tree)?;
        out.write_all(b"\n")
    })?;
    Ok(())
}
