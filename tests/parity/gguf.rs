//! GGUF files: blocks of every type, files in parts, the tokenizer inside.

use std::{fs, path::Path};

use burn::tensor::DType;
use xray_qwen3vl::qwen3_vl::{
    config::Qwen3VlConfig,
    weights::{
        Checkpoint, checkpoint_files,
        gguf::{GgufParts, find},
    },
};

use crate::checkpoints::{fixtures, folder, read, tokens};

/// Random blocks of every type, as `gguf.quants` dequantises them.
#[test]
fn gguf_blocks_of_every_type() {
    let bytes = fs::read(fixtures().join("blocks.safetensors")).unwrap();
    let blocks = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let numbers = [
        ("Q4_0", 2u32),
        ("Q4_1", 3),
        ("Q5_0", 6),
        ("Q5_1", 7),
        ("Q8_0", 8),
        ("Q2_K", 10),
        ("Q3_K", 11),
        ("Q4_K", 12),
        ("Q5_K", 13),
        ("Q6_K", 14),
        ("IQ4_NL", 20),
        ("IQ4_XS", 23),
        ("MXFP4", 39),
    ];
    // The text file with its norm exchanged for the blocks: a way through the true reader.
    let text = fs::read(fixtures().join("gguf/tiny.gguf")).unwrap();
    for (kind, number) in numbers {
        let raw = blocks.tensor(&format!("{kind}.bytes")).unwrap();
        let want = blocks.tensor(&format!("{kind}.floats")).unwrap();
        let count = want.data().len() / 4;
        let dir = tempfile::tempdir().unwrap();
        fs::copy(
            fixtures().join("gguf/mmproj-tiny.gguf"),
            dir.path().join("mmproj.gguf"),
        )
        .unwrap();
        fs::write(
            dir.path().join("text.gguf"),
            with_tensor(&text, number, count, raw.data()),
        )
        .unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let found = read(&checkpoint, "extra", count, DType::F32);
        assert_eq!(found, want.data(), "{kind}");
    }
}

#[test]
fn a_gguf_of_a_type_that_is_not_read_names_it_and_types_that_are() {
    let text = fs::read(fixtures().join("gguf/tiny.gguf")).unwrap();
    for (number, name) in [
        (16, "IQ2_XXS"),
        (19, "IQ1_S"),
        (21, "IQ3_S"),
        (34, "TQ1_0"),
        (99, "99"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text.gguf");
        fs::write(&path, with_tensor(&text, number, 256, &[0; 256])).unwrap();
        let error = Checkpoint::open(&path).err().unwrap().to_string();
        assert!(error.contains(&format!("is of type {name}, ")), "{error}");
        assert!(error.contains("Q4_K_M or IQ4_XS"), "{error}");
    }
}

/// A language model in three files is the model in one, and a set that is not whole is refused by name.
#[test]
fn a_gguf_in_parts_is_the_whole() {
    let whole = folder("gguf");
    let one = Checkpoint::open(whole.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let part = |number: usize| dir.path().join(format!("tiny-0000{number}-of-00003.gguf"));
    let copy = || {
        for from in fs::read_dir(fixtures().join("gguf-split")).unwrap() {
            let from = from.unwrap().path();
            fs::copy(&from, dir.path().join(from.file_name().unwrap())).unwrap();
        }
    };
    copy();
    for name in ["gguf/mmproj-tiny.gguf", "preprocessor_config.json"] {
        let from = fixtures().join(name);
        fs::copy(&from, dir.path().join(from.file_name().unwrap())).unwrap();
    }
    for model in [part(1), dir.path().to_path_buf()] {
        let parts = Checkpoint::open(&model).unwrap();
        let names = |checkpoint: &Checkpoint| {
            let tensors = checkpoint.in_order();
            let mut tensors: Vec<(String, Vec<usize>)> = tensors
                .into_iter()
                .map(|(name, shape)| (name.to_owned(), shape.to_vec()))
                .collect();
            tensors.sort();
            tensors
        };
        assert_eq!(names(&parts), names(&one));
        for (name, shape) in names(&one) {
            let count = shape.iter().product();
            let floats = |checkpoint| read(checkpoint, &name, count, DType::F32);
            assert_eq!(floats(&parts), floats(&one), "{name}");
        }
        assert_eq!(tokens(&model).1, tokens(whole.path()).1);
        assert_eq!(checkpoint_files(&model).unwrap().len(), 4);
    }
    let refused = |model: &Path, says: &str| {
        let error = Checkpoint::open(model).err().unwrap().to_string();
        assert!(error.contains(says), "{error}");
    };
    refused(
        &part(2),
        "part 2 of 3 of a model in several files; name the first one",
    );
    fs::rename(part(3), dir.path().join("away")).unwrap();
    refused(&part(1), "part 3 of 3 is missing");
    fs::copy(part(2), part(3)).unwrap();
    refused(&part(1), "does not say that it is part 3 of 3");
    fs::copy(dir.path().join("mmproj-tiny.gguf"), part(3)).unwrap();
    refused(&part(1), "does not say that it is part 3 of 3");
    copy();
    let bytes = fs::read(part(3)).unwrap();
    fs::write(part(3), &bytes[..bytes.len() - 64]).unwrap();
    refused(&part(1), "download the file again");
    copy();
    fs::rename(part(1), dir.path().join("first.gguf")).unwrap();
    refused(&dir.path().join("first.gguf"), "-00001-of-00003.gguf");
}

/// A GGUF file with one tensor more, its bytes at the end.
fn with_tensor(file: &[u8], kind: u32, count: usize, data: &[u8]) -> Vec<u8> {
    // The infos end where the first tensor's name is not followed by another: found by walking the header.
    let end = gguf_header_end(file);
    let start = end.next_multiple_of(32);
    let mut out = file[..end].to_vec();
    let tensors = u64::from_le_bytes(file[8..16].try_into().unwrap());
    out[8..16].copy_from_slice(&(tensors + 1).to_le_bytes());
    let body = &file[start..];
    let offset = body.len().next_multiple_of(32);
    out.extend(5u64.to_le_bytes());
    out.extend(b"extra");
    out.extend(1u32.to_le_bytes());
    out.extend((count as u64).to_le_bytes());
    out.extend(kind.to_le_bytes());
    out.extend((offset as u64).to_le_bytes());
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(body);
    out.resize(out.len() + offset - body.len(), 0);
    out.extend(data);
    out
}

fn gguf_header_end(file: &[u8]) -> usize {
    let u32_at = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
    let (tensors, pairs) = (u64_at(8), u64_at(16));
    let mut at = 24;
    let value = |kind: u32, mut at: usize| -> usize {
        let sizes = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8];
        match kind {
            8 => at + 8 + u64_at(at),
            9 => {
                let (kind, count) = (u32_at(at), u64_at(at + 4));
                at += 12;
                for _ in 0..count {
                    at += match kind {
                        8 => 8 + u64_at(at),
                        kind => sizes[kind as usize],
                    };
                }
                at
            }
            kind => at + sizes[kind as usize],
        }
    };
    for _ in 0..pairs {
        at += 8 + u64_at(at);
        at = value(u32_at(at), at + 4);
    }
    for _ in 0..tensors {
        at += 8 + u64_at(at);
        at += 4 + 8 * u32_at(at) as usize + 12;
    }
    at
}

/// The GGUF's own tokenizer is that of the checkpoint it was made from.
#[test]
fn a_gguf_has_its_tokenizer_and_config() {
    let dir = folder("gguf");
    let pair = find(dir.path(), &GgufParts::default()).unwrap().unwrap();
    let config = Qwen3VlConfig::from_dir(dir.path()).unwrap();
    let original = Qwen3VlConfig::from_dir(folder("plain").path()).unwrap();
    assert_eq!(config, original);
    let bytes = pair.tokenizer_json().unwrap();
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny/tokenizer.json");
    let ours = xray_qwen3vl::processor::tokenizer::Tokenizer::from_bytes(&bytes, &tiny).unwrap();
    let theirs = xray_qwen3vl::processor::tokenizer::Tokenizer::from_file(&tiny).unwrap();
    assert_eq!(ours.special(), theirs.special());
    for text in [
        "双肺纹理清晰，心影不大。",
        "No acute  disease\n\n<|im_start|>x<think> 12.5 cm's",
        "<|image_pad|>é",
    ] {
        assert_eq!(
            ours.encode(text).unwrap(),
            theirs.encode(text).unwrap(),
            "{text}"
        );
    }
}
