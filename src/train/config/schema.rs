//! The JSON schema of a config file, for editors and other programs: keys, types, limits, defaults, descriptions.

use schemars::{Schema, SchemaGenerator, generate::SchemaSettings, json_schema};
use serde_json::{Value, json};

use super::{BEST_METRICS, TrainConfig};

/// What the types do not say: key, keyword of JSON schema, limit. [`TrainConfig::validate`] holds the same limits.
const LIMITS: &[(&str, &str, f64)] = &[
    ("split_dataset_ratio", "minimum", 0.0),
    ("split_dataset_ratio", "exclusiveMaximum", 1.0),
    ("lora_rank", "minimum", 1.0),
    ("lora_dropout", "minimum", 0.0),
    ("lora_dropout", "exclusiveMaximum", 1.0),
    ("num_train_epochs", "exclusiveMinimum", 0.0),
    ("per_device_train_batch_size", "minimum", 1.0),
    ("gradient_accumulation_steps", "minimum", 1.0),
    ("max_length", "minimum", 2.0),
    ("learning_rate", "exclusiveMinimum", 0.0),
    ("warmup_ratio", "minimum", 0.0),
    ("warmup_ratio", "maximum", 1.0),
    ("weight_decay", "minimum", 0.0),
    ("adam_beta1", "minimum", 0.0),
    ("adam_beta1", "exclusiveMaximum", 1.0),
    ("adam_beta2", "minimum", 0.0),
    ("adam_beta2", "exclusiveMaximum", 1.0),
    ("max_grad_norm", "minimum", 0.0),
    ("memory_budget", "exclusiveMinimum", 0.0),
    ("per_device_eval_batch_size", "minimum", 1.0),
    ("save_total_limit", "minimum", 1.0),
    ("ddp_timeout", "exclusiveMinimum", 0.0),
];

/// The schema, in draft 7: the newest that editors' TOML extensions read.
pub fn config_schema() -> Value {
    let generator = SchemaSettings::draft07().into_generator();
    let mut schema = generator.into_root_schema_for::<TrainConfig>().to_value();
    unwrap_lines(&mut schema);
    schema["title"] = "A training run of xray-qwen3vl".into();
    let properties = &mut schema["properties"];
    for (key, keyword, limit) in LIMITS {
        // A whole number stays one in the file.
        properties[*key][*keyword] = match limit.fract() == 0.0 {
            true => json!(*limit as i64),
            false => json!(limit),
        };
    }
    let metrics: Vec<&str> = BEST_METRICS.iter().map(|(name, _)| *name).collect();
    properties["metric_for_best_model"]["enum"] = json!(metrics);
    properties["quantize"]["pattern"] = "^(int8|int4(:[0-9]+)?)$".into();
    properties["dtype"]["enum"] = json!(["bf16", "f16", "f32", null]);
    schema
}

/// One data set or several: a name, or a list of names.
pub(super) fn data_sets(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "anyOf": [
            { "type": "string" },
            { "type": "array", "items": { "type": "string" } },
        ],
    })
}

/// Joins the lines of each paragraph of a description: a doc comment's line ends say nothing.
fn unwrap_lines(schema: &mut Value) {
    match schema {
        Value::Object(members) => {
            for (name, member) in members {
                match member {
                    Value::String(text) if name == "description" => {
                        let paragraphs = text.split("\n\n").map(|text| text.replace('\n', " "));
                        *text = paragraphs.collect::<Vec<_>>().join("\n\n");
                    }
                    other => unwrap_lines(other),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(unwrap_lines),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    fn repository(path: &str) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    #[test]
    fn the_file_in_configs_is_up_to_date() {
        let file: Value = serde_json::from_str(&repository("configs/schema.json")).unwrap();
        assert!(
            file == config_schema(),
            "run: cargo run --release -- config schema > configs/schema.json"
        );
    }

    /// A limit of the schema is one of the program: a value just outside is refused by name, one inside is not.
    #[test]
    fn the_limits_are_those_of_validate() {
        let with = |key: &str, value: f64| -> Result<(), String> {
            let mut table = toml::Table::try_from(TrainConfig::default()).unwrap();
            let value = match table.get(key) {
                Some(toml::Value::Integer(_)) => toml::Value::Integer(value as i64),
                _ => value.into(),
            };
            table.insert(key.into(), value);
            let config: TrainConfig = table
                .try_into()
                .map_err(|error| format!("{key}: {error}"))?;
            config.validate().map_err(|error| error.to_string())
        };
        for (key, keyword, limit) in LIMITS {
            let (outside, inside) = match *keyword {
                "minimum" => (limit - 1.0, *limit),
                "maximum" => (limit + 0.1, *limit),
                "exclusiveMinimum" => (*limit, limit + 0.5),
                "exclusiveMaximum" => (*limit, limit - 0.5),
                other => panic!("`{other}` is not known to this test"),
            };
            let error = with(key, outside).unwrap_err();
            assert!(error.contains(key), "{key} {keyword}: {error}");
            assert_eq!(with(key, inside), Ok(()), "{key} {keyword}");
        }
    }

    #[test]
    fn every_key_is_described() {
        let schema = config_schema();
        let properties = schema["properties"].as_object().unwrap();
        let keys = TrainConfig::keys();
        assert_eq!(keys.len(), properties.len());
        for key in &keys {
            let description = properties[key]["description"].as_str();
            assert!(
                description.is_some_and(|text| text.len() > 10 && !text.contains("[`")),
                "{key}: {description:?}"
            );
        }
    }

    #[test]
    fn every_config_names_the_schema_for_editors() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|ending| ending == "toml") {
                let text = fs::read_to_string(&path).unwrap();
                let first = text.lines().next();
                assert_eq!(first, Some("#:schema ./schema.json"), "{}", path.display());
            }
        }
    }
}
