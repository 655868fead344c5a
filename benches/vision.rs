//! How long is the vision tower? On the tiny model, to catch regressions.

mod harness;

use burn::prelude::*;
use harness::{Cpu, measure, patches, report, tiny};
use xray_qwen3vl::runtime::vision::encode_images;

fn main() {
    let pipeline = tiny();
    let run = |side: usize| {
        let input = patches(&pipeline, side);
        measure(&format!("vision_{}_patches", input.patches()), 15, || {
            let config = &pipeline.parts.config;
            let output = encode_images(&pipeline.model, &input, config, &pipeline.device);
            let _ = Cpu::sync(&pipeline.device);
            output.merged.into_data()
        })
    };
    report("vision", &[run(128), run(512)]);
}
