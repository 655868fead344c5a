//! Loss, gradients, optimizer steps and whole trajectories against PyTorch.

use std::collections::BTreeMap;

use burn::{
    backend::Autodiff,
    module::{AutodiffModule, Module, ModuleVisitor, Param},
    optim::{GradientsParams, Optimizer},
    prelude::*,
};
use serde_json::Value;
use xray_qwen3vl::{
    adapters::lora::files::{adapter_params, adapter_tensors, load_adapter},
    batch::{
        images::ImageInput,
        micro_batch::{IGNORE_INDEX, MicroBatch},
        text::{Padding, TextInput},
    },
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig},
    train::{
        gradients::{GradientOptions, add_gradients, evaluate, gradients},
        loss::LossTotals,
        optimizer::{AdamW, AdamWConfig},
    },
    weights::Weight,
};

use crate::{
    backend::{TestBackend, device},
    model::{images_of, load_from},
    support::{Reference, assert_close, fixtures, json, relative_distance, values},
};

pub type AB = Autodiff<TestBackend>;

pub const PLAIN: GradientOptions = GradientOptions {
    checkpoint_text: false,
    recompute_pointwise: false,
    checkpoint_vision: false,
    dropout_seed: None,
    manual_backward: true,
};

/// The base model, frozen, with the trained adapter of the fixtures attached.
fn adapted() -> (Qwen3Vl<AB>, Qwen3VlConfig) {
    let (base, config) = load_from::<AB>(fixtures().join("model-tiny"));
    let (model, _) = load_adapter(base.no_grad(), &fixtures().join("adapter")).unwrap();
    (model, config)
}

fn names(value: &Value) -> Vec<String> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n.as_str().unwrap().to_string())
        .collect()
}

/// A right-padded batch with its images dealt out to the rows by their numbers of tokens.
fn batch(
    ids: Vec<Vec<u32>>,
    mask: Vec<Vec<i64>>,
    labels: Vec<Vec<i64>>,
    images: ImageInput,
    config: &Qwen3VlConfig,
) -> MicroBatch {
    let rows: Vec<Vec<u32>> = ids
        .iter()
        .zip(&mask)
        .map(|(ids, mask)| {
            ids.iter()
                .zip(mask)
                .filter(|(_, real)| **real == 1)
                .map(|(id, _)| *id)
                .collect()
        })
        .collect();
    let mut left = images.image_grid_thw.clone().into_iter();
    let grids: Vec<Vec<[usize; 3]>> = rows
        .iter()
        .map(|row| {
            let mut tokens = row
                .iter()
                .filter(|id| **id == config.image_token_id)
                .count();
            let mut grids = Vec::new();
            while tokens > 0 {
                let grid = left.next().unwrap();
                tokens -= grid.iter().product::<usize>() / 4;
                grids.push(grid);
            }
            grids
        })
        .collect();
    let (text, _) = TextInput::padded(&rows, &grids, config, Padding::Right, 0).unwrap();
    MicroBatch {
        text,
        labels,
        images,
    }
}

pub fn one_image(config: &Qwen3VlConfig) -> MicroBatch {
    let reference = Reference::open("text.safetensors");
    let ids = reference.id_rows("one_image.input_ids");
    let mask = vec![vec![1; ids[0].len()]];
    let images = images_of(&names(
        &json("inputs.json")["sequences"]["one_image"]["images"],
    ));
    batch(
        ids,
        mask,
        reference.int_rows("one_image.labels"),
        images,
        config,
    )
}

pub fn batch_right(config: &Qwen3VlConfig) -> MicroBatch {
    let reference = Reference::open("batch.safetensors");
    let inputs = json("inputs.json");
    let images: Vec<String> = names(&json("train.json")["batch_rows"])
        .iter()
        .flat_map(|row| names(&inputs["sequences"][row]["images"]))
        .collect();
    batch(
        reference.id_rows("batch_right.input_ids"),
        reference.int_rows("batch_right.attention_mask"),
        reference.int_rows("batch_right.labels"),
        images_of(&images),
        config,
    )
}

pub fn micro_batches(config: &Qwen3VlConfig) -> Vec<MicroBatch> {
    let reference = Reference::open("train_microbatches.safetensors");
    json("train.json")["microbatches"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
        .map(|(index, meta)| {
            let micro = batch(
                reference.id_rows(&format!("mb{index}.input_ids")),
                reference.int_rows(&format!("mb{index}.attention_mask")),
                reference.int_rows(&format!("mb{index}.labels")),
                images_of(&names(&meta["images"])),
                config,
            );
            assert_eq!(
                micro.targets() as u64,
                meta["n_target_tokens"].as_u64().unwrap()
            );
            micro
        })
        .collect()
}

pub fn run(
    model: &Qwen3Vl<AB>,
    config: &Qwen3VlConfig,
    micro: &MicroBatch,
    weight: f64,
    options: &GradientOptions,
) -> (GradientsParams, LossTotals) {
    let inner = model.valid();
    let (grads, sums) = gradients(model, &inner, config, micro, weight, options, &device());
    (grads, sums.totals())
}

/// Gradients of the adapter by PEFT's names.
fn named(model: &Qwen3Vl<AB>, grads: &GradientsParams) -> BTreeMap<String, Vec<f32>> {
    adapter_params(model)
        .into_iter()
        .map(|(name, id)| {
            let grad = grads
                .get::<TestBackend, 2>(id)
                .unwrap_or_else(|| panic!("{name}"));
            (name, values(grad))
        })
        .collect()
}

fn check_adapter(part: &str, model: &Qwen3Vl<AB>, reference: &Reference, case: &str, abs: f32) {
    let tensors = adapter_tensors(model);
    assert!(!tensors.is_empty());
    for tensor in tensors {
        let ours: Vec<f32> = (tensor.data)().to_vec().unwrap();
        let want = reference.f32s(&format!("{case}.{}", tensor.name));
        assert_close(&format!("{part} {}", tensor.name), &ours, &want, abs, 0.0);
    }
}

#[test]
fn loss_of_every_sequence() {
    let (base, config) = load_from::<TestBackend>(fixtures().join("model-tiny"));
    let text = Reference::open("text.safetensors");
    let inputs = json("inputs.json");
    for (sequence, want) in json("train.json")["loss"].as_object().unwrap() {
        let ids = text.id_rows(&format!("{sequence}.input_ids"));
        let mask = vec![vec![1; ids[0].len()]];
        let labels = text.int_rows(&format!("{sequence}.labels"));
        let images = images_of(&names(&inputs["sequences"][sequence]["images"]));
        let micro = batch(ids, mask, labels, images, &config);
        let totals = evaluate(&base, &config, &micro, &device()).totals();
        let loss = want["loss_mean"].as_f64().unwrap();
        assert!(
            (totals.loss() / loss - 1.0).abs() < 1e-5,
            "{sequence}: {} {loss}",
            totals.loss()
        );
        assert_eq!(
            totals.targets as u64,
            want["n_target_tokens"].as_u64().unwrap()
        );
        let accuracy = want["token_acc"].as_f64().unwrap();
        assert!(
            (totals.token_accuracy() - accuracy).abs() < 1e-6,
            "{sequence} accuracy"
        );
        // The reference's sum over positions is the same number once more.
        let nll: f32 = Reference::open("loss.safetensors")
            .f32s(&format!("{sequence}.token_nll_shifted"))
            .iter()
            .sum();
        assert!(
            (totals.nll / f64::from(nll) - 1.0).abs() < 1e-5,
            "{sequence} nll"
        );
    }
}

#[test]
fn adapter_gradients_with_and_without_recomputation() {
    let (model, config) = adapted();
    let reference = Reference::open("lora_grads.safetensors");
    for (case, micro) in [
        ("single", one_image(&config)),
        ("batch", batch_right(&config)),
    ] {
        for (checkpoint_text, recompute_pointwise, manual_backward) in [
            (false, false, true),
            (false, true, true),
            (true, false, true),
            (false, false, false),
            (true, false, false),
        ] {
            let options = GradientOptions {
                checkpoint_text,
                recompute_pointwise,
                manual_backward,
                ..PLAIN
            };
            let weight = 1.0 / micro.targets() as f64;
            let (grads, totals) = run(&model, &config, &micro, weight, &options);
            let loss = f64::from(reference.f32s(&format!("{case}.loss"))[0]);
            assert!(
                (totals.loss() / loss - 1.0).abs() < 1e-5,
                "{case} loss {}",
                totals.loss()
            );
            let grads = named(&model, &grads);
            for (name, ours) in grads {
                let want = reference.f32s(&format!("{case}.{name}"));
                let distance = relative_distance(&ours, &want);
                assert!(
                    distance < 1e-3,
                    "{case} {name}: relative distance {distance}"
                );
            }
        }
    }
}

#[test]
fn only_the_adapter_gets_gradients() {
    let (model, config) = adapted();
    let micro = one_image(&config);
    let (grads, _) = run(&model, &config, &micro, 1.0, &PLAIN);
    assert_eq!(grads.len(), adapter_params(&model).len());
}

#[test]
fn one_optimizer_step() {
    let reference = Reference::open("adamw_step.safetensors");
    let train = json("train.json");
    for (case, settings) in train["adamw_step"].as_object().unwrap() {
        let (model, config) = adapted();
        let number = |key: &str| settings[key].as_f64().unwrap();
        let mut optimizer = AdamW::<AB>::new(adamw_config(settings));
        let micro = one_image(&config);
        let weight = 1.0 / micro.targets() as f64;
        let (grads, totals) = run(&model, &config, &micro, weight, &PLAIN);
        assert!((totals.loss() - number("loss_before")).abs() < 1e-4);
        let clip = optimizer.clip_next(&model, &grads, number("max_grad_norm"));
        let norm = norm_of(clip);
        let want = number("grad_norm_before_clip");
        assert!(
            (norm / want - 1.0).abs() < 1e-4,
            "{case}: norm {norm}, reference {want}"
        );
        let model = optimizer.step(number("lr"), model, grads);
        check_adapter(case, &model, &reference, case, 5e-5);
        let after = run(&model, &config, &micro, weight, &PLAIN).1.loss();
        assert!(
            (after - number("loss_after")).abs() < 1e-3,
            "{case}: loss after {after}"
        );
    }
}

/// The norm before clipping, of what `AdamW::clip_next` gives.
fn norm_of(clip: Option<Tensor<TestBackend, 1>>) -> f64 {
    let clip = clip.expect("there are gradients").into_data();
    clip.iter::<f64>().next().unwrap()
}

fn adamw_config(settings: &Value) -> AdamWConfig {
    AdamWConfig {
        beta1: settings["betas"][0].as_f64().unwrap(),
        beta2: settings["betas"][1].as_f64().unwrap(),
        epsilon: settings["eps"].as_f64().unwrap(),
        weight_decay: settings["weight_decay"].as_f64().unwrap(),
    }
}

#[test]
fn ten_step_trajectories() {
    let reference = Reference::open("train_final.safetensors");
    for (case, settings) in json("train.json")["trajectory"].as_object().unwrap() {
        let (mut model, config) = adapted();
        let micros = micro_batches(&config);
        let mut optimizer = AdamW::<AB>::new(adamw_config(settings));
        let by_token = settings["reduction"] == "token";
        for step in settings["steps"].as_array().unwrap() {
            let window: Vec<&MicroBatch> = step["microbatches"]
                .as_array()
                .unwrap()
                .iter()
                .map(|index| &micros[index.as_u64().unwrap() as usize])
                .collect();
            let items: usize = window.iter().map(|micro| micro.targets()).sum();
            let mut grads = GradientsParams::new();
            let mut loss = 0.0;
            for micro in &window {
                let weight = if by_token {
                    1.0 / items as f64
                } else {
                    1.0 / (micro.targets() * window.len()) as f64
                };
                let (new, totals) = run(&model, &config, micro, weight, &PLAIN);
                add_gradients(&model, new, &mut grads);
                loss += totals.nll * weight;
            }
            let want = step["step_loss"].as_f64().unwrap();
            assert!(
                (loss - want).abs() < 1e-3,
                "{case} step {}: {loss} {want}",
                step["step"]
            );
            let max_norm = settings["max_grad_norm"].as_f64().unwrap();
            let norm = norm_of(optimizer.clip_next(&model, &grads, max_norm));
            let want = step["grad_norm"].as_f64().unwrap();
            assert!(
                (norm / want - 1.0).abs() < 5e-3,
                "{case} {}: norm {norm} {want}",
                step["step"]
            );
            model = optimizer.step(step["lr"].as_f64().unwrap(), model, grads);
        }
        check_adapter(case, &model, &reference, case, 1e-3);
    }
}

/// Every gradient of a module by the order of its parameters.
pub fn all_gradients(model: &Qwen3Vl<AB>, grads: &GradientsParams) -> Vec<Vec<f32>> {
    struct Collect<'a>(&'a GradientsParams, Vec<Vec<f32>>);
    impl ModuleVisitor<AB> for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
            let grad = self.0.get::<TestBackend, D>(param.id);
            self.1.push(grad.map_or_else(Vec::new, values));
        }
    }
    let mut collect = Collect(grads, Vec::new());
    model.visit(&mut collect);
    collect.1
}

#[test]
fn full_training_gradients_do_not_depend_on_recomputation() {
    for name in ["model-tiny", "model-tiny-tied"] {
        let (model, config) = load_from::<AB>(fixtures().join(name));
        let micro = batch_right(&config);
        let weight = 1.0 / micro.targets() as f64;
        let plain = run(&model, &config, &micro, weight, &PLAIN).0;
        let plain = all_gradients(&model, &plain);
        assert!(
            plain.iter().all(|grad| !grad.is_empty()),
            "{name}: a parameter has no gradient"
        );
        for (checkpoint_text, checkpoint_vision) in [(true, false), (false, true), (true, true)] {
            let options = GradientOptions {
                checkpoint_text,
                checkpoint_vision,
                ..PLAIN
            };
            let again = run(&model, &config, &micro, weight, &options).0;
            for (index, (a, b)) in plain.iter().zip(all_gradients(&model, &again)).enumerate() {
                // The same sums in another order.
                let distance = relative_distance(&b, a);
                assert!(
                    distance < 1e-4,
                    "{name} {options:?} parameter {index}: {distance}"
                );
            }
        }
    }
}

fn floats(weight: &Weight<AB>) -> Param<Tensor<AB, 2>> {
    match weight {
        Weight::Dense(param) => param.clone(),
        Weight::Packed(_) => panic!("fixtures hold floats"),
    }
}

#[test]
fn full_training_gradients_equal_finite_differences() {
    let (model, config) = load_from::<AB>(fixtures().join("model-tiny-tied"));
    let micro = one_image(&config);
    let (grads, _) = run(&model, &config, &micro, 1.0, &PLAIN);
    // One direction through all weights of a matrix: the loss changes by the gradient's norm.
    let check = |part: &str, grad: Tensor<TestBackend, 2>, nudged: &dyn Fn(f64) -> Qwen3Vl<AB>| {
        let norm = f64::from(values((grad.clone() * grad).sum())[0]).sqrt();
        let eps = 1e-3;
        let at = |side: f64| {
            let model = nudged(side * eps / norm);
            evaluate(&model.valid(), &config, &micro, &device())
                .totals()
                .nll
        };
        let slope = (at(1.0) - at(-1.0)) / (2.0 * eps);
        assert!(
            (slope / norm - 1.0).abs() < 2e-2,
            "{part}: slope {slope}, gradient norm {norm}"
        );
    };
    let embed = floats(&model.model.language_model.embed_tokens.weight);
    let grad = grads.get::<TestBackend, 2>(embed.id).unwrap();
    check("tied embedding", grad.clone(), &|by| {
        let mut model = model.clone();
        let weight = &mut model.model.language_model.embed_tokens.weight;
        let moved = floats(weight).map(|w| w + Tensor::from_inner(grad.clone() * by));
        *weight = Weight::Dense(moved);
        model
    });
    let qkv = floats(&model.model.visual.blocks[0].attn.qkv.weight);
    let grad = grads.get::<TestBackend, 2>(qkv.id).unwrap();
    check("vision qkv", grad.clone(), &|by| {
        let mut model = model.clone();
        let weight = &mut model.model.visual.blocks[0].attn.qkv.weight;
        let moved = floats(weight).map(|w| w + Tensor::from_inner(grad.clone() * by));
        *weight = Weight::Dense(moved);
        model
    });
}

#[test]
fn packed_gradients_equal_unpacked_ones() {
    let (model, config) = adapted();
    let micros = micro_batches(&config);
    let items: usize = micros.iter().map(MicroBatch::targets).sum();
    let weight = 1.0 / items as f64;
    let mut apart = GradientsParams::new();
    let mut samples = Vec::new();
    let mut grids = Vec::new();
    let mut labels = Vec::new();
    let mut images = ImageInput::default();
    for micro in &micros {
        add_gradients(
            &model,
            run(&model, &config, micro, weight, &PLAIN).0,
            &mut apart,
        );
        let mut left = micro.images.image_grid_thw.clone().into_iter();
        for (row, segments) in micro.text.segments.iter().enumerate() {
            let real = segments.iter().filter(|segment| **segment >= 0).count();
            let ids = micro.text.input_ids[row][..real].to_vec();
            let mut tokens = ids
                .iter()
                .filter(|id| **id == config.image_token_id)
                .count();
            let mut own = Vec::new();
            while tokens > 0 {
                let grid = left.next().unwrap();
                tokens -= grid.iter().product::<usize>() / 4;
                own.push(grid);
            }
            labels.extend(&micro.labels[row][..real]);
            samples.push(ids);
            grids.push(own);
        }
        images.extend(&micro.images);
    }
    let text = TextInput::packed(&samples, &grids, &config).unwrap();
    assert_eq!(labels[0], IGNORE_INDEX);
    let packed = MicroBatch {
        text,
        labels: vec![labels],
        images,
    };
    assert_eq!(packed.targets(), items);
    let together = named(&model, &run(&model, &config, &packed, weight, &PLAIN).0);
    for (name, want) in named(&model, &apart) {
        let distance = relative_distance(&together[&name], &want);
        assert!(distance < 1e-4, "{name}: {distance}");
    }
}

#[test]
fn dropout_is_the_same_in_the_recomputed_pass() {
    let (base, config) = load_from::<AB>(fixtures().join("model-tiny"));
    let lora = xray_qwen3vl::adapters::lora::config::LoraConfig::from_dir(
        &fixtures().join("adapter_dropout_cfg"),
    )
    .unwrap();
    let model = xray_qwen3vl::adapters::lora::files::load_adapter_tensors(
        base.no_grad(),
        &lora,
        &fixtures().join("adapter"),
    )
    .unwrap();
    let micro = one_image(&config);
    let gradients_of = |checkpoint_text, manual_backward, dropout_seed| {
        let options = GradientOptions {
            checkpoint_text,
            dropout_seed,
            manual_backward,
            ..PLAIN
        };
        named(&model, &run(&model, &config, &micro, 1.0, &options).0)
    };
    let plain = gradients_of(false, true, Some(5));
    let pointwise = GradientOptions {
        recompute_pointwise: true,
        dropout_seed: Some(5),
        ..PLAIN
    };
    let again = run(&model, &config, &micro, 1.0, &pointwise).0;
    for (name, again) in named(&model, &again) {
        // The same operations over the same numbers.
        assert!(relative_distance(&again, &plain[&name]) < 1e-6, "{name}");
    }
    for (checkpoint_text, manual_backward) in [(true, true), (false, false), (true, false)] {
        for (name, again) in gradients_of(checkpoint_text, manual_backward, Some(5)) {
            assert!(relative_distance(&again, &plain[&name]) < 1e-4, "{name}");
        }
    }
    let (name, other) = gradients_of(false, true, Some(6)).pop_first().unwrap();
    assert!(relative_distance(&other, &plain[&name]) > 1e-3);
    let (name, none) = gradients_of(false, true, None).pop_first().unwrap();
    assert!(relative_distance(&none, &plain[&name]) > 1e-3);
}
