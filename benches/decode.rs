//! Decode: how fast do tokens come? 64 cached steps on the tiny model.

mod harness;

use harness::{measure, patches, report, tiny};
use xray_qwen3vl::runtime::generate::{GenerationConfig, generate};

const STEPS: usize = 64;

fn main() {
    let pipeline = tiny();
    let run = |batch: usize| {
        let prompt = pipeline
            .parts
            .prompt(None, "这张胸片有什么异常？", patches(&pipeline, 128))
            .expect("a plain question");
        let prompts = vec![prompt; batch];
        let decode = |new: usize, name: &str| {
            let settings = GenerationConfig {
                max_new_tokens: new,
                stop_on_repetition: false,
                ..GenerationConfig::default()
            };
            measure(name, 7, || {
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
        let first = decode(1, &format!("first_token_b{batch}"));
        let all = decode(STEPS + 1, &format!("decode_b{batch}_{STEPS}_steps"));
        let seconds = (all.median_ms - first.median_ms) / 1e3;
        println!("{:.0} tokens/s", (STEPS * batch) as f64 / seconds);
        all
    };
    report("decode", &[run(1), run(8)]);
}
