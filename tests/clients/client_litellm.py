"""The `litellm` package."""

import importlib.metadata
import json
import os
import typing

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
import pydantic

from calls import KEY, MODEL, REPORT_TOOL, Calls, Server, film_question

calls = Calls(f"litellm {importlib.metadata.version('litellm')}")
litellm.suppress_debug_info = True


class Finding(pydantic.BaseModel):
    side: typing.Literal["left", "right"]
    normal: bool


with Server() as server:
    where = {"model": f"openai/{MODEL}", "api_base": server.url, "api_key": KEY, "num_retries": 0}

    def ask(**more):
        return litellm.completion(**{**where, "messages": film_question(), "max_tokens": 60, **more})

    def stream():
        text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True))
        assert text == ask().choices[0].message.content

    def schema():
        found = ask(response_format=Finding, max_tokens=300).choices[0].message.content
        Finding.model_validate_json(found)

    def tool(**more):
        choice = {"type": "function", "function": {"name": "report"}}
        found = ask(tools=[REPORT_TOOL], tool_choice=choice, max_tokens=200, **more)
        return found

    def tool_whole():
        call = tool().choices[0].message.tool_calls[0]
        assert set(json.loads(call.function.arguments)) == {"side", "normal"}

    def tool_stream():
        chunks = list(tool(stream=True, parallel_tool_calls=False))
        whole = litellm.stream_chunk_builder(chunks)
        call = whole.choices[0].message.tool_calls[0]
        assert set(json.loads(call.function.arguments)) == {"side", "normal"}

    def text():
        text_where = {**where, "model": f"text-completion-openai/{MODEL}"}
        assert litellm.text_completion(**text_where, prompt="心影", max_tokens=4).choices[0].text

    def response():
        found = litellm.responses(**where, input="？", max_output_tokens=20)
        assert found.output[0].content[0].text

    def image_detail():
        messages = film_question()
        messages[0]["content"][0]["image_url"]["detail"] = "low"
        assert ask(messages=messages).choices

    for name, call in [
        ("completion with a film", lambda: ask().choices[0].message.content or 1 / 0),
        ("completion, stream", stream),
        ("completion, detail low", image_detail),
        ("completion, response_format of pydantic", schema),
        ("tools: named", tool_whole),
        ("tools: named, stream", tool_stream),
        ("text_completion", text),
        ("responses", response),
    ]:
        calls.passes(name, call)
    for name, call, says in [
        ("an unknown model", lambda: ask(model="openai/gpt-4o"), "NotFoundError"),
        ("reasoning_effort", lambda: ask(extra_body={"reasoning_effort": "low"}), "cannot be set"),
    ]:
        calls.refused(name, call, says)
calls.end()
