//! CheXpert Plus: a table of images with the sections of their reports.

use std::path::Path;
use std::sync::LazyLock;

use regex::Regex;

use super::super::error::ConvertError;
use super::super::selection::Part;
use super::record::{Picture, Projection, Record, Records, Report, View, one_line};
use super::table::Table;

static PATH: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(patient\d+)/(study\d+)/").expect("the pattern is a constant that a test compiles")
});

/// Reads the table at `path`.
pub(super) fn read(path: &Path) -> Result<Records, ConvertError> {
    let table = Table::read(path)?;
    let image = table.needed("path_to_image")?;
    let column = |name: &str| table.column(&[name]);
    let (findings, impression, whole) = (
        column("section_findings"),
        column("section_impression"),
        column("report"),
    );
    let (side, patient, part) = (
        column("frontal_lateral"),
        column("deid_patient_id"),
        column("split"),
    );
    let mut found = Records {
        files: vec![table.path.clone()],
        study_rule: Some("folders `patientN/studyM` of CheXpert"),
        ..Records::default()
    };
    for row in table.rows() {
        let Some(image) = row.get(Some(image)) else {
            continue;
        };
        let Some(groups) = PATH.captures(image) else {
            return Err(ConvertError::Form {
                path: path.to_owned(),
                row: row.number,
                what: format!("`path_to_image` `{image}`"),
                expected: "`train/patientN/studyM/view1_frontal.jpg`".into(),
            });
        };
        let text = |column| row.get(column).and_then(one_line);
        let mut record = Record::new(&table.path);
        let (findings, impression) = (text(findings), text(impression));
        record.report = Report {
            whole: text(whole).filter(|_| findings.is_none() && impression.is_none()),
            findings,
            impression,
        };
        record.patient = Some(row.get(patient).unwrap_or(&groups[1]).to_owned());
        record.study = Some(groups[2].to_owned());
        // The table has a part for each row, or the path begins with one.
        let first = image.split('/').find_map(Part::of);
        record.part = row.get(part).and_then(Part::of).or(first);
        record.views.push(View {
            number: row.number,
            picture: Picture::Path(image.to_owned()),
            projection: Projection::of(row.get(side)),
        });
        found.records.push(record);
    }
    Ok(found.by_study())
}
