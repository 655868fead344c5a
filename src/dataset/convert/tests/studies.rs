//! Studies and patients of rows, and which file is which image's.

use super::*;

/// Rows of `messages` about these images, which are made in `images`.
fn study_files(bench: &Bench, names: &[String]) -> PathBuf {
    let rows: Vec<String> = names
        .iter()
        .map(|name| {
            let path = bench.dir.path().join("images").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            image::GrayImage::new(64, 96).save(path).unwrap();
            json!({
                "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}],
                "images": [name],
            })
            .to_string()
        })
        .collect();
    let path = bench.dir.path().join("rows.jsonl");
    fs::write(&path, rows.join("\n")).unwrap();
    path
}

#[test]
fn a_patient_is_never_on_both_sides_in_the_layout_of_mimic() {
    let bench = Bench::new(ANNOTATIONS);
    // Ten patients with two studies of two views.
    let names: Vec<String> = (0..40)
        .map(|at| format!("files/p1{}/s{}/d{at}.png", at / 4, at / 2))
        .collect();
    let input = study_files(&bench, &names);
    for seed in 0..20 {
        let options = ConvertOptions {
            input: input.clone(),
            seed,
            val_ratio: Some(0.3),
            ..bench.options()
        };
        let summary = bench.convert(&options).unwrap();
        let patients = |name: &str| -> BTreeSet<String> {
            let rows = bench.rows(name);
            let all = images(&rows);
            let patient = |path: &&str| path.split('/').nth(3).map(str::to_owned);
            all.iter().filter_map(patient).collect()
        };
        assert!(patients("train.jsonl").is_disjoint(&patients("val.jsonl")));
        assert_eq!((summary.studies_in_both, summary.patients_in_both), (0, 0));
        // Three patients of four rows are the first to reach 12 rows.
        assert_eq!((summary.val.rows, summary.val.studies), (12, 6));
        assert_eq!(
            (summary.study.studies, summary.study.patients),
            (20, Some(10))
        );
        let options = ConvertOptions {
            split: Some(Split::Image),
            ..options
        };
        let torn = bench.convert(&options).unwrap();
        assert!(torn.studies_in_both > 0 && torn.patients_in_both > 0);
    }
}

#[test]
fn studies_by_a_rule_are_reported_and_written_down() {
    let bench = Bench::new(ANNOTATIONS);
    let names: Vec<String> = (0..12).map(|at| format!("x-{}-{at}.png", at / 2)).collect();
    let options = ConvertOptions {
        input: study_files(&bench, &names),
        studies: StudyRule::regex("x-([0-9]+)-").unwrap(),
        ..bench.options()
    };
    let summary = bench.convert(&options).unwrap();
    assert_eq!(summary.study.studies, 6);
    let (train, val) = (bench.rows("train.jsonl"), bench.rows("val.jsonl"));
    for row in train.iter().chain(&val) {
        let study = images(std::slice::from_ref(row))[0]
            .split('-')
            .nth(1)
            .unwrap()
            .to_owned();
        assert_eq!(row["study"], study);
    }
    assert!(
        summary.to_string().contains("12 reports of 6 studies"),
        "{summary}"
    );
    // A guess is not written down: it would be taken for known.
    let options = ConvertOptions {
        studies: StudyRule::Guess,
        ..options
    };
    bench.convert(&options).unwrap();
    assert!(bench.rows("train.jsonl")[0].get("study").is_none());
}

#[test]
fn a_file_of_two_images_is_refused_with_both_paths() {
    let bench = Bench::new(ANNOTATIONS);
    let names: Vec<String> = (0..4).map(|at| format!("CXR{at}/0.png")).collect();
    let input = study_files(&bench, &names);
    let options = ConvertOptions {
        input: input.clone(),
        ..bench.options()
    };
    // The tree is there: every row its own picture.
    let summary = bench.convert(&options).unwrap();
    assert_eq!((summary.rows_left_out(), summary.study.studies), (0, 4));
    let (train, val) = (bench.rows("train.jsonl"), bench.rows("val.jsonl"));
    let all: BTreeSet<&str> = images(&train).into_iter().chain(images(&val)).collect();
    assert_eq!(all.len(), 4);
    // One picture for all.
    let flat = bench.dir.path().join("flat");
    fs::create_dir(&flat).unwrap();
    image::GrayImage::new(64, 96)
        .save(flat.join("0.png"))
        .unwrap();
    let error = bench
        .convert(&ConvertOptions {
            images: Some(flat),
            ..options.clone()
        })
        .unwrap_err()
        .to_string();
    for sign in [
        "rows.jsonl` row 2",
        "`CXR1/0.png`",
        "the image `CXR0/0.png` of row 1",
        "flat/0.png",
    ] {
        assert!(error.contains(sign), "{error}");
    }
    // The name alone, in several folders.
    fs::write(
        &input,
        r#"{"annotations": [{"image_id": "0", "caption": "一"}]}"#,
    )
    .unwrap();
    let error = bench.convert(&options).unwrap_err().to_string();
    for sign in ["row 1", "several folders", "CXR0/0.png", "CXR1/0.png"] {
        assert!(error.contains(sign), "{error}");
    }
}

#[test]
fn names_with_two_endings_are_found() {
    let bench = Bench::new(
        r#"{"annotations": [{"image_id": "1_IM-0001-4001.dcm", "caption": "一"},
            {"image_id": "2_IM-0002-4001", "caption": "二"}]}"#,
    );
    for name in ["1_IM-0001-4001.dcm.png", "deeper/2_IM-0002-4001.png"] {
        let path = bench.dir.path().join("images").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        image::GrayImage::new(64, 96).save(path).unwrap();
    }
    let summary = bench.convert(&bench.options()).unwrap();
    assert_eq!((summary.rows_left_out(), summary.study.studies), (0, 2));
}
