//! Whom a film is of and which study it belongs to, for a server that keeps studies; nothing else reads these attributes.

use dicom_core::Tag;
use dicom_dictionary_std::tags;
use encoding_rs::{Encoding, GB18030, UTF_8, WINDOWS_1252};

use super::{
    error::DicomError,
    header::Header,
    reader::{DataSet, DicomFile},
    remark,
    syntax::{self, READABLE},
};
use crate::processor::{decode_limits::DecodeLimits, remark::RemarkKind};

/// The attributes that say whom and what a film is of.
const WANTED: [Tag; 16] = [
    tags::SPECIFIC_CHARACTER_SET,
    tags::SOP_CLASS_UID,
    tags::SOP_INSTANCE_UID,
    tags::STUDY_INSTANCE_UID,
    tags::SERIES_INSTANCE_UID,
    tags::STUDY_DATE,
    tags::STUDY_TIME,
    tags::CONTENT_DATE,
    tags::ACCESSION_NUMBER,
    tags::STUDY_DESCRIPTION,
    tags::VIEW_POSITION,
    tags::PATIENT_NAME,
    tags::PATIENT_ID,
    tags::PATIENT_BIRTH_DATE,
    tags::PATIENT_SEX,
    tags::PATIENT_AGE,
];

/// Longest text of an attribute, in bytes.
const LONGEST: usize = 1024;

/// Whom a film is of, in words that are decoded; empty where the file says nothing.
///
/// It has no `Debug`, so that it cannot get into a log.
#[derive(Clone, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of DICOM's attributes")]
pub struct Identity {
    pub class_uid: String,
    pub instance_uid: String,
    pub study_uid: String,
    pub series_uid: String,
    /// StudyDate with StudyTime to the second, as far as they are given.
    pub date: String,
    pub film_date: String,
    pub accession: String,
    pub description: String,
    pub view: String,
    pub patient_name: String,
    pub patient_id: String,
    pub birth_date: String,
    pub sex: String,
    pub age: String,
    /// Why it is no chest radiograph that the model reads.
    pub kept_out: Option<String>,
}

/// The transfer syntaxes that are read, the most usual first.
pub fn transfer_syntaxes() -> &'static [&'static str] {
    &READABLE
}

/// The encoding of a data set's text, by its SpecificCharacterSet: its last value, which is the one of the most letters.
fn encoding(set: &DataSet<'_>) -> &'static Encoding {
    let named = set.texts(tags::SPECIFIC_CHARACTER_SET);
    let label = match named.last().copied().unwrap_or_default() {
        "ISO_IR 192" => return UTF_8,
        "GB18030" | "GBK" | "ISO 2022 IR 58" => return GB18030,
        "ISO_IR 101" | "ISO 2022 IR 101" => "iso-8859-2",
        "ISO_IR 126" | "ISO 2022 IR 126" => "iso-8859-7",
        "ISO_IR 127" | "ISO 2022 IR 127" => "iso-8859-6",
        "ISO_IR 138" | "ISO 2022 IR 138" => "iso-8859-8",
        "ISO_IR 144" | "ISO 2022 IR 144" => "iso-8859-5",
        "ISO_IR 148" | "ISO 2022 IR 148" => "windows-1254",
        "ISO_IR 166" | "ISO 2022 IR 166" => "windows-874",
        "ISO_IR 13" | "ISO 2022 IR 13" => "shift_jis",
        "ISO 2022 IR 87" | "ISO 2022 IR 159" => "iso-2022-jp",
        "ISO 2022 IR 149" => "euc-kr",
        // The default is ASCII, and some writers put UTF-8 there.
        "" | "ISO_IR 6" | "ISO 2022 IR 6" => return UTF_8,
        _ => return WINDOWS_1252,
    };
    Encoding::for_label(label.as_bytes()).unwrap_or(WINDOWS_1252)
}

/// The text of an attribute without control characters and padding.
fn text(set: &DataSet<'_>, tag: Tag, encoding: &'static Encoding) -> String {
    let bytes = set.bytes(tag);
    let bytes = &bytes[..bytes.len().min(LONGEST)];
    // The marks of ISO 2022 before Chinese and Korean letters, whose bytes are those of the encoding itself.
    let mut plain = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((first, after)) = rest.split_first() {
        let mark: Option<&[u8]> = [&b"\x1b$)A"[..], b"\x1b$)C", b"\x1b(B"]
            .into_iter()
            .find(|mark| rest.starts_with(mark) && encoding.name() != "ISO-2022-JP");
        rest = match mark {
            Some(mark) => &rest[mark.len()..],
            None => {
                plain.push(*first);
                after
            }
        };
    }
    let (text, _) = encoding.decode_without_bom_handling(&plain);
    let text: String = text.chars().filter(|letter| !letter.is_control()).collect();
    text.trim_matches([' ', '\0']).to_owned()
}

fn uid(set: &DataSet<'_>, tag: Tag) -> String {
    let found = set.texts(tag);
    let found = found.first().copied().filter(|uid| syntax::is_uid(uid));
    found.unwrap_or_default().to_owned()
}

/// Digits at the beginning of an attribute, at most `most`.
fn digits(set: &DataSet<'_>, tag: Tag, most: usize) -> String {
    let found = set.texts(tag).first().copied().unwrap_or_default();
    found
        .chars()
        .take_while(char::is_ascii_digit)
        .take(most)
        .collect()
}

/// Why the film is none that the model reads, without words of the file that may name a patient.
fn kept_out(opened: &DicomFile<'_>, limits: &DecodeLimits) -> Option<String> {
    let set = match opened.data_set() {
        Ok(set) => set,
        Err(error) => return Some(error.to_string()),
    };
    let remarks = remark::subject(&set);
    let other = remarks
        .iter()
        .find(|one| one.kind() == RemarkKind::NotAChest);
    if let Some(remark) = other {
        return Some(remark.text().to_owned());
    }
    let codec = match opened.syntax.codec() {
        Ok(codec) => codec,
        Err(error) => return Some(error.to_string()),
    };
    match Header::new(&set, codec, limits) {
        Err(error) => Some(error.to_string()),
        Ok(header) if header.frames > 1 => {
            let frames = header.frames;
            Some(DicomError::ManyFrames { frames }.to_string())
        }
        Ok(_) => None,
    }
}

/// Whom and what the film in `bytes` is of.
///
/// # Errors
/// A file that is no whole data set; what its pixels cannot be read for is in `kept_out`.
pub fn identity(bytes: &[u8], limits: &DecodeLimits) -> Result<Identity, DicomError> {
    let opened = DicomFile::new(bytes, limits.max_decoded_bytes)?;
    let set = opened.data_set_of(&WANTED)?;
    let encoding = encoding(&set);
    let of = |tag| text(&set, tag, encoding);
    let day = digits(&set, tags::STUDY_DATE, 8);
    let time = digits(&set, tags::STUDY_TIME, 6);
    let date = match (day.len(), time.len()) {
        (8, 6) => day + &time,
        (8, _) => day,
        _ => String::new(),
    };
    let codes = |tag| {
        set.codes(tag)
            .first()
            .copied()
            .unwrap_or_default()
            .to_owned()
    };
    Ok(Identity {
        class_uid: uid(&set, tags::SOP_CLASS_UID),
        instance_uid: uid(&set, tags::SOP_INSTANCE_UID),
        study_uid: uid(&set, tags::STUDY_INSTANCE_UID),
        series_uid: uid(&set, tags::SERIES_INSTANCE_UID),
        date,
        film_date: digits(&set, tags::CONTENT_DATE, 8),
        accession: of(tags::ACCESSION_NUMBER),
        description: of(tags::STUDY_DESCRIPTION),
        view: codes(tags::VIEW_POSITION),
        patient_name: of(tags::PATIENT_NAME),
        patient_id: of(tags::PATIENT_ID),
        birth_date: digits(&set, tags::PATIENT_BIRTH_DATE, 8),
        sex: codes(tags::PATIENT_SEX),
        age: codes(tags::PATIENT_AGE),
        kept_out: kept_out(&opened, limits),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::dicom::syntax::Syntax;

    fn element(file: &mut Vec<u8>, tag: Tag, vr: &[u8; 2], value: &[u8]) {
        file.extend(tag.group().to_le_bytes());
        file.extend(tag.element().to_le_bytes());
        file.extend(vr);
        let padded = value.len().next_multiple_of(2);
        file.extend((padded as u16).to_le_bytes());
        file.extend(value);
        file.resize(file.len() + padded - value.len(), b' ');
    }

    fn named(charset: &[u8], name: &[u8]) -> Identity {
        let mut file = Vec::new();
        element(&mut file, tags::SPECIFIC_CHARACTER_SET, b"CS", charset);
        element(&mut file, tags::SOP_INSTANCE_UID, b"UI", b"1.2.3");
        element(&mut file, tags::STUDY_DATE, b"DA", b"20260102");
        element(&mut file, tags::STUDY_TIME, b"TM", b"030405.5");
        element(&mut file, tags::PATIENT_NAME, b"PN", name);
        identity(&file, &DecodeLimits::default()).unwrap_or_default()
    }

    #[test]
    fn names_are_decoded_by_the_character_set_of_the_file() {
        let chinese = "张^三";
        let (gb, _, _) = GB18030.encode(chinese);
        assert!(named(b"GB18030", &gb).patient_name == chinese);
        assert!(named(b"ISO_IR 192", chinese.as_bytes()).patient_name == chinese);
        let marked = [b"Zhang^San=\x1b$)A", &gb[..2], b"^\x1b$)A", &gb[3..]].concat();
        assert!(named(b"\\ISO 2022 IR 58", &marked).patient_name == "Zhang^San=张^三");
        let found = named(b"ISO_IR 100", b"M\xfcller^Jos\xe9\x07");
        assert!(found.patient_name == "Müller^José" && found.date == "20260102030405");
        assert!(
            found
                .kept_out
                .is_some_and(|reason| reason.contains("pixel"))
        );
    }

    #[test]
    fn every_syntax_that_is_offered_is_read() {
        for uid in READABLE {
            assert!(Syntax::of(uid).codec().is_ok(), "{uid}");
        }
    }
}
