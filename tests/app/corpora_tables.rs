//! `convert` on stand-ins of the corpora that are published as tables: studies, views, sections and splits by the rules of
//! each.

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;
use tempfile::tempdir;

use crate::corpora::{answers, convert, convert_args, copy, corpus, images, keys};
use crate::{json_lines, run, text};

#[test]
fn the_indiana_tables_are_joined_by_uid() {
    let found = convert("indiana", &["--val-ratio", "0.2"]);
    assert_eq!(found.summary["form"], "indiana");
    assert_eq!(
        (
            found.counts().iter().sum::<usize>(),
            &found.summary["rows_without_report"]
        ),
        (14, &2.into())
    );
    assert_eq!(
        found.summary["study"]["from"],
        "the column `uid` of the Indiana collection"
    );
    let answers = answers(&found.all());
    assert!(answers.contains("Findings: The cardiac silhouette is normal, with a line, number 1.\nImpression: No acute disease in study 1."), "{answers:?}");
    assert!(
        answers.contains("Impression: No acute disease in study 3."),
        "{answers:?}"
    );
    assert!(
        found.remarks().contains("2 rows hold `XXXX`"),
        "{}",
        found.remarks()
    );
    assert!(
        found
            .missing()
            .contains("indiana_projections.csv row 16\t8_IM-0008-1001.dcm.png\tno report"),
        "{}",
        found.missing()
    );
    let found = convert(
        "indiana",
        &[
            "--views",
            "frontal",
            "--sections",
            "findings",
            "--val-ratio",
            "0.2",
        ],
    );
    assert_eq!(found.counts().iter().sum::<usize>(), 6);
    assert!(
        images(&found.all())
            .iter()
            .all(|image| image.ends_with("-1001.dcm.png"))
    );
    assert_eq!(found.summary["rows_not_frontal"], 6);
    assert_eq!(
        found
            .all()
            .iter()
            .filter(|row| row["messages"][1]["content"]
                .as_str()
                .unwrap()
                .contains("Findings:"))
            .count(),
        0
    );
    // Only half of the corpus is there.
    let folder = tempdir().unwrap();
    let table = folder.path().join("indiana_reports.csv");
    fs::copy(corpus("indiana/indiana_reports.csv"), &table).unwrap();
    let (code, _, stderr) = run(folder.path(), &convert_args(text(&table), &[]));
    assert_eq!(code, 1);
    assert!(
        stderr.contains("lacks the table `indiana_projections.csv`"),
        "{stderr}"
    );
}

#[test]
fn mimic_cxr_is_read_by_its_own_rules() {
    let found = convert("mimic-cxr", &[]);
    assert_eq!(found.summary["form"], "mimic-cxr");
    // Nine studies of two views; one has no report.
    assert_eq!(found.counts(), [12, 2, 2]);
    assert_eq!(found.summary["rows_without_report"], 2);
    assert_eq!(
        (
            &found.summary["study"]["studies"],
            &found.summary["study"]["patients"]
        ),
        (&8.into(), &6.into())
    );
    let answers = answers(&found.all());
    for answer in [
        "Findings: The lungs are well expanded and clear, as in study 1, without effusion.\nImpression: No acute process, number 1.",
        "Impression: No acute process, number 2.",
        "Clear lungs in study 3, as before.",
    ] {
        assert!(answers.contains(answer), "{answer}: {answers:?}");
    }
    for row in found.rows("test") {
        assert_eq!(
            (row["study"].as_str(), row["patient"].as_str()),
            (Some("s50000009"), Some("p10000006"))
        );
        assert!(
            row["images"][0]
                .as_str()
                .unwrap()
                .contains("files/p10/p10000006/s50000009/")
        );
    }
    let frontal = convert(
        "mimic-cxr",
        &["--views", "frontal", "--sections", "impression"],
    );
    assert_eq!(frontal.counts(), [5, 1, 1]);
    assert_eq!(
        (
            &frontal.summary["rows_not_frontal"],
            &frontal.summary["rows_without_report"]
        ),
        (&7.into(), &4.into())
    );
    let all = convert(
        "mimic-cxr",
        &["--views", "all", "--split", "uid", "--val-ratio", "0.3"],
    );
    assert_eq!(all.counts().iter().sum::<usize>(), 8);
    assert_eq!(all.summary["patients_in_both"], 0);
    // Reports in a tree of their own, and no tables: the folders say what there is.
    let folder = tempdir().unwrap();
    copy(
        &corpus("mimic-cxr/files"),
        &folder.path().join("jpg/files"),
        &|name| name.ends_with(".jpg"),
    );
    copy(
        &corpus("mimic-cxr/files"),
        &folder.path().join("reports/files"),
        &|name| name.ends_with(".txt"),
    );
    let (code, stdout, stderr) = run(folder.path(), &convert_args(".", &["--val-ratio", "0.3"]));
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stdout.contains("corpus                 mimic-cxr"),
        "{stdout}"
    );
    assert!(
        stdout.contains("there is neither `mimic-cxr-2.0.0-metadata.csv`"),
        "{stdout}"
    );
    assert!(
        stdout.contains("16 reports of 8 studies of 6 patients"),
        "{stdout}"
    );
}

#[test]
fn chexpert_plus_finds_its_png_files_and_keeps_patients() {
    let found = convert("chexpert-plus", &[]);
    assert_eq!(found.summary["form"], "chexpert-plus");
    // Its validation part is small and its own.
    assert_eq!(found.counts(), [10, 1, 0]);
    assert_eq!(
        (
            &found.summary["study"]["studies"],
            &found.summary["study"]["patients"]
        ),
        (&8.into(), &7.into())
    );
    assert_eq!(
        keys(&found.rows("val"), "patient"),
        BTreeSet::from(["patient00007".to_owned()])
    );
    assert!(
        images(&found.all())
            .contains(&"chexpert-plus/PNG/train/patient00001/study2/view2_lateral.png".to_owned())
    );
    let found = convert(
        "chexpert-plus",
        &["--sections", "findings", "--views", "frontal"],
    );
    assert_eq!(found.counts(), [4, 1, 0]);
    assert!(answers(&found.all()).contains("The lungs are clear in patient 1, study 2."));
}

#[test]
fn padchest_is_spanish_and_split_by_patient() {
    let found = convert("padchest", &["--val-ratio", "0.3"]);
    assert_eq!(found.summary["form"], "padchest");
    assert_eq!(
        (
            found.counts().iter().sum::<usize>(),
            &found.summary["rows_without_report"]
        ),
        (8, &1.into())
    );
    assert_eq!(found.summary["language"], "spanish");
    assert_eq!(found.summary["study"]["patients"], 5);
    assert_eq!(found.summary["patients_in_both"], 0);
    let question = found.all()[0]["messages"][0]["content"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        question.contains("radiografía") || question.contains("imagen"),
        "{question}"
    );
    let found = convert("padchest", &["--views", "frontal", "--val-ratio", "0.3"]);
    assert_eq!(found.counts().iter().sum::<usize>(), 5);
}

#[test]
fn roco_keeps_its_parts_and_finds_images_by_their_downloads() {
    let found = convert("roco", &[]);
    assert_eq!(found.summary["form"], "roco");
    assert_eq!(found.counts(), [5, 1, 2]);
    assert_eq!(found.summary["files"].as_object().unwrap().len(), 3);
    assert!(
        found.remarks().contains("not chest X-rays alone"),
        "{}",
        found.remarks()
    );
    // Two images of one article.
    assert_eq!(keys(&found.rows("train"), "study").len(), 4);
    // The table of the Kaggle edition says the same.
    let folder = tempdir().unwrap();
    let radiology = folder.path().join("all_data/train/radiology");
    copy(
        &corpus("roco/data/train/radiology/images"),
        &radiology.join("images"),
        &|_| true,
    );
    let names: Vec<String> = images(&found.rows("train"));
    let rows: Vec<String> = names
        .iter()
        .enumerate()
        .map(|(at, name)| {
            format!(
                "ROCO_{at},{},\" Caption, number {at}.\n\"\n",
                name.rsplit('/').next().unwrap()
            )
        })
        .collect();
    fs::write(
        radiology.join("traindata.csv"),
        format!("id,name,caption\n{}", rows.concat()),
    )
    .unwrap();
    let (code, stdout, stderr) = run(folder.path(), &convert_args(".", &["--val-ratio", "0.2"]));
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("rows read              5"), "{stdout}");
}

#[test]
fn vindr_cxr_becomes_questions_for_boxes() {
    let found = convert("vindr-cxr", &["--val-ratio", "0.2"]);
    assert_eq!(found.summary["form"], "vindr-cxr");
    let counts = found.counts();
    assert_eq!((counts[0] + counts[1], counts[2]), (6, 2));
    assert!(
        found
            .stdout
            .contains("of 20 boxes of several readers 8 were made"),
        "{}",
        found.stdout
    );
    let rows = found.all();
    let normal = rows
        .iter()
        .filter(|row| row["messages"][1]["content"] == "No finding");
    assert_eq!(normal.clone().count(), 2);
    assert!(normal.clone().all(|row| row.get("objects").is_none()));
    let boxes = found.rows("test")[0].clone();
    assert_eq!(
        boxes["messages"][1]["content"],
        "<ref-object><bbox>\n<ref-object><bbox>"
    );
    assert_eq!(boxes["objects"]["ref"][0], "Aortic enlargement");
    assert_eq!(
        boxes["objects"]["bbox"][0],
        serde_json::json!([10.0, 4.0, 20.0, 16.0])
    );
    let marked = rows
        .iter()
        .find(|row| row["objects"]["ref"][0] == "Cardiomegaly")
        .unwrap();
    assert_eq!(
        marked["objects"]["bbox"],
        serde_json::json!([[8.0, 12.0, 31.0, 30.0]])
    );
    // The same boxes beside smaller copies mean something else, unless their sizes are known.
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("train")).unwrap();
    for image in 1..=6 {
        let name = format!("train/{image:032x}.png");
        image::GrayImage::new(20, 16 + image)
            .save(at(&name))
            .unwrap();
    }
    fs::copy(
        corpus("vindr-cxr/annotations/annotations_train.csv"),
        at("train.csv"),
    )
    .unwrap();
    let (code, _, stderr) = run(folder.path(), &convert_args(".", &[]));
    assert_eq!(code, 1);
    assert!(stderr.contains("train_meta.csv"), "{stderr}");
    let sizes: String = (1..=6)
        .map(|image| format!("{image:032x},32,40\n"))
        .collect();
    fs::write(at("train_meta.csv"), format!("image_id,dim0,dim1\n{sizes}")).unwrap();
    let (code, _, stderr) = run(
        folder.path(),
        &convert_args(".", &["--val-ratio", "0.2", "--overwrite"]),
    );
    assert_eq!(code, 0, "{stderr}");
    let rows = json_lines(&fs::read_to_string(at("out/train.jsonl")).unwrap());
    let marked = rows
        .iter()
        .find(|row| row.get("objects").is_some())
        .unwrap();
    assert_eq!(marked["objects"]["bbox_type"], "norm1");
    assert_eq!(marked["objects"]["bbox"][0][0], 8.0 / 40.0);
}

#[test]
fn tables_of_the_hugging_face_hub_keep_their_parts_and_bring_their_images() {
    let hub = convert("hub/data", &[]);
    assert_eq!(hub.counts(), [3, 1, 1]);
    let rows = hub.all();
    let answer = |row: &Value| row["messages"][1]["content"].as_str().unwrap().to_owned();
    let of = |study: &str| rows.iter().find(|row| row["study"] == study).unwrap();
    assert_eq!(
        answer(of("s25")),
        "Findings: The lungs are clear, study 25.\nImpression: No acute disease."
    );
    assert_eq!(
        answer(of("s40")),
        "Findings: The lungs are clear, study 40."
    );
    assert_eq!(of("s25")["patient"], "p25");
    assert_eq!(of("s85"), &hub.rows("test")[0]);
    // The pictures are files of the output, byte for byte.
    for row in &rows {
        let image = row["images"][0].as_str().unwrap();
        assert!(image.starts_with("images/"), "{image}");
        let picture = fs::read(hub.folder.path().join("out").join(image)).unwrap();
        assert!(picture.starts_with(b"\x89PNG"), "{image}");
    }
    // One table alone is divided as any other, and columns can be named.
    let one = convert(
        "hub/data/train-00000-of-00001.parquet",
        &[
            "--image-key",
            "image",
            "--report-key",
            "findings",
            "--val-ratio",
            "0.34",
        ],
    );
    assert_eq!(one.all().len(), 3);
    let keys = one.rows("train");
    assert!(answer(&keys[0]).starts_with("The lungs are clear"));
}
