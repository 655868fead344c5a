//! The attributes that DICOM's two kinds of report share, and the PDF inside a DICOM object.

use dicom_core::{DataElement, PrimitiveValue, Tag, VR, dicom_value, value::DataSetSequence};
use dicom_dictionary_std::tags;
use dicom_object::{FileMetaTableBuilder, InMemDicomObject};

use super::Outgone;
use crate::exchange::{dimse::IMPLEMENTATION, uid::derived};

/// Encapsulated PDF Storage.
pub(in crate::exchange) const PDF_CLASS: &str = "1.2.840.10008.5.1.4.1.1.104.1";
const EXPLICIT_LITTLE: &str = "1.2.840.10008.1.2.1";

pub(super) type Object = InMemDicomObject;

pub(super) fn put(object: &mut Object, tag: Tag, vr: VR, text: &str) {
    let value = match text.is_empty() {
        true => PrimitiveValue::Empty,
        false => PrimitiveValue::from(text),
    };
    object.put(DataElement::new(tag, vr, value));
}

pub(super) fn sequence(object: &mut Object, tag: Tag, items: Vec<Object>) {
    object.put(DataElement::new(tag, VR::SQ, DataSetSequence::from(items)));
}

/// A code of a concept: value, scheme, meaning.
pub(super) fn code((value, scheme, meaning): (&str, &str, &str)) -> Object {
    let mut item = Object::new_empty();
    put(&mut item, tags::CODE_VALUE, VR::SH, value);
    put(&mut item, tags::CODING_SCHEME_DESIGNATOR, VR::SH, scheme);
    put(&mut item, tags::CODE_MEANING, VR::LO, meaning);
    item
}

/// A reference to an instance.
pub(super) fn reference(class: &str, instance: &str) -> Object {
    let mut item = Object::new_empty();
    put(&mut item, tags::REFERENCED_SOP_CLASS_UID, VR::UI, class);
    put(
        &mut item,
        tags::REFERENCED_SOP_INSTANCE_UID,
        VR::UI,
        instance,
    );
    item
}

/// At most so many letters of a text.
pub(super) fn short(text: &str, letters: usize) -> String {
    let plain = |letter: char| {
        if letter.is_control() || letter == '\\' {
            ' '
        } else {
            letter
        }
    };
    text.chars().map(plain).take(letters).collect()
}

/// Patient, study, series and device: what both kinds of report begin with.
pub(super) fn common(
    report: &Outgone<'_>,
    class: &str,
    kind: &str,
    modality: &str,
    number: &str,
) -> Object {
    let study = report.study;
    let patient = &study.patient;
    let mut object = Object::new_empty();
    let (day, time) = (
        report.at.format("%Y%m%d").to_string(),
        report.at.format("%H%M%S").to_string(),
    );
    let (study_day, study_time) = study.date.split_at_checked(8).unwrap_or(("", ""));
    for (tag, vr, text) in [
        (tags::SPECIFIC_CHARACTER_SET, VR::CS, "ISO_IR 192"),
        (tags::INSTANCE_CREATION_DATE, VR::DA, &day),
        (tags::INSTANCE_CREATION_TIME, VR::TM, &time),
        (tags::SOP_CLASS_UID, VR::UI, class),
        (tags::SOP_INSTANCE_UID, VR::UI, &report.uid(kind)),
        (tags::STUDY_DATE, VR::DA, study_day),
        (tags::SERIES_DATE, VR::DA, &day),
        (tags::CONTENT_DATE, VR::DA, &day),
        (tags::STUDY_TIME, VR::TM, study_time),
        (tags::SERIES_TIME, VR::TM, &time),
        (tags::CONTENT_TIME, VR::TM, &time),
        (tags::ACCESSION_NUMBER, VR::SH, &short(&study.accession, 16)),
        (tags::MODALITY, VR::CS, modality),
        (tags::MANUFACTURER, VR::LO, "xray-qwen3vl"),
        (tags::REFERRING_PHYSICIAN_NAME, VR::PN, ""),
        (
            tags::STUDY_DESCRIPTION,
            VR::LO,
            &short(&study.description, 64),
        ),
        (
            tags::SERIES_DESCRIPTION,
            VR::LO,
            if report.signed_by.is_some() {
                "Chest report"
            } else {
                "AI draft, not a diagnosis"
            },
        ),
        (
            tags::MANUFACTURER_MODEL_NAME,
            VR::LO,
            &short(report.model, 64),
        ),
        (tags::PATIENT_NAME, VR::PN, &patient.name),
        (tags::PATIENT_ID, VR::LO, &short(&patient.id, 64)),
        (tags::PATIENT_BIRTH_DATE, VR::DA, &patient.birth_date),
        (tags::PATIENT_SEX, VR::CS, &patient.sex),
        (tags::PATIENT_AGE, VR::AS, &patient.age),
        (tags::DEVICE_SERIAL_NUMBER, VR::LO, "none"),
        (tags::SOFTWARE_VERSIONS, VR::LO, &short(report.program, 64)),
        (tags::STUDY_INSTANCE_UID, VR::UI, &report.study_uid()),
        (
            tags::SERIES_INSTANCE_UID,
            VR::UI,
            &derived(&["series", kind, &study.id]),
        ),
        (tags::STUDY_ID, VR::SH, ""),
        (tags::SERIES_NUMBER, VR::IS, number),
        (
            tags::INSTANCE_NUMBER,
            VR::IS,
            &(report.version + 1).to_string(),
        ),
    ] {
        put(&mut object, tag, vr, text);
    }
    object
}

/// The file of an object: explicit little endian.
pub(super) fn file(object: Object, class: &str, instance: &str) -> Result<Vec<u8>, String> {
    let meta = FileMetaTableBuilder::new()
        .media_storage_sop_class_uid(class)
        .media_storage_sop_instance_uid(instance)
        .transfer_syntax(EXPLICIT_LITTLE)
        .implementation_class_uid(IMPLEMENTATION);
    let object = object.with_meta(meta).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    object
        .write_all(&mut bytes)
        .map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// The films of a report as references by study and series, if they are DICOM objects.
pub(super) fn evidence(report: &Outgone<'_>) -> Option<Object> {
    let mut series: Vec<(&str, Vec<Object>)> = Vec::new();
    for film in &report.films {
        if film.instance_uid.is_empty() || film.class_uid.is_empty() || film.series_uid.is_empty() {
            continue;
        }
        let item = reference(&film.class_uid, &film.instance_uid);
        match series.iter_mut().find(|(uid, _)| *uid == film.series_uid) {
            Some((_, items)) => items.push(item),
            None => series.push((&film.series_uid, vec![item])),
        }
    }
    if series.is_empty() {
        return None;
    }
    let items = series.into_iter().map(|(uid, items)| {
        let mut item = Object::new_empty();
        put(&mut item, tags::SERIES_INSTANCE_UID, VR::UI, uid);
        sequence(&mut item, tags::REFERENCED_SOP_SEQUENCE, items);
        item
    });
    let items = items.collect();
    let mut study = Object::new_empty();
    put(
        &mut study,
        tags::STUDY_INSTANCE_UID,
        VR::UI,
        &report.study_uid(),
    );
    sequence(&mut study, tags::REFERENCED_SERIES_SEQUENCE, items);
    Some(study)
}

/// A PDF inside a DICOM object, as a file.
///
/// # Errors
/// What the writer says.
pub fn encapsulated(report: &Outgone<'_>, pdf: Vec<u8>) -> Result<Vec<u8>, String> {
    let mut object = common(report, PDF_CLASS, "pdf", "DOC", "9902");
    put(&mut object, tags::CONVERSION_TYPE, VR::CS, "WSD");
    put(&mut object, tags::BURNED_IN_ANNOTATION, VR::CS, "YES");
    put(&mut object, tags::ACQUISITION_DATE_TIME, VR::DT, "");
    let title = if report.signed_by.is_some() {
        "Chest report"
    } else {
        "AI draft, not a diagnosis"
    };
    put(&mut object, tags::DOCUMENT_TITLE, VR::ST, title);
    let concept = code(("18748-4", "LN", "Diagnostic imaging report"));
    sequence(&mut object, tags::CONCEPT_NAME_CODE_SEQUENCE, vec![concept]);
    let flag = if report.signed_by.is_some() {
        "VERIFIED"
    } else {
        "UNVERIFIED"
    };
    put(&mut object, tags::VERIFICATION_FLAG, VR::CS, flag);
    let sources: Vec<Object> = report
        .films
        .iter()
        .filter(|film| !film.instance_uid.is_empty() && !film.class_uid.is_empty())
        .map(|film| reference(&film.class_uid, &film.instance_uid))
        .collect();
    if !sources.is_empty() {
        sequence(&mut object, tags::SOURCE_INSTANCE_SEQUENCE, sources);
    }
    put(
        &mut object,
        tags::MIME_TYPE_OF_ENCAPSULATED_DOCUMENT,
        VR::LO,
        "application/pdf",
    );
    let length = pdf.len() as u32;
    object.put(DataElement::new(
        tags::ENCAPSULATED_DOCUMENT_LENGTH,
        VR::UL,
        dicom_value!(U32, [length]),
    ));
    let mut padded = pdf;
    if padded.len() % 2 == 1 {
        padded.push(0);
    }
    object.put(DataElement::new(
        tags::ENCAPSULATED_DOCUMENT,
        VR::OB,
        PrimitiveValue::from(padded),
    ));
    file(object, PDF_CLASS, &report.uid("pdf"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::report::samples;

    #[test]
    fn a_pdf_comes_back_whole_out_of_its_object() {
        let study = samples::study();
        let report = Outgone::new(&study, 0).unwrap();
        let bytes = encapsulated(&report, b"%PDF-1.7 x".to_vec()).unwrap();
        let object = dicom_object::from_reader(&bytes[..]).unwrap();
        let pdf = object
            .element(tags::ENCAPSULATED_DOCUMENT)
            .unwrap()
            .to_bytes()
            .unwrap();
        assert_eq!(&pdf[..], b"%PDF-1.7 x");
        let text = |tag| object.element(tag).unwrap().to_str().unwrap().into_owned();
        assert_eq!(text(tags::VERIFICATION_FLAG), "UNVERIFIED");
        assert_eq!(text(tags::STUDY_INSTANCE_UID), study.study_uid);
        assert_eq!(text(tags::PATIENT_NAME), "Zhang^San=张^三");
        assert_eq!(text(tags::SOP_INSTANCE_UID), report.uid("pdf"));
        let again = encapsulated(&Outgone::new(&study, 0).unwrap(), b"%PDF-1.7 x".to_vec());
        assert_eq!(again.unwrap(), bytes);
    }
}
