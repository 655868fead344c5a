//! HL7 v2.5.1 ORU^R01 with the report as text, one OBX a line; UTF-8, as MSH-18 says.

use super::{NOTICE, Outgone};

/// A value with the letters escaped that mean something, and without control characters.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '\\' => out.push_str("\\E\\"),
            '|' => out.push_str("\\F\\"),
            '^' => out.push_str("\\S\\"),
            '&' => out.push_str("\\T\\"),
            '~' => out.push_str("\\R\\"),
            letter if letter.is_control() => out.push(' '),
            letter => out.push(letter),
        }
    }
    out
}

/// A name of DICOM's form as XPN: the groups of letters are repetitions.
fn name(dicom: &str) -> String {
    let groups = dicom.split('=').map(|group| {
        let parts: Vec<String> = group.split('^').take(5).map(escaped).collect();
        parts.join("^")
    });
    let groups: Vec<String> = groups.filter(|group| !group.is_empty()).collect();
    groups.join("~")
}

/// The message of a report. Segments end with carriage returns, as the standard wants.
pub fn message(report: &Outgone<'_>) -> String {
    let study = report.study;
    let patient = &study.patient;
    let at = report.at.format("%Y%m%d%H%M%S+0000").to_string();
    // Preliminary, final, corrected.
    let status = match report.version {
        0 => "P",
        1 => "F",
        _ => "C",
    };
    let (accession, uid) = (escaped(&study.accession), report.study_uid());
    let signer = escaped(report.signed_by.unwrap_or_default());
    let id = report.uid("hl7");
    // MSH-10 has at most 20 letters in older systems; the identifier's last digits differ as the whole does.
    let control = &id[id.len().saturating_sub(20)..];
    let sex = match patient.sex.as_str() {
        sex @ ("M" | "F" | "O") => sex,
        _ => "U",
    };
    let mut segments = vec![
        format!(
            "MSH|^~\\&|XRAY-QWEN3VL||||{at}||ORU^R01^ORU_R01|{control}|P|2.5.1||||||UNICODE UTF-8"
        ),
        format!(
            "PID|1||{}||{}||{}|{sex}",
            escaped(&patient.id),
            name(&patient.name),
            patient.birth_date
        ),
        format!(
            "OBR|1|{accession}|{accession}|18748-4^Diagnostic imaging report^LN|||{}|||||||||||{accession}||||{at}||RAD|{status}|||||||{signer}",
            study.date
        ),
    ];
    let notice = report.signed_by.is_none().then_some(NOTICE);
    for (index, line) in notice.into_iter().chain(report.text.lines()).enumerate() {
        let number = index + 1;
        segments.push(format!(
            "OBX|{number}|TX|18748-4^Diagnostic imaging report^LN|{number}|{}||||||{status}|||{at}||{signer}||{}",
            escaped(line),
            escaped(&report.device()),
        ));
    }
    let number = segments.len() - 2;
    segments.push(format!(
        "OBX|{number}|ST|113014^DICOM Study^DCM|{number}|{uid}||||||{status}"
    ));
    segments
        .iter()
        .map(|segment| format!("{segment}\r"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::report::samples;

    #[test]
    fn separators_in_values_are_escaped_and_lines_are_segments() {
        let study = samples::study();
        let signed = message(&Outgone::new(&study, 1).unwrap());
        let segments: Vec<&str> = signed.trim_end().split('\r').collect();
        let kinds: Vec<&str> = segments.iter().map(|segment| &segment[..3]).collect();
        assert_eq!(kinds, ["MSH", "PID", "OBR", "OBX", "OBX", "OBX"]);
        let pid: Vec<&str> = segments[1].split('|').collect();
        assert_eq!(pid[3], "P\\S\\77\\F\\x");
        assert_eq!(pid[5], "Zhang^San~张^三");
        let observed: Vec<&str> = segments[4].split('|').collect();
        assert_eq!(observed[5], "Follow-up in 24 h \\T\\ compare.");
        assert_eq!(observed[11], "F");
        let order: Vec<&str> = segments[2].split('|').collect();
        assert_eq!((order[25], order[32]), ("F", "Dr. Li"));
        let head: Vec<&str> = segments[0].split('|').collect();
        // MSH-1 is the separator itself.
        assert_eq!((head[8], head[17]), ("ORU^R01^ORU_R01", "UNICODE UTF-8"));
        let draft = message(&Outgone::new(&study, 0).unwrap());
        assert!(draft.contains("|P|2.5.1") && draft.contains("Draft written by a model"));
    }
}
