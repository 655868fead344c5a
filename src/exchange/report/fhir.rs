//! FHIR R4: a DiagnosticReport that holds its patient, study and device.

use serde_json::{Value, json};

use super::{NOTICE, Outgone};

fn day(date: &str) -> Option<String> {
    let digits = date.get(..8)?;
    Some(format!(
        "{}-{}-{}",
        &digits[..4],
        &digits[4..6],
        &digits[6..]
    ))
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => map
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| (key, without_nulls(value)))
            .collect(),
        Value::Array(list) => list.into_iter().map(without_nulls).collect(),
        other => other,
    }
}

fn some(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

/// The report as a resource; `status` is `preliminary` until it is signed, `amended` from the second signature on.
pub fn diagnostic_report(report: &Outgone<'_>) -> Value {
    let study = report.study;
    let patient = &study.patient;
    let status = match report.version {
        0 => "preliminary",
        1 => "final",
        _ => "amended",
    };
    let gender = match patient.sex.as_str() {
        "M" => Some("male"),
        "F" => Some("female"),
        "O" => Some("other"),
        _ => None,
    };
    let family = some(patient.name.split('^').next().unwrap_or_default());
    let issued = report.at.format("%Y-%m-%dT%H:%M:%SZ").to_string();
    let uid = report.study_uid();
    without_nulls(json!({
        "resourceType": "DiagnosticReport",
        "id": study.id,
        "contained": [
            {
                "resourceType": "Patient",
                "id": "patient",
                "identifier": some(&patient.id).map(|id| json!([{"value": id}])),
                "name": some(&patient.name).map(|name| json!([{"text": name, "family": family}])),
                "gender": gender,
                "birthDate": day(&patient.birth_date),
            },
            {
                "resourceType": "Device",
                "id": "device",
                "deviceName": [{"name": report.device(), "type": "model-name"}],
                "version": [{"value": report.program}],
            },
            {
                "resourceType": "ImagingStudy",
                "id": "study",
                "status": "available",
                "identifier": [{"system": "urn:dicom:uid", "value": format!("urn:oid:{uid}")}],
                "subject": {"reference": "#patient"},
            },
        ],
        "identifier": [{"system": "urn:ietf:rfc:3986", "value": format!("urn:oid:{}", report.uid("fhir"))}],
        "basedOn": some(&study.accession).map(|number| json!([{
            "identifier": {"type": {"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0203", "code": "ACSN"}]}, "value": number},
        }])),
        "status": status,
        "category": [{"coding": [{"system": "http://terminology.hl7.org/CodeSystem/v2-0074", "code": "RAD"}]}],
        "code": {"coding": [{"system": "http://loinc.org", "code": "18748-4", "display": "Diagnostic imaging study"}]},
        "subject": {"reference": "#patient"},
        "effectiveDateTime": day(&study.date),
        "issued": issued,
        "performer": [{"reference": "#device"}],
        "resultsInterpreter": report.signed_by.map(|name| json!([{"display": name}])),
        "imagingStudy": [{"reference": "#study"}],
        "conclusion": report.text,
        "extension": report.signed_by.is_none().then(|| json!([{"url": "urn:xray-qwen3vl:notice", "valueString": NOTICE}])),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::report::samples;

    #[test]
    fn the_status_follows_the_signature_and_nothing_is_null() {
        let study = samples::study();
        let draft = diagnostic_report(&Outgone::new(&study, 0).unwrap());
        assert_eq!(draft["status"], "preliminary");
        assert_eq!(draft["extension"][0]["valueString"], NOTICE);
        let signed = diagnostic_report(&Outgone::new(&study, 1).unwrap());
        assert_eq!(signed["status"], "final");
        assert_eq!(signed["resultsInterpreter"][0]["display"], "Dr. Li");
        assert_eq!(signed["contained"][0]["birthDate"], "1960-01-02");
        assert_eq!(signed["effectiveDateTime"], "2026-12-01");
        assert!(!signed.to_string().contains("null"));
    }
}
