//! Files that were once read wrongly or without a word: what each gives now.
//!
//! Mean levels are Pillow's and pydicom's, or worked out from the stored numbers with numpy.

use std::fs;
use std::path::PathBuf;

use xray_qwen3vl::processor::image::{DecodeLimits, read};

use serde_json::{Value, json};

use crate::{
    infer, json_lines, repository, run,
    server::{about, data_url, start, with},
    text, tiny_model,
};

/// A file, the codes of its remarks, and the mean level of its upper half and of the whole.
type Accepted = (&'static str, &'static [&'static str], f64, f64);

const ACCEPTED: [Accepted; 12] = [
    // Stored numbers times 255 / 4095.
    (
        "pictures/grey16_12bit_range.png",
        &["narrow_range"],
        127.467,
        127.467,
    ),
    (
        "pictures/two_pages.tif",
        &["first_of_several_pages"],
        107.822,
        122.698,
    ),
    // All rotated by a quarter, as Pillow's `exif_transpose` does.
    ("pictures/rot6_pillow.jpeg", &[], 112.142, 122.714),
    ("pictures/rot6_pillow.png", &[], 112.132, 122.698),
    ("pictures/rot6_pillow.tiff", &[], 112.132, 122.698),
    ("pictures/rot6_pillow.webp", &[], 112.121, 122.761),
    (
        "dicom/for_processing.dcm",
        &["for_processing"],
        182.439,
        152.036,
    ),
    ("dicom/hand.dcm", &["not_a_chest"], 182.439, 152.036),
    (
        "dicom/jpeg_ycbcr_tagged_rgb.dcm",
        &["colour_tag"],
        130.220,
        112.351,
    ),
    (
        "dicom/plut_inverse_mono2.dcm",
        &["presentation_shape"],
        255.0 - 182.439,
        255.0 - 152.036,
    ),
    ("dicom/rescale_empty.dcm", &[], 182.439, 152.036),
    // The 1st to 99th percentile in place of a window that is black throughout.
    (
        "dicom/window_outside.dcm",
        &["window_outside_range"],
        149.088,
        128.637,
    ),
];

/// Files that are refused: the words of the program on a file, and of `serve` on an upload, which has no
/// name and whose decoder's own words are kept from a client.
const REFUSED: [(&str, &str, &str); 1] = [(
    "pictures/jpeg_cut_with_eoi.jpg",
    "is damaged (100.0 % of its blocks cannot be trusted); hint: copy or export it again",
    "image 1 is a damaged JPEG picture",
)];

fn found(name: &str) -> PathBuf {
    repository().join("tests/fixtures/found").join(name)
}

#[test]
fn every_picture_found_has_its_levels_and_remarks() {
    for (name, codes, upper, whole) in ACCEPTED {
        let reading = read(&found(name), None, &DecodeLimits::default()).unwrap();
        let said: Vec<_> = reading.remarks.iter().map(|r| r.kind().code()).collect();
        assert_eq!(said, codes, "{name}: {:?}", reading.remarks);
        let mean = |pixels: &[u8]| {
            pixels.iter().map(|level| f64::from(*level)).sum::<f64>() / pixels.len() as f64
        };
        let pixels = reading.picture.pixels();
        for (seen, expected) in [
            (mean(&pixels[..pixels.len() / 2]), upper),
            (mean(pixels), whole),
        ] {
            // pydicom rounds halves in another way.
            assert!(
                (seen - expected).abs() < 0.1,
                "{name}: {seen}, expected {expected}"
            );
        }
    }
}

#[test]
fn the_program_accepts_and_refuses_what_was_found() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data.jsonl");
    let row = |name: &str, at: usize| {
        serde_json::json!({
            "messages": [
                {"role": "user", "content": "<image>?"},
                {"role": "assistant", "content": format!("第{at}例正常。")},
            ],
            "images": [text(&found(name))],
        })
        .to_string()
    };
    let rows = ACCEPTED
        .iter()
        .enumerate()
        .map(|(at, (name, ..))| row(name, at));
    fs::write(&data, rows.collect::<Vec<_>>().join("\n") + "\n").unwrap();
    let model = tiny_model();
    let args = ["check", text(&data), "--model", text(&model)];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stdout}{stderr}");
    for words in [
        "its 16-bit levels use 12 bits (the highest is 4095)",
        "it holds 2 pages, of which the first is used",
        "it is FOR PROCESSING, not FOR PRESENTATION",
        "its body part is HAND, not CHEST or THORAX",
        "its header says RGB, its JPEG stream is marked as YBR_FULL",
        "it is MONOCHROME2 with Presentation LUT Shape INVERSE",
        "its window shows all its pixels black, or all white",
    ] {
        assert!(stdout.contains(words), "{words} is not in {stdout}");
    }
    for (name, words, _) in REFUSED {
        let (code, _, stderr) = infer(folder.path(), &[text(&found(name))]);
        assert_eq!(code, 1, "{name}");
        assert!(stderr.contains(words), "{name}: {stderr}");
    }
    let pages = found("pictures/two_pages.tif");
    let (code, _, stderr) = infer(folder.path(), &[text(&pages), "--frame", "3"]);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("has no frame 3, expected 1 to 2"),
        "{stderr}"
    );
}

#[test]
fn a_server_accepts_and_refuses_what_was_found() {
    let server = start(&[]);
    let ask = |name: &str| {
        let body = about(&data_url(&found(name)), "？");
        server.chat(&with(body, "max_tokens", 2.into()))
    };
    for (name, ..) in ACCEPTED {
        let reading = read(&found(name), None, &DecodeLimits::default()).unwrap();
        let expected: Vec<Value> = reading
            .remarks
            .iter()
            .map(|remark| with(json!(remark), "image", 1.into()))
            .collect();
        let answer = ask(name);
        assert_eq!(answer.status, 200, "{name}: {answer:?}");
        assert_eq!(answer.json()["remarks"], json!(expected), "{name}");
    }
    for (name, _, words) in REFUSED {
        let answer = ask(name);
        assert_eq!(answer.status, 400, "{name}: {answer:?}");
        let error = &answer.json()["error"];
        assert_eq!(error["message"], words, "{name}");
        assert_eq!(error["code"], "image", "{name}");
    }
}

#[test]
fn tags_show_what_remarks_are_made_of() {
    let folder = tempfile::tempdir().unwrap();
    let files = ["dicom/for_processing.dcm", "dicom/plut_inverse_mono2.dcm"].map(found);
    let args = [
        "infer",
        text(&files[0]),
        text(&files[1]),
        "--show-tags",
        "--json",
    ];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    let tags = json_lines(&stdout);
    assert_eq!(tags[0]["tags"]["presentation intent"], "FOR PROCESSING");
    assert_eq!(tags[1]["tags"]["presentation lut shape"], "INVERSE");
}
