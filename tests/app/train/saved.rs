//! What is trained is saved, and loads.

use super::*;

#[test]
fn the_full_tuner_moves_what_is_not_frozen_and_its_checkpoint_loads() {
    let folder = workspace();
    let sets = [
        "tuner=full",
        "freeze_vit=true",
        "freeze_aligner=false",
        "freeze_llm=true",
        "max_steps=4",
        "save_steps=1",
    ];
    let args: Vec<&str> = sets.iter().flat_map(|pair| ["--set", *pair]).collect();
    train_well(folder.path(), &args);
    let run = folder.path().join("run");
    let weights = |step: u64| tensors(&run.join(format!("checkpoint-{step}/model.safetensors")));
    // The warm-up begins at 0: the first step changes nothing.
    let (before, after) = (weights(1), weights(4));
    assert!(before.keys().eq(after.keys()));
    let is_aligner = |name: &str| name.contains("visual.merger") || name.contains("deepstack");
    for (name, bytes) in &before {
        let moved = *bytes != after[name];
        assert_eq!(moved, is_aligner(name), "`{name}` moved: {moved}");
    }
    let moments = tensors(&run.join("checkpoint-4/optimizer.safetensors"));
    assert!(!moments.is_empty());
    for name in moments.keys() {
        assert!(is_aligner(name), "the optimizer holds `{name}`");
    }

    let whole = Files::read(&run.join("checkpoint-4"));
    let resume = [&args[..], &["--resume", "run/checkpoint-2"]].concat();
    train_well(folder.path(), &resume);
    let resumed = Files::read(&run.join("checkpoint-4"));
    for name in ["model.safetensors", "optimizer.safetensors"] {
        assert!(whole.get(name) == resumed.get(name), "`{name}` differs");
    }

    let checkpoint = run.join("checkpoint-4");
    let args = ["--model", text(&checkpoint), "--max-new-tokens", "4"];
    infer_well(folder.path(), &args);
}

#[test]
fn the_checkpoint_of_an_adapter_loads() {
    let folder = finished();
    let (model, adapter) = (tiny_model(), folder.path().join("run/checkpoint-20"));
    let args = ["--model", text(&model), "--adapter", text(&adapter)];
    infer_well(
        folder.path(),
        &[&args[..], &["--max-new-tokens", "4"]].concat(),
    );
}

#[test]
fn an_adapter_is_refused_by_another_base_of_the_same_name() {
    let folder = workspace();
    // A trained base this time: random weights have no fingerprint.
    let base = tiny_model();
    let always = ["--no-tui", "--show", "0", "--model", text(&base)];
    let args = ["train", "--config", "run.toml", "--set", "max_steps=1"];
    let (code, _, stderr) = run(folder.path(), &[&args[..], &always[..]].concat());
    assert_eq!(code, 0, "{stderr}");
    let adapter = folder.path().join("run/checkpoint-1");
    assert!(adapter.join("base_fingerprint.json").is_file());

    let other = folder.path().join("model/tiny");
    fs::create_dir_all(&other).unwrap();
    for entry in fs::read_dir(tiny_model()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, other.join(path.file_name().unwrap())).unwrap();
    }
    let weights = other.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let at = bytes.len() - 4;
    bytes[at] ^= 1;
    fs::write(&weights, bytes).unwrap();
    for command in ["infer", "merge"] {
        let mut args = vec![command, "--device", "cpu", "--adapter", text(&adapter)];
        args.extend(["--model", text(&other)]);
        if command == "merge" {
            args.extend(["--output", "merged"]);
        } else {
            args.extend(["--max-new-tokens", "4"]);
        }
        let (code, stdout, stderr) = run(folder.path(), &args);
        assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
        assert_says(&stderr, &["another base model", "--any-base"]);
        args.push("--any-base");
        let (code, _, stderr) = run(folder.path(), &args);
        assert_eq!(code, 0, "{stderr}");
    }
    let served = [
        "serve",
        "--device",
        "cpu",
        "--port",
        "0",
        "--model",
        text(&other),
    ];
    let lora = format!("other={}", text(&adapter));
    for adapter in [["--adapter", text(&adapter)], ["--lora", &lora]] {
        let (code, _, stderr) = run(folder.path(), &[&served[..], &adapter[..]].concat());
        assert_eq!(code, 1, "{stderr}");
        assert_says(&stderr, &["another base model"]);
    }
    let args = ["--model", text(&base), "--adapter", text(&adapter)];
    infer_well(
        folder.path(),
        &[&args[..], &["--max-new-tokens", "4"]].concat(),
    );
}

#[test]
fn the_last_checkpoints_and_the_best_one_are_kept() {
    let folder = workspace();
    // A rate that moves no weight: the first validation stays the best.
    let sets = [
        "learning_rate=1e-30",
        "eval_steps=1",
        "save_steps=2",
        "max_steps=8",
        "save_total_limit=2",
    ];
    let mut args: Vec<&str> = sets.iter().flat_map(|pair| ["--set", *pair]).collect();
    args.extend(["--val-data", "phantom:4:0..4:house"]);
    train_well(folder.path(), &args);
    let run = folder.path().join("run");
    assert_eq!(saved_steps(&run), [1, 6, 8]);
    let rows = records(&run.join("metrics.jsonl"));
    let losses: Vec<f64> = rows
        .iter()
        .filter_map(|row| row.get("eval_loss")?.as_f64())
        .collect();
    assert_eq!(losses.len(), 8);
    let best: Value = serde_json::from_slice(&fs::read(run.join("best.json")).unwrap()).unwrap();
    assert_eq!(best["step"], 1);
    assert_eq!(best["metric"], "eval_loss");
    assert_eq!(best["value"].as_f64(), Some(losses[0]));

    args.extend(["--set", "early_stopping_patience=2"]);
    args.extend(["--set", "output_dir=early"]);
    let (stdout, _) = train_well(folder.path(), &args);
    assert_says(
        &stdout,
        &["ended early", "the validation stopped getting better"],
    );
    let run = folder.path().join("early");
    assert_eq!(trained_steps(&run), [1, 2, 3]);
    assert_eq!(saved_steps(&run), [1, 2, 3]);
}
