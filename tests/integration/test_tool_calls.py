"""Tool calls and JSON output through the real llama-server with the catalog's templates.

What the server promises with ``tool_choice: required`` is a grammar that cannot end before a valid call; text may
come before it, which a model as small as the lab's takes as an invitation to talk. So the tests begin the call, as
a model that was trained on calls does by itself, or show earlier calls of the same conversation. A function named
in ``tool_choice`` (an object) is read as ``auto`` by this llama.cpp: clients send it alone, with ``required``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_catalog

from fleetfit.lab.engine import ensure_engine
from fleetfit.lab.model import MODEL

from .test_argv_real_server import Server, lab_entry, make_plan, serve

CATALOG = load_catalog()
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
# A value that no free text would have by chance.
BOOKING = {
    "type": "object",
    "properties": {"room": {"enum": ["cedar-7", "maple-9"]}, "nights": {"type": "integer"}},
    "required": ["room", "nights"],
}
QUESTION = {"role": "user", "content": "Weather in Paris for 3 days?"}


def tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return a tool as clients describe it."""
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def earlier_calls() -> list[dict[str, Any]]:
    """Return a conversation in which the assistant has called a function three times."""
    turns: list[dict[str, Any]] = []
    for number, (city, days) in enumerate([("Rome", 2), ("Oslo", 4), ("Lima", 5)]):
        arguments = json.dumps({"city": city, "days": days})
        call = {
            "id": f"call{number}",
            "type": "function",
            "function": {"name": "get_weather", "arguments": arguments},
        }
        turns.append({"role": "user", "content": f"Weather in {city} for {days} days?"})
        turns.append({"role": "assistant", "content": None, "tool_calls": [call]})
    return turns


@pytest.fixture(scope="module", params=[MODEL, "qwen2.5-0.5b-instruct"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The lab's model, served with the template of each family of the catalog."""
    template = CATALOG.entry(request.param).chat_template
    assert template
    deployment = make_plan(lab_entry(), [], fleetfit_min_context_tokens=2048, fleetfit_slots=1)
    binary = ensure_engine().bin_dir / "llama-server"
    with serve(binary, deployment["settings"], tmp_path_factory.mktemp("server"), template) as running:
        yield running


def ask(server: Server, **body: Any) -> dict[str, Any]:
    """Return the first choice of a completion without chance in it."""
    question = {"model": MODEL, "max_tokens": 64, "temperature": 0, **body}
    choice: dict[str, Any] = server.ask("/v1/chat/completions", question)["choices"][0]
    return choice


def call_of(choice: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of an answer's first call."""
    message = choice["message"]
    assert message.get("tool_calls"), choice
    function = message["tool_calls"][0]["function"]
    assert "<tool_call>" not in (message["content"] or "")
    return function["name"], json.loads(function["arguments"])


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_model_that_calls_is_understood(server: Server, choice: str) -> None:
    answer = ask(
        server,
        messages=[*earlier_calls(), QUESTION],
        tools=[tool("get_weather", WEATHER)],
        tool_choice=choice,
    )
    name, arguments = call_of(answer)
    assert name == "get_weather"
    assert isinstance(arguments["city"], str)
    assert isinstance(arguments["days"], int)


def test_a_required_call_follows_the_functions_schema(server: Server) -> None:
    """Whatever the model would say: once the call has begun, name and arguments are the tool's own."""
    begun = {"role": "assistant", "content": "<tool_call>\n"}
    answer = ask(
        server,
        messages=[{"role": "user", "content": "Tell me a story about a dog."}, begun],
        tools=[tool("book_room", BOOKING)],
        tool_choice="required",
    )
    name, arguments = call_of(answer)
    assert name == "book_room"
    assert arguments["room"] in ("cedar-7", "maple-9")
    assert isinstance(arguments["nights"], int)


def test_a_required_call_cannot_be_left_out(server: Server) -> None:
    """An answer that is complete has the call; an answer without it has run into its limit."""
    messages = [{"role": "user", "content": "Say: yes"}]
    tools = [tool("book_room", BOOKING)]
    free = ask(server, messages=messages, tools=tools, tool_choice="none", max_tokens=48)
    assert not free["message"].get("tool_calls")
    required = ask(server, messages=messages, tools=tools, tool_choice="required", max_tokens=48)
    assert required["message"].get("tool_calls") or required["finish_reason"] == "length", required


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"name": "booking", "strict": True, "schema": BOOKING}},
        {"type": "json_object", "schema": BOOKING},
    ],
    ids=["json_schema", "json_object"],
)
def test_json_output_follows_its_schema(server: Server, response_format: dict[str, Any]) -> None:
    answer = ask(server, messages=[QUESTION], response_format=response_format)
    found = json.loads(answer["message"]["content"])
    assert set(found) == {"room", "nights"}
    assert found["room"] in ("cedar-7", "maple-9")
    assert isinstance(found["nights"], int)
    assert answer["finish_reason"] == "stop"
