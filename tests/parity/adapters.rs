//! Adapters beyond the fixtures' one: files, rank stabilisation, DoRA, patterns.

use std::collections::BTreeMap;

use burn::{
    backend::Autodiff,
    module::{AutodiffModule, Module, Param},
    prelude::*,
    tensor::{DType, Distribution},
};
use xray_qwen3vl::{
    adapters::lora::{
        attach::{LinearMapper, attach},
        config::{LoraConfig, Patterns, TargetModules},
        files::{adapter_tensors, load_adapter, save_adapter},
        merge::merge,
    },
    batch::micro_batch::MicroBatch,
    qwen3_vl::{Qwen3Vl, nn::Linear, weights::TensorFile},
    train::gradients::{GradientOptions, gradients},
};

use crate::{
    backend::{TestBackend as B, device},
    model::{Loaded, images_of, load, load_from, sequence_images, single},
    support::{Reference, assert_close, fixtures, values},
};

#[test]
fn a_saved_adapter_is_peft_s_file_again() {
    let Loaded { model, .. } = load("model-tiny");
    let dir = fixtures().join("adapter");
    let (model, config) = load_adapter(model, &dir).unwrap();
    let out = tempfile::tempdir().unwrap();
    save_adapter(&model, &config, out.path()).unwrap();
    let open = |dir: &std::path::Path| TensorFile::open(&dir.join("adapter_model.safetensors"));
    let (theirs, ours) = (open(&dir).unwrap(), open(out.path()).unwrap());
    let shapes: BTreeMap<String, Vec<usize>> = theirs.shapes().unwrap();
    assert_eq!(ours.shapes().unwrap(), shapes);
    for name in shapes.keys() {
        assert_eq!(
            ours.read(name, DType::F32).unwrap(),
            theirs.read(name, DType::F32).unwrap(),
            "{name}"
        );
    }
    assert_eq!(LoraConfig::from_dir(out.path()).unwrap(), config);
}

/// Draws every `B` at random, so that the adapter does something.
struct Shake;

impl LinearMapper<B> for Shake {
    fn map_linear(&mut self, _path: &str, mut linear: Linear<B>) -> Linear<B> {
        if let Some(lora) = linear.lora.as_mut() {
            lora.lora_b = lora
                .lora_b
                .clone()
                .map(|b| b.random_like(Distribution::Normal(0.0, 0.05)));
            lora.lora_magnitude_vector = lora
                .lora_magnitude_vector
                .take()
                .map(|m| m.map(|m| m.clone() * (m.random_like(Distribution::Uniform(0.8, 1.2)))));
        }
        linear
    }
}

fn logits(model: &Qwen3Vl<B>, loaded: &Loaded) -> Vec<f32> {
    let reference = Reference::open("text.safetensors");
    let images = images_of(&sequence_images("one_image"));
    let ids = reference.id_rows("one_image.input_ids").remove(0);
    let input = single(ids, &images.image_grid_thw, &loaded.config);
    values(model.forward(&input, &images, &loaded.config, &device()))
}

fn variants() -> Vec<(&'static str, LoraConfig)> {
    let base = LoraConfig {
        lora_dropout: 0.0,
        ..LoraConfig::default()
    };
    let names =
        |names: &[&str]| TargetModules::Names(names.iter().map(|n| n.to_string()).collect());
    vec![
        ("all-linear", base.clone()),
        (
            "rsLoRA",
            LoraConfig {
                use_rslora: true,
                ..base.clone()
            },
        ),
        (
            "DoRA",
            LoraConfig {
                use_dora: true,
                ..base.clone()
            },
        ),
        (
            "list with patterns",
            LoraConfig {
                target_modules: names(&["q_proj", "down_proj", "qkv"]),
                rank_pattern: Patterns(vec![("down_proj".to_string(), 3)]),
                alpha_pattern: Patterns(vec![("q_proj".to_string(), 5.0)]),
                ..base
            },
        ),
    ]
}

#[test]
fn a_fresh_adapter_changes_nothing() {
    let loaded = load("model-tiny");
    let want = logits(&loaded.model, &loaded);
    for (name, config) in variants() {
        let (model, attached) = attach(loaded.model.clone(), &config, 1).unwrap();
        assert!(attached > 0);
        // DoRA divides by a norm and multiplies by the same: rounding only.
        assert_close(name, &logits(&model, &loaded), &want, 1e-4, 1e-4);
    }
}

#[test]
fn merged_equals_base_plus_adapter_and_survives_its_files() {
    let loaded = load("model-tiny");
    let plain = logits(&loaded.model, &loaded);
    for (name, config) in variants() {
        let (model, _) = attach(loaded.model.clone(), &config, 1).unwrap();
        let model = model.map_linears(&mut Shake);
        let want = logits(&model, &loaded);
        let moved = plain.iter().zip(&want).any(|(a, b)| (a - b).abs() > 1e-2);
        assert!(moved, "{name}: the adapter does nothing");
        let merged = merge(model.clone());
        assert_close(
            &format!("{name} merged"),
            &logits(&merged, &loaded),
            &want,
            1e-3,
            1e-3,
        );
        let dir = tempfile::tempdir().unwrap();
        save_adapter(&model, &config, dir.path()).unwrap();
        let (again, _) = load_adapter(loaded.model.clone(), dir.path()).unwrap();
        assert_eq!(adapter_tensors(&again).len(), adapter_tensors(&model).len());
        assert_close(
            &format!("{name} reloaded"),
            &logits(&again, &loaded),
            &want,
            1e-6,
            1e-6,
        );
    }
}

#[test]
fn dora_gradients_equal_finite_differences() {
    type AB = Autodiff<B>;
    let (base, config) = load_from::<AB>(fixtures().join("model-tiny"));
    let lora = LoraConfig {
        use_dora: true,
        lora_dropout: 0.0,
        ..LoraConfig::default()
    };
    let (model, _) = attach(base.no_grad(), &lora, 1).unwrap();
    let reference = Reference::open("text.safetensors");
    let images = images_of(&sequence_images("one_image"));
    let ids = reference.id_rows("one_image.input_ids").remove(0);
    let micro = MicroBatch {
        text: single(ids, &images.image_grid_thw, &config),
        labels: reference.int_rows("one_image.labels"),
        images,
    };
    let run = |model: &Qwen3Vl<AB>| {
        let options = GradientOptions::default();
        let (grads, sums) = gradients(
            model,
            &model.valid(),
            &config,
            &micro,
            1.0,
            &options,
            &device(),
        );
        (grads, sums.totals().nll)
    };
    let (grads, _) = run(&model);
    let nudge = |by: f64| {
        let mut model = model.clone();
        let linear = &mut model.model.language_model.layers[1].mlp.up_proj;
        let magnitude = linear
            .lora
            .as_mut()
            .unwrap()
            .lora_magnitude_vector
            .as_mut()
            .unwrap();
        let grad = grads.get::<B, 1>(magnitude.id).unwrap();
        let norm = f64::from(values((grad.clone() * grad.clone()).sum())[0]).sqrt();
        let moved = magnitude.val().inner() + grad * (by / norm);
        *magnitude = Param::initialized(magnitude.id, Tensor::from_inner(moved).require_grad());
        (run(&model).1, norm)
    };
    let (up, norm) = nudge(1e-2);
    let (down, _) = nudge(-1e-2);
    let slope = (up - down) / 2e-2;
    assert!(
        (slope / norm - 1.0).abs() < 3e-2,
        "slope {slope}, gradient norm {norm}"
    );
}
