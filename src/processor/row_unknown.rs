//! Rows in none of the forms that are read: the nearest form, and the line that would be right.

use serde_json::{Map, Value, json};

use super::row_fault::RowFault;
use super::row_forms::CONVERSATIONS;

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
    // A picture that is in the row has no text that could be shown.
    let embedded = row.iter().find(|(_, value)| {
        let fields = value.as_object();
        fields.is_some_and(|fields| fields.contains_key("bytes") && fields.contains_key("path"))
    });
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
    let image = embedded.map(|(key, _)| (key, "…")).or_else(|| {
        texts
            .clone()
            .find(|(key, text)| is_path(text) || like(key, &IMAGE_KEYS))
    });
    let others = texts.filter(|(key, _)| {
        image.is_none_or(|(image, _)| *key != image)
            && !(like(key, &IMAGE_KEYS) && embedded.is_some())
    });
    let report = others
        .clone()
        .find(|(key, _)| like(key, &REPORT_KEYS))
        .or_else(|| {
            let texts = others.clone().filter(|(key, _)| !is_number(key));
            texts.max_by_key(|(_, text)| text.chars().count())
        })?;
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
            .filter(|(key, text)| (is_path(text) || embedded.is_some()) && !is_path(key))
            .map(|(key, _)| key.clone()),
        report: report.0.clone(),
    })
}

/// Whether a key is named as the number of a row is.
fn is_number(key: &str) -> bool {
    let key = key.to_lowercase();
    ["id", "uid", "index", "split"].contains(&key.as_str()) || key.ends_with("_id")
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
    if let Some(described) = described_files(row) {
        return described;
    }
    let other_case = |key: &&String| {
        let lower = key.to_lowercase();
        **key != lower && CONVERSATIONS.contains(&lower.as_str())
    };
    if let Some(key) = row.keys().find(other_case) {
        return found(
            &format!("`{key}`"),
            &format!(
                "is `{}` meant? Names of keys are in small letters",
                key.to_lowercase()
            ),
        );
    }
    if has("chosen_messages") {
        return found(
            "`chosen_messages` (preferences of LLaMA-Factory)",
            "`--columns messages=chosen_messages` reads it beside `rejected_messages`; `train` with `objective = \"dpo\"` learns from both",
        );
    }
    if has("contents") {
        return found(
            "`contents` (a request of Gemini's)",
            "name it `messages`, and `parts` of each `content`, with parts `{\"type\": \"text\", \"text\": …}` and `{\"type\": \"image\", \"image\": \"a.png\"}`",
        );
    }
    if has("annotations") && has("data") {
        return found(
            "a task of Label Studio",
            "write a row a task, which `convert` reads, with the names of your labels: `jq -c '.[] | {image: .data.image, report: .annotations[0].result[0].value.text[0]}' FILE > rows.jsonl`",
        );
    }
    if has("annotations") {
        return found(
            "one object with `annotations` (the form of OpenI-zh)",
            "`convert` reads it, with `--images DIR` and `--output OUT`",
        );
    }
    if has("image_id") && has("caption") && !row.values().any(Value::is_object) {
        return found(
            "`image_id` and `caption` (a row of OpenI-zh)",
            "`convert` reads such rows, with `--image-key image_id` and `--report-key caption`",
        );
    }
    if has("file_name") {
        return found(
            "`file_name` (the metadata of an image folder)",
            "`convert` reads it, and draws a question for each picture",
        );
    }
    if has("custom_id") && has("body") {
        return found(
            "a request of OpenAI's batch API, which has no answer",
            "put `messages` of its `body` and the answer that is to be learnt into one row",
        );
    }
    if let Some(nested) = nested_rows(row) {
        return nested;
    }
    let is_path = |key: &&String| {
        let key = key.to_lowercase();
        ENDINGS.iter().any(|ending| key.ends_with(ending))
    };
    if let Some(key) = row.keys().find(is_path) {
        return found(
            &format!("a column named `{key}`: a table without a line of names"),
            "put the columns' names into its first line, such as `image,report`; `convert` reads that",
        );
    }
    let is_report = |key: &&String| {
        ["report", "findings", "impression", "caption"].contains(&key.to_lowercase().as_str())
    };
    if let Some(key) = row.keys().find(is_report) {
        return found(
            &format!("`{key}` and no question"),
            "`convert` reads rows of an image and a report, findings and impression together, and draws the questions",
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

/// A file that describes data files in place of holding rows: `dataset_info.json` of LLaMA-Factory, or the meta file
/// of InternVL.
fn described_files(row: &Map<String, Value>) -> Option<(String, String)> {
    let of_key = |key: &str| -> Vec<(&String, &Map<String, Value>, &str)> {
        row.iter()
            .filter_map(|(name, value)| {
                let fields = value.as_object()?;
                Some((name, fields, fields.get(key)?.as_str()?))
            })
            .collect()
    };
    let (factory, intern) = (of_key("file_name"), of_key("annotation"));
    let (words, files) = if factory.is_empty() {
        (
            "a description of data sets (the meta file of InternVL)",
            intern,
        )
    } else {
        (
            "a description of data sets (dataset_info.json of LLaMA-Factory)",
            factory,
        )
    };
    let (_, fields, _) = files.first()?;
    let named: Vec<String> = files
        .iter()
        .take(3)
        .map(|(name, _, file)| format!("{name}={file}"))
        .collect();
    // Names under which a file of the same form is read anyway.
    let standard = [
        "messages",
        "conversations",
        "images",
        "image",
        "instruction",
        "input",
        "output",
        "system",
        "tools",
        "history",
    ];
    let columns: Vec<String> = fields
        .get("columns")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(ours, theirs)| Some((ours, theirs.as_str()?)))
        .filter(|(_, theirs)| !standard.contains(theirs))
        .map(|(ours, theirs)| {
            let ours = if ours == "prompt" { "query" } else { ours };
            format!("{ours}={theirs}")
        })
        .collect();
    let columns = match columns.is_empty() {
        true => String::new(),
        false => format!(" --columns {}", columns.join(",")),
    };
    Some((
        words.to_owned(),
        format!(
            "name the data files themselves: `--train-data {}{columns}`",
            named.join(",")
        ),
    ))
}

/// Rows in the places of keys, or columns in the places of rows.
fn nested_rows(row: &Map<String, Value>) -> Option<(String, String)> {
    if row.is_empty() || !row.values().all(Value::is_object) {
        return None;
    }
    let is_number = |key: &String| key.parse::<u64>().is_ok();
    let of_columns = |value: &Value| {
        let mut fields = value.as_object().into_iter().flat_map(Map::keys);
        fields.clone().next().is_some() && fields.all(is_number)
    };
    if row.values().all(of_columns) {
        return Some((
            "columns in place of rows (pandas' `to_json`)".to_owned(),
            "write a row a line: `df.to_json(FILE, orient=\"records\", lines=True, force_ascii=False)`"
                .to_owned(),
        ));
    }
    Some((
        "an object of rows by their names".to_owned(),
        "write a row a line: `jq -c '.[]' FILE > rows.jsonl`; `to_entries[] | .value + {id: .key}` in place of `.[]` keeps the names"
            .to_owned(),
    ))
}
