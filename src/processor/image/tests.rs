//! Pictures of every kind, whole and broken, written here and read back.

use std::io::Cursor;

use image::codecs::{jpeg::JpegEncoder, png::PngEncoder, webp::WebPEncoder};
use image::{ExtendedColorType, ImageEncoder, ImageFormat};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;

const FORMATS: [ImageFormat; 5] = [
    ImageFormat::Png,
    ImageFormat::Jpeg,
    ImageFormat::WebP,
    ImageFormat::Bmp,
    ImageFormat::Tiff,
];

fn encode(picture: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A picture in which no two pixels and no two channels are alike.
fn rgb(width: u32, height: u32) -> DynamicImage {
    let pixel = |x, y| image::Rgb([(x * 9) as u8, (y * 11) as u8, (x * 5 + y * 3 + 40) as u8]);
    DynamicImage::ImageRgb8(image::RgbImage::from_fn(width, height, pixel))
}

fn read(bytes: &[u8]) -> Result<RgbImage, ImageError> {
    decode(bytes, "chest", &DecodeLimits::default())
}

/// Decodes a PNG of `color` whose samples are `samples`, one row.
fn row(color: ExtendedColorType, width: u32, samples: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    PngEncoder::new(&mut bytes)
        .write_image(samples, width, 1, color)
        .unwrap();
    read(&bytes).unwrap().into_pixels()
}

fn native(values: &[u16]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_ne_bytes())
        .collect()
}

#[test]
fn every_format_is_told_by_its_content() {
    let picture = rgb(20, 13);
    for format in FORMATS {
        let ours = read(&encode(&picture, format)).unwrap();
        assert_eq!((ours.width(), ours.height()), (20, 13), "{format:?}");
        if format != ImageFormat::Jpeg {
            assert_eq!(ours.pixels(), picture.as_bytes(), "{format:?}");
        }
    }
    // The decoder of JPEG loses something, but not much.
    let flat = DynamicImage::ImageLuma8(image::GrayImage::from_pixel(16, 16, image::Luma([77])));
    let ours = read(&encode(&flat, ImageFormat::Jpeg)).unwrap();
    assert!(ours.pixels().iter().all(|value| value.abs_diff(77) <= 1));
}

#[test]
fn eight_bit_pixels_become_what_pillow_makes_of_them() {
    assert_eq!(
        row(ExtendedColorType::L8, 2, &[7, 200]),
        [7, 7, 7, 200, 200, 200]
    );
    // Grey loses its alpha, colour is laid on white: 10·128/255 + 255·127/255 is 132.02.
    assert_eq!(
        row(ExtendedColorType::La8, 2, &[7, 0, 200, 255]),
        [7, 7, 7, 200, 200, 200]
    );
    let colors = [10, 20, 30, 128, 10, 20, 30, 0, 10, 20, 30, 255];
    assert_eq!(
        row(ExtendedColorType::Rgba8, 3, &colors),
        [132, 137, 142, 255, 255, 255, 10, 20, 30]
    );
}

#[test]
fn sixteen_bit_grey_is_scaled_and_colour_keeps_its_high_byte() {
    let levels = native(&[0, 128, 129, 0x8000, 65535]);
    let gray: Vec<u8> = row(ExtendedColorType::L16, 5, &levels)
        .into_iter()
        .step_by(3)
        .collect();
    assert_eq!(gray, [0, 0, 1, 128, 255]);
    assert_eq!(
        row(
            ExtendedColorType::Rgb16,
            1,
            &native(&[0x01ff, 0x8000, 0xffff])
        ),
        [1, 128, 255]
    );
    let half = native(&[0x0aff, 0x14ff, 0x1eff, 0x80ff]);
    assert_eq!(row(ExtendedColorType::Rgba16, 1, &half), [132, 137, 142]);
    assert_eq!(
        row(ExtendedColorType::La16, 1, &native(&[0x0aff, 0x80ff])),
        [132; 3]
    );
}

/// Exif that says nothing but the orientation.
fn exif(orientation: u8) -> Vec<u8> {
    let mut exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
    exif.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
    exif
}

#[test]
fn the_cameras_orientation_is_applied() {
    // Two columns, three rows:  1 2
    //                           3 4
    //                           5 6
    let upright: [(u8, [u8; 6]); 8] = [
        (1, [1, 2, 3, 4, 5, 6]),
        (2, [2, 1, 4, 3, 6, 5]),
        (3, [6, 5, 4, 3, 2, 1]),
        (4, [5, 6, 3, 4, 1, 2]),
        (5, [1, 3, 5, 2, 4, 6]),
        (6, [5, 3, 1, 6, 4, 2]),
        (7, [6, 4, 2, 5, 3, 1]),
        (8, [2, 4, 6, 1, 3, 5]),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (orientation, expected) in upright {
        let mut bytes = Vec::new();
        let mut encoder = PngEncoder::new(&mut bytes);
        encoder.set_exif_metadata(exif(orientation)).unwrap();
        encoder
            .write_image(&[1, 2, 3, 4, 5, 6], 2, 3, ExtendedColorType::L8)
            .unwrap();
        let ours = read(&bytes).unwrap();
        let values: Vec<u8> = ours.pixels().iter().copied().step_by(3).collect();
        assert_eq!(values, expected, "orientation {orientation}");
        let path = dir.path().join("upright.jpg");
        std::fs::write(&path, &bytes).unwrap();
        let size = probe(&path, &DecodeLimits::default()).unwrap();
        assert_eq!(
            size,
            (ours.width(), ours.height()),
            "orientation {orientation}"
        );
    }
    let (mut jpeg, mut webp) = (Vec::new(), Vec::new());
    let (pixels, color) = (rgb(10, 20).into_bytes(), ExtendedColorType::Rgb8);
    let mut encoder = JpegEncoder::new(&mut jpeg);
    encoder.set_exif_metadata(exif(6)).unwrap();
    encoder.write_image(&pixels, 10, 20, color).unwrap();
    let mut encoder = WebPEncoder::new_lossless(&mut webp);
    encoder.set_exif_metadata(exif(6)).unwrap();
    encoder.write_image(&pixels, 10, 20, color).unwrap();
    for bytes in [jpeg, webp] {
        let ours = read(&bytes).unwrap();
        assert_eq!((ours.width(), ours.height()), (20, 10));
    }
}

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
    assert!(matches!(
        read(b"GIF89a\x01\0\x01\0"),
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
            // A panic inside a decoder is caught and told apart from its own refusals.
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
