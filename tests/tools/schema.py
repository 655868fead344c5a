"""Checks configs/schema.json with a validator that is not ours: all configs pass, wrong ones do not.

Python 3.11 or newer, jsonschema 4.26.
"""

import json
import pathlib
import tomllib

import jsonschema

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
WRONG = [
    {"learnin_rate": 1e-4},
    {"learning_rate": 0},
    {"learning_rate": "1e-4"},
    {"lora_rank": 0},
    {"lora_rank": 1.5},
    {"lora_dropout": 1.0},
    {"device": "cpu"},
    {"dtype": "int8"},
    {"tuner": "qlora"},
    {"metric_for_best_model": "loss"},
    {"overlong": "truncate"},
    {"report_to": ["wandb"]},
    {"target_modules": 3},
]
RIGHT = [
    {},
    {"target_modules": ["q_proj"]},
    {"target_modules": "all-linear"},
    {"num_train_epochs": 3},
    {"report_to": []},
    {"memory_budget": 24},
]

schema = json.loads((CONFIGS / "schema.json").read_text(encoding="utf-8"))
jsonschema.Draft7Validator.check_schema(schema)
validator = jsonschema.Draft7Validator(schema)
files = sorted(CONFIGS.glob("*.toml"))
assert len(files) >= 6, files
for file in files:
    validator.validate(tomllib.loads(file.read_text(encoding="utf-8")))
for config in RIGHT:
    validator.validate(config)
for config in WRONG:
    assert not validator.is_valid(config), config
for key, value in schema["properties"].items():
    assert value.get("description"), key
print(len(files), "configs are valid")
