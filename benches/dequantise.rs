//! Reading published quantised weights: how fast do stored integers become bf16?
//!
//! `LAYERS=36 cargo bench --bench dequantise [-- FORM…]` has the decoder layers of the 8B; without `LAYERS` it is two of
//! them. Weights are random bytes on disk, in a temporary folder (`TMPDIR`), and in the page cache after the first read.

mod harness;

use std::{collections::BTreeMap, fs, path::Path};

use burn::tensor::DType;
use half::{bf16, f16};
use harness::{measure, report};
use rand::{Rng, RngCore, SeedableRng, rngs::SmallRng};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use xray_qwen3vl::qwen3_vl::weights::Checkpoint;

const HIDDEN: usize = 4096;
const WIDE: usize = 12_288;
const KEYS: usize = 1024;
/// Name, outputs, inputs.
const MATRICES: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", HIDDEN, HIDDEN),
    ("self_attn.k_proj", KEYS, HIDDEN),
    ("self_attn.v_proj", KEYS, HIDDEN),
    ("self_attn.o_proj", HIDDEN, HIDDEN),
    ("mlp.gate_proj", WIDE, HIDDEN),
    ("mlp.up_proj", WIDE, HIDDEN),
    ("mlp.down_proj", HIDDEN, WIDE),
];
const GROUP: usize = 128;
const FORMS: [&str; 8] = [
    "awq",
    "gptq-4",
    "gptq-4-order",
    "gptq-8",
    "compressed-4",
    "fp8",
    "bnb-nf4",
    "bnb-int8",
];

/// A tensor: name, type, shape, bytes.
type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

struct Writer {
    random: SmallRng,
}

impl Writer {
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.random.fill_bytes(&mut bytes);
        bytes
    }

    fn scale(&mut self) -> f32 {
        self.random.random_range(0.001..0.01)
    }

    fn halves(&mut self, count: usize) -> Vec<u8> {
        let halves = (0..count).flat_map(|_| f16::from_f32(self.scale()).to_le_bytes());
        halves.collect()
    }

    fn brains(&mut self, count: usize) -> Vec<u8> {
        let halves = (0..count).flat_map(|_| bf16::from_f32(self.scale()).to_le_bytes());
        halves.collect()
    }

    fn floats(&mut self, count: usize) -> Vec<u8> {
        (0..count)
            .flat_map(|_| self.scale().to_le_bytes())
            .collect()
    }

    /// The tensors of a matrix `[out, input]`.
    fn matrix(&mut self, form: &str, layer: &str, out: usize, input: usize) -> Vec<Stored> {
        let name = |end: &str| format!("{layer}.{end}");
        let groups = input / GROUP;
        match form {
            "awq" => vec![
                (
                    name("qweight"),
                    Dtype::I32,
                    vec![input, out / 8],
                    self.bytes(input * out / 2),
                ),
                (
                    name("qzeros"),
                    Dtype::I32,
                    vec![groups, out / 8],
                    self.bytes(groups * out / 2),
                ),
                (
                    name("scales"),
                    Dtype::F16,
                    vec![groups, out],
                    self.halves(groups * out),
                ),
            ],
            "gptq-4" | "gptq-4-order" | "gptq-8" => {
                let bits = if form == "gptq-8" { 8 } else { 4 };
                let (words, zeros) = (input * bits / 32, out * bits / 32);
                let mut group: Vec<i32> = (0..input).map(|at| (at / GROUP) as i32).collect();
                if form == "gptq-4-order" {
                    rand::seq::SliceRandom::shuffle(group.as_mut_slice(), &mut self.random);
                }
                let order = group.iter().flat_map(|group| group.to_le_bytes()).collect();
                vec![
                    (
                        name("qweight"),
                        Dtype::I32,
                        vec![words, out],
                        self.bytes(words * out * 4),
                    ),
                    (
                        name("qzeros"),
                        Dtype::I32,
                        vec![groups, zeros],
                        self.bytes(groups * zeros * 4),
                    ),
                    (
                        name("scales"),
                        Dtype::F16,
                        vec![groups, out],
                        self.halves(groups * out),
                    ),
                    (name("g_idx"), Dtype::I32, vec![input], order),
                ]
            }
            "compressed-4" => {
                let shape = [out as i64, input as i64]
                    .iter()
                    .flat_map(|n| n.to_le_bytes())
                    .collect();
                vec![
                    (
                        name("weight_packed"),
                        Dtype::I32,
                        vec![out, input / 8],
                        self.bytes(input * out / 2),
                    ),
                    (
                        name("weight_scale"),
                        Dtype::BF16,
                        vec![out, groups],
                        self.brains(groups * out),
                    ),
                    (name("weight_shape"), Dtype::I64, vec![2], shape),
                ]
            }
            "fp8" => {
                // The exponent's lowest bit is off, so that none is NaN.
                let values = self
                    .bytes(input * out)
                    .into_iter()
                    .map(|byte| byte & 0xf7)
                    .collect();
                let blocks = [out / GROUP, groups];
                vec![
                    (name("weight"), Dtype::F8_E4M3, vec![out, input], values),
                    (
                        name("weight_scale_inv"),
                        Dtype::BF16,
                        blocks.to_vec(),
                        self.brains(blocks[0] * groups),
                    ),
                ]
            }
            "bnb-nf4" => {
                let count = input * out;
                let state = json!({
                    "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [out, input],
                });
                let state = state.to_string().into_bytes();
                let map = (0..16)
                    .flat_map(|code| (code as f32 / 8.0 - 1.0).to_le_bytes())
                    .collect();
                vec![
                    (
                        name("weight"),
                        Dtype::U8,
                        vec![count / 2, 1],
                        self.bytes(count / 2),
                    ),
                    (
                        name("weight.absmax"),
                        Dtype::F32,
                        vec![count / 64],
                        self.floats(count / 64),
                    ),
                    (name("weight.quant_map"), Dtype::F32, vec![16], map),
                    (
                        name("weight.quant_state.bitsandbytes__nf4"),
                        Dtype::U8,
                        vec![state.len()],
                        state,
                    ),
                ]
            }
            _ => vec![
                (
                    name("weight"),
                    Dtype::I8,
                    vec![out, input],
                    self.bytes(input * out),
                ),
                (name("SCB"), Dtype::F32, vec![out], self.floats(out)),
            ],
        }
    }
}

fn config(form: &str) -> Value {
    match form {
        "awq" => {
            json!({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": true})
        }
        "compressed-4" => json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": GROUP,
            }}},
        }),
        "fp8" => {
            json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [GROUP, GROUP]})
        }
        "bnb-nf4" => {
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"})
        }
        "bnb-int8" => json!({"quant_method": "bitsandbytes", "load_in_8bit": true}),
        _ => json!({
            "quant_method": "gptq", "bits": if form == "gptq-8" { 8 } else { 4 }, "group_size": GROUP,
            "checkpoint_format": "gptq_v2", "sym": false, "desc_act": form == "gptq-4-order",
        }),
    }
}

/// Writes a checkpoint, a file a layer, and returns its bytes.
fn write(dir: &Path, form: &str, layers: usize) -> u64 {
    let mut writer = Writer {
        random: SmallRng::seed_from_u64(1),
    };
    let (mut map, mut bytes) = (BTreeMap::new(), 0);
    for layer in 0..layers {
        let file = format!("model-{layer:05}.safetensors");
        let mut tensors = Vec::new();
        for (name, out, input) in MATRICES {
            let path = format!("model.language_model.layers.{layer}.{name}");
            tensors.extend(writer.matrix(form, &path, out, input));
        }
        for (name, ..) in &tensors {
            map.insert(name.clone(), file.clone());
        }
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (
                name,
                TensorView::new(*dtype, shape.clone(), bytes).expect("bytes of the shape"),
            )
        });
        let path = dir.join(file);
        safetensors::serialize_to_file(views, None, &path).expect("room on the disk");
        bytes += fs::metadata(path).expect("it was written").len();
    }
    let index = json!({"weight_map": map}).to_string();
    fs::write(dir.join("model.safetensors.index.json"), index).expect("room on the disk");
    let config = json!({"quantization_config": config(form)}).to_string();
    fs::write(dir.join("config.json"), config).expect("room on the disk");
    bytes
}

fn main() {
    let layers =
        std::env::var("LAYERS").map_or(2, |text| text.parse().expect("a number of layers"));
    let chosen: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    let mut all = Vec::new();
    for form in FORMS
        .iter()
        .filter(|form| chosen.is_empty() || chosen.iter().any(|one| one == *form))
    {
        let dir = tempfile::tempdir().expect("a folder");
        let stored = write(dir.path(), form, layers);
        let checkpoint = Checkpoint::open(dir.path()).expect("a checkpoint");
        let mut buffer = vec![0; WIDE * HIDDEN * 2];
        let mut wide = 0;
        let measured = measure(form, 3, || {
            wide = 0;
            for (name, shape) in checkpoint.in_order() {
                let bytes = shape.iter().product::<usize>() * 2;
                checkpoint
                    .read_into(name, 0, DType::BF16, &mut buffer[..bytes])
                    .expect("finite weights");
                wide += bytes;
            }
        });
        let seconds = measured.median_ms / 1e3;
        println!(
            "{:<28} {:.2} GB on disk to {:.2} GB in 16 bits: {:.2} GB/s read, {:.2} GB/s written",
            "",
            stored as f64 / 1e9,
            wide as f64 / 1e9,
            stored as f64 / 1e9 / seconds,
            wide as f64 / 1e9 / seconds,
        );
        all.push(measured);
    }
    report("dequantise", &all);
}
