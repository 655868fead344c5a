//! Rows whose keys say what is in them: JSON objects and rows of tables, in English and Chinese.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use regex::Regex;
use serde_json::{Map, Value};

use super::super::error::ConvertError;
use super::super::form::CorpusForm;
use super::super::selection::Part;
use super::record::{Picture, Projection, Record, Records, Report, View, clean};
use super::table::Table;
use crate::dataset::image_store::ImageStore;
use crate::processor::row_keys::{KeyUse, of_row};
use crate::processor::sample::embedded;
use crate::study::keys_of;

/// Names of columns, in lower case without spaces, `_` and `-`; the first that a row has counts.
const IMAGES: [&str; 29] = [
    "images",
    "image",
    "imgfrontal",
    "imagepath",
    "imagepaths",
    "imagefile",
    "imagename",
    "img",
    "imgpath",
    "path",
    "filepath",
    "file",
    "filename",
    "filenames",
    "picture",
    "imageid",
    "图像路径",
    "图片路径",
    "影像路径",
    "图像文件",
    "影像文件",
    "图片文件",
    "图像",
    "图片",
    "影像",
    "文件名",
    "文件名称",
    "图像名",
    "文件路径",
];
/// Numbers of an examination, which image files begin with.
const NUMBERS: [&str; 11] = [
    "影像号",
    "影像编号",
    "检查号",
    "检查编号",
    "检查流水号",
    "放射号",
    "x线号",
    "片号",
    "accession",
    "accessionnumber",
    "examid",
];
const REPORTS: [&str; 14] = [
    "report",
    "reports",
    "reporttext",
    "caption",
    "text",
    "报告",
    "报告内容",
    "检查报告",
    "影像报告",
    "诊断报告",
    "报告全文",
    "放射报告",
    "报告文本",
    "label",
];
const FINDINGS: [&str; 18] = [
    "findings",
    "finding",
    "sectionfindings",
    "影像所见",
    "检查所见",
    "所见",
    "放射所见",
    "影像表现",
    "影像学表现",
    "影像学所见",
    "检查描述",
    "影像描述",
    "描述",
    "检查表现",
    "x线所见",
    "ct所见",
    "图像描述",
    "诊断描述",
];
const IMPRESSIONS: [&str; 16] = [
    "impression",
    "impressions",
    "sectionimpression",
    "conclusion",
    "影像诊断",
    "诊断意见",
    "影像学诊断",
    "放射诊断",
    "检查结论",
    "诊断结论",
    "影像结论",
    "诊断印象",
    "印象",
    "结论",
    "诊断",
    "检查诊断",
];
const STUDIES: [&str; 13] = [
    "study",
    "studyid",
    "uid",
    "studyuid",
    "studyinstanceuid",
    "accession",
    "accessionnumber",
    "检查号",
    "检查编号",
    "检查流水号",
    "影像号",
    "影像编号",
    "放射号",
];
const PATIENTS: [&str; 14] = [
    "patient",
    "patientid",
    "subjectid",
    "subject",
    "患者编号",
    "患者id",
    "患者号",
    "病人编号",
    "病人id",
    "病历号",
    "病案号",
    "登记号",
    "住院号",
    "门诊号",
];
const PARTS: [&str; 7] = [
    "split",
    "subset",
    "fold",
    "partition",
    "数据集",
    "划分",
    "集合",
];
const VIEWS: [&str; 10] = [
    "view",
    "viewposition",
    "projection",
    "position",
    "体位",
    "投照体位",
    "摄影体位",
    "投照位置",
    "投射体位",
    "检查体位",
];

/// The number of a study in R2Gen's ids of IU X-Ray: `CXR2384_IM-0942`.
static INDIANA: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"^CXR(\d+)_(?:\d+_)?IM-").expect("the pattern is a constant that a test compiles")
});

/// Which keys a row is read by.
#[derive(Debug, Clone, Copy)]
pub(super) enum KeyNames<'a> {
    /// These two.
    Given { image: &'a str, report: &'a str },
    /// Those that are known.
    Known,
}

fn plain(key: &str) -> String {
    let kept = key
        .chars()
        .filter(|c| !c.is_whitespace() && !"_-*:：".contains(*c));
    kept.collect::<String>().to_lowercase()
}

/// The first key of `names` under which a row has something.
fn found<'a>(fields: &'a Map<String, Value>, names: &[&str]) -> Option<(&'a String, &'a Value)> {
    let keys: Vec<(String, &String, &Value)> = fields
        .iter()
        .filter(|(_, value)| !is_nothing(value))
        .map(|(key, value)| (plain(key), key, value))
        .collect();
    names.iter().find_map(|name| {
        let mut keys = keys.iter();
        let (_, key, value) = keys.find(|(plain, ..)| plain == name)?;
        Some((*key, *value))
    })
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => clean(text).is_none(),
        Value::Array(entries) => entries.is_empty(),
        _ => false,
    }
}

fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => clean(text),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// Whether columns of these names say where the images and the reports are.
pub(super) fn are_known<'a>(keys: impl Iterator<Item = &'a String>) -> bool {
    let keys: Vec<String> = keys.map(|key| plain(key)).collect();
    let any = |names: &[&str]| keys.iter().any(|key| names.contains(&key.as_str()));
    (any(&IMAGES) || any(&NUMBERS)) && (any(&REPORTS) || any(&FINDINGS) || any(&IMPRESSIONS))
}

/// Reads one row.
pub(super) fn record(
    file: &Arc<Path>,
    number: usize,
    row: &Value,
    names: KeyNames<'_>,
    part: Option<Part>,
    form: CorpusForm,
    store: &ImageStore,
) -> Result<Record, ConvertError> {
    let wrong = |what: String, expected: &str| ConvertError::Form {
        path: file.to_path_buf(),
        row: number,
        what,
        expected: expected.to_owned(),
    };
    let Value::Object(fields) = row else {
        return Err(wrong("the row".into(), "an object"));
    };
    let mut read: Vec<&String> = Vec::new();
    let mut record = Record::new(file);
    let image = match names {
        KeyNames::Given { image, .. } => fields.get_key_value(image),
        KeyNames::Known => found(fields, &IMAGES),
    };
    let pictures: Vec<Picture> = match image {
        Some((key, value)) => {
            read.push(key);
            let expected = "a path, or a list of paths";
            pictures_of(value, store)?.ok_or_else(|| wrong(format!("`{key}`"), expected))?
        }
        None => match (names, found(fields, &NUMBERS)) {
            (KeyNames::Given { image, .. }, _) => {
                return Err(wrong(format!("`{image}`"), "a path, or a list of paths"));
            }
            (KeyNames::Known, Some((_, value))) => {
                text_of(value).map(Picture::Number).into_iter().collect()
            }
            (KeyNames::Known, None) => Vec::new(),
        },
    };
    let mut texts = |names: &[&str]| -> Result<Option<String>, ConvertError> {
        let Some((key, value)) = found(fields, names) else {
            return Ok(None);
        };
        read.push(key);
        match value {
            Value::String(text) => Ok(clean(text)),
            _ => Err(wrong(format!("`{key}`"), "a text")),
        }
    };
    record.report = match names {
        KeyNames::Given { report, .. } => match fields.get(report) {
            Some(Value::String(text)) => Report {
                whole: (!text.trim().is_empty()).then(|| text.clone()),
                ..Report::default()
            },
            _ => return Err(wrong(format!("`{report}`"), "a text")),
        },
        KeyNames::Known => Report {
            findings: texts(&FINDINGS)?,
            impression: texts(&IMPRESSIONS)?,
            whole: texts(&REPORTS)?,
        },
    };
    if let KeyNames::Given { report, .. } = names {
        read.extend(fields.get_key_value(report).map(|(key, _)| key));
    }
    let mut take = |names: &[&str]| {
        let (key, value) = found(fields, names)?;
        read.push(key);
        text_of(value)
    };
    if form == CorpusForm::R2gen {
        let id = fields.get("id").and_then(Value::as_str).unwrap_or_default();
        let uid = INDIANA
            .captures(id)
            .map(|groups| format!("CXR{}", &groups[1]));
        record.study = uid.or_else(|| take(&STUDIES));
    } else if matches!(names, KeyNames::Known) {
        record.study = take(&STUDIES);
    }
    if matches!(names, KeyNames::Known) {
        record.patient = take(&PATIENTS);
        let own = take(&PARTS);
        record.part = match (part, own) {
            (Some(part), _) => Some(part),
            (None, own) => own.as_deref().and_then(Part::of),
        };
    }
    let projection = match names {
        KeyNames::Known if pictures.len() == 1 => Projection::of(take(&VIEWS).as_deref()),
        _ => Projection::Unknown,
    };
    record.views = pictures
        .into_iter()
        .map(|picture| View {
            number,
            picture,
            projection,
        })
        .collect();
    if record.views.is_empty() {
        // It is listed under its number.
        record.views.push(View {
            number,
            picture: Picture::Path(String::new()),
            projection,
        });
    }
    record.keys = keys_of(fields);
    record.unused = fields
        .iter()
        .filter(|(key, value)| {
            let used = read.contains(key) || key.as_str() == "prompt" || key.is_empty();
            let number = NUMBERS.contains(&plain(key).as_str());
            !used && !number && of_row(key, value) != KeyUse::Harmless
        })
        .map(|(key, _)| key.clone())
        .collect();
    Ok(record)
}

/// Images under a key: a path, `{"path"}`, or the image itself, which is kept; one or a list. `None` for anything else.
fn pictures_of(value: &Value, store: &ImageStore) -> Result<Option<Vec<Picture>>, ConvertError> {
    let entries = match value {
        Value::Array(entries) => &entries[..],
        value => std::slice::from_ref(value),
    };
    let mut pictures = Vec::with_capacity(entries.len());
    for entry in entries {
        let picture = match embedded(entry) {
            Some((name, bytes)) => Picture::Kept {
                name,
                path: store.keep(&bytes)?,
            },
            None => match text_of(entry.get("path").unwrap_or(entry)) {
                Some(path) => Picture::Path(path),
                None => return Ok(None),
            },
        };
        pictures.push(picture);
    }
    Ok(Some(pictures))
}

/// Reads a table of known columns.
pub(super) fn table(path: &Path, store: &ImageStore) -> Result<Records, ConvertError> {
    let table = Table::read(path)?;
    if !are_known(table.columns.iter()) {
        return Err(ConvertError::Form {
            path: path.to_owned(),
            row: 1,
            what: format!("the columns `{}`", table.columns.join(",")),
            expected: CorpusForm::Table.files().to_owned(),
        });
    }
    let mut found = Records {
        files: vec![table.path.clone()],
        ..Records::default()
    };
    for row in table.rows() {
        let fields = table.columns.iter().enumerate().map(|(at, column)| {
            let text = row.get(Some(at)).unwrap_or_default();
            // Several images in one field.
            let images = text.split([';', '；', '|']).map(str::trim);
            let images: Vec<&str> = images.filter(|image| !image.is_empty()).collect();
            let value = if images.len() > 1 && IMAGES.contains(&plain(column).as_str()) {
                images.into()
            } else {
                Value::from(text)
            };
            (column.clone(), value)
        });
        let fields = Value::Object(fields.collect());
        found.records.push(record(
            &table.path,
            row.number,
            &fields,
            KeyNames::Known,
            None,
            CorpusForm::Table,
            store,
        )?);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(row: Value) -> Record {
        let file: Arc<Path> = Path::new("a.json").into();
        let store = ImageStore::default();
        record(
            &file,
            1,
            &row,
            KeyNames::Known,
            None,
            CorpusForm::Rows,
            &store,
        )
        .unwrap()
    }

    #[test]
    fn keys_are_known_in_any_spelling() {
        for row in [
            json!({"Image_Path": ["a.png"], "FINDINGS": "f", "Impression": "i", "Study ID": 7, "subject-id": "p", "split": "validate", "View Position": "PA", "age": 60}),
            json!({"文件名": "a.png", "影像所见": "f", "诊断意见": "i", "检查号": "7", "病历号": "p", "数据集": "验证集", "体位": "正位", "age": 60}),
        ] {
            let record = read(row);
            assert_eq!(record.views[0].picture, Picture::Path("a.png".into()));
            assert_eq!(record.views[0].projection, Projection::Frontal);
            assert_eq!(record.report.findings.as_deref(), Some("f"));
            assert_eq!(record.report.impression.as_deref(), Some("i"));
            assert_eq!(record.study.as_deref(), Some("7"));
            assert_eq!(record.patient.as_deref(), Some("p"));
            assert_eq!(record.part, Some(Part::Val));
            assert_eq!(record.unused, ["age"]);
        }
        let record = read(json!({"影像号": "DR7", "描述": "f", "结论": "nan"}));
        assert_eq!(record.views[0].picture, Picture::Number("DR7".into()));
        assert_eq!(
            (record.study.as_deref(), record.report.impression),
            (Some("DR7"), None)
        );
        let keys = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect::<Vec<_>>();
        assert!(are_known(keys(&["检查号", "检查所见"]).iter()));
        assert!(!are_known(keys(&["检查号", "性别"]).iter()));
    }

    #[test]
    fn ids_of_the_indiana_collection_name_the_study() {
        let file: Arc<Path> = Path::new("annotation.json").into();
        let row = json!({"id": "CXR2384_IM-0942", "report": "r", "image_path": ["CXR2384_IM-0942/0.png"], "split": "test"});
        let record = record(
            &file,
            1,
            &row,
            KeyNames::Known,
            Some(Part::Test),
            CorpusForm::R2gen,
            &ImageStore::default(),
        );
        assert_eq!(record.unwrap().study.as_deref(), Some("CXR2384"));
    }
}
