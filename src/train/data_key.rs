//! The names of data sets in a run's settings: one text, or a list of texts.

use std::fmt;

use serde::{
    Deserializer,
    de::{Error, SeqAccess, Visitor},
};

struct Names;

impl<'de> Visitor<'de> for Names {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or a list of strings")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<String, E> {
        Ok(name.to_owned())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut names: A) -> Result<String, A::Error> {
        let mut joined: Vec<String> = Vec::new();
        while let Some(name) = names.next_element::<String>()? {
            joined.push(name);
        }
        if joined.is_empty() {
            return Err(A::Error::invalid_length(0, &self));
        }
        Ok(joined.join(","))
    }
}

/// A name, a list of them joined by commas.
pub(super) fn name<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    from.deserialize_any(Names)
}

/// As [`name`], where the key may be absent or `null`.
pub(super) fn optional<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    struct Optional;

    impl<'de> Visitor<'de> for Optional {
        type Value = Option<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            Names.expecting(f)
        }

        fn visit_none<E: Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
            name(from).map(Some)
        }
    }

    from.deserialize_option(Optional)
}

#[cfg(test)]
mod tests {
    use crate::train::config::TrainConfig;

    #[test]
    fn data_sets_are_a_text_or_a_list() {
        let read = |text: &str| toml::from_str::<TrainConfig>(text).map_err(|e| e.to_string());
        let config = read("train_data = [\"a.jsonl:2\", \"b.parquet\"]\nval_data = [\"v.csv\"]");
        let config = config.unwrap();
        assert_eq!(config.train_data, "a.jsonl:2,b.parquet");
        assert_eq!(config.val_data.as_deref(), Some("v.csv"));
        let again = read(&config.to_toml()).unwrap();
        assert_eq!(again, config);
        let columns = read("[columns]\nimages = \"影像\"").unwrap();
        assert_eq!(columns.data_options().columns.to_string(), "images=影像");
        assert_eq!(read(&columns.to_toml()).unwrap(), columns);
        let json = serde_json::to_string(&columns).unwrap();
        assert_eq!(serde_json::from_str::<TrainConfig>(&json).unwrap(), columns);
        assert!(
            read("train_data = 3")
                .unwrap_err()
                .contains("a list of strings")
        );
        assert!(read("train_data = []").is_err());
        let slip = read("[columns]\nimage = \"x\"").unwrap_err();
        assert!(slip.contains("did you mean `images`?"), "{slip}");
    }
}
