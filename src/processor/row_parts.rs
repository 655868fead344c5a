//! Content as a list of parts: of OpenAI (`image_url`), of chat templates on Hugging Face and of Qwen (`image`), of
//! Anthropic (`source`) and of LLaMA-Factory 1 (`value`).

use serde_json::{Map, Value, json};

use super::row_fault::{RowFault, kind_of};
use super::row_keys;
use super::tags::IMAGE_TAG;

/// Pixel limits, as keys of a row or of an image.
pub(super) const LIMITS: [&str; 2] = ["min_pixels", "max_pixels"];

/// Names under which a part has its image.
const SOURCES: [&str; 8] = [
    "image",
    "image_url",
    "url",
    "base64",
    "bytes",
    "path",
    "source",
    "value",
];

/// Keys of a part that change nothing: `index` is TRL's, the number of the image; `detail` is how large a server makes it.
const HARMLESS: [&str; 8] = [
    "type",
    "index",
    "detail",
    "id",
    "uuid",
    "name",
    "cache_control",
    "annotations",
];

/// Images and limits found in the parts of contents.
#[derive(Default)]
pub(super) struct PartImages {
    /// In the order of their places.
    pub(super) images: Vec<Value>,
    /// `min_pixels` and `max_pixels`.
    pub(super) limits: [Option<Value>; 2],
}

impl PartImages {
    /// A list of parts as one text with `<image>` in the place of each image.
    pub(super) fn text(&mut self, key: &str, parts: &[Value]) -> Result<String, RowFault> {
        let mut text = String::new();
        for (index, part) in parts.iter().enumerate() {
            let place = format!("{key}[{index}]");
            let part = match part {
                Value::String(words) => {
                    text.push_str(words);
                    continue;
                }
                Value::Object(part) => part,
                other => {
                    let expected = "a part such as `{\"type\": \"text\", \"text\": …}`";
                    return Err(RowFault::key(place, kind_of(other), expected));
                }
            };
            let kind = match part.get("type").and_then(Value::as_str) {
                Some(kind) => kind,
                None => ["text", "image", "image_url", "video", "audio"]
                    .into_iter()
                    .find(|kind| part.get(*kind).is_some_and(|value| !value.is_null()))
                    .unwrap_or("without a type"),
            };
            match kind {
                "text" | "input_text" | "output_text" => {
                    match part.get("text").or_else(|| part.get("value")) {
                        Some(Value::String(words)) => text.push_str(words),
                        other => {
                            let found = other.map_or("missing", kind_of);
                            return Err(RowFault::key(format!("{place}.text"), found, "a text"));
                        }
                    }
                    all_read(&place, part, &["text", "value"])?;
                }
                "image" | "image_url" | "input_image" => {
                    text.push_str(IMAGE_TAG);
                    self.image(&place, part)?;
                }
                "video" | "video_url" | "audio" | "input_audio" => {
                    return Err(RowFault::Refused {
                        key: place,
                        cure: "videos and sound are not read; give single frames as images, or take the row out of the file",
                    });
                }
                other => {
                    let found = format!("a part `{}`", other.chars().take(40).collect::<String>());
                    let expected = "parts of `text`, `image` or `image_url`";
                    return Err(RowFault::key(place, found, expected));
                }
            }
        }
        Ok(text)
    }

    fn image(&mut self, place: &str, part: &Map<String, Value>) -> Result<(), RowFault> {
        all_read(place, part, &[&SOURCES[..], &LIMITS[..]].concat())?;
        let mut sources = SOURCES
            .into_iter()
            .filter_map(|name| Some((name, part.get(name)?)))
            .filter(|(_, value)| !row_keys::is_empty(value));
        let source = sources.next();
        if let Some((one, _)) = source {
            // The path beside bytes is the name that they had.
            let is_bytes = matches!(one, "base64" | "bytes");
            if let Some((other, _)) = sources.find(|(name, _)| !is_bytes || *name != "path") {
                return Err(RowFault::key(
                    format!("{place}.{one}"),
                    format!("given beside `{other}`"),
                    "one image a part",
                ));
            }
        }
        match source {
            // The place of the next image of the row.
            None => {}
            Some((_, Value::Object(fields))) if fields.contains_key("url") => {
                self.images.push(fields["url"].clone());
            }
            Some(("source", Value::Object(fields))) if fields.contains_key("data") => {
                self.images.push(json!({"bytes": fields["data"]}));
            }
            Some(("base64" | "bytes", value)) => match part.get("path") {
                None | Some(Value::Null) => self.images.push(json!({"bytes": value})),
                Some(path) => self.images.push(json!({"bytes": value, "path": path})),
            },
            Some((_, value)) => self.images.push(value.clone()),
        }
        self.limits(place, part)
    }

    /// Takes the limits of an image, which are those of all of its row.
    pub(super) fn limits(
        &mut self,
        place: &str,
        part: &Map<String, Value>,
    ) -> Result<(), RowFault> {
        for (name, limit) in LIMITS.into_iter().zip(&mut self.limits) {
            match (part.get(name), &*limit) {
                (None | Some(Value::Null), _) => {}
                (Some(own), Some(other)) if own != other => {
                    return Err(RowFault::key(
                        format!("{place}.{name}"),
                        own.to_string(),
                        "the same limit for all images of a row",
                    ));
                }
                (Some(own), _) => *limit = Some(own.clone()),
            }
        }
        Ok(())
    }
}

/// Refuses a part with a key that nothing reads: what it says of its image or text would be lost.
fn all_read(place: &str, part: &Map<String, Value>, read: &[&str]) -> Result<(), RowFault> {
    let other = part.iter().find(|(key, value)| {
        let key = key.as_str();
        let known = read.contains(&key) || HARMLESS.contains(&key) || key.starts_with('_');
        !known && !row_keys::is_empty(value)
    });
    match other {
        None => Ok(()),
        Some((key, _)) => Err(RowFault::Refused {
            key: format!("{place}.{key}"),
            cure: "of parts `text` and `image` (also `image_url`, `url`, `path`, `base64`, `source`), `min_pixels` and `max_pixels` are read; take it out, or begin its name with `_`",
        }),
    }
}
