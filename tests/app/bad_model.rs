//! Checkpoint and adapter folders that are damaged, or belong to something else.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::tempdir;

use crate::{
    fixture_image,
    refusal::{case, check},
    repository, text, tiny_model,
};

/// A norm of the language model, in every Qwen3-VL checkpoint.
const NORM: &str = "model.language_model.norm.weight";

/// Copies the files of a folder.
fn copy_files(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    let entries = fs::read_dir(from)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", from.display()));
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::write(to.join(path.file_name().unwrap()), fs::read(&path).unwrap()).unwrap();
        }
    }
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut tree = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut tree);
    fs::write(path, serde_json::to_vec_pretty(&tree).unwrap()).unwrap();
}

/// A tensor of a file: type, shape, bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

fn edit_tensors(path: &Path, edit: impl FnOnce(&mut BTreeMap<String, Stored>)) {
    let bytes = fs::read(path).unwrap();
    let mut tensors: BTreeMap<String, Stored> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| {
            let stored = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
            (name.to_string(), stored)
        })
        .collect();
    edit(&mut tensors);
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Bytes of a NaN of the type.
fn not_a_number(dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => f32::NAN.to_le_bytes().to_vec(),
        Dtype::BF16 => vec![0xc0, 0x7f],
        Dtype::F16 => vec![0x00, 0x7e],
        other => panic!("the model is stored as {other:?}"),
    }
}

#[test]
fn a_model_folder_that_is_not_whole_is_named() {
    let folder = tempdir().unwrap();
    let image = fixture_image("model_a.png");
    let mut cases = Vec::new();
    // A copy of the model, what is done to it, and what the message says beside the folder's name.
    let mut add = |name: &'static str, says: &[&str], spoil: &dyn Fn(&Path)| {
        let model = folder.path().join(name.replace(' ', "-"));
        copy_files(&tiny_model(), &model);
        spoil(&model);
        let args = [
            "--model",
            text(&model),
            "--max-new-tokens",
            "1",
            text(&image),
        ];
        let mut says = says.to_vec();
        // The memory a model needs is the machine's matter, not the folder's.
        if name != "immense model" {
            says.push(text(&model));
        }
        cases.push(case(name, &args, 1, &says));
    };
    let config =
        |model: &Path, edit: &dyn Fn(&mut Value)| edit_json(&model.join("config.json"), edit);
    let weights = |model: &Path, edit: &dyn Fn(&mut BTreeMap<String, Stored>)| {
        edit_tensors(&model.join("model.safetensors"), edit);
    };
    let remove = |model: &Path, file: &str| fs::remove_file(model.join(file)).unwrap();

    add("config missing", &["config.json", "expected"], &|model| {
        remove(model, "config.json")
    });
    add("config no json", &["config.json", "line 1"], &|model| {
        fs::write(model.join("config.json"), "sizes: many").unwrap();
    });
    add(
        "config lacks a key",
        &["config.json", "`num_hidden_layers`"],
        &|model| {
            config(model, &|tree| {
                let text = tree["text_config"].as_object_mut().unwrap();
                text.remove("num_hidden_layers").unwrap();
            });
        },
    );
    add(
        "config of a wrong kind",
        &["config.json", "`model_type`", "`qwen3_vl`"],
        &|model| {
            config(model, &|tree| tree["model_type"] = json!("llama"));
        },
    );
    add(
        "config with a zero",
        &["config.json", "`text_config.hidden_size`", "positive"],
        &|model| {
            config(model, &|tree| tree["text_config"]["hidden_size"] = json!(0));
        },
    );
    add(
        "config of another size",
        &["model.safetensors", "the model expects"],
        &|model| {
            config(model, &|tree| {
                let size = tree["text_config"]["intermediate_size"].as_u64().unwrap();
                tree["text_config"]["intermediate_size"] = json!(size + 8);
            });
        },
    );
    add("immense model", &["GiB", "try"], &|model| {
        config(model, &|tree| {
            tree["text_config"]["vocab_size"] = json!(2_000_000_000)
        });
    });
    add(
        "tokenizer no json",
        &["tokenizer.json", "not a tokenizer"],
        &|model| {
            let _ = fs::remove_file(model.join("tokenizer.json.gz"));
            fs::write(model.join("tokenizer.json"), "{\"words\": []}").unwrap();
        },
    );
    add("tokenizer missing", &["tokenizer.json", "hint"], &|model| {
        for file in ["tokenizer.json", "tokenizer.json.gz"] {
            let _ = fs::remove_file(model.join(file));
        }
    });
    add(
        "weights missing",
        &["`model.safetensors`", "expected"],
        &|model| {
            remove(model, "model.safetensors");
        },
    );
    add(
        "weights cut off",
        &["model.safetensors", "copy it again"],
        &|model| {
            let path = model.join("model.safetensors");
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() * 2 / 3]).unwrap();
        },
    );
    add(
        "weights without a byte",
        &["model.safetensors", "copy it again"],
        &|model| {
            fs::write(model.join("model.safetensors"), "").unwrap();
        },
    );
    add(
        "tensor missing",
        &["lacks 1 tensor", NORM, "config.json"],
        &|model| {
            weights(model, &|tensors| drop(tensors.remove(NORM).unwrap()));
        },
    );
    let extra = "model.language_model.layers.99.mlp.gate_proj.weight";
    add(
        "tensor too many",
        &["no place", extra, "config.json"],
        &|model| {
            weights(model, &|tensors| {
                tensors.insert(extra.to_string(), (Dtype::F32, vec![2, 2], vec![0; 16]));
            });
        },
    );
    add(
        "tensor misshapen",
        &["model.safetensors", NORM, "expects"],
        &|model| {
            weights(model, &|tensors| {
                let (_, shape, data) = tensors.get_mut(NORM).unwrap();
                data.truncate(data.len() / shape[0] * (shape[0] - 1));
                shape[0] -= 1;
            });
        },
    );
    add(
        "tensor of integers",
        &["model.safetensors", NORM, "I64", "expected BF16"],
        &|model| {
            weights(model, &|tensors| {
                let (dtype, shape, data) = tensors.get_mut(NORM).unwrap();
                *dtype = Dtype::I64;
                *data = vec![0; shape[0] * 8];
            });
        },
    );
    add(
        "tensor with a nan",
        &["model.safetensors", NORM, "NaN", "element 1"],
        &|model| {
            weights(model, &|tensors| {
                let (dtype, _, data) = tensors.get_mut(NORM).unwrap();
                let nan = not_a_number(*dtype);
                data[nan.len()..2 * nan.len()].copy_from_slice(&nan);
            });
        },
    );
    cases.push(case(
        "folder missing",
        &["--model", "no/model", text(&image)],
        1,
        &["`no/model`", "neither a folder here nor downloaded"],
    ));
    check(folder.path(), &cases);
}

#[test]
fn an_adapter_that_does_not_fit_is_named() {
    let folder = tempdir().unwrap();
    let image = fixture_image("model_a.png");
    let fixture = repository().join("tests/fixtures/parity/adapter");
    let copy = |name: &str| -> PathBuf {
        let path = folder.path().join(name);
        copy_files(&fixture, &path);
        path
    };
    let (unsupported, cut, bare) = (copy("unsupported"), copy("cut"), copy("bare"));
    edit_json(&unsupported.join("adapter_config.json"), |tree| {
        tree["layer_replication"] = json!([[0, 4], [2, 5]]);
    });
    let tensors = cut.join("adapter_model.safetensors");
    let bytes = fs::read(&tensors).unwrap();
    fs::write(&tensors, &bytes[..bytes.len() / 2]).unwrap();
    fs::remove_file(bare.join("adapter_model.safetensors")).unwrap();
    let no_target = copy("no-target");
    edit_json(&no_target.join("adapter_config.json"), |tree| {
        tree["target_modules"] = json!(["no_such_proj"]);
    });
    let with = |name, adapter: &str, says: &[&str]| {
        case(name, &["--adapter", adapter, text(&image)], 1, says)
    };
    check(
        folder.path(),
        &[
            with(
                "not there",
                "absent",
                &["absent/adapter_config.json", "expected"],
            ),
            with(
                "another model",
                text(&fixture),
                &["adapter_model.safetensors", "another base model"],
            ),
            with(
                "unsupported key",
                "unsupported",
                &["adapter_config.json", "`layer_replication`", "expected"],
            ),
            with(
                "no tensors",
                "bare",
                &["bare/adapter_model.safetensors", "No such file"],
            ),
            with(
                "cut off",
                "cut",
                &["cut/adapter_model.safetensors", "copy it again"],
            ),
            with(
                "no target",
                "no-target",
                &["target_modules", "no_such_proj"],
            ),
        ],
    );
}
