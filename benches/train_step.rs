//! Forward and backward: how long is an optimizer step's gradient? LoRA on the tiny model,
//! with and without recomputation.

mod harness;

use std::sync::Arc;

use burn::{
    backend::Autodiff,
    module::{AutodiffModule, Module},
};
use harness::{Cpu, measure, options, report, tiny};
use xray_qwen3vl::{
    adapters::lora::attach::attach,
    dataset::{Dataset, loader::WindowLoader},
    runtime::pipeline::load_model,
    train::{
        config::TrainConfig,
        gradients::{GradientOptions, gradients},
    },
};

type AB = Autodiff<Cpu>;

fn main() {
    let parts = Arc::new(tiny().parts);
    let config = TrainConfig {
        per_device_train_batch_size: 16,
        gradient_accumulation_steps: 1,
        ..TrainConfig::default()
    };
    let data = Dataset::open("phantom:1:0..16:house").expect("a phantom data set");
    let loader = WindowLoader::new(data, parts.clone(), config.window_plan(1), 0, 1);
    let window = loader.window(0).expect("phantoms encode");
    let device = Default::default();
    let base = load_model::<AB>(&options(), &parts.config, &device, &mut |_, _| {})
        .expect("model/tiny loads");
    let (model, _) = attach(base.no_grad(), &config.lora_config(), 1).expect("layers to adapt");
    let inner = model.valid();
    let run = |name: &str, checkpoint_text: bool| {
        let options = GradientOptions {
            checkpoint_text,
            ..GradientOptions::default()
        };
        measure(name, 9, || {
            window.parts[0]
                .iter()
                .map(|batch| {
                    gradients(&model, &inner, &parts.config, batch, 1.0, &options, &device)
                        .1
                        .totals()
                })
                .collect::<Vec<_>>()
        })
    };
    report(
        "train_step",
        &[
            run("lora_gradients_b16", false),
            run("lora_gradients_b16_recompute", true),
        ],
    );
}
