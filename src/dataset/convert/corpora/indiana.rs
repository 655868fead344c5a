//! The Indiana collection (IU X-Ray, Open-i) as on Kaggle: two tables, joined by `uid`.

use std::collections::HashMap;
use std::path::Path;

use super::super::error::ConvertError;
use super::record::{Picture, Projection, Record, Records, Report, View, one_line};
use super::table::Table;

/// Name of the table of images beside that of reports.
const PROJECTIONS: &str = "projections";

/// Reads the table of reports at `path`, and that of images beside it.
pub(super) fn read(path: &Path) -> Result<Records, ConvertError> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.unwrap_or_default();
    let (reports, images) = if name.contains(PROJECTIONS) {
        (
            path.with_file_name(name.replace(PROJECTIONS, "reports")),
            path.to_owned(),
        )
    } else {
        (
            path.to_owned(),
            path.with_file_name(name.replace("reports", PROJECTIONS)),
        )
    };
    if images == reports || !images.is_file() {
        return Err(ConvertError::Lacks {
            path: path.to_owned(),
            corpus: "indiana",
            lacks: "the table `indiana_projections.csv`, which names the images, beside it".into(),
        });
    }
    let (reports, images) = (Table::read(&reports)?, Table::read(&images)?);
    let (uid, findings, impression) = (
        reports.needed("uid")?,
        reports.column(&["findings"]),
        reports.column(&["impression"]),
    );
    let mut found = Records {
        files: vec![reports.path.clone(), images.path.clone()],
        study_rule: Some("the column `uid` of the Indiana collection"),
        ..Records::default()
    };
    let texts: HashMap<String, Report> = reports
        .rows()
        .filter_map(|row| {
            let uid = row.get(Some(uid))?.to_owned();
            let report = Report {
                findings: row.get(findings).and_then(one_line),
                impression: row.get(impression).and_then(one_line),
                whole: None,
            };
            Some((uid, report))
        })
        .collect();
    let (uid, file, projection) = (
        images.needed("uid")?,
        images.needed("filename")?,
        images.column(&["projection"]),
    );
    let mut without = 0;
    for row in images.rows() {
        let (Some(uid), Some(file)) = (row.get(Some(uid)), row.get(Some(file))) else {
            continue;
        };
        let mut record = Record::new(&images.path);
        match texts.get(uid) {
            Some(report) => record.report = report.clone(),
            None => without += 1,
        }
        record.study = Some(uid.to_owned());
        record.views.push(View {
            number: row.number,
            picture: Picture::Path(file.to_owned()),
            projection: Projection::of(row.get(projection)),
        });
        found.records.push(record);
    }
    if without > 0 {
        found.remarks.push(format!(
            "{without} images have a `uid` that `{}` does not have",
            reports.path.display()
        ));
    }
    Ok(found.by_study())
}
