"""Trains with the programs of configs/hooks in offline mode and reads back what wandb and SwanLab have kept.

Usage: python hooks.py PROGRAM. wandb 0.31.0, swanlab 0.10.3 (whose readers of both log formats are used).
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from swanlab.converter.wb.wbdatastore import WBDataStoreReader
from swanlab.proto.swanlab.record.v1.record_pb2 import Record
from swanlab.sdk.internal.core_python.store import DataStoreReader
from wandb.proto import wandb_internal_pb2

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = pathlib.Path(sys.argv[1]).resolve()


def train(folder, hook):
    """Six steps with two validations; the rows of metrics.jsonl."""
    script = str(REPOSITORY / "configs/hooks" / hook)
    settings = {
        "train_data": "phantom:11:0..12:house",
        "val_data": "phantom:12:0..4:house",
        "output_dir": str(folder / "run"),
        "max_steps": 6,
        "eval_steps": 3,
        "gradient_accumulation_steps": 2,
        "report_to": ["command"],
        "report_command": [sys.executable, script],
    }
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    environment = {**os.environ, "WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "HOME": str(folder)}
    subprocess.run(
        [PROGRAM, "train", "--no-tui", "--show", "0", "--device", "cpu", *sets],
        check=True, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    result = json.loads((folder / "run/result.json").read_text())
    assert result["report_command"]["failure"] is None, result
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def wandb_history(folder):
    """Rows of the offline run, its config and exit code."""
    (path,) = folder.glob("run/wandb/offline-run-*/*.wandb")
    rows, config, code = [], {}, None
    with WBDataStoreReader() as reader:
        reader.open(path)
        while (data := reader.scan()) is not None:
            record = wandb_internal_pb2.Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json)
                             for item in record.history.item})
            elif kind == "run":
                config.update((item.key, json.loads(item.value_json)) for item in record.run.config.update)
            elif kind == "exit":
                code = record.exit.exit_code
    return rows, config, code


def swanlab_history(folder):
    """(step, value) of each name, and whether the run is finished."""
    (path,) = folder.glob("run/swanlog/run-*/*.swanlab")
    values, is_finished = {}, False
    reader = DataStoreReader()
    reader.open(path)
    while (data := reader.scan()) is not None:
        record = Record.FromString(data)
        if record.HasField("scalar"):
            scalar = record.scalar
            values.setdefault(scalar.key, []).append((scalar.step, scalar.value.number))
        is_finished = is_finished or record.HasField("finish")
    reader.close()
    return values, is_finished


with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    measured = train(folder, "wandb_log.py")
    rows, config, code = wandb_history(folder)
    assert code == 0 and config["max_steps"] == 6, (code, config)
    for prefix, key in (("train", "loss"), ("eval", "eval_loss")):
        expected = [(row["step"], row[key]) for row in measured if key in row]
        found = [(row["step"], row[f"{prefix}/loss"]) for row in rows if f"{prefix}/loss" in row]
        assert found == expected and len(found) >= 2, (prefix, found, expected)

with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    measured = train(folder, "swanlab_log.py")
    values, is_finished = swanlab_history(folder)
    assert is_finished
    for prefix, key in (("train", "loss"), ("eval", "eval_loss")):
        expected = [(row["step"], row[key]) for row in measured if key in row]
        found = values[f"{prefix}/loss"]
        assert found == expected and len(found) >= 2, (prefix, found, expected)

print("wandb and SwanLab have what metrics.jsonl has")
