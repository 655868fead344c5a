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
    Formats,
    files::{Part, formats_of, to_config},
    load::{check, pack_tensor},
};
use crate::{
    base::files::{FileError, write_atomic},
    ops::quantised::{Format, pack::QuantisedMatrix},
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
    /// Scales and zero points of matrices whose words are written, by key.
    of_groups: RefCell<HashMap<String, Vec<f32>>>,
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

/// Where the quantised matrix of a path comes from.
pub type MatrixSource =
    Rc<dyn Fn(&str, [usize; 2], Format) -> Result<QuantisedMatrix, WeightsError>>;

/// The parts of one matrix. Scales and zero points are kept when the words are made, which come first.
fn lazy_parts(
    making: &Rc<Making>,
    source: &MatrixSource,
    path: &str,
    dims: [usize; 2],
    format: Format,
) -> Vec<LazyTensor> {
    let packed = {
        let (source, path) = (source.clone(), path.to_string());
        move || source(&path, dims, format)
    };
    let of_groups = |matrix: QuantisedMatrix, path: &str| {
        [
            (Part::Scales.key(path), matrix.scales),
            (Part::Zeros.key(path), matrix.zeros),
        ]
    };
    let part = |part: &Part| {
        let (part, packed, path) = (*part, packed.clone(), path.to_string());
        let (key, shape, dtype) = (
            part.key(&path),
            part.shape(dims, format),
            part.dtype(format).0,
        );
        let (own, size) = (key.clone(), shape.clone());
        let make: Maker = Box::new(move |making: &Making| {
            let mut kept = making.of_groups.borrow_mut();
            if part == Part::Words {
                let mut matrix = packed()?;
                let words = std::mem::take(&mut matrix.words);
                kept.extend(of_groups(matrix, &path));
                return Ok(TensorData::new(words, size.clone()));
            }
            if !kept.contains_key(&own) {
                kept.extend(of_groups(packed()?, &path));
            }
            let values = kept.remove(&own).unwrap_or_default();
            Ok(TensorData::new(values, size.clone()).convert_dtype(dtype))
        });
        lazy(making, key, shape, dtype, make)
    };
    Part::of_format(format).iter().map(part).collect()
}

/// The tensors of the quantised checkpoint, in order of the files they come from.
fn packed_tensors(
    making: &Rc<Making>,
    checkpoint: &Rc<Checkpoint>,
    shapes: &BTreeMap<String, Vec<usize>>,
    formats: &Formats,
    source: &MatrixSource,
) -> Result<Vec<LazyTensor>, WeightsError> {
    let mut tensors = Vec::new();
    for (name, shape) in checkpoint.of_model(shapes)? {
        if let (Some(format), [rows, d_input]) = (formats.of(&name), shape.as_slice()) {
            let dims = [*rows, *d_input];
            tensors.extend(lazy_parts(making, source, &name, dims, format));
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
    formats: impl Into<Formats>,
    max_shard_bytes: usize,
) -> Result<(), WeightsError> {
    let checkpoint = Rc::new(open_floats(from, parts)?);
    let source: MatrixSource = {
        let checkpoint = checkpoint.clone();
        Rc::new(move |path, dims, format| pack_tensor(&checkpoint, path, dims, format))
    };
    write_matrices(
        (&checkpoint, parts),
        to,
        shapes,
        &formats.into(),
        &source,
        max_shard_bytes,
    )
}

/// Opens a checkpoint that this program has not quantised.
///
/// # Errors
/// [`WeightsError`] names the file; [`WeightsError::Quantization`] where it has.
pub fn open_floats(from: &Path, parts: &GgufParts) -> Result<Checkpoint, WeightsError> {
    if let Some(already) = formats_of(from)? {
        return Err(WeightsError::Quantization {
            path: from.to_path_buf(),
            reason: format!(
                "the weights are packed as {already} already; take the checkpoint they were made from"
            ),
        });
    }
    Checkpoint::open_with(from, parts)
}

/// [`write_quantised`] with matrices from `source`.
///
/// # Errors
/// As [`write_quantised`].
///
/// # Panics
/// If `formats` has no format for layers without one of their own.
pub fn write_matrices(
    (checkpoint, parts): (&Rc<Checkpoint>, &GgufParts),
    to: &Path,
    shapes: &BTreeMap<String, Vec<usize>>,
    formats: &Formats,
    source: &MatrixSource,
    max_shard_bytes: usize,
) -> Result<(), WeightsError> {
    let making = Rc::new(Making::default());
    let tensors = packed_tensors(&making, checkpoint, shapes, formats, source)?;
    save_tensors(&tensors, to, max_shard_bytes)?;
    if let Some(error) = making.problem.borrow_mut().take() {
        return Err(error);
    }
    write_config(
        (checkpoint.path(), parts),
        to,
        formats,
        shapes.contains_key("lm_head.weight"),
    )?;

    // What counts is what is on the disk.
    check(to, shapes, formats)?;
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
    formats: &Formats,
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
    tree["quantization_config"] =
        to_config(formats).expect("a quantised checkpoint has a format for its layers");
    tree["tie_word_embeddings"] = Value::Bool(!own_head);
    write_atomic(&to.join("config.json"), |out: &mut dyn Write| {
        serde_json::to_writer_pretty(&mut *out, &tree)?;
        out.write_all(b"\n")
    })?;
    Ok(())
}
