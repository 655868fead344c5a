//! Prefill: how long is a prompt? Vision and language model up to the first token, on the tiny model.

mod harness;

use harness::{measure, patches, report, tiny};
use xray_qwen3vl::runtime::generate::{GenerationConfig, generate};

fn main() {
    let pipeline = tiny();
    let settings = GenerationConfig {
        max_new_tokens: 1,
        ..GenerationConfig::default()
    };
    let run = |side: usize, batch: usize| {
        let prompt = pipeline
            .parts
            .prompt(None, "这张胸片有什么异常？", patches(&pipeline, side))
            .expect("a plain question");
        let name = format!("prefill_b{batch}_s{}", prompt.input_ids.len());
        let prompts = vec![prompt; batch];
        measure(&name, 15, || {
            generate(
                &pipeline.model,
                &pipeline.parts.config,
                &prompts,
                &settings,
                &pipeline.device,
                &mut |_, _| None,
            )
        })
    };
    report("prefill", &[run(128, 1), run(512, 1), run(128, 8)]);
}
