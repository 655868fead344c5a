//! Broken, made-up and changed files.

use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::super::header::DECODER_PANIC;
use super::*;

#[test]
fn broken_files_are_refused_by_name() {
    let picture = rgb(40, 30);
    for format in FORMATS {
        let bytes = encode(&picture, format);
        for end in [bytes.len() / 3, bytes.len() / 2, bytes.len() * 9 / 10] {
            let error = read(&bytes[..end]).expect_err(&format!("{format:?} cut at {end}"));
            assert!(error.to_string().contains("`chest`"), "{error}");
        }
    }
    let error = read(&[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "picture `chest` is empty (0 bytes); hint: copy or export it again"
    );
    assert!(matches!(
        read(b"not a picture"),
        Err(ImageError::UnknownFormat { .. })
    ));
    let missing = load(Path::new("no/such.png"), &DecodeLimits::default()).unwrap_err();
    assert_eq!(missing.to_string(), "cannot read picture `no/such.png`");
}

#[test]
fn a_bomb_is_refused_by_its_header() {
    // A bitmap's header holds width and height at bytes 18 and 22; no pixel of them follows.
    let mut bitmap = encode(&rgb(2, 2), ImageFormat::Bmp);
    bitmap[18..22].copy_from_slice(&20_000_u32.to_le_bytes());
    bitmap[22..26].copy_from_slice(&20_000_u32.to_le_bytes());
    let error = read(&bitmap).unwrap_err();
    assert!(
        matches!(&error, ImageError::TooManyPixels { width: 20_000, height: 20_000, limit, .. }
            if *limit == 200_000_000),
        "{error}"
    );
    let mut jpeg = encode(&rgb(16, 16), ImageFormat::Jpeg);
    let frame = jpeg
        .windows(2)
        .position(|pair| pair == [0xff, 0xc0])
        .unwrap();
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0xff, 0xf0, 0xff, 0xf0]);
    assert!(matches!(read(&jpeg), Err(ImageError::TooManyPixels { .. })));

    let bytes = encode(&rgb(40, 30), ImageFormat::Png);
    let limits = DecodeLimits {
        max_decoded_bytes: 40 * 30 * 3 - 1,
        ..DecodeLimits::default()
    };
    assert!(matches!(
        decode(&bytes, "x", &limits),
        Err(ImageError::TooMuchMemory { .. })
    ));
    let limits = DecodeLimits {
        max_decoded_pixels: 40 * 30,
        ..DecodeLimits::default()
    };
    assert!(decode(&bytes, "x", &limits).is_ok());
    let limits = DecodeLimits {
        max_file_bytes: bytes.len() as u64 - 1,
        ..limits
    };
    assert!(matches!(
        decode(&bytes, "x", &limits),
        Err(ImageError::FileTooLarge { .. })
    ));
}

#[test]
fn a_jpegs_end_is_sought_after_its_header() {
    let bytes = encode(&rgb(30, 30), ImageFormat::Jpeg);
    assert!(jpeg_has_end(&bytes));
    assert!(jpeg_has_end(&[&bytes[..], b"words after the end"].concat()));
    // A thumbnail's end inside an application segment does not count.
    let thumbnail = [0xff, 0xe1, 0, 6, 0xff, 0xd8, 0xff, 0xd9];
    let cut = &bytes[2..bytes.len() - 2];
    assert!(!jpeg_has_end(&[&bytes[..2], &thumbnail, cut].concat()));
}

#[test]
fn mutated_files_are_read_or_refused_without_a_panic() {
    let limits = DecodeLimits {
        max_decoded_pixels: 1 << 18,
        max_decoded_bytes: 1 << 21,
        ..DecodeLimits::default()
    };
    let mut random = SmallRng::seed_from_u64(7);
    let alpha = DynamicImage::ImageRgba8(rgb(18, 11).into_rgba8());
    let gray = DynamicImage::ImageLuma16(rgb(18, 11).into_luma16());
    for format in FORMATS {
        let mut files = vec![encode(&rgb(18, 11), format)];
        if format != ImageFormat::Jpeg {
            files.push(encode(&alpha, format));
        }
        if matches!(format, ImageFormat::Png | ImageFormat::Tiff) {
            files.push(encode(&gray, format));
        }
        for round in 0..2000 {
            let mut bytes = files[round % files.len()].clone();
            for _ in 0..random.random_range(1..6) {
                let at = random.random_range(0..bytes.len());
                match random.random_range(0..4) {
                    0 => bytes[at] = random.random(),
                    1 => bytes[at] ^= 1 << random.random_range(0..8),
                    2 => bytes[at] = [0, 1, 0x7f, 0xff][random.random_range(0..4)],
                    _ if bytes.len() > 20 && random.random_bool(0.2) => bytes.truncate(at.max(16)),
                    _ => bytes.insert(at, random.random()),
                }
            }
            // A panic inside a decoder is caught and reported otherwise than its own errors.
            if let Err(error) = decode(&bytes, "chest", &limits) {
                let text = error.to_string();
                assert!(text.contains("`chest`"), "{format:?} round {round}: {text}");
                assert!(
                    !text.contains(DECODER_PANIC),
                    "{format:?} round {round}: {text}"
                );
            }
        }
    }
}
