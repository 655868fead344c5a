//! PEFT's `adapter_config.json`: which layers, which rank, which scaling.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::base::files::hint::file_hint;
use fancy_regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// What can be wrong with an adapter.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// The config cannot be read.
    #[error("cannot read `{}`: {cause}; expected a PEFT adapter folder with `adapter_config.json` and `adapter_model.safetensors`{}", .path.display(), file_hint(.path))]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// The config is not JSON or a key has another type.
    #[error("`{}`: {cause}", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why, with the key.
        cause: serde_json::Error,
    },
    /// A key has a value that is not supported.
    #[error("`{}`: key `{key}` is {found}, which is not supported; expected {expected}", .path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What would be accepted.
        expected: String,
    },
    /// The folder holds no adapter, but something that says where one is.
    #[error("`{}` is not the folder of an adapter: {hint}", .dir.display())]
    Folder {
        /// The folder.
        dir: PathBuf,
        /// What is there, and what to name in its place.
        hint: String,
    },
    /// `target_modules` is no regular expression.
    #[error("target_modules `{pattern}` is not a regular expression: {reason}")]
    Pattern {
        /// As given.
        pattern: String,
        /// Why.
        reason: String,
    },
    /// No layer of the model is adapted.
    #[error(
        "target_modules {targets} match no linear layer of the model; layers are named like `model.language_model.layers.0.self_attn.q_proj`"
    )]
    NoTarget {
        /// As given.
        targets: String,
    },
    /// A layer has an adapter already.
    #[error(
        "layer `{layer}` has an adapter already; on quantised weights adapters stay apart, and a layer takes one: leave out --adapter, or merge it before quantising"
    )]
    Attached {
        /// Path of the layer.
        layer: String,
    },
    /// An adapter tensor has no place in this model, or another shape.
    #[error("`{}`: {reason}; is the adapter for another base model?", .path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// The tensor, what was expected and what was found.
        reason: String,
    },
    /// The tensors cannot be read or written.
    #[error(transparent)]
    Weights(#[from] crate::qwen3_vl::weights::WeightsError),
    /// A file cannot be written.
    #[error(transparent)]
    File(#[from] crate::base::files::FileError),
}

/// `target_modules` and `exclude_modules`: a regular expression, names, or `all-linear`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(untagged)]
pub enum TargetModules {
    /// `all-linear`, or a regular expression that must match a module's whole path.
    Pattern(String),
    /// Last parts of paths.
    Names(Vec<String>),
}

impl Default for TargetModules {
    fn default() -> Self {
        Self::Pattern("all-linear".to_string())
    }
}

impl std::fmt::Display for TargetModules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pattern(pattern) => write!(f, "`{pattern}`"),
            Self::Names(names) => write!(f, "{names:?}"),
        }
    }
}

/// What an adapter is made of, in PEFT's words.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// Numerator of the scaling.
    pub lora_alpha: f64,
    /// Share of inputs dropped during training.
    pub lora_dropout: f64,
    /// Which linear layers are adapted.
    pub target_modules: TargetModules,
    /// Which of these are left out after all.
    pub exclude_modules: Option<TargetModules>,
    /// Scales by `alpha / √r` in place of `alpha / r`.
    pub use_rslora: bool,
    /// Trains row magnitudes apart from directions.
    pub use_dora: bool,
    /// Ranks that differ, by the end of a path.
    pub rank_pattern: Patterns<usize>,
    /// Alphas that differ, by the end of a path.
    pub alpha_pattern: Patterns<f64>,
    /// Layer numbers adapted; all when absent.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Where the base model came from; a note only.
    pub base_model_name_or_path: Option<String>,
}

impl Default for LoraConfig {
    /// The published recipe.
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 32.0,
            lora_dropout: 0.05,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            use_rslora: false,
            use_dora: false,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            layers_to_transform: None,
            base_model_name_or_path: None,
        }
    }
}

#[derive(Deserialize)]
struct RawConfig {
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    target_modules: Option<TargetModules>,
    exclude_modules: Option<TargetModules>,
    #[serde(default)]
    use_rslora: Option<bool>,
    #[serde(default)]
    use_dora: Option<bool>,
    rank_pattern: Option<Patterns<usize>>,
    alpha_pattern: Option<Patterns<f64>>,
    layers_to_transform: Option<LayerNumbers>,
    base_model_name_or_path: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum LayerNumbers {
    One(usize),
    Many(Vec<usize>),
}

/// Keys that change the arithmetic and are not done here, with the values that mean "off".
const MUST_BE_OFF: &[&str] = &[
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
];

/// Values of `init_lora_weights` that leave the base as it is, so that the file's tensors belong to it.
///
/// The others (`pissa`, `pissa_niter_N`, `olora`, `corda`, `loftq`, `lora_ga` …) take their part out of the
/// base's weights when training begins, and PEFT does so again at load.
///
/// Source: `LoraLayer.update_layer`, PEFT, `tuners/lora/layer.py`.
const BASE_AS_IT_IS: &[&str] = &["gaussian", "orthogonal", "eva"];

/// What is in a folder without `adapter_config.json` and helps to find the adapter that was meant.
fn find_adapter(dir: &Path) -> Option<String> {
    let best = fs::read_to_string(dir.join("best.json")).ok();
    let best = best.and_then(|text| serde_json::from_str::<Value>(&text).ok());
    let step = best.as_ref().and_then(|best| best.get("step")?.as_u64());
    if let Some(step) = step {
        return Some(format!(
            "it is that of a run, whose best checkpoint is `{}`",
            dir.join(format!("checkpoint-{step}")).display()
        ));
    }
    let mut folders: Vec<PathBuf> = fs::read_dir(dir)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join("adapter_config.json").is_file())
        .collect();
    folders.sort();
    let named: Vec<String> = folders
        .iter()
        .take(4)
        .map(|path| format!("`{}`", path.display()))
        .collect();
    (!named.is_empty()).then(|| format!("adapters are in {}", named.join(", ")))
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    }
}

impl LoraConfig {
    /// Reads `adapter_config.json` in `dir`.
    ///
    /// # Errors
    /// [`AdapterError`] names the file and the key.
    pub fn from_dir(dir: &Path) -> Result<Self, AdapterError> {
        let path = dir.join("adapter_config.json");
        let text = fs::read_to_string(&path).map_err(|cause| match find_adapter(dir) {
            Some(hint) => AdapterError::Folder {
                dir: dir.to_path_buf(),
                hint,
            },
            None => AdapterError::Read {
                path: path.clone(),
                cause,
            },
        })?;
        let parse = |cause| AdapterError::Parse {
            path: path.clone(),
            cause,
        };
        let tree: Map<String, Value> = serde_json::from_str(&text).map_err(parse)?;
        let unsupported = |key: &str, found: &Value, expected: &str| AdapterError::Unsupported {
            path: path.clone(),
            key: key.to_string(),
            found: found.to_string(),
            expected: expected.to_string(),
        };
        if let Some(kind) = tree.get("peft_type").filter(|kind| *kind != "LORA") {
            return Err(unsupported("peft_type", kind, "`LORA`"));
        }
        if let Some(bias) = tree.get("bias").filter(|bias| *bias != "none") {
            return Err(unsupported("bias", bias, "`none`"));
        }
        let init = tree.get("init_lora_weights").unwrap_or(&Value::Null);
        let kept = match init {
            Value::Null | Value::Bool(_) => true,
            Value::String(name) => BASE_AS_IT_IS.contains(&name.to_lowercase().as_str()),
            _ => false,
        };
        if !kept {
            return Err(unsupported(
                "init_lora_weights",
                init,
                "true, false, `gaussian`, `orthogonal` or `eva`: the tensors of this adapter belong to a base that PEFT has changed; \
                 write it with `save_pretrained(DIR, path_initial_model_for_weight_conversion=…)`, which makes it a plain LoRA of the original base",
            ));
        }
        // The layers' list of this model, and PEFT's default.
        if let Some(pattern) = tree
            .get("layers_pattern")
            .filter(|value| !is_off(value) && **value != "layers" && **value != json!(["layers"]))
        {
            return Err(unsupported("layers_pattern", pattern, "`layers`"));
        }
        for key in MUST_BE_OFF {
            if let Some(value) = tree.get(*key).filter(|value| !is_off(value)) {
                return Err(unsupported(key, value, "it absent, null, false or empty"));
            }
        }
        let raw: RawConfig = serde_json::from_value(Value::Object(tree)).map_err(parse)?;
        // Far above any use; a size from a damaged file must not be allocated.
        let ranks = raw
            .rank_pattern
            .iter()
            .flat_map(|ranks| ranks.0.iter().map(|(_, r)| *r));
        if let Some(r) = ranks.chain([raw.r]).find(|r| !(1..=65_536).contains(r)) {
            return Err(unsupported("r", &Value::from(r), "a rank from 1 to 65536"));
        }
        Ok(Self {
            r: raw.r,
            lora_alpha: raw.lora_alpha,
            lora_dropout: raw.lora_dropout,
            target_modules: raw.target_modules.unwrap_or_default(),
            exclude_modules: raw.exclude_modules,
            use_rslora: raw.use_rslora.unwrap_or(false),
            use_dora: raw.use_dora.unwrap_or(false),
            rank_pattern: raw.rank_pattern.unwrap_or_default(),
            alpha_pattern: raw.alpha_pattern.unwrap_or_default(),
            layers_to_transform: raw
                .layers_to_transform
                .map(|layers| match layers {
                    LayerNumbers::One(layer) => vec![layer],
                    LayerNumbers::Many(layers) => layers,
                })
                // As PEFT: an empty list chooses nothing.
                .filter(|layers| !layers.is_empty()),
            base_model_name_or_path: raw.base_model_name_or_path,
        })
    }

    /// The text of an `adapter_config.json` that PEFT and ms-swift read.
    pub fn to_json(&self) -> String {
        let tree = json!({
            "alpha_pattern": self.alpha_pattern,
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "exclude_modules": self.exclude_modules,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": self.layers_to_transform,
            "loftq_config": {},
            "lora_alpha": number(self.lora_alpha),
            "lora_bias": false,
            "lora_dropout": self.lora_dropout,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": [],
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": self.rank_pattern,
            "revision": null,
            "target_modules": self.target_modules,
            "task_type": "CAUSAL_LM",
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        });
        let mut text = serde_json::to_string_pretty(&tree).unwrap_or_default();
        text.push('\n');
        text
    }

    /// The matcher for module paths.
    ///
    /// # Errors
    /// [`AdapterError::Pattern`].
    pub fn matcher(&self) -> Result<TargetMatcher, AdapterError> {
        Ok(TargetMatcher {
            targets: Matcher::new(&self.target_modules)?,
            excluded: self
                .exclude_modules
                .as_ref()
                .map(Matcher::new)
                .transpose()?,
            layers: self.layers_to_transform.clone(),
        })
    }

    /// Rank of the layer at `path`.
    ///
    /// # Errors
    /// [`AdapterError::Pattern`] for a key that is no regular expression.
    pub fn rank_of(&self, path: &str) -> Result<usize, AdapterError> {
        Ok(pattern_value(&self.rank_pattern, path)?.unwrap_or(self.r))
    }

    /// Scaling of the layer at `path`.
    ///
    /// # Errors
    /// [`AdapterError::Pattern`] for a key that is no regular expression.
    pub fn scaling_of(&self, path: &str) -> Result<f64, AdapterError> {
        let alpha = pattern_value(&self.alpha_pattern, path)?.unwrap_or(self.lora_alpha);
        let rank = self.rank_of(path)? as f64;
        Ok(if self.use_rslora {
            alpha / rank.sqrt()
        } else {
            alpha / rank
        })
    }
}

/// Whole numbers are written without a fraction, as PEFT does.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        Value::from(value as i64)
    } else {
        Value::from(value)
    }
}

/// Values by pattern, in the order of the file: the first that matches counts.
#[derive(Debug, Clone, PartialEq)]
pub struct Patterns<T>(pub Vec<(String, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Serialize> Serialize for Patterns<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

impl<'de, T: serde::de::DeserializeOwned> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = Map::<String, Value>::deserialize(deserializer)?;
        map.into_iter()
            .map(|(key, value)| {
                Ok((
                    key,
                    T::deserialize(value).map_err(serde::de::Error::custom)?,
                ))
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// PEFT's rule: the first key that matches the end of the path.
fn pattern_value<T: Copy>(patterns: &Patterns<T>, path: &str) -> Result<Option<T>, AdapterError> {
    for (key, value) in &patterns.0 {
        if compile(&format!(r"^(?:(?:.*\.)?(?:{key}))$"))?
            .is_match(path)
            .unwrap_or(false)
        {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

fn compile(pattern: &str) -> Result<Regex, AdapterError> {
    // Python's end of the text has another letter here.
    Regex::new(&pattern.replace(r"\Z", r"\z")).map_err(|cause| AdapterError::Pattern {
        pattern: pattern.to_string(),
        reason: cause.to_string(),
    })
}

enum Matcher {
    AllLinear,
    Pattern(Regex),
    Names(Vec<String>),
}

impl Matcher {
    fn new(targets: &TargetModules) -> Result<Self, AdapterError> {
        Ok(match targets {
            TargetModules::Pattern(pattern) if pattern == "all-linear" => Self::AllLinear,
            // The whole path must match, as with Python's `re.fullmatch`.
            TargetModules::Pattern(pattern) => Self::Pattern(compile(&format!("^(?:{pattern})$"))?),
            TargetModules::Names(names) => Self::Names(names.clone()),
        })
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            // The head is an output layer, which PEFT leaves out of `all-linear`.
            Self::AllLinear => path != "lm_head",
            Self::Pattern(pattern) => pattern.is_match(path).unwrap_or(false),
            Self::Names(names) => names.iter().any(|name| {
                path == name
                    || path
                        .strip_suffix(name.as_str())
                        .is_some_and(|head| head.ends_with('.'))
            }),
        }
    }
}

/// Decides for a module path whether it is adapted.
pub struct TargetMatcher {
    targets: Matcher,
    excluded: Option<Matcher>,
    layers: Option<Vec<usize>>,
}

impl TargetMatcher {
    /// Whether the linear layer at `path` is adapted.
    ///
    /// Source: `check_target_module_exists`, PEFT, `tuners/tuners_utils.py`.
    pub fn matches(&self, path: &str) -> bool {
        if self
            .excluded
            .as_ref()
            .is_some_and(|excluded| excluded.matches(path))
        {
            return false;
        }
        // PEFT looks at the layers only where a name is not the whole path.
        if matches!(&self.targets, Matcher::Names(names) if names.iter().any(|name| name == path)) {
            return true;
        }
        let in_layers = self.layers.as_ref().is_none_or(|layers| {
            path.split('.')
                .filter_map(|part| part.parse::<usize>().ok())
                .next()
                .is_some_and(|layer| layers.contains(&layer))
        });
        in_layers && self.targets.matches(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(targets: TargetModules, path: &str) -> bool {
        let config = LoraConfig {
            target_modules: targets,
            ..LoraConfig::default()
        };
        config.matcher().unwrap().matches(path)
    }

    const Q: &str = "model.language_model.layers.3.self_attn.q_proj";
    const VISUAL: &str = "model.visual.blocks.0.attn.qkv";

    #[test]
    fn a_pattern_must_match_the_whole_path() {
        let pattern = |text: &str| TargetModules::Pattern(text.to_string());
        assert!(matches(pattern(r".*\.q_proj"), Q));
        assert!(!matches(pattern("q_proj"), Q));
        // As ms-swift writes it, with a lookahead.
        let swift = r"^(model.language_model(?=\.).*\.(q_proj|k_proj))$";
        assert!(matches(pattern(swift), Q));
        assert!(!matches(pattern(swift), VISUAL));
        assert!(matches(pattern("all-linear"), VISUAL));
        assert!(!matches(pattern("all-linear"), "lm_head"));
    }

    #[test]
    fn a_name_matches_whole_parts_of_the_path_only() {
        let names = |names: &[&str]| {
            TargetModules::Names(names.iter().map(|name| name.to_string()).collect())
        };
        assert!(matches(names(&["q_proj"]), Q));
        assert!(matches(names(&["self_attn.q_proj"]), Q));
        assert!(!matches(names(&["proj"]), Q));
        assert!(!matches(names(&["_proj"]), Q));
    }

    #[test]
    fn patterns_of_rank_and_alpha_decide_the_scaling() {
        let mut config = LoraConfig::default();
        assert_eq!(config.scaling_of(Q).unwrap(), 4.0);
        config.use_rslora = true;
        assert!((config.scaling_of(Q).unwrap() - 32.0 / 8f64.sqrt()).abs() < 1e-12);
        config
            .rank_pattern
            .0
            .push((r"layers\.3\..*q_proj".into(), 2));
        config.alpha_pattern.0.push(("q_proj".into(), 6.0));
        // The first that matches counts, as in PEFT.
        config
            .alpha_pattern
            .0
            .push((r"layers\.3\..*q_proj".into(), 99.0));
        config.use_rslora = false;
        assert_eq!(config.rank_of(Q).unwrap(), 2);
        assert_eq!(config.scaling_of(Q).unwrap(), 3.0);
        assert_eq!(config.rank_of(VISUAL).unwrap(), 8);
    }

    #[test]
    fn what_is_not_done_is_refused_by_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter_config.json");
        let base =
            r#"{"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": "all-linear""#;
        for (extra, key) in [
            (r#", "fan_in_fan_out": true}"#, "fan_in_fan_out"),
            (r#", "modules_to_save": ["lm_head"]}"#, "modules_to_save"),
            (r#", "bias": "all"}"#, "bias"),
        ] {
            fs::write(&path, format!("{base}{extra}")).unwrap();
            let error = LoraConfig::from_dir(dir.path()).unwrap_err().to_string();
            assert!(
                error.contains(key) && error.contains("adapter_config.json"),
                "{error}"
            );
        }
        fs::write(&path, format!("{base}{}", r#", "modules_to_save": []}"#)).unwrap();
        assert_eq!(LoraConfig::from_dir(dir.path()).unwrap().r, 8);
    }

    #[test]
    fn an_adapter_whose_base_is_not_the_base_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let read = |init: &str| {
            let text = format!(
                r#"{{"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": {init}}}"#
            );
            fs::write(dir.path().join("adapter_config.json"), text).unwrap();
            LoraConfig::from_dir(dir.path())
        };
        for init in [
            "true",
            "false",
            "null",
            r#""gaussian""#,
            r#""orthogonal""#,
            r#""eva""#,
        ] {
            assert!(read(init).is_ok(), "{init}");
        }
        for init in [
            "pissa",
            "pissa_niter_4",
            "olora",
            "corda",
            "loftq",
            "lora_ga",
            "new",
        ] {
            let error = read(&format!("\"{init}\"")).unwrap_err().to_string();
            for piece in [
                init,
                "init_lora_weights",
                "path_initial_model_for_weight_conversion",
            ] {
                assert!(error.contains(piece), "{error}");
            }
        }
    }

    #[test]
    fn a_folder_around_an_adapter_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("checkpoint-7");
        fs::create_dir(&inner).unwrap();
        fs::write(inner.join("adapter_config.json"), "{}").unwrap();
        let read = || LoraConfig::from_dir(dir.path()).unwrap_err().to_string();
        assert!(read().contains("adapters are in `") && read().contains("checkpoint-7"));
        fs::write(dir.path().join("best.json"), r#"{"step": 5}"#).unwrap();
        assert!(read().contains("best checkpoint") && read().contains("checkpoint-5"));
    }

    #[test]
    fn layers_are_chosen_as_peft_chooses_them() {
        let mut config = LoraConfig {
            target_modules: TargetModules::Names(vec!["k_proj".into(), Q.into()]),
            layers_to_transform: Some(vec![1]),
            ..LoraConfig::default()
        };
        let matcher = config.matcher().unwrap();
        let k = |layer: usize| format!("model.language_model.layers.{layer}.self_attn.k_proj");
        assert!(matcher.matches(&k(1)) && !matcher.matches(&k(3)));
        // A whole path is taken whatever its layer.
        assert!(matcher.matches(Q));
        config.target_modules = TargetModules::Pattern(r".*\.q_proj\Z".into());
        config.layers_to_transform = None;
        assert!(config.matcher().unwrap().matches(Q));
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("adapter_config.json"),
            r#"{"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [], "layers_pattern": "layers"}"#,
        )
        .unwrap();
        assert_eq!(
            LoraConfig::from_dir(dir.path())
                .unwrap()
                .layers_to_transform,
            None
        );
    }

    #[test]
    fn what_is_written_reads_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = LoraConfig {
            use_dora: true,
            target_modules: TargetModules::Names(vec!["q_proj".into()]),
            ..LoraConfig::default()
        };
        config.alpha_pattern.0.push(("q_proj".into(), 6.5));
        fs::write(dir.path().join("adapter_config.json"), config.to_json()).unwrap();
        assert_eq!(LoraConfig::from_dir(dir.path()).unwrap(), config);
    }
}
