//! What can be wrong with the weights of a checkpoint.

use std::path::{Path, PathBuf};

use crate::base::files::FileError;

/// What can be wrong with the weights of a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// Neither a single file nor an index is there.
    #[error(
        "`{}` holds neither `{single}` nor `{single}.index.json`, nor either of `pytorch_model.bin`{}; expected the folder of a checkpoint in one of these forms",
        .dir.display(), other_weights(.dir)
    )]
    NoFile {
        /// The folder.
        dir: PathBuf,
        /// Name of the single file.
        single: String,
    },
    /// Files that the index names are not there.
    #[error(
        "`{}` names {count} file(s) that are not there, first `{first}`; download or copy the folder again",
        .index.display()
    )]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// How many.
        count: usize,
        /// The first in order of name.
        first: String,
    },
    /// Two keys are names of the same tensor.
    #[error(
        "`{}`: `{first}` and `{second}` are both names of the tensor `{name}`; remove one of them",
        .path.display()
    )]
    SameTensor {
        /// Checkpoint folder.
        path: PathBuf,
        /// The one key.
        first: String,
        /// The other.
        second: String,
        /// What the model calls it.
        name: String,
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
    #[error("`{}`: tensor `{name}` is stored as {found}, expected BF16, F16 or F32{}", .path.display(), quantised_hint(.found))]
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
    /// A file of PyTorch cannot be used.
    #[error("`{}`: {reason}", .path.display())]
    PyTorch {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// A GGUF file cannot be used.
    #[error("`{}`: {reason}", .path.display())]
    Gguf {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and what to do.
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
    if let Some(name) = found(|name| name.starts_with("pytorch_model") && name.contains(".bin")) {
        format!(
            ", but `{name}`; shards need their `pytorch_model.bin.index.json`: download the folder again"
        )
    } else if let Some(name) = found(|name| name.ends_with(".pt") || name.ends_with(".pth")) {
        format!(
            ", but `{name}`; the state dict of a whole model is called `pytorch_model.bin` as transformers names it"
        )
    } else if let Some(name) =
        found(|name| name.ends_with(".safetensors") && !name.starts_with("adapter"))
    {
        format!(
            ", but `{name}`; a single file is called `model.safetensors`, and shards need their `model.safetensors.index.json`: download the folder again"
        )
    } else if let Some(name) = found(|name| name == "tf_model.h5" || name == "flax_model.msgpack") {
        format!(", but `{name}`, weights of another framework, which are not read here")
    } else {
        String::new()
    }
}

/// What a type that is no float says about the file.
fn quantised_hint(found: &str) -> &'static str {
    match found {
        "U32" => {
            "; weights of MLX are of this type, and are not read here: take the original checkpoint and load it with --quantize"
        }
        "I32" | "I8" | "U8" | "F8_E4M3" | "F8_E5M2" | "F4" => {
            "; quantised weights need the key `quantization_config` in `config.json`, which says how: copy both from one checkpoint"
        }
        _ => "",
    }
}
