//! Gradients and steps of adapters beside quantised weights.

use burn::{
    module::{Module, Param},
    optim::{GradientsParams, Optimizer},
    tensor::DType,
};
use xray_qwen3vl::{
    adapters::{
        lora::{
            attach::{LinearMapper, attach},
            config::{LoraConfig, TargetModules},
            files::load_adapter_for_training,
        },
        quantised::load::load_quantised,
    },
    qwen3_vl::{
        Qwen3Vl,
        config::Qwen3VlConfig,
        nn::{InitOptions, Linear},
    },
    train::{
        config::TrainConfig,
        gradients::GradientOptions,
        optimizer::{AdamW, AdamWConfig},
    },
    weights::Weight,
};

use crate::{
    backend::device,
    support::{fixtures, json, relative_distance},
    training::{AB, PLAIN, all_gradients, batch_right, micro_batches, run},
};

/// The fixture's base with its linear layers quantised, or with the floats that the quantised ones stand for;
/// its adapter is attached, with `dropout`, or a fresh one with the given config.
fn beside_quantised(
    base: &str,
    format: &str,
    as_floats: bool,
    lora: Option<&LoraConfig>,
    dropout: f64,
) -> (Qwen3Vl<AB>, Qwen3VlConfig) {
    struct Unpack;
    impl LinearMapper<AB> for Unpack {
        fn map_linear(&mut self, _path: &str, mut linear: Linear<AB>) -> Linear<AB> {
            linear.weight = unpacked(&linear.weight);
            linear
        }
    }
    fn unpacked(weight: &Weight<AB>) -> Weight<AB> {
        Weight::Dense(Param::from_tensor(weight.val()))
    }
    let dir = fixtures().join(base);
    let config = Qwen3VlConfig::from_dir(&dir).unwrap();
    let model = Qwen3Vl::<AB>::new(&config, &InitOptions::default(), &device());
    let quantization = format.parse().unwrap();
    let on_progress = &mut |_, _| {};
    let mut model =
        load_quantised(model, &dir, quantization, false, DType::F32, on_progress).unwrap();
    if as_floats {
        model = model.map_linears(&mut Unpack);
        let table = &mut model.model.language_model.embed_tokens;
        table.weight = unpacked(&table.weight);
    }
    let model = match lora {
        Some(config) => attach(model.no_grad(), config, 5).unwrap().0,
        None => {
            let adapter = fixtures().join("adapter");
            load_adapter_for_training(model.no_grad(), &adapter, dropout)
                .unwrap()
                .model
        }
    };
    assert_eq!(model.quantization().is_none(), as_floats);
    (model, config)
}

/// Gradients of all that is trained, by the order of the parameters.
fn trained_gradients(model: &Qwen3Vl<AB>, grads: &GradientsParams) -> Vec<Vec<f32>> {
    let all = all_gradients(model, grads);
    all.into_iter().filter(|grad| !grad.is_empty()).collect()
}

fn assert_gradients_close(what: &str, ours: &[Vec<f32>], want: &[Vec<f32>]) {
    assert!(!ours.is_empty() && ours.len() == want.len(), "{what}");
    for (index, (ours, want)) in ours.iter().zip(want).enumerate() {
        // The same floats are multiplied; a head in pieces adds up in another order.
        let distance = relative_distance(ours, want);
        assert!(distance < 1e-4, "{what} parameter {index}: {distance}");
    }
}

#[test]
fn gradients_beside_quantised_weights_are_those_of_the_floats_they_stand_for() {
    for base in ["model-tiny", "model-tiny-tied"] {
        for format in ["int8", "int4", "int4:32"] {
            let [ours, want] = [false, true].map(|as_floats| {
                let (model, config) = match base {
                    "model-tiny" => beside_quantised(base, format, as_floats, None, 0.1),
                    _ => beside_quantised(base, format, as_floats, Some(&lora()), 0.1),
                };
                let micro = batch_right(&config);
                let weight = 1.0 / micro.targets() as f64;
                let ways = [
                    (false, false, true),
                    (true, false, true),
                    (false, true, true),
                    (false, false, false),
                    (true, false, false),
                ];
                ways.map(|(checkpoint_text, recompute_pointwise, manual_backward)| {
                    let options = GradientOptions {
                        checkpoint_text,
                        recompute_pointwise,
                        manual_backward,
                        dropout_seed: Some(3),
                        ..PLAIN
                    };
                    let (grads, totals) = run(&model, &config, &micro, weight, &options);
                    (trained_gradients(&model, &grads), totals.loss())
                })
            });
            for (way, (ours, want)) in ours.iter().zip(&want).enumerate() {
                let what = format!("{base} {format} way {way}");
                assert!(
                    (ours.1 / want.1 - 1.0).abs() < 1e-6,
                    "{what}: {} {}",
                    ours.1,
                    want.1
                );
                assert_gradients_close(&what, &ours.0, &want.0);
            }
        }
    }
}

/// A fresh adapter of all layers of the language model.
fn lora() -> LoraConfig {
    TrainConfig::default().lora_config()
}

/// What autodiff records: magnitudes, an adapted head, an adapted vision tower.
#[test]
fn dora_and_adapters_of_head_and_tower_train_beside_quantised_weights() {
    let named = |modules: &str| TrainConfig {
        target_modules: TargetModules::Pattern(modules.to_owned()),
        ..TrainConfig::default()
    };
    let dora = TrainConfig {
        use_dora: true,
        ..TrainConfig::default()
    };
    let stabilised = TrainConfig {
        use_rslora: true,
        ..TrainConfig::default()
    };
    let tower = TrainConfig {
        freeze_vit: false,
        freeze_aligner: false,
        ..TrainConfig::default()
    };
    let configs = [dora, stabilised, tower, named("^(lm_head|.*q_proj)$")];
    for (place, config) in configs.iter().enumerate() {
        for base in ["model-tiny", "model-tiny-tied"] {
            let lora = config.lora_config();
            let [ours, want] = [false, true].map(|as_floats| {
                let (model, sizes) = beside_quantised(base, "int4", as_floats, Some(&lora), 0.0);
                let micro = batch_right(&sizes);
                // A fresh adapter's B is zero and with it A's gradient: one step first.
                let mut optimizer = AdamW::<AB>::new(AdamWConfig::default());
                let options = GradientOptions {
                    dropout_seed: Some(4),
                    checkpoint_vision: true,
                    ..PLAIN
                };
                let (grads, _) = run(&model, &sizes, &micro, 1.0, &options);
                let model = optimizer.step(1e-3, model, grads);
                let (grads, totals) = run(&model, &sizes, &micro, 0.1, &options);
                (trained_gradients(&model, &grads), totals.loss())
            });
            let what = format!("config {place}, {base}");
            assert!(
                (ours.1 / want.1 - 1.0).abs() < 1e-4,
                "{what}: {} {}",
                ours.1,
                want.1
            );
            assert!(!ours.0.is_empty() && ours.0.len() == want.0.len(), "{what}");
            for (index, (ours, want)) in ours.0.iter().zip(&want.0).enumerate() {
                // Adam's first step is the sign of a gradient, which rounding turns where it is almost zero.
                let distance = relative_distance(ours, want);
                assert!(distance < 1e-2, "{what} parameter {index}: {distance}");
            }
        }
    }
}

/// Losses of steps as a run takes them, windows of the fixture's micro-batches in turn.
fn losses_of_steps(model: Qwen3Vl<AB>, config: &Qwen3VlConfig, steps: usize) -> Vec<f64> {
    let micros = micro_batches(config);
    let mut optimizer = AdamW::<AB>::new(AdamWConfig::default());
    let mut model = model;
    (0..steps)
        .map(|step| {
            let micro = &micros[step % micros.len()];
            let weight = 1.0 / micro.targets() as f64;
            let (grads, totals) = run(&model, config, micro, weight, &PLAIN);
            optimizer.clip_next(&model, &grads, 1.0);
            model = optimizer.step(2e-3, model.clone(), grads);
            totals.loss()
        })
        .collect()
}

/// `gen_quantised.py` dequantises the words by itself and trains with PEFT.
#[test]
fn twenty_steps_beside_quantised_weights_are_pefts_on_the_dequantised_ones() {
    let reference = json("quantised_losses.json");
    assert_eq!(reference["learning_rate"], 2e-3);
    for format in ["int8", "int4"] {
        let [ours, floats] = [false, true].map(|as_floats| {
            let (model, config) = beside_quantised("model-tiny", format, as_floats, None, 0.0);
            losses_of_steps(model, &config, 20)
        });
        let want = reference["losses"][format].as_array().unwrap();
        assert_eq!(want.len(), ours.len());
        for (step, want) in want.iter().enumerate() {
            let (ours, floats, want) = (ours[step], floats[step], want.as_f64().unwrap());
            // Rounding that twenty steps of AdamW carry on.
            assert!(
                (ours - floats).abs() < 1e-3,
                "{format} step {step}: {ours} {floats}"
            );
            assert!(
                (ours - want).abs() < 1e-2,
                "{format} step {step}: {ours} {want}"
            );
        }
    }
}
