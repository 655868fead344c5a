//! `train --resume`: a run that was killed, interrupted or short of space goes on as if nothing had been.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Output},
    thread,
    time::{Duration, Instant},
};

use crate::{
    LONGEST_RUN, program,
    refusal::refusal_problems,
    run as run_program,
    train::{
        Files, assert_same_end, assert_says, finished, saved_steps, train, train_args, train_badly,
        train_well, trained_steps, workspace,
    },
};

/// Rows of a run's `metrics.jsonl` so far.
pub(crate) fn rows_so_far(run: &Path) -> usize {
    let bytes = fs::read(run.join("metrics.jsonl")).unwrap_or_default();
    bytes.iter().filter(|byte| **byte == b'\n').count()
}

/// Starts a run, waits until `ready`, does `act`, and waits for the run's end.
pub(crate) fn disturb(
    folder: &Path,
    args: &[&str],
    ready: impl Fn() -> bool,
    act: impl FnOnce(&mut Child),
) -> Output {
    let mut child = program(folder, &train_args(args)).spawn().unwrap();
    let started = Instant::now();
    // The run goes on meanwhile: look often.
    while !ready() {
        if child.try_wait().unwrap().is_some() || started.elapsed() > LONGEST_RUN {
            let _ = child.kill();
            let output = child.wait_with_output().unwrap();
            panic!("the run was not caught in the middle: {output:?}");
        }
        thread::sleep(Duration::from_millis(1));
    }
    act(&mut child);
    child.wait_with_output().unwrap()
}

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let folder = workspace();
    let run = folder.path().join("run");
    let sets = ["--set", "save_steps=10"];
    let output = disturb(
        folder.path(),
        &sets,
        || run.join("checkpoint-10").exists() && rows_so_far(&run) >= 12,
        // SIGKILL, where there are signals.
        |child| child.kill().unwrap(),
    );
    assert!(!output.status.success(), "the run ended before the kill");
    assert!(rows_so_far(&run) < 20, "the run ended before the kill");
    assert_eq!(saved_steps(&run), [10]);
    let args = [&sets[..], &["--resume", "auto"]].concat();
    let (_, stderr) = train_well(folder.path(), &args);
    assert_says(&stderr, &["going on after step 10", "run/checkpoint-10`"]);
    assert_same_end(folder.path(), "killed");
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_saves_and_says_how_to_go_on() {
    for signal in ["INT", "TERM", "HUP"] {
        if signal == "HUP" && hangup_is_ignored() {
            eprintln!("skipped: this test itself is run to outlive its terminal");
            continue;
        }
        let folder = workspace();
        let run = folder.path().join("run");
        let output = disturb(
            folder.path(),
            &[],
            || rows_so_far(&run) >= 6,
            |child| {
                let command = format!("kill -{signal} {}", child.id());
                let sent = Command::new("sh").args(["-c", &command]).status().unwrap();
                assert!(sent.success(), "{command}");
            },
        );
        let stdout = String::from_utf8(output.stdout).unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{signal}: {stderr}");
        assert_says(&stdout, &["interrupted and saved", "--resume auto"]);
        let steps = rows_so_far(&run);
        assert!(steps < 20, "{signal}: the run ended before the signal");
        assert_eq!(saved_steps(&run).last(), Some(&(steps as u64)), "{signal}");
        // As printed, without the config and the flags the run was started with.
        let hint = (stdout.lines())
            .find_map(|line| line.strip_prefix("continue with: "))
            .unwrap();
        let words: Vec<&str> = hint.split(' ').collect();
        assert!(words[0].ends_with("xray-qwen3vl"), "{hint}");
        let (code, _, stderr) = run_program(folder.path(), &words[1..]);
        assert_eq!(code, 0, "{hint}: {stderr}");
        assert_same_end(folder.path(), signal);
    }
}

/// Whether a hangup does nothing to this process and what it starts, as under `nohup`.
#[cfg(unix)]
fn hangup_is_ignored() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_none_or(|mask| mask & 1 == 1)
}

#[test]
fn a_finished_run_goes_further_and_no_less_far() {
    let folder = finished();
    let run = folder.path().join("run");
    let args = ["--resume", "auto", "--set", "max_steps=10"];
    let message = train_badly(folder.path(), &args);
    assert_says(&message, &["`max_steps` was 20, is 10"]);
    let args = ["--resume", "auto", "--set", "max_steps=24"];
    let (_, stderr) = train_well(folder.path(), &args);
    assert_says(
        &stderr,
        &["the finished run of 20 steps goes on to step 24"],
    );
    assert_eq!(trained_steps(&run), (1..=24).collect::<Vec<u64>>());
    let settings = fs::read_to_string(run.join("config.toml")).unwrap();
    assert!(settings.contains("max_steps = 24"), "{settings}");
    // Not finished, it is another run: its rates were those of 24 steps.
    let args = ["--resume", "run/checkpoint-15", "--set", "max_steps=30"];
    let message = train_badly(folder.path(), &args);
    assert_says(&message, &["`max_steps` was 20, is 30"]);
}

#[test]
fn damaged_records_of_a_run_are_named_and_mended() {
    let folder = finished();
    let run = folder.path().join("run");
    let path = run.join("metrics.jsonl");
    let rows = fs::read_to_string(&path).unwrap();
    let mut lines: Vec<&str> = rows.lines().collect();
    // A part written over with zeros, its line feeds too.
    lines.splice(5..8, ["\0\0\0\0"]);
    fs::write(&path, lines.join("\n") + "\n").unwrap();
    fs::write(run.join("images.json"), "{\"a\": ").unwrap();
    let (_, stderr) = train_well(folder.path(), &["--resume", "run/checkpoint-15"]);
    assert_says(
        &stderr,
        &[
            "`run/metrics.jsonl`: line 6 is damaged; 3 rows were restored from `run/checkpoint-15/metrics.jsonl`",
            "`run/images.json` is damaged",
        ],
    );
    assert_same_end(folder.path(), "damaged records");
    let (_, stderr) = train_well(folder.path(), &["--resume", "auto"]);
    assert!(!stderr.contains("damaged"), "{stderr}");
}

#[test]
fn a_damaged_checkpoint_is_named_and_passed_over() {
    type Harm = fn(&Path);
    let cases: [(&str, Harm, &str); 3] = [
        (
            "cut off",
            |dir| {
                let path = dir.join("optimizer.safetensors");
                let bytes = fs::read(&path).unwrap();
                fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
            },
            "`optimizer.safetensors` has",
        ),
        (
            "one byte",
            |dir| {
                let path = dir.join("adapter_model.safetensors");
                let mut bytes = fs::read(&path).unwrap();
                let at = bytes.len() - 100;
                bytes[at] ^= 1;
                fs::write(&path, bytes).unwrap();
            },
            "`adapter_model.safetensors` has sha256",
        ),
        (
            "no marker",
            |dir| fs::remove_file(dir.join("COMPLETE.json")).unwrap(),
            "`COMPLETE.json` is missing",
        ),
    ];
    for (case, harm, says) in cases {
        let folder = finished();
        let run = folder.path().join("run");
        harm(&run.join("checkpoint-20"));
        // What a kill in the middle of saving leaves.
        let half = run.join("checkpoint-25.tmp-4242.0");
        fs::create_dir(&half).unwrap();
        fs::write(half.join("adapter_model.safetensors"), [0; 100]).unwrap();

        // Asked for by name, it is refused.
        let message = train_badly(folder.path(), &["--resume", "run/checkpoint-20"]);
        assert_says(&message, &["run/checkpoint-20`", "damaged", says]);
        let (_, stderr) = train_well(folder.path(), &["--resume", "auto"]);
        let warning = stderr
            .lines()
            .find(|line| line.contains("damaged"))
            .unwrap_or_else(|| panic!("{case}: no warning in: {stderr}"));
        assert_says(warning, &["run/checkpoint-20`", "passed over", says]);
        assert_says(&stderr, &["going on after step 15"]);
        assert_eq!(saved_steps(&run), [5, 10, 15, 20], "{case}");
        assert_same_end(folder.path(), case);
    }
}

#[test]
fn another_run_is_not_continued() {
    let folder = finished();
    let before = Files::read(folder.path());
    let cases: [(&[&str], &[&str]); 5] = [
        (&[], &["`run` holds a run already", "--resume auto"]),
        (
            &["--resume", "auto", "--set", "learning_rate=2e-3"],
            &["`learning_rate` was 0.001, is 0.002"],
        ),
        (
            &["--resume", "auto", "--seed", "6"],
            &["`seed` was 5, is 6"],
        ),
        (
            &["--resume", "auto", "--train-data", "phantom:11:0..50:house"],
            &[
                "`train_data` was \"phantom:11:0..52:house\"",
                "is \"phantom:11:0..50:house\"",
            ],
        ),
        (
            &["--resume", "nowhere"],
            &["`nowhere` holds no whole checkpoint"],
        ),
    ];
    for (args, says) in cases {
        let (code, stdout, stderr) = train(folder.path(), args);
        let problems = refusal_problems(code, 1, &stdout, &stderr);
        assert!(problems.is_empty(), "{args:?}: {problems:?}\n{stderr}");
        assert_says(&stderr, says);
        let same = Files::read(folder.path()) == before;
        assert!(same, "{args:?} changed something");
    }

    let args = ["--resume", "run/checkpoint-10", "--set", "save_steps=7"];
    train_well(folder.path(), &args);
    // What the first branch saved behind step 10 steps aside.
    let run = folder.path().join("run");
    assert_eq!(saved_steps(&run), [5, 10, 14, 20]);
    for step in [15, 20] {
        let aside = run.join(format!("abandoned-checkpoint-{step}/COMPLETE.json"));
        assert!(aside.is_file(), "{}", aside.display());
    }
    assert_same_end(folder.path(), "another `save_steps`");
}

/// A file system of two MiB, where the system lets us make one.
#[cfg(target_os = "linux")]
struct SmallDisk(std::path::PathBuf);

#[cfg(target_os = "linux")]
impl SmallDisk {
    fn mount(at: &Path) -> Option<Self> {
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]);
        let output = command.arg(at).output().ok()?;
        output.status.success().then(|| Self(at.to_path_buf()))
    }

    fn grow(&self) {
        let mut command = Command::new("mount");
        command.args(["-o", "remount,size=64m"]).arg(&self.0);
        assert!(command.status().unwrap().success());
    }
}

#[cfg(target_os = "linux")]
impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_costs_only_the_checkpoint_that_did_not_fit() {
    let folder = workspace();
    let run = folder.path().join("run");
    fs::create_dir(&run).unwrap();
    let Some(disk) = SmallDisk::mount(&run) else {
        eprintln!("skipped: a small file system cannot be mounted here");
        return;
    };
    let message = train_badly(folder.path(), &[]);
    assert_says(&message, &["no space left", "`run/"]);
    // A checkpoint is about one MB.
    assert_eq!(saved_steps(&run), [5, 10]);

    disk.grow();
    let (_, stderr) = train_well(folder.path(), &["--resume", "auto"]);
    assert_says(&stderr, &["going on after step 10"]);
    assert_same_end(folder.path(), "more space");
}
