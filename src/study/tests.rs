use super::*;

fn rows(images: &[&str]) -> Vec<StudyRow> {
    let rows = images.iter().enumerate().map(|(at, image)| StudyRow {
        name: format!("row {}", at + 1),
        images: vec![(*image).to_owned()],
        ..StudyRow::default()
    });
    rows.collect()
}

fn keyed(pairs: &[(&str, &str)], image: &str) -> StudyRow {
    let keys = pairs.iter();
    StudyRow {
        keys: keys
            .map(|(key, value)| ((*key).into(), (*value).into()))
            .collect(),
        images: vec![image.into()],
        ..StudyRow::default()
    }
}

fn guessed(images: &[&str]) -> Studies {
    StudyRule::Guess.studies(&rows(images)).unwrap()
}

/// What is to be guessed for the naming habits of users: images, studies, patients.
const HABITS: [(&[&str], &[&str], &[&str]); 22] = [
    (
        &["case_001.png", "case_002.png", "case_003.png"],
        &["case_001", "case_002", "case_003"],
        &[],
    ),
    (
        &["DR_20240001.png", "DR_20240002.png"],
        &["DR_20240001", "DR_20240002"],
        &[],
    ),
    (
        &["胸片_001.jpg", "胸片_002.jpg"],
        &["胸片_001", "胸片_002"],
        &[],
    ),
    (
        &["p001/image.png", "p002/image.png"],
        &["p001", "p002"],
        &["p001", "p002"],
    ),
    (
        &[
            "patient00001/study1/view1_frontal.jpg",
            "patient00001/study1/view2_lateral.jpg",
            "patient00001/study2/view1_frontal.jpg",
            "patient00002/study1/view1_frontal.jpg",
        ],
        &[
            "patient00001/study1",
            "patient00001/study1",
            "patient00001/study2",
            "patient00002/study1",
        ],
        &[
            "patient00001",
            "patient00001",
            "patient00001",
            "patient00002",
        ],
    ),
    (&["00001.png", "00002.png"], &["00001", "00002"], &[]),
    (
        &["00001_PA.png", "00001_LAT.png", "00002_PA.png"],
        &["00001", "00001", "00002"],
        &[],
    ),
    (
        &["DR-2024-0001.png", "DR-2024-0002.png"],
        &["DR-2024-0001", "DR-2024-0002"],
        &[],
    ),
    (
        &[
            "1.2.840.113619.2.5.1762583.101.png",
            "1.2.840.113619.2.5.1762583.207.png",
        ],
        &[
            "1.2.840.113619.2.5.1762583.101",
            "1.2.840.113619.2.5.1762583.207",
        ],
        &[],
    ),
    (
        &[
            "files/p10/p10000032/s50414267/02aa804e-bde0afdd.jpg",
            "files/p10/p10000032/s50414267/174413ec-4ec4c1f7.jpg",
            "files/p10/p10000032/s53189527/2a2277a9-b0ded155.jpg",
            "files/p11/p11000011/s51029426/68b5c4b1-227d0485.jpg",
        ],
        &[
            "p10000032/s50414267",
            "p10000032/s50414267",
            "p10000032/s53189527",
            "p11000011/s51029426",
        ],
        &["p10000032", "p10000032", "p10000032", "p11000011"],
    ),
    // OpenI-zh, and the same collection under its own names.
    (
        &["images/1_1.png", "images/1_2.png", "images/2_1.png"],
        &["1", "1", "2"],
        &[],
    ),
    (
        &[
            "1_IM-0001-4001.dcm.png",
            "1_IM-0001-3001.dcm.png",
            "2_IM-0652-1001.dcm.png",
        ],
        &["1", "1", "2"],
        &[],
    ),
    (
        &[
            "CXR1_1_IM-0001-3001.png",
            "CXR1_1_IM-0001-4001.png",
            "CXR2_IM-0652-1001.png",
        ],
        &["1", "1", "2"],
        &[],
    ),
    (
        &[
            "CXR0_IM-0000/0.png",
            "CXR0_IM-0000/1.png",
            "CXR1_IM-0001/0.png",
        ],
        &["CXR0_IM-0000", "CXR0_IM-0000", "CXR1_IM-0001"],
        &[],
    ),
    (
        &["CXR0/0.png", "CXR1/0.png", "CXR2/0.png"],
        &["CXR0", "CXR1", "CXR2"],
        &[],
    ),
    (
        &[
            "s50414267/abc.jpg",
            "s50414267/abd.jpg",
            "s50414268/abe.jpg",
        ],
        &["s50414267", "s50414267", "s50414268"],
        &[],
    ),
    (
        &["00000001_000.png", "00000001_001.png", "00000002_000.png"],
        &["00000001_000", "00000001_001", "00000002_000"],
        &["00000001", "00000001", "00000002"],
    ),
    (
        &[
            "sub-S03044/ses-E07985/mod-rx/a.png",
            "sub-S03044/ses-E08000/mod-rx/b.png",
        ],
        &["sub-S03044/ses-E07985", "sub-S03044/ses-E08000"],
        &["sub-S03044", "sub-S03044"],
    ),
    (
        &["0001正位.jpg", "0001侧位.jpg", "0002正位.jpg"],
        &["0001", "0001", "0002"],
        &[],
    ),
    (
        &["images/0.png", "images/1.png", "images/2.png"],
        &["0", "1", "2"],
        &[],
    ),
    (
        &[
            "216840111366964012283393834152009027160348352_00-059-115.png",
            "216840111366964012283393834152009027160348352_00-059-116.png",
        ],
        &[
            "216840111366964012283393834152009027160348352",
            "216840111366964012283393834152009027160348352",
        ],
        &[],
    ),
    // The same numbers in two folders are two collections.
    (
        &["train/img/00001.png", "val/img/00001.png"],
        &["train/img/00001", "val/img/00001"],
        &[],
    ),
];

#[test]
fn naming_habits_give_the_studies_that_a_reader_sees() {
    for (images, studies, patients) in HABITS {
        let found = guessed(images);
        assert_eq!(found.ids, studies, "{images:?}");
        let named: Vec<&str> = found
            .patients
            .iter()
            .flatten()
            .map(String::as_str)
            .collect();
        assert_eq!(named, patients, "{images:?}");
        assert!(found.facts.guessed && found.facts.reports == images.len());
    }
}

#[test]
fn many_numbers_after_one_word_are_no_views() {
    let names: Vec<String> = (1..100).map(|at| format!("DR2024_{at}.png")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let found = guessed(&names);
    assert_eq!(found.facts.studies, 99);
    // Parts of a collection are no studies, however few images there are.
    let parts = [
        "images1/2_1.png",
        "images1/3_1.png",
        "images2/4_1.png",
        "images2/5_1.png",
    ];
    assert_eq!(guessed(&parts).facts.studies, 4);
}

#[test]
fn a_guess_is_reported_with_its_count() {
    let images: Vec<String> = (0..32)
        .flat_map(|at| [format!("{at}_1.png"), format!("{at}_2.png")])
        .collect();
    let images: Vec<&str> = images.iter().map(String::as_str).collect();
    let found = guessed(&images);
    assert_eq!(
        found.facts.english(),
        "studies from a guess by file names `STUDY_VIEW`: 64 reports of 32 studies"
    );
    assert_eq!(found.doubts, []);
    let one = guessed(&["7.png"]);
    assert!(
        one.facts.english().ends_with("1 report of 1 study"),
        "{:?}",
        one.facts
    );
    assert_eq!(one.doubts, []);
}

#[test]
fn a_suspicious_guess_is_a_doubt() {
    let one = guessed(&["2_1.png", "2_2.png", "2_3.png"]);
    assert_eq!(one.doubts, [StudyDoubt::One { reports: 3 }]);
    let apart = guessed(&["0001-1.png", "0001-2.png", "0002-1.png", "0002-2.png"]);
    assert_eq!(apart.facts.studies, 4);
    let names = ["0001-1.png".to_owned(), "0001-2.png".to_owned()];
    assert_eq!(apart.doubts, [StudyDoubt::ViewsApart { names }]);
    let many: Vec<StudyRow> = (0..40)
        .map(|at| keyed(&[("study", if at < 30 { "a" } else { "b" })], "x.png"))
        .collect();
    let many = StudyRule::Guess.studies(&many).unwrap();
    let study = "a".to_owned();
    assert_eq!(many.doubts, [StudyDoubt::Many { study, reports: 30 }]);
    for doubt in one.doubts.iter().chain(&apart.doubts).chain(&many.doubts) {
        assert!(doubt.english().contains("--study-key"), "{doubt:?}");
        assert!(doubt.chinese().contains("--study-key"), "{doubt:?}");
    }
}

#[test]
fn a_key_of_the_row_counts_before_its_path() {
    let all = [
        keyed(&[("study", "A"), ("patient", "甲")], "1_1.png"),
        keyed(&[("study_id", "A"), ("patient_id", "乙")], "1_2.png"),
        keyed(&[("study", "B"), ("patient", "甲")], "2_1.png"),
        keyed(&[("uid", "C")], "3_1.png"),
    ];
    let found = StudyRule::Guess.studies(&all).unwrap();
    // Study `A` of two patients is two studies.
    assert_eq!(found.ids, ["甲/A", "乙/A", "甲/B", "C"]);
    assert_eq!(found.groups[0], found.groups[2]);
    assert_ne!(found.groups[0], found.groups[1]);
    assert!(!found.facts.guessed && found.facts.patients.is_none());
    let named = StudyRule::Key("accession".into());
    let rows = [keyed(&[("accession", "9"), ("study", "x")], "1_1.png")];
    assert_eq!(named.studies(&rows).unwrap().ids, ["9"]);
    let error = named.studies(&[keyed(&[], "1_1.png")]).unwrap_err();
    assert!(error.to_string().contains("`accession`"), "{error}");
}

#[test]
fn rows_that_name_a_study_and_rows_that_do_not_are_reported() {
    let all = [keyed(&[("study", "A")], "1_1.png"), keyed(&[], "2_1.png")];
    let found = StudyRule::Guess.studies(&all).unwrap();
    assert_eq!(found.doubts, [StudyDoubt::Mixed { named: 1, rows: 2 }]);
    let rule = StudyRule::regex("(.*)_").unwrap();
    let found = rule.studies(&all[..1]).unwrap();
    assert_eq!(found.doubts, [StudyDoubt::Unused]);
}

#[test]
fn a_rule_of_the_user_counts_before_the_guess() {
    let images = ["a/x-1-pa.png", "a/x-1-lat.png", "b/x-2-pa.png"];
    let by = |rule: StudyRule| rule.studies(&rows(&images)).unwrap();
    let found = by(StudyRule::regex("x-([0-9]+)").unwrap());
    assert_eq!(found.ids, ["1", "1", "2"]);
    assert!(!found.facts.guessed);
    let both = by(StudyRule::regex("^(?P<patient>[a-z])/x-(?P<study>[0-9]+)").unwrap());
    assert_eq!(
        both.patients,
        [Some("a".into()), Some("a".into()), Some("b".into())]
    );
    assert_eq!(by(StudyRule::Folder).ids, ["a", "a", "b"]);
    assert_eq!(by(StudyRule::Image).facts.studies, 3);
    let named = StudyRule::Name
        .studies(&rows(&["a/7_1.png", "b/7_2.png", "_x.png"]))
        .unwrap();
    assert_eq!(named.ids, ["7", "7", "_x"]);
    let error = StudyRule::regex("y-([0-9]+)")
        .unwrap()
        .studies(&rows(&images))
        .unwrap_err();
    assert!(
        error.to_string().starts_with("row 1: image `a/x-1-pa.png`"),
        "{error}"
    );
    for wrong in ["x-[0-9]+", "("] {
        assert!(StudyRule::regex(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_patient_holds_studies_together_and_a_row_its_images() {
    let all = ["p1/s10/a.png", "p1/s11/b.png", "p2/s12/c.png"];
    let found = guessed(&all);
    assert_eq!(found.groups[0], found.groups[1]);
    assert_ne!(found.groups[0], found.groups[2]);
    assert_eq!((found.facts.studies, found.facts.patients), (3, Some(2)));
    let mut rows = rows(&["2_1.png", "3_1.png", "4_1.png"]);
    rows[1].images.push("2_2.png".into());
    let found = StudyRule::Guess.studies(&rows).unwrap();
    assert_eq!(found.ids, ["2", "2", "4"]);
    assert_eq!(
        (found.groups[0] == found.groups[1], found.facts.studies),
        (true, 2)
    );
}

#[test]
fn paths_are_compared_however_they_are_written() {
    assert_eq!(joined("data/x", "./../y//a.png"), "data/y/a.png");
    assert_eq!(joined("data", "/abs/a.png"), "/abs/a.png");
    assert_eq!(joined("data", r"C:\images\a.png"), "C:/images/a.png");
    assert_eq!(joined("", "../a.png"), "../a.png");
    assert_eq!(folder_and_stem("a/1.2.840.dcm.png"), ("a", "1.2.840"));
    let mut two = rows(&["images/7_1.png", "../val/images/7_2.png"]);
    two[0].folder = "data/val".into();
    two[1].folder = "data/train".into();
    assert_eq!(StudyRule::Guess.studies(&two).unwrap().ids, ["7", "7"]);
}

#[test]
fn rows_without_image_are_studies_of_their_own() {
    let found = StudyRule::Guess
        .studies(&[StudyRow::default(), StudyRow::default()])
        .unwrap();
    assert_eq!(found.ids, ["row 1", "row 2"]);
    assert_eq!(found.certain, [false, false]);
}
