"""A server and a table of calls, for the scripts beside this file: one script a client package.

XRAY_SERVER names a program other than target/release/xray-qwen3vl.
"""

import base64
import os
import pathlib
import re
import subprocess
import sys
import threading

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("XRAY_SERVER", str(ROOT / "target/release/xray-qwen3vl"))
KEY = "a-key-for-tests"
MODEL = "tiny"
FILM = "data:image/png;base64," + base64.b64encode((ROOT / "data/sample/demo.png").read_bytes()).decode()
FILM_PATH = str(ROOT / "data/sample/demo.png")
QUESTION = "这张胸片有什么异常？"


class Server:
    """The program on the tiny model, at `url`."""

    def __enter__(self):
        command = [PROGRAM, "serve", "--device", "cpu", "--port", "0", "--api-key", KEY]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            found = re.search(r"the API at (http://\S+/v1)", line)
            if found:
                break
        else:
            raise RuntimeError("the server did not start")
        self.url = found.group(1)
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)


class Calls:
    """What was called and how it ended; anything unexpected makes the script fail."""

    def __init__(self, client):
        self.client = client
        self.rows = []
        self.failed = 0

    def passes(self, name, call):
        """`call` has to return; what it returns is checked by `call` itself."""
        try:
            call()
        except Exception as error:  # the table says which one
            self.failed += 1
            self.rows.append((name, "FAILED", f"{type(error).__name__}: {error}"))
        else:
            self.rows.append((name, "passed", ""))

    def refused(self, name, call, says):
        """`call` has to raise an error whose text contains `says`."""
        try:
            call()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if says in text:
                found = re.search(r"'message': ['\"](.*?)['\"], '", text)
                self.rows.append((name, "refused", found.group(1) if found else text))
                return
            self.failed += 1
            self.rows.append((name, "FAILED", f"expected `{says}`: {text}"))
        else:
            self.failed += 1
            self.rows.append((name, "FAILED", "was not refused"))

    def end(self):
        print(f"| {self.client} | result | |\n|---|---|---|")
        for name, result, why in self.rows:
            why = " ".join(why.split())[:200].replace("|", "\\|")
            print(f"| {name} | {result} | {why} |")
        sys.exit(1 if self.failed else 0)


def film_question(text=QUESTION):
    film = {"type": "image_url", "image_url": {"url": FILM}}
    return [{"role": "user", "content": [film, {"type": "text", "text": text}]}]


REPORT_TOOL = {
    "type": "function",
    "function": {
        "name": "report",
        "description": "Writes down what is seen.",
        "parameters": {
            "type": "object",
            "properties": {
                "side": {"type": "string", "enum": ["left", "right"]},
                "normal": {"type": "boolean"},
            },
            "required": ["side", "normal"],
            "additionalProperties": False,
        },
    },
}
