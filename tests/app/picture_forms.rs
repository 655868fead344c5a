//! Pictures of every form that is read: their levels against Pillow, pydicom and other readers, and the same
//! files through the program and the server.
//!
//! `tests/fixtures/pictures/make.py` writes the files, their references and `expected.json`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};
use xray_qwen3vl::processor::image::{DecodeLimits, decode_frame, decoding_cost, probe, read};

use crate::{
    infer, json_lines, repository, run,
    server::{about, data_url, start, with},
    text, tiny_model,
};

fn fixtures() -> PathBuf {
    repository().join("tests/fixtures/pictures")
}

/// What is expected of one file.
struct Form {
    name: String,
    path: PathBuf,
    frame: Option<usize>,
    reference: PathBuf,
    tolerance: u8,
    remarks: Vec<String>,
}

fn forms() -> Vec<Form> {
    let expected = fs::read(fixtures().join("expected.json")).unwrap();
    let expected: Value = serde_json::from_slice(&expected).unwrap();
    let form = |(name, form): (&String, &Value)| Form {
        name: name.clone(),
        path: fixtures().join("files").join(name),
        frame: form["frame"].as_u64().map(|frame| frame as usize),
        reference: fixtures()
            .join("reference")
            .join(form["reference"].as_str().unwrap()),
        tolerance: form["tolerance"].as_u64().unwrap() as u8,
        remarks: form["remarks"]
            .as_array()
            .unwrap()
            .iter()
            .map(|code| code.as_str().unwrap().to_owned())
            .collect(),
    };
    let forms: Vec<Form> = expected.as_object().unwrap().iter().map(form).collect();
    assert!(forms.len() > 100);
    forms
}

/// Endings of the formats of each row in the README's table.
const PLAIN: [&str; 5] = [".jpg", ".gif", ".pbm", ".pgm", ".ppm"];
const TIFF: [&str; 1] = [".tif"];
const JPEG_2000_AND_LS: [&str; 4] = [".jp2", ".j2k", ".j2c", ".jls"];
const VOLUMES: [&str; 3] = [".nii", ".nii.gz", ".nrrd"];
const DICOM: [&str; 1] = [".dcm"];

fn is_of(name: &str, endings: &[&str]) -> bool {
    endings.iter().any(|ending| name.ends_with(ending))
}

#[test]
fn every_form_is_in_a_row_of_the_table() {
    let rows: [&[&str]; 5] = [&PLAIN, &TIFF, &JPEG_2000_AND_LS, &VOLUMES, &DICOM];
    for form in forms() {
        let found = rows.iter().filter(|row| is_of(&form.name, row));
        assert_eq!(found.count(), 1, "{}", form.name);
    }
}

#[test]
fn jpeg_gif_and_pnm_have_the_levels_of_pillow() {
    have_the_levels_of_their_references(&PLAIN, 16);
}

#[test]
fn tiff_has_the_levels_of_pillow_and_tifffile() {
    have_the_levels_of_their_references(&TIFF, 47);
}

#[test]
fn jpeg_2000_and_jpeg_ls_have_the_levels_of_their_libraries() {
    have_the_levels_of_their_references(&JPEG_2000_AND_LS, 18);
}

#[test]
fn nifti_and_nrrd_have_the_levels_of_their_libraries() {
    have_the_levels_of_their_references(&VOLUMES, 13);
}

#[test]
fn dicom_has_the_levels_of_pydicom() {
    have_the_levels_of_their_references(&DICOM, 22);
}

/// Compares the files with these endings, of which there are at least `least`.
fn have_the_levels_of_their_references(endings: &[&str], least: usize) {
    let limits = DecodeLimits::default();
    let mut wrong = Vec::new();
    let forms: Vec<Form> = forms()
        .into_iter()
        .filter(|form| is_of(&form.name, endings))
        .collect();
    assert!(forms.len() >= least, "{}", forms.len());
    for form in forms {
        let name = &form.name;
        let reading = match read(&form.path, form.frame, &limits) {
            Ok(reading) => reading,
            Err(error) => {
                wrong.push(error.to_string());
                continue;
            }
        };
        let codes: Vec<_> = reading.remarks.iter().map(|r| r.kind().code()).collect();
        if codes != form.remarks {
            wrong.push(format!(
                "{name}: remarks {codes:?}, expected {:?}",
                form.remarks
            ));
        }
        let want = image::open(&form.reference).unwrap().into_rgb8();
        let (width, height) = (reading.picture.width(), reading.picture.height());
        if (width as u32, height as u32) != want.dimensions() {
            wrong.push(format!(
                "{name}: {width} × {height}, expected {:?}",
                want.dimensions()
            ));
            continue;
        }
        let pairs = reading
            .picture
            .pixels()
            .iter()
            .zip(want.as_raw())
            .enumerate();
        let (at, (ours, theirs)) = pairs.max_by_key(|(_, (a, b))| a.abs_diff(**b)).unwrap();
        if ours.abs_diff(*theirs) > form.tolerance {
            wrong.push(format!("{name}: {ours} at {at}, expected {theirs}"));
        }
        // The header alone says the size, of what is no choice of frames.
        if form.frame.is_none() {
            assert_eq!(
                probe(&form.path, &limits).unwrap(),
                (width, height),
                "{name}"
            );
            let cost = decoding_cost(&fs::read(&form.path).unwrap(), name, &limits).unwrap();
            let pixels = (width * height) as u64;
            assert!(
                cost.pixels == pixels && cost.bytes >= 3 * pixels,
                "{name}: {cost:?}"
            );
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn sizes_are_checked_before_room_is_made() {
    for form in forms() {
        let bytes = fs::read(&form.path).unwrap();
        let few_pixels = DecodeLimits {
            max_decoded_pixels: 1000,
            ..DecodeLimits::default()
        };
        let little_memory = DecodeLimits {
            max_decoded_bytes: 1000,
            ..DecodeLimits::default()
        };
        let name = &form.name;
        for (limits, words) in [
            (few_pixels, "limit of 1000 pixels"),
            (little_memory, "1000 bytes"),
        ] {
            let error = decode_frame(&bytes, name, form.frame, &limits)
                .unwrap_err()
                .to_string();
            assert!(error.contains(words), "{name}: {error}");
        }
    }
}

#[test]
fn cut_and_changed_files_are_read_or_refused_in_bounded_time() {
    /// Far more than a picture of so few pixels takes, also on a busy machine.
    const LONGEST: Duration = Duration::from_secs(10);
    const ROUNDS: usize = 40;
    let limits = DecodeLimits {
        max_decoded_pixels: 1 << 18,
        max_decoded_bytes: 1 << 24,
        ..DecodeLimits::default()
    };
    let mut random = SmallRng::seed_from_u64(11);
    for form in forms() {
        let name = &form.name;
        let bytes = fs::read(&form.path).unwrap();
        let check = |bytes: &[u8]| {
            let started = Instant::now();
            let decoded = decode_frame(bytes, name, form.frame, &limits);
            assert!(
                started.elapsed() < LONGEST,
                "{name}: {:?}",
                started.elapsed()
            );
            if let Err(error) = &decoded {
                let text = error.to_string();
                // A panic of a decoder is caught, and reported in these words.
                assert!(
                    text.contains(name) && !text.contains("gave up"),
                    "{name}: {text}"
                );
            }
            decoded.is_ok()
        };
        // A first page or frame may be whole where a later one is cut.
        let has_more = form
            .remarks
            .iter()
            .any(|code| code == "first_of_several_pages");
        for end in [bytes.len() / 4, bytes.len() / 2, bytes.len() * 9 / 10] {
            let is_read = check(&bytes[..end]);
            assert!(!is_read || has_more, "{name} cut at {end} is read");
        }
        for _ in 0..ROUNDS {
            let mut bytes = bytes.clone();
            for _ in 0..random.random_range(1..6) {
                let at = random.random_range(0..bytes.len());
                match random.random_range(0..4) {
                    0 => bytes[at] = random.random(),
                    1 => bytes[at] ^= 1 << random.random_range(0..8),
                    2 => bytes[at] = [0, 1, 0x7f, 0xff][random.random_range(0..4)],
                    _ => bytes.insert(at, random.random()),
                }
            }
            check(&bytes);
        }
    }
}

#[test]
fn volumes_and_formats_that_are_not_read_are_named_with_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    for (name, words) in [
        (
            "volume.nii",
            [
                "is a volume of 4 × 5 × 6",
                ".slicer[:, :, N:N + 1]",
                "takes plane N of 6",
            ],
        ),
        (
            "volume.nrrd",
            ["is a volume of 4 × 5 × 6", "nrrd.write(", "`--frame N`"],
        ),
    ] {
        let file = fixtures().join("files").join(name);
        let (code, _, stderr) = infer(folder.path(), &[text(&file)]);
        assert_eq!(code, 1, "{stderr}");
        assert!(words.iter().all(|word| stderr.contains(word)), "{stderr}");
    }
}

#[test]
fn a_plane_of_a_volume_is_chosen_by_its_number() {
    let limits = DecodeLimits::default();
    let numbers: Vec<u8> = (0..120).collect();
    let with_numbers = |name: &str| {
        let mut bytes = fs::read(fixtures().join("files").join(name)).unwrap();
        let start = bytes.len() - numbers.len();
        bytes[start..].copy_from_slice(&numbers);
        bytes
    };
    let packed = |bytes: &[u8]| {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    };
    let (nifti, nrrd) = (with_numbers("volume.nii"), with_numbers("volume.nrrd"));
    let header = nrrd.len() - numbers.len();
    let nrrd_as = |encoding: &str, data: &[u8]| {
        let text = String::from_utf8(nrrd[..header].to_vec()).unwrap();
        let text = text.replace("encoding: raw", &format!("encoding: {encoding}"));
        [text.as_bytes(), data].concat()
    };
    let words: Vec<String> = numbers.iter().map(u8::to_string).collect();
    for (name, bytes) in [
        ("nifti", nifti.clone()),
        ("nifti.gz", packed(&nifti)),
        ("nrrd", nrrd.clone()),
        ("nrrd gzip", nrrd_as("gzip", &packed(&numbers))),
        ("nrrd text", nrrd_as("text", words.join("\n").as_bytes())),
    ] {
        for (at, plane) in numbers.chunks(20).enumerate() {
            let reading = decode_frame(&bytes, name, Some(at + 1), &limits);
            let picture = reading
                .unwrap_or_else(|error| panic!("{name}: {error}"))
                .picture;
            assert_eq!((picture.width(), picture.height()), (4, 5), "{name}");
            let levels: Vec<u8> = picture.pixels().iter().step_by(3).copied().collect();
            assert_eq!(levels, plane, "{name} {at}");
        }
        let none = decode_frame(&bytes, name, Some(7), &limits).unwrap_err();
        assert!(
            none.to_string().contains("has no frame 7, expected 1 to 6"),
            "{none}"
        );
        let cut = decode_frame(&bytes[..bytes.len() - 30], name, Some(6), &limits);
        assert!(cut.is_err(), "{name}");
    }
    // As many planes as no file has.
    let mut immense = nifti;
    immense[46..48].copy_from_slice(&i16::MAX.to_le_bytes());
    immense[48..50].copy_from_slice(&i16::MAX.to_le_bytes());
    immense[40..42].copy_from_slice(&4_i16.to_le_bytes());
    let far = decode_frame(&immense, "n", Some(1 << 29), &limits).unwrap_err();
    assert!(far.to_string().contains("cut off"), "{far}");
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("v.nii"), with_numbers("volume.nii")).unwrap();
    let args = ["preview", "v.nii", "--frame", "3", "--json"];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stdout}{stderr}");
}

/// Copies of all files that need no choice of a frame.
fn copies(folder: &Path) -> Vec<Form> {
    let forms: Vec<Form> = forms()
        .into_iter()
        .filter(|form| form.frame.is_none())
        .collect();
    for form in &forms {
        fs::copy(&form.path, folder.join(&form.name)).unwrap();
    }
    forms
}

#[test]
fn the_program_reads_every_form() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    fs::create_dir(&images).unwrap();
    let forms = copies(&images);
    let args = [
        "--images-dir",
        text(&images),
        "--max-new-tokens",
        "1",
        "--json",
        "--batch-size",
        "8",
    ];
    let (code, stdout, stderr) = infer(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    // Nothing is skipped: every ending is known.
    assert!(!stderr.contains("skipped"), "{stderr}");
    let records = json_lines(&stdout);
    assert_eq!(records.len(), forms.len());
    for (record, form) in records.iter().zip(&forms) {
        let name = record["image"].as_str().unwrap();
        assert!(name.ends_with(&form.name), "{name}, expected {}", form.name);
        let codes: Vec<&str> = record["remarks"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|remark| remark["code"].as_str().unwrap())
            .collect();
        assert_eq!(codes, form.remarks, "{name}");
    }
    let rows = forms.iter().enumerate().map(|(at, form)| {
        json!({
            "messages": [
                {"role": "user", "content": "<image>?"},
                {"role": "assistant", "content": format!("第{at}例正常。")},
            ],
            "images": [format!("images/{}", form.name)],
        })
    });
    let rows: String = rows.map(|row| format!("{row}\n")).collect();
    let data = folder.path().join("data.jsonl");
    fs::write(&data, rows).unwrap();
    let model = tiny_model();
    let (code, stdout, stderr) = run(
        folder.path(),
        &["check", text(&data), "--model", text(&model)],
    );
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stdout.contains("0 errors"), "{stdout}");
    assert!(stdout.contains("the 1st to 99th percentile"), "{stdout}");
}

#[test]
fn a_server_reads_and_shows_every_form() {
    let server = start(&[]);
    for form in forms().into_iter().filter(|form| form.frame.is_none()) {
        let name = &form.name;
        let bytes = fs::read(&form.path).unwrap();
        let shown = server.send("POST", "/v1/images/preview", &[], &bytes);
        assert_eq!(shown.status, 200, "{name}: {shown:?}");
        assert_eq!(shown.header("content-type"), Some("image/png"), "{name}");
    }
    // One of each format, for which a name is no help.
    for name in [
        "gray_12.jp2",
        "rgb_8_order_2.jls",
        "animation.gif",
        "plain.pgm",
        "fax_group4.tif",
        "gray_int16.nii.gz",
        "gray_float_ras.nrrd",
        "htj2k_8.dcm",
    ] {
        let file = fixtures().join("files").join(name);
        let answer = server.chat(&with(about(&data_url(&file), "？"), "max_tokens", 1.into()));
        assert_eq!(answer.status, 200, "{name}: {answer:?}");
        let reading = read(&file, None, &DecodeLimits::default()).unwrap();
        let remarks = answer.json()["remarks"].as_array().map_or(0, Vec::len);
        assert_eq!(remarks, reading.remarks.len(), "{name}");
    }
    let volume = fs::read(fixtures().join("files/volume.nii")).unwrap();
    let refused = server.send("POST", "/v1/images/preview", &[], &volume);
    assert_eq!(refused.status, 400);
    assert!(
        refused.body.contains("a volume of 4 × 5 × 6"),
        "{refused:?}"
    );
}
