//! PadChest: a table of images with their Spanish reports.

use std::path::Path;

use super::super::error::ConvertError;
use super::record::{Picture, Projection, Record, Records, Report, View, one_line};
use super::table::Table;

/// Reads the table at `path`.
pub(super) fn read(path: &Path) -> Result<Records, ConvertError> {
    let table = Table::read(path)?;
    let (image, study, patient, text) = (
        table.needed("ImageID")?,
        table.needed("StudyID")?,
        table.needed("PatientID")?,
        table.needed("Report")?,
    );
    let (folder, projection) = (table.column(&["ImageDir"]), table.column(&["Projection"]));
    let mut found = Records {
        files: vec![table.path.clone()],
        study_rule: Some("the columns `StudyID` and `PatientID` of PadChest"),
        ..Records::default()
    };
    for row in table.rows() {
        let Some(image) = row.get(Some(image)) else {
            continue;
        };
        let mut record = Record::new(&table.path);
        record.report = Report {
            whole: row.get(Some(text)).and_then(one_line),
            ..Report::default()
        };
        record.study = row.get(Some(study)).map(str::to_owned);
        record.patient = row.get(Some(patient)).map(str::to_owned);
        // The images came in archives of these numbers.
        let path = match row.get(folder) {
            Some(folder) => format!("{}/{image}", folder.trim_end_matches(".0")),
            None => image.to_owned(),
        };
        record.views.push(View {
            number: row.number,
            picture: Picture::Path(path),
            projection: Projection::of(row.get(projection)),
        });
        found.records.push(record);
    }
    Ok(found.by_study())
}
