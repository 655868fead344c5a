//! Which modules an adapter is for: PEFT's `target_modules`, `exclude_modules`, `layers_to_transform`
//! and the patterns of `rank_pattern` and `alpha_pattern`.

use fancy_regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::AdapterError;

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
pub(super) fn pattern_value<T: Copy>(
    patterns: &Patterns<T>,
    path: &str,
) -> Result<Option<T>, AdapterError> {
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

/// A pattern in Python's spelling as this program's engine has it: `\Z` is the end of the text there, and
/// `{,3}` means `{0,3}`.
fn from_python(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len() + 2);
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        out.push(c);
        match c {
            '\\' => match chars.next() {
                Some('Z') => out.push('z'),
                Some(escaped) => out.push(escaped),
                None => {}
            },
            '{' if chars.peek() == Some(&',') => out.push('0'),
            _ => {}
        }
    }
    out
}

pub(super) fn compile(pattern: &str) -> Result<Regex, AdapterError> {
    Regex::new(&from_python(pattern)).map_err(|cause| AdapterError::Pattern {
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
            TargetModules::Pattern(pattern) if pattern.eq_ignore_ascii_case("all-linear") => {
                Self::AllLinear
            }
            // The whole path must match, as with Python's `re.fullmatch`.
            TargetModules::Pattern(pattern) => Self::Pattern(compile(&format!("^(?:{pattern})$"))?),
            TargetModules::Names(names) => Self::Names(names.clone()),
        })
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            // The head is an output layer, which PEFT leaves out of `all-linear`.
            Self::AllLinear => path != "lm_head" && !OTHER_LAYERS.iter().any(|(at, _)| *at == path),
            Self::Pattern(pattern) => pattern.is_match(path).unwrap_or(false),
            Self::Names(names) => names.iter().any(|name| is_end_of(name, path)),
        }
    }
}

/// Whether `name` is the path or its last parts.
fn is_end_of(name: &str, path: &str) -> bool {
    path == name
        || path
            .strip_suffix(name)
            .is_some_and(|head| head.ends_with('.'))
}

/// Layers that are no linear ones and take adapters all the same, with what they are.
pub(super) const OTHER_LAYERS: &[(&str, &str)] = &[
    (EMBED_TOKENS, "an embedding"),
    (POS_EMBED, "an embedding"),
    (PATCH_EMBED, "a convolution"),
];

/// Path of the table of token vectors.
pub(super) const EMBED_TOKENS: &str = "model.language_model.embed_tokens";
/// Path of the vision tower's table of positions.
pub(super) const POS_EMBED: &str = "model.visual.pos_embed";
/// Path of the convolution over patches.
pub(super) const PATCH_EMBED: &str = "model.visual.patch_embed.proj";
/// Path of the head.
pub(super) const LM_HEAD: &str = "lm_head";

/// `layers_to_transform`, with the regular expression that finds a layer's number in a path.
struct LayerFilter {
    layers: Vec<usize>,
    patterns: Vec<Regex>,
}

impl LayerFilter {
    fn new(layers: &[usize], names: &[String]) -> Result<Self, AdapterError> {
        let patterns = if names.is_empty() {
            // The first number after two other parts.
            vec![compile(r"^.*?\.[^.]*\.(\d+)\.")?]
        } else {
            names
                .iter()
                .map(|name| compile(&format!(r"^(?:.*?\.)?(?:{name})\.(\d+)\.")))
                .collect::<Result<_, _>>()?
        };
        Ok(Self {
            layers: layers.to_vec(),
            patterns,
        })
    }

    fn holds(&self, path: &str) -> bool {
        let number = self.patterns.iter().find_map(|pattern| {
            let groups = pattern.captures(path).ok().flatten()?;
            groups
                .iter()
                .skip(1)
                .flatten()
                .last()?
                .as_str()
                .parse()
                .ok()
        });
        number.is_some_and(|number: usize| self.layers.contains(&number))
    }
}

/// Decides for a module path whether it is adapted.
pub struct TargetMatcher {
    targets: Matcher,
    excluded: Option<Matcher>,
    /// Modules that are stored whole, which are not adapted as well.
    saved: Vec<String>,
    layers: Option<LayerFilter>,
}

impl TargetMatcher {
    /// The matcher of a config's keys of the same names.
    ///
    /// # Errors
    /// [`AdapterError::Pattern`].
    pub(super) fn new(
        targets: &TargetModules,
        excluded: Option<&TargetModules>,
        saved: &[String],
        layers: Option<&[usize]>,
        layers_pattern: &[String],
    ) -> Result<Self, AdapterError> {
        Ok(Self {
            targets: Matcher::new(targets)?,
            excluded: excluded.map(Matcher::new).transpose()?,
            saved: saved.to_vec(),
            layers: layers
                .map(|layers| LayerFilter::new(layers, layers_pattern))
                .transpose()?,
        })
    }

    /// Whether the layer at `path` is adapted.
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
        if self.saved.iter().any(|name| is_part_of(name, path)) {
            return false;
        }
        // PEFT looks at the layers only where names are listed, and a name is not the whole path.
        let Matcher::Names(names) = &self.targets else {
            return self.targets.matches(path);
        };
        let whole = names.iter().any(|name| name == path);
        let in_layers = self.layers.as_ref().is_none_or(|layers| layers.holds(path));
        whole || (in_layers && self.targets.matches(path))
    }
}

/// Whether a module named so is at `path` or around it.
fn is_part_of(name: &str, path: &str) -> bool {
    format!(".{path}.").contains(&format!(".{name}."))
}
