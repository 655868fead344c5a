//! The images of a row: a file, an address, or the image itself, by any of the names and forms in use.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::row_fault::{RowFault, kind_of};
use super::row_keys;
use crate::base::base64_text::base64_bytes;

/// Longest path of an image: a longer text is no path, but most likely the picture itself.
const LONGEST_PATH: usize = 4096;

/// Longest name in a path.
const LONGEST_NAME: usize = 255;

/// Shortest text that may be an image in base64.
const SHORTEST_BASE64: usize = 64;

/// Where an image is that is no file named by the row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// In the row itself: the bytes of a file.
    Bytes(Vec<u8>),
    /// On the web.
    Address(String),
    /// Where [`Self::Bytes`] or [`Self::Address`] was kept as a file.
    Kept(PathBuf),
}

/// An image as a row names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RowImage {
    /// A path, an address, or `sha256:…` of an image without a name.
    pub(super) name: String,
    /// Absent for a file.
    pub(super) source: Option<ImageSource>,
}

impl RowImage {
    fn file(path: &str) -> Self {
        Self {
            name: path.to_owned(),
            source: None,
        }
    }

    /// An image whose bytes are in the row; `name` is what the row calls it.
    fn bytes(bytes: Vec<u8>, name: Option<&str>) -> Self {
        let name = name.filter(|name| !name.trim().is_empty());
        Self {
            name: name.map_or_else(|| unnamed(&bytes), str::to_owned),
            source: Some(ImageSource::Bytes(bytes)),
        }
    }
}

/// The name of an image that has none: equal images have one name.
fn unnamed(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    let digits: String = digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{digits}")
}

/// The images under `key` of a row: one, or a list. Keys of an entry that nothing reads are added to
/// `unknown_keys`.
pub(super) fn read(
    key: &str,
    value: Option<&Value>,
    unknown_keys: &mut Vec<String>,
) -> Result<Vec<RowImage>, RowFault> {
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(entries)) => {
            let entries = entries.iter().enumerate();
            entries
                .map(|(index, entry)| image(&format!("{key}[{index}]"), entry, unknown_keys))
                .collect()
        }
        Some(entry @ (Value::String(_) | Value::Object(_))) => {
            Ok(vec![image(&format!("{key}[0]"), entry, unknown_keys)?])
        }
        Some(other) => Err(RowFault::key(key, kind_of(other), "a list of paths")),
    }
}

const EXPECTED: &str = "the path of an image file, an address, or an image in base64";

/// One image.
pub(super) fn image(
    key: &str,
    entry: &Value,
    unknown_keys: &mut Vec<String>,
) -> Result<RowImage, RowFault> {
    match entry {
        Value::String(text) => from_text(key, text),
        Value::Object(fields) => from_fields(key, fields, unknown_keys),
        other => Err(RowFault::key(key, kind_of(other), EXPECTED)),
    }
}

/// `{"bytes": …, "path": …}` of Hugging Face's data sets, and `{"url": …}`.
fn from_fields(
    key: &str,
    fields: &Map<String, Value>,
    unknown_keys: &mut Vec<String>,
) -> Result<RowImage, RowFault> {
    let given = |name: &str| fields.get(name).filter(|value| !row_keys::is_empty(value));
    let path = given("path").and_then(Value::as_str);
    let data = ["bytes", "base64"]
        .into_iter()
        .find_map(|name| Some((name, given(name)?)));
    let place = ["path", "url", "image", "image_url", "file"]
        .into_iter()
        .find_map(|name| Some((name, given(name)?)));
    let read = [
        data.map(|(name, _)| name),
        place.map(|(name, _)| name),
        data.and(path).map(|_| "path"),
    ];
    let others = fields
        .iter()
        .filter(|(name, value)| !read.contains(&Some(name.as_str())) && !row_keys::is_empty(value));
    unknown_keys.extend(others.map(|(name, _)| format!("{key}.{name}")));
    match (data, place) {
        (Some((name, data)), _) => {
            let key = format!("{key}.{name}");
            let bytes = match data {
                Value::String(text) => decoded(text),
                Value::Array(numbers) => numbers
                    .iter()
                    .map(|number| number.as_u64().and_then(|number| u8::try_from(number).ok()))
                    .collect(),
                _ => None,
            };
            let expected = "the bytes of an image file in base64";
            let bytes = bytes.ok_or_else(|| RowFault::key(&key, kind_of(data), expected))?;
            Ok(RowImage::bytes(bytes, path))
        }
        (None, Some((name, Value::String(text)))) => from_text(&format!("{key}.{name}"), text),
        (None, Some((name, other))) => {
            let key = format!("{key}.{name}");
            Err(RowFault::key(key, kind_of(other), EXPECTED))
        }
        (None, None) => Err(RowFault::key(
            key,
            "an object without `path` or `bytes`",
            EXPECTED,
        )),
    }
}

/// The bytes of an image that is in the row itself, with its name; `None` for a path or an address.
pub fn embedded(entry: &Value) -> Option<(String, Vec<u8>)> {
    let found = image("image", entry, &mut Vec::new()).ok()?;
    match found.source? {
        ImageSource::Bytes(bytes) => Some((found.name, bytes)),
        ImageSource::Address(_) | ImageSource::Kept(_) => None,
    }
}

/// The bytes of a data URI or of bare base64.
fn decoded(text: &str) -> Option<Vec<u8>> {
    match text.strip_prefix("data:") {
        None => base64_bytes(text),
        Some(rest) => {
            let (kind, data) = rest.split_once(',')?;
            let is_base64 = kind.to_ascii_lowercase().ends_with(";base64");
            is_base64.then(|| base64_bytes(data)).flatten()
        }
    }
}

/// A path, an address, a data URI or bare base64; never shown whole in a message.
fn from_text(key: &str, text: &str) -> Result<RowImage, RowFault> {
    let fault = |found: String, expected: &str| Err(RowFault::key(key, found, expected));
    if text.trim().is_empty() {
        return fault("an empty text".to_owned(), EXPECTED);
    }
    if let Some(rest) = text.strip_prefix("data:") {
        let kind: String = rest.chars().take_while(|c| *c != ',').take(40).collect();
        return match decoded(text) {
            Some(bytes) => Ok(RowImage::bytes(bytes, None)),
            None => fault(
                format!("`data:{kind},…`, which holds no base64"),
                "`data:image/png;base64,…`",
            ),
        };
    }
    if let Some((scheme, rest)) = text.split_once("://") {
        return match scheme.to_ascii_lowercase().as_str() {
            "http" | "https" => Ok(RowImage {
                name: text.to_owned(),
                source: Some(ImageSource::Address(text.to_owned())),
            }),
            "file" => Ok(RowImage::file(rest)),
            _ => fault(
                format!(
                    "an address (`{}://…`)",
                    scheme.chars().take(20).collect::<String>()
                ),
                "a file, or an address of http:// or https://; hint: copy the images of the store into a folder and name them relative to the data file",
            ),
        };
    }
    let looks_like_base64 = text.len() >= SHORTEST_BASE64 && !text.contains('.');
    if looks_like_base64
        && let Some(bytes) = base64_bytes(text)
        && is_image(&bytes)
    {
        return Ok(RowImage::bytes(bytes, None));
    }
    let longest = text.split('/').map(str::len).max();
    if text.len() >= LONGEST_PATH || longest > Some(LONGEST_NAME) {
        let letters = text.chars().count();
        return fault(
            format!("a text of {letters} characters, too long for a path and no image in base64"),
            EXPECTED,
        );
    }
    Ok(RowImage::file(text))
}

/// Whether bytes begin as a file of a known image format does.
fn is_image(bytes: &[u8]) -> bool {
    ending_of(bytes).is_some()
}

/// The ending of a file with these bytes, by its first ones.
pub fn ending_of(bytes: &[u8]) -> Option<&'static str> {
    let formats: [(&[u8], &str); 9] = [
        (b"\x89PNG", "png"),
        (b"\xff\xd8\xff", "jpg"),
        (b"RIFF", "webp"),
        (b"BM", "bmp"),
        (b"II*\0", "tif"),
        (b"MM\0*", "tif"),
        (b"II+\0", "tif"),
        (b"MM\0+", "tif"),
        (b"GIF8", "gif"),
    ];
    if bytes.get(128..132) == Some(b"DICM") {
        return Some("dcm");
    }
    formats
        .iter()
        .find(|(magic, _)| bytes.starts_with(magic))
        .map(|(_, ending)| *ending)
}

/// The file a row means by `name`, seen from `folder`: relative, absolute, below `~`, or with the
/// backslashes of Windows.
pub fn path_of(name: &str, folder: &Path) -> PathBuf {
    if let Some(rest) = name.strip_prefix("~/") {
        let home = std::env::var_os("HOME").or_else(|| std::env::var_os("USERPROFILE"));
        if let Some(home) = home {
            return Path::new(&home).join(rest);
        }
    }
    let path = folder.join(name);
    if cfg!(windows) || !name.contains('\\') || path.exists() {
        return path;
    }
    folder.join(name.replace('\\', "/"))
}

/// `images` as a plain row holds them: the names.
pub(super) fn names(images: &[RowImage]) -> Value {
    json!(images.iter().map(|image| &image.name).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use base64::Engine;

    use super::*;

    fn one(value: Value) -> Result<RowImage, RowFault> {
        let mut unknown = Vec::new();
        image("images[0]", &value, &mut unknown)
    }

    #[test]
    fn an_image_is_read_in_each_of_its_forms() {
        let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
        png.resize(99, 7);
        let text = base64::engine::general_purpose::STANDARD.encode(&png);
        let bytes = Some(ImageSource::Bytes(png.clone()));
        let unnamed = unnamed(&png);
        for (value, name, source) in [
            (json!("a/1.png"), "a/1.png", None),
            (json!({"path": "a/1.png"}), "a/1.png", None),
            (json!({"bytes": null, "path": "a/1.png"}), "a/1.png", None),
            (json!("file:///a/1.png"), "/a/1.png", None),
            (
                json!(format!("data:image/png;base64,{text}")),
                unnamed.as_str(),
                bytes.clone(),
            ),
            (json!(text), unnamed.as_str(), bytes.clone()),
            (
                json!({"bytes": text, "path": "CXR1.png"}),
                "CXR1.png",
                bytes.clone(),
            ),
            (
                json!({"bytes": png, "path": null}),
                unnamed.as_str(),
                bytes.clone(),
            ),
            (
                json!({"url": "https://example.org/1.png"}),
                "https://example.org/1.png",
                Some(ImageSource::Address("https://example.org/1.png".into())),
            ),
        ] {
            let found = one(value).unwrap();
            assert_eq!((found.name.as_str(), found.source), (name, source));
        }
        for (value, says) in [
            (json!(""), "an empty text"),
            (json!(3), "is a number"),
            (json!("s3://bucket/1.png"), "`s3://…`"),
            (json!("data:image/png,xx"), "holds no base64"),
            (json!("A".repeat(5000)), "too long for a path"),
            (json!({"bytes": "%%%"}), "in base64"),
            (json!({"height": 3}), "without `path` or `bytes`"),
        ] {
            let fault = one(value).unwrap_err().to_string();
            assert!(fault.contains(says), "{fault}");
            assert!(fault.len() < 300, "{fault}");
        }
    }

    #[test]
    fn a_path_is_seen_from_the_data_file() {
        let folder = Path::new("/data");
        assert_eq!(path_of("a/1.png", folder), Path::new("/data/a/1.png"));
        assert_eq!(path_of("/b/1.png", folder), Path::new("/b/1.png"));
        if !cfg!(windows) {
            assert_eq!(path_of(r".\a\1.png", folder), Path::new("/data/./a/1.png"));
        }
        if let Some(home) = std::env::var_os("HOME") {
            assert_eq!(path_of("~/1.png", folder), Path::new(&home).join("1.png"));
        }
    }
}
