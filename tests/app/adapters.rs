//! Adapters as PEFT's users have them: through `infer`, `serve`, `merge` and `train`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use crate::{
    cli_prompt, infer, infer_well, repository, run,
    serve::write_adapter,
    server::{question, start, with},
    text, tiny_model,
    train::{assert_says, train, train_badly, train_well, workspace},
};

fn case(name: &str) -> PathBuf {
    repository().join("tests/fixtures/adapters").join(name)
}

fn merge(folder: &Path, base: &Path, adapter: &Path, output: &str) -> (i32, String, String) {
    let args = ["merge", "--device", "cpu", "--model", text(base)];
    let more = ["--adapter", text(adapter), "--output", output];
    run(folder, &[&args[..], &more[..]].concat())
}

fn shape(folder: &Path, name: &str) -> Option<Vec<usize>> {
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors.tensor(name).ok().map(|view| view.shape().to_vec())
}

/// An adapter of the tiny model whose final norm is stored whole, each element scaled by `by`.
fn write_norm(dir: &Path, by: f32) {
    write_adapter(dir);
    let name = "model.language_model.norm.weight";
    let base = fs::read(tiny_model().join("model.safetensors")).unwrap();
    let base = SafeTensors::deserialize(&base).unwrap();
    let base = base.tensor(name).unwrap();
    assert_eq!(base.dtype(), Dtype::BF16);
    // Some of the elements: scaling all would leave the likeliest token as it is.
    let values: Vec<u8> = base
        .data()
        .chunks_exact(2)
        .enumerate()
        .flat_map(|(at, pair)| {
            let value = f32::from_bits(u32::from(u16::from_le_bytes([pair[0], pair[1]])) << 16);
            let by = if at % 3 == 0 { by } else { 1.0 };
            (value * by).to_le_bytes()
        })
        .collect();
    let file = dir.join("adapter_model.safetensors");
    let lora = fs::read(&file).unwrap();
    let lora = SafeTensors::deserialize(&lora).unwrap();
    let mut tensors: Vec<(String, TensorView<'_>)> = lora.tensors();
    let norm = TensorView::new(Dtype::F32, vec![128], &values).unwrap();
    tensors.push((format!("base_model.model.{name}"), norm));
    safetensors::serialize_to_file(tensors, None, &file).unwrap();
    edit(dir, |tree| {
        tree["modules_to_save"] = json!(["language_model.norm"]);
    });
}

fn edit(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join("adapter_config.json");
    let mut tree = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    edit(&mut tree);
    fs::write(path, tree.to_string()).unwrap();
}

#[test]
fn merge_writes_every_kind_and_says_what_it_cannot_write() {
    let folder = tempfile::tempdir().unwrap();
    let parity = repository().join("tests/fixtures/parity");
    for (name, base, own_head) in [
        ("saved_merger", "model-tiny", true),
        ("embedding", "model-tiny", true),
        ("conv_dora", "model-tiny", true),
        ("lora_bias", "model-tiny", true),
        ("pissa", "model-tiny", true),
        ("tied_head", "model-tiny-tied", true),
        ("tied_tokens", "model-tiny-tied", false),
        ("tied_ensured", "model-tiny-tied", false),
    ] {
        let (code, stdout, stderr) = merge(folder.path(), &parity.join(base), &case(name), name);
        assert_eq!(code, 0, "{name}: {stderr}");
        assert!(stdout.contains("differ from base plus adapter"), "{stdout}");
        let merged = folder.path().join(name);
        let config = fs::read_to_string(merged.join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["tie_word_embeddings"], !own_head, "{name}");
        let head = shape(&merged, "lm_head.weight");
        assert_eq!(head, own_head.then(|| vec![384, 64]), "{name}");
    }
    let (code, stdout, stderr) = merge(
        folder.path(),
        &parity.join("model-tiny"),
        &case("lora_bias_without"),
        "bias",
    );
    assert_eq!((code, stdout.as_str()), (1, ""));
    for piece in ["lora_bias", "q_proj", "--adapter"] {
        assert!(stderr.contains(piece), "{stderr}");
    }
    assert!(!folder.path().join("bias").exists());
    // What is told about the files is part of the result.
    let (_, stdout, _) = merge(
        folder.path(),
        &parity.join("model-tiny"),
        &case("older_text"),
        "older",
    );
    assert!(stdout.contains("another layout"), "{stdout}");
}

#[test]
fn a_run_or_a_parent_leads_to_its_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_adapter(&at("run/checkpoint-4"));
    write_norm(&at("run/checkpoint-8"), -1.0);
    let short = ["--max-new-tokens", "12", "--adapter"];
    let with = |adapter: &str| infer(folder.path(), &[&short[..], &[adapter]].concat());
    // Two checkpoints, and nothing says which.
    let (code, _, stderr) = with("run");
    assert_eq!(code, 1);
    assert_says(
        &stderr,
        &["run/checkpoint-4", "run/checkpoint-8", "name one"],
    );
    fs::write(at("run/best.json"), r#"{"step": 8, "value": 1.0}"#).unwrap();
    let (code, by_run, stderr) = with("run");
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stderr.contains("run/checkpoint-8") && stderr.contains("best.json"),
        "{stderr}"
    );
    let (_, by_name, _) = with("run/checkpoint-8");
    let (_, other, _) = with("run/checkpoint-4");
    assert_eq!(by_run, by_name);
    assert_ne!(by_run, other);
    // PEFT's folder of an adapter that has a name.
    write_norm(&at("out/xray"), -1.0);
    let (code, by_parent, stderr) = with("out");
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("out/xray"), "{stderr}");
    assert_eq!(by_parent, by_name);
}

#[test]
fn adapters_that_change_the_base_are_served_beside_it_and_merge_to_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_norm(&at("one"), 2.0);
    write_norm(&at("two"), 0.25);
    let short = ["--max-new-tokens", "16"];
    let answer = |more: &[&str]| {
        let (stdout, _) = infer_well(folder.path(), &[&short[..], more].concat());
        stdout.trim_end().to_owned()
    };
    let names = ["tiny", "one", "two"];
    let want = [
        answer(&[]),
        answer(&["--adapter", "one"]),
        answer(&["--adapter", "two"]),
    ];
    assert!(want[0] != want[1] && want[1] != want[2] && want[0] != want[2]);
    let loras = ["one", "two"].map(|name| format!("{name}={}", text(&at(name))));
    let server = start(&["--lora", &loras[0], "--lora", &loras[1]]);
    std::thread::scope(|scope| {
        for user in 0..9 {
            let (server, want) = (&server, &want);
            scope.spawn(move || {
                let body = with(question(cli_prompt()), "model", names[user % 3].into());
                let body = with(body, "max_tokens", 16.into());
                assert_eq!(server.chat(&body).text().trim_end(), want[user % 3]);
            });
        }
    });
    let (code, _, stderr) = merge(folder.path(), &tiny_model(), &at("one"), "merged");
    assert_eq!(code, 0, "{stderr}");
    // The base is stored in bf16, and so is what is merged: the text is the same where it is sure.
    let merged = answer(&["--model", "merged", "--dtype", "f32"]);
    assert_eq!(merged.chars().next(), want[1].chars().next());
}

#[test]
fn a_served_folder_leads_to_its_adapter_and_not_out_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let (root, outside) = (folder.path().join("root"), folder.path().join("outside"));
    write_adapter(&outside);
    write_adapter(&root.join("run/checkpoint-8"));
    fs::write(root.join("run/best.json"), r#"{"step": 8, "value": 1.0}"#).unwrap();
    let server = start(&["--adapter-dir", text(&root)]);
    let load = |name: &str| server.post("/v1/load_lora_adapter", &json!({"lora_name": name}));
    assert_eq!(load("run").status, 200);
    assert!(server.logs("run/checkpoint-8"), "{}", server.log());
    #[cfg(unix)]
    {
        fs::create_dir(root.join("link")).unwrap();
        std::os::unix::fs::symlink(&outside, root.join("link/checkpoint-8")).unwrap();
        assert_eq!(load("link").status, 400);
    }
}

#[test]
fn training_takes_a_tied_head_and_refuses_the_rest_by_name() {
    let folder = workspace();
    let set = |pair: &'static str| {
        [
            "--set",
            pair,
            "--set",
            "max_steps=2",
            "--set",
            "save_steps=2",
        ]
    };
    for (names, layer) in [
        (
            r#"target_modules=["q_proj", "embed_tokens"]"#,
            "embed_tokens",
        ),
        (r#"target_modules=["proj"]"#, "patch_embed.proj"),
    ] {
        let message = train_badly(folder.path(), &set(names));
        assert_says(&message, &[layer, "not trained here"]);
    }
    // A weight of the base that no key says is trained.
    write_norm(&folder.path().join("norm"), 2.0);
    edit(&folder.path().join("norm"), |tree| {
        tree["modules_to_save"] = Value::Null
    });
    let message = train_badly(
        folder.path(),
        &["--adapter", "norm", "--set", "max_steps=2"],
    );
    assert_says(&message, &["language_model.norm.weight", "merge --adapter"]);
    // The head of a tied model gets an adapter of its own, which loads as PEFT's do.
    train_well(
        folder.path(),
        &set(r#"target_modules=["q_proj", "lm_head"]"#),
    );
    let trained = folder.path().join("run/checkpoint-2");
    let bytes = fs::read(trained.join("adapter_model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert!(
        tensors
            .tensor("base_model.model.lm_head.lora_B.weight")
            .is_ok()
    );
    let (_, stderr) = infer_well(
        folder.path(),
        &["--max-new-tokens", "4", "--adapter", text(&trained)],
    );
    assert!(stderr.contains("one table"), "{stderr}");
    // It is trained further, too.
    let further = ["--adapter", "run/checkpoint-2", "--output-dir", "further"];
    let further = [
        &further[..],
        &["--set", "max_steps=2", "--set", "save_steps=2"],
    ]
    .concat();
    train_well(folder.path(), &further);
}

/// Values of a tensor of an adapter, in the type it is stored in.
fn stored(folder: &Path, name: &str) -> (Dtype, Vec<u8>) {
    let bytes = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = tensors.tensor(&format!("base_model.model.{name}")).unwrap();
    (tensor.dtype(), tensor.data().to_vec())
}

#[test]
fn whole_modules_are_trained_beside_adapters_resumed_and_used() {
    let folder = workspace();
    let names = r#"modules_to_save=["lm_head", "embed_tokens"]"#;
    let set = |steps: &'static str| {
        [
            "--set",
            names,
            "--set",
            steps,
            "--set",
            "save_steps=2",
            "--set",
            "dtype=\"bf16\"",
        ]
    };
    train_well(folder.path(), &set("max_steps=4"));
    let run = folder.path().join("run");
    let [half, whole] = ["checkpoint-2", "checkpoint-4"].map(|name| run.join(name));
    let config = fs::read_to_string(whole.join("adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(
        config["modules_to_save"],
        json!(["lm_head", "embed_tokens"])
    );
    // A tied table is two from here on, both in the type of the base, and both are moved.
    let table = "model.language_model.embed_tokens.weight";
    for name in ["lm_head.weight", table] {
        let [before, after] = [&half, &whole].map(|folder| stored(folder, name));
        assert_eq!(before.0, Dtype::BF16);
        assert_ne!(before.1, after.1, "{name}");
    }
    assert_ne!(stored(&whole, "lm_head.weight"), stored(&whole, table));
    // A run that was interrupted goes on to the very same weights.
    let first = stored(&whole, table);
    fs::remove_dir_all(&whole).unwrap();
    train_well(
        folder.path(),
        &[&set("max_steps=4")[..], &["--resume", "auto"]].concat(),
    );
    assert_eq!(stored(&whole, table), first);
    // It is trained on, merged and used as PEFT's own.
    let further = ["--adapter", "run/checkpoint-4", "--output-dir", "further"];
    train_well(
        folder.path(),
        &[
            &further[..],
            &["--set", "max_steps=2", "--set", "save_steps=2"],
        ]
        .concat(),
    );
    assert_ne!(
        stored(
            &folder.path().join("further/checkpoint-2"),
            "lm_head.weight"
        ),
        stored(&whole, "lm_head.weight")
    );
    infer_well(
        folder.path(),
        &["--max-new-tokens", "4", "--adapter", text(&whole)],
    );
    let (code, _, stderr) = merge(folder.path(), &tiny_model(), &whole, "merged");
    assert_eq!(code, 0, "{stderr}");
    assert!(shape(&folder.path().join("merged"), "lm_head.weight").is_some());
    for (pairs, pieces) in [
        (
            vec![r#"modules_to_save=["lm_haed"]"#],
            ["lm_haed", "did you mean `lm_head`"],
        ),
        (
            vec![
                r#"modules_to_save=["q_proj"]"#,
                r#"target_modules=["proj"]"#,
            ],
            ["not trained here", "proj"],
        ),
        (vec![names, r#"tuner="full""#], ["modules_to_save", "full"]),
    ] {
        let to = ["--output-dir", "refused"];
        let args = pairs.iter().flat_map(|pair| ["--set", *pair]).chain(to);
        let args: Vec<&str> = args.collect();
        let (code, _, stderr) = train(folder.path(), &args);
        assert_ne!(code, 0);
        assert_says(&stderr, &pieces);
    }
}
