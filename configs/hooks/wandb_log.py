#!/usr/bin/env python3
"""Reports a run to Weights & Biases: reads JSON lines, as `report_command` gives them.

    report_to = ["tensorboard", "command"]
    report_command = ["python3", "configs/hooks/wandb_log.py"]

Needs `pip install wandb` (written for 0.31) and `wandb login`, or WANDB_MODE=offline: the run is then in
OUTPUT_DIR/wandb/offline-run-..., and `wandb sync` sends it later. WANDB_PROJECT, WANDB_NAME and the other variables of
wandb count as usual. A run that is continued goes on under the same id.
"""

import json
import os
import sys
import uuid

import wandb


def run_id(folder):
    """The id of the run, kept in its folder."""
    path = os.path.join(folder, "wandb_id.txt")
    if not os.path.exists(path):
        with open(path, "w", encoding="utf-8") as file:
            file.write(uuid.uuid4().hex)
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def values(row):
    """The numbers of a row by their names on the page: train/loss, eval/loss ..."""
    numbers = {}
    for key, value in row.items():
        if key in ("event", "step") or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        name = "eval/" + key[len("eval_"):] if key.startswith("eval_") else "train/" + key
        numbers[name] = value
    return numbers


def main():
    run, ending = None, None
    for line in sys.stdin:
        message = json.loads(line)
        event = message["event"]
        if event == "start":
            folder = message["output_dir"]
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "xray-qwen3vl"),
                name=os.environ.get("WANDB_NAME", message["name"]),
                dir=os.environ.get("WANDB_DIR", folder),
                id=os.environ.get("WANDB_RUN_ID", run_id(folder)),
                resume="allow",
                config={**message["config"], "program": message["program"]},
            )
            # A continued run repeats the steps after its checkpoint: the step is a value of its own, so none is lost.
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
        elif event == "metrics":
            numbers = values(message)
            if numbers:
                run.log({**numbers, "step": message["step"]})
        elif event == "end":
            ending = message["ending"]
            run.summary["ending"] = ending
            if message["error"]:
                run.summary["error"] = message["error"]
    if run is not None:
        # Without a last line, the training process was killed.
        run.finish(exit_code=0 if ending in ("done", "early_stop", "interrupted") else 1)


if __name__ == "__main__":
    main()
