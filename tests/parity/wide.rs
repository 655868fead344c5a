//! A full-width model of four layers beside transformers and PEFT, in bf16, on a machine that has them.
//!
//! `tests/fixtures/wide_model.py` writes the folder that `WIDE_FIXTURES` names; without it the test
//! says so and passes.

use std::path::{Path, PathBuf};

use burn::{
    backend::Autodiff,
    module::{AutodiffModule, Module},
    optim::{GradientsParams, Optimizer},
    tensor::DType,
};
use serde_json::Value;
use xray_qwen3vl::{
    adapters::lora::files::load_adapter,
    batch::{
        images::ImageInput,
        micro_batch::{IGNORE_INDEX, MicroBatch},
        text::{Padding, TextInput},
    },
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, nn::InitOptions, weights::load_checkpoint},
    runtime::{accelerator::Accelerator, vision::encode_images},
    train::{
        gradients::{GradientOptions, add_gradients, gradients},
        optimizer::{AdamW, AdamWConfig},
    },
};

use crate::{
    backend::{TestBackend, device},
    support::{Reference, relative_distance, values},
};

type B = TestBackend;
type AB = Autodiff<TestBackend>;

fn folder() -> PathBuf {
    let folder = std::env::var_os("WIDE_FIXTURES");
    PathBuf::from(folder.expect("WIDE_FIXTURES is set"))
}

fn load<C: Accelerator<Device = burn::tensor::Device<B>>>(
    dir: &Path,
) -> (Qwen3Vl<C>, Qwen3VlConfig) {
    let dir = dir.join("model");
    let config = Qwen3VlConfig::from_dir(&dir).unwrap();
    let options = InitOptions {
        dtype: DType::BF16,
        ..InitOptions::default()
    };
    let mut model = Qwen3Vl::new(&config, &options, &device());
    load_checkpoint(&mut model, &dir, DType::BF16, &mut |_, _| {}).unwrap();
    (model, config)
}

fn ids(entry: &Value) -> Vec<u32> {
    let ids = entry["input_ids"].as_array().unwrap();
    ids.iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn images(entry: &Value, reference: &Reference, name: &str) -> ImageInput {
    let grids = entry["grids"].as_array().unwrap().iter();
    ImageInput {
        image_grid_thw: grids
            .map(|grid| [0, 1, 2].map(|axis| grid[axis].as_u64().unwrap() as usize))
            .collect(),
        pixel_values: if reference.has(name) {
            reference.f32s(name).into()
        } else {
            Default::default()
        },
    }
}

fn text(ids: Vec<u32>, images: &ImageInput, config: &Qwen3VlConfig) -> TextInput {
    let grids = vec![images.image_grid_thw.clone()];
    TextInput::padded(&[ids], &grids, config, Padding::Right, 0)
        .unwrap()
        .0
}

#[test]
#[ignore = "needs WIDE_FIXTURES, the folder that tests/fixtures/wide_model.py writes"]
fn logits_are_as_near_as_the_references_own_bf16() {
    let dir = folder();
    let reference = Reference::at(&dir.join("tensors.safetensors"));
    let meta: Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("wide.json")).unwrap()).unwrap();
    let (model, config) = load::<B>(&dir);
    for (index, entry) in meta["prompts"].as_array().unwrap().iter().enumerate() {
        let images = images(entry, &reference, &format!("pixels.{index}"));
        let input = text(ids(entry), &images, &config);
        let vision = (!images.image_grid_thw.is_empty())
            .then(|| encode_images(&model, &images, &config, &device()));
        let hidden = model.hidden_states(&input, vision.as_ref(), &config, None, None, &device());
        let tokens = hidden.dims()[0];
        let ours = values(model.logits(hidden.narrow(0, tokens - 16, 16)));
        let exact = reference.f32s(&format!("logits_f32.{index}"));
        let theirs = relative_distance(&reference.f32s(&format!("logits_bf16.{index}")), &exact);
        let distance = relative_distance(&ours, &exact);
        println!("prompt {index}: ours {distance:.2e} from f32, transformers in bf16 {theirs:.2e}");
        // Rounded at fewer places, so no farther; a quarter for another order of sums.
        assert!(
            distance < 1.25 * theirs,
            "prompt {index}: {distance} {theirs}"
        );
    }
}

#[test]
#[ignore = "needs WIDE_FIXTURES, the folder that tests/fixtures/wide_model.py writes"]
fn losses_of_a_run_beside_peft() {
    let dir = folder();
    let reference = Reference::at(&dir.join("tensors.safetensors"));
    let meta: Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("wide.json")).unwrap()).unwrap();
    let (base, config) = load::<AB>(&dir);
    let (mut model, _) = load_adapter(base.no_grad(), &dir.join("adapter")).unwrap();
    let micros: Vec<MicroBatch> = meta["samples"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
        .map(|(index, entry)| {
            let ids = ids(entry);
            let from = entry["labels_from"].as_u64().unwrap() as usize;
            let images = images(entry, &reference, &format!("sample_pixels.{index}"));
            let labels = ids
                .iter()
                .enumerate()
                .map(|(at, id)| {
                    if at < from {
                        IGNORE_INDEX
                    } else {
                        i64::from(*id)
                    }
                })
                .collect();
            MicroBatch {
                text: text(ids, &images, &config),
                labels: vec![labels],
                images,
            }
        })
        .collect();
    let targets: usize = micros.iter().map(MicroBatch::targets).sum();
    let mut optimizer = AdamW::<AB>::new(AdamWConfig {
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
    });
    let lr = meta["lr"].as_f64().unwrap();
    let wanted = meta["losses"].as_array().unwrap();
    for (step, want) in wanted.iter().enumerate() {
        let inner = model.valid();
        let mut grads = GradientsParams::new();
        let mut loss = 0.0;
        for micro in &micros {
            let weight = 1.0 / targets as f64;
            let options = GradientOptions::default();
            let (new, sums) =
                gradients(&model, &inner, &config, micro, weight, &options, &device());
            add_gradients(&model, new, &mut grads);
            loss += sums.totals().nll * weight;
        }
        let clip = optimizer.clip_next(&model, &grads, 1.0).unwrap();
        let norm = clip.into_data().iter::<f64>().next().unwrap();
        let (want, want_norm) = (
            want.as_f64().unwrap(),
            meta["norms"][step].as_f64().unwrap(),
        );
        println!(
            "step {step}: loss {loss:.4}, PEFT {want:.4}; norm {norm:.4}, PEFT {want_norm:.4}"
        );
        // bf16 activations carry three digits; the difference may grow as the runs part.
        let allowed = 5e-3 * want * (1.0 + step as f64 / 10.0);
        assert!((loss - want).abs() < allowed, "step {step}: {loss} {want}");
        assert!(
            (norm / want_norm - 1.0).abs() < 0.1,
            "step {step}: {norm} {want_norm}"
        );
        model = optimizer.step(lr, model, grads);
    }
}
