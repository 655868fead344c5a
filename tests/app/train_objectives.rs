//! `train` with `objective` dpo and grpo, `score` and `prefer`: what they leave, what they refuse, how they go on.

use std::{fs, path::Path};

use serde_json::{Value, json};

use crate::{repository, run, train::assert_says, train_resume::rows_so_far};

/// Four optimizer steps a rollout, two rollouts, one answer in flight of each kind of reward.
const GRPO: &str = r#"
model = "model/tiny"
train_data = "phantom:11:0..16:house"
output_dir = "run"
device = ["cpu"]
dtype = "f32"
seed = 5
objective = "grpo"
beta = 0.05
# The base is sure of its short reports.
temperature = 2.5
num_generations = 4
num_iterations = 2
steps_per_generation = 2
rewards = [
    { kind = "finding_f1", weight = 1.0, zone = true },
    { kind = "repetition", weight = 0.5 },
]
held_out_rewards = [{ kind = "text", metric = "characters.rouge_l" }]
rollout_steps = 4
max_completion_length = 24
lora_dropout = 0.0
per_device_train_batch_size = 4
gradient_accumulation_steps = 1
per_device_eval_batch_size = 8
max_steps = 16
num_train_epochs = 4.0
max_length = 256
learning_rate = 1e-3
gradient_checkpointing = false
save_steps = 4
eval_steps = 0
save_total_limit = 10
"#;

fn workspace(settings: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings.replace(
        "model/tiny",
        repository().join("model/tiny").to_str().unwrap(),
    );
    fs::write(folder.path().join("run.toml"), settings).unwrap();
    folder
}

fn start(args: &[&str]) -> Vec<String> {
    let always = ["train", "--config", "run.toml", "--no-tui", "--show", "0"];
    always
        .iter()
        .chain(args)
        .map(|word| word.to_string())
        .collect()
}

fn well(folder: &Path, args: &[&str]) -> (String, String) {
    let args = start(args);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (code, stdout, stderr) = run(folder, &args);
    assert_eq!(code, 0, "{args:?}\nstdout: {stdout}\nstderr: {stderr}");
    (stdout, stderr)
}

fn badly(folder: &Path, args: &[&str]) -> String {
    let args = start(args);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (code, _, stderr) = run(folder, &args);
    assert_ne!(code, 0, "{args:?}: {stderr}");
    stderr
}

fn rows(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("run/metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Rows without what a clock or the system measured.
fn lasting(folder: &Path) -> Vec<Value> {
    let mut rows = rows(folder);
    for row in &mut rows {
        let row = row.as_object_mut().unwrap();
        row.retain(|key, _| !key.contains("second") && !key.contains("memory"));
    }
    rows
}

#[test]
fn rewards_are_shown_by_part_and_a_killed_run_goes_on_bit_for_bit() {
    let whole = workspace(GRPO);
    well(whole.path(), &[]);
    let all = rows(whole.path());
    assert_eq!(all.len(), 16);
    for (index, row) in all.iter().enumerate() {
        for key in ["loss", "kl", "entropy", "clip_share", "ratio"] {
            assert!(row[key].is_number(), "{key} in {row}");
        }
        // A rollout of four steps.
        assert_eq!(row["reward"].is_number(), index % 4 == 0, "{row}");
    }
    for key in [
        "reward.finding_f1",
        "reward.repetition",
        "held_out_reward",
        "completion_tokens",
        "ended_share",
        "same_reward_share",
        "rollout_tokens_per_second",
    ] {
        assert!(all[4][key].is_number(), "{key} in {}", all[4]);
    }
    // Answers differ in reward, and something is learnt.
    let learnt = all
        .iter()
        .filter(|row| row["grad_norm"].as_f64() > Some(1e-3));
    assert!(learnt.count() > 4, "{all:?}");
    let sum = all[4]["reward.finding_f1"].as_f64().unwrap()
        + 0.5 * all[4]["reward.repetition"].as_f64().unwrap();
    assert!((all[4]["reward"].as_f64().unwrap() - sum).abs() < 1e-9);
    let kept = fs::read_to_string(whole.path().join("run/rollouts/step-4.jsonl")).unwrap();
    assert_eq!(kept.lines().count(), 8);
    let one: Value = serde_json::from_str(kept.lines().next().unwrap()).unwrap();
    assert!(
        one["rewards"]["finding_f1"].is_number() && one["advantage"].is_number(),
        "{one}"
    );
    let svg = fs::read_to_string(whole.path().join("run/training.svg")).unwrap();
    assert!(svg.contains("Rewards of drawn answers") && svg.contains("estimated KL"));

    // Killed in the middle of a rollout, later than a checkpoint.
    let killed = workspace(GRPO);
    let folder = killed.path();
    let args = start(&[]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut child = crate::program(folder, &args).spawn().unwrap();
    while rows_so_far(&folder.join("run")) < 6 {
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before it was caught"
        );
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    well(folder, &["--resume", "auto"]);
    assert_eq!(lasting(folder), lasting(whole.path()));
    for file in ["adapter_model.safetensors", "optimizer.safetensors"] {
        let read = |folder: &Path| fs::read(folder.join("run/checkpoint-16").join(file)).unwrap();
        assert!(read(folder) == read(whole.path()), "{file} differs");
    }
}

#[test]
fn two_devices_learn_from_rewards_as_one() {
    let one = workspace(GRPO);
    let sets = [
        "--set",
        "num_iterations=1",
        "--set",
        "steps_per_generation=1",
        "--set",
        "max_steps=4",
    ];
    let args = |more: &[&'static str]| [&sets[..], more].concat();
    well(
        one.path(),
        &args(&["--set", "per_device_train_batch_size=8"]),
    );
    let two = workspace(GRPO);
    well(two.path(), &args(&["--device", "cpu,cpu"]));
    for (one, two) in rows(one.path()).iter().zip(rows(two.path())) {
        for key in ["loss", "reward", "kl", "grad_norm"] {
            let [one, two] = [one, &two].map(|row| row[key].as_f64().unwrap());
            // Sums in another order.
            assert!(
                (one - two).abs() < 1e-4 * one.abs().max(1.0),
                "{key}: {one} {two}"
            );
        }
    }
}

#[test]
fn pairs_of_own_answers_are_preferred() {
    let folder = tempfile::tempdir().unwrap();
    let samples = repository().join("data/sample/val/samples.jsonl");
    let samples = samples.to_str().unwrap();
    let prefer = [
        "prefer",
        samples,
        "--limit",
        "6",
        "--samples",
        "4",
        "--max-new-tokens",
        "24",
        "--margin",
        "0.01",
        "--temperature",
        "2.5",
        "--output",
        "pairs.jsonl",
    ];
    let (code, _, stderr) = run(folder.path(), &prefer);
    assert_eq!(code, 0, "{stderr}");
    let text = fs::read_to_string(folder.path().join("pairs.jsonl")).unwrap();
    let pairs: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(!pairs.is_empty());
    for pair in &pairs {
        assert!(pair["margin"].as_f64().unwrap() >= 0.01, "{pair}");
        assert_ne!(pair["messages"][1]["content"], pair["rejected_response"]);
    }
    let settings = GRPO
        .replace("objective = \"grpo\"", "objective = \"dpo\"")
        .replace("phantom:11:0..16:house", "pairs.jsonl");
    let keys = [
        "num_generations",
        "num_iterations",
        "steps_per_generation",
        "rewards",
        "held_out_rewards",
        "rollout_steps",
        "max_completion_length",
        "temperature",
    ];
    let kept = settings.lines().filter(|line| {
        let is_list = line.trim_start().starts_with("{ kind") || *line == "]";
        !is_list && !keys.iter().any(|key| line.starts_with(&format!("{key} =")))
    });
    let settings = kept.collect::<Vec<_>>().join("\n");
    let settings = settings.replace(
        "model/tiny",
        repository().join("model/tiny").to_str().unwrap(),
    );
    fs::write(folder.path().join("run.toml"), settings).unwrap();
    well(
        folder.path(),
        &[
            "--set",
            "max_steps=6",
            "--set",
            "save_steps=0",
            "--set",
            "num_train_epochs=40",
        ],
    );
    let all = rows(folder.path());
    // The reference is the start: no answer is preferred yet.
    let first = all[0]["loss"].as_f64().unwrap();
    assert!((first - std::f64::consts::LN_2).abs() < 1e-4, "{first}");
    let last = &all[5];
    assert!(last["loss"].as_f64().unwrap() < first, "{last}");
    assert!(last["reward_margin"].as_f64().unwrap() > 0.0, "{last}");

    // `score` gives what the trainer computes: the implicit reward is beta times the difference.
    let score = |adapter: &[&str]| -> Vec<Value> {
        let args = ["score", "pairs.jsonl", "--rejected", "--tokens"];
        let (code, stdout, stderr) = run(folder.path(), &[&args[..], adapter].concat());
        assert_eq!(code, 0, "{stderr}");
        stdout
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let (before, after) = (score(&[]), score(&["--adapter", "run/checkpoint-6"]));
    assert_eq!(before.len(), pairs.len());
    let margin = |row: &Value| {
        row["log_probability"].as_f64().unwrap()
            - row["rejected"]["log_probability"].as_f64().unwrap()
    };
    let risen = before
        .iter()
        .zip(&after)
        .filter(|(a, b)| margin(b) > margin(a))
        .count();
    assert!(risen * 2 > pairs.len(), "{risen} of {}", pairs.len());
    let tokens = before[0]["token_log_probabilities"].as_array().unwrap();
    assert_eq!(tokens.len() as u64, before[0]["tokens"].as_u64().unwrap());
    let sum: f64 = tokens
        .iter()
        .map(|one| one["log_probability"].as_f64().unwrap())
        .sum();
    assert!((sum - before[0]["log_probability"].as_f64().unwrap()).abs() < 1e-3);
}

#[test]
fn keys_and_rows_that_do_not_fit_an_objective_are_named() {
    let folder = workspace(GRPO);
    for (set, says) in [
        ("objective=\"sft\"", "key `beta` is given"),
        ("rewards=[]", "at least one reward"),
        (
            "num_generations=3",
            "num_generations` is 3, expected a divisor",
        ),
        ("save_steps=3", "save_steps` is 3, expected a multiple"),
        ("loss_type=\"ipo\"", "loss_type"),
        ("label_smoothing=0.1", "label_smoothing` is given"),
        (
            "tuner=\"full\"",
            "the reference is the model without its adapter",
        ),
        (
            "max_completion_length=250",
            "together they are longer than max_length 256",
        ),
        (
            "rewards=[{ kind = \"finding_f1\", url = \"http://x\" }]",
            "`url` has no meaning",
        ),
    ] {
        let message = badly(folder.path(), &["--set", set]);
        assert_says(&message, &[says]);
        let _ = fs::remove_dir_all(folder.path().join("run"));
    }
    let data = json!({"messages": [{"role": "user", "content": "看"}, {"role": "assistant", "content": "好。"}]});
    fs::write(folder.path().join("data.jsonl"), format!("{data}\n")).unwrap();
    fs::write(
        folder.path().join("run.toml"),
        format!(
            "model = \"{}\"\ntrain_data = \"data.jsonl\"\noutput_dir = \"run\"\nobjective = \"dpo\"\n",
            repository().join("model/tiny").display()
        ),
    )
    .unwrap();
    let message = badly(folder.path(), &[]);
    assert_says(
        &message,
        &["row 1", "rejected_response", "`prefer` makes them"],
    );
}
