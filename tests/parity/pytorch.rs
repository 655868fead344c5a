//! Checkpoints and adapters as files of PyTorch against the same in safetensors form: each weight bit for bit,
//! and the tokens of the whole model.

use std::{fs, path::Path};

use burn::tensor::DType;
use serde_json::json;
use tempfile::TempDir;
use xray_qwen3vl::{
    adapters::lora::files::{adapter_tensors, attach_adapter},
    qwen3_vl::weights::{Checkpoint, Head, checkpoint_files, gguf::is_model, head, stored_dtype},
};

use crate::{
    checkpoints::{fixtures, numbers, read_json, tokens},
    model::load,
};

const EMBEDDING: &str = "model.language_model.embed_tokens.weight";
const SHARDS: [&str; 3] = [
    "pytorch_model.bin.index.json",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model-00002-of-00002.bin",
];

/// A folder with these files of the fixture, the tokenizer and the config.
fn folder(weights: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny");
    let copy = |from: &Path| {
        fs::copy(from, dir.path().join(from.file_name().unwrap())).unwrap();
    };
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ] {
        copy(&tiny.join(name));
    }
    copy(&fixtures().join("preprocessor_config.json"));
    copy(&fixtures().join("pytorch/config.json"));
    for name in weights {
        copy(&fixtures().join("pytorch").join(name));
    }
    dir
}

fn read(checkpoint: &Checkpoint, name: &str, count: usize, dtype: DType) -> Vec<u8> {
    let mut bytes = vec![0; count * dtype.size()];
    // In pieces that end inside rows.
    for (number, piece) in bytes.chunks_mut(37 * dtype.size()).enumerate() {
        checkpoint
            .read_into(name, number * 37, dtype, piece)
            .unwrap();
    }
    let mut whole = vec![0; bytes.len()];
    checkpoint.read_into(name, 0, dtype, &mut whole).unwrap();
    assert_eq!(bytes, whole, "{name}");
    bytes
}

#[test]
fn weights_and_tokens_are_those_of_the_safetensors_twin() {
    let (shards, twin) = (folder(&SHARDS), folder(&["twin/model.safetensors"]));
    let ours = Checkpoint::open(shards.path()).unwrap();
    let theirs = Checkpoint::open(twin.path()).unwrap();
    assert_eq!(ours.in_order().len(), theirs.in_order().len() + 1);
    let mut compared = 0;
    for (name, shape) in theirs.in_order() {
        let found = ours.in_order().into_iter().find(|found| found.0 == name);
        assert_eq!(found.unwrap().1, shape, "{name}");
        assert_eq!(ours.stored_dtype(name), Some(DType::BF16));
        for dtype in [DType::BF16, DType::F32] {
            let count = shape.iter().product();
            let want = read(&theirs, name, count, dtype);
            assert_eq!(read(&ours, name, count, dtype), want, "{name} {dtype:?}");
            compared += 1;
        }
    }
    assert!(compared > 80, "{compared}");
    // The head shares the storage of the embedding.
    assert_eq!(head(shards.path()).unwrap(), Head::Copy);
    assert_eq!(
        stored_dtype(shards.path(), &Default::default()).unwrap(),
        Some(DType::BF16)
    );

    let expected = read_json(&fixtures().join("pytorch/expected.json"));
    for dir in [shards.path(), twin.path()] {
        let (prompt, written, remarks) = tokens(dir);
        assert_eq!(prompt, numbers(&expected["prompt"]));
        assert_eq!(written, numbers(&expected["tokens"]));
        assert!(remarks.is_empty(), "{remarks:?}");
    }
}

#[test]
fn files_are_chosen_as_transformers_chooses_them() {
    let names = |dir: &TempDir| -> Vec<String> {
        let files = checkpoint_files(dir.path()).unwrap();
        let name = |file: &std::path::PathBuf| file.file_name().unwrap().to_string_lossy().into();
        files.iter().map(name).collect()
    };
    let dir = folder(&SHARDS);
    assert_eq!(names(&dir), SHARDS[1..]);
    let gguf = fixtures().join("gguf/tiny.gguf");
    fs::copy(gguf, dir.path().join("tiny.gguf")).unwrap();
    assert!(!is_model(dir.path()));
    let one = dir.path().join("pytorch_model.bin");
    fs::copy(dir.path().join(SHARDS[2]), &one).unwrap();
    assert_eq!(names(&dir), ["pytorch_model.bin"]);
    let twin = fixtures().join("pytorch/twin/model.safetensors");
    fs::copy(twin, dir.path().join("model.safetensors")).unwrap();
    assert_eq!(names(&dir), ["model.safetensors"]);

    let dir = folder(&SHARDS);
    fs::remove_file(dir.path().join(SHARDS[1])).unwrap();
    let error = Checkpoint::open(dir.path()).err().unwrap().to_string();
    assert!(error.contains("1 file"), "{error}");
    // Another name for a tensor that is there already.
    let dir = folder(&SHARDS);
    let twin = fixtures().join("pytorch/twin/model.safetensors");
    fs::copy(twin, dir.path().join("model-2.safetensors")).unwrap();
    let index = json!({"weight_map": {"a": SHARDS[1], "b": SHARDS[2], "c": "model-2.safetensors"}});
    fs::write(dir.path().join(SHARDS[0]), index.to_string()).unwrap();
    assert!(Checkpoint::open(dir.path()).unwrap().contains(EMBEDDING));

    // Files that are refused say so through the loader of checkpoints.
    let dir = folder(&["refused/command.bin"]);
    let model = dir.path().join("pytorch_model.bin");
    fs::rename(dir.path().join("command.bin"), &model).unwrap();
    let error = Checkpoint::open(dir.path()).err().unwrap().to_string();
    assert!(
        error.contains("pytorch_model.bin") && error.contains("would run code"),
        "{error}"
    );
    assert!(!Path::new("ran-by-a-pickle").exists());
}

#[test]
fn an_adapter_is_that_of_the_safetensors_twin() {
    let adapters = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adapters");
    let attached = |name: &str| {
        let adapted = attach_adapter(load("model-tiny").model, &adapters.join(name)).unwrap();
        let tensors = adapter_tensors(&adapted.model);
        let data = |tensor: &xray_qwen3vl::qwen3_vl::weights::LazyTensor| {
            (
                tensor.name.clone(),
                (tensor.data)().to_vec::<f32>().unwrap(),
            )
        };
        (
            tensors.iter().map(data).collect::<Vec<_>>(),
            adapted.notes.len(),
        )
    };
    let (ours, theirs) = (attached("pytorch"), attached("plain"));
    assert!(!ours.0.is_empty());
    assert_eq!(ours, theirs);

    let dir = tempfile::tempdir().unwrap();
    let config = "adapter_config.json";
    fs::copy(adapters.join("plain").join(config), dir.path().join(config)).unwrap();
    let legacy = fixtures().join("pytorch/refused/legacy.bin");
    fs::copy(legacy, dir.path().join("adapter_model.bin")).unwrap();
    let error = attach_adapter(load("model-tiny").model, dir.path());
    let error = error.unwrap_err().to_string();
    for piece in ["adapter_model.bin", "python3 -c", "weights_only=True"] {
        assert!(error.contains(piece), "{error}");
    }
}
