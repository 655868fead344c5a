//! `convert` and `check` on the published corpus, found by `XRAY_OPENI_DIR`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use xray_qwen3vl::dataset::DataOptions;
use xray_qwen3vl::dataset::check::{Check, CheckReport, Kind, Severity};
use xray_qwen3vl::dataset::convert::{ConvertOptions, CorpusForm, PROMPTS, Split, Spread, convert};
use xray_qwen3vl::processor::patches::{ImageProcessor, ImageProcessorConfig};
use xray_qwen3vl::processor::tokenizer::Tokenizer;
use xray_qwen3vl::study::StudyRule;

/// Folder of the corpus, which is licensed and not in the repository.
fn openi() -> PathBuf {
    let dir = std::env::var_os("XRAY_OPENI_DIR");
    PathBuf::from(dir.expect("XRAY_OPENI_DIR is set"))
}

fn tokenizer() -> Tokenizer {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    Tokenizer::from_folder(root.join("tests/fixtures/tokenizer")).unwrap()
}

fn processor() -> ImageProcessor {
    ImageProcessor::new(ImageProcessorConfig::default()).unwrap()
}

fn options(input: PathBuf, images: PathBuf, output: &Path) -> ConvertOptions {
    ConvertOptions {
        images: Some(images),
        val_ratio: Some(0.05),
        split: Some(Split::Uid),
        ..ConvertOptions::new(input, output)
    }
}

fn rows(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str(line).unwrap());
    rows.collect()
}

fn image_name(row: &Value) -> String {
    let path = Path::new(row["images"][0].as_str().unwrap());
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

fn uids(rows: &[Value]) -> BTreeSet<String> {
    let uid = |row| image_name(row).split('_').next().unwrap().to_owned();
    rows.iter().map(uid).collect()
}

fn check(train: &Path, val: Option<&Path>, max_length: usize) -> CheckReport {
    let (tokenizer, processor) = (tokenizer(), processor());
    let check = Check {
        tokenizer: &tokenizer,
        processor: &processor,
        max_length,
        opens_thinking: None,
        studies: StudyRule::Guess,
        options: DataOptions::default(),
    };
    check
        .run(
            &[train.into()],
            &val.map(Path::to_owned).into_iter().collect::<Vec<_>>(),
            &|_, _| {},
        )
        .unwrap()
}

#[test]
#[ignore = "needs XRAY_OPENI_DIR, the folder of real films and reports"]
fn the_whole_corpus_with_few_images_lists_what_is_missing() {
    let openi = openi();
    let out = tempfile::tempdir().unwrap();
    let options = ConvertOptions {
        allow_missing: true,
        ..options(
            openi.join("openi-zh-prompt.json"),
            openi.join("images"),
            out.path(),
        )
    };
    let summary = convert(&options, Some(&tokenizer()), &processor(), &|_, _| {}).unwrap();
    assert_eq!(summary.form, CorpusForm::Prompts);
    assert_eq!(
        (summary.rows_read, summary.rows_without_image),
        (6423, 6416)
    );
    let missing = fs::read_to_string(out.path().join("missing.txt")).unwrap();
    assert_eq!(missing.lines().count(), 6416);
    let (train, val) = (
        rows(&out.path().join("train.jsonl")),
        rows(&out.path().join("val.jsonl")),
    );
    assert_eq!(train.len() + val.len(), 7);
    assert!(uids(&train).is_disjoint(&uids(&val)));
    // 512 × 512 pixels are 16 × 16 tokens, 512 × 420 are 16 × 13.
    let vision = summary.vision_tokens.unwrap();
    assert_eq!((vision.count, vision.min, vision.p50), (7, 208, 256));
    let report = check(
        &out.path().join("train.jsonl"),
        Some(&out.path().join("val.jsonl")),
        2048,
    );
    assert_eq!(report.findings, []);
    assert_eq!(report.images, 7);
}

#[test]
#[ignore = "needs XRAY_OPENI_DIR, the folder of real films and reports"]
fn seven_reports_keep_both_views_of_a_study_on_one_side() {
    let openi = openi();
    for (name, form) in [
        ("reports.json", CorpusForm::Annotations),
        ("reports-prompt.json", CorpusForm::Prompts),
    ] {
        for seed in 0..12 {
            let out = tempfile::tempdir().unwrap();
            let options = ConvertOptions {
                seed,
                val_ratio: Some(0.3),
                ..options(openi.join(name), openi.join("images"), out.path())
            };
            let summary = convert(&options, None, &processor(), &|_, _| {}).unwrap();
            assert_eq!((summary.form, summary.rows_left_out()), (form, 0));
            let side = |name: &str| {
                let rows = rows(&out.path().join(name));
                rows.iter().map(image_name).collect::<BTreeSet<_>>()
            };
            let train = side("train.jsonl");
            assert_eq!(train.contains("2_1.png"), train.contains("2_2.png"));
            assert_eq!(train.len() + side("val.jsonl").len(), 7);
        }
    }
}

/// The corpus with every image stood in for by one picture: all 6,423 rows.
fn full_corpus(openi: &Path, folder: &Path) -> PathBuf {
    let images = folder.join("images");
    fs::create_dir(&images).unwrap();
    let stand_in = folder.join("stand-in.png");
    image::GrayImage::new(64, 64).save(&stand_in).unwrap();
    let corpus: Vec<Value> =
        serde_json::from_slice(&fs::read(openi.join("openi-zh-prompt.json")).unwrap()).unwrap();
    for row in &corpus {
        let name = row["img"].as_str().unwrap().rsplit('/').next().unwrap();
        fs::hard_link(&stand_in, images.join(name)).unwrap();
    }
    images
}

#[test]
#[ignore = "needs XRAY_OPENI_DIR, the folder of real films and reports"]
fn the_split_by_row_is_the_published_one() {
    let openi = openi();
    let dir = tempfile::tempdir().unwrap();
    let images = full_corpus(&openi, dir.path());
    let out = dir.path().join("out");
    let by_row = ConvertOptions {
        split: Some(Split::Image),
        ..options(openi.join("openi-zh-prompt.json"), images, &out)
    };
    let summary = convert(&by_row, Some(&tokenizer()), &processor(), &|_, _| {}).unwrap();
    assert_eq!((summary.train.rows, summary.val.rows), (6102, 321));
    // Counted with Python on the published script's draws.
    assert_eq!((summary.val.studies, summary.studies_in_both), (313, 281));
    let (train, val) = (rows(&out.join("train.jsonl")), rows(&out.join("val.jsonl")));
    let mut order = Sha256::new();
    for row in val.iter().chain(&train) {
        let question = row["messages"][0]["content"].as_str().unwrap();
        let question = question.strip_prefix("<image>").unwrap();
        let place = PROMPTS.iter().position(|prompt| *prompt == question);
        order.update(format!("{} {}\n", image_name(row), place.unwrap()));
    }
    let order: String = order
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let published = "51cdcdf10c71a5c790e511471dff07aa8b5bf657e6160c0498988e930e6057e6";
    assert_eq!(order, published);
    // The numbers of the corpus, counted with the reference tokenizer.
    let places = |s: Spread| (s.min, s.p5, s.p50, s.p95, s.p99, s.max, s.total);
    let tokens = places(summary.answer_tokens.unwrap());
    assert_eq!(tokens, (19, 35, 60, 101, 126, 223, 405_061));
    let (min, p5, p50, p95, p99, max, _) = places(summary.characters.unwrap());
    assert_eq!((min, p5, p50, p95, p99, max), (26, 51, 87, 142, 175, 311));

    // Every image is the same picture here, so only studies and reports can tell a leak.
    let report = check(&out.join("train.jsonl"), Some(&out.join("val.jsonl")), 2048);
    let count = |kind| {
        let errors = report.findings.iter();
        errors
            .filter(|found| found.kind == kind && found.severity == Severity::Error)
            .count()
    };
    assert_eq!(count(Kind::LeakStudy), 283);
    assert!(count(Kind::LeakReport) > 200);

    fs::remove_dir_all(&out).unwrap();
    let by_study = ConvertOptions {
        split: Some(Split::Uid),
        ..by_row
    };
    let summary = convert(&by_study, None, &processor(), &|_, _| {}).unwrap();
    assert_eq!(summary.studies_in_both, 0);
    assert!((321..=325).contains(&summary.val.rows));
    assert_eq!(summary.train.studies + summary.val.studies, 3313);
    let report = check(&out.join("train.jsonl"), Some(&out.join("val.jsonl")), 2048);
    let leaks = report.findings.iter().filter(|found| {
        found.severity == Severity::Error
            && matches!(found.kind, Kind::LeakStudy | Kind::LeakReport)
    });
    assert_eq!(leaks.count(), 0);
}

#[test]
#[ignore = "needs XRAY_OPENI_DIR, the folder of real films and reports"]
fn planted_defects_in_the_real_subset_are_found() {
    let openi = openi();
    let out = tempfile::tempdir().unwrap();
    let options = ConvertOptions {
        val_ratio: Some(0.0),
        ..options(openi.join("reports.json"), openi.join("images"), out.path())
    };
    convert(&options, None, &processor(), &|_, _| {}).unwrap();
    let sound = rows(&out.path().join("train.jsonl"));
    let mut rows = sound.clone();
    let damaged = out.path().join("damaged.png");
    let whole = fs::read(openi.join("images/2_1.png")).unwrap();
    fs::write(&damaged, &whole[..whole.len() / 2]).unwrap();
    rows[1]["images"] = json!(["damaged.png"]);
    rows[2]["messages"][1]["content"] = json!("");
    rows[3]["messages"][0]["content"] = json!("<image><image>问");
    let long = sound[4]["messages"][1]["content"].as_str().unwrap();
    rows[4]["messages"][1]["content"] = json!(long.repeat(40));
    rows[5]["messages"][0]["content"] = json!("<image><|vision_end|>");
    rows.push(rows[0].clone());
    let planted = out.path().join("planted.jsonl");
    let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
    fs::write(&planted, text).unwrap();
    let found = |report: &CheckReport| -> Vec<(usize, Kind)> {
        let errors = report.findings.iter();
        errors
            .filter(|found| found.severity == Severity::Error)
            .map(|found| (found.line, found.kind))
            .collect()
    };
    let report = check(&planted, None, 1024);
    let expected = [
        (2, Kind::Image),
        (3, Kind::NoAnswer),
        (4, Kind::ImageMarks),
        (5, Kind::TooLong),
        (6, Kind::ControlToken),
        (8, Kind::Duplicate),
    ];
    assert_eq!(found(&report), expected);
    // The first row as validation of all: its image, its study and its report are there.
    let val = out.path().join("leak.jsonl");
    fs::write(&val, format!("{}\n", sound[0])).unwrap();
    let report = check(&out.path().join("train.jsonl"), Some(&val), 2048);
    let leaks = [
        (1, Kind::LeakImage),
        (1, Kind::LeakStudy),
        (1, Kind::LeakReport),
    ];
    assert_eq!(found(&report), leaks);
}
