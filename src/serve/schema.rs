//! Closes the objects of a JSON schema that name their properties, as vLLM's grammars do.
//!
//! A schema as pydantic writes it allows further properties by not forbidding them. A validator needs
//! that; a model takes it as leave to go on for ever after the last property.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

/// Keywords that hold schemas by name.
const NAMED: [&str; 5] = [
    "properties",
    "patternProperties",
    "$defs",
    "definitions",
    "dependentSchemas",
];

/// Keywords that hold one schema or a list.
const DIRECT: [&str; 12] = [
    "items",
    "prefixItems",
    "additionalProperties",
    "unevaluatedProperties",
    "additionalItems",
    "contains",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "then",
    "else",
];

/// Keywords by which a schema itself defines which other properties there may be.
const OPEN: [&str; 3] = [
    "additionalProperties",
    "unevaluatedProperties",
    "patternProperties",
];

/// Adds `"additionalProperties": false` to every object with `properties` and no keyword for
/// others; an explicit `true` stays. The parts of an `allOf` are left as they are: each forbids the
/// others' properties otherwise. Returns whether any was closed.
pub(super) fn close_objects(schema: &mut Map<String, Value>) -> bool {
    let mut parts = BTreeSet::new();
    for value in schema.values() {
        parts_of_all(value, &mut parts);
    }
    parts_of_object(schema, &mut parts);
    close(schema, "#", &parts, true)
}

/// Collects where the parts of all `allOf` are that have several, or others beside them.
fn parts_of_all(value: &Value, parts: &mut BTreeSet<String>) {
    match value {
        Value::Array(list) => list.iter().for_each(|one| parts_of_all(one, parts)),
        Value::Object(object) => {
            parts_of_object(object, parts);
            object.values().for_each(|one| parts_of_all(one, parts));
        }
        _ => {}
    }
}

fn parts_of_object(object: &Map<String, Value>, parts: &mut BTreeSet<String>) {
    let Some(Value::Array(all)) = object.get("allOf") else {
        return;
    };
    if is_joined(object, all) {
        let targets = all.iter().filter_map(|part| part.get("$ref")?.as_str());
        parts.extend(targets.map(ToOwned::to_owned));
    }
}

/// Whether an `allOf` puts several descriptions of one object together.
fn is_joined(object: &Map<String, Value>, all: &[Value]) -> bool {
    all.len() > 1 || object.contains_key("properties")
}

fn close(schema: &mut Map<String, Value>, path: &str, parts: &BTreeSet<String>, may: bool) -> bool {
    let all = schema.get("allOf").and_then(Value::as_array);
    let joined = all.is_some_and(|all| is_joined(schema, all));
    let is_defined = OPEN.iter().any(|key| schema.contains_key(*key));
    let named = schema.get("properties").is_some_and(Value::is_object);
    let mut closed = may && named && !is_defined && !joined && !parts.contains(path);
    if closed {
        schema.insert("additionalProperties".into(), false.into());
    }
    for (key, value) in schema.iter_mut() {
        match value {
            Value::Object(named) if NAMED.contains(&key.as_str()) => {
                for (name, inner) in named.iter_mut() {
                    if let Value::Object(inner) = inner {
                        closed |= close(inner, &format!("{path}/{key}/{name}"), parts, true);
                    }
                }
            }
            Value::Object(inner) if DIRECT.contains(&key.as_str()) => {
                closed |= close(inner, &format!("{path}/{key}"), parts, true);
            }
            Value::Array(list) if key == "allOf" || DIRECT.contains(&key.as_str()) => {
                let may = key != "allOf" || !joined;
                for (index, inner) in list.iter_mut().enumerate() {
                    if let Value::Object(inner) = inner {
                        closed |= close(inner, &format!("{path}/{key}/{index}"), parts, may);
                    }
                }
            }
            _ => {}
        }
    }
    closed
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn closed(schema: Value) -> Value {
        let Value::Object(mut schema) = schema else {
            panic!("no object");
        };
        let before = schema.clone();
        assert_eq!(close_objects(&mut schema), before != schema);
        schema.into()
    }

    #[test]
    fn objects_that_name_their_properties_are_closed_wherever_they_are() {
        let inner = json!({"type": "object", "properties": {"b": {}}});
        let inner_closed =
            json!({"type": "object", "properties": {"b": {}}, "additionalProperties": false});
        let found = closed(json!({
            "properties": {"a": {"$ref": "#/$defs/A"}, "l": {"type": "array", "items": inner}},
            "$defs": {"A": inner},
        }));
        assert_eq!(
            found,
            json!({
                "properties": {"a": {"$ref": "#/$defs/A"}, "l": {"type": "array", "items": inner_closed}},
                "$defs": {"A": inner_closed},
                "additionalProperties": false,
            })
        );
    }

    #[test]
    fn what_a_schema_defines_itself_stays() {
        for schema in [
            json!({"type": "object"}),
            json!({"properties": {"a": {}}, "additionalProperties": true}),
            json!({"properties": {"a": {}}, "additionalProperties": {"type": "string"}}),
            json!({"properties": {"a": {}}, "patternProperties": {"^x": {}}}),
            json!({"const": {"properties": {"a": 1}}}),
            json!({"enum": [{"properties": {"a": 1}}]}),
            json!({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}),
            json!({"properties": {"a": {}}, "allOf": [{"properties": {"b": {}}}]}),
        ] {
            assert_eq!(closed(schema.clone()), schema);
        }
        // A part that is named elsewhere, as inheritance is written.
        let inherited = json!({
            "allOf": [{"$ref": "#/$defs/A"}, {"properties": {"b": {}}}],
            "$defs": {"A": {"properties": {"a": {}}}},
        });
        assert_eq!(closed(inherited.clone()), inherited);
    }
}
