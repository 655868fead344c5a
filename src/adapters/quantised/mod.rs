//! Quantised weights: files, loading, saving, and the memory they take.

pub mod calibrate;
pub mod files;
pub mod formats;
pub mod load;
pub mod memory;
pub mod save;

use burn::prelude::*;
pub use formats::Formats;

use crate::{
    adapters::lora::attach::LinearMapper,
    ops::{
        Ops, module_to_device,
        quantised::{Format, Quantization},
    },
    qwen3_vl::{Qwen3Vl, layer::Projection, nn::Linear},
    weights::Weight,
};

/// A model on another device, quantised matrices included, which are no parameters of a module.
pub fn model_to_device<B: Ops>(model: Qwen3Vl<B>, device: &B::Device) -> Qwen3Vl<B> {
    struct Send<'a, B: Backend>(&'a B::Device);
    impl<B: Backend> Send<'_, B> {
        fn send(&self, weight: Weight<B>) -> Weight<B> {
            match weight {
                Weight::Packed(packed) => Weight::Packed(packed.to_device(self.0)),
                dense => dense,
            }
        }
    }
    impl<B: Backend> LinearMapper<B> for Send<'_, B> {
        fn map_linear(&mut self, _path: &str, mut linear: Linear<B>) -> Linear<B> {
            linear.weight = self.send(linear.weight);
            linear
        }
    }
    let mut send = Send::<B>(device);
    let mut model = module_to_device(model, device).map_linears(&mut send);
    let table = &mut model.model.language_model.embed_tokens;
    table.weight = send.send(table.weight.clone());
    model
}

/// Format of the parameter at `path`; `None` where it stays as it is.
pub fn format_of(quantization: Quantization, path: &str) -> Option<Format> {
    /// Linear layers of the vision tower.
    const VISION: [&str; 4] = ["attn.qkv", "attn.proj", "linear_fc1", "linear_fc2"];
    let layer = path.strip_suffix(".weight")?;
    if layer == "lm_head" || layer == "model.language_model.embed_tokens" {
        return Some(Format::Int8);
    }
    let is_in = |name: &str| {
        let module = layer.strip_suffix(name);
        module.is_some_and(|module| module.ends_with('.'))
    };
    VISION
        .into_iter()
        .chain(Projection::ALL.map(Projection::path))
        .any(is_in)
        .then_some(quantization.layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_packed_and_the_rest_is_not() {
        let quantization: Quantization = "int4".parse().unwrap();
        for (path, format) in [
            (
                "model.visual.blocks.0.attn.qkv.weight",
                Some(quantization.layers),
            ),
            (
                "model.visual.merger.linear_fc2.weight",
                Some(quantization.layers),
            ),
            (
                "model.language_model.layers.1.mlp.down_proj.weight",
                Some(quantization.layers),
            ),
            (
                "model.language_model.embed_tokens.weight",
                Some(Format::Int8),
            ),
            ("lm_head.weight", Some(Format::Int8)),
            ("model.visual.patch_embed.proj.weight", None),
            ("model.visual.pos_embed.weight", None),
            ("model.visual.blocks.0.attn.qkv.bias", None),
            (
                "model.language_model.layers.1.self_attn.q_norm.weight",
                None,
            ),
            ("model.language_model.norm.weight", None),
        ] {
            assert_eq!(format_of(quantization, path), format, "{path}");
        }
    }
}
