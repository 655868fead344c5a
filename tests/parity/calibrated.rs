//! Calibrated weights: nearer to the floats than rounded ones, and what the report says of them is what the
//! written checkpoint does.

use std::{collections::HashMap, path::Path, rc::Rc};

use burn::tensor::DType;
use xray_qwen3vl::{
    adapters::quantised::{
        Formats,
        calibrate::{Calibrated, Calibration, Measures},
        load::load_quantised,
        memory::bytes_in_formats,
        save::{MatrixSource, open_floats, write_matrices},
    },
    batch::{images::ImageInput, micro_batch::MicroBatch},
    ops::quantised::{Format, Quantization},
    qwen3_vl::{
        Qwen3Vl,
        config::Qwen3VlConfig,
        nn::InitOptions,
        weights::{gguf::GgufParts, load_checkpoint, parameter_shapes, save_checkpoint},
    },
    runtime::synthetic::weights::{RandomSize, draw},
};

use crate::{
    backend::{TestBackend as B, device},
    model::{images_of, sequence_images, single},
    support::{Reference, fixtures, json, values},
};

const MODEL: &str = "model-tiny";

fn config() -> Qwen3VlConfig {
    Qwen3VlConfig::from_dir(&fixtures().join(MODEL)).unwrap()
}

fn fresh(config: &Qwen3VlConfig) -> Qwen3Vl<B> {
    Qwen3Vl::new(config, &InitOptions::default(), &device())
}

/// The fixtures' sequences, every token but the first a target.
fn samples(config: &Qwen3VlConfig) -> Vec<MicroBatch> {
    let reference = Reference::open("text.safetensors");
    let inputs = json("inputs.json");
    let names = inputs["sequences"].as_object().unwrap().keys();
    names
        .filter(|name| reference.has(&format!("{name}.logits")))
        .map(|name| {
            let ids = reference.id_rows(&format!("{name}.input_ids")).remove(0);
            let images: ImageInput = images_of(&sequence_images(name));
            MicroBatch {
                labels: vec![ids.iter().map(|id| i64::from(*id)).collect()],
                text: single(ids, &images.image_grid_thw, config),
                images,
            }
        })
        .collect()
}

fn calibrated(formats: impl Into<Formats>, held_out: usize, limit: Option<usize>) -> Calibrated {
    let config = config();
    let checkpoint = Rc::new(open_floats(&fixtures().join(MODEL), &GgufParts::default()).unwrap());
    let mut calibration =
        Calibration::<B>::new(checkpoint, &config, formats.into(), DType::F32, &device()).unwrap();
    for sample in samples(&config) {
        calibration.add(&sample);
    }
    let (steps, mut done) = (calibration.steps(limit.is_some()), 0);
    let found = calibration.run(held_out, limit, &mut || done += 1).unwrap();
    assert_eq!(done, steps);
    found
}

fn write(found: &Calibrated, to: &Path) {
    let checkpoint = Rc::new(open_floats(&fixtures().join(MODEL), &GgufParts::default()).unwrap());
    let matrices = found.matrices.clone();
    let source: MatrixSource = {
        let checkpoint = checkpoint.clone();
        Rc::new(move |path, dims, format| match matrices.get(path) {
            Some(matrix) => Ok(matrix.clone()),
            None => xray_qwen3vl::adapters::quantised::load::pack_tensor(
                &checkpoint,
                path,
                dims,
                format,
            ),
        })
    };
    let shapes = parameter_shapes(&fresh(&config()));
    write_matrices(
        (&checkpoint, &GgufParts::default()),
        to,
        &shapes,
        &found.formats,
        &source,
        5_000,
    )
    .unwrap();
}

fn load(dir: &Path) -> Qwen3Vl<B> {
    let int8 = "int8".parse::<Quantization>().unwrap();
    load_quantised(
        fresh(&config()),
        dir,
        int8,
        true,
        DType::F32,
        &mut |_, _| {},
    )
    .unwrap()
}

/// Perplexity and right tokens of a whole model at once.
fn measured(model: &Qwen3Vl<B>) -> (f64, f64) {
    let config = config();
    let vocab = config.text_config.vocab_size;
    let (mut loss, mut right, mut count) = (0.0, 0, 0);
    for sample in samples(&config) {
        let logits = values(model.forward(&sample.text, &sample.images, &config, &device()));
        for (row, label) in logits.chunks(vocab).zip(&sample.labels[0][1..]) {
            let largest = row.iter().fold(f32::MIN, |most, value| most.max(*value));
            let sum: f64 = row.iter().map(|v| f64::from(v - largest).exp()).sum();
            loss -= f64::from(row[*label as usize] - largest) - sum.ln();
            right += usize::from(row[*label as usize] == largest);
            count += 1;
        }
    }
    let count = count as f64;
    ((loss / count).exp(), right as f64 / count)
}

#[test]
fn what_is_written_is_what_was_measured_and_nearer_than_rounding() {
    for format in ["int4", "int4:32", "int4:32:zero", "int8"] {
        let quantization: Quantization = format.parse().unwrap();
        let found = calibrated(quantization, 0, None);
        let compared = found.report.calibration.as_ref().unwrap();
        for matrix in &found.report.matrices {
            assert!(
                matrix.calibrated <= 1.001 * matrix.round_to_nearest,
                "{format} {matrix:?}"
            );
        }
        let mean = |of: fn(&xray_qwen3vl::adapters::quantised::calibrate::MatrixReport) -> f64| {
            found.report.matrices.iter().map(of).sum::<f64>() / found.report.matrices.len() as f64
        };
        let (ours, nearest) = (mean(|m| m.calibrated), mean(|m| m.round_to_nearest));
        let last = found.report.layers.last().unwrap();
        println!(
            "{format}: matrices {ours:.4} for {nearest:.4}, last layer {:.4} for {:.4}, agreement {:.3} for {:.3}",
            last.calibrated,
            last.round_to_nearest,
            compared.calibrated.agreement,
            compared.round_to_nearest.agreement
        );
        assert!(ours < 0.8 * nearest, "{format}: {ours} {nearest}");
        assert!(last.calibrated < last.round_to_nearest, "{format}");

        // The layers one after the other are the whole model, as floats and as it is loaded.
        let mut floats = fresh(&config());
        load_checkpoint(
            &mut floats,
            &fixtures().join(MODEL),
            DType::F32,
            &mut |_, _| {},
        )
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        write(&found, folder.path());
        let same = |of: &Measures, model: &Qwen3Vl<B>| {
            let (perplexity, accuracy) = measured(model);
            let off = (of.perplexity / perplexity - 1.0).abs();
            // Sums in f32 in another order.
            assert!(off < 1e-4, "{format}: {} {perplexity}", of.perplexity);
            assert!((of.accuracy - accuracy).abs() < 0.02, "{format}");
        };
        same(&compared.floats, &floats);
        same(&compared.calibrated, &load(folder.path()));
        assert_eq!(compared.floats.agreement, 1.0);
        // An adapter of the floats sees the same inputs: nothing but matrices has changed.
        let loaded = load(folder.path());
        let norm = |model: &Qwen3Vl<B>| {
            let layer = &model.model.language_model.layers[1];
            let norms = [&layer.input_layernorm, &layer.post_attention_layernorm];
            norms.map(|norm| values(norm.weight.val()))
        };
        assert_eq!(norm(&loaded), norm(&floats), "{format}");
    }
}

#[test]
#[cfg_attr(
    not(feature = "flex"),
    ignore = "a GPU's matmuls are chosen by trial, and sums in another order round otherwise"
)]
fn calibration_gives_the_same_words_again() {
    let quantization: Quantization = "int4".parse().unwrap();
    let [a, b] = [(); 2].map(|()| calibrated(quantization, 1, None));
    let sorted = |found: &Calibrated| {
        let mut all: Vec<_> = found.matrices.iter().collect();
        all.sort_by_key(|(name, _)| name.to_string());
        all.into_iter()
            .map(|(name, matrix)| (name.clone(), matrix.clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(sorted(&a), sorted(&b));
    assert_eq!(a.report, b.report);
    assert!(a.report.held_out.is_some() && a.report.held_out_samples == 1);
}

#[test]
fn under_a_limit_the_layers_that_lose_most_have_eight_bits() {
    let quantization: Quantization = "int4".parse().unwrap();
    let shapes = parameter_shapes(&fresh(&config()));
    let mut formats = Formats::from(quantization);
    // A vision tower in 16 bits, as `--vision-bits 16` has it.
    for path in shapes
        .keys()
        .filter(|path| path.starts_with("model.visual."))
    {
        if let Some(layer) = path.strip_suffix(".weight")
            && formats.of(path).is_some()
        {
            formats.set(layer, None);
        }
    }
    let bytes = |formats: &Formats| bytes_in_formats(&shapes, formats, 2);
    let least = bytes(&formats);
    let limit = least + 20_000;
    let found = calibrated(formats.clone(), 0, Some(limit));
    assert!(bytes(&found.formats) <= limit && bytes(&found.formats) > least);
    let folder = tempfile::tempdir().unwrap();
    write(&found, folder.path());
    let model = load(folder.path());
    let mut counts: HashMap<String, usize> = HashMap::new();
    for (path, linear) in model.linears() {
        let format = linear.weight.packed().map(|weight| weight.format());
        assert_eq!(
            format,
            found.formats.of(&format!("{path}.weight")),
            "{path}"
        );
        assert_eq!(
            format.is_none(),
            path.starts_with("model.visual."),
            "{path}"
        );
        let name = format.map_or("floats".to_string(), Format::spelling);
        *counts.entry(name).or_default() += 1;
    }
    println!("{} bytes, {counts:?}", bytes(&found.formats));
    assert!(counts["int8"] > 1 && counts["int4:64"] > 1);
    // What is multiplied in one launch has one format.
    for layer in &model.model.language_model.layers {
        let [q, k, v, _, gate, up, _] = layer
            .projections()
            .map(|linear| linear.weight.packed().unwrap().format());
        assert!(q == k && k == v && gate == up);
    }
    let (perplexity, _) = measured(&model);
    let compared = found.report.calibration.unwrap();
    assert!((compared.calibrated.perplexity / perplexity - 1.0).abs() < 1e-4);
    // Half the bytes cannot be.
    let checkpoint = Rc::new(open_floats(&fixtures().join(MODEL), &GgufParts::default()).unwrap());
    let mut small =
        Calibration::<B>::new(checkpoint, &config(), formats, DType::F32, &device()).unwrap();
    small.add(&samples(&config())[0]);
    let error = small.run(0, Some(least / 2), &mut || ()).err().unwrap();
    assert!(error.to_string().contains("limit"), "{error}");
}

/// Ids with the frequencies of words in a text (Zipf's law), after a picture.
fn sample_of_wide(config: &Qwen3VlConfig, seed: usize) -> MicroBatch {
    let merge = config.vision_config.spatial_merge_size;
    let grid = [1, 8, 8];
    let images = ImageInput {
        pixel_values: (0..64 * config.vision_config.patch_dim())
            .map(|i| (i as f32 * 0.013 + seed as f32).sin())
            .collect(),
        image_grid_thw: vec![grid],
    };
    // A multiplicative generator is random enough here.
    let mut state = seed as u64 * 7919 + 17;
    let mut uniform = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut id = || 150_000f64.powf(uniform()) as u32 * 7919 % 150_000;
    let mut ids: Vec<u32> = vec![config.image_token_id; 64 / (merge * merge)];
    ids.extend((0..112).map(|_| id()));
    let answer_from = ids.len() - 96;
    MicroBatch {
        labels: vec![
            ids.iter()
                .enumerate()
                .map(|(at, id)| {
                    if at < answer_from {
                        -100
                    } else {
                        i64::from(*id)
                    }
                })
                .collect(),
        ],
        text: single(ids, &images.image_grid_thw, config),
        images,
    }
}

#[test]
#[ignore = "draws 4 GB of weights and calibrates layers of full width: minutes on many cores"]
fn four_layers_of_full_width() {
    let config = RandomSize::B8.config(Some(4)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    {
        let model = draw::<B>(&config, 7, DType::F32, None, &device());
        save_checkpoint(&model, folder.path(), 1 << 33).unwrap();
    }
    let text = config.to_published_json("float32");
    std::fs::write(folder.path().join("config.json"), text).unwrap();
    let count = |name: &str, default: usize| {
        std::env::var(name).map_or(default, |text| text.parse().unwrap())
    };
    let (samples, held_out) = (count("WIDE_SAMPLES", 64), count("WIDE_HELD_OUT", 16));
    for format in ["int4", "int8"] {
        let started = std::time::Instant::now();
        let quantization: Quantization = format.parse().unwrap();
        let mut formats = Formats::from(quantization);
        for path in parameter_shapes(&fresh(&config)).into_keys() {
            if let Some(layer) = path.strip_suffix(".weight")
                && layer.starts_with("model.visual.")
                && formats.of(&path).is_some()
            {
                formats.set(layer, Some(Format::Int8));
            }
        }
        let checkpoint = Rc::new(open_floats(folder.path(), &GgufParts::default()).unwrap());
        let mut calibration =
            Calibration::<B>::new(checkpoint, &config, formats, DType::F32, &device()).unwrap();
        for seed in 0..samples + held_out {
            calibration.add(&sample_of_wide(&config, seed));
        }
        let found = calibration
            .run(held_out, None, &mut || {
                println!("{:.0} s", started.elapsed().as_secs_f64());
            })
            .unwrap();
        for line in found.report.lines() {
            println!("{format}: {line}");
        }
        println!(
            "{format}: on the samples calibrated on {:?}",
            found.report.calibration
        );
        println!("{format}: {:?}", found.report.layers);
        let held = found.report.held_out.unwrap();
        assert!(held.calibrated.agreement >= held.round_to_nearest.agreement);
    }
}
