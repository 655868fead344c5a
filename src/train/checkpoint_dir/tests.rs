//! Saving, finding, damaging and pruning checkpoints, without a model.

use super::*;
use crate::base::files::COMPLETE_MARKER;

fn fill(folder: &Path) -> io::Result<()> {
    fs::write(folder.join("adapter.safetensors"), [7_u8; 1000])?;
    fs::create_dir(folder.join("optimizer"))?;
    fs::write(folder.join("optimizer/state.bin"), [9_u8; 3000])
}

fn run_with(steps: &[u64]) -> (tempfile::TempDir, CheckpointDir) {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = CheckpointDir::open(dir.path()).unwrap();
    for &step in steps {
        checkpoints.save(step, fill).unwrap();
    }
    (dir, checkpoints)
}

fn steps(checkpoints: &CheckpointDir) -> Vec<u64> {
    checkpoints
        .list()
        .unwrap()
        .iter()
        .map(|checkpoint| checkpoint.step)
        .collect()
}

fn best(step: u64) -> Best {
    Best {
        step,
        metric: "eval_loss".into(),
        value: 0.5,
    }
}

/// Damages checkpoint 30 by `harm`, expects 20 to be found and `reason` to be named.
fn assert_passed_over(reason: &str, harm: impl FnOnce(&Path)) {
    let (_dir, checkpoints) = run_with(&[9, 20, 30]);
    harm(&checkpoints.path(30));
    let search = checkpoints.newest_whole().unwrap();
    assert_eq!(search.found.unwrap().step, 20);
    let [warning] = &search.passed_over[..] else {
        panic!("one warning expected")
    };
    let warning = warning.to_string();
    assert!(
        warning.contains("checkpoint-30") && warning.contains(reason),
        "{warning}"
    );
}

#[test]
fn every_kind_of_damage_is_named_and_passed_over() {
    let state = "optimizer/state.bin";
    assert_passed_over("`COMPLETE.json` is missing", |folder| {
        fs::remove_file(folder.join(COMPLETE_MARKER)).unwrap();
    });
    assert_passed_over("`COMPLETE.json` is damaged", |folder| {
        let path = folder.join(COMPLETE_MARKER);
        let text = fs::read(&path).unwrap();
        fs::write(path, &text[..text.len() / 2]).unwrap();
    });
    assert_passed_over("`adapter.safetensors` is missing", |folder| {
        fs::remove_file(folder.join("adapter.safetensors")).unwrap();
    });
    assert_passed_over("has 2999 bytes, expected 3000", |folder| {
        let file = fs::File::options()
            .write(true)
            .open(folder.join(state))
            .unwrap();
        file.set_len(2999).unwrap();
    });
    assert_passed_over("`optimizer/state.bin` has sha256", |folder| {
        let mut bytes = fs::read(folder.join(state)).unwrap();
        bytes[1234] ^= 0x10;
        fs::write(folder.join(state), bytes).unwrap();
    });
}

#[test]
fn a_kill_at_any_stage_leaves_the_previous_checkpoint() {
    // What the disk holds after a kill: an empty temporary folder, some files, all files, all
    // files and the marker not yet renamed, the marker's own temporary file.
    let stages: [&dyn Fn(&Path); 5] = [
        &|_| {},
        &|folder| fs::write(folder.join("adapter.safetensors"), [7; 10]).unwrap(),
        &|folder| fill(folder).unwrap(),
        &|folder| {
            fill(folder).unwrap();
            fs::write(folder.join(COMPLETE_MARKER), "{}").unwrap();
        },
        &|folder| {
            fill(folder).unwrap();
            fs::write(folder.join(".COMPLETE.json.tmp-99.1"), "{").unwrap();
        },
    ];
    for stage in stages {
        let (dir, checkpoints) = run_with(&[10]);
        let partial = dir.path().join("checkpoint-20.tmp-99.0");
        fs::create_dir(&partial).unwrap();
        stage(&partial);
        let search = checkpoints.newest_whole().unwrap();
        assert_eq!(search.found.unwrap().step, 10);
        assert!(search.passed_over.is_empty());
        let reopened = CheckpointDir::open(dir.path()).unwrap();
        assert!(!partial.exists());
        reopened.save(20, fill).unwrap();
        assert_eq!(reopened.newest_whole().unwrap().found.unwrap().step, 20);
    }
}

#[test]
fn a_kill_while_replacing_brings_the_old_one_back() {
    let (dir, checkpoints) = run_with(&[10]);
    fs::rename(
        checkpoints.path(10),
        dir.path().join("checkpoint-10.old-99.0"),
    )
    .unwrap();
    let reopened = CheckpointDir::open(dir.path()).unwrap();
    assert_eq!(reopened.newest_whole().unwrap().found.unwrap().step, 10);
}

#[test]
fn a_failing_writer_leaves_nothing_and_keeps_an_older_save_of_the_step() {
    let (dir, checkpoints) = run_with(&[10]);
    for step in [10, 20] {
        let error = checkpoints
            .save(step, |folder| {
                fs::write(folder.join("adapter.safetensors"), "half")?;
                Err(io::Error::other("device lost"))
            })
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(&format!("checkpoint-{step}`: device lost")),
            "{text}"
        );
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    assert_eq!(checkpoints.newest_whole().unwrap().found.unwrap().step, 10);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named() {
    let (_dir, checkpoints) = run_with(&[]);
    let error = checkpoints
        .save(5, |_| fs::write("/dev/full", [0; 9]))
        .unwrap_err();
    assert!(
        matches!(error, CheckpointDirError::DiskFull { .. }),
        "{error}"
    );
    assert!(steps(&checkpoints).is_empty());
}

#[test]
fn all_damaged_finds_none_and_names_each_newest_first() {
    let (_dir, checkpoints) = run_with(&[1, 2]);
    for step in [1, 2] {
        fs::remove_file(checkpoints.path(step).join(COMPLETE_MARKER)).unwrap();
    }
    let search = checkpoints.newest_whole().unwrap();
    assert!(search.found.is_none());
    let order: Vec<_> = search
        .passed_over
        .iter()
        .map(|d| d.checkpoint.step)
        .collect();
    assert_eq!(order, [2, 1]);
}

#[test]
fn steps_are_ordered_as_numbers_and_other_names_ignored() {
    let (dir, checkpoints) = run_with(&[100, 20, 3]);
    for name in ["checkpoint-x", "checkpoint-007", "checkpoint-", "other"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("checkpoint-900"), "a file").unwrap();
    assert_eq!(steps(&checkpoints), [3, 20, 100]);
    assert_eq!(
        checkpoints
            .newest_whole_before(100)
            .unwrap()
            .found
            .unwrap()
            .step,
        20
    );
    assert!(checkpoints.newest_whole_before(3).unwrap().found.is_none());
    let nowhere = CheckpointDir::view(&dir.path().join("none"));
    assert!(nowhere.newest_whole().unwrap().found.is_none());
}

#[test]
fn pruning_keeps_the_last_the_best_and_never_the_damaged_in_their_stead() {
    let (_dir, checkpoints) = run_with(&[10, 20, 30, 40, 50]);
    checkpoints.set_best(&best(20)).unwrap();
    fs::remove_file(checkpoints.path(50).join("adapter.safetensors")).unwrap();
    let deleted = checkpoints.prune(1, 40).unwrap();
    assert_eq!(deleted.iter().map(|c| c.step).collect::<Vec<_>>(), [10, 30]);
    assert_eq!(steps(&checkpoints), [20, 40, 50]);
    assert!(checkpoints.prune(0, 40).unwrap().is_empty());
    assert_eq!(steps(&checkpoints), [20, 40, 50]);
}

#[test]
fn an_abandoned_branch_steps_aside_and_the_one_just_written_stays() {
    let (dir, checkpoints) = run_with(&[10, 20, 30]);
    checkpoints.set_best(&best(30)).unwrap();
    fs::create_dir(dir.path().join("abandoned-checkpoint-20")).unwrap();
    let moved = checkpoints.abandon_after(10).unwrap();
    let names: Vec<_> = moved
        .iter()
        .map(|(_, to)| to.file_name().unwrap().to_str().unwrap())
        .collect();
    assert_eq!(
        names,
        ["abandoned-checkpoint-20-2", "abandoned-checkpoint-30"]
    );
    assert_eq!(steps(&checkpoints), [10]);
    assert_eq!(checkpoints.best().unwrap(), None);
    verify_folder(&moved[1].1, Depth::Hashes).unwrap();
    assert!(checkpoints.abandon_after(10).unwrap().is_empty());
    // Whatever the numbers are, what was just written is kept.
    let (_dir, checkpoints) = run_with(&[5, 20, 30]);
    let deleted = checkpoints.prune(1, 5).unwrap();
    assert_eq!(deleted.len(), 1);
    assert_eq!(steps(&checkpoints), [5, 30]);
}

#[test]
fn a_locked_folder_is_refused_until_the_lock_ends() {
    let dir = tempfile::tempdir().unwrap();
    let lock = RunLock::take(dir.path()).unwrap();
    let error = RunLock::take(dir.path()).unwrap_err().to_string();
    assert!(error.contains("in use by another process"), "{error}");
    drop(lock);
    RunLock::take(dir.path()).unwrap();
}

#[test]
fn a_damaged_best_record_stops_pruning() {
    let (dir, checkpoints) = run_with(&[1, 2, 3]);
    assert_eq!(checkpoints.best().unwrap(), None);
    checkpoints.set_best(&best(1)).unwrap();
    assert_eq!(checkpoints.best().unwrap(), Some(best(1)));
    fs::write(dir.path().join(BEST_FILE), "{\"step\": 1").unwrap();
    let error = checkpoints.prune(1, 3).unwrap_err();
    assert!(error.to_string().contains("best.json"), "{error}");
    assert_eq!(steps(&checkpoints), [1, 2, 3]);
}
