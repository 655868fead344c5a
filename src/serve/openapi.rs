//! The OpenAPI document, put together of its parts.

use std::sync::LazyLock;

use serde_json::{Map, Value};

/// Paths, and the schemas of what is sent and received.
const PATHS: &str = include_str!("openapi/paths.json");
const SCHEMAS: [&str; 2] = [
    include_str!("openapi/requests.json"),
    include_str!("openapi/responses.json"),
];

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
    // Parts of the program itself: a test reads them.
    let part = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
    let mut schemas = Map::new();
    for text in SCHEMAS {
        schemas.extend(part(text).as_object().cloned().unwrap_or_default());
    }
    let mut document = part(PATHS);
    document["components"]["schemas"] = schemas.into();
    document
});

static TEXT: LazyLock<String> = LazyLock::new(|| DOCUMENT.to_string());

/// The document as text.
pub(super) fn text() -> &'static str {
    &TEXT
}

#[cfg(test)]
pub(super) fn document() -> &'static Value {
    &DOCUMENT
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that whatever is referred to is there.
    fn check_references(value: &Value) {
        if let Some(target) = value["$ref"].as_str() {
            let pointer = target.trim_start_matches('#');
            assert!(document().pointer(pointer).is_some(), "nothing at {target}");
        }
        match value {
            Value::Object(object) => object.values().for_each(check_references),
            Value::Array(list) => list.iter().for_each(check_references),
            _ => {}
        }
    }

    #[test]
    fn the_parts_are_json_and_refer_to_each_other() {
        for text in SCHEMAS.iter().chain([&PATHS]) {
            serde_json::from_str::<Map<String, Value>>(text).unwrap();
        }
        assert!(
            document()["components"]["schemas"]
                .as_object()
                .unwrap()
                .len()
                > 20
        );
        check_references(document());
    }
}
