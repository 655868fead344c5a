//! Checkpoints with older keys, of forms that are not read, damaged, or of several models at once: what is
//! read is right, the rest is an error with a name and a cure.

use std::{collections::BTreeMap, fs, path::Path};

use burn::tensor::DType;
use rand::{Rng, SeedableRng};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;
use xray_qwen3vl::{
    qwen3_vl::{config::Qwen3VlConfig, weights::Checkpoint},
    runtime::pipeline::TextAndImages,
};

use crate::checkpoints::{FORMS, fixtures, folder, numbers, options, read_json, tokens};

/// Rewrites the tensors of a file.
fn edit_tensors(path: &Path, edit: impl Fn(&mut BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>)) {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let own = |view: TensorView<'_>| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    let mut tensors: BTreeMap<_, _> = file
        .iter()
        .map(|(name, view)| (name.to_string(), own(view)))
        .collect();
    edit(&mut tensors);
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut tree = read_json(path);
    edit(&mut tree);
    fs::write(path, tree.to_string()).unwrap();
}

fn rename(dir: &TempDir, rules: &[(&str, &str)]) {
    for file in ["rest.safetensors", "quantised.safetensors"] {
        edit_tensors(&dir.path().join(file), |tensors| {
            *tensors = std::mem::take(tensors)
                .into_iter()
                .map(|(name, tensor)| {
                    let rule = rules
                        .iter()
                        .find_map(|(new, old)| Some(format!("{old}{}", name.strip_prefix(new)?)));
                    (rule.unwrap_or(name), tensor)
                })
                .collect();
        });
    }
}

#[test]
fn older_keys_are_read_as_transformers_reads_them() {
    let variants: [&[(&str, &str)]; 3] = [
        &[
            ("model.language_model.", "model."),
            ("model.visual.", "visual."),
        ],
        &[("model.", "")],
        &[
            ("model.language_model.", "language_model.model."),
            ("model.visual.", "visual."),
        ],
    ];
    for form in ["plain", "awq", "bnb-nf4"] {
        let want = numbers(&read_json(&fixtures().join(form).join("expected.json"))["tokens"]);
        for rules in variants {
            let dir = folder(form);
            rename(&dir, rules);
            let (_, written, remarks) = tokens(dir.path());
            assert_eq!(written, want, "{form} {rules:?}");
            assert!(remarks[0].contains("older releases"), "{remarks:?}");
        }
    }
    let dir = folder("plain");
    edit_tensors(&dir.path().join("rest.safetensors"), |tensors| {
        let norm = tensors["model.language_model.norm.weight"].clone();
        tensors.insert("model.norm.weight".into(), norm);
    });
    let error = Checkpoint::open(dir.path()).err().unwrap().to_string();
    assert!(
        error.contains("`model.norm.weight`") && error.contains("both"),
        "{error}"
    );
}

#[test]
fn the_head_is_tied_as_the_files_say() {
    let tied = |edit: &dyn Fn(&mut Value), head: bool| {
        let dir = folder("plain");
        edit_json(&dir.path().join("config.json"), edit);
        if head {
            edit_tensors(&dir.path().join("rest.safetensors"), |tensors| {
                let mut head = tensors["model.language_model.embed_tokens.weight"].clone();
                head.2[0] ^= 1;
                tensors.insert("lm_head.weight".into(), head);
            });
        }
        let parts = TextAndImages::load(&options(dir.path())).unwrap();
        (parts.config.tie_word_embeddings, parts.remarks.len())
    };
    let absent =
        |tree: &mut Value| drop(tree.as_object_mut().unwrap().remove("tie_word_embeddings"));
    let inner = |tree: &mut Value| {
        absent(tree);
        tree["text_config"]["tie_word_embeddings"] = json!(true);
    };
    assert_eq!(tied(&|_| {}, false), (true, 0));
    assert_eq!(tied(&inner, false), (true, 0));
    assert_eq!(tied(&absent, false), (true, 1));
    assert_eq!(tied(&absent, true), (false, 0));
    assert_eq!(tied(&|_| {}, true), (false, 1));
    assert_eq!(tied(&inner, true), (false, 1));
    assert_eq!(
        tied(&|tree| tree["tie_word_embeddings"] = json!(false), false),
        (false, 0)
    );
}

/// What a reader is told about a folder.
fn complaint(dir: &Path) -> String {
    match TextAndImages::load(&options(dir)) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{} was read", dir.display()),
    }
}

#[test]
fn what_is_not_read_is_called_by_its_name() {
    let config = |entry: Value| {
        let dir = folder("plain");
        edit_json(&dir.path().join("config.json"), |tree| {
            tree["quantization_config"] = entry
        });
        complaint(dir.path())
    };
    for (entry, says) in [
        (json!({"quant_method": "torchao"}), "TorchAO"),
        (json!({"quant_method": "eetq"}), "EETQ"),
        (json!({"quant_method": "hqq"}), "HQQ"),
        (json!({"quant_method": "aqlm"}), "AQLM"),
        (json!({"quant_method": "made-up"}), "`made-up`"),
        (json!({"bits": 4, "group_size": 64}), "MLX"),
        (json!({}), "unnamed"),
        (
            json!({"quant_method": "fp8", "act_order": true}),
            "`quantization_config.act_order` (true)",
        ),
        (
            json!({"quant_method": "awq", "version": "gemv"}),
            "`quantization_config.version` is \"gemv\"",
        ),
        (
            json!({"quant_method": "awq", "bits": 3}),
            "`quantization_config.bits`",
        ),
        (
            json!({"quant_method": "gptq", "bits": 5}),
            "`quantization_config.bits` is 5",
        ),
        (
            json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}),
            "\"marlin\"",
        ),
        (
            json!({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 8}}}),
            "dynamic",
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
            "nvfp4",
        ),
        (
            json!({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}),
            "sparsity_config",
        ),
        (
            json!({"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "odd"}}}}),
            "config_groups.a.weights.strategy",
        ),
        (json!({"quant_method": "bitsandbytes"}), "load_in_4bit"),
        (json!(7), "expected an object"),
    ] {
        let error = config(entry.clone());
        assert!(
            error.contains(says) && error.contains("config.json"),
            "{entry}: {error}"
        );
    }
    for (kind, says) in [
        ("qwen3_vl_moe", "mixture of experts"),
        ("qwen2_5_vl", "Qwen2.5-VL"),
        ("qwen2_vl", "Qwen2-VL"),
        ("qwen3_5", "Qwen3.5"),
        ("qwen3_omni_moe", "Omni"),
    ] {
        let dir = folder("plain");
        edit_json(&dir.path().join("config.json"), |tree| {
            tree["model_type"] = json!(kind)
        });
        let error = complaint(dir.path());
        assert!(error.contains(says) && error.contains(kind), "{error}");
    }
}

#[test]
fn files_that_are_missing_or_of_another_form_are_named() {
    let dir = folder("plain");
    fs::remove_file(dir.path().join("quantised.safetensors")).unwrap();
    let error = complaint(dir.path());
    assert!(
        error.contains("quantised.safetensors") && error.contains("1 file"),
        "{error}"
    );

    let dir = folder("plain");
    let only = |name: &str, bytes: &[u8]| {
        for file in [
            "rest.safetensors",
            "quantised.safetensors",
            "model.safetensors.index.json",
        ] {
            let _ = fs::remove_file(dir.path().join(file));
        }
        fs::write(dir.path().join(name), bytes).unwrap();
        let error = Checkpoint::open(dir.path()).err().unwrap().to_string();
        fs::remove_file(dir.path().join(name)).unwrap();
        error
    };
    let error = only("pytorch_model-00001-of-00002.bin", b"");
    assert!(
        error.contains("`pytorch_model-00001-of-00002.bin`")
            && error.contains("pytorch_model.bin.index.json"),
        "{error}"
    );
    let error = only(
        "model.safetensors",
        b"version https://git-lfs.github.com/spec/v1\n",
    );
    assert!(error.contains("git lfs pull"), "{error}");
    let error = only(
        "model.gguf",
        b"version https://git-lfs.github.com/spec/v1\n",
    );
    assert!(error.contains("git lfs pull"), "{error}");
    let error = only("model-00001-of-00004.safetensors", b"");
    assert!(error.contains("model.safetensors.index.json"), "{error}");

    // Weights of MLX without a word in the config.
    let dir = folder("plain");
    edit_tensors(&dir.path().join("rest.safetensors"), |tensors| {
        let norm = tensors.get_mut("model.language_model.norm.weight").unwrap();
        *norm = (Dtype::U32, norm.1.clone(), vec![0; norm.1[0] * 4]);
    });
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let mut out = vec![0; 256];
    let error = checkpoint.read_into("model.language_model.norm.weight", 0, DType::F32, &mut out);
    assert!(error.unwrap_err().to_string().contains("MLX"));

    // Quantised weights whose config was lost, and a layer that the config leaves out.
    let dir = folder("fp8");
    edit_json(&dir.path().join("config.json"), |tree| {
        tree["quantization_config"] = Value::Null
    });
    let name = "model.language_model.layers.0.mlp.up_proj.weight";
    let error = Checkpoint::open(dir.path())
        .unwrap()
        .read_into(name, 0, DType::F32, &mut out);
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("quantization_config")
    );
    let dir = folder("fp8");
    edit_json(&dir.path().join("config.json"), |tree| {
        tree["quantization_config"]["modules_to_not_convert"] =
            json!(["model.language_model.layers.1"]);
    });
    assert!(complaint(dir.path()).contains("lists its layer as not converted"));
}

#[test]
fn ggufs_that_do_not_go_together_are_named() {
    let dir = folder("gguf");
    let text = dir.path().join("tiny.gguf");
    let eye = dir.path().join("mmproj-tiny.gguf");
    let says = |path: &Path, piece: &str| {
        let error = complaint(path);
        assert!(error.contains(piece), "{error}");
    };
    TextAndImages::load(&options(&text)).unwrap();
    says(&eye, "--mmproj");
    fs::copy(&eye, dir.path().join("mmproj-2.gguf")).unwrap();
    says(&text, "several mmproj files");
    let mut named = options(&text);
    named.gguf.mmproj = Some(eye.clone());
    TextAndImages::load(&named).unwrap();
    named.gguf.mmproj = Some(text.clone());
    let error = TextAndImages::load(&named).unwrap_err().to_string();
    assert!(error.contains("expected the vision tower"), "{error}");
    fs::remove_file(dir.path().join("mmproj-2.gguf")).unwrap();
    fs::copy(&text, dir.path().join("second.gguf")).unwrap();
    says(dir.path(), "several language models");
    fs::remove_file(dir.path().join("second.gguf")).unwrap();
    fs::remove_file(&eye).unwrap();
    says(&text, "mmproj");
    says(dir.path(), "mmproj");

    // Another architecture of the same length, and a vocabulary that is cut in another way.
    let dir = folder("gguf");
    let text = dir.path().join("tiny.gguf");
    let bytes = fs::read(&text).unwrap();
    let exchange = |old: &[u8], new: &[u8]| {
        let at = bytes
            .windows(old.len())
            .position(|window| window == old)
            .unwrap();
        let mut changed = bytes.clone();
        changed[at..at + new.len()].copy_from_slice(new);
        fs::write(&text, changed).unwrap();
    };
    exchange(b"qwen3vl", b"qwen2vl");
    says(&text, "`qwen2vl`");
    exchange(b"qwen2", b"llama");
    says(&text, "--tokenizer");
    let mut named = options(&text);
    let original = folder("plain");
    named.gguf.tokenizer = Some(original.path().to_path_buf());
    TextAndImages::load(&named).unwrap();
}

/// Reads all that a checkpoint holds; what matters is that nothing panics and sizes stay those of the files.
fn read_all(dir: &Path) -> bool {
    let Ok(checkpoint) = Checkpoint::open(dir) else {
        return false;
    };
    let mut whole = true;
    for (name, shape) in checkpoint.in_order() {
        let count: usize = shape.iter().product();
        assert!(count < 1 << 22, "{name} {shape:?}");
        let mut bytes = vec![0; count * 4];
        whole &= checkpoint
            .read_into(name, 0, DType::F32, &mut bytes)
            .is_ok();
    }
    let _ = Qwen3VlConfig::from_dir(dir);
    whole
}

#[test]
fn damaged_files_are_errors_and_never_panics() {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(17);
    for form in FORMS {
        let files: &[&str] = match form {
            "gguf" => &["tiny.gguf", "mmproj-tiny.gguf"],
            _ => &["quantised.safetensors", "config.json"],
        };
        let dir = folder(form);
        assert!(read_all(dir.path()), "{form}");
        for file in files {
            let path = dir.path().join(file);
            let bytes = fs::read(&path).unwrap();
            for _ in 0..4 {
                let cut = random.random_range(0..bytes.len());
                fs::write(&path, &bytes[..cut]).unwrap();
                assert!(!read_all(dir.path()), "{form}: {file} cut at {cut}");
            }
            // The beginning says what the rest is.
            let header = bytes.len().min(6000);
            for _ in 0..24 {
                let mut changed = bytes.clone();
                for _ in 0..random.random_range(1..4) {
                    let at = random.random_range(0..header);
                    changed[at] = match random.random_range(0..3) {
                        0 => random.random(),
                        1 => b'0' + random.random_range(0..10u8),
                        _ => changed[at] ^ (1 << random.random_range(0..8)),
                    };
                }
                fs::write(&path, &changed).unwrap();
                read_all(dir.path());
            }
            fs::write(&path, &bytes).unwrap();
        }
        // Every value of the config in turn.
        if form != "gguf" && form != "plain" {
            let path = dir.path().join("config.json");
            let tree = read_json(&path);
            for key in tree["quantization_config"].as_object().unwrap().keys() {
                for value in [
                    json!(null),
                    json!(-1),
                    json!(0),
                    json!(1u64 << 40),
                    json!("x"),
                    json!([]),
                    json!({"a": 1}),
                ] {
                    let mut changed = tree.clone();
                    changed["quantization_config"][key] = value;
                    fs::write(&path, changed.to_string()).unwrap();
                    if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
                        assert!(!checkpoint.in_order().is_empty());
                    }
                }
            }
        }
    }
}
