//! Which layers get eight bits in place of four under a limit of size.

use std::collections::BTreeMap;

use super::super::{Formats, memory::bytes_in_formats};
use crate::ops::quantised::Format;

/// What a unit of layers would lose in the small format and in int8.
#[derive(Debug, Clone)]
pub struct Choice {
    /// Paths of its layers.
    pub layers: Vec<String>,
    /// Relative square error of the outputs in the small format.
    pub small: f64,
    /// The same in int8.
    pub int8: f64,
}

/// Why no choice fits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the weights take {least} bytes in the smallest form of these formats, more than the limit of {limit}; a larger --group or a vision tower in fewer bits takes less"
)]
pub struct TooLarge {
    least: usize,
    limit: usize,
}

/// Gives int8 to the units that gain most by it for each byte, as long as all weights take at most `limit` bytes,
/// `element` bytes each where they are floats.
///
/// # Errors
/// [`TooLarge`] if not even the small format fits.
pub fn choose(
    mut formats: Formats,
    choices: &[Choice],
    shapes: &BTreeMap<String, Vec<usize>>,
    limit: usize,
    element: usize,
) -> Result<Formats, TooLarge> {
    let mut size = bytes_in_formats(shapes, &formats, element);
    if size > limit {
        return Err(TooLarge { least: size, limit });
    }
    let extra = |choice: &Choice, formats: &Formats| {
        let of = |layer: &String| {
            let path = format!("{layer}.weight");
            match (shapes.get(&path).map(Vec::as_slice), formats.of(&path)) {
                (Some([rows, width]), Some(format)) => Format::Int8
                    .bytes(*rows, *width)
                    .saturating_sub(format.bytes(*rows, *width)),
                _ => 0,
            }
        };
        choice.layers.iter().map(of).sum::<usize>()
    };
    let mut order: Vec<(f64, usize, &Choice)> = choices
        .iter()
        .map(|choice| {
            let bytes = extra(choice, &formats);
            (
                (choice.small - choice.int8) / bytes.max(1) as f64,
                bytes,
                choice,
            )
        })
        .collect();
    // Equal gains in the order of the layers.
    order.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (gain, bytes, choice) in order {
        if gain > 0.0 && bytes > 0 && size + bytes <= limit {
            size += bytes;
            for layer in &choice.layers {
                formats.set(layer, Some(Format::Int8));
            }
        }
    }
    Ok(formats)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::quantised::Quantization;

    #[test]
    fn the_worst_layers_per_byte_get_eight_bits_within_the_limit() {
        let path =
            |layer: usize, name: &str| format!("model.language_model.layers.{layer}.mlp.{name}");
        let mut shapes = BTreeMap::new();
        for layer in 0..2 {
            shapes.insert(path(layer, "up_proj.weight"), vec![64, 64]);
            shapes.insert(path(layer, "down_proj.weight"), vec![128, 64]);
        }
        let choice = |layer, name: &str, small| Choice {
            layers: vec![path(layer, name)],
            small,
            int8: 1e-4,
        };
        let choices = [
            choice(0, "up_proj", 0.01),
            choice(0, "down_proj", 0.015),
            choice(1, "up_proj", 0.02),
            choice(1, "down_proj", 0.05),
        ];
        let int4 = Formats::from("int4".parse::<Quantization>().unwrap());
        let bytes = |formats: &Formats| bytes_in_formats(&shapes, formats, 2);
        let least = bytes(&int4);
        let own = |limit| {
            let formats = choose(int4.clone(), &choices, &shapes, limit, 2).unwrap();
            assert!(bytes(&formats) <= limit);
            formats.own.into_keys().collect::<Vec<_>>()
        };
        assert!(own(least).is_empty());
        // 64 × 64 values take 2,176 bytes as int4 and 4,352 as int8.
        assert_eq!(own(least + 2_500), [path(1, "up_proj")]);
        assert_eq!(own(least + 4_400), [path(1, "down_proj")]);
        assert_eq!(own(least + 100_000).len(), 4);
        let error = choose(int4.clone(), &choices, &shapes, least - 1, 2).unwrap_err();
        assert!(error.to_string().contains(&least.to_string()));
    }
}
