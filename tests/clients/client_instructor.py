"""The `instructor` package, in each of its modes."""

import importlib.metadata

import instructor
import openai
import pydantic

from calls import KEY, MODEL, Calls, Server, film_question

calls = Calls(f"instructor {importlib.metadata.version('instructor')}")


class Finding(pydantic.BaseModel):
    side: str = pydantic.Field(max_length=10)
    normal: bool


with Server() as server:
    client = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)

    def ask(mode, **more):
        wrapped = instructor.from_openai(client, mode=mode)
        settings = {"model": MODEL, "messages": film_question(), "max_tokens": 300, "max_retries": 0}
        return wrapped.chat.completions.create(response_model=Finding, **{**settings, **more})

    def mode(chosen):
        def call():
            assert isinstance(ask(chosen), Finding)

        return call

    def partial():
        wrapped = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
        settings = {"model": MODEL, "messages": film_question(), "max_tokens": 300}
        found = list(wrapped.chat.completions.create_partial(response_model=Finding, **settings))
        assert found[-1].normal is not None

    for name, chosen in [
        ("TOOLS (the default)", instructor.Mode.TOOLS),
        ("TOOLS_STRICT", instructor.Mode.TOOLS_STRICT),
        ("FUNCTIONS", instructor.Mode.FUNCTIONS),
        ("JSON_SCHEMA", instructor.Mode.JSON_SCHEMA),
    ]:
        calls.passes(f"mode {name}", mode(chosen))
    calls.passes("create_partial", partial)
    calls.refused("an unknown model", lambda: ask(instructor.Mode.TOOLS, model="gpt-4o"), "does not exist")
calls.end()
