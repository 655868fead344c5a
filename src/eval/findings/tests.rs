//! The labeler against hand-labelled sentences and against the Indiana labels.

mod reports;

use std::{collections::BTreeMap, env, fs, path::PathBuf, time::Instant};

use serde::Deserialize;

use super::{
    mesh::{compare_with_mesh, read_mesh_labels},
    score::{ClassCounts, macro_average, micro},
    *,
};

#[derive(Deserialize)]
struct Sentence {
    id: usize,
    split: String,
    text: String,
    labels: BTreeMap<Finding, Gold>,
}

#[derive(Deserialize)]
struct Gold {
    status: Status,
    laterality: Option<Laterality>,
    severity: Option<Severity>,
}

struct SplitScore {
    strict_macro: f64,
    positive_macro: f64,
    sides: (usize, usize),
}

/// Scores a split: strict wants the very status (absent and uncertain too), positive counts doubt as present.
fn score_split(split: &str) -> SplitScore {
    let text = include_str!("../../../tests/fixtures/findings/sentences.jsonl");
    let sentences: Vec<Sentence> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("sentence"))
        .filter(|s: &Sentence| s.split == split)
        .collect();
    let mut strict: BTreeMap<Finding, ClassCounts> = BTreeMap::new();
    let mut positive: BTreeMap<Finding, ClassCounts> = BTreeMap::new();
    let (mut sides, mut degrees) = ((0, 0), (0, 0));
    for sentence in &sentences {
        let read = Labeler::openi().label(&sentence.text);
        for finding in Finding::ALL {
            let gold = sentence.labels.get(&finding);
            let truth = gold.map_or(Status::NotMentioned, |gold| gold.status);
            let found = read.status(finding);
            let counts = strict.entry(finding).or_default();
            if truth == found && truth != Status::NotMentioned {
                counts.true_positive += 1;
            } else if truth != found {
                counts.false_negative += usize::from(truth != Status::NotMentioned);
                counts.false_positive += usize::from(found != Status::NotMentioned);
                eprintln!(
                    "{split} {} {finding}: want {truth:?}, read {found:?}: {}",
                    sentence.id, sentence.text
                );
            }
            let policy = UncertainPolicy::AsPresent;
            positive.entry(finding).or_default().add(
                policy.positive(finding, truth),
                policy.positive(finding, found),
            );
            if let (Some(gold), Some(label)) = (gold, read.get(finding))
                && truth == found
                && truth > Status::Absent
            {
                if gold.laterality.is_some() || label.laterality.is_some() {
                    sides.1 += 1;
                    sides.0 += usize::from(gold.laterality == label.laterality);
                    if gold.laterality != label.laterality {
                        eprintln!(
                            "{split} {} {finding}: want {:?}, read {:?}: {}",
                            sentence.id, gold.laterality, label.laterality, sentence.text
                        );
                    }
                }
                if gold.severity.is_some() || label.severity.is_some() {
                    degrees.1 += 1;
                    degrees.0 += usize::from(gold.severity == label.severity);
                    if gold.severity != label.severity {
                        eprintln!(
                            "{split} {} {finding}: want {:?}, read {:?}: {}",
                            sentence.id, gold.severity, label.severity, sentence.text
                        );
                    }
                }
            }
        }
    }
    eprintln!(
        "{split}: {} sentences, sides {sides:?}, degrees {degrees:?}",
        sentences.len()
    );
    for (name, counts) in [("status", &strict), ("positive", &positive)] {
        eprintln!(
            "  {name}: macro {:.3?} micro {:.3?}",
            macro_average(counts.values()),
            micro(counts.values())
        );
    }
    for (finding, counts) in &strict {
        eprintln!(
            "  {finding}: {counts:?} f1 {:.3}",
            counts.f1().unwrap_or(0.0)
        );
    }
    SplitScore {
        strict_macro: macro_average(strict.values()).f1,
        positive_macro: macro_average(positive.values()).f1,
        sides,
    }
}

fn is_read_right(split: &str) {
    let result = score_split(split);
    assert!(result.strict_macro >= 0.90 && result.positive_macro >= 0.90);
    let (right, all) = result.sides;
    assert!(right * 10 >= all * 9, "sides {right} of {all}");
}

#[test]
fn development_sentences_are_read_right() {
    is_read_right("development");
}

#[test]
fn held_out_sentences_are_read_right() {
    is_read_right("held_out");
}

#[test]
fn every_known_mistranslation_is_understood() {
    use Finding as F;
    use Status::{Absent, Present, Uncertain};
    let cases = [
        ("没有胸腔积液或气孔。", F::Pneumothorax, Absent),
        ("左侧少量气孔。", F::Pneumothorax, Present),
        ("右下叶有合并症。", F::Consolidation, Present),
        ("没有病灶巩固的证据。", F::Consolidation, Absent),
        ("左肺有固结。", F::Consolidation, Present),
        ("无局灶性空隙合并。", F::Consolidation, Absent),
        ("右肺底有空隙疾病。", F::LungOpacity, Present),
        ("没有看到气隙不透明。", F::LungOpacity, Absent),
        ("左肺底无气症。", F::Atelectasis, Present),
        ("双肺底条纹状的无气肿。", F::Atelectasis, Present),
        ("右肺底轻微漏气。", F::Atelectasis, Present),
        ("左肺中段无渗漏。", F::Atelectasis, Present),
        ("节段下无脑症。", F::Atelectasis, Present),
        ("左肺底极少的漏斗。", F::Atelectasis, Present),
        ("右肺下叶节段下无气胸。", F::Atelectasis, Present),
        ("条状不透明表明有无肺水肿。", F::Atelectasis, Present),
        ("没有发现无气症。", F::Atelectasis, Absent),
        ("没有可疑的肺不张。", F::LungOpacity, Absent),
        ("心脏不明显。", F::Cardiomegaly, Absent),
        ("稳定的心肌肿大。", F::Cardiomegaly, Present),
        ("胸椎左旋肉碱。", F::Scoliosis, Present),
        ("中度左旋肉芽肿。", F::Scoliosis, Present),
        ("胸椎轻度脱位。", F::Scoliosis, Present),
        ("腰椎脱臼现象。", F::Scoliosis, Present),
        ("双侧肋骨变钝。", F::PleuralEffusion, Uncertain),
        ("小的食堂疝气。", F::Hernia, Present),
        ("纵膈增宽。", F::EnlargedCardiomediastinum, Present),
        ("纵隔增宽。", F::EnlargedCardiomediastinum, Present),
    ];
    for (text, finding, status) in cases {
        let read = Labeler::openi().label(text);
        assert_eq!(
            read.status(finding),
            status,
            "{finding} in {text}: {read:?}"
        );
    }
}

#[test]
fn a_mistranslation_is_nothing_else() {
    use Finding as F;
    for (text, finding) in [
        ("中度左旋肉芽肿。", F::Granuloma),
        ("右肺下叶节段下无气胸。", F::Pneumothorax),
        ("左肺底有无肺水肿。", F::Edema),
        ("左肺底无气肿。", F::Emphysema),
        ("没有可疑的肺不张。", F::Atelectasis),
        ("右肩脱位。", F::Scoliosis),
        ("漏斗胸。", F::Atelectasis),
        ("胸骨后空隙增大。", F::LungOpacity),
        ("左侧气胸，外带透亮度增加。", F::Emphysema),
    ] {
        assert_eq!(
            Labeler::openi().label(text).status(finding),
            Status::NotMentioned,
            "{finding} in {text}"
        );
    }
    assert_eq!(
        Labeler::openi().label("无气胸。").status(F::Pneumothorax),
        Status::Absent
    );
}

#[test]
fn evidence_is_the_words_themselves() {
    let report = "心影不大。右侧少量胸腔积液，未见气胸。";
    let read = Labeler::openi().label(report);
    let words = |finding| {
        read.get(finding)
            .and_then(|l| l.evidence.clone())
            .map(|span| &report[span])
    };
    assert_eq!(words(Finding::Pneumothorax), Some("气胸"));
    assert!(words(Finding::PleuralEffusion).is_some_and(|w| w.contains("积液")));
    let effusion = read.get(Finding::PleuralEffusion).expect("effusion");
    assert_eq!(
        (effusion.laterality, effusion.severity),
        (Some(Laterality::Right), Some(Severity::Mild))
    );
}

#[test]
fn odd_text_is_no_trouble() {
    for text in [
        "",
        "。",
        "，，。",
        "？",
        "无",
        "未见",
        "abc 气胸",
        "🫁气胸？但",
        "未见。\n\n气胸",
        "疑",
        "左右",
    ] {
        let read = Labeler::openi().label(text);
        assert!(
            read.mentions
                .iter()
                .all(|m| text.is_char_boundary(m.span.start) && m.span.end <= text.len())
        );
    }
}

#[derive(Deserialize)]
struct CorpusRow {
    img: String,
    label: String,
}

#[test]
#[ignore = "needs XRAY_OPENI_DIR, the folder of real films and reports"]
fn the_corpus_agrees_with_its_mesh_labels() {
    let folder = env::var_os("XRAY_OPENI_DIR")
        .map(PathBuf::from)
        .expect("XRAY_OPENI_DIR is set");
    let rows: Vec<CorpusRow> = serde_json::from_str(
        &fs::read_to_string(folder.join("openi-zh-prompt.json")).expect("corpus"),
    )
    .expect("rows");
    let labels =
        read_mesh_labels(&fs::read_to_string(folder.join("indiana_reports.csv")).expect("labels"))
            .expect("labels");
    let reports = rows.iter().filter_map(|row| {
        let name = row.img.rsplit('/').next()?;
        Some((name.split('_').next()?.parse().ok()?, row.label.as_str()))
    });
    let reports: Vec<(u32, &str)> = reports.collect();
    let started = Instant::now();
    let all: usize = rows
        .iter()
        .map(|row| Labeler::openi().label(&row.label).mentions.len())
        .sum();
    let seconds = started.elapsed().as_secs_f64();
    let agreement = compare_with_mesh(
        Labeler::openi(),
        &labels,
        reports.iter().copied(),
        UncertainPolicy::AsPresent,
    );
    eprintln!(
        "{} rows, {all} mentions in {seconds:.2} s\n{} studies\n{}",
        rows.len(),
        agreement.studies,
        agreement.to_markdown()
    );
    assert_eq!(rows.len(), reports.len());
    if let Some(show) = env::var("XRAY_SHOW_DISAGREEMENT")
        .ok()
        .and_then(|key| Finding::ALL.into_iter().find(|f| f.key() == key))
    {
        let mut seen = std::collections::BTreeSet::new();
        for (uid, text) in &reports {
            let Some(truth) = labels.get(uid).filter(|_| seen.insert(*uid)) else {
                continue;
            };
            let (want, read) = (
                truth.get(&show).copied().unwrap_or_default(),
                Labeler::openi().label(text).status(show),
            );
            if (want >= Status::Uncertain) != (read >= Status::Uncertain) {
                eprintln!("{uid} want {want:?} read {read:?}: {text}");
            }
        }
    }
    assert!(
        agreement.macro_average.f1 > 0.6,
        "{:?}",
        agreement.macro_average
    );
}

#[derive(Deserialize)]
struct EnglishRow {
    uid: u32,
    findings: String,
    impression: String,
}

#[test]
#[ignore = "needs XRAY_OPENI_DIR, the folder of real films and reports"]
fn english_reports_agree_with_their_mesh_labels() {
    let folder = env::var_os("XRAY_OPENI_DIR")
        .map(PathBuf::from)
        .expect("XRAY_OPENI_DIR is set");
    let text = fs::read_to_string(folder.join("indiana_reports.csv")).expect("reports");
    let labels = read_mesh_labels(&text).expect("labels");
    let rows: Vec<(u32, String)> = csv::Reader::from_reader(text.as_bytes())
        .deserialize()
        .map(|row: Result<EnglishRow, _>| row.expect("a row"))
        .filter(|row| !row.findings.is_empty() || !row.impression.is_empty())
        .map(|row| {
            let report = format!("FINDINGS: {}\nIMPRESSION: {}", row.findings, row.impression);
            (row.uid, report)
        })
        .collect();
    let started = Instant::now();
    for policy in [UncertainPolicy::AsPresent, UncertainPolicy::AsAbsent] {
        let reports = rows.iter().map(|(uid, text)| (*uid, text.as_str()));
        let agreement = compare_with_mesh(Labeler::english(), &labels, reports, policy);
        eprintln!(
            "{policy:?}: {} studies\n{}",
            agreement.studies,
            agreement.to_markdown()
        );
        assert!(
            agreement.macro_average.f1 > 0.75,
            "{:?}",
            agreement.macro_average
        );
    }
    eprintln!(
        "{} reports twice in {:.2} s",
        rows.len(),
        started.elapsed().as_secs_f64()
    );
}

#[test]
fn english_lists_carry_their_denial_and_others_do_not() {
    use Finding as F;
    use Status::{Absent, NotMentioned, Present, Uncertain};
    let cases = [
        (
            "No effusion, suspicious pulmonary opacity, or pneumothorax.",
            F::Pneumothorax,
            Absent,
        ),
        (
            "No edema, effusion or airspace consolidation to suggest pneumonia.",
            F::Consolidation,
            Absent,
        ),
        (
            "No pneumothorax, small left effusion.",
            F::PleuralEffusion,
            Present,
        ),
        (
            "Effusion, edema, and masses are not seen.",
            F::PleuralEffusion,
            Absent,
        ),
        (
            "May represent edema, atelectasis, or early pneumonia.",
            F::Pneumonia,
            Uncertain,
        ),
        ("PNEUMOTHORAX: None.", F::Pneumothorax, Absent),
        (
            "Pneumothorax: No. Effusion: small.",
            F::PleuralEffusion,
            Present,
        ),
        ("Massive effusion.", F::LungLesion, NotMentioned),
        ("Opacities; 1.5 cm NODULES.", F::LungLesion, Present),
        ("Ill-defined air-space\nopacities.", F::LungOpacity, Present),
        (
            "HISTORY: pneumonia. FINDINGS: Clear lungs.",
            F::Pneumonia,
            NotMentioned,
        ),
        (
            "There is no change in the right effusion.",
            F::PleuralEffusion,
            Present,
        ),
        (
            "No blunting of the costophrenic angles.",
            F::PleuralEffusion,
            Absent,
        ),
        (
            "Blunted left costophrenic angle.",
            F::PleuralEffusion,
            Uncertain,
        ),
    ];
    for (text, finding, status) in cases {
        let read = Labeler::english().label(text);
        assert_eq!(
            read.status(finding),
            status,
            "{finding} in {text}: {read:?}"
        );
    }
    let read = Labeler::english().label("Moderate left and small right pleural effusions.");
    let effusion = read.get(F::PleuralEffusion).expect("an effusion");
    assert_eq!(effusion.laterality, Some(Laterality::Bilateral));
}

#[test]
fn a_second_finding_has_the_places_of_the_first() {
    let side = |text: &str, finding: Finding| {
        let read = Labeler::hospital().label(text);
        read.get(finding).and_then(|label| label.laterality)
    };
    let both = Some(Laterality::Bilateral);
    assert_eq!(
        side(
            "右肺中叶及左肺舌叶慢性炎症、部分不张。",
            Finding::Atelectasis
        ),
        both
    );
    let left = Some(Laterality::Left);
    assert_eq!(
        side("左下肺小片状影，结核？炎症？", Finding::Pneumonia),
        left
    );
    assert_eq!(
        side("右侧气胸、左侧胸腔积液。", Finding::PleuralEffusion),
        left
    );
}

#[test]
fn what_no_rule_reads_is_told_and_never_normal() {
    let read = Labeler::hospital().label("双肺野清晰，心影不大。右肺见一奇特征。");
    assert_eq!(read.status(Finding::NoFinding), Status::Uncertain);
    assert_eq!(read.unread.len(), 1);
    let read = Labeler::hospital().label("双肺野清晰，心影不大，气管居中，请结合临床。");
    assert_eq!(read.status(Finding::NoFinding), Status::Present);
    assert_eq!(read.unread_share(), 0.0);
}

#[test]
fn abnormalities_outside_the_twenty_have_names() {
    let read = Labeler::hospital().label("右膈下见游离气体，左侧膈肌抬高，未见右位心。");
    let status = |key: &str| read.others.get(key).map(|label| label.status);
    assert_eq!(status("free_gas"), Some(Status::Present));
    assert_eq!(status("diaphragm_elevation"), Some(Status::Present));
    assert_eq!(status("situs_inversus"), Some(Status::Absent));
    let names = Labeler::hospital().others();
    assert!(names.len() >= 45, "{}", names.len());
    assert!(
        names.iter().all(|name| name.chinese != name.key),
        "{names:?}"
    );
}

#[test]
fn a_report_that_contradicts_itself_is_noticed() {
    let classes = |text: &str| Labeler::hospital().label(text).contradictions;
    assert_eq!(
        classes("右侧胸腔积液。印象：未见胸腔积液。"),
        [Finding::PleuralEffusion]
    );
    assert_eq!(classes("右侧胸腔积液，左侧未见胸腔积液。"), []);
    assert_eq!(classes("右下肺结节，余肺未见结节。"), []);
    assert_eq!(classes("两肺野清晰，右下肺见斑片影。"), []);
}

#[test]
fn words_of_an_earlier_film_are_noticed() {
    let compares = |text: &str| Labeler::hospital().label(text).compares;
    assert!(compares("右下肺炎症较前吸收。"));
    assert!(compares("与2024-01-03片比较，未见明显变化。"));
    assert!(!compares("双肺纹理增多，心影不大，建议复查。"));
}
