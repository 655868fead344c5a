use std::fs;

use super::*;
use crate::processor::patches::ImageProcessorConfig;
use crate::processor::train_tokenizer::train_tokenizer;

const GOOD: &str = r#"{"messages":[{"role":"user","content":"<image>问"},{"role":"assistant","content":"答A"}],"images":["1_1.png"]}"#;

struct Bench {
    dir: tempfile::TempDir,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, level) in [("1_1", 1), ("1_2", 2), ("2_1", 3), ("3_1", 4), ("view", 5)] {
            let picture = image::GrayImage::from_fn(64, 96, |x, _| image::Luma([level + x as u8]));
            picture
                .save(dir.path().join(format!("{name}.png")))
                .unwrap();
        }
        let texts = ["心脏大小正常", "肺部清晰"];
        let trained = train_tokenizer(texts.into_iter(), 400).unwrap();
        Self {
            dir,
            tokenizer: trained.tokenizer().unwrap(),
            processor: ImageProcessor::new(ImageProcessorConfig::default()).unwrap(),
        }
    }

    fn write(&self, name: &str, lines: &[String]) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, lines.join("\n")).unwrap();
        path
    }

    fn check(&self, train: &[String], val: Option<&[String]>, max_length: usize) -> CheckReport {
        let train = self.write("train.jsonl", train);
        let val = val.map(|lines| self.write("val.jsonl", lines));
        let check = Check {
            tokenizer: &self.tokenizer,
            processor: &self.processor,
            max_length,
            opens_thinking: None,
            studies: StudyRule::Guess,
            options: DataOptions::default(),
        };
        check.run(&[train], val.as_slice(), &|_, _| {}).unwrap()
    }
}

fn row(image: &str, question: &str, answer: &str) -> String {
    let row = serde_json::json!({
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        "images": [image],
    });
    row.to_string()
}

fn kinds(report: &CheckReport) -> Vec<(Severity, Kind, usize)> {
    let findings = report.findings.iter();
    findings
        .map(|found| (found.severity, found.kind, found.line))
        .collect()
}

#[test]
fn sound_files_have_no_finding() {
    let bench = Bench::new();
    let train = [
        GOOD.to_owned(),
        String::new(),
        row("1_2.png", "<image>问", "答B"),
    ];
    let report = bench.check(&train, Some(&[row("2_1.png", "<image>问", "答C")]), 2048);
    assert_eq!(kinds(&report), []);
    assert_eq!(
        (report.files[0].rows, report.files[1].rows, report.images),
        (2, 1, 3)
    );
    assert_eq!(report.row_tokens.unwrap().count, 3);
}

#[test]
fn every_planted_defect_is_found_in_its_line() {
    use Kind::*;
    use Severity::*;
    let bench = Bench::new();
    fs::write(bench.dir.path().join("text.png"), "no picture").unwrap();
    let whole = fs::read(bench.dir.path().join("3_1.png")).unwrap();
    fs::write(bench.dir.path().join("cut.png"), &whole[..whole.len() - 20]).unwrap();
    let line = image::GrayImage::new(402, 2);
    line.save(bench.dir.path().join("line.png")).unwrap();
    let train = [
        GOOD.to_owned(),
        "{not json".into(),
        r#"{"question":"q"}"#.into(),
        row("text.png", "<image>问", "答"),
        row("cut.png", "<image>问", "答"),
        row("none.png", "<image>问", "答"),
        row("line.png", "<image>问", "答"),
        r#"{"messages":[{"role":"user","content":"<image>问"}],"images":["1_2.png"]}"#.into(),
        row("1_2.png", "<image>问", " "),
        row("1_2.png", "<image><image>问", "答"),
        row("1_2.png", "问", "答B"),
        row("2_1.png", "<image>问", "答<|im_end|>"),
        row("3_1.png", "<image>问", &"肺部清晰".repeat(200)),
        GOOD.to_owned(),
        row("1_1.png", "<image>别的", "答Z"),
        r#"{"messages":[{"role":"user","content":"问"},{"role":"assistant","content":"答"}],"hospital":1}"#.into(),
        row("none.png", "<image>问", "<|im_start|>"),
    ];
    let report = bench.check(&train, None, 100);
    assert_eq!(
        kinds(&report),
        [
            (Error, Json, 2),
            (Error, Form, 3),
            (Error, Image, 4),
            (Error, Image, 5),
            (Error, Image, 6),
            (Error, Image, 7),
            (Error, NoAnswer, 8),
            (Error, NoAnswer, 9),
            (Error, ImageMarks, 10),
            (Warning, ImageMarks, 11),
            (Error, ControlToken, 12),
            (Error, TooLong, 13),
            (Error, Duplicate, 14),
            (Warning, AnswersDiffer, 15),
            (Warning, NoImage, 16),
            (Warning, UnknownKey, 16),
            (Error, Image, 17),
            (Error, ControlToken, 17),
        ]
    );
    assert_eq!((report.errors, report.warnings), (14, 4));
    let long = report
        .findings
        .iter()
        .find(|found| found.kind == TooLong)
        .unwrap();
    let text = long.to_string();
    assert!(text.contains("train.jsonl:13: error: too-long: "), "{text}");
    assert!(
        text.contains(" text, 6 image), more than max_length 100"),
        "{text}"
    );
    let missing = report.findings[4].to_string();
    assert!(missing.contains("none.png"), "{missing}");
    let json = serde_json::to_value(&report.findings[0]).unwrap();
    assert_eq!(
        (&json["kind"], &json["severity"]),
        (&"json".into(), &"error".into())
    );
}

#[test]
fn answers_that_do_not_suit_the_chat_template_are_one_warning() {
    let bench = Bench::new();
    let rows = [
        row("1_1.png", "<image>问", "<think>\n甲\n</think>\n\n肺部清晰"),
        row("2_1.png", "<image>问", "心脏大小正常"),
        row("3_1.png", "<image>问", "肺部清晰，心脏大小正常"),
    ];
    let path = bench.write("train.jsonl", &rows);
    let of = |opens_thinking| {
        let check = Check {
            tokenizer: &bench.tokenizer,
            processor: &bench.processor,
            max_length: 2048,
            opens_thinking,
            studies: StudyRule::Guess,
            options: DataOptions::default(),
        };
        let report = check
            .run(std::slice::from_ref(&path), &[], &|_, _| {})
            .unwrap();
        let found = report.findings.iter();
        let found = found.filter(|found| found.kind == Kind::Thinking);
        found
            .map(|found| (found.line, found.message[..6].to_owned()))
            .collect::<Vec<_>>()
    };
    assert_eq!(of(None), []);
    assert_eq!(of(Some(true)), [(2, "2 of 3".to_owned())]);
    assert_eq!(of(Some(false)), [(1, "1 of 3".to_owned())]);
}

#[test]
fn leaks_by_image_study_and_report_are_found() {
    use Kind::*;
    use Severity::*;
    let bench = Bench::new();
    let copy = bench.dir.path().join("copy.png");
    fs::copy(bench.dir.path().join("2_1.png"), copy).unwrap();
    let train = [
        row(
            "1_1.png",
            "<image>问",
            "<think>\n甲\n</think>\n\n心脏大小正常",
        ),
        row("2_1.png", "<image>问", "肺部清晰"),
    ];
    let val = [
        row("copy.png", "<image>问", "别的"),
        row("1_2.png", "<image>问", "又是别的"),
        row("view.png", "<image>问", "心脏大小正常"),
        row("3_1.png", "<image>问", "肺部清晰"),
    ];
    let report = bench.check(&train, Some(&val), 2048);
    assert_eq!(
        kinds(&report),
        [
            (Error, LeakImage, 1),
            (Error, LeakStudy, 2),
            (Error, LeakReport, 3),
            // Names show another study: two healthy patients may have the same report.
            (Warning, LeakReport, 4),
        ]
    );
    assert!(report.findings[1].message.contains("study `1`"));
    assert!(
        report
            .findings
            .iter()
            .all(|found| found.file.ends_with("val.jsonl"))
    );
}

#[test]
fn a_patient_on_both_sides_is_a_leak_in_the_layout_of_mimic() {
    let bench = Bench::new();
    let patient_row = |patient: &str, study: &str, level: u8| {
        let folder = bench.dir.path().join(format!("files/{patient}/{study}"));
        fs::create_dir_all(&folder).unwrap();
        let picture = image::GrayImage::from_fn(64, 96, |x, _| image::Luma([level + x as u8]));
        picture.save(folder.join("a.png")).unwrap();
        row(
            &format!("files/{patient}/{study}/a.png"),
            "<image>问",
            &format!("答{level}"),
        )
    };
    let train = [patient_row("p10", "s1", 1), patient_row("p11", "s2", 2)];
    let val = [patient_row("p10", "s3", 3), patient_row("p12", "s4", 4)];
    let report = bench.check(&train, Some(&val), 2048);
    assert_eq!(kinds(&report), [(Severity::Error, Kind::LeakPatient, 1)]);
    let facts = report.study.as_ref().unwrap();
    assert_eq!((facts.studies, facts.patients), (4, Some(3)));
}

#[test]
fn one_image_has_one_path_however_it_is_written() {
    let bench = Bench::new();
    fs::create_dir(bench.dir.path().join("sub")).unwrap();
    let train = [
        row("1_1.png", "<image>问", "A"),
        row("sub/../1_1.png", "<image>问", "A"),
    ];
    let report = bench.check(&train, None, 2048);
    assert_eq!(report.images, 1);
    assert_eq!(
        kinds(&report),
        [
            // Two rows of one study are a reason to look.
            (Severity::Warning, Kind::Studies, 0),
            (Severity::Error, Kind::Duplicate, 2),
        ]
    );
}

#[test]
fn a_file_of_nothing_or_of_other_bytes_is_an_error() {
    let bench = Bench::new();
    let report = bench.check(&[], None, 2048);
    assert_eq!(kinds(&report), [(Severity::Error, Kind::Empty, 0)]);
    let path = bench.dir.path().join("latin.jsonl");
    fs::write(&path, b"{\"a\": \"\xe9\"}\r\n").unwrap();
    let check = Check {
        tokenizer: &bench.tokenizer,
        processor: &bench.processor,
        max_length: 9,
        opens_thinking: None,
        studies: StudyRule::Guess,
        options: DataOptions::default(),
    };
    let report = check
        .run(std::slice::from_ref(&path), &[], &|_, _| {})
        .unwrap();
    assert_eq!(kinds(&report), [(Severity::Error, Kind::Json, 1)]);
    let error = check.run(&["no/such.jsonl".into()], &[], &|_, _| {});
    assert!(error.unwrap_err().to_string().contains("no/such.jsonl"));
}
