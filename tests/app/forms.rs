//! Rows as others write them: what `train`, `check` and `convert` make of each.
//!
//! `expected.tsv` beside the files has a line a file: what training reads, what `check` finds, what
//! `convert` writes. Rows that are read are shown as the model sees them: `⟨N⟩` for N image tokens,
//! `⟦…⟧` around what is learnt, `¶` for the end of a message. With `XRAY_WRITE_EXPECTED=1` the table is
//! written anew, to be read through before it is committed.

use std::{fs, path::Path};

use burn::tensor::DType;
use tempfile::tempdir;
use xray_qwen3vl::{
    dataset::{
        DataOptions, Dataset, ImageStore,
        check::{Check, Severity},
        convert::{ConvertOptions, Split, convert},
    },
    processor::chat::ChatTemplate,
    runtime::pipeline::{PipelineOptions, TextAndImages},
    study::StudyRule,
};

use crate::{repository, tiny_model};

/// Tokens of a row that are too many.
const MAX_LENGTH: usize = 1024;

/// Images of rows are kept apart from those of the user, and nothing is fetched.
fn options() -> DataOptions {
    DataOptions {
        store: ImageStore::new(std::env::temp_dir().join("xray-test-images"), |_| false),
        ..DataOptions::default()
    }
}

pub(crate) fn parts() -> TextAndImages {
    TextAndImages::load(&PipelineOptions::new(tiny_model(), DType::F32)).unwrap()
}

/// A row as the model sees it.
fn shown(ids: &[u32], labels: &[i64], parts: &TextAndImages) -> String {
    let mut text = String::new();
    let mut at = 0;
    while at < ids.len() {
        let learnt = labels[at] != -100;
        let length = labels[at..]
            .iter()
            .take_while(|label| (**label != -100) == learnt);
        let end = at + length.count();
        let words = parts.tokenizer.decode(&ids[at..end], false).unwrap();
        text += &if learnt {
            format!("⟦{words}⟧")
        } else {
            words
        };
        at = end;
    }
    const PAD: &str = "<|image_pad|>";
    while let Some(from) = text.find(PAD) {
        let pads = text[from..].split(PAD).take_while(|words| words.is_empty());
        let pads = pads.count();
        let end = from + pads * PAD.len();
        text.replace_range(from..end, &format!("⟨{pads}⟩"));
    }
    for (from, to) in [
        ("<|vision_start|>", ""),
        ("<|vision_end|>", ""),
        ("<|im_start|>user\n", "user:"),
        ("<|im_start|>assistant\n", "assistant:"),
        ("<|im_start|>system\n", "system:"),
        ("<|im_end|>\n", "¶"),
        ("\n", "⏎"),
    ] {
        text = text.replace(from, to);
    }
    text
}

/// What training reads of a file, and the remarks on it.
fn trained(file: &Path, parts: &TextAndImages) -> Result<String, String> {
    let name = file.to_str().unwrap();
    let data = Dataset::open_with(name, &options()).map_err(|error| error.to_string())?;
    let rows = (0..data.len()).map(|row| {
        let sample = data.encode(row, parts, MAX_LENGTH);
        let sample = sample.map_err(|error| error.to_string())?;
        Ok(shown(&sample.input_ids, &sample.labels, parts))
    });
    let rows = rows.collect::<Result<Vec<_>, String>>()?;
    let remarks = data
        .remarks()
        .iter()
        .map(|remark| format!("note: {remark}"));
    Ok(rows
        .into_iter()
        .chain(remarks)
        .collect::<Vec<_>>()
        .join(" "))
}

fn checked(file: &Path, parts: &TextAndImages) -> String {
    let template = ChatTemplate::find(tiny_model(), None).unwrap();
    let check = Check {
        tokenizer: &parts.tokenizer,
        processor: &parts.images,
        max_length: MAX_LENGTH,
        opens_thinking: template.map(|template| template.opens_thinking()),
        studies: StudyRule::Guess,
        options: options(),
    };
    let report = check.run(&[file.to_owned()], &[], &|_, _| {}).unwrap();
    let findings = report.findings.iter().map(|found| {
        let severity = match found.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        let kind = found.kind.as_str();
        format!("{severity} {}: {kind}: {}", found.line, found.message)
    });
    let mut findings: Vec<String> = findings.collect();
    if findings.is_empty() {
        return "ok".to_owned();
    }
    let more = findings.len().saturating_sub(3);
    if more > 0 {
        findings.truncate(3);
        findings.push(format!("and {more} more"));
    }
    findings.join(" | ")
}

/// What training reads of the converted file.
fn converted(file: &Path, parts: &TextAndImages) -> Result<String, String> {
    let folder = tempdir().unwrap();
    let output = folder.path().join("out");
    let options = ConvertOptions {
        reading: options(),
        images: (file.extension() == Some("json".as_ref())).then(|| file.parent().unwrap().into()),
        seed: 0,
        val_ratio: Some(0.0),
        split: Some(Split::Uid),
        ..ConvertOptions::new(file, &output)
    };
    convert(&options, Some(&parts.tokenizer), &parts.images, &|_, _| {}).map_err(|error| {
        let text = error.to_string();
        text.replace(folder.path().to_str().unwrap(), "")
    })?;
    let place = folder.path().to_str().unwrap();
    let text = trained(&output.join("train.jsonl"), parts);
    let text = text.map_err(|error| error.replace(place, ""))?;
    Ok(text.replace(place, ""))
}

#[test]
fn every_form_is_read_with_its_value_or_refused_with_its_sentence() {
    let found = repository().join("tests/fixtures/found/forms");
    // Without the path of the repository in the sentences.
    let place = format!("{}/", found.display());
    let table = found.join("expected.tsv");
    let parts = parts();
    let mut names: Vec<String> = fs::read_dir(&found)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".png") && !name.ends_with(".py") && name != "expected.tsv")
        .collect();
    names.sort();
    let (store, home) = (options().store, std::env::var("HOME").unwrap_or_default());
    let one_line = |text: String| {
        let text = text
            .replace(&place, "")
            .replace(place.trim_end_matches('/'), ".")
            .replace(store.folder().to_str().unwrap(), "CACHE")
            .replace(&format!("{home}/"), "~/");
        text.replace(['\n', '\t', '\r'], " ")
    };
    let outcome = |result: Result<String, String>| match result {
        Ok(text) => one_line(format!("reads {text}")),
        Err(text) => one_line(format!("refuses: {text}")),
    };
    let mut lines = vec!["file\ttrain\tcheck\tconvert".to_owned()];
    for name in &names {
        let file = found.join(name);
        let train = outcome(trained(&file, &parts));
        let check = one_line(checked(&file, &parts));
        let mut convert = outcome(converted(&file, &parts));
        if convert == train {
            convert = "as train".to_owned();
        }
        let refused = train.starts_with("refuses");
        // What training refuses, `check` finds; what both read may still be doubted.
        assert!(
            !refused || check.contains("error "),
            "{name}: train {train}; check {check}"
        );
        for words in [&train, &check, &convert] {
            for slip in [
                "expected struct",
                "invalid type",
                "missing field",
                "Some(",
                "1 rows",
            ] {
                assert!(!words.contains(slip), "{name}: {words}");
            }
            assert!(words.chars().count() < 600 || !refused, "{name}: {words}");
        }
        lines.push([name.as_str(), &train, &check, &convert].join("\t"));
    }
    let lines = lines.join("\n") + "\n";
    if std::env::var_os("XRAY_WRITE_EXPECTED").is_some() {
        fs::write(&table, &lines).unwrap();
    }
    let expected = fs::read_to_string(&table).unwrap();
    for (found, expected) in lines.lines().zip(expected.lines()) {
        assert_eq!(found, expected);
    }
    assert_eq!(lines.lines().count(), expected.lines().count());
}

#[test]
fn the_program_says_a_refusal_once() {
    let folder = tempdir().unwrap();
    let found = repository().join("tests/fixtures/found/forms");
    for name in [
        "a0.png",
        "chinese_keys.jsonl",
        "missing_image_file.jsonl",
        "std.jsonl",
    ] {
        fs::copy(found.join(name), folder.path().join(name)).unwrap();
    }
    let train = |data: &str, more: &[&str]| {
        let args = [
            "train",
            "--train-data",
            data,
            "--output-dir",
            "run",
            "--device",
            "cpu",
        ];
        let args = [
            &args[..],
            &["--set", "max_steps=1", "--set", "split_dataset_ratio=0"],
            more,
        ]
        .concat();
        let (code, _, stderr) = crate::run(folder.path(), &args);
        assert_eq!(code, 1, "{stderr}");
        assert!(!stderr.contains("step 1/"), "{stderr}");
        stderr
    };
    let form = train("chinese_keys.jsonl", &[]);
    assert_eq!(
        form.matches("`--columns images=影像,response=报告`")
            .count(),
        1,
        "{form}"
    );
    let missing = train("missing_image_file.jsonl", &["--set", "max_length=4096"]);
    assert!(
        missing.contains("nope.png") && missing.contains("No such file"),
        "{missing}"
    );
    let long = train(
        "std.jsonl",
        &["--set", "max_length=32", "--set", "overlong=skip"],
    );
    assert!(
        long.contains("its only row has") && long.contains("nothing is left to learn"),
        "{long}"
    );
}
