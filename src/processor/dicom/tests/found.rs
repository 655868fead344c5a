//! What real files hold that the standard does not foresee, or that is easily read wrongly.

use dicom_core::{DataElement, PrimitiveValue, Tag, VR};
use dicom_dictionary_std::tags;
use image::ImageEncoder;
use image::codecs::jpeg::JpegEncoder;

use super::written::{Builder, EXPLICIT, NATIVE, ramp, ramp_file};
use super::*;

#[test]
fn jpeg_ls_padded_before_its_end_is_read() {
    let numbers = ramp(12, false);
    let options = jpegls::EncodeOptions::default();
    let mut data = Vec::new();
    jpegls::encode_with_options(&numbers, 4, 3, &options, &mut data).unwrap();
    let end = data
        .windows(2)
        .rposition(|pair| pair == [0xff, 0xd9])
        .unwrap();
    data.insert(end, 0);
    let packed = ramp_file("1.2.840.10008.1.2.4.80", 12, false, "MONOCHROME2")
        .fragments(&[], &[data])
        .file();
    let plain = ramp_file(EXPLICIT, 12, false, "MONOCHROME2").file();
    assert_eq!(levels(&packed), levels(&plain));
}

/// The remarks on a file, by code, and its pixels.
fn seen(file: Builder) -> (Vec<&'static str>, Vec<u8>) {
    let decoded = decode(&file.file(), None, &DecodeLimits::default()).unwrap();
    let codes = decoded.remarks.iter().map(|remark| remark.kind().code());
    (codes.collect(), decoded.picture.into_bytes())
}

#[test]
fn empty_attributes_count_as_absent() {
    let file = || ramp_file(EXPLICIT, 12, false, "MONOCHROME2");
    for empty in ["", " "] {
        let blank = file()
            .text(tags::RESCALE_SLOPE, VR::DS, empty)
            .text(tags::RESCALE_INTERCEPT, VR::DS, empty)
            .text(tags::NUMBER_OF_FRAMES, VR::IS, empty);
        assert_eq!(seen(blank), seen(file()), "{empty:?}");
        let without = Builder::new(EXPLICIT, 12, false).words(&ramp(12, false));
        let blank = Builder::new(EXPLICIT, 12, false)
            .window(empty, empty)
            .words(&ramp(12, false));
        assert_eq!(seen(blank), seen(without), "{empty:?}");
    }
    let mut no_bits = file();
    no_bits.set.put(DataElement::new(
        tags::BITS_STORED,
        VR::US,
        PrimitiveValue::Empty,
    ));
    assert_eq!(seen(no_bits), seen(file()));
}

#[test]
fn lower_case_photometric_interpretation_is_read() {
    let file = |photometric| ramp_file(EXPLICIT, 12, false, photometric);
    assert_eq!(seen(file("monochrome1")), seen(file("MONOCHROME1")));
}

#[test]
fn a_window_that_shows_nothing_is_replaced() {
    let numbers = [
        1000, 1100, 1200, 1300, 1400, 1500, 1600, 1700, 1800, 1900, 2000, 2100,
    ];
    let file = || Builder::new(EXPLICIT, 12, false).words(&numbers);
    let (codes, whole) = seen(file());
    assert!(codes.is_empty() && whole[0] == 0 && whole[11] == 255);
    for (center, width) in [("-4000", "100"), ("9000", "50"), ("2400", "100")] {
        let (codes, levels) = seen(file().window(center, width));
        assert_eq!(codes, ["window_outside_range"], "{center} {width}");
        assert_eq!(levels, whole);
    }
    // Sigmoid never ends, but is black far away.
    let sigmoid = file()
        .window("20000", "100")
        .text(tags::VOILUT_FUNCTION, VR::CS, "SIGMOID");
    assert_eq!(seen(sigmoid), (vec!["window_outside_range"], whole.clone()));
    // One that shows the brightest pixel only is the writer's business.
    assert!(seen(file().window("2100", "100")).0.is_empty());
    // Nothing but padding outside: the padding does not save the window.
    let padded = Builder::new(EXPLICIT, 12, false)
        .words(&[
            0, 0, 1200, 1300, 1400, 1500, 1600, 1700, 1800, 1900, 2000, 2100,
        ])
        .word(tags::PIXEL_PADDING_VALUE, 0)
        .window("500", "100");
    assert_eq!(seen(padded).0, ["window_outside_range"]);
}

#[test]
fn the_presentation_shape_decides_over_the_photometric_interpretation() {
    let file = |photometric, shape: &str| {
        let file = ramp_file(EXPLICIT, 12, false, photometric);
        seen(file.text(tags::PRESENTATION_LUT_SHAPE, VR::CS, shape))
    };
    let rising = file("MONOCHROME2", "IDENTITY");
    let falling = file("MONOCHROME1", "INVERSE");
    assert_eq!((rising.1[0], falling.1[0]), (0, 255));
    assert!(rising.0.is_empty() && falling.0.is_empty());
    let said = vec!["presentation_shape"];
    assert_eq!(
        file("MONOCHROME2", "INVERSE"),
        (said.clone(), falling.1.clone())
    );
    assert_eq!(file("MONOCHROME1", "IDENTITY"), (said, rising.1.clone()));
    assert_eq!(file("MONOCHROME1", ""), falling);
}

#[test]
fn the_intent_of_an_image_is_remarked_on() {
    let file = || ramp_file(EXPLICIT, 8, false, "MONOCHROME2");
    let code = |tag, text: &str| seen(file().text(tag, VR::CS, text)).0;
    assert_eq!(
        code(tags::PRESENTATION_INTENT_TYPE, "FOR PROCESSING"),
        ["for_processing"]
    );
    assert!(code(tags::PRESENTATION_INTENT_TYPE, "FOR PRESENTATION").is_empty());
    assert_eq!(
        code(tags::BURNED_IN_ANNOTATION, "YES"),
        ["burned_in_annotation"]
    );
    assert!(code(tags::BURNED_IN_ANNOTATION, "NO").is_empty());
    assert_eq!(code(tags::VIEW_POSITION, "MLO"), ["not_a_chest"]);
    assert!(code(tags::VIEW_POSITION, "PA").is_empty());
    assert_eq!(code(tags::MODALITY, "CT"), ["not_a_chest"]);
    assert_eq!(code(tags::BODY_PART_EXAMINED, "HAND"), ["not_a_chest"]);
    let mut overlay = file();
    let bits = PrimitiveValue::U8([1, 2].into_iter().collect());
    overlay
        .set
        .put(DataElement::new(Tag(0x6002, 0x3000), VR::OW, bits));
    assert_eq!(seen(overlay).0, ["overlay_left_out"]);
}

/// A colour file of 4 × 3 pixels.
fn colour_file(syntax: &str, photometric: &str) -> Builder {
    Builder::new(syntax, 8, false)
        .text(tags::PHOTOMETRIC_INTERPRETATION, VR::CS, photometric)
        .word(tags::SAMPLES_PER_PIXEL, 3)
        .word(tags::PLANAR_CONFIGURATION, 0)
}

#[test]
fn the_marks_of_a_colour_jpeg_win_over_the_tag() {
    let pixels: Vec<u8> = (0..36).map(|value| value * 7).collect();
    let mut data = Vec::new();
    JpegEncoder::new_with_quality(&mut data, 95)
        .write_image(&pixels, 4, 3, image::ExtendedColorType::Rgb8)
        .unwrap();
    let file = |data: &[u8], photometric| {
        seen(colour_file("1.2.840.10008.1.2.4.50", photometric).fragments(&[], &[data.to_vec()]))
    };
    // JFIF says luminance and colour differences.
    let right = file(&data, "YBR_FULL_422");
    assert!(right.0.is_empty());
    assert_eq!(file(&data, "RGB"), (vec!["colour_tag"], right.1.clone()));
    // Without any mark the tag is all there is.
    let mark = data.windows(4).position(|bytes| bytes == b"JFIF").unwrap();
    data[mark..mark + 4].copy_from_slice(b"NONE");
    assert_eq!(file(&data, "YBR_FULL_422"), right);
    let (codes, other) = file(&data, "RGB");
    assert!(codes.is_empty() && other != right.1);
}

#[test]
fn plain_colour_at_half_width_is_read() {
    // Two luminances, then both colour differences, for two pixels.
    let halved: Vec<u8> = (0..6)
        .flat_map(|at| [at * 20, at * 20 + 9, 128, 128])
        .collect();
    let (_, pixels) = seen(colour_file(EXPLICIT, "YBR_FULL_422").bytes(&halved));
    let luminance: Vec<u8> = (0..6).flat_map(|at| [at * 20, at * 20 + 9]).collect();
    assert_eq!(
        pixels.iter().copied().step_by(3).collect::<Vec<_>>(),
        luminance
    );
    // Some writers say so of pixels that are whole.
    let whole: Vec<u8> = luminance
        .iter()
        .flat_map(|level| [*level, 128, 128])
        .collect();
    let (_, again) = seen(colour_file(EXPLICIT, "YBR_FULL_422").bytes(&whole));
    assert_eq!(again, pixels);
}

#[test]
fn big_endian_words_of_an_odd_count_of_bytes_are_read() {
    let levels: Vec<u8> = (1..=9).map(|value| value * 20).collect();
    let mut swapped = levels.clone();
    swapped.push(0);
    for pair in swapped.as_chunks_mut::<2>().0 {
        pair.swap(0, 1);
    }
    let words = swapped.as_chunks::<2>().0.iter();
    let words: Vec<u16> = words.map(|pair| u16::from_be_bytes(*pair)).collect();
    let file = Builder::new(NATIVE[3], 8, false)
        .word(tags::COLUMNS, 3)
        .words(&words);
    assert_eq!(seen(file).1, levels);
    // Three frames of 3 pixels: the second begins inside a word.
    let frames = Builder::new(NATIVE[3], 8, false)
        .word(tags::COLUMNS, 3)
        .word(tags::ROWS, 1)
        .text(tags::NUMBER_OF_FRAMES, VR::IS, "3")
        .words(&words)
        .file();
    for (frame, expected) in (1..).zip(levels.chunks(3)) {
        assert_eq!(frame_levels(&frames, Some(frame)).unwrap(), expected);
    }
}

#[test]
fn jpeg_of_twelve_bits_is_read() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/jpeg");
    let data = std::fs::read(folder.join("gray_12_bits.jpg")).unwrap();
    let file = Builder::new("1.2.840.10008.1.2.4.51", 12, false)
        .word(tags::COLUMNS, 53)
        .word(tags::ROWS, 45)
        .text(tags::VOILUT_FUNCTION, VR::CS, "LINEAR_EXACT")
        .window("2047.5", "4095")
        .fragments(&[], &[data]);
    let expected = image::open(folder.join("gray_12_bits.png")).unwrap();
    let expected: Vec<u8> = expected
        .into_luma16()
        .into_raw()
        .into_iter()
        .map(|number| (f64::from(number) / 4095.0 * 255.0).round() as u8)
        .collect();
    assert_eq!(seen(file), (vec![], expected));
}

#[test]
fn hints_name_programs_that_can() {
    let hint = |uid: &str| syntax::Syntax::of(uid).refused().to_string();
    assert!(hint("1.2.840.10008.1.2.4.80").contains("dcmdjpls"));
    let high_throughput = hint("1.2.840.10008.1.2.4.201");
    assert!(
        high_throughput.contains("pylibjpeg-openjpeg") && !high_throughput.contains("gdcm"),
        "{high_throughput}"
    );
    assert!(hint("1.2.840.10008.1.2.4.53").contains("dcmdjpeg"));
}
