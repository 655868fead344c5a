//! Quantised weights as other tools publish them: what `quantization_config` says, and which tensors of the
//! files make one matrix.
//!
//! A matrix is dequantised exactly as the tool's own code does it, its roundings included. Which layers are
//! quantised is seen from their tensors; the lists of the config are checked against that. A key of the
//! config that is not known, or asks for something else, is an error.

mod affine;
mod awq;
mod bnb;
mod compressed;
mod config;
mod fp8;
mod gptq;
mod numbers;
mod scaled;

use std::{collections::BTreeMap, path::Path};

use serde_json::Value;

use super::{
    WeightsError,
    stored::{Decode, RawTensor, RawTensors, Source, Stored},
};
use config::Keys;
pub(super) use numbers::Slice;

/// Name of this program's own method, whose tensors stay packed.
pub const OWN_METHOD: &str = "xray-qwen3vl";

/// How the weights of a checkpoint are quantised.
pub(super) enum Scheme {
    /// Blocks of `float8_e4m3fn`, as Qwen and DeepSeek publish them.
    Fp8(fp8::Fp8),
    /// AutoAWQ's `gemm` layout.
    Awq(awq::Awq),
    /// AutoGPTQ's and GPTQModel's layout.
    Gptq(gptq::Gptq),
    /// compressed-tensors (llm-compressor).
    CompressedTensors(compressed::CompressedTensors),
    /// bitsandbytes, 4 or 8 bits.
    BitsAndBytes(bnb::BitsAndBytes),
}

/// How the checkpoint in `dir` is quantised; `None` if it is not, or by this program.
///
/// # Errors
/// [`WeightsError::Read`] and [`WeightsError::Quantization`].
pub(super) fn read(dir: &Path) -> Result<Option<Scheme>, WeightsError> {
    let path = dir.join("config.json");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        // Weights alone, as tests and fingerprints read them.
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(WeightsError::Read { path, cause }),
    };
    let refuse = |reason: String| WeightsError::Quantization {
        path: path.clone(),
        reason,
    };
    let tree: Value = serde_json::from_str(&text).map_err(|cause| refuse(cause.to_string()))?;
    // MLX has a key of its own, and no method in it.
    let bits_alone =
        |entry: &Value| entry.get("bits").is_some() && entry.get("quant_method").is_none();
    if let Some(entry) = ["quantization", "quantization_config"]
        .iter()
        .filter_map(|key| tree.get(key))
        .find(|entry| bits_alone(entry))
    {
        return Err(refuse(format!(
            "weights quantised by MLX ({entry}) are not read here; {CURE}"
        )));
    }
    let older = dir.join("quantize_config.json");
    let (path, entry) = match tree.get("quantization_config") {
        Some(entry) if !entry.is_null() => (path.clone(), entry.clone()),
        // AutoGPTQ's own file, from before the key was in `config.json`.
        _ if older.is_file() => {
            let text = std::fs::read_to_string(&older).map_err(|cause| WeightsError::Read {
                path: older.clone(),
                cause,
            })?;
            let mut entry: Value =
                serde_json::from_str(&text).map_err(|cause| WeightsError::Quantization {
                    path: older.clone(),
                    reason: cause.to_string(),
                })?;
            if let Some(map) = entry.as_object_mut() {
                map.entry("quant_method").or_insert("gptq".into());
            }
            (older, entry)
        }
        _ => return Ok(None),
    };
    let keys = Keys::new(&path, &entry)?;
    let method = keys.text("quant_method")?;
    let scheme = match method.as_deref() {
        Some(OWN_METHOD) => return Ok(None),
        Some("fp8") => Scheme::Fp8(fp8::Fp8::read(&keys)?),
        Some("awq") => Scheme::Awq(awq::Awq::read(&keys)?),
        Some("gptq") => Scheme::Gptq(gptq::Gptq::read(&keys)?),
        Some("compressed-tensors") => {
            Scheme::CompressedTensors(compressed::CompressedTensors::read(&keys)?)
        }
        Some("bitsandbytes") => Scheme::BitsAndBytes(bnb::BitsAndBytes::read(&keys)?),
        method => {
            return Err(keys.refuse(format!(
                "weights quantised by {} are not read here; {CURE}",
                method.map_or("an unnamed method".to_string(), named)
            )));
        }
    };
    keys.finish()?;
    Ok(Some(scheme))
}

const CURE: &str = "take the checkpoint in 16 bits and load it with --quantize, or write it with `quantize`; quantised are read: fp8, awq, gptq, compressed-tensors, bitsandbytes, GGUF and what `quantize` writes";

/// A method as its authors call it.
fn named(method: &str) -> String {
    let name = match method {
        "torchao" => "TorchAO",
        "eetq" => "EETQ",
        "hqq" => "HQQ",
        "aqlm" => "AQLM",
        "quanto" => "Quanto",
        "vptq" => "VPTQ",
        "fbgemm_fp8" => "FBGEMM",
        "auto-round" => "AutoRound",
        "modelopt" => "NVIDIA's ModelOpt",
        "quark" => "AMD's Quark",
        _ => return format!("`{method}`"),
    };
    format!("{name} (`{method}`)")
}

impl Scheme {
    /// As it is called in messages.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Fp8(_) => "fp8".to_string(),
            Self::Awq(_) => "4-bit AWQ".to_string(),
            Self::Gptq(gptq) => format!("{}-bit GPTQ", gptq.bits),
            Self::CompressedTensors(_) => "compressed-tensors".to_string(),
            Self::BitsAndBytes(bnb) => format!("{}-bit bitsandbytes", bnb.bits),
        }
    }

    /// What else there is to know, as the end of a sentence.
    pub(super) fn note(&self) -> String {
        let activations = match self {
            Self::Fp8(_) => true,
            Self::CompressedTensors(config) => config.has_activations(),
            _ => false,
        };
        if activations {
            "; activations are not quantised here, so answers are those of the weights alone"
                .to_string()
        } else {
            String::new()
        }
    }

    /// Takes the tensors of all quantised matrices out of `raw`.
    pub(super) fn take(
        &self,
        model: &Path,
        raw: &mut RawTensors,
    ) -> Result<BTreeMap<String, Stored>, WeightsError> {
        let mut taken = Taken {
            model,
            raw,
            tensors: BTreeMap::new(),
        };
        match self {
            Self::Fp8(scheme) => scheme.take(&mut taken)?,
            Self::Awq(scheme) => scheme.take(&mut taken)?,
            Self::Gptq(scheme) => scheme.take(&mut taken)?,
            Self::CompressedTensors(scheme) => scheme.take(&mut taken)?,
            Self::BitsAndBytes(scheme) => scheme.take(&mut taken)?,
        }
        Ok(taken.tensors)
    }
}

/// Tensors that are put together to matrices.
struct Taken<'a> {
    model: &'a Path,
    raw: &'a mut RawTensors,
    tensors: BTreeMap<String, Stored>,
}

impl Taken<'_> {
    /// Layers with a tensor of this ending, by their name in the module tree.
    fn layers(&self, ending: &str) -> Vec<String> {
        self.raw
            .keys()
            .filter_map(|name| name.strip_suffix(ending)?.strip_suffix('.'))
            .map(str::to_owned)
            .collect()
    }

    /// Takes the tensor `LAYER.ENDING`, where it is there.
    fn optional(&mut self, layer: &str, ending: &str) -> Option<RawTensor> {
        self.raw.remove(&format!("{layer}.{ending}"))
    }

    /// Takes the tensor `LAYER.ENDING`.
    fn part(&mut self, layer: &str, ending: &str) -> Result<RawTensor, WeightsError> {
        self.optional(layer, ending)
            .ok_or_else(|| WeightsError::Missing {
                path: self.model.to_path_buf(),
                count: 1,
                first: format!("{layer}.{ending}"),
            })
    }

    /// Puts a matrix in; its place is that of `main`.
    fn put(
        &mut self,
        layer: &str,
        main: &RawTensor,
        shape: [usize; 2],
        decoder: impl Decode + 'static,
    ) {
        let start = main
            .file
            .entry(&main.key)
            .map_or(0, |entry| entry.bytes.start);
        let stored = Stored {
            path: main.file.path().to_path_buf(),
            shape: shape.to_vec(),
            place: (main.number, start),
            source: Source::Decoded(Box::new(decoder)),
        };
        self.tensors.insert(format!("{layer}.weight"), stored);
    }
}

/// The error of a tensor that is not as its method stores it.
fn wrong(tensor: &RawTensor, expected: impl std::fmt::Display) -> WeightsError {
    let found = tensor
        .file
        .entry(&tensor.key)
        .map_or(String::new(), |entry| {
            format!("{:?} {:?}", entry.dtype, entry.shape)
        });
    WeightsError::Quantization {
        path: tensor.file.path().to_path_buf(),
        reason: format!("tensor `{}` is {found}, expected {expected}", tensor.key),
    }
}

/// The two sizes of a matrix.
fn dims(tensor: &RawTensor) -> Result<[usize; 2], WeightsError> {
    match tensor.stored()?.1 {
        [rows, columns] if *rows > 0 && *columns > 0 => Ok([*rows, *columns]),
        _ => Err(wrong(tensor, "a matrix")),
    }
}

/// Checks type and shape.
fn expect(
    tensor: &RawTensor,
    dtypes: &[safetensors::Dtype],
    shape: &[usize],
) -> Result<(), WeightsError> {
    let (dtype, found, _) = tensor.stored()?;
    if dtypes.contains(&dtype) && found == shape {
        return Ok(());
    }
    let names: Vec<String> = dtypes.iter().map(|dtype| format!("{dtype:?}")).collect();
    Err(wrong(tensor, format!("{} {shape:?}", names.join(" or "))))
}

/// Types of scales.
const FLOATS: [safetensors::Dtype; 3] = [
    safetensors::Dtype::F32,
    safetensors::Dtype::F16,
    safetensors::Dtype::BF16,
];
