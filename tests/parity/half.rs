//! The model in half types against the reference in f32: f16 on Vulkan, bf16 on CUDA, where the device
//! has them.
//!
//! An activation is rounded by a quarter of the type's step on average, 2⁻¹² of itself in f16 (11 bits) and
//! 2⁻⁹ in bf16 (8 bits), and some forty roundings follow one another in the fixtures' models, independent
//! of each other. So √40 of one is expected, 0.0015 and 0.0124, and thrice that allowed, as a relative
//! distance (norm of the difference over norm of the reference).
//! Two logits nearer to each other than the largest difference may change places; no others.

use burn::{prelude::*, tensor::DType};
use xray_qwen3vl::{
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, nn::InitOptions, weights::load_checkpoint},
    runtime::generate::{GenerationConfig, Prompt, generate},
};

use crate::{
    backend::{TestBackend as B, device},
    model::{images_of, sequence_images, single},
    support::{Reference, fixtures, json, relative_distance, values},
};

/// The half type under test and the distance allowed in it.
#[cfg(feature = "cuda")]
const HALF: (DType, f64) = (DType::BF16, 3.7e-2);
#[cfg(not(feature = "cuda"))]
const HALF: (DType, f64) = (DType::F16, 5e-3);

const ALLOWED: f64 = HALF.1;

/// The model of the fixtures in the half type.
fn half() -> (Qwen3Vl<B>, Qwen3VlConfig) {
    let (dtype, _) = HALF;
    assert!(
        B::supports_dtype(&device(), dtype),
        "the device does not calculate in {dtype:?}; `--skip half` leaves this part out"
    );
    let dir = fixtures().join("model-tiny");
    let config = Qwen3VlConfig::from_dir(&dir).unwrap();
    let options = InitOptions {
        dtype,
        ..InitOptions::default()
    };
    let mut model = Qwen3Vl::new(&config, &options, &device());
    load_checkpoint(&mut model, &dir, dtype, &mut |_, _| {}).unwrap();
    (model, config)
}

/// Compares rows of logits; counts tokens.
fn check(part: &str, ours: &[f32], want: &[f32], vocab: usize) -> usize {
    let distance = relative_distance(ours, want);
    let differences = ours.iter().zip(want).map(|(a, b)| (a - b).abs());
    let largest = differences.fold(0.0, f32::max);
    println!("{part}: {distance:.2e}, at most {largest:.2e}");
    assert!(
        distance <= ALLOWED,
        "{part}: relative distance {distance:.3e}"
    );
    for (token, (ours, want)) in ours.chunks(vocab).zip(want.chunks(vocab)).enumerate() {
        let place = |row: &[f32]| {
            (0..vocab)
                .max_by(|a, b| row[*a].total_cmp(&row[*b]))
                .unwrap()
        };
        let (best, likeliest) = (want[place(want)], want[place(ours)]);
        assert!(
            best - likeliest <= 2.0 * largest,
            "{part}, token {token}: {likeliest} was taken for the largest, {best} is"
        );
    }
    want.len() / vocab
}

#[test]
fn logits_of_every_sequence() {
    let (model, config) = half();
    let reference = Reference::open("text.safetensors");
    let mut tokens = 0;
    for sequence in json("inputs.json")["sequences"].as_object().unwrap().keys() {
        let name = format!("{sequence}.logits");
        if !reference.has(&name) {
            continue;
        }
        let images = images_of(&sequence_images(sequence));
        let ids = reference
            .id_rows(&format!("{sequence}.input_ids"))
            .remove(0);
        let input = single(ids, &images.image_grid_thw, &config);
        let logits = model.forward(&input, &images, &config, &device());
        assert_eq!(logits.dtype(), DType::F32);
        let vocab = logits.dims()[1];
        tokens += check(sequence, &values(logits), &reference.f32s(&name), vocab);
    }
    assert!(tokens > 0, "the fixtures hold no logits");
}

/// What decoding in a half type writes is what one full pass over it finds likeliest.
#[test]
fn decoding_follows_the_reference() {
    let (model, config) = half();
    let reference = Reference::open("generate.safetensors");
    let cases = json("generate.json");
    for case in ["image", "text", "two"] {
        let input_ids = reference.id_rows(&format!("{case}.input_ids")).remove(0);
        let names: Vec<String> = serde_json::from_value(cases[case]["images"].clone()).unwrap();
        let images = images_of(&names);
        let grids = images.image_grid_thw.clone();
        let settings = GenerationConfig {
            max_new_tokens: 12,
            stop_on_repetition: false,
            ..GenerationConfig::default()
        };
        let prompt = Prompt {
            input_ids: input_ids.clone(),
            images: images.clone(),
        };
        let (written, _) = generate(
            &model,
            &config,
            &[prompt],
            &settings,
            &device(),
            &mut |_, _| None,
        )
        .unwrap();
        let written = &written[0].token_ids;
        let all = [input_ids.as_slice(), written].concat();
        let input = single(all, &grids, &config);
        let logits = model.forward(&input, &images, &config, &device());
        let vocab = logits.dims()[1];
        let rows = values(logits.narrow(0, input_ids.len() - 1, written.len()));
        for (step, (row, token)) in rows.chunks(vocab).zip(written).enumerate() {
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let least = row.iter().copied().fold(f32::INFINITY, f32::min);
            let behind = (most - row[*token as usize]) / (most - least);
            assert!(
                f64::from(behind) <= ALLOWED,
                "{case}, step {step}: {behind} of the spread behind the likeliest"
            );
        }
    }
}
