//! Pictures of every kind, whole and broken, written here and read back.

mod hostile;

use std::io::Cursor;

use ::tiff::encoder::{TiffEncoder, colortype};
use image::codecs::{jpeg::JpegEncoder, png::PngEncoder, webp::WebPEncoder};
use image::{ExtendedColorType, ImageEncoder, ImageFormat};

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
    if format == ImageFormat::Tiff {
        write_tiff(picture, &mut bytes);
    } else {
        picture.write_to(&mut bytes, format).unwrap();
    }
    bytes.into_inner()
}

fn write_tiff(picture: &DynamicImage, bytes: &mut Cursor<Vec<u8>>) {
    let mut file = TiffEncoder::new(bytes).unwrap();
    let (width, height) = (picture.width(), picture.height());
    match picture {
        DynamicImage::ImageRgb8(image) => file.write_image::<colortype::RGB8>(width, height, image),
        DynamicImage::ImageRgba8(image) => {
            file.write_image::<colortype::RGBA8>(width, height, image)
        }
        DynamicImage::ImageLuma16(image) => {
            file.write_image::<colortype::Gray16>(width, height, image)
        }
        other => panic!("no TIFF of {:?} is written here", other.color()),
    }
    .unwrap();
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
fn every_format_is_recognised_by_its_content() {
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
    // A second pixel fills the range.
    let half = native(&[
        0x0aff, 0x14ff, 0x1eff, 0x80ff, 0xffff, 0xffff, 0xffff, 0xffff,
    ]);
    assert_eq!(
        row(ExtendedColorType::Rgba16, 2, &half)[..3],
        [132, 137, 142]
    );
    assert_eq!(
        row(
            ExtendedColorType::La16,
            2,
            &native(&[0x0aff, 0x80ff, 0xffff, 0xffff])
        )[..3],
        [132; 3]
    );
}

/// Codes of the remarks on a picture, and every third value of its pixels.
fn seen(bytes: &[u8], frame: Option<usize>) -> (Vec<&'static str>, Vec<u8>) {
    let reading = decode_frame(bytes, "chest", frame, &DecodeLimits::default()).unwrap();
    let codes = reading.remarks.iter().map(|remark| remark.kind().code());
    let levels = reading.picture.pixels().iter().copied().step_by(3);
    (codes.collect(), levels.collect())
}

fn gray_16_png(levels: &[u16]) -> Vec<u8> {
    let mut bytes = Vec::new();
    PngEncoder::new(&mut bytes)
        .write_image(
            &native(levels),
            levels.len() as u32,
            1,
            ExtendedColorType::L16,
        )
        .unwrap();
    bytes
}

#[test]
fn sixteen_bit_levels_that_use_fewer_bits_are_shown_by_these() {
    for bits in 9..16 {
        let top = u16::MAX >> (16 - bits);
        let (codes, levels) = seen(&gray_16_png(&[0, top / 2 + 1, top]), None);
        assert_eq!(
            (codes, levels),
            (vec!["narrow_range"], vec![0, 128, 255]),
            "{bits}"
        );
    }
    // The highest level decides, not whether it is reached.
    assert_eq!(seen(&gray_16_png(&[0, 2900, 2100]), None).1, [0, 181, 131]);
    // Eight bits in sixteen are the levels themselves; fewer are not stretched.
    assert_eq!(seen(&gray_16_png(&[0, 1, 200]), None).1, [0, 1, 200]);
    assert_eq!(seen(&gray_16_png(&[0, 1, 2]), None).1, [0, 1, 2]);
    // The upper half is reached: all as before, without a word.
    let (codes, levels) = seen(&gray_16_png(&[0, 4095, 0x8000]), None);
    assert_eq!((codes, levels), (vec![], vec![0, 16, 128]));
}

/// The tags of a page beside those of its place, and its pixels, one row.
type Page<'a> = (&'a [(u16, u32)], &'a [u8]);

/// A TIFF file of `pages`.
fn tiff(pages: &[Page<'_>]) -> Vec<u8> {
    let mut file = b"II*\0\0\0\0\0".to_vec();
    let mut link = 4;
    for (tags, pixels) in pages {
        let offset = file.len() as u32;
        file.extend(*pixels);
        file.resize(file.len().next_multiple_of(2), 0);
        let directory = file.len() as u32;
        file[link..link + 4].copy_from_slice(&directory.to_le_bytes());
        let mut tags = tags.to_vec();
        tags.extend([(257, 1), (259, 1), (273, offset), (277, 1), (278, 1)]);
        tags.push((279, pixels.len() as u32));
        tags.sort_unstable();
        file.extend((tags.len() as u16).to_le_bytes());
        for (tag, value) in tags {
            file.extend(tag.to_le_bytes());
            file.extend(4_u16.to_le_bytes());
            file.extend(1_u32.to_le_bytes());
            file.extend(value.to_le_bytes());
        }
        link = file.len();
        file.extend([0; 4]);
    }
    file
}

fn little(levels: &[u16]) -> Vec<u8> {
    levels
        .iter()
        .flat_map(|level| level.to_le_bytes())
        .collect()
}

const BITS: u16 = 258;
const PHOTOMETRIC: u16 = 262;

#[test]
fn a_tiff_of_twelve_bits_is_scaled_whichever_level_is_white() {
    let pixels = little(&[0, 2048, 4095]);
    let black = tiff(&[(&[(256, 3), (BITS, 16), (PHOTOMETRIC, 1)], &pixels)]);
    assert_eq!(
        seen(&black, None),
        (vec!["narrow_range"], vec![0, 128, 255])
    );
    let white = tiff(&[(&[(256, 3), (BITS, 16), (PHOTOMETRIC, 0)], &pixels)]);
    assert_eq!(
        seen(&white, None),
        (vec!["narrow_range"], vec![255, 127, 0])
    );
}

#[test]
fn bits_in_reverse_order_are_reversed() {
    const FILL_ORDER: u16 = 266;
    let pixels = [1, 2, 200].map(u8::reverse_bits);
    let tags = [(256, 3), (BITS, 8), (PHOTOMETRIC, 1), (FILL_ORDER, 2)];
    assert_eq!(
        seen(&tiff(&[(&tags, &pixels)]), None),
        (vec![], vec![1, 2, 200])
    );
}

#[test]
fn the_first_of_several_pages_is_remarked_on_and_the_others_can_be_chosen() {
    const SMALLER_COPY: (u16, u32) = (254, 1);
    let tags = [(256, 3), (BITS, 8), (PHOTOMETRIC, 1)];
    let copy = [(256, 3), (BITS, 8), (PHOTOMETRIC, 1), SMALLER_COPY];
    let file = tiff(&[
        (&tags, &[1, 2, 3]),
        (&copy, &[7, 8, 9]),
        (&tags, &[4, 5, 6]),
    ]);
    assert_eq!(
        seen(&file, None),
        (vec!["first_of_several_pages"], vec![1, 2, 3])
    );
    assert_eq!(seen(&file, Some(1)), (vec![], vec![1, 2, 3]));
    assert_eq!(seen(&file, Some(2)), (vec![], vec![4, 5, 6]));
    let error = decode_frame(&file, "chest", Some(3), &DecodeLimits::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "TIFF picture `chest` has no frame 3, expected 1 to 2"
    );
    // Pages that follow each other in a circle are no pages without end.
    let mut circle = tiff(&[(&tags, &[1, 2, 3])]);
    let (first, end) = (circle[4..8].to_vec(), circle.len() - 4);
    circle[end..].copy_from_slice(&first);
    assert_eq!(seen(&circle, None), (vec![], vec![1, 2, 3]));
}

/// A chunk of a PNG file.
fn png_chunk(kind: &[u8; 4], content: &[u8]) -> Vec<u8> {
    let mut sum = flate2::Crc::new();
    sum.update(kind);
    sum.update(content);
    let length = (content.len() as u32).to_be_bytes();
    [&length, &kind[..], content, &sum.sum().to_be_bytes()].concat()
}

#[test]
fn the_first_frame_of_an_animation_is_remarked_on() {
    const AFTER_HEADER: usize = 33;
    let mut png = Vec::new();
    PngEncoder::new(&mut png)
        .write_image(&[5, 6], 2, 1, ExtendedColorType::L8)
        .unwrap();
    let control = png_chunk(b"acTL", &[0, 0, 0, 2, 0, 0, 0, 0]);
    png.splice(AFTER_HEADER..AFTER_HEADER, control);
    assert_eq!(
        seen(&png, None),
        (vec!["first_of_several_pages"], vec![5, 6])
    );

    let mut still = Vec::new();
    WebPEncoder::new_lossless(&mut still)
        .encode(&[5, 5, 5, 6, 6, 6], 2, 1, ExtendedColorType::Rgb8)
        .unwrap();
    let chunk = |kind: &[u8], content: &[u8]| {
        [kind, &(content.len() as u32).to_le_bytes(), content].concat()
    };
    // Animated; then width and height less one.
    let canvas = chunk(b"VP8X", &[2, 0, 0, 0, 1, 0, 0, 0, 0, 0]);
    let control = chunk(b"ANIM", &[0; 6]);
    // Width less one at 6; in the last byte, not to be blended with what is below.
    let place = [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 100, 0, 0, 2];
    let frame = chunk(b"ANMF", &[&place, &still[12..]].concat());
    let chunks = [b"WEBP".to_vec(), canvas, control, frame.clone(), frame].concat();
    let webp = chunk(b"RIFF", &chunks);
    assert_eq!(
        seen(&webp, None),
        (vec!["first_of_several_pages"], vec![5, 6])
    );
}

#[test]
fn one_colour_is_remarked_on() {
    let black = DynamicImage::ImageLuma8(image::GrayImage::new(8, 8));
    assert_eq!(
        seen(&encode(&black, ImageFormat::Bmp), None).0,
        ["one_colour"]
    );
    assert!(
        seen(&encode(&rgb(8, 8), ImageFormat::Bmp), None)
            .0
            .is_empty()
    );
}

fn jpeg_fixture(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/jpeg");
    std::fs::read(folder.join(name)).unwrap()
}

#[test]
fn a_jpeg_gives_pillows_pixels_exactly() {
    for name in [
        "gray",
        "gray_progressive",
        "gray_restarts",
        "colour_444",
        "colour_422",
        "colour_420",
        "colour_440",
        "colour_411",
        "colour_420_progressive",
        "colour_rgb",
    ] {
        let ours = read(&jpeg_fixture(&format!("{name}.jpg"))).unwrap();
        let pillows = read(&jpeg_fixture(&format!("{name}.png"))).unwrap();
        assert_eq!((ours.width(), ours.height()), (53, 45));
        assert!(ours == pillows, "{name}");
    }
    // Twelve bits are DICOM's; here the levels alone.
    let decoded = jpeg::decode(&jpeg_fixture("gray_12_bits.jpg"), None, 1 << 20).unwrap();
    let expected = image::load_from_memory(&jpeg_fixture("gray_12_bits.png")).unwrap();
    assert_eq!(
        decoded.pixels,
        jpeg::JpegPixels::Gray(expected.into_luma16().into_raw())
    );
}

#[test]
fn a_jpeg_damaged_inside_is_refused_or_remarked_on_with_its_share() {
    // Restarts after each of 42 blocks: one lost is 2.4 %.
    let whole = jpeg_fixture("gray_restarts.jpg");
    let restart = |number: u8| {
        whole
            .windows(2)
            .position(|pair| pair == [0xff, 0xd0 + number])
            .unwrap()
    };
    let mut broken = whole.clone();
    let (from, to) = (restart(2) + 2, restart(3));
    broken[from..to].fill(0xaa);
    let (codes, levels) = seen(&broken, None);
    assert_eq!(codes, ["damaged"]);
    let (_, sound) = seen(&whole, None);
    let off = levels.iter().zip(&sound).filter(|(a, b)| a != b).count();
    assert!(
        off <= 64,
        "{off} pixels differ, more than those of the lost block"
    );
    // A restart mark that is missing moves nothing after it.
    let mut missing = whole.clone();
    missing.drain(from - 2..to);
    let (codes, levels) = seen(&missing, None);
    assert_eq!(codes, ["damaged"]);
    assert_eq!(levels[levels.len() - 200..], sound[sound.len() - 200..]);
    // Without restart markers the start of the damage is unknown.
    for name in ["gray.jpg", "gray_progressive.jpg", "colour_420.jpg"] {
        let bytes = jpeg_fixture(name);
        let cut = [&bytes[..bytes.len() * 3 / 4], &[0xff, 0xd9]].concat();
        let text = read(&cut).unwrap_err().to_string();
        assert_eq!(
            text,
            "JPEG picture `chest` is damaged (100.0 % of its blocks cannot be trusted); hint: copy or export it again"
        );
    }
}

#[test]
fn formats_that_are_not_read_are_named() {
    for (head, name, hint) in [
        (
            &b"\0\0\0\x1cftypavif\0\0\0\0"[..],
            "AVIF",
            "avifdec IN OUT.png",
        ),
        (
            b"\0\0\0\x1cftypheic\0\0\0\0",
            "HEIC",
            "heif-convert IN OUT.png",
        ),
        (b"\xff\x0a\xfa\x1f\x41\x91", "JPEG XL", "djxl IN OUT.png"),
        (b"%PDF-1.7\n", "PDF", "pdftoppm"),
        (
            b"\x28\0\0\0\x10\0\0\0",
            "DIB, a bitmap without its file header",
            "Pillow",
        ),
        (b"ObjectType = Image\nNDims = 2\n", "MetaImage", "OUT.nrrd"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "compressed with gzip", "gunzip"),
        (b"P7\nWIDTH 1\n", "PAM", "pamtopng"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "a pointer of git-lfs",
            "git lfs pull",
        ),
        (
            b"\n<!DOCTYPE html><title>403</title>",
            "a web page",
            "download the picture again",
        ),
        (
            b"{\"error\": \"gone\"}",
            "JSON",
            "download the picture again",
        ),
        (
            b"<?xml version=\"1.0\"?>\n<svg width=\"9\"/>",
            "SVG",
            "rsvg-convert",
        ),
        (b"\0\0\0\x20ftypisom\0\0\0\0", "a video", "ffmpeg"),
        (b"8BPS\0\x01", "a document of Photoshop", "Pillow"),
    ] {
        let text = read(head).unwrap_err().to_string();
        assert!(
            text.contains(&format!("the content is {name}")) && text.contains(hint),
            "{text}"
        );
    }
    for (head, format) in [
        (&b"\xff\xd8\xff\xf7\0\x0b\x08"[..], PictureFormat::JpegLs),
        (b"\0\0\0\x0cjP  \r\n\x87\n", PictureFormat::Jpeg2000),
        (b"\xff\x4f\xff\x51\0\x2f", PictureFormat::Jpeg2000),
        (b"P5 3 2 255\n", PictureFormat::Pnm),
        (b"NRRD0004\n", PictureFormat::Nrrd),
        (b"GIF89a\x01\0\x01\0", PictureFormat::Gif),
    ] {
        assert_eq!(PictureFormat::of(head, "x").unwrap(), format);
    }
    // The mark of BigTIFF.
    assert_eq!(
        PictureFormat::of(b"II\x2b\0\x08\0\0\0\x10\0\0\0\0\0\0\0", "x").unwrap(),
        PictureFormat::Tiff
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
    // Some writers put the mark of a JPEG's segment before it.
    let mut marked = Vec::new();
    let mut encoder = WebPEncoder::new_lossless(&mut marked);
    let exif = [&b"Exif\0\0"[..], &exif(6)].concat();
    encoder.set_exif_metadata(exif).unwrap();
    encoder.write_image(&pixels, 10, 20, color).unwrap();
    for bytes in [jpeg, webp, marked] {
        let ours = read(&bytes).unwrap();
        assert_eq!((ours.width(), ours.height()), (20, 10));
    }
}
