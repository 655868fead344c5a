//! A run that is killed without warning: in the middle of saving, and while another one wants in.
#![cfg(unix)]

use std::{
    fs,
    path::Path,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use crate::{
    LONGEST_RUN, program,
    train::{
        assert_same_end, assert_says, saved_steps, train_args, train_badly, train_well, workspace,
    },
    train_resume::{disturb, rows_so_far},
};

/// Names in a folder, of whatever kind; none if it is not there.
fn names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder)
        .map(|entries| {
            entries
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .collect()
        })
        .unwrap_or_default()
}

/// The half-written checkpoints of a run: their names and what is in them.
fn half_written(run: &Path) -> Vec<(String, Vec<String>)> {
    names(run)
        .into_iter()
        .filter(|name| name.starts_with("checkpoint-") && name.contains(".tmp-"))
        .map(|name| {
            let inside = names(&run.join(&name));
            (name, inside)
        })
        .collect()
}

/// Says of the names in a half-written checkpoint whether it is written so far.
type Moment = fn(&[String]) -> bool;

/// Continues a run and kills it as soon as a checkpoint is written so far that `caught` holds. Says
/// whether the kill came before the checkpoint was whole.
fn kill_while_saving(folder: &Path, caught: Moment) -> bool {
    let run = folder.join("run");
    let mut child = program(folder, &train_args(&["--resume", "auto"]))
        .spawn()
        .unwrap();
    let started = Instant::now();
    // No pause between two looks: a checkpoint takes milliseconds.
    while !half_written(&run).iter().any(|(_, inside)| caught(inside)) {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(started.elapsed() < LONGEST_RUN, "nothing was saved");
        thread::yield_now();
    }
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    !output.status.success() && !half_written(&run).is_empty()
}

#[test]
fn a_kill_inside_the_writing_of_a_checkpoint_costs_only_that_checkpoint() {
    let moments: [(&str, Moment); 4] = [
        ("at its beginning", |_| true),
        ("behind the weights", |inside| {
            inside
                .iter()
                .any(|name| name == "adapter_model.safetensors")
        }),
        ("in the optimizer", |inside| {
            inside
                .iter()
                .any(|name| name.contains("optimizer.safetensors"))
        }),
        ("behind the state", |inside| {
            inside.iter().any(|name| name == "trainer_state.json")
        }),
    ];
    let folder = workspace();
    let run = folder.path().join("run");
    let mut inside = Vec::new();
    for (moment, caught) in moments {
        if kill_while_saving(folder.path(), caught) {
            inside.push(moment);
        }
        // What was whole before is whole still.
        for name in names(&run) {
            let whole = name.starts_with("checkpoint-") && !name.contains(".tmp-");
            assert!(
                !whole || run.join(&name).join("COMPLETE.json").is_file(),
                "{name}"
            );
        }
    }
    // A busy machine may miss the last moments, which are short; the first ones are long.
    assert!(inside.len() >= 2, "only {inside:?} came in time");
    train_well(folder.path(), &["--resume", "auto"]);
    saved_steps(&run);
    assert_same_end(folder.path(), "killed while saving");
}

fn signal(child: &Child, name: &str) {
    let command = format!("kill -{name} {}", child.id());
    let sent = Command::new("sh").args(["-c", &command]).status().unwrap();
    assert!(sent.success(), "{command}");
}

#[test]
fn a_second_process_is_kept_out_until_the_first_is_gone() {
    let folder = workspace();
    let run = folder.path().join("run");
    let output = disturb(
        folder.path(),
        &[],
        || rows_so_far(&run) >= 6,
        |child| {
            // It stands still, alive, while the other one tries.
            signal(child, "STOP");
            thread::sleep(Duration::from_millis(20));
            let before = names(&run);
            for args in [&["--resume", "auto"][..], &[]] {
                let message = train_badly(folder.path(), args);
                assert_says(&message, &["`run` is in use by another process"]);
            }
            assert_eq!(names(&run), before);
            signal(child, "KILL");
        },
    );
    assert!(!output.status.success());
    assert!(run.join(".lock").is_file(), "the lock's file stays");
    train_well(folder.path(), &["--resume", "auto"]);
    assert_same_end(folder.path(), "locked");
}
