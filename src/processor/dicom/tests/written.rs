//! Files written with the `dicom` crates and read back.

use dicom_core::header::Length;
use dicom_core::value::{DataSetSequence, PixelFragmentSequence};
use dicom_core::{DataElement, PrimitiveValue, Tag, VR};
use dicom_dictionary_std::tags;
use dicom_object::{FileMetaTableBuilder, InMemDicomObject};
use image::ImageEncoder;
use image::codecs::jpeg::JpegEncoder;

use super::*;

pub(super) const NATIVE: [&str; 4] = [
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.1.99",
    "1.2.840.10008.1.2.2",
];
pub(super) const EXPLICIT: &str = NATIVE[1];

/// A file under construction: a grey picture of 4 × 3 pixels unless changed.
pub(super) struct Builder {
    pub(super) set: InMemDicomObject,
    syntax: String,
}

impl Builder {
    pub(super) fn new(syntax: &str, stored: u16, signed: bool) -> Self {
        let this = Self {
            set: InMemDicomObject::new_empty(),
            syntax: syntax.to_owned(),
        };
        this.text(tags::PATIENT_NAME, VR::PN, "GEHEIM^NAME")
            .text(tags::PATIENT_ID, VR::LO, "GEHEIM-4711")
            .text(tags::INSTITUTION_NAME, VR::LO, "GEHEIM HOSPITAL")
            .text(tags::MODALITY, VR::CS, "DX")
            .text(tags::BODY_PART_EXAMINED, VR::CS, "CHEST")
            .text(tags::PHOTOMETRIC_INTERPRETATION, VR::CS, "MONOCHROME2")
            .word(tags::SAMPLES_PER_PIXEL, 1)
            .word(tags::ROWS, 3)
            .word(tags::COLUMNS, 4)
            .word(tags::BITS_ALLOCATED, if stored > 8 { 16 } else { 8 })
            .word(tags::BITS_STORED, stored)
            .word(tags::HIGH_BIT, stored - 1)
            .word(tags::PIXEL_REPRESENTATION, signed.into())
    }

    pub(super) fn text(mut self, tag: Tag, vr: VR, text: &str) -> Self {
        self.set.put(DataElement::new(tag, vr, text));
        self
    }

    pub(super) fn word(mut self, tag: Tag, word: u16) -> Self {
        self.set
            .put(DataElement::new(tag, VR::US, PrimitiveValue::from(word)));
        self
    }

    pub(super) fn window(self, center: &str, width: &str) -> Self {
        self.text(tags::WINDOW_CENTER, VR::DS, center)
            .text(tags::WINDOW_WIDTH, VR::DS, width)
    }

    pub(super) fn words(mut self, words: &[u16]) -> Self {
        let value = PrimitiveValue::U16(words.iter().copied().collect());
        self.set
            .put(DataElement::new(tags::PIXEL_DATA, VR::OW, value));
        self
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        let value = PrimitiveValue::U8(bytes.iter().copied().collect());
        self.set
            .put(DataElement::new(tags::PIXEL_DATA, VR::OB, value));
        self
    }

    pub(super) fn fragments(mut self, offsets: &[u32], fragments: &[Vec<u8>]) -> Self {
        let value = PixelFragmentSequence::new(offsets.to_vec(), fragments.to_vec());
        self.set
            .put(DataElement::new(tags::PIXEL_DATA, VR::OB, value));
        self
    }

    pub(super) fn file(self) -> Vec<u8> {
        let meta = FileMetaTableBuilder::new()
            .transfer_syntax(&self.syntax)
            .media_storage_sop_class_uid("1.2.840.10008.5.1.4.1.1.1.1")
            .media_storage_sop_instance_uid("1.2.3");
        let mut bytes = Vec::new();
        let file = self.set.with_meta(meta).unwrap();
        file.write_all(&mut bytes).unwrap();
        bytes
    }

    /// Without preamble and file meta.
    fn bare(self) -> Vec<u8> {
        use dicom_encoding::transfer_syntax::TransferSyntaxIndex;
        let syntax = dicom_transfer_syntax_registry::TransferSyntaxRegistry
            .get(&self.syntax)
            .unwrap();
        let mut bytes = Vec::new();
        self.set.write_dataset_with_ts(&mut bytes, syntax).unwrap();
        bytes
    }
}

/// A ramp over all numbers of `stored` bits, as bit patterns.
pub(super) fn ramp(stored: u16, signed: bool) -> Vec<u16> {
    let top = u16::MAX >> (16 - stored);
    (0..12_u32)
        .map(|at| (u32::from(top) * at / 11) as u16)
        .map(|number| {
            if signed {
                (number ^ (1 << (stored - 1))) & top
            } else {
                number
            }
        })
        .collect()
}

fn ramp_levels() -> Vec<u8> {
    (0..12)
        .map(|at| (255.0 * f64::from(at) / 11.0).round() as u8)
        .collect()
}

/// A file of the ramp, its whole range in the window.
pub(super) fn ramp_file(syntax: &str, stored: u16, signed: bool, photometric: &str) -> Builder {
    let range = 2_f64.powi(stored.into());
    let center = if signed { -0.5 } else { (range - 1.0) / 2.0 };
    let file = Builder::new(syntax, stored, signed)
        .text(tags::PHOTOMETRIC_INTERPRETATION, VR::CS, photometric)
        .text(tags::VOILUT_FUNCTION, VR::CS, "LINEAR_EXACT")
        .window(&center.to_string(), &(range - 1.0).to_string());
    let numbers = ramp(stored, signed);
    if stored > 8 {
        file.words(&numbers)
    } else {
        let bytes: Vec<u8> = numbers.iter().map(|number| *number as u8).collect();
        file.bytes(&bytes)
    }
}

#[test]
fn every_plain_syntax_depth_sign_and_polarity_is_read() {
    for syntax in NATIVE {
        for stored in [6, 8, 10, 12, 14, 15, 16] {
            for signed in [false, true] {
                let file = ramp_file(syntax, stored, signed, "MONOCHROME2").file();
                let what = format!("{syntax}, {stored} bits, signed {signed}");
                // The ramp itself is rounded down to whole numbers of few bits.
                let slack = if stored < 8 { 5 } else { 1 };
                let read = levels(&file).unwrap_or_else(|error| panic!("{what}: {error}"));
                let off = read.iter().zip(ramp_levels()).map(|(a, b)| a.abs_diff(b));
                assert!(off.max() <= Some(slack), "{what}: {read:?}");
                let inverse = levels(&ramp_file(syntax, stored, signed, "MONOCHROME1").file());
                let inverse = inverse.unwrap();
                assert!(
                    read.iter().zip(inverse).all(|(a, b)| *a == 255 - b),
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn a_data_set_without_preamble_is_read() {
    for syntax in [NATIVE[0], NATIVE[1], NATIVE[3]] {
        let bare = ramp_file(syntax, 12, false, "MONOCHROME2").text(
            tags::SOP_CLASS_UID,
            VR::UI,
            "1.2.840.10008.5.1.4.1.1.1.1",
        );
        let bare = bare.bare();
        assert!(looks_like_dicom(&bare), "{syntax}");
        assert_eq!(
            levels(&bare).unwrap(),
            levels(&ramp_file(syntax, 12, false, "MONOCHROME2").file()).unwrap()
        );
    }
}

#[test]
fn the_meta_group_alone_is_enough() {
    let file = ramp_file(EXPLICIT, 12, false, "MONOCHROME2").file();
    assert!(looks_like_dicom(&file[132..]));
    assert_eq!(levels(&file[132..]).unwrap(), levels(&file).unwrap());
}

#[test]
fn overlay_bits_do_not_show() {
    let plain = ramp_file(EXPLICIT, 12, false, "MONOCHROME2");
    let clean = levels(&ramp_file(EXPLICIT, 12, false, "MONOCHROME2").file()).unwrap();
    let dirty: Vec<u16> = ramp(12, false)
        .iter()
        .map(|number| number | 0xa000)
        .collect();
    assert_eq!(levels(&plain.words(&dirty).file()).unwrap(), clean);
    let lifted: Vec<u16> = ramp(12, false).iter().map(|number| number << 4).collect();
    let lifted = ramp_file(EXPLICIT, 12, false, "MONOCHROME2")
        .word(tags::HIGH_BIT, 15)
        .words(&lifted);
    assert_eq!(levels(&lifted.file()).unwrap(), clean);
}

#[test]
fn percentiles_pass_over_padding() {
    let numbers = [0, 0, 0, 0, 0, 0, 100, 200, 300, 400, 500, 600];
    let file = || Builder::new(EXPLICIT, 12, false).words(&numbers);
    let padded = file().word(tags::PIXEL_PADDING_VALUE, 0).file();
    let (with, without) = (levels(&padded).unwrap(), levels(&file().file()).unwrap());
    // Of 100 to 600, the 1st percentile is 105 and the 99th 595.
    assert_eq!(with[7], ((200.0 - 105.0) / 490.0 * 255.0_f64).round() as u8);
    assert_eq!((with[0], with[6], with[11]), (0, 0, 255));
    assert!(without[6] > 40);
    let flat = Builder::new(EXPLICIT, 12, false).words(&[77; 12]).file();
    assert_eq!(levels(&flat).unwrap(), [0; 12]);
}

#[test]
fn a_window_of_no_use_is_said_and_replaced() {
    for (center, width) in [
        ("10", "0"),
        ("x", "5"),
        ("10", "-4"),
        ("1e400", "5"),
        ("5", ""),
    ] {
        let file = ramp_file(EXPLICIT, 12, false, "MONOCHROME2").window(center, width);
        let file = file.text(tags::VOILUT_FUNCTION, VR::CS, "LINEAR").file();
        let decoded = decode(&file, None, &DecodeLimits::default()).unwrap();
        let said = decoded
            .remarks
            .iter()
            .any(|remark| remark.to_string().contains("window"));
        assert!(said, "{center} {width}: {:?}", decoded.remarks);
        let pixels = decoded.picture.into_bytes();
        assert_eq!((pixels[0], pixels[11]), (0, 255));
    }
}

#[test]
fn a_table_of_levels_inside_sequences_of_both_kinds() {
    let item = || {
        InMemDicomObject::from_element_iter([
            DataElement::new(
                tags::LUT_DESCRIPTOR,
                VR::US,
                PrimitiveValue::U16([3, 1, 8].into_iter().collect()),
            ),
            DataElement::new(
                tags::LUT_DATA,
                VR::US,
                PrimitiveValue::U16([10, 20, 255].into_iter().collect()),
            ),
        ])
    };
    for length in [Length::UNDEFINED, Length::defined(8 + 14 + 14)] {
        for syntax in NATIVE {
            let mut file = Builder::new(syntax, 12, false);
            let sequence = DataSetSequence::new(vec![item()], length);
            file.set
                .put(DataElement::new(tags::VOILUT_SEQUENCE, VR::SQ, sequence));
            let file = file.words(&[0, 1, 2, 3, 4, 4095, 0, 0, 0, 0, 0, 0]).file();
            assert_eq!(
                levels(&file).unwrap()[..6],
                [10, 10, 20, 255, 255, 255],
                "{syntax}"
            );
        }
    }
}

fn jpeg(level: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, 100)
        .write_image(&[level; 12], 4, 3, image::ExtendedColorType::L8)
        .unwrap();
    bytes
}

#[test]
fn frames_are_chosen_by_number() {
    let file = |offsets: &[u32], fragments: &[Vec<u8>]| {
        Builder::new("1.2.840.10008.1.2.4.50", 8, false)
            .text(tags::NUMBER_OF_FRAMES, VR::IS, "3")
            .fragments(offsets, fragments)
            .file()
    };
    let frames = [jpeg(10), jpeg(100), jpeg(200)];
    let whole = file(&[], &frames);
    assert_eq!(levels(&whole), Err(DicomError::ManyFrames { frames: 3 }));
    for (number, level) in [(1, 10), (2, 100), (3, 200)] {
        assert_eq!(frame_levels(&whole, Some(number)).unwrap(), [level; 12]);
    }
    for frame in [0, 4, usize::MAX] {
        assert_eq!(
            frame_levels(&whole, Some(frame)),
            Err(DicomError::NoFrame { frame, frames: 3 })
        );
    }
    // Each frame in two pieces of even length, separated by the table of offsets.
    let mut pieces = Vec::new();
    let mut offsets = Vec::new();
    let mut at = 0;
    for frame in &frames {
        offsets.push(at);
        let mut frame = frame.clone();
        frame.resize(frame.len().next_multiple_of(2), 0);
        for piece in [&frame[..100], &frame[100..]] {
            at += piece.len() as u32 + 8;
            pieces.push(piece.to_vec());
        }
    }
    let split = file(&offsets, &pieces);
    assert_eq!(frame_levels(&split, Some(2)).unwrap(), [100; 12]);
    // Without it, by the pieces that begin a stream.
    let without_offsets = file(&[], &pieces);
    assert_eq!(frame_levels(&without_offsets, Some(2)).unwrap(), [100; 12]);
    // A piece that begins none where one has to.
    let lost = file(&[], &pieces[1..]);
    assert!(matches!(
        frame_levels(&lost, Some(2)),
        Err(DicomError::Damaged(_))
    ));
    let native = Builder::new(EXPLICIT, 8, false)
        .text(tags::NUMBER_OF_FRAMES, VR::IS, "2")
        .bytes(&[[7; 12], [9; 12]].concat())
        .file();
    assert_eq!(frame_levels(&native, Some(2)).unwrap(), [9; 12]);
}

#[test]
fn jpeg_ls_of_every_depth_is_read() {
    for stored in [8, 10, 12, 16] {
        let numbers = ramp(stored, false);
        let options = jpegls::EncodeOptions::default();
        let mut data = Vec::new();
        jpegls::encode_with_options(&numbers, 4, 3, &options, &mut data).unwrap();
        let plain = ramp_file(EXPLICIT, stored, false, "MONOCHROME2").file();
        let packed = ramp_file("1.2.840.10008.1.2.4.80", stored, false, "MONOCHROME2")
            .fragments(&[], &[data])
            .file();
        assert_eq!(levels(&packed), levels(&plain), "{stored}");
    }
}

#[test]
fn a_syntax_that_is_not_read_is_named() {
    for (uid, word) in [
        ("1.2.840.10008.1.2.4.110", "JPEG XL"),
        ("1.2.840.10008.1.2.4.92", "JPEG 2000 Part 2"),
        ("1.2.840.10008.1.2.4.102", "MPEG-4"),
        ("1.2.840.113619.5.2", "unknown"),
    ] {
        // The writer knows no private syntax: the identifier is put over another of its length.
        let mut file = Builder::new("1.2.840.10008.1.2.4.50", 8, false)
            .fragments(&[], &[jpeg(1)])
            .file();
        let at = file
            .windows(22)
            .position(|text| text == b"1.2.840.10008.1.2.4.50")
            .unwrap();
        let mut padded = uid.as_bytes().to_vec();
        padded.resize(24, 0);
        // Two bytes more: the length before, and that of the group, grow.
        file.splice(at..at + 22, padded);
        file[at - 2] = 24;
        let error = levels(&file).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(uid) && text.contains(word) && text.contains("hint"),
            "{text}"
        );
        assert!(matches!(error, DicomError::TransferSyntax { .. }));
    }
}

#[test]
fn every_orientation_ends_upright() {
    // Of 12 numbers, rows of 4: the values in the corners show how it was rotated.
    let cases = [
        ("L\\F", [0, 3, 8, 11]),
        ("R\\F", [3, 0, 11, 8]),
        ("L\\H", [8, 11, 0, 3]),
        ("R\\H", [11, 8, 3, 0]),
        ("F\\R", [8, 0, 11, 3]),
        ("F\\L", [0, 8, 3, 11]),
        ("H\\L", [3, 11, 0, 8]),
        ("H\\R", [11, 3, 8, 0]),
        ("A\\F", [0, 3, 8, 11]),
        ("P\\H", [11, 8, 3, 0]),
        ("LA\\FP", [0, 3, 8, 11]),
        ("L\\P", [0, 3, 8, 11]),
        ("", [0, 3, 8, 11]),
    ];
    for (tag, corners) in cases {
        let file = Builder::new(EXPLICIT, 8, false)
            .text(tags::PATIENT_ORIENTATION, VR::CS, tag)
            .bytes(&std::array::from_fn::<u8, 12, _>(|at| at as u8))
            .file();
        let limits = DecodeLimits::default();
        let name = "a.dcm";
        let picture = crate::processor::image::decode(&file, name, &limits).unwrap();
        let (width, height) = (picture.width(), picture.height());
        let at = |x: usize, y: usize| picture.pixels()[(y * width + x) * 3];
        let found = [
            at(0, 0),
            at(width - 1, 0),
            at(0, height - 1),
            at(width - 1, height - 1),
        ];
        assert_eq!(found, corners, "{tag}");
        let (columns, rows, orientation) = probe(&file, &limits).unwrap();
        assert_eq!((columns, rows), (4, 3));
        assert_eq!(
            orientation == Orientation::NoTransforms,
            corners == [0, 3, 8, 11],
            "{tag}"
        );
    }
}

#[test]
fn remarks_say_what_is_no_chest_radiograph() {
    let remarks = |modality: &str, part: &str| {
        let file = ramp_file(EXPLICIT, 8, false, "MONOCHROME2")
            .text(tags::MODALITY, VR::CS, modality)
            .text(tags::BODY_PART_EXAMINED, VR::CS, part)
            .file();
        decode(&file, None, &DecodeLimits::default())
            .unwrap()
            .remarks
    };
    assert_eq!(remarks("CR", "CHEST"), []);
    assert_eq!(remarks("DX", "THORAX"), []);
    let found = remarks("MR", "KNEE");
    assert_eq!(found.len(), 2);
    assert!(found[0].to_string().contains("MR") && found[1].to_string().contains("KNEE"));
    assert!(found.iter().all(|remark| !remark.is_said_once()));
    let absent = remarks("", "");
    assert!(absent.len() == 2 && absent.iter().all(Remark::is_said_once));
    // What is no code word is not repeated.
    assert!(remarks("DX", "Doe, Jane").iter().all(Remark::is_said_once));
}

#[test]
fn technical_tags_hold_nothing_of_the_patient() {
    let file = ramp_file(EXPLICIT, 12, false, "MONOCHROME1").file();
    let tags = technical(&file, &DecodeLimits::default()).unwrap();
    let text = format!("{tags:?}");
    for word in [
        "(\"rows\", \"3\")",
        "MONOCHROME1",
        "Explicit VR Little Endian",
        "CHEST",
        "2047.5",
    ] {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    assert!(!text.contains("GEHEIM"), "{text}");
}
