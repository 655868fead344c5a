//! Reports on their way out: a .docx of one, a .csv of many.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Extension, Path, State},
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use chrono::DateTime;

use super::{identity::Identity, json_body, list::query, with_store, zip::archive};
use crate::serve::{App, auth::Peer, error::ApiError};
use crate::store::{Study, disk::Scope};

/// Most rows of a table.
const MAX_ROWS: usize = 10_000;

fn xml(text: &str) -> String {
    // Other control characters cannot be in XML at all.
    let text: String = text
        .chars()
        .filter(|letter| !letter.is_control() || *letter == '\t')
        .collect();
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn time(milliseconds: i64) -> String {
    DateTime::from_timestamp_millis(milliseconds).map_or_else(String::new, |time| {
        time.format("%Y-%m-%d %H:%M UTC").to_string()
    })
}

fn paragraph(style: &str, text: &str) -> String {
    let style = match style {
        "" => String::new(),
        style => format!("<w:pPr><w:pStyle w:val=\"{style}\"/></w:pPr>"),
    };
    format!(
        "<w:p>{style}<w:r><w:t xml:space=\"preserve\">{}</w:t></w:r></w:p>",
        xml(text)
    )
}

/// What a report is called before and after it is signed.
fn standing(study: &Study) -> String {
    match study.signed.last() {
        Some(report) => {
            let amended = match study.signed.len() {
                1 => String::new(),
                versions => format!("（第 {versions} 版 / version {versions}）"),
            };
            format!("签名 / Signed: {}, {}{amended}", report.by, time(report.at))
        }
        None => "草稿，未签名，不构成诊断 / Draft, not signed, not a diagnosis".into(),
    }
}

/// The report as an Office Open XML document.
fn document(study: &Study) -> Vec<u8> {
    let patient = &study.patient;
    let mut facts = String::new();
    for (name, value) in [
        ("姓名 / Name", &patient.name),
        ("编号 / Patient ID", &patient.id),
        ("出生日期 / Born", &patient.birth_date),
        ("性别 / Sex", &patient.sex),
        ("检查号 / Accession", &study.accession),
        ("检查日期 / Study date", &study.date),
        ("检查 / Study", &study.description),
    ] {
        if !value.is_empty() {
            facts += &paragraph("", &format!("{name}: {value}"));
        }
    }
    let text: String = study
        .text()
        .lines()
        .map(|line| paragraph("", line))
        .collect();
    let body = [
        paragraph("Title", "胸部X线检查报告 / Chest radiograph report"),
        facts,
        paragraph("Heading1", "报告 / Report"),
        text,
        paragraph("", &standing(study)),
    ]
    .concat();
    let word = "http://schemas.openxmlformats.org/wordprocessingml/2006/main";
    let package = "http://schemas.openxmlformats.org/package/2006";
    let office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships";
    let kind = "application/vnd.openxmlformats-officedocument.wordprocessingml";
    let head = "<?xml version=\"1.0\" encoding=\"UTF-8\" standalone=\"yes\"?>\n";
    let style = |id: &str, name: &str, size: u32| {
        format!(
            "<w:style w:type=\"paragraph\" w:styleId=\"{id}\"><w:name w:val=\"{name}\"/><w:pPr><w:spacing w:before=\"200\" w:after=\"120\"/></w:pPr>\
             <w:rPr><w:b/><w:sz w:val=\"{size}\"/></w:rPr></w:style>"
        )
    };
    archive(&[
        (
            "[Content_Types].xml",
            format!(
                "{head}<Types xmlns=\"{package}/content-types\"><Default Extension=\"rels\" ContentType=\"application/vnd.openxmlformats-package.relationships+xml\"/>\
                 <Override PartName=\"/word/document.xml\" ContentType=\"{kind}.document.main+xml\"/>\
                 <Override PartName=\"/word/styles.xml\" ContentType=\"{kind}.styles+xml\"/></Types>"
            ),
        ),
        (
            "_rels/.rels",
            format!(
                "{head}<Relationships xmlns=\"{package}/relationships\"><Relationship Id=\"r1\" Type=\"{office}/officeDocument\" Target=\"word/document.xml\"/></Relationships>"
            ),
        ),
        (
            "word/document.xml",
            format!(
                "{head}<w:document xmlns:w=\"{word}\"><w:body>{body}<w:sectPr/></w:body></w:document>"
            ),
        ),
        (
            "word/_rels/document.xml.rels",
            format!(
                "{head}<Relationships xmlns=\"{package}/relationships\"><Relationship Id=\"r1\" Type=\"{office}/styles\" Target=\"styles.xml\"/></Relationships>"
            ),
        ),
        (
            "word/styles.xml",
            format!(
                "{head}<w:styles xmlns:w=\"{word}\"><w:docDefaults><w:rPrDefault><w:rPr><w:rFonts w:ascii=\"Calibri\" w:hAnsi=\"Calibri\" w:eastAsia=\"SimSun\"/><w:sz w:val=\"22\"/></w:rPr></w:rPrDefault></w:docDefaults>{}{}</w:styles>",
                style("Title", "Title", 32),
                style("Heading1", "heading 1", 26),
            ),
        ),
    ])
}

/// A file to be saved; its name has nothing of the patient.
pub(super) fn attachment(name: &str, kind: &'static str, bytes: Vec<u8>) -> Response {
    let name = format!("attachment; filename=\"{name}\"");
    let headers = [
        (header::CONTENT_TYPE, kind.to_owned()),
        (header::CONTENT_DISPOSITION, name),
    ];
    (headers, bytes).into_response()
}

/// `GET /v1/studies/{id}/report.docx`.
pub(super) async fn docx(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    identity.require(Scope::Read)?;
    let actor = identity.actor(None);
    let study = with_store(&app, move |store| {
        store.note("export", Some(&id), &actor)?;
        store.study(&id)
    })
    .await?;
    let kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document";
    let name = format!("report-{}.docx", &study.id);
    Ok(attachment(&name, kind, document(&study)))
}

/// A field that a spreadsheet takes for a text: one that begins like a formula gets a quote before it.
fn cell(text: &str) -> String {
    let formula = text.starts_with(['=', '+', '-', '@', '\t', '\r']);
    if formula {
        format!("'{text}")
    } else {
        text.to_owned()
    }
}

fn table(studies: &[Study]) -> Result<Vec<u8>, csv::Error> {
    // Excel reads UTF-8 where a mark begins the file.
    let mut writer = csv::Writer::from_writer("\u{feff}".as_bytes().to_vec());
    writer.write_record([
        "study",
        "state",
        "patient_id",
        "patient_name",
        "accession",
        "date",
        "description",
        "report",
        "signed_by",
        "signed_at",
        "urgency",
    ])?;
    for study in studies {
        let signed = study.signed.last();
        writer.write_record([
            &study.id,
            study.state.name(),
            &cell(&study.patient.id),
            &cell(&study.patient.name),
            &cell(&study.accession),
            &study.date,
            &cell(&study.description),
            &cell(study.text()),
            &cell(signed.map_or("", |report| &report.by)),
            &signed.map_or_else(String::new, |report| time(report.at)),
            &format!("{:.4}", study.urgency()),
        ])?;
    }
    writer
        .into_inner()
        .map_err(|error| error.into_error().into())
}

/// `POST /v1/worklist.csv`: the studies of a query as a table.
pub(super) async fn csv(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    Extension(identity): Extension<Identity>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    identity.require(Scope::Read)?;
    let mut query = query(
        json_body(&app, peer.client, &headers, body).await?,
        MAX_ROWS,
    )?;
    if query.limit < MAX_ROWS && query.offset == 0 {
        query.limit = MAX_ROWS;
    }
    let actor = identity.actor(None);
    let page = with_store(&app, move |store| {
        store.note("export", None, &actor)?;
        store.list(&query)
    })
    .await?;
    let studies: Vec<Study> = page.lines.into_iter().map(|line| line.study).collect();
    let bytes = table(&studies).map_err(|error| {
        log::error!("a table could not be written: {error}");
        ApiError::internal()
    })?;
    Ok(attachment("studies.csv", "text/csv; charset=utf-8", bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Patient, Report};

    fn study() -> Study {
        Study {
            id: "ab".into(),
            patient: Patient {
                id: "=1+1".into(),
                name: "张<三>&".into(),
                ..Patient::default()
            },
            signed: vec![Report {
                text: "双肺纹理清晰。\n心影不大。\u{0}".into(),
                by: "李医生".into(),
                at: 0,
            }],
            ..Study::default()
        }
    }

    #[test]
    fn a_document_is_an_archive_of_well_formed_parts() {
        let bytes = document(&study());
        let text = String::from_utf8_lossy(&bytes);
        assert!(bytes.starts_with(b"PK\x03\x04") && text.contains("word/document.xml"));
        assert!(text.contains("张&lt;三&gt;&amp;") && text.contains(">心影不大。<"));
        assert!(text.contains("李医生, 1970-01-01 00:00 UTC"));
        assert_eq!(document(&study()), bytes);
        let end = bytes.len() - 22;
        assert_eq!(&bytes[end..end + 4], b"PK\x05\x06");
        assert_eq!(bytes[end + 10], 5);
    }

    #[test]
    fn a_table_has_texts_and_no_formulas() {
        let bytes = table(&[study()]).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.starts_with("\u{feff}study,state"));
        assert!(text.contains("ab,received,'=1+1,张<三>&,"));
    }
}
