//! Format of a quantised checkpoint on disk: keys, types, and the entry in `config.json`.
//!
//! A quantised matrix `X.weight` is stored as `X.weight_packed`, I32 `[out, words]`, and `X.weight_scale`,
//! F32 or F16 `[out, scales]`, with zero points also as `X.weight_zero_point`, F16 `[out, scales]`; see
//! [`quantised`](crate::ops::quantised) for what they hold. `config.json` says how in
//! `quantization_config`, with `modules` for layers whose format is not that of their kind. Everything
//! else is as in any checkpoint.

use std::{collections::BTreeMap, fs, path::Path};

use burn::tensor::DType;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::{
    adapters::quantised::Formats,
    ops::quantised::{Format, Quantization},
    qwen3_vl::weights::{OWN_METHOD, WeightsError, gguf::is_model},
};

/// Version of the layout that has symmetric values, groups of 32 or 64, and one format for all layers.
const FIRST_VERSION: u64 = 1;

/// Version of the layout that has zero points, groups of 128, and layers in formats of their own.
const SECOND_VERSION: u64 = 2;

/// What `modules` says of a layer that stays as floats.
const FLOATS: &str = "float";

/// Which tensor of a quantised matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The words.
    Words,
    /// The scales.
    Scales,
    /// The zero points.
    Zeros,
}

impl Part {
    /// The parts of a matrix of this format.
    pub fn of_format(format: Format) -> &'static [Self] {
        match format.is_symmetric() {
            true => &[Self::Words, Self::Scales],
            false => &[Self::Words, Self::Scales, Self::Zeros],
        }
    }

    /// Key of this part of the parameter `path`.
    pub fn key(self, path: &str) -> String {
        match self {
            Self::Words => format!("{path}_packed"),
            Self::Scales => format!("{path}_scale"),
            Self::Zeros => format!("{path}_zero_point"),
        }
    }

    /// The part that a key names, and the parameter it belongs to.
    pub fn of_key(key: &str) -> Option<(Self, &str)> {
        [
            (Self::Words, "_packed"),
            (Self::Scales, "_scale"),
            (Self::Zeros, "_zero_point"),
        ]
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
            Self::Scales | Self::Zeros => vec![rows, format.scales(d_input)],
        }
    }

    /// Type in the file.
    pub fn dtype(self, format: Format) -> (DType, Dtype) {
        match (self, format.scale_dtype()) {
            (Self::Words, _) => (DType::I32, Dtype::I32),
            (_, DType::F16) => (DType::F16, Dtype::F16),
            (_, _) => (DType::F32, Dtype::F32),
        }
    }
}

/// The entry for `config.json`; a model whose layers without a format of their own are floats has none.
pub fn to_config(formats: &Formats) -> Option<Value> {
    let layers = formats.default?.layers;
    let (group, old_group) = match layers {
        Format::Int8 => (None, true),
        Format::Int4 { group } => (Some(group), group < 128),
        Format::Int4Zeros { group } => (Some(group), false),
    };
    let is_first = old_group && formats.own.is_empty();
    let mut entry = json!({
        "quant_method": OWN_METHOD,
        // Programs of the first version read what they can read, and refuse the rest.
        "version": if is_first { FIRST_VERSION } else { SECOND_VERSION },
        "bits": layers.bits(),
        "group_size": group,
        "embedding_bits": Format::Int8.bits(),
        "symmetric": layers.is_symmetric(),
    });
    if !formats.own.is_empty() {
        let own = formats.own.iter().map(|(layer, format)| {
            let name = format.map_or(FLOATS.to_string(), Format::spelling);
            (layer.clone(), Value::from(name))
        });
        entry["modules"] = Value::Object(own.collect());
    }
    Some(entry)
}

/// How this program quantised the layers of the checkpoint in `dir`, those aside that have a format of their
/// own ([`formats_of`]); `None` if it did not.
///
/// # Errors
/// As [`formats_of`].
pub fn of_checkpoint(dir: &Path) -> Result<Option<Quantization>, WeightsError> {
    Ok(formats_of(dir)?.and_then(|formats| formats.default))
}

/// How this program quantised the checkpoint in `dir`; `None` if it did not. Weights that others quantised
/// are floats once they are read ([`Checkpoint`](crate::qwen3_vl::weights::Checkpoint)), which refuses those that
/// it cannot read.
///
/// # Errors
/// [`WeightsError::Read`], and [`WeightsError::Quantization`] for a format that is not supported.
pub fn formats_of(dir: &Path) -> Result<Option<Formats>, WeightsError> {
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
    read_entry(entry).map(Some).map_err(refuse)
}

/// The keys of the entry; of what cannot be read, a sentence.
fn read_entry(entry: &Value) -> Result<Formats, String> {
    const KEYS: [&str; 7] = [
        "quant_method",
        "version",
        "bits",
        "group_size",
        "embedding_bits",
        "symmetric",
        "modules",
    ];
    const CURE: &str = "write the checkpoint anew with `quantize`";
    let version = entry.get("version").and_then(Value::as_u64);
    if ![Some(FIRST_VERSION), Some(SECOND_VERSION)].contains(&version) {
        return Err(format!(
            "key `quantization_config.version` is {}, expected {FIRST_VERSION} or {SECOND_VERSION}; {CURE}",
            entry.get("version").unwrap_or(&Value::Null)
        ));
    }
    let keys = entry.as_object().into_iter().flatten();
    if let Some((key, _)) = keys
        .into_iter()
        .find(|(key, _)| !KEYS.contains(&key.as_str()))
    {
        return Err(format!(
            "key `quantization_config.{key}` is not known; {CURE}"
        ));
    }
    let number = |key: &str| entry.get(key).and_then(Value::as_u64);
    if number("embedding_bits") != Some(Format::Int8.bits() as u64) {
        return Err(format!(
            "key `quantization_config.embedding_bits` is {}, expected 8; {CURE}",
            entry.get("embedding_bits").unwrap_or(&Value::Null)
        ));
    }
    let zeros = match entry.get("symmetric") {
        None | Some(Value::Bool(true)) => false,
        Some(Value::Bool(false)) => true,
        Some(other) => {
            return Err(format!(
                "key `quantization_config.symmetric` is {other}, expected true or false; {CURE}"
            ));
        }
    };
    let bits = number("bits").unwrap_or(0) as usize;
    let group = number("group_size").map(|group| group as usize);
    let layers = Format::new(bits, group, zeros)
        .map_err(|reason| format!("key `quantization_config`: {reason}"))?;
    let own = match entry.get("modules") {
        None => BTreeMap::new(),
        Some(Value::Object(modules)) => {
            let read = |(layer, format): (&String, &Value)| {
                let format = match format.as_str() {
                    Some(FLOATS) => Ok(None),
                    text => text.unwrap_or_default().parse().map(Some),
                };
                format
                    .map(|format| (layer.clone(), format))
                    .map_err(|reason| {
                        format!("key `quantization_config.modules.{layer}`: {reason}, or {FLOATS}")
                    })
            };
            modules.iter().map(read).collect::<Result<_, _>>()?
        }
        Some(other) => {
            return Err(format!(
                "key `quantization_config.modules` is {other}, expected a format for each layer; {CURE}"
            ));
        }
    };
    Ok(Formats {
        default: Some(Quantization { layers }),
        own,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(entry: &Value) -> Result<Option<Formats>, String> {
        let dir = tempfile::tempdir().unwrap();
        let text = json!({"quantization_config": entry}).to_string();
        fs::write(dir.path().join("config.json"), text).unwrap();
        formats_of(dir.path()).map_err(|error| error.to_string())
    }

    fn entry(text: &str) -> Value {
        let quantization: Quantization = text.parse().unwrap();
        to_config(&quantization.into()).unwrap()
    }

    #[test]
    fn what_is_written_reads_the_same() {
        for (text, version) in [
            ("int8", 1),
            ("int4", 1),
            ("int4:32", 1),
            ("int4:128", 2),
            ("int4:64:zero", 2),
        ] {
            let quantization: Quantization = text.parse().unwrap();
            let mut formats = Formats::from(quantization);
            let written = to_config(&formats).unwrap();
            assert_eq!(written["version"], version, "{text}");
            assert_eq!(read(&written), Ok(Some(formats.clone())));
            formats.set("model.visual.merger.linear_fc1", None);
            formats.set("lm_head", Some(Format::Int4Zeros { group: 32 }));
            let written = to_config(&formats).unwrap();
            assert_eq!(written["version"], 2, "{text}");
            assert_eq!(read(&written), Ok(Some(formats)));
        }
        assert_eq!(read(&Value::Null), Ok(None));
        assert_eq!(to_config(&Formats::default()), None);
    }

    #[test]
    fn files_of_the_first_version_read_as_they_did() {
        let old = json!({
            "quant_method": OWN_METHOD, "version": 1, "bits": 4, "group_size": 32,
            "embedding_bits": 8, "symmetric": true,
        });
        let quantization: Quantization = "int4:32".parse().unwrap();
        assert_eq!(read(&old), Ok(Some(quantization.into())));
    }

    #[test]
    fn other_forms_are_refused_with_a_next_step() {
        let with = |key: &str, value: Value| {
            let mut entry = entry("int4");
            entry[key] = value;
            entry
        };
        for (entry, pieces) in [
            (with("version", json!(3)), ["version` is 3", "quantize"]),
            (with("group_size", json!(48)), ["groups of 48", "32, 64"]),
            (
                with("modules", json!({"lm_head": "int5"})),
                ["modules.lm_head", "float"],
            ),
            (with("modules", json!(["lm_head"])), ["modules", "quantize"]),
            (with("symmetric", json!("no")), ["symmetric", "true"]),
            (with("embedding_bits", json!(4)), ["embedding_bits", "8"]),
            (with("order", json!(1)), ["order", "not known"]),
        ] {
            let error = read(&entry).unwrap_err();
            for piece in ["config.json"].iter().chain(&pieces) {
                assert!(error.contains(piece), "{error}");
            }
        }
    }

    #[test]
    fn keys_lead_back_to_their_parameter() {
        for part in [Part::Words, Part::Scales, Part::Zeros] {
            let key = part.key("lm_head.weight");
            assert_eq!(Part::of_key(&key), Some((part, "lm_head.weight")));
        }
        assert_eq!(Part::of_key("lm_head.weight"), None);
        assert_eq!(Part::of_key("input_scale"), None);
    }
}
