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

/// Paths and schemas that a server with studies has besides.
const STUDIES: &str = include_str!("openapi/studies.json");

static WITH_STUDIES: LazyLock<Value> = LazyLock::new(|| {
    let mut document = DOCUMENT.clone();
    let more: Value = serde_json::from_str(STUDIES).unwrap_or_default();
    let pointers = [
        ("paths", "/paths"),
        ("schemas", "/components/schemas"),
        ("limits", "/components/schemas/Limits/properties"),
    ];
    for (part, pointer) in pointers {
        let place = document.pointer_mut(pointer).and_then(Value::as_object_mut);
        if let (Some(place), Some(more)) = (place, more[part].as_object()) {
            place.extend(more.clone());
        }
    }
    document
});

static TEXT: LazyLock<String> = LazyLock::new(|| DOCUMENT.to_string());
static TEXT_WITH_STUDIES: LazyLock<String> = LazyLock::new(|| WITH_STUDIES.to_string());

/// The document as text; `studies` adds what a server has that keeps them.
pub(super) fn text(studies: bool) -> &'static str {
    if studies { &TEXT_WITH_STUDIES } else { &TEXT }
}

#[cfg(test)]
pub(super) fn document(studies: bool) -> &'static Value {
    if studies { &WITH_STUDIES } else { &DOCUMENT }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that whatever is referred to is there.
    fn check_references(value: &Value) {
        if let Some(target) = value["$ref"].as_str() {
            let pointer = target.trim_start_matches('#');
            assert!(
                document(true).pointer(pointer).is_some(),
                "nothing at {target}"
            );
        }
        match value {
            Value::Object(object) => object.values().for_each(check_references),
            Value::Array(list) => list.iter().for_each(check_references),
            _ => {}
        }
    }

    #[test]
    fn the_parts_are_json_and_refer_to_each_other() {
        for text in SCHEMAS.iter().chain([&PATHS, &STUDIES]) {
            serde_json::from_str::<Map<String, Value>>(text).unwrap();
        }
        assert!(
            document(false)["components"]["schemas"]
                .as_object()
                .unwrap()
                .len()
                > 20
        );
        check_references(document(true));
    }
}
