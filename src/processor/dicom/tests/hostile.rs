//! Files that are cut off, damaged, or made to do harm: an error each, and never a panic.

use dicom_core::VR;
use dicom_dictionary_std::tags;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::fs;
use std::path::Path;

use super::written::{Builder, NATIVE};
use super::*;
use crate::processor::image::{self, ImageError};

fn file() -> Builder {
    Builder::new(NATIVE[1], 8, false).bytes(&[5; 12])
}

#[test]
fn a_cut_file_is_called_cut_off() {
    let whole = file().file();
    let set = whole
        .windows(4)
        .position(|w| w == [0x08, 0, 0x60, 0])
        .unwrap();
    for length in set + 1..whole.len() {
        let error = levels(&whole[..length]).unwrap_err();
        // Between two attributes a file may end, and then has no pixels.
        assert!(
            matches!(error, DicomError::Truncated | DicomError::NoPixels),
            "{length}: {error}"
        );
    }
}

#[test]
fn sizes_that_cannot_be_are_refused_before_room_is_made() {
    let huge = file()
        .word(tags::ROWS, 65535)
        .word(tags::COLUMNS, 65535)
        .file();
    assert_eq!(
        levels(&huge),
        Err(DicomError::TooManyPixels {
            columns: 65535,
            rows: 65535
        })
    );
    let limits = DecodeLimits {
        max_decoded_bytes: 40,
        ..DecodeLimits::default()
    };
    assert!(matches!(
        decode(&file().file(), None, &limits),
        Err(DicomError::TooMuchMemory)
    ));
    let none = file().word(tags::ROWS, 0).file();
    assert!(matches!(levels(&none), Err(DicomError::Damaged(reason)) if reason.contains("4 × 0")));
    let long = file().word(tags::ROWS, 400).file();
    assert_eq!(levels(&long), Err(DicomError::Truncated));
    for (tag, value) in [
        (tags::BITS_ALLOCATED, 24),
        (tags::BITS_ALLOCATED, 64),
        (tags::BITS_ALLOCATED, 1),
        (tags::BITS_STORED, 0),
        (tags::BITS_STORED, 9),
        (tags::HIGH_BIT, 3),
        (tags::PIXEL_REPRESENTATION, 7),
        (tags::SAMPLES_PER_PIXEL, 4),
        (tags::SAMPLES_PER_PIXEL, 3),
    ] {
        let error = levels(&file().word(tag, value).file());
        assert!(
            matches!(error, Err(DicomError::Value { .. })),
            "{tag} {value}: {error:?}"
        );
    }
    for photometric in ["YBR_PARTIAL_420", "GEHEIM"] {
        let file = file()
            .text(tags::PHOTOMETRIC_INTERPRETATION, VR::CS, photometric)
            .file();
        let error = levels(&file).unwrap_err().to_string();
        assert!(
            error.contains("Photometric") && !error.contains("GEHEIM"),
            "{error}"
        );
    }
    for frames in ["0", "-1", "many", "99999999999999999999999"] {
        let file = file().text(tags::NUMBER_OF_FRAMES, VR::IS, frames).file();
        assert!(
            matches!(levels(&file), Err(DicomError::Damaged(_))),
            "{frames}"
        );
    }
    let far = file()
        .text(tags::NUMBER_OF_FRAMES, VR::IS, "9223372036854775807")
        .file();
    assert_eq!(
        frame_levels(&far, Some(usize::MAX / 2)),
        Err(DicomError::Truncated)
    );
}

#[test]
fn nesting_without_end_costs_nothing() {
    let mut bytes = vec![0; 128];
    bytes.extend(b"DICM");
    // A million sequences inside one another.
    for _ in 0..1_000_000 {
        bytes.extend([
            0x08, 0x00, 0x40, 0x00, b'S', b'Q', 0, 0, 0xff, 0xff, 0xff, 0xff,
        ]);
        bytes.extend([0xfe, 0xff, 0x00, 0xe0, 0xff, 0xff, 0xff, 0xff]);
    }
    assert!(
        matches!(levels(&bytes), Err(DicomError::Damaged(reason)) if reason.contains("nested"))
    );
}

#[test]
fn a_deflated_bomb_is_stopped() {
    use std::io::Write;
    let mut bytes = Builder::new(NATIVE[2], 8, false).bytes(&[5; 12]).file();
    let meta = bytes.windows(4).position(|w| w == [2, 0, 0x12, 0]);
    // After the meta group: its length is in its first attribute.
    let length = u32::from_le_bytes(bytes[140..144].try_into().unwrap()) as usize;
    assert!(meta < Some(144 + length));
    bytes.truncate(144 + length);
    let mut encoder = flate2::write::DeflateEncoder::new(&mut bytes, flate2::Compression::best());
    encoder.write_all(&vec![8; 8 << 20]).unwrap();
    encoder.finish().unwrap();
    let limits = DecodeLimits {
        max_decoded_bytes: 1 << 20,
        ..DecodeLimits::default()
    };
    assert!(matches!(
        decode(&bytes, None, &limits),
        Err(DicomError::TooMuchMemory)
    ));
}

#[test]
fn other_bytes_are_no_dicom() {
    for bytes in [
        &b"hello, world, this is no picture at all"[..],
        &[0; 200],
        &[8, 0, 5, 0, 0xff, 0xff, 0xff, 0x7f, 1, 2, 3],
        &[0x89, b'P', b'N', b'G', 13, 10, 26, 10, 0, 0, 0, 13],
        &[2, 0],
        &[],
    ] {
        assert!(!looks_like_dicom(bytes), "{bytes:?}");
    }
    let error = image::decode(b"hello, world", "scan.dcm", &DecodeLimits::default());
    assert!(matches!(error, Err(ImageError::UnknownFormat { .. })));
}

/// Decodes what a few changed bytes make of `bytes`, and shows its tags.
fn mutate(random: &mut SmallRng, bytes: &[u8], limits: &DecodeLimits) {
    let mut bytes = bytes.to_vec();
    // Half of the changes fall on the header, where they do most.
    for _ in 0..random.random_range(1..6) {
        let end = if random.random() {
            bytes.len().min(1200)
        } else {
            bytes.len()
        };
        let at = random.random_range(0..end);
        match random.random_range(0..4) {
            0 => bytes[at] ^= 1 << random.random_range(0..8),
            1 => bytes[at] = random.random(),
            2 => bytes[at] = 0xff,
            _ => bytes[at] = 0,
        }
    }
    if random.random_range(0..8) == 0 {
        let length = random.random_range(0..bytes.len());
        bytes.truncate(length);
    }
    let frame = random.random::<bool>().then_some(1);
    // Through the outer door, which also keeps a decoder's panic from going further.
    if let Err(error) = image::decode_frame(&bytes, "f.dcm", frame, limits) {
        assert!(!error.to_string().contains("GEHEIM"), "{error}");
    }
    if looks_like_dicom(&bytes) {
        // Ours alone: here nothing catches a panic.
        let _ = technical(&bytes, limits);
        let _ = probe(&bytes, limits);
    }
}

#[test]
fn five_thousand_changed_files_never_panic() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dicom");
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "dcm"))
        .collect();
    files.sort();
    let files: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).unwrap()).collect();
    assert!(files.len() > 50);
    let mut random = SmallRng::seed_from_u64(8);
    let limits = DecodeLimits {
        max_decoded_pixels: 1 << 22,
        max_decoded_bytes: 64 << 20,
        ..DecodeLimits::default()
    };
    for at in 0..5000 {
        mutate(&mut random, &files[at % files.len()], &limits);
    }
}
