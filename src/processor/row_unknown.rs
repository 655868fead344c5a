//! Rows in none of the forms that are read: the nearest form, and the line that would be right.

use serde_json::{Map, Value, json};

use super::row_fault::RowFault;

/// The form that every other is brought into.
pub(super) const EXPECTED: &str = r#"`{"messages": [{"role": "user", "content": "<image>…"}, {"role": "assistant", "content": "…"}], "images": ["a.png"]}`"#;

/// Endings by which a text is known for the path of an image.
const ENDINGS: [&str; 9] = [
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".dcm", ".dicom",
];

/// Names of keys of images and of reports in corpora.
const IMAGE_KEYS: [&str; 6] = ["image", "img", "picture", "影像", "图像", "图片"];
const REPORT_KEYS: [&str; 8] = [
    "report",
    "caption",
    "findings",
    "impression",
    "label",
    "报告",
    "所见",
    "诊断",
];

/// What a row is that has neither `messages` nor another form that is read, and what to do about it.
pub(super) fn describe(row: &Map<String, Value>) -> RowFault {
    let (found, mut hint) = form(row);
    let expected = match line(row) {
        Some(known) => {
            let (image, report) = (&known.image, &known.report);
            if let Some(image) = image {
                // Without an ending the file has another name, which `convert` looks for.
                hint = format!(
                    "`--columns images={image},response={report}` (in a config `[columns]`) reads these keys as they are; {hint}"
                );
            }
            format!("`{}`", known.line)
        }
        None => EXPECTED.to_owned(),
    };
    RowFault::Form {
        found,
        expected,
        hint,
    }
}

/// A row brought into the form that is read, and the keys it was made of.
struct KnownLine {
    line: String,
    image: Option<String>,
    report: String,
}

/// The line that would be right for this row, its texts shortened; `None` where no text looks like a report.
fn line(row: &Map<String, Value>) -> Option<KnownLine> {
    let like = |key: &str, names: &[&str]| {
        let key = key.to_lowercase();
        names.iter().any(|name| key.contains(name))
    };
    let texts = row.iter().filter_map(|(key, value)| {
        let text = match value {
            Value::Array(entries) => entries.first()?.as_str()?,
            value => value.as_str()?,
        };
        Some((key, text))
    });
    let is_path = |text: &str| {
        let text = text.to_lowercase();
        ENDINGS.iter().any(|ending| text.ends_with(ending))
    };
    let image = texts
        .clone()
        .find(|(key, text)| is_path(text) || like(key, &IMAGE_KEYS));
    let others = texts.filter(|(key, _)| image.is_none_or(|(image, _)| *key != image));
    let report = others
        .clone()
        .find(|(key, _)| like(key, &REPORT_KEYS))
        .or_else(|| others.clone().max_by_key(|(_, text)| text.chars().count()))?;
    if report.1.trim().is_empty() || (image.is_none() && !like(report.0, &REPORT_KEYS)) {
        return None;
    }
    let mark = if image.is_some() { "<image>" } else { "" };
    let mut messages = json!({"messages": [
        {"role": "user", "content": format!("{mark}…")},
        {"role": "assistant", "content": short(report.1)},
    ]});
    if let Some((_, path)) = image {
        messages["images"] = json!([short(path)]);
    }
    Some(KnownLine {
        line: messages.to_string(),
        image: image
            .filter(|(_, text)| is_path(text))
            .map(|(key, _)| key.clone()),
        report: report.0.clone(),
    })
}

/// The beginning of a text.
fn short(text: &str) -> String {
    const LETTERS: usize = 40;
    let mut short: String = text.chars().take(LETTERS).collect();
    if text.chars().nth(LETTERS).is_some() {
        short.push('…');
    }
    short
}

/// The nearest form of a row, and what to do about it.
fn form(row: &Map<String, Value>) -> (String, String) {
    let has = |key: &str| row.contains_key(key);
    let found = |words: &str, hint: &str| (words.to_owned(), hint.to_owned());
    if has("chosen") && has("rejected") {
        return found(
            "`chosen` and `rejected` (preferences)",
            "put the chosen answer into `messages` and the rejected one into `rejected_response`; `train` with `objective = \"dpo\"` learns from both",
        );
    }
    if has("annotations") {
        return found(
            "one object with `annotations` (the form of OpenI-zh)",
            "`convert` reads it, with `--images DIR` and `--output OUT`",
        );
    }
    if has("image_id") && has("caption") {
        return found(
            "`image_id` and `caption` (a row of OpenI-zh)",
            "`convert` reads such rows, with `--image-key image_id` and `--report-key caption`",
        );
    }
    if has("file_name") || row.values().any(|value| value.get("file_name").is_some()) {
        return found(
            "a description of data sets (dataset_info.json of LLaMA-Factory)",
            "name the data file itself",
        );
    }
    if has("query") || has("prompt") || has("question") || has("instruction") {
        return found(
            "a question without an answer (the query-response form of ms-swift)",
            "put the answer that is to be learnt under `response`",
        );
    }
    if has("text") {
        return found(
            "a plain `text`",
            "training is on questions and answers; put the text to be learnt into a message of `assistant`, after one of `user`",
        );
    }
    let keys: Vec<String> = row.keys().take(8).map(|key| format!("`{key}`")).collect();
    let words = match keys.len() {
        0 => "an object without keys".to_owned(),
        1 => format!("only the key {}", keys[0]),
        _ => format!("only the keys {}", keys.join(", ")),
    };
    (
        words,
        "put question and answer into `messages` and the paths of the pictures into `images`, or let `convert` do it, with `--image-key` and `--report-key`"
            .to_owned(),
    )
}
