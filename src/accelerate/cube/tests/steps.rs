//! A decode step replayed beside one launched kernel by kernel.

use super::{device, dtypes};
use crate::{
    accelerate::cube::{decode, recorded, vulkan::Backend},
    batch::text::{Padding, TextInput},
    ops::quantised::cache::CacheFormat,
    qwen3_vl::{config::Qwen3VlConfig, key_values::KeyValueCache},
    runtime::{
        accelerator::{DecodeStart, Decoder},
        generate::SamplingConfig,
        synthetic::weights::{RandomSize, draw},
    },
};

/// The same kernels in the same order: not a bit differs, of tokens and of logits.
#[test]
#[ignore = "needs a Vulkan device"]
fn a_recorded_step_is_a_launched_one() {
    let device = device();
    let config: Qwen3VlConfig = RandomSize::Tiny.config(None).unwrap();
    let vocab = config.text_config.vocab_size as u32;
    let layers = config.text_config.num_hidden_layers;
    let forms = [None, Some("int8"), Some("int4")];
    let mut seen = std::collections::BTreeSet::new();
    for dtype in dtypes(&device) {
        for form in forms {
            let quantization = form.map(|form| form.parse().unwrap());
            let model = draw::<Backend>(&config, 3, dtype, quantization, &device);
            // The last has its keys in two ranges, whatever the form of the weights.
            let prompts = [(1, 20), (3, 34), (1, 1100)];
            let prompts = &prompts[..if form.is_none() { 3 } else { 2 }];
            for &(rows, longest) in prompts {
                let name = format!("{form:?} {dtype:?}, {rows} rows of {longest}");
                let prompts: Vec<Vec<u32>> = (0..rows as u32)
                    .map(|row| {
                        let tokens = 0..longest - 7 * row;
                        tokens
                            .map(|at| (at * 37 + row * 11) % (vocab - 24))
                            .collect()
                    })
                    .collect();
                let grids = vec![vec![]; rows];
                let (input, deltas) =
                    TextInput::padded(&prompts, &grids, &config, Padding::Left, 0).unwrap();
                let start = DecodeStart {
                    tokens: (0..rows as u32).map(|row| 5 + row).collect(),
                    positions: (prompts.iter().zip(&deltas))
                        .map(|(prompt, delta)| prompt.len() as i64 + delta)
                        .collect(),
                    most_steps: 12,
                    sampling: SamplingConfig::default(),
                    draws: Vec::new(),
                    seen: Vec::new(),
                };
                let cache = || {
                    let format = CacheFormat::Float;
                    let mut cache = KeyValueCache::with_format(layers, input.seq() + 32, format);
                    model.hidden_states(&input, None, &config, Some(&mut cache), None, &device);
                    cache
                };
                let caches = [cache(), cache()];
                let both = || -> [Box<dyn Decoder>; 2] {
                    let [one, other] = &caches;
                    let recorded = recorded::start(&model, &config, one, &start);
                    let launched = decode::start(&model, &config, other, &start);
                    [recorded.expect(&name), launched.expect(&name)]
                };
                let [mut recorded, mut launched] = both();
                for step in 0..12 {
                    let tokens = recorded.next_tokens().unwrap();
                    assert_eq!(
                        tokens,
                        launched.next_tokens().unwrap(),
                        "{name}, step {step}"
                    );
                    seen.extend(tokens);
                }
                drop((recorded, launched));
                // Over the same places of the caches, with tokens from outside.
                let [mut recorded, mut launched] = both();
                for step in 0..3u32 {
                    let tokens: Vec<u32> =
                        (0..rows as u32).map(|row| 40 + 9 * row + step).collect();
                    let logits = recorded.next_logits(&tokens).unwrap();
                    let want = launched.next_logits(&tokens).unwrap();
                    assert_eq!(logits, want, "{name}, logits of step {step}");
                }
            }
        }
    }
    assert!(seen.len() > 2, "always the same tokens: {seen:?}");
}
