//! Training of whole modules beside low-rank matrices (`modules_to_save`) against PEFT.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use burn::{
    backend::Autodiff,
    module::{AutodiffModule, Module},
    optim::Optimizer,
};
use xray_qwen3vl::{
    adapters::{
        lora::{
            attach::attach,
            config::{LoraConfig, TargetModules},
            files::{load_adapter_for_training, save_adapter},
            saved_modules::train_saved,
        },
        quantised::load::load_quantised,
    },
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, nn::InitOptions},
    train::{
        checkpoint::trained_params,
        gradients::GradientOptions,
        optimizer::{AdamW, AdamWConfig},
    },
};

use crate::{
    backend::{TestBackend, device},
    model::load_from,
    support::{Reference, fixtures, relative_distance},
    training::{PLAIN, one_image, run},
};

type AB = Autodiff<TestBackend>;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adapters")
}

/// Cases of `make_training.py` with their bases.
const CASES: [(&str, &str); 9] = [
    ("saved_head", "model-tiny"),
    ("saved_embedding", "model-tiny"),
    ("saved_norms", "model-tiny"),
    ("saved_merger", "model-tiny"),
    ("saved_linear", "model-tiny"),
    ("saved_first", "model-tiny"),
    ("tied_saved_head", "model-tiny-tied"),
    ("tied_saved_embedding", "model-tiny-tied"),
    ("tied_saved_ensured", "model-tiny-tied"),
];

#[test]
fn whole_modules_are_trained_and_written_as_in_peft() {
    let reference = Reference::at(&folder().join("training.safetensors"));
    for (name, base) in CASES {
        for checkpoint_text in [false, true] {
            let (model, config) = load_from::<AB>(fixtures().join(base));
            let adapted =
                load_adapter_for_training(model.no_grad(), &folder().join(name), 0.0).unwrap();
            let mut model = adapted.model;
            let mut optimizer = AdamW::<AB>::new(AdamWConfig::default());
            let micro = one_image(&config);
            let weight = 1.0 / micro.targets() as f64;
            let options = GradientOptions {
                checkpoint_text,
                checkpoint_vision: checkpoint_text,
                ..PLAIN
            };
            let losses = reference.f32s(&format!("{name}.losses"));
            let losses: Vec<f64> = losses.into_iter().map(f64::from).collect();
            for (step, want) in losses.iter().enumerate() {
                let (grads, totals) = run(&model, &config, &micro, weight, &options);
                // Rounding of three steps of AdamW, which divides small gradients by their own size.
                let far = (totals.loss() / want - 1.0).abs();
                assert!(far < 1e-4, "{name} step {step}: {} {want}", totals.loss());
                if step + 1 < losses.len() {
                    model = optimizer.step(1e-2, model, grads);
                }
            }
            let dir = tempfile::tempdir().unwrap();
            save_adapter(&model, &adapted.config, dir.path()).unwrap();
            let ours = Reference::at(&dir.path().join("adapter_model.safetensors"));
            let prefix = format!("{name}.");
            let names: BTreeSet<String> = reference
                .names()
                .into_iter()
                .filter_map(|key| key.strip_prefix(&prefix).map(str::to_owned))
                .filter(|key| key != "losses")
                .collect();
            assert_eq!(ours.names().into_iter().collect::<BTreeSet<_>>(), names);
            for key in names {
                let want = reference.f32s(&format!("{name}.{key}"));
                let shape = ours.shape(&key);
                let width: usize = shape[1..].iter().product();
                let all = ours.f32s(&key);
                let rows: Vec<f32> = all.chunks(width).step_by(8).flatten().copied().collect();
                // A step is 1e-2 an element, whatever its gradient: those near zero go either way.
                let far = relative_distance(&rows, &want);
                assert!(far < 2e-3, "{name} {key}: {far}");
            }
            // What was written is read, and trained on, again.
            let (model, _) = load_from::<AB>(fixtures().join(base));
            let again = load_adapter_for_training(model.no_grad(), dir.path(), 0.0).unwrap();
            let (_, totals) = run(&again.model, &config, &micro, weight, &options);
            let last = losses[losses.len() - 1];
            assert!((totals.loss() / last - 1.0).abs() < 1e-4, "{name} again");
            assert_eq!(again.config, adapted.config, "{name}");
        }
    }
}

fn lora(modules_to_save: &[&str]) -> LoraConfig {
    LoraConfig {
        target_modules: TargetModules::Names(vec!["q_proj".into()]),
        modules_to_save: modules_to_save.iter().map(|name| (*name).into()).collect(),
        ..LoraConfig::default()
    }
}

#[test]
fn a_fresh_adapter_starts_from_the_modules_of_the_base() {
    let (model, config) = load_from::<AB>(fixtures().join("model-tiny-tied"));
    let micro = one_image(&config);
    let plain = run(&model.clone().no_grad(), &config, &micro, 1.0, &PLAIN).1;
    let lora_config = lora(&["lm_head"]);
    let (model, _) = attach(model.no_grad(), &lora_config, 3).unwrap();
    let adapters = trained_params(&model).len();
    let (model, notes) = train_saved(model, &lora_config).unwrap();
    assert!(notes[0].contains("one table"), "{notes:?}");
    let trained = trained_params(&model);
    assert_eq!(trained.len(), adapters + 1);
    assert!(trained.iter().any(|(path, _)| path == "lm_head.weight"));
    let (grads, totals) = run(&model, &config, &micro, 1.0, &PLAIN);
    assert!((totals.loss() / plain.loss() - 1.0).abs() < 1e-6);
    assert_eq!(grads.len(), trained.len());
}

#[test]
fn modules_that_are_not_there_or_adapted_already_are_refused() {
    let refused = |names: &[&str]| {
        let (model, _) = load_from::<AB>(fixtures().join("model-tiny"));
        let (model, _) = attach(model.no_grad(), &lora(&[]), 3).unwrap();
        train_saved(model, &lora(names)).unwrap_err().to_string()
    };
    let error = refused(&["embed_token"]);
    assert!(error.contains("did you mean `embed_tokens`"), "{error}");
    // PEFT compares ends of paths: `proj` is the end of `q_proj` too.
    let error = refused(&["proj"]);
    assert!(
        error.contains("q_proj") && error.contains("one way"),
        "{error}"
    );
}

/// The numbers of a quantised matrix are not trained: a module that is becomes floats, which start from them.
#[test]
fn a_quantised_module_is_trained_as_floats() {
    let dir = fixtures().join("model-tiny");
    let config = Qwen3VlConfig::from_dir(&dir).unwrap();
    let model = Qwen3Vl::<AB>::new(&config, &InitOptions::default(), &device());
    let quantization = "int8".parse().unwrap();
    let dtype = burn::tensor::DType::F32;
    let model = load_quantised(model, &dir, quantization, false, dtype, &mut |_, _| {}).unwrap();
    let micro = one_image(&config);
    let lora_config = lora(&["lm_head", "embed_tokens"]);
    let (model, _) = attach(model.no_grad(), &lora_config, 3).unwrap();
    let before = run(&model, &config, &micro, 1.0, &PLAIN).1.loss();
    let (model, notes) = train_saved(model, &lora_config).unwrap();
    assert!(notes[0].contains("2 matrices"), "{notes:?}");
    let (grads, totals) = run(&model, &config, &micro, 1.0, &PLAIN);
    assert!((totals.loss() / before - 1.0).abs() < 1e-5);
    assert_eq!(grads.len(), trained_params(&model).len());
    let model = AdamW::<AB>::new(AdamWConfig::default()).step(1e-2, model, grads);
    let after = run(&model, &config, &micro, 1.0, &PLAIN).1.loss();
    assert!(after < before - 0.1, "{before} {after}");
    assert!(model.valid().quantization().is_some());
}
