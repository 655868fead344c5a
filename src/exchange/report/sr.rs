//! DICOM Basic Text SR: the report as a tree of text, with its device and the films that were read (after TID 2000).

use dicom_core::VR;
use dicom_dictionary_std::tags;

use super::{
    NOTICE, Outgone,
    document::{Object, code, common, evidence, file, put, reference, sequence, short},
};

/// Basic Text SR Storage.
pub(in crate::exchange) const SR_CLASS: &str = "1.2.840.10008.5.1.4.1.1.88.11";

type Code = (&'static str, &'static str, &'static str);
const TITLE: Code = ("18748-4", "LN", "Diagnostic imaging report");
const LANGUAGE: Code = ("121049", "DCM", "Language of Content Item and Descendants");
const OBSERVER_TYPE: Code = ("121005", "DCM", "Observer Type");
const DEVICE: Code = ("121007", "DCM", "Device");
const DEVICE_UID: Code = ("121012", "DCM", "Device Observer UID");
const DEVICE_NAME: Code = ("121013", "DCM", "Device Observer Name");
const DEVICE_MODEL: Code = ("121015", "DCM", "Device Observer Model Name");
const FINDINGS: Code = ("121070", "DCM", "Findings");
const FINDING: Code = ("121071", "DCM", "Finding");
const SUMMARY: Code = ("121111", "DCM", "Summary");
const COMMENT: Code = ("121106", "DCM", "Comment");

fn item(relation: &str, kind: &str, name: Option<Code>) -> Object {
    let mut item = Object::new_empty();
    put(&mut item, tags::RELATIONSHIP_TYPE, VR::CS, relation);
    put(&mut item, tags::VALUE_TYPE, VR::CS, kind);
    if let Some(name) = name {
        sequence(
            &mut item,
            tags::CONCEPT_NAME_CODE_SEQUENCE,
            vec![code(name)],
        );
    }
    item
}

fn text_item(relation: &str, name: Code, text: &str) -> Object {
    let mut item = item(relation, "TEXT", Some(name));
    // A text of this kind has lines, and no other control characters.
    let plain: String = text
        .chars()
        .filter(|letter| !letter.is_control() || *letter == '\n')
        .collect();
    put(
        &mut item,
        tags::TEXT_VALUE,
        VR::UT,
        &plain.replace('\n', "\r\n"),
    );
    item
}

fn code_item(relation: &str, name: Code, value: Code) -> Object {
    let mut item = item(relation, "CODE", Some(name));
    sequence(&mut item, tags::CONCEPT_CODE_SEQUENCE, vec![code(value)]);
    item
}

fn container(relation: &str, name: Code, content: Vec<Object>) -> Object {
    let mut item = item(relation, "CONTAINER", Some(name));
    put(&mut item, tags::CONTINUITY_OF_CONTENT, VR::CS, "SEPARATE");
    sequence(&mut item, tags::CONTENT_SEQUENCE, content);
    item
}

/// Whether most letters of a report are Chinese.
fn is_chinese(text: &str) -> bool {
    let (han, latin) = text
        .chars()
        .fold((0, 0), |(han, latin), letter| match letter {
            '\u{4e00}'..='\u{9fff}' => (han + 1, latin),
            letter if letter.is_ascii_alphabetic() => (han, latin + 1),
            _ => (han, latin),
        });
    // A Chinese letter is about as much as three Latin ones.
    3 * han > latin
}

/// The report as a file.
///
/// # Errors
/// What the writer says.
pub fn structured_report(report: &Outgone<'_>) -> Result<Vec<u8>, String> {
    let mut object = common(report, SR_CLASS, "sr", "SR", "9901");
    sequence(
        &mut object,
        tags::REFERENCED_PERFORMED_PROCEDURE_STEP_SEQUENCE,
        Vec::new(),
    );
    sequence(
        &mut object,
        tags::PERFORMED_PROCEDURE_CODE_SEQUENCE,
        Vec::new(),
    );
    if let Some(study) = evidence(report) {
        sequence(
            &mut object,
            tags::CURRENT_REQUESTED_PROCEDURE_EVIDENCE_SEQUENCE,
            vec![study],
        );
    }
    put(
        &mut object,
        tags::COMPLETION_FLAG,
        VR::CS,
        if report.signed_by.is_some() {
            "COMPLETE"
        } else {
            "PARTIAL"
        },
    );
    match report.signed_by {
        None => put(&mut object, tags::VERIFICATION_FLAG, VR::CS, "UNVERIFIED"),
        Some(name) => {
            put(&mut object, tags::VERIFICATION_FLAG, VR::CS, "VERIFIED");
            let mut observer = Object::new_empty();
            put(
                &mut observer,
                tags::VERIFYING_ORGANIZATION,
                VR::LO,
                "not stated",
            );
            put(
                &mut observer,
                tags::VERIFICATION_DATE_TIME,
                VR::DT,
                &report.at.format("%Y%m%d%H%M%S+0000").to_string(),
            );
            put(
                &mut observer,
                tags::VERIFYING_OBSERVER_NAME,
                VR::PN,
                &short(name, 64),
            );
            sequence(
                &mut observer,
                tags::VERIFYING_OBSERVER_IDENTIFICATION_CODE_SEQUENCE,
                Vec::new(),
            );
            sequence(
                &mut object,
                tags::VERIFYING_OBSERVER_SEQUENCE,
                vec![observer],
            );
        }
    }
    put(&mut object, tags::VALUE_TYPE, VR::CS, "CONTAINER");
    sequence(
        &mut object,
        tags::CONCEPT_NAME_CODE_SEQUENCE,
        vec![code(TITLE)],
    );
    put(&mut object, tags::CONTINUITY_OF_CONTENT, VR::CS, "SEPARATE");

    let language = match is_chinese(report.text) {
        true => ("zh-CN", "RFC5646", "Chinese (China)"),
        false => ("en", "RFC5646", "English"),
    };
    let mut device_uid = item("HAS OBS CONTEXT", "UIDREF", Some(DEVICE_UID));
    put(
        &mut device_uid,
        tags::UID,
        VR::UI,
        &crate::exchange::uid::derived(&["device", report.model, report.program]),
    );
    let mut content = vec![
        code_item("HAS CONCEPT MOD", LANGUAGE, language),
        code_item("HAS OBS CONTEXT", OBSERVER_TYPE, DEVICE),
        device_uid,
        text_item("HAS OBS CONTEXT", DEVICE_NAME, &report.device()),
        text_item("HAS OBS CONTEXT", DEVICE_MODEL, report.model),
    ];
    if report.signed_by.is_none() {
        content.push(container(
            "CONTAINS",
            SUMMARY,
            vec![text_item("CONTAINS", COMMENT, NOTICE)],
        ));
    }
    let mut findings = vec![text_item("CONTAINS", FINDING, report.text)];
    for film in &report.films {
        if film.instance_uid.is_empty() || film.class_uid.is_empty() {
            continue;
        }
        let mut image = item("CONTAINS", "IMAGE", None);
        let referenced = reference(&film.class_uid, &film.instance_uid);
        sequence(&mut image, tags::REFERENCED_SOP_SEQUENCE, vec![referenced]);
        findings.push(image);
    }
    content.push(container("CONTAINS", FINDINGS, findings));
    sequence(&mut object, tags::CONTENT_SEQUENCE, content);
    file(object, SR_CLASS, &report.uid("sr"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::report::samples;

    fn texts(object: &Object, found: &mut Vec<String>) {
        if let Ok(text) = object.element(tags::TEXT_VALUE) {
            found.push(text.to_str().unwrap().into_owned());
        }
        if let Ok(items) = object.element(tags::CONTENT_SEQUENCE) {
            for item in items.items().unwrap() {
                texts(item, found);
            }
        }
    }

    #[test]
    fn a_draft_says_that_it_is_one_and_a_signed_report_who_signed() {
        let study = samples::study();
        for version in [0, 1] {
            let report = Outgone::new(&study, version).unwrap();
            let bytes = structured_report(&report).unwrap();
            let object = dicom_object::from_reader(&bytes[..]).unwrap();
            let flag = object
                .element(tags::VERIFICATION_FLAG)
                .unwrap()
                .to_str()
                .unwrap();
            let mut found = Vec::new();
            texts(&object, &mut found);
            assert!(
                found.contains(&report.text.replace('\n', "\r\n")),
                "{found:?}"
            );
            let says = found.iter().any(|text| text == NOTICE);
            assert_eq!(
                (flag.as_ref(), says),
                if version == 0 {
                    ("UNVERIFIED", true)
                } else {
                    ("VERIFIED", false)
                }
            );
            let observer = object.element(tags::VERIFYING_OBSERVER_SEQUENCE);
            assert_eq!(observer.is_ok(), version == 1);
            let evidence = object
                .element(tags::CURRENT_REQUESTED_PROCEDURE_EVIDENCE_SEQUENCE)
                .unwrap();
            assert_eq!(evidence.items().unwrap().len(), 1);
        }
        assert_ne!(
            Outgone::new(&study, 0).unwrap().uid("sr"),
            Outgone::new(&study, 1).unwrap().uid("sr")
        );
    }

    #[test]
    fn the_language_is_that_of_most_words() {
        assert!(is_chinese("右肺CT见结节"));
        assert!(!is_chinese("No acute disease."));
    }
}
