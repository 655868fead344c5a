use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use serde_json::json;

use super::images::relative;
use super::*;
use crate::processor::patches::ImageProcessorConfig;
use crate::study::StudyRule;

mod studies;

/// Two studies with two views, two with one; the picture of `9_1` is not there.
const ANNOTATIONS: &str = r#"{"annotations": [
    {"image_id": "2_1", "caption": "心脏大小正常。"},
    {"image_id": "3_1", "caption": "肺部清晰。"},
    {"image_id": "2_2", "caption": "心脏大小正常。"},
    {"image_id": "9_1", "caption": "没有图片。"},
    {"image_id": "4_2", "caption": "左侧胸腔积液。"},
    {"image_id": "4_1", "caption": "左侧胸腔积液。"},
    {"image_id": "5_1", "caption": "没有气胸。"}
]}"#;

struct Bench {
    dir: tempfile::TempDir,
    processor: ImageProcessor,
}

impl Bench {
    fn new(corpus: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("corpus.json"), corpus).unwrap();
        fs::create_dir(dir.path().join("images")).unwrap();
        for name in [
            "2_1.png", "2_2.png", "3_1.png", "4_1.png", "4_2.jpg", "5_1.png",
        ] {
            let picture = image::GrayImage::new(64, 96);
            picture.save(dir.path().join("images").join(name)).unwrap();
        }
        let processor = ImageProcessor::new(ImageProcessorConfig::default()).unwrap();
        Self { dir, processor }
    }

    fn options(&self) -> ConvertOptions {
        ConvertOptions {
            images: Some(self.dir.path().join("images")),
            val_ratio: Some(0.2),
            split: Some(Split::Uid),
            ..ConvertOptions::new(
                self.dir.path().join("corpus.json"),
                self.dir.path().join("out"),
            )
        }
    }

    /// Converts into a folder that an earlier conversion of the same test may have filled.
    fn convert(&self, options: &ConvertOptions) -> Result<Summary, ConvertError> {
        let _ = fs::remove_dir_all(&options.output);
        convert(options, None, &self.processor, &|_, _| {})
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join("out").join(name)).unwrap()
    }

    fn rows(&self, name: &str) -> Vec<Value> {
        let text = self.read(name);
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

fn images(rows: &[Value]) -> Vec<&str> {
    rows.iter()
        .map(|row| row["images"][0].as_str().unwrap())
        .collect()
}

#[test]
fn annotations_become_rows_and_what_is_missing_is_listed() {
    let bench = Bench::new(ANNOTATIONS);
    let summary = bench.convert(&bench.options()).unwrap();
    assert_eq!(summary.form, CorpusForm::Annotations);
    assert_eq!((summary.rows_read, summary.rows_without_image), (7, 1));
    assert_eq!(summary.rows_left_out(), 1);
    assert_eq!(summary.train.rows + summary.val.rows, 6);
    assert_eq!(summary.studies_in_both, 0);
    assert_eq!(bench.read("missing.txt"), "row 4\t9_1\timage not found\n");
    let (train, val) = (bench.rows("train.jsonl"), bench.rows("val.jsonl"));
    let mut all = images(&train);
    all.extend(images(&val));
    all.sort_unstable();
    let expected = [
        "2_1.png", "2_2.png", "3_1.png", "4_1.png", "4_2.jpg", "5_1.png",
    ];
    assert_eq!(all, expected.map(|name| format!("../images/{name}")));
    for row in train.iter().chain(&val) {
        let question = row["messages"][0]["content"].as_str().unwrap();
        assert!(PROMPTS.contains(&question.strip_prefix(IMAGE_TAG).unwrap()));
        assert_eq!(row["messages"].as_array().unwrap().len(), 2);
    }
    assert_eq!(summary.questions.values().sum::<usize>(), 6);
    // 64 × 96 pixels are 2 × 3 tokens.
    assert_eq!(summary.vision_tokens.as_ref().unwrap().max, 6);
    assert_eq!(summary.image_height.as_ref().unwrap().min, 96);
    let written: Value = serde_json::from_str(&bench.read("summary.json")).unwrap();
    assert_eq!(written["train"]["rows"], summary.train.rows);
    assert!(bench.read("characters.svg").starts_with("<svg"));
    assert!(
        summary.to_string().contains("without image        1"),
        "{summary}"
    );
}

#[test]
fn studies_stay_whole_for_every_seed_and_rows_do_not() {
    let bench = Bench::new(ANNOTATIONS);
    let mut torn = 0;
    for seed in 0..20 {
        for split in [Split::Uid, Split::Image] {
            let options = ConvertOptions {
                seed,
                split: Some(split),
                ..bench.options()
            };
            let summary = bench.convert(&options).unwrap();
            let (train, val) = (bench.rows("train.jsonl"), bench.rows("val.jsonl"));
            assert!(!train.is_empty() && !val.is_empty());
            let uids = |rows: &[Value]| -> BTreeSet<String> {
                images(rows)
                    .iter()
                    .filter_map(|image| image.rsplit('/').next()?.split('_').next())
                    .map(str::to_owned)
                    .collect()
            };
            let both = uids(&train).intersection(&uids(&val)).count();
            assert_eq!(both, summary.studies_in_both);
            match split {
                Split::Uid => assert_eq!(both, 0),
                Split::Image | Split::Official => torn += both,
            }
        }
    }
    assert!(torn > 0, "by row, some study must be torn");
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
    let bench = Bench::new(ANNOTATIONS);
    let all = |seed| {
        bench
            .convert(&ConvertOptions {
                seed,
                ..bench.options()
            })
            .unwrap();
        let mut files = Vec::new();
        for entry in fs::read_dir(bench.dir.path().join("out")).unwrap() {
            let path = entry.unwrap().path();
            files.push((path.clone(), fs::read(path).unwrap()));
        }
        files.sort();
        files
    };
    let first = all(42);
    assert_eq!(first, all(42));
    assert_ne!(first, all(43));
}

#[test]
fn the_form_with_prompts_uses_base_names_of_any_system() {
    let bench = Bench::new(
        r#"[{"img": "/home/x/images2/2_1.png", "prompt": "p", "label": "一"},
            {"img": "C:\\data\\3_1.png", "prompt": "p", "label": "二"},
            {"img": "../5_1.png", "prompt": "p", "label": "三"}]"#,
    );
    let prompts = Some(vec!["这是什么？".to_owned()]);
    let summary = bench
        .convert(&ConvertOptions {
            prompts,
            val_ratio: Some(0.0),
            ..bench.options()
        })
        .unwrap();
    assert_eq!(summary.form, CorpusForm::Prompts);
    assert_eq!((summary.train.rows, summary.val.rows), (3, 0));
    assert_eq!(bench.read("val.jsonl"), "");
    for row in bench.rows("train.jsonl") {
        assert_eq!(row["messages"][0]["content"], "<image>这是什么？");
    }
}

#[test]
fn rows_of_messages_keep_what_they_have() {
    let line = |images: &str, question: &str| {
        format!(
            r#"{{"id":7,"messages":[{{"role":"system","content":"s"}},{{"role":"user","content":"{question}"}},{{"role":"assistant","content":"答"}}],"images":{images}}}"#
        )
    };
    let rows = [
        line(r#"["images/2_1.png","images/2_2.png"]"#, "<image><image>问"),
        line(r#"[{"path":"images/3_1.png"}]"#, "<image>问"),
        line(r#"["images/4_1.png"]"#, "问"),
    ];
    let bench = Bench::new(&rows.join("\n"));
    let options = ConvertOptions {
        images: None,
        val_ratio: Some(0.0),
        ..bench.options()
    };
    let summary = bench.convert(&options).unwrap();
    assert_eq!(summary.form, CorpusForm::Messages);
    assert_eq!((summary.questions_kept, summary.questions.len()), (3, 0));
    let rows = bench.rows("train.jsonl");
    let two = rows
        .iter()
        .find(|row| row["images"].as_array().unwrap().len() == 2);
    let two = two.unwrap();
    assert_eq!(two["id"], 7);
    assert_eq!(two["images"][1], "../images/2_2.png");
    assert_eq!(two["messages"][1]["content"], "<image><image>问");
    let prompts = Some(vec!["新".to_owned()]);
    bench
        .convert(&ConvertOptions { prompts, ..options })
        .unwrap();
    for row in bench.rows("train.jsonl") {
        let marks = IMAGE_TAG.repeat(row["images"].as_array().unwrap().len());
        assert_eq!(row["messages"][1]["content"], format!("{marks}新"));
        assert_eq!(row["messages"][0]["content"], "s");
    }
}

#[test]
fn a_row_with_two_studies_keeps_both_together() {
    let row = |images: &str| {
        format!(
            r#"{{"messages":[{{"role":"user","content":"问"}},{{"role":"assistant","content":"答"}}],"images":{images}}}"#
        )
    };
    let rows = [
        row(r#"["2_1.png"]"#),
        row(r#"["3_1.png"]"#),
        row(r#"["2_2.png","3_1.png"]"#),
        row(r#"["4_1.png"]"#),
    ];
    let bench = Bench::new(&rows.join("\n"));
    for seed in 0..10 {
        let summary = bench
            .convert(&ConvertOptions {
                seed,
                val_ratio: Some(0.3),
                ..bench.options()
            })
            .unwrap();
        let sizes = (summary.train.rows, summary.val.rows);
        assert!(sizes == (3, 1) || sizes == (1, 3), "{sizes:?}");
    }
}

#[test]
fn reasoning_comes_before_the_answer_and_rows_without_are_listed() {
    let bench = Bench::new(ANNOTATIONS);
    let path = bench.dir.path().join("thinking.jsonl");
    for text in [
        "{\"image_id\":\"2_1\",\"thinking\":\"先看心脏。\\n\",\"answer\":\"心脏正常。\"}\n{\"image_id\":\"3_1.png\",\"thinking\":\"再看肺。\"}\n{\"image_id\":\"77_1\",\"thinking\":\"无。\"}\n",
        r#"{"2_1":{"thinking":"先看心脏。","answer":"心脏正常。"},"3_1":"再看肺。","77_1":"无。"}"#,
        r#"[{"image_id":"2_1","thinking":"先看心脏。","answer":"心脏正常。"},{"image_id":"3_1","thinking":"再看肺。"},{"image_id":"77_1","thinking":"无。"}]"#,
    ] {
        fs::write(&path, text).unwrap();
        let thinking = Some(path.clone());
        let summary = bench
            .convert(&ConvertOptions {
                thinking,
                val_ratio: Some(0.0),
                ..bench.options()
            })
            .unwrap();
        assert_eq!(summary.rows_without_thinking, 4);
        assert_eq!(summary.thinking_unused, ["77_1"]);
        let mut answers: Vec<String> = bench
            .rows("train.jsonl")
            .iter()
            .map(|row| row["messages"][1]["content"].as_str().unwrap().to_owned())
            .collect();
        answers.sort();
        let expected = [
            "<think>\n先看心脏。\n</think>\n\n心脏正常。",
            "<think>\n再看肺。\n</think>\n\n肺部清晰。",
        ];
        assert_eq!(answers, expected);
        let missing = bench.read("missing.txt");
        assert!(
            missing.contains("row 3\t2_2\tno reasoning for this image\n"),
            "{missing}"
        );
        assert_eq!(missing.lines().count(), 5);
    }
    fs::write(&path, r#"[{"image_id":"2_1","thinking":"a</think>"}]"#).unwrap();
    let thinking = Some(path.clone());
    let error = bench
        .convert(&ConvertOptions {
            thinking,
            ..bench.options()
        })
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("thinking.jsonl` row 1: `thinking`"),
        "{error}"
    );
}

#[test]
fn a_damaged_image_is_listed_with_its_reason() {
    let bench = Bench::new(ANNOTATIONS);
    fs::write(bench.dir.path().join("images/3_1.png"), b"no picture").unwrap();
    let summary = bench.convert(&bench.options()).unwrap();
    assert_eq!(summary.rows_with_unusable_image, 1);
    let missing = bench.read("missing.txt");
    assert!(
        missing.starts_with("row 2\t3_1\timage cannot be used: "),
        "{missing}"
    );
}

#[test]
fn wrong_input_is_named() {
    let bench = Bench::new(ANNOTATIONS);
    let options = bench.options();
    let corpus = bench.dir.path().join("corpus.json");
    let message = |text: &str, options: &ConvertOptions| {
        fs::write(&corpus, text).unwrap();
        bench.convert(options).unwrap_err().to_string()
    };
    for (text, words) in [
        ("{", "row 1: not JSON"),
        ("3", "row 1: found a number"),
        ("[]", "holds no row"),
        (r#"{"annotations": []}"#, "holds no row"),
        (
            r#"{"annotations": [{"image_id": "2_1"}]}"#,
            "row 1: `caption`",
        ),
        (
            r#"[{"img": "2_1.png", "label": "一"}, {"img": "3_1.png", "label": 7}]"#,
            "row 2: `label`",
        ),
        (
            r#"{"annotations": [{"image_id": "2_1", "caption": "<image>"}]}"#,
            "without `<image>`",
        ),
        (
            r#"{"annotations": [{"image_id": "8_1", "caption": "一"}]}"#,
            "none of 1 row of",
        ),
        (
            r#"{"annotations": [{"image_id": "2_1", "caption": "一"}]}"#,
            "all of 1 row;",
        ),
        (
            r#"{"annotations": [{"image_id": "2_1", "caption": "一"}, {"image_id": "2_2", "caption": "一"}]}"#,
            "all of 1 study",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "q"}]}"#,
            "an answer at the end",
        ),
    ] {
        let error = message(text, &options);
        assert!(error.contains(words), "{error}");
    }
    // Without a folder of images they are looked for where the corpus is.
    let without = ConvertOptions {
        images: None,
        ..options.clone()
    };
    fs::write(&corpus, ANNOTATIONS).unwrap();
    assert_eq!(bench.convert(&without).unwrap().rows_without_image, 1);
    let elsewhere = ConvertOptions {
        images: Some("no/such".into()),
        ..options.clone()
    };
    assert!(message(ANNOTATIONS, &elsewhere).contains("`no/such` is not a folder"));
    let ratio = ConvertOptions {
        val_ratio: Some(1.0),
        ..options.clone()
    };
    assert!(message(ANNOTATIONS, &ratio).contains("val_ratio is 1"));
    let none = ConvertOptions {
        prompts: Some(Vec::new()),
        ..options.clone()
    };
    assert!(message(ANNOTATIONS, &none).contains("questions is empty"));
}

#[test]
fn rows_of_other_keys_are_read_by_naming_them() {
    let corpora = [
        r#"{"train": [{"id": "CXR0", "report": "一", "image_path": ["CXR0/0.png", "CXR0/1.png"], "split": "train"}],
            "val": [{"id": "CXR1", "report": "二", "image_path": ["CXR1/0.png"], "split": "val"}]}"#,
        "{\"report\": \"一\", \"image_path\": [\"CXR0/0.png\", \"CXR0/1.png\"]}\n{\"report\": \"二\", \"image_path\": \"CXR1/0.png\", \"age\": 50}",
    ];
    for (corpus, unused) in corpora.into_iter().zip([0, 1]) {
        let bench = Bench::new(corpus);
        for name in ["CXR0/0.png", "CXR0/1.png", "CXR1/0.png"] {
            let path = bench.dir.path().join("images").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            image::GrayImage::new(64, 96).save(path).unwrap();
        }
        let keys = Some(CorpusKeys {
            image: "image_path".into(),
            report: "report".into(),
        });
        let options = ConvertOptions {
            keys,
            val_ratio: Some(0.0),
            ..bench.options()
        };
        let summary = bench.convert(&options).unwrap();
        assert_eq!(
            (summary.form, summary.train.rows, summary.train.studies),
            (CorpusForm::Keys, 2, 2)
        );
        let rows = bench.rows("train.jsonl");
        let two = rows
            .iter()
            .find(|row| row["messages"][1]["content"] == "一")
            .unwrap();
        assert_eq!(two["images"].as_array().unwrap().len(), 2);
        assert!(
            two["messages"][0]["content"]
                .as_str()
                .unwrap()
                .starts_with("<image><image>")
        );
        // A key that is not used is reported.
        let warnings = summary
            .warnings
            .iter()
            .filter(|line| line.contains("`age` of 1 row says nothing"));
        assert_eq!(warnings.count(), unused);
    }
    let bench = Bench::new("a,b\n");
    let table = bench.dir.path().join("table.csv");
    fs::write(&table, "spam,eggs\n1,2\n").unwrap();
    let options = ConvertOptions {
        input: table,
        ..bench.options()
    };
    let error = bench.convert(&options).unwrap_err().to_string();
    assert!(
        error.contains("the columns `spam,eggs`") && error.contains("a column of images"),
        "{error}"
    );
}

#[test]
fn much_missing_is_a_warning_of_the_result() {
    let bench = Bench::new(ANNOTATIONS);
    let summary = bench.convert(&bench.options()).unwrap();
    // 1 of 7 rows.
    let warning = "1 of 7 rows have no image";
    assert!(summary.warnings[0].starts_with(warning), "{summary}");
    let written: Value = serde_json::from_str(&bench.read("summary.json")).unwrap();
    assert!(
        written["warnings"][0]
            .as_str()
            .unwrap()
            .starts_with(warning)
    );
    assert!(
        summary.to_string().contains("\nwarning: 1 of 7"),
        "{summary}"
    );
}

#[test]
fn a_folder_that_holds_something_is_refused() {
    let bench = Bench::new(ANNOTATIONS);
    let options = bench.options();
    bench.convert(&options).unwrap();
    let before = bench.read("train.jsonl");
    let error = convert(&options, None, &bench.processor, &|_, _| {}).unwrap_err();
    assert!(
        error.to_string().contains("is not an empty folder"),
        "{error}"
    );
    assert_eq!(bench.read("train.jsonl"), before);
}

#[test]
fn paths_are_relative_where_folders_share_something() {
    let relative = |path: &str, folder: &str| {
        relative(Path::new(path), Path::new(folder))
            .to_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(relative("/d/out/images/a.png", "/d/out"), "images/a.png");
    assert_eq!(
        relative("/d/images/a.png", "/d/out/x"),
        "../../images/a.png"
    );
    assert_eq!(relative("/e/a.png", "/d/out"), "/e/a.png");
}

#[test]
fn spreads_are_of_values_that_occur() {
    assert_eq!(Spread::of(&[]), None);
    let spread = Spread::of(&(1..=101).collect::<Vec<_>>()).unwrap();
    let places = (
        spread.min, spread.p5, spread.p50, spread.p95, spread.p99, spread.max,
    );
    assert_eq!(places, (1, 6, 51, 96, 100, 101));
    assert_eq!((spread.mean, spread.total, spread.count), (51.0, 5151, 101));
}
