//! Models of published size with weights drawn on the device.

use std::convert::Infallible;

use burn::{
    module::{Module, ModuleMapper, Param},
    prelude::*,
    tensor::{DType, Distribution},
};

use crate::{
    adapters::quantised::load::replace_weights,
    ops::quantised::{
        Format, QuantisedWeight, Quantization,
        weight::{persistent, scale_dtype},
    },
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, nn::InitOptions},
    runtime::accelerator::Accelerator,
};

/// Sizes a model can be drawn in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum RandomSize {
    /// Qwen3-VL-8B.
    #[value(name = "8b")]
    B8,
    /// Qwen3-VL-4B.
    #[value(name = "4b")]
    B4,
    /// Qwen3-VL-2B.
    #[value(name = "2b")]
    B2,
    /// Four layers of width 128: to try the command.
    Tiny,
}

impl RandomSize {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::B8 => "8b",
            Self::B4 => "4b",
            Self::B2 => "2b",
            Self::Tiny => "tiny",
        }
    }

    /// Sizes of the model, with the first `layers` decoder layers where given.
    ///
    /// # Errors
    /// Why the model cannot have so many layers.
    pub fn config(self, layers: Option<usize>) -> Result<Qwen3VlConfig, String> {
        let mut config = Qwen3VlConfig::published(self.name()).unwrap_or_else(Qwen3VlConfig::tiny);
        let all = config.text_config.num_hidden_layers;
        if let Some(layers) = layers {
            let least = config.vision_config.deepstack_visual_indexes.len();
            if !(least..=all).contains(&layers) {
                return Err(format!(
                    "--layers is {layers}, the {} model can have {least} (one for each DeepStack level) to {all}",
                    self.name()
                ));
            }
            config.text_config.num_hidden_layers = layers;
        }
        Ok(config)
    }
}

/// Draws matrices in the weights' own type; scales and shifts keep the constants they start with.
struct Draw {
    dtype: DType,
    std: f64,
}

impl<B: Accelerator> ModuleMapper<B> for Draw {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if D < 2 {
            return param.map(|tensor| tensor);
        }
        let device = param.lazy_device();
        // Not through the parameter's own initialiser, which draws in f32 and casts: of the
        // vocabulary's table that would be 2.5 GB beside the 1.2 GB that stay.
        let (std, dtype) = (self.std, self.dtype);
        let tensor = persistent::<B, _, _>(&device, param.lazy_shape(), |shape| {
            let drawn = Tensor::random(shape, Distribution::Normal(0.0, std), (&device, dtype));
            B::contiguous(drawn)
        });
        Param::initialized(param.id, tensor)
    }
}

/// Bytes of quantised words that are drawn at once.
const DRAWN_BYTES: usize = 32 << 20;

/// A quantised matrix of levels that are as likely as any other, with the deviation `std`.
fn draw_quantised<B: Accelerator>(
    [rows, d_input]: [usize; 2],
    format: Format,
    std: f64,
    dtype: DType,
    device: &B::Device,
) -> QuantisedWeight<B> {
    let width = format.words(d_input);
    // Halves of words: a draw of 32 bits at once would have the 24 of an f32.
    let half = |rows: usize, from: f64| -> Tensor<B, 2, Int> {
        let range = Distribution::Uniform(from, from + 65_536.0);
        Tensor::random([rows, width], range, (device, DType::I32))
    };
    // Some rows at a time: the draws of a whole table would take as much memory again.
    let at_once = (DRAWN_BYTES / 4 / width).max(1);
    let mut words: Tensor<B, 2, Int> = persistent::<B, _, _>(device, (), |()| {
        Tensor::zeros([rows, width], (device, DType::I32))
    });
    for start in (0..rows).step_by(at_once) {
        let count = at_once.min(rows - start);
        let drawn = half(count, -32_768.0) * 65_536 + half(count, 0.0);
        words = words.slice_assign([start..start + count, 0..width], drawn);
    }
    let levels = (1u32 << format.bits()) as f64;
    let scale = std / ((levels * levels - 1.0) / 12.0).sqrt();
    let held = scale_dtype::<B>(format, device);
    let scales = persistent::<B, _, _>(device, (), |()| {
        Tensor::full([rows, format.scales(d_input)], scale, (device, held))
    });
    QuantisedWeight::new(words, scales, format, d_input, dtype)
}

/// Draws a whole model, tensor by tensor, on the device: normal with the published deviation.
///
/// With `quantization` the quantised words are drawn, never floats; the levels are even then.
pub fn draw<B: Accelerator>(
    config: &Qwen3VlConfig,
    seed: u64,
    dtype: DType,
    quantization: Option<Quantization>,
    device: &B::Device,
) -> Qwen3Vl<B> {
    let options = InitOptions {
        dtype,
        ..InitOptions::default()
    };
    B::seed(device, seed);
    let std = options.initializer_range;
    let mut model = Qwen3Vl::new(config, &options, device);
    if let Some(quantization) = quantization {
        let Ok(packed) = replace_weights(model, quantization, |_, shape, format| {
            Ok::<_, Infallible>(draw_quantised(shape, format, std, dtype, device))
        });
        model = packed;
    }
    B::arrange(model.map(&mut Draw { dtype, std }), config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_is_a_model() {
        for size in [
            RandomSize::B8,
            RandomSize::B4,
            RandomSize::B2,
            RandomSize::Tiny,
        ] {
            size.config(None).unwrap().check().unwrap();
        }
        let cut = RandomSize::B8.config(Some(4)).unwrap();
        cut.check().unwrap();
        assert_eq!(cut.text_config.num_hidden_layers, 4);
        assert!(RandomSize::B8.config(Some(2)).unwrap_err().contains("3"));
        assert!(RandomSize::B8.config(Some(37)).unwrap_err().contains("36"));
    }

    #[cfg(feature = "flex")]
    #[test]
    fn drawn_weights_have_type_deviation_and_constants() {
        let config = Qwen3VlConfig::tiny();
        let device = Default::default();
        for dtype in [DType::F32, DType::BF16] {
            let model = draw::<burn_flex::Flex>(&config, 1, dtype, None, &device);
            let table = model.model.language_model.embed_tokens.weight.val();
            assert_eq!(table.dtype(), dtype);
            let values: Vec<f32> = table.into_data().iter::<f32>().collect();
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            let square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
            assert!(mean.abs() < 1e-3, "{mean}");
            assert!((square.sqrt() - 0.02).abs() < 1e-3, "{square}");
            let norm = model.model.language_model.norm.weight.val().into_data();
            assert!(norm.iter::<f32>().all(|v| v == 1.0));
        }
    }
    #[cfg(feature = "flex")]
    #[test]
    fn drawn_quantised_weights_have_the_deviation_too() {
        let config = Qwen3VlConfig::tiny();
        let device = Default::default();
        for text in ["int8", "int4", "int4:32"] {
            let quantization: Quantization = text.parse().unwrap();
            let model =
                draw::<burn_flex::Flex>(&config, 1, DType::F32, Some(quantization), &device);
            assert_eq!(model.quantization(), Some(quantization));
            let weight = model.model.language_model.layers[0]
                .mlp
                .up_proj
                .weight
                .val();
            let values: Vec<f32> = weight.into_data().iter::<f32>().collect();
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            let square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
            // Levels are half a step below zero on average.
            assert!(mean.abs() < 3e-3, "{text}: {mean}");
            assert!((square.sqrt() - 0.02).abs() < 1e-3, "{text}: {square}");
        }
    }
}
