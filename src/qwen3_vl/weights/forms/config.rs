//! The entry `quantization_config`, key by key: one that no reader has used is an error at the end.

use std::{cell::RefCell, collections::BTreeSet, path::Path};

use serde_json::{Map, Value};

use super::super::{WeightsError, stored::RawTensor};

/// The keys of one object, and which of them were read.
pub(super) struct Keys<'a> {
    path: &'a Path,
    /// Dotted name of the object.
    name: String,
    map: &'a Map<String, Value>,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    /// Of the entry itself.
    pub(super) fn new(path: &'a Path, entry: &'a Value) -> Result<Self, WeightsError> {
        Self::inside(path, "quantization_config".to_string(), entry)
    }

    fn inside(path: &'a Path, name: String, entry: &'a Value) -> Result<Self, WeightsError> {
        let map = entry
            .as_object()
            .ok_or_else(|| WeightsError::Quantization {
                path: path.to_path_buf(),
                reason: format!("key `{name}` is {}, expected an object", short(entry)),
            })?;
        Ok(Self {
            path,
            name,
            map,
            read: RefCell::default(),
        })
    }

    /// The error of this file.
    pub(super) fn refuse(&self, reason: impl Into<String>) -> WeightsError {
        WeightsError::Quantization {
            path: self.path.to_path_buf(),
            reason: reason.into(),
        }
    }

    /// The error of a value that cannot be used.
    pub(super) fn value(&self, key: &str, expected: &str) -> WeightsError {
        let found = self.map.get(key).map_or("missing".to_string(), short);
        self.refuse(format!(
            "key `{}.{key}` is {found}, expected {expected}",
            self.name
        ))
    }

    /// A key's value; `None` for null too.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.to_string());
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, WeightsError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => read(value)
                .map(Some)
                .ok_or_else(|| self.value(key, expected)),
        }
    }

    /// A text.
    pub(super) fn text(&self, key: &str) -> Result<Option<String>, WeightsError> {
        self.typed(key, "a text", |value| value.as_str().map(str::to_owned))
    }

    /// A whole number; -1 is [`usize::MAX`], which says "all of them".
    pub(super) fn number(&self, key: &str) -> Result<Option<usize>, WeightsError> {
        self.typed(key, "a whole number", |value| match value.as_i64() {
            Some(-1) => Some(usize::MAX),
            Some(number @ 0..=0xffff_ffff) => usize::try_from(number).ok(),
            _ => None,
        })
    }

    /// True or false.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, WeightsError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A list of names.
    pub(super) fn names(&self, key: &str) -> Result<Vec<String>, WeightsError> {
        let read = |value: &Value| {
            let names = value.as_array()?.iter();
            names.map(|name| name.as_str().map(str::to_owned)).collect()
        };
        Ok(self
            .typed(key, "a list of names", read)?
            .unwrap_or_default())
    }

    /// The objects inside an object.
    pub(super) fn objects(&self, key: &str) -> Result<Vec<Keys<'a>>, WeightsError> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let map = value
            .as_object()
            .ok_or_else(|| self.value(key, "an object"))?;
        map.iter()
            .map(|(inner, value)| {
                Self::inside(self.path, format!("{}.{key}.{inner}", self.name), value)
            })
            .collect()
    }

    /// One object.
    pub(super) fn object(&self, key: &str) -> Result<Option<Keys<'a>>, WeightsError> {
        self.get(key)
            .map(|value| Self::inside(self.path, format!("{}.{key}", self.name), value))
            .transpose()
    }

    /// Keys that change no weight.
    pub(super) fn without_effect(&self, keys: &[&str]) {
        let mut read = self.read.borrow_mut();
        read.extend(keys.iter().map(|key| (*key).to_string()));
    }

    /// Keys that must have a certain value where they are there.
    pub(super) fn only(&self, key: &str, values: &[Value]) -> Result<(), WeightsError> {
        match self.get(key) {
            Some(found) if !values.contains(found) => {
                let values: Vec<String> = values.iter().map(short).collect();
                Err(self.value(key, &values.join(" or ")))
            }
            _ => Ok(()),
        }
    }

    /// Whether an object asks for nothing: it is empty, or its format is `dense`.
    pub(super) fn is_idle(&self) -> bool {
        let is_empty = |value: &Value| match value {
            Value::Null => true,
            Value::Object(map) => map.is_empty(),
            Value::Array(list) => list.is_empty(),
            _ => false,
        };
        self.map
            .get("format")
            .is_some_and(|format| format == "dense")
            || self.map.values().all(is_empty)
    }

    /// Fails on the first key that was not read.
    pub(super) fn finish(&self) -> Result<(), WeightsError> {
        let read = self.read.borrow();
        match self
            .map
            .iter()
            .find(|(key, value)| !value.is_null() && !read.contains(*key))
        {
            None => Ok(()),
            Some((key, value)) => Err(self.refuse(format!(
                "key `{}.{key}` ({}) is not known here, so the weights might be read wrongly; take the checkpoint in 16 bits and load it with --quantize",
                self.name,
                short(value)
            ))),
        }
    }
}

/// A value in a message.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{} …", &text[..end]),
        None => text,
    }
}

/// Layers that a config leaves as floats.
#[derive(Debug, Default)]
pub(super) struct LeftOut(Vec<Pattern>);

/// A layer in a list of a config.
#[derive(Debug)]
pub(super) enum Pattern {
    /// A layer, or all inside a module of this name.
    Name(String),
    /// Names that an expression fits from their beginning (`re:…`).
    Regex(Box<fancy_regex::Regex>),
}

impl Pattern {
    /// Reads one; `None` if it is an expression that is none.
    pub(super) fn new(text: &str) -> Option<Self> {
        match text.strip_prefix("re:") {
            None => Some(Self::Name(text.trim_end_matches('.').to_string())),
            Some(regex) => fancy_regex::Regex::new(&format!("^(?:{regex})"))
                .ok()
                .map(|regex| Self::Regex(Box::new(regex))),
        }
    }

    /// Whether it means a layer, under its name in the file or in the module tree.
    pub(super) fn fits(&self, layer: &str) -> bool {
        match self {
            Self::Name(name) => layer
                .strip_prefix(name.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.')),
            Self::Regex(regex) => regex.is_match(layer).unwrap_or(false),
        }
    }
}

impl LeftOut {
    /// Reads the list under `key`.
    pub(super) fn read(keys: &Keys<'_>, key: &str) -> Result<Self, WeightsError> {
        let names = keys.names(key)?;
        let patterns = names.iter().map(|name| {
            Pattern::new(name).ok_or_else(|| keys.value(key, "names, or expressions after `re:`"))
        });
        patterns.collect::<Result<_, _>>().map(Self)
    }

    /// Those of another list too.
    pub(super) fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Fails if a quantised layer is in the list: config and tensors do not belong together.
    pub(super) fn check(&self, layer: &str, tensor: &RawTensor) -> Result<(), WeightsError> {
        let in_file = tensor.key.rsplit_once('.').map_or("", |(layer, _)| layer);
        match self
            .0
            .iter()
            .any(|pattern| pattern.fits(layer) || pattern.fits(in_file))
        {
            false => Ok(()),
            true => Err(WeightsError::Quantization {
                path: tensor.file.path().to_path_buf(),
                reason: format!(
                    "tensor `{}` is quantised, but `config.json` lists its layer as not converted; do both belong to one checkpoint?",
                    tensor.key
                ),
            }),
        }
    }
}
