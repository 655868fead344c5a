//! Terms, accepted places and corpus files, checked by hand-made rows and by the counts of the corpus.

use std::{collections::BTreeMap, env, fs, path::PathBuf, time::Instant};

use super::*;

fn row(text: &str) -> CorpusReport {
    CorpusReport {
        file: "a.json".into(),
        row: 0,
        id: "7_1".into(),
        text: text.into(),
        source: None,
    }
}

fn corrected(row: &CorpusReport) -> String {
    let defects = find_defects(std::slice::from_ref(row));
    let corrections = apply(std::slice::from_ref(row), &defects).expect("fits");
    corrections
        .first()
        .map_or_else(|| row.text.clone(), |correction| correction.after.clone())
}

#[test]
fn each_known_mistranslation_gets_its_word() {
    for (before, after) in [
        ("没有积液或气孔。", "没有积液或气胸。"),
        ("没有局灶性合并症。", "没有局灶性实变。"),
        ("没有病灶巩固。", "没有病灶实变。"),
        ("右肺固结。", "右肺实变。"),
        ("没有空隙合并。", "没有气腔实变。"),
        ("左肺气隙疾病。", "左肺气腔疾病。"),
        ("胸骨后空隙增大。", "胸骨后间隙增大。"),
        ("轻度无气症。", "轻度肺不张。"),
        ("条纹状无气肿。", "条纹状肺不张。"),
        ("少许漏气。", "少许肺不张。"),
        ("左底无渗漏。", "左底肺不张。"),
        ("板状无脑症。", "板状肺不张。"),
        ("少许漏斗。", "少许肺不张。"),
        ("左肺瘢痕或无气胸。", "左肺瘢痕或肺不张。"),
        ("不透明表明有无肺水肿。", "不透明表明有肺不张。"),
        ("没有可疑的肺不张。", "没有可疑的肺部阴影。"),
        ("纵隔轮廓不明显。", "纵隔轮廓未见异常。"),
        ("稳定的心肌肿大。", "稳定的心脏增大。"),
        ("胸椎左旋肉碱症。", "胸椎侧弯。"),
        ("中度左旋肉芽肿。", "中度侧弯。"),
        ("胸椎轻度脱臼。", "胸椎轻度侧弯。"),
        ("胸椎轻度脱位。", "胸椎轻度侧弯。"),
        ("左侧肋骨变钝。", "左侧肋膈角变钝。"),
        ("小的食堂疝气。", "小的食管裂孔疝。"),
        ("纵膈正常。", "纵隔正常。"),
    ] {
        assert_eq!(corrected(&row(before)), after);
    }
}

#[test]
fn what_a_reader_must_decide_is_reported_and_left() {
    for (text, defect) in [
        ("心影正常，建议随访。", "advice"),
        ("请咨询医生。", "advice"),
        ("您的心脏正常。", "speaks_to_reader"),
        ("作为一个人工智能，我不能诊断。", "speaks_as_ai"),
        ("与之前对比无变化。", "comparison"),
        ("右侧PICC导管。", "latin_words"),
        ("Primordial导管。", "latin_words"),
        ("与XXXX的影像相似。", "anonymisation_mark"),
        ("心影正常,肺野清晰。", "ascii_punctuation"),
        ("心影正常", "no_final_stop"),
        ("没有病灶性气孔病变。", "pneumothorax_as_stoma"),
    ] {
        let found = find_defects(&[row(text)]);
        let found = found.iter().find(|found| found.defect == defect);
        let found = found.unwrap_or_else(|| panic!("{defect} in {text}"));
        assert_eq!(found.after, None, "{text}");
        assert_eq!(corrected(&row(text)), text);
    }
    assert_eq!(corrected(&row("心影  正常。")), "心影 正常。");
}

#[test]
fn lines_that_are_right_stay_byte_for_byte() {
    let right = r#"{"images": ["x/8_1.png"],  "messages": [{"role":"user","content":"<image>?"},{"role":"assistant","content":"心影正常。"}]}"#;
    let wrong = r#"{"messages":[{"role":"user","content":"纵膈?"},{"role":"assistant","content":"纵膈正常。"}],"images":[{"path":"x/9_2.png"}]}"#;
    let text = format!("{right}\r\n\n{wrong}\n");
    let rows = read_rows("a.jsonl", &text, &BTreeMap::new()).expect("rows");
    let places: Vec<(usize, &str)> = rows.iter().map(|row| (row.row, row.id.as_str())).collect();
    assert_eq!(places, [(0, "8_1"), (2, "9_2")]);
    let corrections = apply(&rows, &find_defects(&rows)).expect("fits");
    let written = correct_json("a.jsonl", &text, &corrections).expect("json");
    // The question is the asker's, and stays.
    let mended = wrong.replace("纵膈正常", "纵隔正常");
    assert_eq!(written, format!("{right}\r\n\n{mended}\n"));
    let no_answer = r#"{"messages":[{"role":"user","content":"?"}]}"#;
    let error = read_rows("a.jsonl", no_answer, &BTreeMap::new()).expect_err("no answer");
    assert!(error.to_string().contains("row 1"), "{error}");
}

#[test]
fn right_words_stay() {
    for text in [
        "无气胸。",
        "漏斗胸。",
        "右肩脱位。",
        "气胸不明显。",
        "肋骨完整。",
        "肺炎合并积液。",
        "肺水肿。",
    ] {
        assert_eq!(corrected(&row(text)), text);
    }
}

#[test]
fn the_source_decides_on_edema() {
    let with = |source: &str| {
        corrected(&CorpusReport {
            source: Some(source.into()),
            ..row("左底肺水肿。")
        })
    };
    assert_eq!(with("Left basal atelectasis."), "左底肺不张。");
    assert_eq!(with("Pulmonary edema."), "左底肺水肿。");
    let doubtful = CorpusReport {
        source: Some("Opacity.".into()),
        ..row("左底肺水肿。")
    };
    assert!(
        find_defects(&[doubtful])
            .iter()
            .all(|defect| defect.after.is_none())
    );
}

#[test]
fn only_accepted_places_change() {
    let rows = [row("纵膈正常，没有气孔。")];
    let defects = find_defects(&rows);
    assert_eq!(defects.len(), 2);
    let corrections = apply(&rows, &defects[..1]).expect("fits");
    assert_eq!(corrections[0].after, "纵隔正常，没有气孔。");
    assert!(apply(&rows, &[]).expect("nothing").is_empty());
}

#[test]
fn stale_and_overlapping_defects_are_refused() {
    let rows = [row("纵膈正常。")];
    let defects = find_defects(&rows);
    assert!(matches!(
        apply(&[row("心影正常。")], &defects),
        Err(CleanError::TextChanged { .. })
    ));
    assert!(matches!(
        apply(&[], &defects),
        Err(CleanError::NoSuchRow { .. })
    ));
    let twice = [defects[0].clone(), defects[0].clone()];
    assert!(matches!(
        apply(&rows, &twice),
        Err(CleanError::Overlap { .. })
    ));
}

#[test]
fn a_corrected_file_keeps_its_schema() {
    let json = r#"[{"img":"/x/7_1.png","prompt":"?","label":"纵膈正常。"}]"#;
    let rows = read_rows("b.json", json, &BTreeMap::new()).expect("rows");
    assert_eq!(rows[0].id, "7_1");
    let corrections = apply(&rows, &find_defects(&rows)).expect("fits");
    let written = correct_json("b.json", json, &corrections).expect("json");
    assert_eq!(
        read_rows("b.json", &written, &BTreeMap::new()).expect("rows")[0].text,
        "纵隔正常。"
    );
    assert!(unified_diff(&corrections).ends_with("@@ -1 +1 @@ 7_1\n-纵膈正常。\n+纵隔正常。\n"));
    assert_eq!(to_jsonl(&corrections).expect("lines").lines().count(), 1);
    let schema_a = r#"{"annotations":[{"image_id":"7_1","caption":"纵膈。"}]}"#;
    assert_eq!(
        read_rows("a.json", schema_a, &BTreeMap::new()).expect("rows")[0].text,
        "纵膈。"
    );
    assert!(matches!(
        read_rows("c.json", "[{}]", &BTreeMap::new()),
        Err(CleanError::Schema { row: 0, .. })
    ));
}

/// Rows and studies that the description of the corpus states.
const STATED: [(&str, usize, usize); 24] = [
    ("pneumothorax_as_stoma", 114, 62),
    ("consolidation_as_comorbidity", 338, 175),
    ("consolidation_as_strengthening", 436, 226),
    ("consolidation_as_hardening", 716, 371),
    ("airspace_as_gap", 1001, 531),
    ("airspace_as_air_gap", 398, 207),
    ("atelectasis_as_airless", 56, 27),
    ("atelectasis_as_no_emphysema", 56, 30),
    ("atelectasis_as_no_leak", 36, 20),
    ("atelectasis_as_anencephaly", 21, 12),
    ("suspicious_opacity_as_atelectasis", 87, 46),
    ("cardiomegaly_as_swollen_myocardium", 44, 24),
    ("scoliosis_as_carnitine", 19, 9),
    ("hiatal_hernia_as_canteen", 4, 3),
    ("mediastinum_spelling", 980, 515),
    ("latin_words", 397, 208),
    ("anonymisation_mark", 2, 1),
    ("advice", 636, 326),
    ("speaks_to_reader", 60, 30),
    ("speaks_as_ai", 3, 3),
    ("atelectasis_as_leak", 33, 18),
    ("atelectasis_as_no_pneumothorax", 11, 5),
    ("scoliosis_as_dislocation", 33, 19),
    ("costophrenic_as_ribs", 63, 33),
];

/// The last ones of [`STATED`] depend on where the context is drawn; they are only near.
const EXACT: usize = 20;

#[test]
#[ignore = "needs XRAY_OPENI_DIR, the folder of real films and reports"]
fn the_corpus_has_the_stated_defects() {
    let folder = env::var_os("XRAY_OPENI_DIR")
        .map(PathBuf::from)
        .expect("XRAY_OPENI_DIR is set");
    let read = |name: &str, sources: &BTreeMap<String, String>| {
        let json = fs::read_to_string(folder.join(name)).expect("corpus file");
        (read_rows(name, &json, sources).expect("rows"), json)
    };
    let (english, _) = read("openi-en.json", &BTreeMap::new());
    let sources = english.into_iter().map(|row| (row.id, row.text)).collect();
    let (rows, json) = read("openi-zh-prompt.json", &sources);
    let started = Instant::now();
    let defects = find_defects(&rows);
    let corrections = apply(&rows, &defects).expect("fits");
    let seconds = started.elapsed().as_secs_f64();
    let counts = count_defects(&defects);
    eprintln!(
        "{} rows, {} defects, {} rows corrected in {seconds:.2} s",
        rows.len(),
        defects.len(),
        corrections.len()
    );
    for (name, count) in &counts {
        let stated = STATED
            .iter()
            .find(|stated| stated.0 == name)
            .map(|stated| (stated.1, stated.2));
        eprintln!("  {name}: {count:?}, stated {stated:?}");
    }
    for (n, (name, rows, studies)) in STATED.into_iter().enumerate() {
        let count = counts.get(name).copied().unwrap_or_default();
        if n < EXACT {
            assert_eq!((count.rows, count.studies), (rows, studies), "{name}");
        } else {
            assert!(
                count.rows * 5 >= rows * 3 && count.rows * 3 <= rows * 5,
                "{name}: {count:?}"
            );
        }
    }
    let written = correct_json("openi-zh-prompt.json", &json, &corrections).expect("json");
    let (again, _) = (
        read_rows("openi-zh-prompt.json", &written, &sources).expect("rows"),
        (),
    );
    let left = count_defects(&find_defects(&again));
    for name in [
        "consolidation_as_hardening",
        "airspace_as_gap",
        "mediastinum_spelling",
        "scoliosis_as_carnitine",
    ] {
        assert!(!left.contains_key(name), "{name} is left: {:?}", left[name]);
    }
}
