//! Checkpoints in the forms that other tools publish: each dequantised matrix against the tool's own floats,
//! and the tokens of the whole model against transformers with these floats.
//!
//! `cargo test --release --test parity checkpoints -- --nocapture` prints the table.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::{module::Module, tensor::DType};
use half::{bf16, f16};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use xray_qwen3vl::{
    adapters::quantised::load::load_quantised,
    ops::quantised::{
        Format, Packing, QuantisedWeight, Quantization,
        pack::{QuantisedMatrix, unpack},
    },
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, nn::InitOptions, weights::Checkpoint},
    runtime::{
        generate::{GenerationConfig, generate},
        pipeline::{Pipeline, PipelineOptions},
    },
};

use crate::backend::{TestBackend, device};

/// Forms with one file beside `rest.safetensors`.
pub const FORMS: [&str; 17] = [
    "plain",
    "fp8",
    "awq",
    "gptq-4",
    "gptq-4-order",
    "gptq-8",
    "gptq-3",
    "gptq-3-v1",
    "gptq-3-v1-sym",
    "gptq-3-older",
    "compressed-pack",
    "compressed-int8",
    "compressed-fp8",
    "bnb-nf4",
    "bnb-fp4",
    "bnb-int8",
    "gguf",
];

const QUESTION: &str = "What does this chest X-ray show?";

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints")
}

pub fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A folder with the checkpoint of a form, and its tokenizer.
pub fn folder(form: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let from = fixtures();
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny");
    let copy = |from: PathBuf| {
        fs::copy(&from, dir.path().join(from.file_name().unwrap())).unwrap();
    };
    copy(from.join("preprocessor_config.json"));
    if form == "gguf" {
        copy(from.join("gguf/tiny.gguf"));
        copy(from.join("gguf/mmproj-tiny.gguf"));
        return dir;
    }
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ] {
        copy(tiny.join(name));
    }
    copy(from.join("rest.safetensors"));
    copy(from.join(form).join("quantised.safetensors"));
    copy(from.join(form).join("config.json"));
    let index = json!({"weight_map": {"a": "rest.safetensors", "b": "quantised.safetensors"}});
    fs::write(
        dir.path().join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    dir
}

pub fn read(checkpoint: &Checkpoint, name: &str, count: usize, dtype: DType) -> Vec<u8> {
    let mut bytes = vec![0; count * dtype.size()];
    checkpoint.read_into(name, 0, dtype, &mut bytes).unwrap();
    // In pieces that end inside rows it is the same.
    let mut again = vec![0; bytes.len()];
    let piece = 37 * dtype.size();
    for (number, part) in again.chunks_mut(piece).enumerate() {
        checkpoint
            .read_into(name, number * 37, dtype, part)
            .unwrap();
    }
    assert_eq!(bytes, again, "{name}");
    bytes
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

pub fn options(model: &Path) -> PipelineOptions {
    PipelineOptions::new(model.to_path_buf(), DType::F32)
}

pub fn numbers(value: &Value) -> Vec<u32> {
    let list = value.as_array().unwrap().iter();
    list.map(|number| number.as_u64().unwrap() as u32).collect()
}

/// Tokens about the image, greedily.
pub fn tokens(model: &Path) -> (Vec<u32>, Vec<u32>, Vec<String>) {
    let pipeline =
        Pipeline::<TestBackend>::load(&options(model), device(), &mut |_, _| {}).unwrap();
    answer(&pipeline)
}

fn answer(pipeline: &Pipeline<TestBackend>) -> (Vec<u32>, Vec<u32>, Vec<String>) {
    let parts = &pipeline.parts;
    let picture = parts
        .images
        .read(&fixtures().join("image.png"), None)
        .unwrap()
        .picture;
    let prompt = parts
        .prompt(None, QUESTION, parts.image_input(&picture).unwrap())
        .unwrap();
    let settings = GenerationConfig {
        max_new_tokens: 16,
        stop_on_repetition: false,
        ..GenerationConfig::default()
    };
    let prompts = [prompt];
    let (answers, _) = generate(
        &pipeline.model,
        &parts.config,
        &prompts,
        &settings,
        &device(),
        &mut |_, _| None,
    )
    .unwrap();
    (
        prompts[0].input_ids.clone(),
        answers[0].token_ids.clone(),
        parts.remarks.clone(),
    )
}

#[test]
fn published_forms_give_the_floats_and_tokens_of_their_tools() {
    println!("form             matrices  largest error  equal in f32  equal in bf16  tokens");
    for form in FORMS {
        let dir = folder(form);
        let expected = read_json(&fixtures().join(form).join("expected.json"));
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let (mut worst, mut equal) = (0.0f64, [0, 0]);
        let tensors = expected["tensors"].as_object().unwrap();
        for (name, want) in tensors {
            let shape: Vec<usize> = numbers(&want["shape"])
                .iter()
                .map(|size| *size as usize)
                .collect();
            let count = shape.iter().product();
            let found = checkpoint
                .in_order()
                .into_iter()
                .find(|(found, _)| found == name);
            assert_eq!(found.unwrap().1, shape, "{form}: {name}");
            let floats = read(&checkpoint, name, count, DType::F32);
            let values: &[f32] = bytemuck::cast_slice(&floats);
            for sample in want["samples"].as_array().unwrap() {
                let at = sample[0].as_u64().unwrap() as usize;
                worst = worst.max((f64::from(values[at]) - sample[1].as_f64().unwrap()).abs());
            }
            equal[0] += usize::from(digest(&floats) == want["f32"].as_str().unwrap());
            let half = read(&checkpoint, name, count, DType::BF16);
            equal[1] += usize::from(digest(&half) == want["bf16"].as_str().unwrap());
        }
        let (prompt, written, remarks) = tokens(dir.path());
        let same = written == numbers(&expected["tokens"]);
        println!(
            "{form:16} {:8}  {worst:13.1e}  {:12}  {:13}  {}",
            tensors.len(),
            equal[0],
            equal[1],
            if same { "same" } else { "different" }
        );
        assert_eq!(prompt, numbers(&expected["prompt"]), "{form}");
        assert_eq!(equal, [tensors.len(); 2], "{form}");
        assert_eq!(written, numbers(&expected["tokens"]), "{form}");
        assert_eq!(remarks.is_empty(), form == "plain", "{form}: {remarks:?}");
    }
}

/// Quantised anew while loading, a published form answers as its floats do when they are quantised.
#[test]
fn published_forms_can_be_packed_while_they_are_loaded() {
    for form in ["fp8", "awq", "gptq-4-order", "bnb-nf4", "gguf"] {
        let dir = folder(form);
        let config = Qwen3VlConfig::from_dir(dir.path()).unwrap();
        let fresh = Qwen3Vl::<TestBackend>::new(&config, &InitOptions::default(), &device());
        let quantization: Quantization = "int8".parse().unwrap();
        let model = load_quantised(
            fresh,
            dir.path(),
            quantization,
            false,
            DType::F32,
            &mut |_, _| {},
        )
        .unwrap();
        assert_eq!(model.quantization(), Some(quantization), "{form}");
        let weight = model.model.language_model.layers[1]
            .mlp
            .down_proj
            .weight
            .val();
        let packed: Vec<f32> = weight.into_data().to_vec().unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let name = "model.language_model.layers.1.mlp.down_proj.weight";
        let bytes = read(&checkpoint, name, packed.len(), DType::F32);
        let floats: &[f32] = bytemuck::cast_slice(&bytes);
        // Half a step of 1/127 of the largest weight of a row.
        let step = floats
            .iter()
            .fold(0f32, |most, value| most.max(value.abs()))
            / 127.0;
        for (at, (packed, float)) in packed.iter().zip(floats).enumerate() {
            assert!(
                (packed - float).abs() <= 0.51 * step,
                "{form}: {at}: {packed} {float}"
            );
        }
        assert!(model.num_params() > 0);
    }
}

/// What another tool quantised stays as it is where a format holds it: in the type that the tool computes in,
/// the values are the tool's bit for bit.
#[test]
fn numbers_of_other_tools_stay_packed_as_they_are() {
    let in_layer = |layer: usize, part: &str| {
        format!("model.language_model.layers.{layer}.{part}_proj.weight")
    };
    for (form, format, name, keeps) in [
        ("gptq-4", "int4:32", in_layer(0, "mlp.down"), true),
        ("gptq-4", "int4:32:zero", in_layer(0, "mlp.down"), true),
        ("gptq-4", "int4", in_layer(0, "mlp.down"), false),
        ("gptq-4-order", "int4:32", in_layer(0, "mlp.down"), false),
        (
            "gptq-4-order",
            "int4:32:zero",
            in_layer(0, "mlp.down"),
            false,
        ),
        (
            "compressed-pack",
            "int4:32",
            in_layer(1, "self_attn.q"),
            true,
        ),
        ("compressed-pack", "int4:32", in_layer(0, "mlp.up"), false),
        (
            "compressed-pack",
            "int4:32:zero",
            in_layer(0, "mlp.up"),
            true,
        ),
        ("compressed-pack", "int8", in_layer(1, "mlp.up"), true),
        ("compressed-int8", "int8", in_layer(1, "self_attn.k"), true),
        ("compressed-int8", "int8", in_layer(1, "mlp.gate"), false),
        ("awq", "int4:32", in_layer(0, "mlp.up"), false),
        ("awq", "int4:32:zero", in_layer(0, "mlp.up"), true),
        ("awq", "int4:64:zero", in_layer(0, "mlp.up"), false),
    ] {
        let dir = folder(form);
        let format: Format = format.parse().unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let shape = checkpoint
            .in_order()
            .into_iter()
            .find(|(found, _)| *found == name);
        let [rows, columns] = *shape.unwrap().1 else {
            panic!("{name} is a matrix");
        };
        let kept = checkpoint.kept(&name, [rows, columns], format).unwrap();
        assert_eq!(kept.is_some(), keeps, "{form} {format} {name}");
        let Some(kept) = kept else { continue };
        same_values(&checkpoint, &name, [rows, columns], format, kept);
    }
    // Blocks of Q4_0 are those of `int4:32`, exactly.
    let dir = folder("gguf");
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let format = Format::Int4 { group: 32 };
    let kept: Vec<_> = checkpoint
        .in_order()
        .into_iter()
        .filter(|(name, _)| checkpoint.keeps(name, format))
        .collect();
    assert_eq!(kept.len(), 2);
    for (name, shape) in kept {
        let dims = [shape[0], shape[1]];
        let matrix = checkpoint.kept(name, dims, format).unwrap().unwrap();
        let bytes = read(&checkpoint, name, dims[0] * dims[1], DType::F32);
        assert_eq!(
            unpack(&matrix, dims[1], format),
            bytemuck::cast_slice::<u8, f32>(&bytes),
            "{name}"
        );
    }
}

/// Compares a matrix that stays packed with the floats of its tool, on the host and as a model has it.
fn same_values(
    checkpoint: &Checkpoint,
    name: &str,
    [rows, columns]: [usize; 2],
    format: Format,
    kept: QuantisedMatrix,
) {
    let bytes = read(checkpoint, name, rows * columns, DType::F32);
    let theirs: &[f32] = bytemuck::cast_slice(&bytes);
    let ours = unpack(&kept, columns, format);
    // The tools round each product to the type of their scales.
    let equal = |round: fn(f32) -> f32| ours.iter().zip(theirs).all(|(a, b)| round(*a) == *b);
    let half = equal(|value| f16::from_f32(value).to_f32());
    let brain = equal(|value| bf16::from_f32(value).to_f32());
    assert!(half || brain || equal(|value| value), "{name} {format}");
    let weight =
        QuantisedWeight::<TestBackend>::upload(kept, rows, columns, format, DType::F32, &device());
    let on_device: Vec<f32> = weight.unpack(DType::F32).into_data().to_vec().unwrap();
    assert_eq!(on_device, ours, "{name} {format}");
}

/// `--quantize keep`: a model whose packed matrices are those of the tool, and whose others are floats.
#[test]
fn a_model_keeps_what_another_tool_packed_and_quantises_nothing_else() {
    for (form, kept, dequantised) in [
        ("awq", 14, 0),
        ("gptq-4", 14, 0),
        ("gptq-4-order", 0, 14),
        ("compressed-pack", 14, 0),
        // And the table of tokens.
        ("gguf", 2, 10),
        ("fp8", 0, 13),
        ("plain", 0, 0),
    ] {
        let dir = folder(form);
        let packing = PipelineOptions {
            quantize: Some(Packing::Keep),
            ..options(dir.path())
        };
        let pipeline = Pipeline::<TestBackend>::load(&packing, device(), &mut |_, _| {}).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let (mut packed, mut floats) = (0, 0);
        for (path, linear) in pipeline.model.linears() {
            let name = format!("{path}.weight");
            let is_theirs = checkpoint.stored_dtype(&name).is_none();
            match linear.weight.packed() {
                Some(weight) => {
                    packed += 1;
                    assert!(is_theirs, "{form} {name}");
                    let dims = weight.dims();
                    let matrix = checkpoint.kept(&name, dims, weight.format()).unwrap();
                    same_values(&checkpoint, &name, dims, weight.format(), matrix.unwrap());
                }
                None => floats += usize::from(is_theirs),
            }
        }
        println!(
            "{form}: {packed} packed, {floats} floats; {:?}",
            pipeline.parts.remarks
        );
        assert_eq!((packed, floats), (kept, dequantised), "{form}");
        let told = pipeline.parts.remarks.join(" ");
        let says = match packed {
            0 => "no matrix stays packed".to_string(),
            _ => format!("{packed} matrices stay packed exactly as they are"),
        };
        assert!(told.contains(&says), "{form}: {told}");
        assert_eq!(
            told.contains("dequantised to 16 bits"),
            floats > 0,
            "{form}"
        );
        // The tool's rounding of products to 16 bits changes no token.
        assert_eq!(answer(&pipeline).1, tokens(dir.path()).1, "{form}");
    }
}
