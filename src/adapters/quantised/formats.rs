//! Which format each matrix of a model has.

use std::{collections::BTreeMap, fmt};

use super::format_of;
use crate::ops::quantised::{Format, Quantization};

/// The format of each matrix: that of its kind, or one of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Formats {
    /// Of matrices without an entry of their own; `None` leaves these as floats.
    pub default: Option<Quantization>,
    /// By path of the layer (`model.visual.blocks.0.attn.qkv`); `None` leaves it as floats.
    pub own: BTreeMap<String, Option<Format>>,
}

impl From<Quantization> for Formats {
    fn from(quantization: Quantization) -> Self {
        Self {
            default: Some(quantization),
            own: BTreeMap::new(),
        }
    }
}

impl Formats {
    /// Format of the parameter at `path`; `None` where it stays as it is.
    pub fn of(&self, path: &str) -> Option<Format> {
        let layer = path.strip_suffix(".weight")?;
        match self.own.get(layer) {
            Some(own) => *own,
            None => format_of(self.default?, path),
        }
    }

    /// Gives a layer a format of its own, unless it is the one that it has already.
    pub fn set(&mut self, layer: &str, format: Option<Format>) {
        self.own.remove(layer);
        if self.of(&format!("{layer}.weight")) != format {
            self.own.insert(layer.to_string(), format);
        }
    }
}

impl fmt::Display for Formats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for format in self.own.values() {
            let name = match format {
                Some(format) => format.to_string(),
                None => "16 bits".to_string(),
            };
            *counts.entry(name).or_default() += 1;
        }
        let own: Vec<_> = counts
            .iter()
            .map(|(name, count)| format!("{count} matrices in {name}"))
            .collect();
        match (&self.default, own.is_empty()) {
            (Some(default), true) => default.fmt(f),
            (Some(default), false) => write!(f, "{default}; {}", own.join(", ")),
            (None, true) => f.write_str("nothing"),
            (None, false) => f.write_str(&own.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_has_its_own_format_or_that_of_its_kind() {
        let down = "model.language_model.layers.1.mlp.down_proj";
        let (of_down, head) = (format!("{down}.weight"), "lm_head.weight");
        let int4 = Format::Int4 { group: 64 };
        let mut formats = Formats::from("int4".parse::<Quantization>().unwrap());
        formats.set(down, Some(int4));
        assert!(formats.own.is_empty());
        formats.set(down, Some(Format::Int8));
        assert_eq!(formats.of(&of_down), Some(Format::Int8));
        assert_eq!(formats.of(head), Some(Format::Int8));
        formats.set(down, None);
        assert_eq!(formats.of(&of_down), None);
        assert_eq!(
            formats.to_string(),
            "int4, groups of 64; 1 matrices in 16 bits"
        );
        let mut kept = Formats::default();
        kept.set(down, Some(int4));
        assert_eq!((kept.of(&of_down), kept.of(head)), (Some(int4), None));
        kept.set(down, None);
        assert!(kept.own.is_empty());
    }
}
