//! The keys of a row that name a rejected answer.

use serde_json::{Map, Value};

use super::row_keys;

/// The keys that name a rejected answer.
pub const KEYS: [&str; 2] = ["rejected_response", "rejected_messages"];

/// The keys of a row that belong to its rejected answer; `None` where it has none.
pub(super) fn of_row(row: &Map<String, Value>) -> Option<Box<Map<String, Value>>> {
    let own = row.iter().filter(|(key, value)| {
        (KEYS.contains(&key.as_str()) || *key == "rejected_images") && !row_keys::is_empty(value)
    });
    let own: Map<String, Value> = own
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    (!own.is_empty()).then(|| Box::new(own))
}
