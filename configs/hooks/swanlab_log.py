#!/usr/bin/env python3
"""Reports a run to SwanLab: reads JSON lines, as `report_command` gives them.

    report_to = ["tensorboard", "command"]
    report_command = ["python3", "configs/hooks/swanlab_log.py"]

Needs `pip install swanlab` (written for 0.10) and `swanlab login`, or SWANLAB_MODE=offline: the run is then in
OUTPUT_DIR/swanlog/run-..., and `swanlab sync` sends it later. SWANLAB_PROJECT (here also SWANLAB_EXP_NAME), SWANLAB_MODE
and the other variables of SwanLab count as usual. A run that is continued goes on under the same id where it was sent
to the cloud.
"""

import json
import os
import sys
import uuid

import swanlab


def run_id(folder):
    """The id of the run, kept in its folder."""
    path = os.path.join(folder, "swanlab_id.txt")
    if not os.path.exists(path):
        with open(path, "w", encoding="utf-8") as file:
            file.write(uuid.uuid4().hex[:21])
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
    run, ending, error = None, None, None
    for line in sys.stdin:
        message = json.loads(line)
        event = message["event"]
        if event == "start":
            folder = message["output_dir"]
            mode = os.environ.get("SWANLAB_MODE")
            # Only the cloud knows earlier runs.
            resume = {"id": run_id(folder), "resume": "allow"} if mode in (None, "online", "cloud") else {}
            run = swanlab.init(
                project=os.environ.get("SWANLAB_PROJECT", "xray-qwen3vl"),
                name=os.environ.get("SWANLAB_EXP_NAME", message["name"]),
                log_dir=os.environ.get("SWANLAB_LOG_DIR", os.path.join(folder, "swanlog")),
                mode=mode,
                config={**message["config"], "program": message["program"]},
                **resume,
            )
        elif event == "metrics":
            numbers = values(message)
            if numbers:
                swanlab.log(numbers, step=message["step"])
        elif event == "end":
            ending, error = message["ending"], message["error"]
    if run is not None:
        states = {"done": "success", "early_stop": "success", "interrupted": "aborted"}
        state = states.get(ending, "crashed")
        # Without a last line, the training process was killed.
        swanlab.finish(state=state, error=(error or "ended without a last line") if state == "crashed" else None)


if __name__ == "__main__":
    main()
