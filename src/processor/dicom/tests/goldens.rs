//! Our 8-bit pictures beside pydicom's; `tests/fixtures/dicom/make.py` writes both sides.

use std::fs;
use std::path::{Path, PathBuf};

use image::DynamicImage;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::*;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dicom")
}

fn goldens(file: &str) -> Value {
    let text = fs::read_to_string(fixtures().join(file)).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["files"].take()
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

/// Largest difference to the golden, 0 only if every pixel is the same.
fn difference(picture: &DynamicImage, golden: &Value) -> u8 {
    let size = [golden["width"].as_u64(), golden["height"].as_u64()];
    assert_eq!(
        [Some(picture.width().into()), Some(picture.height().into())],
        size
    );
    let channels = u64::from(picture.color().channel_count());
    assert_eq!(Some(channels), golden["channels"].as_u64());
    let pixels = picture.as_bytes();
    let hash: String = Sha256::digest(pixels)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    if Some(hash.as_str()) == golden["sha256"].as_str() {
        return 0;
    }
    let stride = golden["stride"].as_u64().unwrap() as usize;
    let theirs = hex(golden["pixels"].as_str().unwrap());
    assert_eq!(theirs.len(), pixels.len().div_ceil(stride));
    let ours = pixels.iter().step_by(stride);
    let sampled = ours.zip(theirs).map(|(a, b)| a.abs_diff(b)).max();
    // The pixels that differ may lie between those of the golden.
    sampled.unwrap_or(0).max(1)
}

/// Rounding of a half, and of the transform of a lossy codec, may go the other way.
fn tolerance(name: &str) -> u8 {
    if name.contains("colour_ybr")
        || name.contains("lossy")
        || name.contains("jpeg")
        || name.contains("J2KI")
    {
        2
    } else {
        1
    }
}

#[test]
fn fixtures_of_every_kind_look_as_in_pydicom() {
    let goldens = goldens("goldens.json");
    let goldens = goldens.as_object().unwrap();
    assert!(goldens.len() > 50);
    let (mut wrong, mut exact) = (Vec::new(), 0);
    for (name, golden) in goldens {
        let bytes = fs::read(fixtures().join(format!("{name}.dcm"))).unwrap();
        match decode(&bytes, None, &DecodeLimits::default()) {
            Ok(decoded) => match difference(&decoded.picture, golden) {
                0 => exact += 1,
                off if off > tolerance(name) => wrong.push(format!("{name}: off by {off}")),
                _ => eprintln!("{name}: off by 1"),
            },
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(exact * 10 >= goldens.len() * 9, "only {exact} are the same");
}

#[test]
#[ignore = "needs XRAY_OPENI_DIR, the folder of real films and reports"]
fn real_files_look_as_in_pydicom_or_say_why_not() {
    let folder = std::env::var_os("XRAY_OPENI_DIR").expect("XRAY_OPENI_DIR is set");
    let folder = PathBuf::from(folder).join("dicom");
    let mut wrong = Vec::new();
    for (name, golden) in goldens("real.json").as_object().unwrap() {
        let bytes = fs::read(folder.join(name)).unwrap();
        let decoded = decode(&bytes, None, &DecodeLimits::default());
        let found = match (name.as_str(), decoded) {
            ("nonchest_MR_truncated.dcm", Err(DicomError::Truncated)) => continue,
            ("nonchest_RG3_JPLY.dcm", Err(DicomError::TransferSyntax { uid, .. })) => {
                assert_eq!(uid, "1.2.840.10008.1.2.4.51");
                continue;
            }
            (_, Ok(decoded)) => match difference(&decoded.picture, golden) {
                off if off <= tolerance(name) => {
                    eprintln!("{name}: off by {off}; {:?}", decoded.remarks);
                    continue;
                }
                off => format!("off by {off}"),
            },
            (_, Err(error)) => error.to_string(),
        };
        wrong.push(format!("{name}: {found}"));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let [one, two] = ["mono2", "fake_mono1"].map(|name| {
        let file = folder.join(format!("chest_rsna_jpeg_{name}.dcm"));
        levels(&fs::read(file).unwrap()).unwrap()
    });
    assert!(one.iter().zip(two).all(|(one, two)| *one == 255 - two));
}
