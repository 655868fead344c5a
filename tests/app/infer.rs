//! `infer`: what is printed and written when all goes well, or goes on after an interruption.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::tempdir;

use crate::{
    LONGEST_RUN, demo_image, field, fixture_image, infer, infer_args, infer_well, json_lines,
    program, records, run, text,
};

/// Short answers about small images.
const QUICK: [&str; 4] = ["--max-new-tokens", "24", "--max-pixels", "16384"];

/// Four images of four shapes.
fn images() -> Vec<PathBuf> {
    ["model_a.png", "model_b.png", "model_c.png", "gray_odd.png"]
        .map(fixture_image)
        .to_vec()
}

fn with<'a>(args: &[&'a str], images: &'a [PathBuf]) -> Vec<&'a str> {
    let mut all = QUICK.to_vec();
    all.extend(args);
    all.extend(images.iter().map(|path| text(path)));
    all
}

fn is_chinese(character: char) -> bool {
    ('\u{4e00}'..='\u{9fff}').contains(&character)
}

fn images_of(records: &[Value]) -> Vec<&str> {
    records
        .iter()
        .map(|record| field(record, "image"))
        .collect()
}

fn reports_of(records: &[Value]) -> Vec<&str> {
    records
        .iter()
        .map(|record| field(record, "report"))
        .collect()
}

#[test]
fn without_arguments_stdout_is_a_chinese_report() {
    let folder = tempdir().unwrap();
    // With more than one backend the program would choose, and a test machine has its own GPU.
    let args: &[&str] = if cfg!(any(feature = "cuda", feature = "wgpu")) {
        &["infer", "--device", "cpu"]
    } else {
        &["infer"]
    };
    let (code, stdout, stderr) = run(folder.path(), args);
    assert_eq!(code, 0, "{stderr}");
    let characters = stdout.chars().filter(|c| is_chinese(*c)).count();
    assert!(characters >= 10, "{stdout}");
    assert!(!stdout.contains('\u{fffd}'), "{stdout}");
    assert!(!stdout.contains("<|"), "{stdout}");
    assert_eq!(stderr, "", "a run that ends well has nothing to say");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn json_is_one_object_with_the_documented_keys() {
    let folder = tempdir().unwrap();
    let image = fixture_image("model_a.png");
    let args = ["--json", "--prompt", "请描述这张胸片。", text(&image)];
    let (stdout, _) = infer_well(folder.path(), &[&QUICK[..], &args].concat());
    let lines = json_lines(&stdout);
    assert_eq!(lines.len(), 1, "{stdout}");
    let record = &lines[0];
    let found: Vec<&String> = record.as_object().unwrap().keys().collect();
    let expected = [
        "image",
        "image_sha256",
        "prompt",
        "settings",
        "report",
        "finish_reason",
        "remarks",
        "prompt_tokens",
        "completion_tokens",
        "seconds",
    ];
    assert_eq!(found, expected);
    assert_eq!(field(record, "image"), text(&image));
    let bytes = fs::read(&image).unwrap();
    assert_eq!(
        field(record, "image_sha256"),
        xray_qwen3vl::base::files::sha256_bytes(&bytes)
    );
    assert_eq!(record["remarks"], serde_json::json!([]));
    assert_eq!(field(record, "prompt"), "请描述这张胸片。");
    assert!(!field(record, "report").is_empty());
    assert!(["stop", "length", "repetition"].contains(&field(record, "finish_reason")));
    // 128 × 96 pixels are 12 tokens.
    assert!(record["prompt_tokens"].as_u64().unwrap() > 12);
    let new = record["completion_tokens"].as_u64().unwrap();
    assert!((1..=24).contains(&new), "{new}");
    assert!(record["seconds"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_streamed_report_is_the_same_text() {
    let folder = tempdir().unwrap();
    let images = images();
    let (plain, _) = infer_well(folder.path(), &with(&[], &images[..1]));
    let (streamed, _) = infer_well(folder.path(), &with(&["--stream"], &images[..1]));
    assert_eq!(streamed, plain);
    let (plain, _) = infer_well(folder.path(), &with(&[], &images[..2]));
    let (streamed, _) = infer_well(folder.path(), &with(&["--stream"], &images[..2]));
    assert_eq!(streamed, plain);
    // Reports of one batch grow at once; they may be refused, not mixed.
    let args = with(&["--stream", "--batch-size", "2"], &images[..2]);
    let (code, stdout, stderr) = infer(folder.path(), &args);
    match code {
        0 => assert_eq!(stdout, plain),
        code => assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}"),
    }
}

#[test]
fn a_stop_text_ends_the_report_before_it() {
    let folder = tempdir().unwrap();
    let image = [fixture_image("model_b.png")];
    let (whole, _) = infer_well(folder.path(), &with(&[], &image));
    let whole = whole.trim_end_matches('\n');
    let stop: String = whole.chars().skip(3).take(2).collect();
    assert!(!stop.is_empty(), "the report is too short: {whole}");
    let (cut, _) = infer_well(folder.path(), &with(&["--stop", &stop], &image));
    let at = whole.find(&stop).unwrap();
    assert_eq!(cut.trim_end_matches('\n'), &whole[..at]);
}

#[test]
fn one_seed_gives_one_text() {
    let folder = tempdir().unwrap();
    let image = [fixture_image("model_a.png")];
    let drawn = |temperature: &str, seed: &str| {
        let args = ["--temperature", temperature, "--seed", seed];
        infer_well(folder.path(), &with(&args, &image)).0
    };
    assert_eq!(drawn("0.8", "7"), drawn("0.8", "7"));
    let hot: Vec<String> = ["1", "2", "3"]
        .iter()
        .map(|seed| drawn("3", seed))
        .collect();
    assert!(
        hot.iter().any(|text| *text != hot[0]),
        "the seed changes nothing: {hot:?}"
    );
}

#[test]
fn a_batch_run_goes_on_where_its_file_was_cut_off() {
    let folder = tempdir().unwrap();
    let images = images();
    let output = folder.path().join("reports.jsonl");
    let args = with(&["--output", text(&output)], &images);
    let (stdout, _) = infer_well(folder.path(), &args);
    assert_eq!(stdout, "", "records go to the file");
    let whole = fs::read(&output).unwrap();
    let first = records(&output);
    let names: Vec<&str> = images.iter().map(|path| text(path)).collect();
    assert_eq!(images_of(&first), names);
    assert!(first.iter().all(|record| record.get("error").is_none()));

    let last_line = whole[..whole.len() - 1]
        .iter()
        .rposition(|b| *b == b'\n')
        .unwrap()
        + 1;
    let wide_character = last_line + whole[last_line..].iter().position(|b| *b >= 0x80).unwrap();
    for (case, length) in [
        ("after one byte of the line", last_line + 1),
        ("in the middle of the line", (last_line + whole.len()) / 2),
        ("inside a character", wide_character + 1),
        ("before the end of the line", whole.len() - 1),
        ("before the line", last_line),
    ] {
        fs::write(&output, &whole[..length]).unwrap();
        let (code, _, stderr) = infer(folder.path(), &args);
        assert_eq!(code, 0, "cut {case}: {stderr}");
        let bytes = fs::read(&output).unwrap();
        assert_eq!(
            &bytes[..last_line],
            &whole[..last_line],
            "cut {case}: earlier records"
        );
        let again = records(&output);
        assert_eq!(images_of(&again), names, "cut {case}");
        assert_eq!(reports_of(&again), reports_of(&first), "cut {case}");
    }

    let before = fs::read(&output).unwrap();
    infer_well(folder.path(), &args);
    assert_eq!(
        fs::read(&output).unwrap(),
        before,
        "a whole file is left alone"
    );
}

#[test]
fn two_runs_do_not_write_one_file() {
    let folder = tempdir().unwrap();
    let output = folder.path().join("reports.jsonl");
    let other = fs::File::create(&output).unwrap();
    other.lock().unwrap();
    let images = images();
    let args = with(&["--output", text(&output)], &images[..1]);
    let (code, stdout, stderr) = infer(folder.path(), &args);
    assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
    assert!(stderr.contains("another run"), "{stderr}");
    assert_eq!(fs::read(&output).unwrap(), b"");
    drop(other);
    infer_well(folder.path(), &args);
    assert_eq!(records(&output).len(), 1);
}

#[test]
fn another_seed_is_another_batch_run_in_the_same_file() {
    let folder = tempdir().unwrap();
    let images = images();
    let output = folder.path().join("reports.jsonl");
    infer_well(folder.path(), &with(&["--output", text(&output)], &images));
    let hot = [
        "--output",
        text(&output),
        "--temperature",
        "0.9",
        "--seed",
        "3",
    ];
    infer_well(folder.path(), &with(&hot, &images));
    assert_eq!(records(&output).len(), 2 * images.len());
}

#[test]
fn a_prompt_that_is_too_long_does_not_take_its_batch_with_it() {
    let folder = tempdir().unwrap();
    let small = fixture_image("model_a.png");
    let wide = folder.path().join("wide.png");
    // Scaled down to the given limit it still has more tokens than the tiny model's context.
    image::GrayImage::new(2400, 2400).save(&wide).unwrap();
    let output = folder.path().join("reports.jsonl");
    let args = [
        "--output",
        text(&output),
        "--batch-size",
        "2",
        "--max-pixels",
        "6000000",
        "--max-new-tokens",
        "24",
        text(&wide),
        text(&small),
    ];
    let (code, _, stderr) = infer(folder.path(), &args);
    assert_eq!(code, 1, "{stderr}");
    let records = records(&output);
    assert!(
        field(&records[0], "error").contains("context"),
        "{records:?}"
    );
    assert!(!field(&records[1], "report").is_empty(), "{records:?}");
}

#[test]
fn another_question_is_another_record() {
    let folder = tempdir().unwrap();
    let image = [fixture_image("model_a.png")];
    let output = folder.path().join("reports.jsonl");
    for (prompt, expected) in [("心脏大小？", 1), ("肺野清晰吗？", 2), ("心脏大小？", 2)]
    {
        let args = ["--output", text(&output), "--prompt", prompt];
        infer_well(folder.path(), &with(&args, &image));
        assert_eq!(records(&output).len(), expected, "after `{prompt}`");
    }
}

#[test]
fn a_broken_image_costs_only_its_own_report() {
    let folder = tempdir().unwrap();
    let broken = folder.path().join("broken.png");
    let good = fs::read(fixture_image("model_b.png")).unwrap();
    fs::write(&broken, &good[..good.len() / 2]).unwrap();
    let mut images = images();
    images.insert(1, broken);
    for batch_size in ["1", "3"] {
        let output = folder.path().join(format!("reports-{batch_size}.jsonl"));
        let args = ["--output", text(&output), "--batch-size", batch_size];
        let args = with(&args, &images);
        let (code, stdout, stderr) = infer(folder.path(), &args);
        assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
        let named = |stderr: &str| {
            let errors: Vec<&str> = stderr
                .lines()
                .filter(|line| line.starts_with("error: "))
                .collect();
            errors.len() == 1 && errors[0].contains("broken.png")
        };
        assert!(named(&stderr), "{stderr}");
        let found = records(&output);
        let names: Vec<&str> = images.iter().map(|path| text(path)).collect();
        assert_eq!(images_of(&found), names);
        for (index, record) in found.iter().enumerate() {
            if index == 1 {
                assert!(field(record, "error").contains("broken.png"), "{record}");
                assert_eq!(field(record, "report"), "");
            } else {
                assert!(record.get("error").is_none(), "{record}");
                assert!(!field(record, "report").is_empty(), "{record}");
            }
        }
        let before = fs::read(&output).unwrap();
        let (code, _, stderr) = infer(folder.path(), &args);
        assert_eq!(code, 1, "{stderr}");
        assert!(named(&stderr), "{stderr}");
        assert_eq!(fs::read(&output).unwrap(), before, "nothing is done twice");
    }
}

#[test]
fn a_folder_of_images_is_taken_in_order_of_name() {
    let folder = tempdir().unwrap();
    let images = folder.path().join("images");
    fs::create_dir(&images).unwrap();
    for (from, to) in [
        ("model_c.png", "b.png"),
        ("model_a.png", "a.PNG"),
        ("model_b.png", "c.png"),
    ] {
        fs::copy(fixture_image(from), images.join(to)).unwrap();
    }
    fs::write(images.join("notes.txt"), "no image").unwrap();
    fs::create_dir(images.join("d.png")).unwrap();
    let args = [&QUICK[..], &["--json", "--images-dir", text(&images)]].concat();
    let (stdout, _) = infer_well(folder.path(), &args);
    let found = json_lines(&stdout);
    let expected = ["a.PNG", "b.png", "c.png"].map(|name| images.join(name));
    assert_eq!(
        images_of(&found),
        expected.iter().map(|path| text(path)).collect::<Vec<_>>()
    );
}

#[test]
fn images_together_make_one_report() {
    let folder = tempdir().unwrap();
    let images = images();
    let tokens = |images: &[PathBuf]| {
        let (stdout, _) = infer_well(folder.path(), &with(&["--json", "--together"], images));
        let found = json_lines(&stdout);
        assert_eq!(found.len(), 1, "{stdout}");
        for image in images {
            assert!(field(&found[0], "image").contains(text(image)), "{stdout}");
        }
        assert!(!field(&found[0], "report").is_empty(), "{stdout}");
        found[0]["prompt_tokens"].as_u64().unwrap()
    };
    // 64 × 128 pixels are 8 tokens, between the two tokens that mark an image.
    assert_eq!(tokens(&images[..2]), tokens(&images[..1]) + 8 + 2);
}

#[test]
fn batches_give_the_reports_of_single_images() {
    let folder = tempdir().unwrap();
    let images = images();
    let reports = |batch_size: &str| {
        let args = ["--json", "--batch-size", batch_size];
        let (stdout, _) = infer_well(folder.path(), &with(&args, &images));
        json_lines(&stdout)
    };
    let (one, three) = (reports("1"), reports("3"));
    assert_eq!(images_of(&three), images_of(&one));
    assert_eq!(reports_of(&three), reports_of(&one));
}

#[test]
fn verbose_tells_times_speeds_and_memory_on_stderr() {
    let folder = tempdir().unwrap();
    let image = [fixture_image("model_a.png")];
    let (plain, _) = infer_well(folder.path(), &with(&[], &image));
    let (stdout, stderr) = infer_well(folder.path(), &with(&["--verbose"], &image));
    assert_eq!(stdout, plain);
    for what in ["load", "vision", "prefill", "decode", "memory"] {
        let line = stderr
            .lines()
            .find(|line| line.starts_with(what))
            .unwrap_or_else(|| panic!("no line about {what}: {stderr}"));
        assert!(line.contains(|c: char| c.is_ascii_digit()), "{line}");
    }
    assert!(stderr.contains("tokens/s"), "{stderr}");
}

#[test]
fn several_devices_write_the_file_of_one() {
    let folder = tempdir().unwrap();
    // Each under a name of its own: in a file, an image has one record.
    let images: Vec<PathBuf> = images()
        .into_iter()
        .cycle()
        .take(11)
        .enumerate()
        .map(|(number, image)| {
            let copy = folder.path().join(format!("{number:02}.png"));
            fs::copy(image, &copy).unwrap();
            copy
        })
        .collect();
    // A file that is not there: its record has the error, in its place.
    let gone = folder.path().join("gone.png");
    let images = [&images[..5], &[gone], &images[5..]].concat();
    let written = |name: &str, device: &str| {
        let output = folder.path().join(name);
        let args = ["--device", device, "--batch-size", "2", "--verbose"];
        let args = [&args[..], &["--output", text(&output)]].concat();
        let (code, stdout, stderr) = infer(folder.path(), &with(&args, &images));
        assert_eq!(code, 1, "{stdout}\n{stderr}");
        assert!(stderr.contains("gone.png"), "{stderr}");
        assert!(stderr.contains("memory"), "{stderr}");
        let mut records = records(&output);
        for record in &mut records {
            record.as_object_mut().unwrap().remove("seconds");
        }
        records
    };
    let one = written("one.jsonl", "cpu");
    assert_eq!(one.len(), images.len());
    assert_eq!(written("two.jsonl", "cpu,cpu"), one);
    assert_eq!(written("three.jsonl", "cpu,cpu,cpu"), one);

    let demo = demo_image();
    let args = ["--stream", "--device", "cpu,cpu", text(&demo)];
    let (code, _, stderr) = infer(folder.path(), &args);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("several devices"), "{stderr}");
}

#[test]
fn a_killed_batch_run_ends_with_every_record_once() {
    for (device, signal) in [("cpu", "KILL"), ("cpu,cpu", "TERM"), ("cpu", "HUP")] {
        // Where another process holds up the signal until all is done, a longer run shows it.
        let killed = [72, 288, 1152]
            .into_iter()
            .any(|images| killed_batch_run(device, signal, images));
        assert!(killed, "each run was over before it could be killed");
    }
}

/// Whether the signal arrived before the run was over; if so, the rest was checked.
fn killed_batch_run(device: &str, signal: &str, images: usize) -> bool {
    let folder = tempdir().unwrap();
    let images: Vec<PathBuf> = (0..images)
        .map(|index| {
            let path = folder.path().join(format!("{index:04}.png"));
            fs::copy(fixture_image("model_c.png"), &path).unwrap();
            path
        })
        .collect();
    let output = folder.path().join("reports.jsonl");
    let args = ["--device", device, "--output", text(&output)];
    let args = with(&args, &images);
    let mut child = program(folder.path(), &infer_args(&args)).spawn().unwrap();
    let lines = |output: &Path| {
        let bytes = fs::read(output).unwrap_or_default();
        bytes.iter().filter(|byte| **byte == b'\n').count()
    };
    let started = Instant::now();
    while lines(&output) == 0 {
        assert!(started.elapsed() < LONGEST_RUN, "no record appears");
        assert!(
            child.try_wait().unwrap().is_none(),
            "the run ended without a record"
        );
        thread::sleep(Duration::from_millis(2));
    }
    let id = child.id().to_string();
    let sent = Command::new("kill").args(["-s", signal, &id]).status();
    assert!(sent.unwrap().success());
    child.wait().unwrap();
    let kept = fs::read(&output).unwrap();
    let done = lines(&output);
    if done == images.len() {
        return false;
    }
    let whole = kept.iter().rposition(|byte| *byte == b'\n').unwrap() + 1;

    let (_, stderr) = infer_well(folder.path(), &args);
    assert!(
        stderr.contains(&format!("{done} of {}", images.len())),
        "{stderr}"
    );
    let names: Vec<&str> = images.iter().map(|path| text(path)).collect();
    assert_eq!(images_of(&records(&output)), names);
    assert_eq!(&fs::read(&output).unwrap()[..whole], &kept[..whole]);
    true
}

#[test]
fn an_image_of_the_demo_costs_no_more_than_its_limit() {
    let folder = tempdir().unwrap();
    let tokens = |max_pixels: &str| {
        let args = [
            "--json",
            "--max-new-tokens",
            "1",
            "--max-pixels",
            max_pixels,
        ];
        let demo = demo_image();
        let (stdout, _) = infer_well(folder.path(), &[&args[..], &[text(&demo)]].concat());
        json_lines(&stdout)[0]["prompt_tokens"].as_u64().unwrap()
    };
    // 1,024 pixels are one token.
    let (few, many) = (tokens("8192"), tokens("32768"));
    assert!(few < many && many - few <= 32, "{few}, {many}");
}

#[test]
#[ignore = "needs XRAY_OPENI_DIR, the folder of real films and reports"]
fn real_radiographs_get_a_report_each() {
    let data = env::var_os("XRAY_OPENI_DIR").expect("XRAY_OPENI_DIR is set");
    let images = Path::new(&data).join("images");
    let count = fs::read_dir(&images)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", images.display()))
        .count();
    let folder = tempdir().unwrap();
    let args = [
        "--json",
        "--max-new-tokens",
        "128",
        "--images-dir",
        text(&images),
    ];
    let (stdout, _) = infer_well(folder.path(), &args);
    let found = json_lines(&stdout);
    assert_eq!(found.len(), count);
    for record in found {
        assert!(record.get("error").is_none(), "{record}");
        assert!(field(&record, "report").chars().any(is_chinese), "{record}");
    }
}
