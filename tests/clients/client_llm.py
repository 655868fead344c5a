"""The `llm` command line."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from calls import FILM_PATH, KEY, MODEL, Calls, Server

calls = Calls(f"llm {importlib.metadata.version('llm')}")

with Server() as server, tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "extra-openai-models.yaml").write_text(
        f"- model_id: xray\n  model_name: {MODEL}\n  api_base: {server.url}\n  vision: true\n  api_key_name: xray\n"
        "  supports_tools: true\n  supports_schema: true\n  can_stream: true\n"
    )
    pathlib.Path(folder, "keys.json").write_text(json.dumps({"xray": KEY}))
    environment = {**os.environ, "LLM_USER_PATH": folder}

    def llm(*arguments, model="xray"):
        command = [sys.executable, "-m", "llm", "prompt", "-m", model, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, input="")
        if done.returncode:
            raise RuntimeError(done.stderr[-400:])
        return done.stdout

    def says(*arguments):
        def call():
            assert llm(*arguments).strip()

        return call

    code = "def side(name: str) -> str:\n    'Looks at a side.'\n    return 'normal'\n"
    limit = ("-o", "max_tokens", "60")
    for name, call in [
        ("a prompt", says("你好", *limit)),
        ("a prompt, not streamed", says("你好", "--no-stream", *limit)),
        ("an attachment (-a)", says("有什么异常？", "-a", FILM_PATH, *limit)),
        ("a system prompt (-s)", says("你好", "-s", "简短。", *limit)),
        ("a schema (--schema)", says("写", "--schema", "normal bool", "--no-stream")),
        ("tools (--functions)", lambda: llm("你好", "--functions", code, *limit)),
    ]:
        calls.passes(name, call)
    calls.refused("an option out of range (by llm itself)", lambda: llm("你好", "-o", "temperature", "9999"), "temperature")
calls.end()
