//! Content as a list of parts: of OpenAI (`image_url`), of chat templates on Hugging Face and of Qwen (`image`).

use serde_json::{Map, Value, json};

use super::row_fault::{RowFault, kind_of};
use super::row_keys;
use super::tags::IMAGE_TAG;

/// Pixel limits, as keys of a row or of an image.
pub(super) const LIMITS: [&str; 2] = ["min_pixels", "max_pixels"];

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
                "text" | "input_text" | "output_text" => match part.get("text") {
                    Some(Value::String(words)) => text.push_str(words),
                    other => {
                        let found = other.map_or("missing", kind_of);
                        return Err(RowFault::key(format!("{place}.text"), found, "a text"));
                    }
                },
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
        let source = ["image", "image_url", "url", "path", "base64", "bytes"]
            .into_iter()
            .filter_map(|name| Some((name, part.get(name)?)))
            .find(|(_, value)| !row_keys::is_empty(value));
        match source {
            // The place of the next image of the row.
            None => {}
            Some((_, Value::Object(fields))) if fields.contains_key("url") => {
                self.images.push(fields["url"].clone());
            }
            Some(("base64" | "bytes", value)) => self.images.push(json!({"bytes": value})),
            Some((_, value)) => self.images.push(value.clone()),
        }
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
