//! PEFT's `adapter_config.json`: which layers, which rank, which scaling.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Map, Value, json};

pub use super::error::AdapterError;
pub use super::targets::{Patterns, TargetMatcher, TargetModules};
use super::{
    folder::{initial_adapter, why_none},
    targets::pattern_value,
};

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
    /// Names of the lists that layer numbers count in; any list when empty.
    pub layers_pattern: Vec<String>,
    /// Which biases of the base are stored.
    pub bias: Bias,
    /// Whether `B` has a bias.
    pub lora_bias: bool,
    /// Modules that are stored whole.
    pub modules_to_save: Vec<String>,
    /// Tokens whose rows are stored, by the name of their table.
    pub trainable_token_indices: BTreeMap<String, Vec<usize>>,
    /// What changes a tied embedding changes the head as well.
    pub ensure_weight_tying: bool,
    /// The folder of the adapter as training began, of one whose training began by taking a part out of the
    /// base's weights (PiSSA and its kind): the difference of the two belongs to the base as it is.
    pub initial: Option<PathBuf>,
    /// Where the base model came from; a note only.
    pub base_model_name_or_path: Option<String>,
}

/// PEFT's `bias`: which biases of the base are trained and stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// None.
    None,
    /// Those of all modules.
    All,
    /// Those of adapted layers.
    LoraOnly,
}

impl Bias {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
            Self::LoraOnly => "lora_only",
        }
    }
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
            layers_pattern: Vec::new(),
            bias: Bias::None,
            lora_bias: false,
            modules_to_save: Vec::new(),
            trainable_token_indices: BTreeMap::new(),
            ensure_weight_tying: false,
            initial: None,
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
    layers_to_transform: Option<OneOrMany<usize>>,
    layers_pattern: Option<OneOrMany<String>>,
    #[serde(default)]
    lora_bias: Option<bool>,
    modules_to_save: Option<Vec<String>>,
    trainable_token_indices: Option<TokenIndices>,
    #[serde(default)]
    ensure_weight_tying: Option<bool>,
    base_model_name_or_path: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn list(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// A list belongs to the embedding.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenIndices {
    Embedding(Vec<usize>),
    Named(BTreeMap<String, Vec<usize>>),
}

impl TokenIndices {
    fn named(self) -> BTreeMap<String, Vec<usize>> {
        match self {
            Self::Embedding(tokens) => BTreeMap::from([("embed_tokens".to_owned(), tokens)]),
            Self::Named(named) => named,
        }
    }
}

/// Keys that change the arithmetic and are not done here, with the values that mean "off".
const MUST_BE_OFF: &[&str] = &[
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
];

/// Values of `init_lora_weights` that leave the base as it is, so that the file's tensors belong to it.
///
/// The others take their part out of the base's weights when training begins, and PEFT does so again at load.
///
/// Source: `LoraLayer.update_layer`, PEFT, `tuners/lora/layer.py`.
const BASE_AS_IT_IS: &[&str] = &["gaussian", "orthogonal", "eva", "mica"];

/// Values that take a part out of the base which the adapter, as training began, holds exactly: the
/// difference to it is a LoRA of the base as it was.
///
/// Source: `LoraModel.subtract_mutated_init`, PEFT, `tuners/lora/model.py`.
const TAKEN_OUT: &[&str] = &["pissa", "olora", "corda", "lora_ga"];

/// Methods of PEFT that put tokens before the prompt and change no weight.
const PROMPT_METHODS: &[&str] = &[
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
];

/// What to do with an adapter of another method.
fn cure_of_method(method: &Value, dir: &Path) -> String {
    let name = method.as_str().unwrap_or_default().to_uppercase();
    if PROMPT_METHODS.contains(&name.as_str()) {
        return "it adds to the prompt and changes no weight, so that it cannot be merged; train a LoRA in its place"
            .to_owned();
    }
    let quoted = |path: &Path| path.display().to_string().replace(['\'', '"'], "");
    format!(
        "merge it in Python, then name OUT with --model: \
         from transformers import AutoModelForImageTextToText, AutoProcessor; from peft import PeftModel; \
         base = AutoModelForImageTextToText.from_pretrained('BASE', dtype='auto'); \
         PeftModel.from_pretrained(base, '{}').merge_and_unload().save_pretrained('OUT'); \
         AutoProcessor.from_pretrained('BASE').save_pretrained('OUT')",
        quoted(dir)
    )
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
        let text = fs::read_to_string(&path).map_err(|cause| match why_none(dir) {
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
            return Err(AdapterError::Method {
                path: path.clone(),
                found: kind.to_string(),
                cure: cure_of_method(kind, dir),
            });
        }
        let none = json!("none");
        let bias = match tree.get("bias").unwrap_or(&none) {
            Value::String(text) if text == "none" => Bias::None,
            Value::String(text) if text == "all" => Bias::All,
            Value::String(text) if text == "lora_only" => Bias::LoraOnly,
            other => return Err(unsupported("bias", other, "`none`, `all` or `lora_only`")),
        };
        let initial = initial_of(dir, &path, tree.get("init_lora_weights"))?;
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
        let use_dora = raw.use_dora.unwrap_or(false);
        if use_dora && initial.is_some() {
            return Err(unsupported(
                "use_dora",
                &Value::Bool(true),
                "false beside this `init_lora_weights`: magnitudes cannot be brought to the base as it was",
            ));
        }
        let lora_bias = raw.lora_bias.unwrap_or(false);
        if use_dora && lora_bias {
            return Err(unsupported(
                "lora_bias",
                &Value::Bool(true),
                "false beside `use_dora`, as in PEFT",
            ));
        }
        Ok(Self {
            r: raw.r,
            lora_alpha: raw.lora_alpha,
            lora_dropout: raw.lora_dropout,
            target_modules: raw.target_modules.unwrap_or_default(),
            exclude_modules: raw.exclude_modules,
            use_rslora: raw.use_rslora.unwrap_or(false),
            use_dora,
            rank_pattern: raw.rank_pattern.unwrap_or_default(),
            alpha_pattern: raw.alpha_pattern.unwrap_or_default(),
            layers_to_transform: raw
                .layers_to_transform
                .map(OneOrMany::list)
                // As PEFT: an empty list chooses nothing.
                .filter(|layers| !layers.is_empty()),
            layers_pattern: raw
                .layers_pattern
                .map(OneOrMany::list)
                .unwrap_or_default()
                .into_iter()
                .filter(|pattern| !pattern.is_empty())
                .collect(),
            bias,
            lora_bias,
            modules_to_save: raw.modules_to_save.unwrap_or_default(),
            trainable_token_indices: raw
                .trainable_token_indices
                .map(TokenIndices::named)
                .unwrap_or_default()
                .into_iter()
                .filter(|(_, tokens)| !tokens.is_empty())
                .collect(),
            ensure_weight_tying: raw.ensure_weight_tying.unwrap_or(false),
            initial,
            base_model_name_or_path: raw.base_model_name_or_path,
        })
    }

    /// The text of an `adapter_config.json` that PEFT and ms-swift read.
    pub fn to_json(&self) -> String {
        let mut tree = json!({
            "alpha_pattern": self.alpha_pattern,
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": self.bias.name(),
            "exclude_modules": self.exclude_modules,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layer_replication": null,
            "layers_pattern": (!self.layers_pattern.is_empty()).then_some(&self.layers_pattern),
            "layers_to_transform": self.layers_to_transform,
            "loftq_config": {},
            "lora_alpha": number(self.lora_alpha),
            "lora_bias": self.lora_bias,
            "lora_dropout": self.lora_dropout,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": (!self.modules_to_save.is_empty()).then_some(&self.modules_to_save),
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": self.rank_pattern,
            "revision": null,
            "target_modules": self.target_modules,
            "task_type": "CAUSAL_LM",
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        });
        // A key that older releases of PEFT do not know, where it says something.
        if let Some(tree) = tree.as_object_mut().filter(|_| self.ensure_weight_tying) {
            tree.insert("ensure_weight_tying".to_owned(), true.into());
        }
        let mut text = serde_json::to_string_pretty(&tree).unwrap_or_default();
        text.push('\n');
        text
    }

    /// The matcher for module paths.
    ///
    /// # Errors
    /// [`AdapterError::Pattern`].
    pub fn matcher(&self) -> Result<TargetMatcher, AdapterError> {
        TargetMatcher::new(
            &self.target_modules,
            self.exclude_modules.as_ref(),
            &self.modules_to_save,
            self.layers_to_transform.as_deref(),
            &self.layers_pattern,
        )
    }

    /// Whether `modules_to_save` names the module at `path` or one around it; PEFT compares ends of paths.
    pub fn saves(&self, path: &str) -> bool {
        let around = path.match_indices('.').map(|(at, _)| &path[..at]);
        around.chain([path]).any(|module| {
            let mut names = self.modules_to_save.iter();
            names.any(|name| module.ends_with(name.as_str()))
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

/// The adapter as training began, for an adapter whose base is not the base as it was; `None` for one whose
/// base is.
fn initial_of(
    dir: &Path,
    path: &Path,
    init: Option<&Value>,
) -> Result<Option<PathBuf>, AdapterError> {
    let init = init.unwrap_or(&Value::Null);
    let name = match init {
        Value::Null | Value::Bool(_) => return Ok(None),
        Value::String(name) => name.to_lowercase(),
        _ => String::new(),
    };
    if BASE_AS_IT_IS.contains(&name.as_str()) {
        return Ok(None);
    }
    let convertible = TAKEN_OUT
        .iter()
        .any(|kind| name == *kind || name.starts_with("pissa_niter_"));
    let found = convertible.then(|| initial_adapter(dir)).flatten();
    if found.is_some() {
        return Ok(found);
    }
    // What PEFT can convert it says in `save_pretrained`; all that it can load it can merge.
    let cure = match convertible {
        true => {
            "write it with `save_pretrained(DIR, path_initial_model_for_weight_conversion=…)`, which makes it a plain LoRA of the original base, \
             or put the adapter as `save_pretrained` wrote it before the first step beside it, in a folder `pissa_init` or `initial_model`"
        }
        false => {
            "PEFT converts no adapter of this kind into a plain LoRA, so merge it there: \
             `PeftModel.from_pretrained(base, ADAPTER).merge_and_unload().save_pretrained(DIR)`, and name DIR with --model"
        }
    };
    Err(AdapterError::Unsupported {
        path: path.to_path_buf(),
        key: "init_lora_weights".to_owned(),
        found: init.to_string(),
        expected: format!(
            "true, false, `gaussian`, `orthogonal`, `eva` or `mica`: the tensors of this adapter belong to a base that PEFT has changed; {cure}"
        ),
    })
}

/// Whole numbers are written without a fraction, as PEFT does.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        Value::from(value as i64)
    } else {
        Value::from(value)
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
