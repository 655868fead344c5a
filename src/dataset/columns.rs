//! Columns of a data file under other names: which one is which key of a row.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::base::files::nearest::nearest;
use crate::processor::sample::RowFault;

/// Keys that a column may be named for.
const KEYS: [&str; 22] = [
    "messages",
    "images",
    "query",
    "response",
    "history",
    "system",
    "instruction",
    "input",
    "output",
    "objects",
    "chat_template_kwargs",
    "min_pixels",
    "max_pixels",
    "loss",
    "loss_scale",
    "rejected_response",
    "rejected_messages",
    "study",
    "study_id",
    "patient",
    "patient_id",
    "id",
];

/// Keys of rows by the names that a file has for them: `images = "image_path"`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    try_from = "BTreeMap<String, String>",
    into = "BTreeMap<String, String>"
)]
pub struct Columns(BTreeMap<String, String>);

impl Columns {
    /// Whether no column has another name.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The names that the file has.
    pub fn theirs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(ours, theirs)| (ours.as_str(), theirs.as_str()))
    }

    /// Gives the columns of a row our names.
    ///
    /// # Errors
    /// [`RowFault::Key`] if the row has both.
    pub fn rename(&self, row: &mut Map<String, Value>) -> Result<(), RowFault> {
        let mut taken = Vec::new();
        for (ours, theirs) in &self.0 {
            taken.push((ours, theirs, row.shift_remove(theirs)));
        }
        for (ours, theirs, value) in taken {
            let Some(value) = value else { continue };
            if row.get(ours).is_some_and(|other| !other.is_null()) {
                return Err(RowFault::Key {
                    key: ours.clone(),
                    found: format!("given beside `{theirs}`, which `columns` names for it"),
                    expected: "one of the two".to_owned(),
                });
            }
            row.insert(ours.clone(), value);
        }
        Ok(())
    }
}

impl TryFrom<BTreeMap<String, String>> for Columns {
    type Error = String;

    fn try_from(names: BTreeMap<String, String>) -> Result<Self, String> {
        let mut theirs: Vec<&String> = names.values().collect();
        theirs.sort_unstable();
        if let Some(pair) = theirs.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("columns: `{}` is named for two keys", pair[0]));
        }
        for key in names.keys() {
            if !KEYS.contains(&key.as_str()) {
                let meant = nearest(key, KEYS).map_or_else(
                    || format!("expected one of {}", KEYS.join(", ")),
                    |nearest| format!("did you mean `{nearest}`?"),
                );
                return Err(format!(
                    "columns: `{key}` is no key of a row ({meant}); written is our key first, then the name in the file: `images=image_path`"
                ));
            }
        }
        Ok(Self(names))
    }
}

impl From<Columns> for BTreeMap<String, String> {
    fn from(columns: Columns) -> Self {
        columns.0
    }
}

impl FromStr for Columns {
    type Err = String;

    /// `images=image_path,response=report`, or ms-swift's `{"image_path": "images"}`.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim_start().starts_with('{') {
            let theirs: BTreeMap<String, String> = serde_json::from_str(text)
                .map_err(|error| format!("columns: expected a JSON object of texts: {error}"))?;
            return theirs
                .into_iter()
                .map(|(theirs, ours)| (ours, theirs))
                .collect::<BTreeMap<_, _>>()
                .try_into();
        }
        let pairs = text.split(',').filter(|pair| !pair.trim().is_empty());
        let pairs = pairs.map(|pair| match pair.split_once('=') {
            Some((ours, theirs)) if !theirs.trim().is_empty() => {
                Ok((ours.trim().to_owned(), theirs.trim().to_owned()))
            }
            _ => Err(format!("columns: `{pair}` is not of the form OURS=THEIRS")),
        });
        pairs.collect::<Result<BTreeMap<_, _>, _>>()?.try_into()
    }
}

impl fmt::Display for Columns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs = self
            .theirs()
            .map(|(ours, theirs)| format!("{ours}={theirs}"));
        f.write_str(&pairs.collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_renamed_and_slips_are_named() {
        let columns: Columns = "images=影像, response=报告".parse().unwrap();
        let swift: Columns = r#"{"影像": "images", "报告": "response"}"#.parse().unwrap();
        assert_eq!(columns, swift);
        assert_eq!(columns.to_string(), "images=影像,response=报告");
        let row = json!({"影像": "a.png", "报告": "正常", "id": 1});
        let Value::Object(mut row) = row else {
            unreachable!()
        };
        columns.rename(&mut row).unwrap();
        let plain = json!({"id": 1, "images": "a.png", "response": "正常"});
        assert_eq!(Value::Object(row.clone()), plain);
        row.insert("影像".into(), json!("b.png"));
        let fault = columns.rename(&mut row).unwrap_err().to_string();
        assert!(fault.contains("`images` is given beside `影像`"), "{fault}");
        // Two columns may change places.
        let swap: Columns = "query=response,response=query".parse().unwrap();
        let Value::Object(mut row) = json!({"query": "a", "response": "q"}) else {
            unreachable!()
        };
        swap.rename(&mut row).unwrap();
        assert_eq!(Value::Object(row), json!({"query": "q", "response": "a"}));
        for (text, says) in [
            ("image_path=images", "is no key of a row"),
            ("image=x", "did you mean `images`?"),
            ("images", "OURS=THEIRS"),
            ("images=a,response=a", "named for two keys"),
            ("{1", "JSON object"),
        ] {
            let error = text.parse::<Columns>().unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
