//! `train` and `infer` in several processes: the bits of one process, and how all end when one does.
//!
//! `tests/cluster/run.py` does the same under kills, delay and loss.

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{records, train::workspace};

fn port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Starts `train` in a workspace; what it prints goes to a file.
fn start(folder: &Path, log: &str, args: &[&str], variables: &[(&str, String)]) -> Child {
    let log = fs::File::create(folder.join(log)).unwrap();
    Command::new(env!("CARGO_BIN_EXE_xray-qwen3vl"))
        .args(args)
        .current_dir(folder)
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .env("XRAY_CLUSTER_KEY", "a secret")
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

fn end(folder: &Path, children: Vec<Child>) -> Vec<(i32, String)> {
    let deadline = Instant::now() + Duration::from_secs(240);
    children
        .into_iter()
        .enumerate()
        .map(|(rank, mut child)| {
            let code = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break status.code().unwrap_or(-1);
                }
                if Instant::now() > deadline {
                    child.kill().unwrap();
                }
                thread::sleep(Duration::from_millis(20));
            };
            let log = fs::read_to_string(folder.join(format!("node-{rank}.log"))).unwrap();
            (code, log)
        })
        .collect()
}

const RUN: &[&str] = &[
    "train",
    "--config",
    "run.toml",
    "--random-init",
    "--no-tui",
    "--show",
    "0",
    "--device",
    "cpu",
    "--set",
    "max_steps=4",
    "--set",
    "save_steps=2",
    "--set",
    "lora_dropout=0.1",
    "--set",
    "ddp_timeout=20",
];

/// What has to be the same, bit by bit.
fn outcome(run: &Path) -> (Vec<Value>, Vec<u8>, Vec<u8>) {
    let keys = ["step", "loss", "token_acc", "grad_norm", "eval_loss"];
    let rows = records(&run.join("metrics.jsonl"));
    let rows = rows
        .iter()
        .map(|row| keys.iter().map(|key| row[*key].clone()).collect())
        .collect();
    let read = |name: &str| fs::read(run.join("checkpoint-4").join(name)).unwrap();
    (
        rows,
        read("adapter_model.safetensors"),
        read("optimizer.safetensors"),
    )
}

#[test]
fn several_processes_have_the_bits_of_one_with_the_accumulation_multiplied() {
    let folder = workspace();
    let folder = folder.path();
    let run = |output: &str, accumulation: usize, more: &[&str]| -> Vec<String> {
        let keys = [
            format!("output_dir={output}"),
            format!("gradient_accumulation_steps={accumulation}"),
        ];
        let mut words: Vec<String> = RUN.iter().map(|word| word.to_string()).collect();
        for key in keys {
            words.extend(["--set".to_string(), key]);
        }
        words.extend(more.iter().map(|word| word.to_string()));
        words
    };
    let words = |all: &[String]| -> Vec<String> { all.to_vec() };
    let spawn = |rank: usize, all: Vec<String>, variables: &[(&str, String)]| {
        let all = words(&all);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        start(folder, &format!("node-{rank}.log"), &all, variables)
    };
    let ended = end(folder, vec![spawn(0, run("one", 4, &[]), &[])]);
    assert_eq!(ended[0].0, 0, "{}", ended[0].1);

    // By flags.
    let port_one = port();
    let master = format!("127.0.0.1:{port_one}");
    let nodes = (0..2)
        .map(|rank| {
            let rank_text = rank.to_string();
            let own = [
                "--nnodes",
                "2",
                "--node-rank",
                &rank_text,
                "--master",
                &master,
            ];
            spawn(rank, run("two", 2, &own), &[])
        })
        .collect();
    let ended = end(folder, nodes);
    for (code, log) in &ended {
        assert_eq!(*code, 0, "{log}");
    }
    assert!(ended[1].1.contains("node 1 of 2"), "{}", ended[1].1);
    assert!(
        ended[1].1.contains("has written the results"),
        "{}",
        ended[1].1
    );
    assert!(outcome(&folder.join("two")) == outcome(&folder.join("one")));

    // As torchrun starts them; the second one is killed and the run goes on.
    let launch = |resume: &[&str]| -> Vec<Child> {
        let port = port();
        (0..2)
            .map(|rank| {
                let variables = [
                    ("RANK", rank.to_string()),
                    ("LOCAL_RANK", rank.to_string()),
                    ("WORLD_SIZE", "2".to_string()),
                    ("LOCAL_WORLD_SIZE", "2".to_string()),
                    ("MASTER_ADDR", "127.0.0.1".to_string()),
                    ("MASTER_PORT", port.to_string()),
                ];
                spawn(rank, run("again", 2, resume), &variables)
            })
            .collect()
    };
    let mut children = launch(&[]);
    let deadline = Instant::now() + Duration::from_secs(120);
    while !folder.join("again/checkpoint-2/COMPLETE.json").exists() {
        assert!(Instant::now() < deadline, "no checkpoint");
        thread::sleep(Duration::from_millis(5));
    }
    children[1].kill().unwrap();
    let ended = end(folder, children);
    if ended[0].0 != 0 {
        let log = &ended[0].1;
        assert!(
            log.contains("process 1 (`") && log.contains("left"),
            "{log}"
        );
        assert!(
            log.contains("the last checkpoint is `again/checkpoint-2`"),
            "{log}"
        );
        assert!(log.contains("--resume auto"), "{log}");
    }
    let ended = end(folder, launch(&["--resume", "auto"]));
    for (code, log) in &ended {
        assert_eq!(*code, 0, "{log}");
    }
    assert!(outcome(&folder.join("again")) == outcome(&folder.join("one")));

    // Another setting is named by both.
    let master = format!("127.0.0.1:{}", port());
    let nodes = (0..2)
        .map(|rank| {
            let rank_text = rank.to_string();
            let rate = format!("learning_rate={}", 1e-4 * (rank + 1) as f64);
            let own = [
                "--nnodes",
                "2",
                "--node-rank",
                &rank_text,
                "--master",
                &master,
                "--set",
                &rate,
            ];
            spawn(rank, run("differ", 2, &own), &[])
        })
        .collect();
    for (code, log) in end(folder, nodes) {
        assert_eq!(code, 1, "{log}");
        assert!(
            log.contains("node 1 (`") && log.contains("`learning_rate`"),
            "{log}"
        );
    }
    assert!(!folder.join("differ").exists());
}

#[test]
fn flags_and_variables_that_contradict_each_other_are_wrong_usage() {
    let folder = workspace();
    let folder = folder.path();
    for (args, variables, says) in [
        (
            vec!["--nnodes", "2"],
            vec![],
            "--nnodes is 2 without --node-rank",
        ),
        (
            vec!["--nnodes", "2", "--node-rank", "1", "--master", "n0:1"],
            vec![("NNODES", "3".to_string())],
            "NNODES is 3",
        ),
        (
            vec![],
            vec![("NNODES", "2".to_string())],
            "NODE_RANK is not set",
        ),
    ] {
        let all = [RUN, &args[..]].concat();
        let ended = end(folder, vec![start(folder, "node-0.log", &all, &variables)]);
        let (code, log) = &ended[0];
        assert_eq!(*code, 2, "{log}");
        assert!(log.contains(says), "{log}");
    }
}
