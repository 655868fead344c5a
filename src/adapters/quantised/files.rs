//! Format of a quantised checkpoint on disk: keys, types, and the entry in `config.json`.
//!
//! A quantised matrix `X.weight` is stored as `X.weight_packed`, I32 `[out, words]`, and `X.weight_scale`,
//! F32 or F16 `[out, scales]`; see
//! [`quantised`](crate::ops::quantised) for words and scales. `config.json` says how in
//! `quantization_config`. Everything else is as in any checkpoint.

use std::{fs, path::Path};

use burn::tensor::DType;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::{
    ops::quantised::{Format, Quantization},
    qwen3_vl::weights::{OWN_METHOD, WeightsError, gguf::is_model},
};

/// Version of the layout.
const VERSION: u64 = 1;

/// Which tensor of a quantised matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The words.
    Words,
    /// The scales.
    Scales,
}

impl Part {
    /// Key of this part of the parameter `path`.
    pub fn key(self, path: &str) -> String {
        match self {
            Self::Words => format!("{path}_packed"),
            Self::Scales => format!("{path}_scale"),
        }
    }

    /// The part that a key names, and the parameter it belongs to.
    pub fn of_key(key: &str) -> Option<(Self, &str)> {
        [(Self::Words, "_packed"), (Self::Scales, "_scale")]
            .into_iter()
            .find_map(|(part, suffix)| {
                let path = key.strip_suffix(suffix)?;
                path.ends_with(".weight").then_some((part, path))
            })
    }

    /// Shape in the file, for a matrix `[rows, d_input]`.
    pub fn shape(self, [rows, d_input]: [usize; 2], format: Format) -> Vec<usize> {
        match self {
            Self::Words => vec![rows, format.words(d_input)],
            Self::Scales => vec![rows, format.scales(d_input)],
        }
    }

    /// Type in the file.
    pub fn dtype(self, format: Format) -> (DType, Dtype) {
        match (self, format.scale_dtype()) {
            (Self::Words, _) => (DType::I32, Dtype::I32),
            (Self::Scales, DType::F16) => (DType::F16, Dtype::F16),
            (Self::Scales, _) => (DType::F32, Dtype::F32),
        }
    }
}

/// The entry for `config.json`.
pub fn to_config(quantization: Quantization) -> Value {
    let layers = quantization.layers;
    json!({
        "quant_method": OWN_METHOD,
        "version": VERSION,
        "bits": layers.bits(),
        "group_size": match layers {
            Format::Int8 => None,
            Format::Int4 { group } => Some(group),
        },
        "embedding_bits": Format::Int8.bits(),
        "symmetric": true,
    })
}

/// How this program quantised the checkpoint in `dir`; `None` if it did not. Weights that others quantised
/// are floats once they are read ([`Checkpoint`](crate::qwen3_vl::weights::Checkpoint)), which refuses those that
/// it cannot read.
///
/// # Errors
/// [`WeightsError::Read`], and [`WeightsError::Quantization`] for a format that is not supported.
pub fn of_checkpoint(dir: &Path) -> Result<Option<Quantization>, WeightsError> {
    if is_model(dir) {
        return Ok(None);
    }
    let path = dir.join("config.json");
    let refuse = |reason: String| WeightsError::Quantization {
        path: path.clone(),
        reason,
    };
    let text = fs::read_to_string(&path).map_err(|cause| WeightsError::Read {
        path: path.clone(),
        cause,
    })?;
    let tree: Value = serde_json::from_str(&text).map_err(|cause| refuse(cause.to_string()))?;
    let Some(entry) = tree
        .get("quantization_config")
        .filter(|entry| entry.get("quant_method").and_then(Value::as_str) == Some(OWN_METHOD))
    else {
        return Ok(None);
    };
    let number = |key: &str| entry.get(key).and_then(Value::as_u64);
    if number("version") != Some(VERSION) {
        return Err(refuse(format!(
            "key `quantization_config.version` is {}, expected {VERSION}; write the checkpoint anew with `quantize`",
            entry.get("version").unwrap_or(&Value::Null)
        )));
    }
    let bits = number("bits").unwrap_or(0) as usize;
    let group = number("group_size").map(|group| group as usize);
    Quantization::new(bits, group)
        .map(Some)
        .map_err(|reason| refuse(format!("key `quantization_config`: {reason}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(entry: &Value) -> Result<Option<Quantization>, String> {
        let dir = tempfile::tempdir().unwrap();
        let text = json!({"quantization_config": entry}).to_string();
        fs::write(dir.path().join("config.json"), text).unwrap();
        of_checkpoint(dir.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_written_reads_the_same() {
        for text in ["int8", "int4", "int4:32"] {
            let quantization = text.parse().unwrap();
            assert_eq!(read(&to_config(quantization)), Ok(Some(quantization)));
        }
        assert_eq!(read(&Value::Null), Ok(None));
    }

    #[test]
    fn other_forms_are_refused_with_a_next_step() {
        let mut newer = to_config("int8".parse().unwrap());
        newer["version"] = json!(2);
        let mut odd = to_config("int4".parse().unwrap());
        odd["group_size"] = json!(48);
        for (entry, pieces) in [
            (newer, ["version` is 2", "quantize"]),
            (odd, ["groups of 48", "32 or 64"]),
        ] {
            let error = read(&entry).unwrap_err();
            for piece in ["config.json"].iter().chain(&pieces) {
                assert!(error.contains(piece), "{error}");
            }
        }
    }

    #[test]
    fn keys_lead_back_to_their_parameter() {
        for part in [Part::Words, Part::Scales] {
            let key = part.key("lm_head.weight");
            assert_eq!(Part::of_key(&key), Some((part, "lm_head.weight")));
        }
        assert_eq!(Part::of_key("lm_head.weight"), None);
        assert_eq!(Part::of_key("input_scale"), None);
    }
}
