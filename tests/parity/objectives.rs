//! Preferences and rewards against TRL: losses, gradients, ten steps each.

use burn::{
    module::AutodiffModule,
    optim::{GradientsParams, Optimizer},
    prelude::*,
};
use serde_json::Value;
use std::{cell::RefCell, collections::BTreeMap};
use xray_qwen3vl::{
    adapters::lora::files::{adapter_params, adapter_tensors, load_adapter},
    batch::{
        micro_batch::{IGNORE_INDEX, MicroBatch},
        sequences::{SequenceCounts, Sequences},
        text::{Padding, TextInput},
    },
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig},
    train::{
        gradients::{GradientOptions, gradients_of},
        loss::LossTotals,
        objective::{
            dpo::{Dpo, PairLoss},
            grpo::{Grpo, PolicyLoss, RatioLevel},
            reference::Reference,
            sums::ObjectiveSums,
        },
        optimizer::{AdamW, AdamWConfig},
        scores::{TargetWeights, TokenScores, token_scores},
    },
};

use crate::{
    backend::{TestBackend, device},
    model::{images_of, load_from},
    support::{Reference as Tensors, assert_close, fixtures, json, relative_distance, values},
};

type AB = burn::backend::Autodiff<TestBackend>;

/// A sample: its prompt, the images of the prompt, and an answer.
#[derive(Clone)]
struct Sample {
    prompt: Vec<u32>,
    images: Vec<String>,
    answer: Vec<u32>,
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("no number: {value}"))
}

fn sample(record: &Value, prompt: &Value, answer: &Value) -> Sample {
    let prompt = &record["prompts"][prompt.as_u64().unwrap() as usize];
    let images = prompt["images"].as_array().unwrap().iter();
    Sample {
        prompt: ids(&prompt["ids"]),
        images: images
            .map(|name| name.as_str().unwrap().to_string())
            .collect(),
        answer: ids(answer),
    }
}

/// Chosen and rejected answers of some prompts, one after the other.
fn pairs(record: &Value, which: &[usize]) -> Vec<Sample> {
    let both = which.iter().flat_map(|prompt| {
        ["chosen", "rejected"]
            .map(|kind| sample(record, &serde_json::json!(prompt), &record[kind][*prompt]))
    });
    both.collect()
}

/// The drawn answers `range`.
fn drawn(record: &Value, range: std::ops::Range<usize>) -> Vec<Sample> {
    range
        .map(|index| {
            let one = &record["samples"][index];
            sample(record, &one["prompt"], &one["answer"])
        })
        .collect()
}

fn micro_batch(samples: &[Sample], config: &Qwen3VlConfig, packed: bool) -> MicroBatch {
    let rows: Vec<Vec<u32>> = samples
        .iter()
        .map(|one| [&one.prompt[..], &one.answer].concat())
        .collect();
    let grids: Vec<Vec<[usize; 3]>> = samples
        .iter()
        .map(|one| images_of(&one.images).image_grid_thw)
        .collect();
    let names: Vec<String> = samples.iter().flat_map(|one| one.images.clone()).collect();
    let labels = |one: &Sample| {
        let mut labels = vec![IGNORE_INDEX; one.prompt.len()];
        labels.extend(one.answer.iter().map(|id| i64::from(*id)));
        labels
    };
    let (text, labels) = if packed {
        let text = TextInput::packed(&rows, &grids, config).unwrap();
        (text, vec![samples.iter().flat_map(labels).collect()])
    } else {
        let (text, _) = TextInput::padded(&rows, &grids, config, Padding::Right, 0).unwrap();
        let seq = text.seq();
        let padded = samples.iter().map(|one| {
            let mut labels = labels(one);
            labels.resize(seq, IGNORE_INDEX);
            labels
        });
        (text, padded.collect())
    };
    MicroBatch {
        text,
        labels,
        images: images_of(&names),
    }
}

fn adapted() -> (Qwen3Vl<AB>, Qwen3VlConfig) {
    let (base, config) = load_from::<AB>(fixtures().join("model-tiny"));
    let (model, _) = load_adapter(base.no_grad(), &fixtures().join("adapter")).unwrap();
    (model, config)
}

fn log_probabilities(
    model: &Qwen3Vl<TestBackend>,
    config: &Qwen3VlConfig,
    batch: &MicroBatch,
    temperature: f64,
) -> Vec<f32> {
    token_scores(model, config, batch, temperature, &device()).log_probabilities
}

type Derivative<'a> = dyn Fn(&TokenScores) -> (Vec<f32>, ObjectiveSums) + 'a;

/// Gradients of a loss over a batch, and what the batch came to.
fn learn(
    model: &Qwen3Vl<AB>,
    config: &Qwen3VlConfig,
    batch: &MicroBatch,
    temperature: f64,
    options: &GradientOptions,
    loss: &Derivative<'_>,
) -> (GradientsParams, LossTotals, ObjectiveSums) {
    let came_to = RefCell::new(ObjectiveSums::default());
    let derivative = |scores: &TokenScores| {
        let (derivative, sums) = loss(scores);
        *came_to.borrow_mut() = sums;
        derivative
    };
    let weights = TargetWeights::Each {
        temperature,
        derivative: &derivative,
    };
    let inner = model.valid();
    let (grads, sums) = gradients_of(model, &inner, config, batch, weights, options, &device());
    (grads, sums.totals(), came_to.into_inner())
}

fn norm(model: &Qwen3Vl<AB>, grads: &GradientsParams) -> f64 {
    let squares = adapter_params(model).into_iter().map(|(name, id)| {
        let grad = grads.get::<TestBackend, 2>(id);
        let grad = values(grad.unwrap_or_else(|| panic!("{name} has no gradient")));
        grad.iter()
            .map(|one| f64::from(*one) * f64::from(*one))
            .sum::<f64>()
    });
    squares.sum::<f64>().sqrt()
}

fn close(part: &str, ours: f64, want: f64, relative: f64) {
    let scale = want.abs().max(1e-2);
    assert!(
        (ours - want).abs() < relative * scale,
        "{part}: {ours}, reference {want}"
    );
}

/// Compares the gradients that the file holds.
fn check_gradients(case: &str, model: &Qwen3Vl<AB>, grads: &GradientsParams, file: &Tensors) {
    let mut seen = 0;
    for (name, id) in adapter_params(model) {
        let name = format!("{case}.{name}");
        if !file.has(&name) {
            continue;
        }
        seen += 1;
        let ours = values(grads.get::<TestBackend, 2>(id).unwrap());
        let distance = relative_distance(&ours, &file.f32s(&name));
        // The tolerance of the other gradients of this folder.
        assert!(distance < 1e-3, "{name}: relative distance {distance}");
    }
    assert_eq!(seen, 14, "{case}: gradients of one layer");
}

/// Every way to the gradients: the manual backward pass with and without recomputation, and autodiff.
fn every_way() -> Vec<GradientOptions> {
    let ways = [
        (false, false, true),
        (false, true, true),
        (true, false, true),
        (false, false, false),
        (true, false, false),
    ];
    ways.map(
        |(checkpoint_text, recompute_pointwise, manual_backward)| GradientOptions {
            checkpoint_text,
            recompute_pointwise,
            manual_backward,
            ..GradientOptions::default()
        },
    )
    .into()
}

fn dpo_of(case: &Value) -> Dpo {
    let types = case["loss_types"].as_array().unwrap();
    Dpo {
        loss: match types[0].as_str().unwrap() {
            "ipo" => PairLoss::Ipo,
            _ => PairLoss::Sigmoid,
        },
        beta: number(&case["beta"]),
        label_smoothing: 0.0,
        sft: case["loss_weights"].get(1).map_or(0.0, number),
    }
}

fn grpo_of(case: &Value) -> Grpo {
    Grpo {
        loss: match case["loss_type"].as_str().unwrap() {
            "dr_grpo" => PolicyLoss::DrGrpo,
            "dapo" => PolicyLoss::Dapo,
            _ => PolicyLoss::Grpo,
        },
        level: match case["level"].as_str().unwrap() {
            "sequence" => RatioLevel::Sequence,
            _ => RatioLevel::Token,
        },
        epsilon_low: number(&case["epsilon_low"]),
        epsilon_high: number(&case["epsilon_high"]),
        beta: number(&case["beta"]),
        max_completion_length: case["max_completion_length"].as_u64().unwrap() as usize,
    }
}

fn sequences(samples: &[Sample]) -> Sequences {
    Sequences {
        targets: samples.iter().map(|one| one.answer.len()).collect(),
        ..Sequences::default()
    }
}

#[test]
fn preference_losses_and_gradients() {
    let record = json("objectives.json");
    let file = Tensors::open("objectives.safetensors");
    let (model, config) = adapted();
    for (name, case) in record["dpo"].as_object().unwrap() {
        let dpo = dpo_of(case);
        let samples = pairs(&record, &[0, 1, 2]);
        for packed in [false, true] {
            let batch = micro_batch(&samples, &config, packed);
            let base = Reference::base().apply(&model.valid());
            let pairs = Sequences {
                reference: log_probabilities(&base, &config, &batch, 1.0),
                ..sequences(&samples)
            };
            let counts = SequenceCounts::of([&pairs]);
            for options in every_way() {
                let loss = |scores: &TokenScores| dpo.derivative(&pairs, &counts, scores);
                let (grads, totals, sums) = learn(&model, &config, &batch, 1.0, &options, &loss);
                close(
                    &format!("{name} loss"),
                    sums.loss,
                    number(&case["loss"]),
                    1e-4,
                );
                let means: BTreeMap<_, _> = sums.values(true).into_iter().collect();
                for (ours, theirs) in [
                    ("reward_margin", "margin"),
                    ("preferred_share", "accuracy"),
                    ("reward_chosen", "chosen"),
                    ("entropy", "entropy"),
                ] {
                    close(
                        &format!("{name} {ours}"),
                        means[ours],
                        number(&case[theirs]),
                        1e-3,
                    );
                }
                assert_eq!(totals.targets, batch.targets());
                close(
                    &format!("{name} norm"),
                    norm(&model, &grads),
                    number(&case["grad_norm"]),
                    1e-3,
                );
                check_gradients(&format!("dpo.{name}"), &model, &grads, &file);
            }
        }
    }
}

#[test]
fn policy_losses_and_gradients() {
    let record = json("objectives.json");
    let file = Tensors::open("objectives.safetensors");
    let (model, config) = adapted();
    let advantages: Vec<f32> = (record["advantages"].as_array().unwrap().iter())
        .map(|one| number(one) as f32)
        .collect();
    for (name, case) in record["grpo"].as_object().unwrap() {
        let (grpo, temperature) = (grpo_of(case), number(&case["temperature"]));
        let samples = drawn(&record, 0..6);
        let sampled = case["sampled"].as_array().unwrap().iter();
        let sampled = sampled.flat_map(|row| row.as_array().unwrap());
        let batch = micro_batch(&samples, &config, name == "dapo");
        let base = Reference::base().apply(&model.valid());
        let answers = Sequences {
            advantages: advantages.clone(),
            sampled: sampled.map(|one| number(one) as f32).collect(),
            reference: log_probabilities(&base, &config, &batch, temperature),
            ..sequences(&samples)
        };
        let counts = SequenceCounts::of([&answers]);
        for options in every_way() {
            let loss = |scores: &TokenScores| grpo.derivative(&answers, &counts, scores);
            let (grads, _, sums) = learn(&model, &config, &batch, temperature, &options, &loss);
            close(
                &format!("{name} loss"),
                sums.loss,
                number(&case["loss"]),
                1e-4,
            );
            let means: BTreeMap<_, _> = sums.values(false).into_iter().collect();
            close(
                &format!("{name} kl"),
                means["kl"],
                number(&case["kl"]),
                1e-3,
            );
            close(
                &format!("{name} entropy"),
                means["entropy"],
                number(&case["entropy"]),
                1e-3,
            );
            if grpo.level == RatioLevel::Token {
                close(
                    &format!("{name} clip"),
                    means["clip_share"],
                    number(&case["clip"]),
                    1e-4,
                );
            }
            close(
                &format!("{name} norm"),
                norm(&model, &grads),
                number(&case["grad_norm"]),
                1e-3,
            );
            check_gradients(&format!("grpo.{name}"), &model, &grads, &file);
        }
    }
}

/// Ten optimizer steps; `batch` gives the batch of a step with what its loss needs, for the weights as they are.
fn ten_steps(
    case: &str,
    entry: &Value,
    temperature: f64,
    mut batch: impl FnMut(
        usize,
        &Qwen3Vl<TestBackend>,
        &Qwen3VlConfig,
    ) -> (
        MicroBatch,
        Box<dyn Fn(&TokenScores) -> (Vec<f32>, ObjectiveSums)>,
    ),
) {
    let settings = &json("objectives.json")["optimizer"];
    let file = Tensors::open("objectives.safetensors");
    let (mut model, config) = adapted();
    let mut optimizer = AdamW::<AB>::new(AdamWConfig {
        beta1: number(&settings["betas"][0]),
        beta2: number(&settings["betas"][1]),
        epsilon: number(&settings["eps"]),
        weight_decay: number(&settings["weight_decay"]),
    });
    let kind = case.split('.').next().unwrap();
    for (step, want) in entry["steps"].as_array().unwrap().iter().enumerate() {
        let (batch, loss) = batch(step, &model.valid(), &config);
        let options = GradientOptions::default();
        let (grads, _, sums) = learn(&model, &config, &batch, temperature, &options, &*loss);
        // As the trajectories of cross-entropy: rounding grows with the steps.
        let part = format!("{case} step {step}");
        assert!(
            (sums.loss - number(&want["loss"])).abs() < 1e-3,
            "{part}: {} {want}",
            sums.loss
        );
        let clip = optimizer.clip_next(&model, &grads, number(&settings["max_grad_norm"]));
        let norm = clip.unwrap().into_data().iter::<f64>().next().unwrap();
        close(
            &format!("{part} norm"),
            norm,
            number(&want["grad_norm"]),
            5e-3,
        );
        model = optimizer.step(number(&settings["lr"][kind]), model, grads);
    }
    for tensor in adapter_tensors(&model) {
        let name = format!("{case}.final.{}", tensor.name);
        if file.has(&name) {
            let ours: Vec<f32> = (tensor.data)().to_vec().unwrap();
            assert_close(&name, &ours, &file.f32s(&name), 1e-3, 0.0);
        }
    }
}

#[test]
fn ten_preference_steps() {
    let record = json("objectives.json");
    let start = Reference::of(&adapted().0.valid());
    for (name, entry) in record["dpo"].as_object().unwrap() {
        let dpo = dpo_of(entry);
        let order = record["order"].as_array().unwrap();
        ten_steps(&format!("dpo.{name}"), entry, 1.0, |step, model, config| {
            let which: Vec<usize> = ids(&order[step % order.len()])
                .iter()
                .map(|one| *one as usize)
                .collect();
            let samples = pairs(&record, &which);
            let batch = micro_batch(&samples, config, false);
            let pairs = Sequences {
                reference: log_probabilities(&start.apply(model), config, &batch, 1.0),
                ..sequences(&samples)
            };
            let counts = SequenceCounts::of([&pairs]);
            let loss = move |scores: &TokenScores| dpo.derivative(&pairs, &counts, scores);
            (batch, Box::new(loss))
        });
    }
}

#[test]
fn ten_policy_steps_over_two_rollouts() {
    let record = json("objectives.json");
    let all: Vec<f32> = (record["advantages"].as_array().unwrap().iter())
        .map(|one| number(one) as f32)
        .collect();
    for (name, entry) in record["grpo"].as_object().unwrap() {
        let (grpo, temperature) = (grpo_of(entry), number(&entry["temperature"]));
        let mut answers = Sequences::default();
        ten_steps(
            &format!("grpo.{name}"),
            entry,
            temperature,
            |step, model, config| {
                let range = [0..4, 2..6][step / 5].clone();
                let samples = drawn(&record, range.clone());
                let batch = micro_batch(&samples, config, false);
                if step % 5 == 0 {
                    let base = Reference::base().apply(model);
                    answers = Sequences {
                        advantages: all[range].to_vec(),
                        sampled: log_probabilities(model, config, &batch, temperature),
                        reference: log_probabilities(&base, config, &batch, temperature),
                        ..sequences(&samples)
                    };
                }
                let (answers, counts) = (answers.clone(), SequenceCounts::of([&answers]));
                let loss = move |scores: &TokenScores| grpo.derivative(&answers, &counts, scores);
                (batch, Box::new(loss))
            },
        );
    }
}

/// The reference is made of the same base: with its own adapter the model, with none the base.
#[test]
fn a_reference_is_the_model_with_another_adapter() {
    let (model, config) = adapted();
    let model = model.valid();
    let record = json("objectives.json");
    let batch = micro_batch(&drawn(&record, 0..3), &config, false);
    let own = Reference::of(&model).apply(&model);
    let logs = |model: &Qwen3Vl<TestBackend>| log_probabilities(model, &config, &batch, 1.0);
    assert_eq!(logs(&own), logs(&model));
    let (base, _) = load_from::<TestBackend>(fixtures().join("model-tiny"));
    let bare = Reference::base().apply(&model);
    assert_eq!(logs(&bare), logs(&base));
    assert_ne!(logs(&bare), logs(&model));
}
