//! `preview`: what the model sees, against the processors of transformers and of the training recipe.

use std::fs;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{fixture_image, json_lines, repository, run, text};

fn parity() -> Value {
    let file = repository().join("tests/fixtures/parity/preprocess.json");
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

/// Shape as text and bytes of a NumPy file.
fn npy(bytes: &[u8]) -> (String, &[u8]) {
    assert!(bytes.starts_with(b"\x93NUMPY\x01\0"));
    let length = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let (header, data) = bytes[10..].split_at(length);
    (String::from_utf8(header.to_vec()).unwrap(), data)
}

fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_resized_pixels_are_those_of_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let parity = parity();
    let mut bit_for_bit = 0;
    for (name, case) in parity.as_object().unwrap() {
        let image = repository()
            .join("tests/fixtures/parity")
            .join(case["image"].as_str().unwrap());
        let limits = ["min_pixels", "max_pixels"].map(|key| case[key].to_string());
        let args = [
            "preview",
            text(&image),
            "--npy",
            "shown.npy",
            "--pixel-values",
            "values.npy",
            "--json",
            "--min-pixels",
            &limits[0],
            "--max-pixels",
            &limits[1],
        ];
        let (code, stdout, stderr) = run(folder.path(), &args);
        assert_eq!(code, 0, "{name}: {stderr}");
        let found = &json_lines(&stdout)[0];
        let want = &case["backends"]["qwen_vl_utils"];
        assert_eq!(found["image_grid_thw"], want["grid_thw"], "{name}");
        assert_eq!(
            found["shown_sha256"], want["resized_u8_hwc_sha256"],
            "{name}"
        );
        let shown = fs::read(folder.path().join("shown.npy")).unwrap();
        let (header, pixels) = npy(&shown);
        let size = [1, 0].map(|side: usize| found["shown_wh"][side].as_u64().unwrap());
        let shape = format!("'shape': ({}, {}, 3)", size[0], size[1]);
        assert!(header.contains(&shape), "{name}: {header}");
        assert_eq!(sha256(pixels), want["resized_u8_hwc_sha256"], "{name}");
        let values = fs::read(folder.path().join("values.npy")).unwrap();
        let (header, values) = npy(&values);
        let shape = &case["pixel_values_shape"];
        let shape = format!("'shape': ({}, {})", shape[0], shape[1]);
        assert!(header.contains(&shape), "{name}: {header}");
        // Where torchvision scales as Pillow does, what the tower reads is the same in every bit.
        if case["resized_u8_hwc_sha256"] == want["resized_u8_hwc_sha256"] {
            assert_eq!(sha256(values), case["pixel_values_sha256_f32le"], "{name}");
            bit_for_bit += 1;
        }
    }
    assert!(bit_for_bit > 0);
}

#[test]
fn the_picture_is_written_with_or_without_the_borders_of_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let image = repository().join("data/sample/demo.png");
    let open = |name: &str| image::open(folder.path().join(name)).unwrap().into_rgb8();
    let preview = |more: &[&str]| {
        let args = [
            &["preview", text(&image), "--max-pixels", "65536"][..],
            more,
        ]
        .concat();
        run(folder.path(), &args)
    };
    let (code, stdout, stderr) = preview(&["--output", "plain.png"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stdout.contains(" tokens\n") && stdout.contains("65536 pixels"),
        "{stdout}"
    );
    let (code, ..) = preview(&["--output", "patches.png", "--patches"]);
    assert_eq!(code, 0);
    let (plain, patches) = (open("plain.png"), open("patches.png"));
    assert_eq!(plain.dimensions(), patches.dimensions());
    for (x, y, pixel) in patches.enumerate_pixels() {
        if x % 32 == 0 || y % 32 == 0 {
            assert_eq!(pixel.0, [255, 160, 0], "{x}, {y}");
        } else {
            assert_eq!(pixel, plain.get_pixel(x, y), "{x}, {y}");
        }
    }
    let (code, ..) = preview(&["--output", "original.png", "--original"]);
    assert_eq!(code, 0);
    let source = image::open(&image).unwrap().into_rgb8();
    assert!(open("original.png") == source);
}

#[test]
fn remarks_are_printed_and_in_the_json() {
    let folder = tempfile::tempdir().unwrap();
    let image = repository().join("tests/fixtures/pictures/files/gray_float.tif");
    let (code, stdout, _) = run(
        folder.path(),
        &["preview", text(&image), "--output", "a.png"],
    );
    assert_eq!(code, 0);
    assert!(
        stdout.contains("remark: its levels state no range"),
        "{stdout}"
    );
    let (code, stdout, _) = run(folder.path(), &["preview", text(&image), "--json"]);
    assert_eq!(code, 0);
    let found = &json_lines(&stdout)[0];
    assert_eq!(found["remarks"][0]["code"], "percentile_range");
    assert_eq!(found["size_wh"], serde_json::json!([45, 37]));
    let frames = repository().join("tests/fixtures/pictures/files/one_bit.dcm");
    let (code, _, stderr) = run(folder.path(), &["preview", text(&frames), "--json"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("--frame"), "{stderr}");
    let (code, ..) = run(
        folder.path(),
        &["preview", text(&frames), "--json", "--frame", "2"],
    );
    assert_eq!(code, 0);
}

#[test]
fn wrong_usage_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let image = fixture_image("gray_odd.png");
    for (args, words) in [
        (&[][..], "--output"),
        (&["--patches", "--json"], "--output"),
        (
            &["--output", "a.png", "--patches", "--original"],
            "--original",
        ),
        (&["--output", "a.png", "--npy", "a.png"], "named twice"),
        (&["--output", "a.png", "--frame", "0"], "--frame"),
    ] {
        let (code, _, stderr) = run(folder.path(), &[&["preview", text(&image)], args].concat());
        assert_eq!(code, 2, "{args:?}: {stderr}");
        assert!(stderr.contains(words), "{args:?}: {stderr}");
    }
    let (code, _, stderr) = run(
        folder.path(),
        &["preview", text(&image), "--json", "--model", "nowhere"],
    );
    assert_eq!(code, 1);
    assert!(stderr.contains("nowhere"), "{stderr}");
}
