//! What comes around the program: completions, manual pages, version, the schema of configs, `report_command`.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use tempfile::tempdir;

use crate::{
    json_lines, records, repository, run, text,
    train::{finished, train, train_well, workspace},
};

const COMMANDS: [&str; 27] = [
    "calibrate",
    "prefer",
    "score",
    "preview",
    "pull",
    "label",
    "infer",
    "train",
    "merge",
    "quantize",
    "plan",
    "eval",
    "convert",
    "clean",
    "check",
    "phantoms",
    "init-tiny",
    "serve",
    "store",
    "export",
    "doctor",
    "drafts",
    "bench",
    "config",
    "completions",
    "man",
    "version",
];

/// Runs the program, which must end well; gives stdout.
fn well(folder: &Path, args: &[&str]) -> String {
    let (code, stdout, stderr) = run(folder, args);
    assert_eq!(code, 0, "{args:?}\nstdout: {stdout}\nstderr: {stderr}");
    stdout
}

/// Gives a script to a shell that only parses it.
fn parse(shell: &[&str], script: &str) {
    let mut child = Command::new(shell[0])
        .args(&shell[1..])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", shell[0]));
    child
        .stdin
        .take()
        .unwrap()
        .write_all(script.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && errors.is_empty(),
        "{shell:?}: {errors}"
    );
}

fn completions(shell: &str) -> String {
    well(repository(), &["completions", shell])
}

#[test]
fn completions_of_every_shell_know_commands_and_options() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = completions(shell);
        for command in COMMANDS {
            assert!(script.contains(command), "{shell}: no `{command}`");
        }
        assert!(
            script.contains("memory-budget"),
            "{shell}: no option of `train`"
        );
    }
    parse(&["bash", "-n"], &completions("bash"));
}

#[test]
#[ignore = "needs zsh and fish"]
fn completions_are_scripts_of_zsh_and_fish() {
    parse(&["zsh", "-n"], &completions("zsh"));
    parse(&["fish", "--no-execute"], &completions("fish"));
}

/// What bash would offer after the words typed.
#[test]
fn bash_completes_an_option() {
    let folder = tempdir().unwrap();
    let script = folder.path().join("completions.bash");
    fs::write(&script, completions("bash")).unwrap();
    let question = "COMP_WORDS=(xray-qwen3vl train --memory-b); COMP_CWORD=2; \
                    _xray__qwen3vl xray-qwen3vl --memory-b train; echo \"${COMPREPLY[@]}\"";
    let output = Command::new("bash")
        .args(["-c", &format!("source '{}'\n{question}", script.display())])
        .output()
        .unwrap();
    let answer = String::from_utf8_lossy(&output.stdout);
    assert_eq!(
        answer.trim(),
        "--memory-budget",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn there_is_a_page_for_every_command() {
    let folder = tempdir().unwrap();
    let pages = folder.path().join("man/man1");
    well(folder.path(), &["man", "--output", text(&pages)]);
    let page = |name: &str| fs::read_to_string(pages.join(name)).unwrap();
    assert!(page("xray-qwen3vl.1").contains(".TH xray-qwen3vl 1"));
    for command in COMMANDS {
        let page = page(&format!("xray-qwen3vl-{command}.1"));
        assert!(page.contains("Examples:"), "{command}");
    }
    assert!(page("xray-qwen3vl-train.1").contains("\\-\\-memory\\-budget"));
}

#[test]
fn the_version_names_commit_features_and_devices() {
    let short = well(repository(), &["-V"]);
    assert_eq!(
        short,
        format!("xray-qwen3vl {}\n", env!("CARGO_PKG_VERSION"))
    );
    let long = well(repository(), &["--version"]);
    let version: Value = serde_json::from_str(&well(repository(), &["version", "--json"])).unwrap();
    let commit = version["commit"].as_str().unwrap();
    let hash = commit.strip_suffix("-dirty").unwrap_or(commit);
    let is_hash = hash.len() >= 7 && hash.chars().all(|c| c.is_ascii_hexdigit());
    assert!(is_hash || hash == "unknown", "{commit}");
    assert!(
        long.starts_with(&format!(
            "xray-qwen3vl {} ({commit})\n",
            env!("CARGO_PKG_VERSION")
        )),
        "{long}"
    );
    let mut features = Vec::new();
    for (name, is_on) in [
        ("cuda", cfg!(feature = "cuda")),
        ("flex", cfg!(feature = "flex")),
        ("metal", cfg!(feature = "metal")),
        ("tls", cfg!(feature = "tls")),
        ("webgpu", cfg!(feature = "webgpu")),
        ("wgpu", cfg!(feature = "wgpu")),
    ] {
        if is_on {
            features.push(name);
        }
    }
    assert_eq!(version["features"], json!(features));
    assert!(
        long.contains(&format!("features: {}\n", features.join(" "))),
        "{long}"
    );
    let built: Vec<&str> = version["backends"]
        .as_array()
        .unwrap()
        .iter()
        .map(|backend| backend.as_str().unwrap())
        .collect();
    assert!(built.contains(&"cpu"), "{version}");
    assert!(
        long.contains(&format!("devices: {}\n", built.join(" "))),
        "{long}"
    );
    let devices = version["devices"].as_array().unwrap();
    assert!(
        devices.iter().any(|device| device["name"] == "cpu"),
        "{version}"
    );
    assert!(well(repository(), &["version"]).contains("device cpu: "));
}

#[test]
fn config_shows_what_a_run_would_use() {
    let folder = workspace();
    let args = [
        "config",
        "show",
        "--config",
        "run.toml",
        "--set",
        "lora_rank=5",
    ];
    let shown = well(folder.path(), &args);
    assert!(
        shown.contains("lora_rank = 5\n") && shown.contains("max_steps = 20\n"),
        "{shown}"
    );
    assert!(shown.contains("# val_data is not set\n"), "{shown}");
    let shown: Value =
        serde_json::from_str(&well(folder.path(), &[&args[..], &["--json"]].concat())).unwrap();
    assert_eq!(
        (&shown["lora_rank"], &shown["val_data"]),
        (&json!(5), &Value::Null)
    );
    let (code, _, stderr) = run(
        folder.path(),
        &[&args[..4], &["--set", "lora_rnk=5"]].concat(),
    );
    assert_eq!(code, 2);
    assert!(stderr.contains("did you mean `lora_rank`?"), "{stderr}");
    let (code, _, stderr) = run(
        folder.path(),
        &[&args[..4], &["--set", "lora_rank=0"]].concat(),
    );
    assert!(
        code == 2 && stderr.contains("key `lora_rank` is 0"),
        "{stderr}"
    );
    // What is shown is a config, and so is an example.
    for (name, shown) in [
        ("shown", well(folder.path(), &args)),
        ("tiny", well(folder.path(), &["config", "example", "tiny"])),
    ] {
        let file = folder.path().join(format!("{name}.toml"));
        fs::write(&file, &shown).unwrap();
        well(folder.path(), &["config", "show", "--config", text(&file)]);
    }
    let (code, _, stderr) = run(folder.path(), &["config", "example", "tinny"]);
    assert!(
        code == 2 && stderr.contains("did you mean `tiny`?"),
        "{stderr}"
    );
    let file = fs::read_to_string(repository().join("configs/schema.json")).unwrap();
    assert!(
        well(folder.path(), &["config", "schema"]) == file,
        "configs/schema.json is not up to date"
    );
}

/// `| head` is no failure, and no internal error.
#[cfg(unix)]
#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    for args in [
        &["plan"][..],
        &["doctor", "--device", "cpu"],
        &["version"],
        &["config", "show"],
        &["completions", "zsh"],
        &["train", "--help"],
    ] {
        let mut child = crate::program(repository(), args).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {errors}");
        assert!(!errors.contains("error"), "{args:?}: {errors}");
    }
}

/// Runs a script of `tests/tools` with the Python that has what it needs.
fn python(script: &str, args: &[&str]) {
    let python = std::env::var("XRAY_TOOLS_PYTHON").expect("XRAY_TOOLS_PYTHON is set");
    let output = Command::new(python)
        .arg(repository().join("tests/tools").join(script))
        .args(args)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
#[ignore = "needs XRAY_TOOLS_PYTHON, a Python 3.11 or newer with jsonschema 4"]
fn the_schema_takes_all_configs_and_no_wrong_ones() {
    python("schema.py", &[]);
}

#[test]
#[ignore = "needs XRAY_TOOLS_PYTHON, a Python with wandb 0.31 and swanlab 0.10"]
fn the_hooks_write_runs_of_wandb_and_swanlab() {
    python("hooks.py", &[env!("CARGO_BIN_EXE_xray-qwen3vl")]);
}

/// `run.toml` of a [`workspace`] with a command that reads the lines.
fn report_to(folder: &Path, script: &str) {
    let path = folder.join("run.toml");
    let settings = fs::read_to_string(&path).unwrap();
    let command = json!(["sh", "-c", script]);
    fs::write(
        path,
        format!("{settings}report_to = [\"command\"]\nreport_command = {command}\n"),
    )
    .unwrap();
}

#[cfg(unix)]
#[test]
fn report_command_reads_what_metrics_jsonl_has() {
    let folder = workspace();
    report_to(folder.path(), "cat > lines.jsonl; echo read all");
    train_well(
        folder.path(),
        &[
            "--set",
            "val_data=phantom:12:0..8:house",
            "--set",
            "eval_steps=10",
        ],
    );
    let lines = json_lines(&fs::read_to_string(folder.path().join("lines.jsonl")).unwrap());
    let (start, rest) = lines.split_first().unwrap();
    let (end, rows) = rest.split_last().unwrap();
    assert_eq!(
        (&start["event"], &start["name"]),
        (&json!("start"), &json!("run"))
    );
    assert_eq!(
        (&start["step"], &start["total_steps"]),
        (&json!(0), &json!(20))
    );
    assert_eq!(start["config"]["learning_rate"], 1e-3);
    assert_eq!(
        end,
        &json!({"event": "end", "ending": "done", "step": 20, "error": null})
    );
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| {
            let mut row = row.as_object().unwrap().clone();
            assert_eq!(row.remove("event"), Some(json!("metrics")));
            Value::Object(row)
        })
        .collect();
    assert_eq!(rows, records(&folder.path().join("run/metrics.jsonl")));
    assert!(rows.iter().any(|row| row["eval_loss"].is_number()));
    let log = fs::read_to_string(folder.path().join("run/report_command.log")).unwrap();
    assert_eq!(log, "read all\n");
    // Not in the list, TensorBoard gets nothing.
    assert!(!folder.path().join("run/tensorboard").exists());
    let result: Value =
        serde_json::from_slice(&fs::read(folder.path().join("run/result.json")).unwrap()).unwrap();
    assert_eq!(result["report_command"]["failure"], Value::Null);
    assert_eq!(result["report_command"]["lines"], json!(rows.len() + 2));
}

#[cfg(unix)]
#[test]
fn a_report_command_that_fails_is_told_and_the_run_ends_as_without() {
    let folder = workspace();
    report_to(folder.path(), "read start; echo no such module >&2; exit 9");
    let (code, _, stderr) = train(folder.path(), &[]);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stderr.contains("exit code 9") && stderr.contains("no such module"),
        "{stderr}"
    );
    let result: Value =
        serde_json::from_slice(&fs::read(folder.path().join("run/result.json")).unwrap()).unwrap();
    let failure = result["report_command"]["failure"].as_str().unwrap();
    assert!(failure.contains("no such module"), "{failure}");
    crate::train::assert_same_end(folder.path(), "with a report_command that fails");
}

#[cfg(unix)]
#[test]
fn a_continued_run_reports_from_its_step_on() {
    let folder = finished();
    let script = "cat > lines.jsonl";
    let command = json!(["sh", "-c", script]).to_string();
    train_well(
        folder.path(),
        &[
            "--resume",
            "auto",
            "--set",
            "max_steps=23",
            "--set",
            "report_to=command",
            "--set",
            &format!("report_command={command}"),
        ],
    );
    let lines = json_lines(&fs::read_to_string(folder.path().join("lines.jsonl")).unwrap());
    assert_eq!(
        (&lines[0]["step"], &lines[0]["resumed"]),
        (&json!(20), &json!(true))
    );
    assert_eq!(lines[1]["step"], 21);
}

#[test]
fn a_report_command_that_cannot_be_is_refused_before_the_run() {
    let folder = workspace();
    for (set, says) in [
        ("report_to=command", "key `report_command` is []"),
        ("report_command=wandb", "\"command\" in it"),
        ("report_to=wandb", "configs/hooks/wandb_log.py"),
    ] {
        let (code, _, stderr) = train(folder.path(), &["--set", set]);
        assert!(code == 2 && stderr.contains(says), "{set}: {stderr}");
    }
    let sets = [
        "--set",
        "report_to=command",
        "--set",
        "report_command=no-such-program",
    ];
    let (code, _, stderr) = train(folder.path(), &sets);
    assert!(
        code == 1 && stderr.contains("cannot start `report_command`"),
        "{stderr}"
    );
    assert!(!folder.path().join("run/checkpoint-5").exists());
}
