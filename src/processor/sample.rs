//! One row of a training file, checked.
//!
//! `{"messages": [{"role": "user", "content": "<image>…"}, {"role": "assistant", "content": "…"}],
//! "images": ["a.png"]}`: each `<image>` in a question is the place of the next image. The keys `image`,
//! `system`, `objects`, `tools`, `chat_template_kwargs` (`min_pixels`, `max_pixels`), `loss` and `loss_scale` (0 or 1)
//! with their like of other trainers, and the tag `<img>path</img>` are read as well; all other keys are handled in
//! [`super::row_keys`], rows of other trainers in `row_forms`. A backslash before a tag makes it plain text: `\<image>`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

pub use super::conversation::{Conversation, Turn};
use super::learnt::{self, learns};
use super::message::{Content, Part, Role};
use super::objects::Objects;
pub use super::pixel_limits::PixelLimits;
use super::pixel_limits::pixel_limits;
use super::row_fault::kind_of;
pub use super::row_fault::{RowFault, SampleError};
pub use super::row_forms::is_training_form;
pub use super::row_images::{ImageSource, embedded, ending_of, path_of};
use super::row_keys::{self, KeyUse};
pub use super::tags::IMAGE_TAG;
use super::tags::{self, Tag};
use super::{literal, row_forms, row_images, row_question, row_tools, row_unknown, strict_json};
use crate::study::keys_of;

/// Keys that often hold the path of an image, and are none of those that are read.
const LIKE_IMAGES: [&str; 9] = [
    "image_path",
    "image_paths",
    "img_path",
    "image_file",
    "image_files",
    "image_url",
    "image_urls",
    "img_url",
    "filename",
];

/// One checked line of a training file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The conversation, with a place for each image; boxes of objects are still `<bbox>`, see
    /// [`Self::placed`].
    pub conversation: Conversation,
    /// Names as the row gives them, in the order of their places: paths, but for [`Self::sources`].
    pub images: Vec<String>,
    /// Where images are that are no files, by their index.
    pub sources: BTreeMap<usize, ImageSource>,
    /// Number of `<image>` and `<img>path</img>` in the questions.
    pub marks: usize,
    /// Pixel limits of its own.
    pub limits: PixelLimits,
    /// Keys with a text or a number, as text: a study may be named by one.
    pub keys: BTreeMap<String, String>,
    /// Keys that nothing reads, such as `hospital` or `messages[0].mood`; they are passed over.
    pub unknown_keys: Vec<String>,
    /// Keys of the answer that is not to be given.
    pub(super) rejected: Option<Box<Map<String, Value>>>,
    /// The row, where its text has boxes that depend on the sizes of the images.
    boxed: Option<Box<Map<String, Value>>>,
}

impl Sample {
    /// The conversation with the boxes of its objects, for images of these widths and heights in
    /// pixels, as they are shown.
    ///
    /// # Errors
    /// [`RowFault::Key`] if a box is outside its image.
    pub fn placed(&self, sizes: &[(usize, usize)]) -> Result<Cow<'_, Conversation>, RowFault> {
        match &self.boxed {
            None => Ok(Cow::Borrowed(&self.conversation)),
            Some(row) => Ok(Cow::Owned(read(row, Some(sizes))?.conversation)),
        }
    }

    /// The file of an image, seen from the folder of the data file.
    ///
    /// # Panics
    /// If there is no image of this index.
    pub fn image_path(&self, index: usize, folder: &Path) -> PathBuf {
        match self.sources.get(&index) {
            Some(ImageSource::Kept(path)) => path.clone(),
            _ => path_of(&self.images[index], folder),
        }
    }

    /// The files of all images, seen from the folder of the data file.
    pub fn image_paths(&self, folder: &Path) -> Vec<PathBuf> {
        (0..self.images.len())
            .map(|index| self.image_path(index, folder))
            .collect()
    }

    /// Whether [`Self::placed`] depends on the sizes of the images.
    pub fn has_boxes(&self) -> bool {
        self.boxed.is_some()
    }
}

/// `text` as `content` has to hold it for tags such as `<image>` in it to be plain words.
pub fn escaped(text: &str) -> String {
    tags::escaped(text)
}

/// Reads and checks one line; `file` and `row` (from 1) only serve the error messages.
///
/// # Errors
/// [`SampleError`]: not JSON, another form, a key of another type or one that is not supported, an
/// unknown role, roles out of order, an empty answer, no answer to learn, a tag where it has no meaning,
/// or more places than images.
pub fn parse_line(line: &str, file: &Path, row: usize) -> Result<Sample, SampleError> {
    parse_row(line, file, row).map(|(sample, _)| sample)
}

/// As [`parse_line`], and the row itself in the plain form: `messages` for the keys of other trainers,
/// `images` for `image` and `<img>path</img>`, `system` as the first message. All other keys are as they were.
///
/// # Errors
/// As [`parse_line`].
pub fn parse_row(
    line: &str,
    file: &Path,
    row: usize,
) -> Result<(Sample, Map<String, Value>), SampleError> {
    let parsed = fields_of(line).and_then(parse_fields);
    parsed.map_err(|fault| SampleError {
        file: file.to_owned(),
        row,
        fault,
    })
}

/// The object that a line is.
///
/// # Errors
/// [`RowFault::Json`], or [`RowFault::Form`] for another value.
pub fn fields_of(line: &str) -> Result<Map<String, Value>, RowFault> {
    object_of(strict_json::parse(line).map_err(|reason| {
        // What Python prints of a dictionary is no JSON.
        let hint = match literal::parse(line) {
            Some(Value::Object(_)) if line.contains('\'') => {
                "; hint: the line is written as Python prints it; write it with `json.dumps(row, ensure_ascii=False)`"
            }
            _ => "",
        };
        RowFault::Json(format!("{reason}{hint}"))
    })?)
}

/// The object that a value is.
///
/// # Errors
/// [`RowFault::Form`] for another value.
pub fn object_of(value: Value) -> Result<Map<String, Value>, RowFault> {
    match value {
        Value::Object(fields) => Ok(fields),
        other => Err(RowFault::Form {
            found: kind_of(&other).to_owned(),
            expected: row_unknown::EXPECTED.to_owned(),
            hint: "write one object a line".to_owned(),
        }),
    }
}

/// As [`parse_row`], of a row that is an object already.
///
/// # Errors
/// [`RowFault`]: all of [`parse_line`] but broken JSON.
pub fn parse_fields(
    mut fields: Map<String, Value>,
) -> Result<(Sample, Map<String, Value>), RowFault> {
    row_forms::to_messages(&mut fields)?;
    parse_messages(fields)
}

/// As [`parse_fields`], of a row that is to be answered: it may lack an answer, and a row with images alone asks
/// `question`. What `loss` and `loss_scale` say has no meaning here.
///
/// # Errors
/// As [`parse_fields`].
pub fn parse_question(
    mut fields: Map<String, Value>,
    question: &str,
) -> Result<(Sample, Map<String, Value>), RowFault> {
    row_question::ask(&mut fields, question)?;
    row_forms::to_messages(&mut fields)?;
    row_question::without_lesson(&mut fields);
    parse_messages(fields)
}

/// Reads a row that has `messages`.
fn parse_messages(
    mut fields: Map<String, Value>,
) -> Result<(Sample, Map<String, Value>), RowFault> {
    if !fields.contains_key("messages") {
        return Err(row_unknown::describe(&fields));
    }
    to_plain_form(&mut fields)?;
    row_tools::to_words(&mut fields)?;
    let mut unknown_keys = Vec::new();
    let images = row_images::read("images", fields.get("images"), &mut unknown_keys)?;
    let in_row = images.iter().any(|image| image.source.is_some());
    if in_row {
        // What follows needs the names alone, and the bytes are large.
        fields.insert("images".to_owned(), row_images::names(&images));
    }
    let mut sample = read(&fields, None)?;
    if in_row {
        sample.unknown_keys.splice(0..0, unknown_keys);
    }
    let sources = images.into_iter().map(|image| image.source).enumerate();
    sample.sources = sources
        .filter_map(|(index, source)| Some((index, source?)))
        .collect();
    if fields.contains_key("objects") {
        sample.boxed = Some(Box::new(fields.clone()));
    }
    Ok((sample, fields))
}

/// Brings other names of images and of the system message into the plain form.
fn to_plain_form(row: &mut Map<String, Value>) -> Result<(), RowFault> {
    let both = |one: &str, other: &str| {
        let found = format!("given beside `{other}`");
        RowFault::key(one, found, "one of the two")
    };
    for key in ["image", "img"] {
        if let Some(image) = row.shift_remove(key).filter(|v| !row_keys::is_empty(v)) {
            if row.get("images").is_some_and(|v| !row_keys::is_empty(v)) {
                return Err(both(key, "images"));
            }
            row.insert("images".to_owned(), image);
        }
    }
    let mut system = None;
    for key in ["system", "system_prompt"] {
        match row.shift_remove(key) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) if system.is_none() => system = Some((key, text)),
            Some(Value::String(_)) => return Err(both("system", "system_prompt")),
            Some(other) => return Err(RowFault::key(key, kind_of(&other), "a text")),
        }
    }
    let has_images = row.get("images").is_some_and(|v| !row_keys::is_empty(v));
    let Some(Value::Array(messages)) = row.get_mut("messages") else {
        return Ok(());
    };
    if let Some((key, text)) = system.filter(|(_, text)| !text.is_empty()) {
        let first = messages.first();
        match first.filter(|first| first.get("role").and_then(Value::as_str) == Some("system")) {
            None => messages.insert(0, json!({"role": "system", "content": text})),
            Some(own) if own.get("content").and_then(Value::as_str) == Some(&text) => {}
            Some(_) => return Err(both(key, "messages[0]")),
        }
    }
    if has_images {
        return Ok(());
    }
    let mut files = Vec::new();
    for message in messages.iter_mut() {
        let is_question = message.get("role").and_then(Value::as_str) == Some("user");
        if let Some(Value::String(content)) = message.get_mut("content").filter(|_| is_question) {
            let (text, found) = tags::files_to_images(content);
            *content = text;
            files.extend(found);
        }
    }
    if !files.is_empty() {
        row.insert("images".to_owned(), json!(files));
        return Ok(());
    }
    let like_images = LIKE_IMAGES.iter().find(|key| {
        let value = row.get(**key);
        value.is_some_and(|v| (v.is_string() || v.is_array()) && !row_keys::is_empty(v))
    });
    match like_images {
        None => Ok(()),
        Some(key) => Err(RowFault::key(
            *key,
            "given, and the row has no `images`",
            format!(
                "the images of the row under `images`; hint: `--columns images={key}` reads them from `{key}`, and a name that begins with `_` is passed over"
            ),
        )),
    }
}

/// Reads a row in the plain form; without `sizes` of its images, boxes stay `<bbox>`.
fn read(row: &Map<String, Value>, sizes: Option<&[(usize, usize)]>) -> Result<Sample, RowFault> {
    let mut unknown_keys = Vec::new();
    for (key, value) in row {
        sort_key(key.clone(), row_keys::of_row(key, value), &mut unknown_keys)?;
    }
    if learns(row, &learnt::ROW_KEYS, "")? == Some(false) {
        return Err(RowFault::key(
            learnt::key_of(row),
            "that of a row of which nothing is learnt",
            "a row to learn from; take it out of the file",
        ));
    }
    let limits = pixel_limits(row.get("chat_template_kwargs"))?;
    let images = row_images::read("images", row.get("images"), &mut unknown_keys)?;
    let mut objects = Objects::read(row.get("objects"), images.len())?;
    let messages = match row.get("messages") {
        Some(Value::Array(messages)) => messages,
        other => {
            let found = other.map_or("missing", kind_of);
            return Err(RowFault::key("messages", found, "a list of messages"));
        }
    };

    let mut conversation = Conversation::default();
    for (index, message) in messages.iter().enumerate() {
        let place = format!("messages[{index}]");
        let Value::Object(message) = message else {
            let expected = "an object with `role` and `content`";
            return Err(RowFault::key(place, kind_of(message), expected));
        };
        for (key, value) in message {
            let use_of = row_keys::of_message(key, value);
            sort_key(format!("{place}.{key}"), use_of, &mut unknown_keys)?;
        }
        let role_key = format!("{place}.role");
        let role = match message.get("role") {
            Some(Value::String(role)) => role.as_str(),
            other => {
                let found = other.map_or("missing", kind_of);
                return Err(RowFault::key(role_key, found, "`user` or `assistant`"));
            }
        };
        let key = format!("{place}.content");
        let text = match message.get("content") {
            Some(Value::String(text)) => text,
            other => {
                let found = other.map_or("missing", kind_of);
                return Err(RowFault::key(key, found, "a text"));
            }
        };
        let answered = conversation.turns.last().is_none_or(|t| t.answer.is_some());
        let own_role = match role {
            "system" if index == 0 => Role::System,
            "user" if answered => Role::User,
            "assistant" => Role::Assistant,
            _ => return Err(wrong_role(role_key, role)),
        };
        let learns = learns(message, &learnt::KEYS, &format!("{place}."))?;
        if own_role != Role::Assistant && learns == Some(true) {
            return Err(RowFault::key(
                format!("{place}.{}", learnt::key_of(message)),
                format!("set for a message of `{role}`"),
                "it at answers, messages of `assistant`: only they are learnt",
            ));
        }
        let parts = parts_of(text, &key, own_role, &mut objects, sizes)?;
        match own_role {
            Role::User => conversation.turns.push(Turn {
                question: parts,
                answer: None,
                learns: true,
            }),
            Role::System => conversation.system = Some(Content::Parts(parts).text()),
            Role::Assistant => {
                if text.trim().is_empty() {
                    return Err(RowFault::EmptyAnswer { key });
                }
                let (words, learns) = (Content::Parts(parts).text(), learns.unwrap_or(true));
                if conversation.turns.is_empty() {
                    // A text to learn without a question, as ms-swift takes it for pre-training.
                    conversation.turns.push(Turn {
                        question: Vec::new(),
                        answer: None,
                        learns,
                    });
                }
                let Some(turn) = conversation.turns.last_mut() else {
                    continue;
                };
                match &mut turn.answer {
                    None => (turn.answer, turn.learns) = (Some(words), learns),
                    Some(_) if turn.learns != learns => {
                        return Err(RowFault::key(
                            format!("{place}.{}", learnt::key_of(message)),
                            "other than that of the answer before it",
                            "the same for answers that follow each other: they are one answer",
                        ));
                    }
                    // As in ms-swift, answers that follow each other are one, with nothing between them.
                    Some(answer) => answer.push_str(&words),
                }
            }
        }
    }
    objects.check_all_used()?;
    if conversation.turns.is_empty() {
        let expected = "at least one message of `user`";
        return Err(RowFault::key("messages", "without a question", expected));
    }
    let answered = conversation.last_answer().is_some();
    if answered && !conversation.turns.iter().any(|turn| turn.learns) {
        return Err(RowFault::key(
            "messages",
            "without an answer to learn: `loss`, `loss_scale` or one of their like says no to each",
            "at least one answer to learn; take the row out of the file",
        ));
    }
    let marks = conversation.image_count();
    if marks > images.len() {
        return Err(RowFault::Placeholders {
            placeholders: marks,
            images: images.len(),
        });
    }
    conversation.place_images(images.len());
    Ok(Sample {
        conversation,
        images: images.into_iter().map(|image| image.name).collect(),
        sources: BTreeMap::new(),
        keys: keys_of(row),
        marks,
        limits,
        unknown_keys,
        rejected: row_keys::rejected_of(row),
        boxed: None,
    })
}

/// Refuses a key, or notes that it is in no list.
fn sort_key(key: String, use_of: KeyUse, unknown: &mut Vec<String>) -> Result<(), RowFault> {
    match use_of {
        KeyUse::Read | KeyUse::Harmless => Ok(()),
        KeyUse::Kept => {
            unknown.push(key);
            Ok(())
        }
        KeyUse::Refused(cure) => Err(RowFault::Refused { key, cure }),
        KeyUse::Slip(nearest) => Err(RowFault::Slip { key, nearest }),
        KeyUse::Unknown => {
            unknown.push(key);
            Ok(())
        }
    }
}

/// A text as words and places of images; objects are put in.
fn parts_of(
    text: &str,
    key: &str,
    role: Role,
    objects: &mut Objects,
    sizes: Option<&[(usize, usize)]>,
) -> Result<Vec<Part>, RowFault> {
    let mut parts = Vec::new();
    let mut fault = None;
    let write = |words: &str, parts: &mut Vec<Part>| match parts.last_mut() {
        Some(Part::Text { text }) => text.push_str(words),
        _ => parts.push(Part::Text {
            text: words.to_owned(),
        }),
    };
    let refuse = |tag: String, expected| RowFault::Tag {
        key: key.to_owned(),
        tag,
        expected,
    };
    tags::read(text, |tag| {
        let done = match tag {
            Tag::Words(words) => {
                write(words, &mut parts);
                Ok(())
            }
            Tag::Image if role == Role::User => {
                parts.push(Part::Image);
                Ok(())
            }
            Tag::Image => Err(refuse(
                IMAGE_TAG.to_owned(),
                "expected places of images in messages of `user` only",
            )),
            Tag::File(path) if role == Role::User => Err(refuse(
                format!("<img>{path}</img>"),
                "expected `<image>`, because the row names its pictures in `images`",
            )),
            Tag::File(path) => Err(refuse(
                format!("<img>{path}</img>"),
                "expected pictures in messages of `user` only",
            )),
            Tag::NearMiss(tag) if role == Role::User => Err(refuse(
                tag.to_owned(),
                "expected `<image>`, exactly so, where a picture belongs",
            )),
            Tag::NearMiss(tag) => {
                write(tag, &mut parts);
                Ok(())
            }
            Tag::Reference => objects
                .next_reference(key)
                .map(|name| write(&name, &mut parts)),
            Tag::Box => objects
                .next_box(key, sizes)
                .map(|text| write(&text, &mut parts)),
        };
        if let Err(found) = done {
            fault.get_or_insert(found);
        }
    });
    match fault {
        Some(fault) => Err(fault),
        None => Ok(parts),
    }
}

/// Why a role does not fit in its place.
fn wrong_role(key: String, role: &str) -> RowFault {
    const ORDER: &str = "an optional `system`, then `user` and `assistant` by turns";
    let (found, expected) = match role {
        "user" => (
            "`user` after `user`".to_owned(),
            format!("{ORDER}; join the two questions"),
        ),
        "system" => ("`system` after other messages".to_owned(), ORDER.to_owned()),
        other => (
            format!("`{}`", other.chars().take(40).collect::<String>()),
            format!(
                "{ORDER}; also `human`, `gpt`, `model`, `bot`, `developer` and the roles of tools are known"
            ),
        ),
    };
    RowFault::key(key, found, expected)
}

#[cfg(test)]
#[path = "sample/tests.rs"]
mod tests;
