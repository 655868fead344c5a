//! What a model takes on a device, summed from its shapes before anything is loaded.

use std::collections::BTreeMap;

use crate::{
    adapters::quantised::Formats, ops::quantised::Quantization, qwen3_vl::config::TextConfig,
};

/// Bytes of the weights of `shapes`, `element` bytes each where they are not quantised.
pub fn weight_bytes(
    shapes: &BTreeMap<String, Vec<usize>>,
    quantization: Option<Quantization>,
    element: usize,
) -> usize {
    let formats = quantization.map_or_else(Formats::default, Formats::from);
    bytes_in_formats(shapes, &formats, element)
}

/// [`weight_bytes`] where matrices have formats of their own.
pub fn bytes_in_formats(
    shapes: &BTreeMap<String, Vec<usize>>,
    formats: &Formats,
    element: usize,
) -> usize {
    let of = |(path, shape): (&String, &Vec<usize>)| match (formats.of(path), shape.as_slice()) {
        (Some(format), [rows, d_input]) => format.bytes(*rows, *d_input),
        _ => shape.iter().product::<usize>() * element,
    };
    shapes.iter().map(of).sum()
}

/// Bytes of the keys and values of `tokens` tokens, `element` bytes each.
pub fn cache_bytes(text: &TextConfig, tokens: usize, element: usize) -> usize {
    2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * element * tokens
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::{
        ops::quantised::weight::UNPACKED_BYTES,
        qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, nn::InitOptions, weights::parameter_shapes},
    };
    use burn_flex::Flex;

    #[test]
    fn the_8b_fits_cards_of_12_and_8_gb() {
        let config = Qwen3VlConfig::published("8b").unwrap();
        let options = InitOptions::default();
        let model = Qwen3Vl::<Flex>::new(&config, &options, &Default::default());
        let shapes = parameter_shapes(&model);
        let parameters: usize = shapes.values().map(|s| s.iter().product::<usize>()).sum();
        assert_eq!(weight_bytes(&shapes, None, 2), 2 * parameters);
        // Keys and values of 4k tokens in 16 bits: 36 layers, 8 heads of 128.
        let cache = cache_bytes(&config.text_config, 4096, 2);
        assert_eq!(cache, 2 * 36 * 8 * 128 * 2 * 4096);
        // What matmuls dequantise, and the activations of a large image.
        let work = UNPACKED_BYTES + 400_000_000;
        for (format, limit) in [("int8", 10_000_000_000), ("int4", 6_500_000_000)] {
            let weights = weight_bytes(&shapes, Some(format.parse().unwrap()), 2);
            let all = weights + cache + work;
            assert!(
                all <= limit,
                "{format}: {weights} + {cache} + {work} = {all}"
            );
        }
        // 6.95e9 parameters of decoder layers and 0.57e9 of vision layers at 4.25 bits, two
        // tables of 151,936 × 4,096 at 8, and some ten million others.
        let int4 = weight_bytes(&shapes, Some("int4".parse().unwrap()), 2) as f64;
        assert!((int4 / 5.27e9 - 1.0).abs() < 0.01, "{int4}");
    }
}
