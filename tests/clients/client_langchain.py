"""The `langchain-openai` package."""

import importlib.metadata

import pydantic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

from calls import FILM, KEY, MODEL, QUESTION, Calls, Server

calls = Calls(f"langchain-openai {importlib.metadata.version('langchain-openai')}")


class Finding(pydantic.BaseModel):
    """What is seen."""

    side: str = pydantic.Field(max_length=10)
    normal: bool


@tool
def report(normal: bool) -> str:
    """Writes down whether the film is normal."""
    return "done"


with Server() as server:
    where = {"model": MODEL, "base_url": server.url, "api_key": KEY, "max_retries": 0}
    chat = ChatOpenAI(**where, max_tokens=300)
    parts = [{"type": "image_url", "image_url": {"url": FILM}}, {"type": "text", "text": QUESTION}]
    question = [HumanMessage(content=parts)]

    def structured(method):
        def call():
            found = chat.with_structured_output(Finding, method=method).invoke(question)
            assert isinstance(found, Finding)

        return call

    def tools():
        bound = chat.bind_tools([report], tool_choice="report", parallel_tool_calls=False)
        answer = bound.invoke(question)
        call = answer.tool_calls[0]
        assert call["name"] == "report" and isinstance(call["args"]["normal"], bool)
        result = ToolMessage(report.invoke(call["args"]), tool_call_id=call["id"])
        chat.bind_tools([report]).invoke([*question, answer, result], max_tokens=5)

    def tools_stream():
        whole = None
        bound = chat.bind_tools([report], tool_choice="any", parallel_tool_calls=False)
        for chunk in bound.stream(question):
            whole = chunk if whole is None else whole + chunk
        assert whole.tool_calls[0]["name"] == "report"

    def stream():
        assert "".join(chunk.text for chunk in chat.stream(question)) == chat.invoke(question).text

    def responses():
        over = ChatOpenAI(**where, use_responses_api=True, max_tokens=20)
        assert over.invoke(question).text

    def logprobs():
        answer = chat.bind(logprobs=True, top_logprobs=2).invoke(question)
        assert answer.response_metadata["logprobs"]["content"]

    for name, call in [
        ("invoke with a film", lambda: chat.invoke(question).text or 1 / 0),
        ("stream", stream),
        ("batch", lambda: chat.batch([question, question])),
        ("logprobs", logprobs),
        ("with_structured_output json_schema", structured("json_schema")),
        ("with_structured_output function_calling", structured("function_calling")),
        ("bind_tools: named, result sent back", tools),
        ("bind_tools: any, stream", tools_stream),
        ("OpenAI (completions)", lambda: OpenAI(**where, max_tokens=4).invoke("心影") or 1 / 0),
        ("ChatOpenAI(use_responses_api)", responses),
    ]:
        calls.passes(name, call)
    calls.refused(
        "reasoning_effort",
        lambda: ChatOpenAI(**where, reasoning_effort="low").invoke("？"),
        "cannot be set",
    )
calls.end()
