//! One line of a training file in ms-swift's form, checked.
//!
//! `{"messages": [{"role": "user", "content": "<image>…"}, {"role": "assistant", "content": "…"}],
//! "images": ["a.png"]}`: each `<image>` in a question is the place of the next image. The keys `image`,
//! `system`, `objects`, `chat_template_kwargs` (`min_pixels`, `max_pixels`), `loss` and `loss_scale` (0 or 1)
//! and the tag `<img>path</img>` are read as well; all other keys are handled in
//! [`super::row_keys`]. A backslash before a tag makes it plain text: `\<image>`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

pub use super::conversation::{Conversation, Turn};
use super::message::{Content, Part, Role};
use super::objects::Objects;
pub use super::row_fault::{RowFault, SampleError};
use super::row_fault::{kind_of, shown};
use super::row_keys::{self, KeyUse};
pub use super::tags::IMAGE_TAG;
use super::tags::{self, Tag};
use super::{row_forms, strict_json};
use crate::{base::files::nearest::nearest, study::keys_of};

/// Longest path of an image: a longer text is no path, but most likely the picture itself.
const LONGEST_PATH: usize = 4096;

/// Longest name in a path.
const LONGEST_NAME: usize = 255;

/// Pixel limits of a row's images, in place of those of the run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PixelLimits {
    /// Smallest width times height after scaling.
    pub min_pixels: Option<usize>,
    /// Largest width times height after scaling.
    pub max_pixels: Option<usize>,
}

/// One checked line of a training file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The conversation, with a place for each image; boxes of objects are still `<bbox>`, see
    /// [`Self::placed`].
    pub conversation: Conversation,
    /// Paths as the line gives them, in the order of their places.
    pub images: Vec<String>,
    /// Number of `<image>` and `<img>path</img>` in the questions.
    pub marks: usize,
    /// Pixel limits of its own.
    pub limits: PixelLimits,
    /// Keys with a text or a number, as text: a study may be named by one.
    pub keys: BTreeMap<String, String>,
    /// Keys that nothing reads, such as `hospital` or `messages[0].mood`; they are passed over.
    pub unknown_keys: Vec<String>,
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

/// As [`parse_line`], and the row itself in the plain form: `images` for `image` and
/// `<img>path</img>`, `system` as the first message. All other keys are as they were.
///
/// # Errors
/// As [`parse_line`].
pub fn parse_row(
    line: &str,
    file: &Path,
    row: usize,
) -> Result<(Sample, Map<String, Value>), SampleError> {
    let parsed = || {
        let mut fields = match strict_json::parse(line).map_err(RowFault::Json)? {
            Value::Object(fields) => fields,
            other => {
                return Err(RowFault::Form {
                    found: kind_of(&other).to_owned(),
                    hint: "write one object a line".to_owned(),
                });
            }
        };
        if !fields.contains_key("messages") {
            let (found, hint) = row_forms::describe(&fields);
            return Err(RowFault::Form { found, hint });
        }
        to_plain_form(&mut fields)?;
        let mut sample = read(&fields, None)?;
        if !sample.conversation.turns.is_empty() && fields.contains_key("objects") {
            sample.boxed = Some(Box::new(fields.clone()));
        }
        Ok((sample, fields))
    };
    parsed().map_err(|fault| SampleError {
        file: file.to_owned(),
        row,
        fault,
    })
}

/// Brings other names of images and of the system message into the plain form.
fn to_plain_form(row: &mut Map<String, Value>) -> Result<(), RowFault> {
    let both = |one: &str, other: &str| {
        let found = format!("given beside `{other}`");
        RowFault::key(one, found, "one of the two")
    };
    if let Some(image) = row.shift_remove("image").filter(|v| !row_keys::is_empty(v)) {
        if row.get("images").is_some_and(|v| !row_keys::is_empty(v)) {
            return Err(both("image", "images"));
        }
        row.insert("images".to_owned(), image);
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
    }
    Ok(())
}

/// Reads a row in the plain form; without `sizes` of its images, boxes stay `<bbox>`.
fn read(row: &Map<String, Value>, sizes: Option<&[(usize, usize)]>) -> Result<Sample, RowFault> {
    let mut unknown_keys = Vec::new();
    for (key, value) in row {
        sort_key(key.clone(), row_keys::of_row(key, value), &mut unknown_keys)?;
    }
    if learns(row, "")? == Some(false) {
        return Err(RowFault::key(
            if row.contains_key("loss") {
                "loss"
            } else {
                "loss_scale"
            },
            "that of a row of which nothing is learnt",
            "a row to learn from; take it out of the file",
        ));
    }
    let limits = pixel_limits(row.get("chat_template_kwargs"))?;
    let images = image_paths(row.get("images"), &mut unknown_keys)?;
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
            Some(Value::Array(parts)) => {
                let (found, expected) = row_forms::describe_parts(parts);
                return Err(RowFault::key(key, found, expected));
            }
            other => {
                let found = other.map_or("missing", kind_of);
                return Err(RowFault::key(key, found, "a text"));
            }
        };
        let answered = conversation.turns.last().is_none_or(|t| t.answer.is_some());
        let own_role = match role {
            "system" if index == 0 => Role::System,
            "user" if answered => Role::User,
            "assistant" if !answered => Role::Assistant,
            _ => return Err(wrong_role(role_key, role, answered)),
        };
        let learns = learns(message, &format!("{place}."))?;
        if own_role != Role::Assistant && learns == Some(true) {
            return Err(RowFault::key(
                format!("{place}.loss"),
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
                if let Some(turn) = conversation.turns.last_mut() {
                    turn.answer = Some(Content::Parts(parts).text());
                    turn.learns = learns.unwrap_or(true);
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
            "without an answer to learn: `loss` is false or `loss_scale` is 0 in each",
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
        images,
        keys: keys_of(row),
        marks,
        limits,
        unknown_keys,
        boxed: None,
    })
}

/// Refuses a key, or notes that it is in no list.
fn sort_key(key: String, use_of: KeyUse, unknown: &mut Vec<String>) -> Result<(), RowFault> {
    match use_of {
        KeyUse::Read | KeyUse::Harmless => Ok(()),
        KeyUse::Refused(cure) => Err(RowFault::Refused { key, cure }),
        KeyUse::Slip(nearest) => Err(RowFault::Slip { key, nearest }),
        KeyUse::Unknown => {
            unknown.push(key);
            Ok(())
        }
    }
}

/// What `loss` and `loss_scale` of a row or a message say; `None` if nothing.
///
/// As in ms-swift, an answer is learnt unless `loss` is false or `loss_scale` is 0.
///
/// Source: `LossScale._inner_call`, ms-swift 4.6, `loss_scale/base.py`.
fn learns(fields: &Map<String, Value>, place: &str) -> Result<Option<bool>, RowFault> {
    let loss = match fields.get("loss") {
        None | Some(Value::Null) => None,
        Some(Value::Bool(loss)) => Some(*loss),
        Some(other) => {
            let key = format!("{place}loss");
            let expected = "true (learnt) or false (not learnt)";
            return Err(RowFault::key(key, shown(other), expected));
        }
    };
    let scale = match fields.get("loss_scale") {
        None | Some(Value::Null) => None,
        Some(value) if value.as_f64() == Some(1.0) => Some(true),
        Some(value) if value.as_f64() == Some(0.0) => Some(false),
        Some(other) => {
            let key = format!("{place}loss_scale");
            let expected = "1 (learnt) or 0 (not learnt): answers have no weights between or above; repeat a row that is to count more";
            return Err(RowFault::key(key, shown(other), expected));
        }
    };
    Ok(match (loss, scale) {
        (None, None) => None,
        (loss, scale) => Some(loss.unwrap_or(true) && scale.unwrap_or(true)),
    })
}

/// `min_pixels` and `max_pixels` of `chat_template_kwargs`.
fn pixel_limits(kwargs: Option<&Value>) -> Result<PixelLimits, RowFault> {
    const KEYS: [&str; 2] = ["min_pixels", "max_pixels"];
    let mut limits = PixelLimits::default();
    let fields = match kwargs {
        None => return Ok(limits),
        Some(value) if row_keys::is_empty(value) => return Ok(limits),
        Some(Value::Object(fields)) => fields,
        Some(other) => {
            let key = "chat_template_kwargs";
            return Err(RowFault::key(key, kind_of(other), "an object"));
        }
    };
    for (name, value) in fields {
        if row_keys::is_empty(value) {
            continue;
        }
        let key = format!("chat_template_kwargs.{name}");
        let limit = match name.as_str() {
            "min_pixels" => &mut limits.min_pixels,
            "max_pixels" => &mut limits.max_pixels,
            _ => match nearest(name, KEYS) {
                Some(nearest) => return Err(RowFault::Slip { key, nearest }),
                None => {
                    let cure = "of these settings only `min_pixels` and `max_pixels` have a meaning in training; take it out";
                    return Err(RowFault::Refused { key, cure });
                }
            },
        };
        let pixels = value
            .as_u64()
            .and_then(|pixels| usize::try_from(pixels).ok());
        *limit =
            Some(pixels.filter(|pixels| *pixels > 0).ok_or_else(|| {
                RowFault::key(key, shown(value), "a whole number of pixels above 0")
            })?);
    }
    Ok(limits)
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
fn wrong_role(key: String, role: &str, answered: bool) -> RowFault {
    const ORDER: &str = "an optional `system`, then `user` and `assistant` by turns";
    let (found, expected) = match role {
        "user" => (
            "`user` after `user`".to_owned(),
            format!("{ORDER}; join the two questions"),
        ),
        "assistant" if answered => (
            "`assistant` without a question before it".to_owned(),
            format!("{ORDER}; put a question before it, or join answers that follow each other"),
        ),
        "system" => ("`system` after other messages".to_owned(), ORDER.to_owned()),
        "tool" | "tool_call" | "tool_response" | "function" | "function_call" => (
            format!("`{role}`"),
            format!("{ORDER}: turns of tools are not read"),
        ),
        other => {
            let expected = match row_forms::role_of(other) {
                Some(meant) => format!("`{meant}` for it ({ORDER})"),
                None => ORDER.to_owned(),
            };
            (format!("`{other}`"), expected)
        }
    };
    RowFault::key(key, found, expected)
}

/// Paths from `"a.png"`, `["a.png"]`, `{"path": "a.png"}` or a list of such.
fn image_paths(
    images: Option<&Value>,
    unknown_keys: &mut Vec<String>,
) -> Result<Vec<String>, RowFault> {
    let one;
    let entries = match images {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(entries)) => entries.as_slice(),
        Some(value @ (Value::String(_) | Value::Object(_))) => {
            one = [value.clone()];
            &one
        }
        Some(other) => return Err(RowFault::key("images", kind_of(other), "a list of paths")),
    };
    let path_of = |(index, entry): (usize, &Value)| {
        let key = format!("images[{index}]");
        let expected = "the path of an image file";
        let path = match entry {
            Value::String(path) => path,
            Value::Object(fields) => match (fields.get("path"), fields.get("bytes")) {
                (Some(Value::String(path)), _) => {
                    let others = fields
                        .iter()
                        .filter(|(name, value)| *name != "path" && !row_keys::is_empty(value));
                    unknown_keys.extend(others.map(|(name, _)| format!("{key}.{name}")));
                    path
                }
                (_, Some(bytes)) if !bytes.is_null() => {
                    return Err(RowFault::key(
                        key,
                        "a picture in `bytes`",
                        in_a_file(expected),
                    ));
                }
                _ => return Err(RowFault::key(key, kind_of(entry), expected)),
            },
            _ => return Err(RowFault::key(key, kind_of(entry), expected)),
        };
        match not_a_path(path) {
            Some(found) => Err(RowFault::key(key, found, in_a_file(expected))),
            None => Ok(path.clone()),
        }
    };
    entries.iter().enumerate().map(path_of).collect()
}

fn in_a_file(expected: &str) -> String {
    format!("{expected}; write the picture into a file and name it, relative to the data file")
}

/// What a text is that cannot be the path of a file; it is never shown whole.
fn not_a_path(path: &str) -> Option<String> {
    if path.trim().is_empty() {
        return Some("an empty text".to_owned());
    }
    if let Some((kind, _)) = path
        .strip_prefix("data:")
        .and_then(|rest| rest.split_once(','))
    {
        let kind: String = kind.chars().take(40).collect();
        return Some(format!("a picture in the row itself (`data:{kind},…`)"));
    }
    for scheme in ["http://", "https://", "file://", "s3://", "oss://"] {
        if path.starts_with(scheme) {
            return Some(format!("an address (`{scheme}…`)"));
        }
    }
    let longest = path.split('/').map(str::len).max();
    (path.len() >= LONGEST_PATH || longest > Some(LONGEST_NAME)).then(|| {
        let letters = path.chars().count();
        format!("a text of {letters} characters, too long for a path (a picture in base64?)")
    })
}

#[cfg(test)]
#[path = "sample/tests.rs"]
mod tests;
