//! Packed weights: how far their answers lie from those of floats, and that they are exactly those of
//! the floats they stand for.

use std::{collections::HashMap, convert::Infallible};

use burn::{module::Param, prelude::*, tensor::DType};
use xray_qwen3vl::{
    adapters::{
        lora::{attach::LinearMapper, files::load_adapter, merge::merge},
        quantised::{
            load::{load_quantised, replace_weights},
            save::write_quantised,
        },
    },
    batch::images::ImageInput,
    ops::quantised::{QuantisedWeight, Quantization, pack::pack},
    qwen3_vl::{
        Qwen3Vl,
        config::Qwen3VlConfig,
        nn::{InitOptions, Linear},
        weights::parameter_shapes,
    },
    runtime::synthetic::weights::{RandomSize, draw},
    weights::Weight,
};

use crate::{
    backend::{TestBackend as B, device},
    model::{images_of, sequence_images, single},
    support::{ACTIVATIONS, Reference, assert_close, fixtures, json, relative_distance, values},
};

const FORMATS: [&str; 5] = ["int8", "int4:32", "int4", "int4:128", "int4:64:zero"];

fn packed(name: &str, format: &str) -> (Qwen3Vl<B>, Qwen3VlConfig) {
    let dir = fixtures().join(name);
    let config = Qwen3VlConfig::from_dir(&dir).unwrap();
    let model = Qwen3Vl::new(&config, &InitOptions::default(), &device());
    let quantization = format.parse().unwrap();
    let on_progress = &mut |_, _| {};
    let model = load_quantised(model, &dir, quantization, false, DType::F32, on_progress).unwrap();
    assert_eq!(model.quantization(), Some(quantization));
    (model, config)
}

/// Gives every packed matrix its floats back.
struct Unpack;

impl LinearMapper<B> for Unpack {
    fn map_linear(&mut self, _path: &str, mut linear: Linear<B>) -> Linear<B> {
        linear.weight = floats(&linear.weight);
        linear
    }
}

fn floats(weight: &Weight<B>) -> Weight<B> {
    Weight::Dense(Param::from_tensor(weight.val()))
}

fn unpacked(model: Qwen3Vl<B>) -> Qwen3Vl<B> {
    let mut model = model.map_linears(&mut Unpack);
    let table = &mut model.model.language_model.embed_tokens;
    table.weight = floats(&table.weight);
    assert_eq!(model.quantization(), None);
    model
}

/// The fixtures' sequences with their images, and the reference's logits in f32.
fn cases(config: &Qwen3VlConfig, file: &str) -> Vec<(String, Vec<u32>, ImageInput, Vec<f32>)> {
    let reference = Reference::open(file);
    let inputs = json("inputs.json");
    let names = inputs["sequences"].as_object().unwrap().keys();
    let cases: Vec<_> = names
        .filter(|name| reference.has(&format!("{name}.logits")))
        .map(|name| {
            let ids = reference.id_rows(&format!("{name}.input_ids")).remove(0);
            assert!(
                ids.iter()
                    .all(|id| (*id as usize) < config.text_config.vocab_size)
            );
            let images = images_of(&sequence_images(name));
            let logits = reference.f32s(&format!("{name}.logits"));
            (name.clone(), ids, images, logits)
        })
        .collect();
    assert!(!cases.is_empty(), "{file} holds no sequence");
    cases
}

fn logits(
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    ids: &[u32],
    images: &ImageInput,
) -> Vec<f32> {
    let input = single(ids.to_vec(), &images.image_grid_thw, config);
    values(model.forward(&input, images, config, &device()))
}

/// Share of rows whose largest logit is at the same place.
fn top1(ours: &[f32], want: &[f32], vocab: usize) -> f64 {
    let best = |row: &[f32]| (0..vocab).max_by(|a, b| row[*a].total_cmp(&row[*b]));
    let rows = ours.chunks(vocab).zip(want.chunks(vocab));
    let same = rows.filter(|(a, b)| best(a) == best(b)).count();
    same as f64 / (want.len() / vocab) as f64
}

#[test]
fn logits_of_packed_models_lie_near_the_references() {
    for (name, file) in [
        ("model-tiny", "text.safetensors"),
        ("model-tiny-tied", "tied.safetensors"),
    ] {
        if !fixtures().join(file).is_file() {
            continue;
        }
        for format in FORMATS {
            let (model, config) = packed(name, format);
            let (mut ours, mut want) = (Vec::new(), Vec::new());
            for (_, ids, images, logits_f32) in cases(&config, file) {
                ours.extend(logits(&model, &config, &ids, &images));
                want.extend(logits_f32);
            }
            let distance = relative_distance(&ours, &want);
            let agreement = top1(&ours, &want, config.text_config.vocab_size);
            println!("{name} {format}: relative {distance:.2e}, top-1 {agreement:.3}");
            // A matrix errs by 0.8 % as int8 and by 8 to 9 % as int4; some twenty follow one another,
            // and their errors add up like noise. Logits of random weights lie close together, so that
            // the likeliest changes more easily than in a trained model.
            let (most, least) = if format == "int8" {
                (0.05, 0.8)
            } else {
                (0.5, 0.4)
            };
            assert!(distance < most, "{name} {format}: {distance}");
            assert!(agreement >= least, "{name} {format}: {agreement}");
        }
    }
}

#[test]
fn a_packed_model_answers_as_the_floats_it_stands_for() {
    for name in ["model-tiny", "model-tiny-tied"] {
        for format in FORMATS {
            let (model, config) = packed(name, format);
            let dense = unpacked(model.clone());
            for (case, ids, images, _) in cases(&config, "text.safetensors") {
                let ours = logits(&model, &config, &ids, &images);
                let want = logits(&dense, &config, &ids, &images);
                let part = format!("{name} {format} {case}");
                assert_close(&part, &ours, &want, ACTIVATIONS.0, ACTIVATIONS.1);
            }
        }
    }
}

#[test]
fn an_adapter_stays_apart_and_does_what_it_does_to_the_floats() {
    let dir = fixtures().join("adapter");
    for format in FORMATS {
        let (model, config) = packed("model-tiny", format);
        let (ours, _) = load_adapter(model.clone(), &dir).unwrap();
        assert!(ours.quantization().is_some());
        let merged = merge(load_adapter(unpacked(model.clone()), &dir).unwrap().0);
        for (case, ids, images, _) in cases(&config, "text.safetensors") {
            let plain = logits(&model, &config, &ids, &images);
            let ours = logits(&ours, &config, &ids, &images);
            let want = logits(&merged, &config, &ids, &images);
            assert!(
                relative_distance(&plain, &want) > 1e-3,
                "the adapter does nothing"
            );
            // Composed weights round elsewhere, as between attached and merged floats.
            assert_close(&format!("{format} {case}"), &ours, &want, 1e-3, 1e-3);
        }
    }
}

/// What an adapter brings in the place of the base's weights is put beside the others as floats.
#[test]
fn an_adapter_that_changes_the_base_changes_a_packed_one() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adapters");
    for format in FORMATS {
        for (base, adapters) in [
            (
                "model-tiny",
                &[
                    "saved_head",
                    "saved_linear",
                    "saved_first",
                    "embedding",
                    "tokens_of_both",
                    "proj",
                    "lora_bias_without",
                    "head",
                ][..],
            ),
            (
                "model-tiny-tied",
                &["tied_head", "tied_embedding", "tied_saved_head"],
            ),
        ] {
            let (model, config) = packed(base, format);
            let cases = cases(&config, "text.safetensors");
            let plain = cases
                .iter()
                .map(|(_, ids, images, _)| logits(&model, &config, ids, images));
            let plain: Vec<_> = plain.collect();
            for adapter in adapters {
                let dir = folder.join(adapter);
                let (ours, _) = load_adapter(model.clone(), &dir).unwrap();
                assert_eq!(ours.quantization(), model.quantization(), "{adapter}");
                let merged = merge(load_adapter(unpacked(model.clone()), &dir).unwrap().0);
                for ((case, ids, images, _), plain) in cases.iter().zip(&plain) {
                    let ours = logits(&ours, &config, ids, images);
                    let want = logits(&merged, &config, ids, images);
                    assert!(
                        relative_distance(plain, &want) > 1e-3,
                        "{adapter} does nothing"
                    );
                    let part = format!("{format} {adapter} {case}");
                    assert_close(&part, &ours, &want, 1e-3, 1e-3);
                }
            }
        }
    }
}

#[test]
fn a_written_packed_checkpoint_loads_as_what_packing_at_load_gives() {
    for name in ["model-tiny", "model-tiny-tied"] {
        for format in FORMATS {
            let quantization: Quantization = format.parse().unwrap();
            let (model, config) = packed(name, format);
            let fresh = || Qwen3Vl::<B>::new(&config, &InitOptions::default(), &device());
            let shapes = parameter_shapes(&fresh());
            let out = tempfile::tempdir().unwrap();
            // Shards so small that words and scales come into different ones.
            let from = fixtures().join(name);
            write_quantised(
                (&from, &Default::default()),
                out.path(),
                &shapes,
                quantization,
                5_000,
            )
            .unwrap();
            let on_progress = &mut |_, _| {};
            let again = load_quantised(
                fresh(),
                out.path(),
                quantization,
                true,
                DType::F32,
                on_progress,
            );
            let again = again.unwrap();
            for ((path, ours), (_, want)) in again.linears().iter().zip(model.linears()) {
                let (ours, want) = (ours.weight.packed(), want.weight.packed());
                let (ours, want) = (ours.unwrap(), want.unwrap());
                let words = |weight: &QuantisedWeight<B>| weight.words().to_data();
                assert_eq!(words(ours), words(want), "{path}");
                assert_eq!(ours.scales().to_data(), want.scales().to_data(), "{path}");
                let zeros = |weight: &QuantisedWeight<B>| weight.zeros().map(Tensor::to_data);
                assert_eq!(zeros(ours), zeros(want), "{path}");
                assert_eq!(
                    ours.zeros().is_some(),
                    !ours.format().is_symmetric(),
                    "{path}"
                );
            }
            let (_, ids, images, _) = cases(&config, "text.safetensors").remove(0);
            assert_eq!(
                logits(&again, &config, &ids, &images),
                logits(&model, &config, &ids, &images)
            );
        }
    }
}

#[test]
#[ignore = "draws several GB of weights: a GPU's work"]
fn logits_of_a_full_width_model_of_four_layers() {
    let config = RandomSize::B8.config(Some(4)).unwrap();
    let dtype = [DType::BF16, DType::F16, DType::F32]
        .into_iter()
        .find(|dtype| B::supports_dtype(&device(), *dtype))
        .unwrap();
    let model = draw::<B>(&config, 7, dtype, None, &device());
    let merge = config.vision_config.spatial_merge_size;
    let grid = [1, 16, 16];
    let images = ImageInput {
        pixel_values: (0..256 * config.vision_config.patch_dim())
            .map(|i| (i as f32 * 0.013).sin())
            .collect(),
        image_grid_thw: vec![grid],
    };
    let text = |i: usize| (i * 7919 % 150_000) as u32;
    let mut ids: Vec<u32> = (0..16).map(text).collect();
    ids.extend(vec![config.image_token_id; 256 / (merge * merge)]);
    ids.extend((16..64).map(text));
    let want = logits(&model, &config, &ids, &images);
    let mut weights: HashMap<String, Tensor<B, 2>> = model
        .linears()
        .into_iter()
        .map(|(path, linear)| (format!("{path}.weight"), linear.weight.val()))
        .collect();
    let table = model.model.language_model.embed_tokens.weight.val();
    weights.insert(
        "model.language_model.embed_tokens.weight".to_string(),
        table,
    );
    for name in FORMATS {
        let quantization: Quantization = name.parse().unwrap();
        let Ok(packed) = replace_weights(
            model.clone(),
            quantization,
            |path, [rows, d_input], format| {
                let floats = values(weights[path].clone());
                let matrix = pack(rows, d_input, format, |row, out| {
                    out.copy_from_slice(&floats[row * d_input..][..d_input]);
                    Ok::<_, Infallible>(())
                });
                let Ok(matrix) = matrix;
                Ok::<_, Infallible>(QuantisedWeight::upload(
                    matrix,
                    rows,
                    d_input,
                    format,
                    dtype,
                    &device(),
                ))
            },
        );
        let ours = logits(&packed, &config, &ids, &images);
        let distance = relative_distance(&ours, &want);
        let agreement = top1(&ours, &want, config.text_config.vocab_size);
        println!(
            "4 layers of the 8B, {dtype:?}, {name}: relative {distance:.2e}, top-1 {agreement:.3}"
        );
        // As for the fixtures, and nine matrices more in a row; of 151,936 logits of random weights the
        // two largest are often nearer to each other than the error, so their order says nothing here.
        let most = if name == "int8" { 0.08 } else { 0.8 };
        assert!(distance < most, "{name}: {distance}");
    }
}
