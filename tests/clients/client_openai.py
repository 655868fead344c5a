"""The `openai` package: chat, completions, responses, tools."""

import json
import typing

import openai
import pydantic

from calls import FILM, KEY, MODEL, QUESTION, REPORT_TOOL, Calls, Server, film_question

calls = Calls(f"openai (Python) {openai.__version__}")


class Finding(pydantic.BaseModel):
    side: typing.Literal["left", "right"]
    normal: bool


with Server() as server:
    client = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)

    def ask(**more):
        settings = {"model": MODEL, "messages": film_question(), "max_tokens": 60, **more}
        return client.chat.completions.create(**settings)

    def chat():
        answer = ask()
        assert answer.choices[0].message.content
        assert answer._request_id and answer.id.endswith(answer._request_id)

    def stream():
        text = "".join(c.choices[0].delta.content or "" for c in ask(stream=True) if c.choices)
        assert text == ask().choices[0].message.content

    def tool():
        choice = {"type": "function", "function": {"name": "report"}}
        message = ask(tools=[REPORT_TOOL], tool_choice=choice, max_tokens=200).choices[0].message
        arguments = json.loads(message.tool_calls[0].function.arguments)
        assert set(arguments) == {"side", "normal"}
        history = film_question() + [message.model_dump(exclude_none=True)]
        results = [{"role": "tool", "tool_call_id": c.id, "content": "done"} for c in message.tool_calls]
        assert ask(messages=history + results, tools=[REPORT_TOOL], max_tokens=5).choices

    def tool_stream():
        name, arguments = None, ""
        settings = {"tools": [REPORT_TOOL], "tool_choice": "required", "parallel_tool_calls": False}
        for chunk in ask(stream=True, max_tokens=200, **settings):
            for call in chunk.choices[0].delta.tool_calls or []:
                name = name or call.function.name
                arguments += call.function.arguments or ""
        assert name == "report" and set(json.loads(arguments)) == {"side", "normal"}

    def parse():
        settings = {"model": MODEL, "messages": film_question(), "response_format": Finding}
        found = client.chat.completions.parse(max_tokens=300, **settings)
        assert isinstance(found.choices[0].message.parsed, Finding)

    def completion():
        found = client.completions.create(model=MODEL, prompt=["心影", "肺"], logprobs=1, echo=True, max_tokens=4)
        assert [choice.text[0] for choice in found.choices] == ["心", "肺"]
        assert found.choices[0].logprobs.token_logprobs[0] is None

    def completion_stream():
        chunks = client.completions.create(model=MODEL, prompt="心影", max_tokens=4, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks)

    def respond(**more):
        content = [{"type": "input_image", "image_url": FILM}, {"type": "input_text", "text": QUESTION}]
        settings = {"model": MODEL, "input": [{"role": "user", "content": content}], "max_output_tokens": 300}
        return client.responses.create(**{**settings, **more})

    def response():
        found = respond(instructions="Be short.")
        assert found.output_text and found.status in ("completed", "incomplete")
        assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens

    def response_stream():
        with client.responses.stream(model=MODEL, input="？", max_output_tokens=20) as events:
            text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
            assert events.get_final_response().output_text == text

    def response_parse():
        found = client.responses.parse(model=MODEL, input="？", text_format=Finding, max_output_tokens=300)
        assert isinstance(found.output_parsed, Finding)

    def response_tool():
        flat = {"type": "function", "strict": True, **REPORT_TOOL["function"]}
        found = respond(tools=[flat], tool_choice={"type": "function", "name": "report"})
        call = found.output[0]
        assert call.type == "function_call" and set(json.loads(call.arguments)) == {"side", "normal"}
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
        back = [{"role": "user", "content": "？"}, call.model_dump(exclude_none=True), result]
        assert respond(input=back, tools=[flat], max_output_tokens=5).output

    for name, call in [
        ("models.list, models.retrieve", lambda: client.models.retrieve(client.models.list().data[0].id)),
        ("chat with a film", chat),
        ("chat, stream", stream),
        ("chat.completions.parse", parse),
        ("tools: named, result sent back", tool),
        ("tools: required, stream", tool_stream),
        ("chat, extra_body guided_choice", lambda: ask(extra_body={"guided_choice": ["正常", "异常"]})),
        ("completions: echo, logprobs, two prompts", completion),
        ("completions, stream", completion_stream),
        ("responses with a film, instructions", response),
        ("responses.stream", response_stream),
        ("responses.parse", response_parse),
        ("responses: function, result sent back", response_tool),
    ]:
        calls.passes(name, call)
    stranger = openai.OpenAI(base_url=server.url, api_key="another-key", max_retries=0)
    for name, call, says in [
        ("a wrong key", stranger.models.list, "AuthenticationError"),
        ("an unknown model", lambda: ask(model="gpt-4o"), "NotFoundError"),
        ("responses: store", lambda: respond(store=True), "nothing is stored"),
        ("responses: previous_response_id", lambda: respond(previous_response_id="resp_1"), "nothing is stored"),
        ("responses: web_search", lambda: respond(tools=[{"type": "web_search"}]), "expected `function`"),
        ("completions: suffix", lambda: client.completions.create(model=MODEL, prompt="a", suffix="b"), "fills no gap"),
        ("embeddings", lambda: client.embeddings.create(model=MODEL, input="a"), "there is nothing at this path"),
        ("chat: functions", lambda: ask(functions=[{"name": "f"}]), "send `tools`"),
        ("chat: audio", lambda: ask(modalities=["audio"]), "modalities"),
    ]:
        calls.refused(name, call, says)
calls.end()
