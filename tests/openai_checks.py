"""What a user of an OpenAI-compatible engine relies on, asked of a real one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

# (path, body or None) -> the JSON that is answered; a text where it is none.
Ask = Callable[[str, Mapping[str, Any] | None], Any]

# As the gate asks it: this small a model wanders off in another tongue without the last words.
QUESTION = "What is the capital of France? Answer with its name."
BOOKING = {
    "type": "object",
    "properties": {"room": {"enum": ["cedar-7", "maple-9"]}, "nights": {"type": "integer", "minimum": 1}},
    "required": ["room", "nights"],
    "additionalProperties": False,
}


def chat(ask: Ask, model: str, content: str = QUESTION, **more: Any) -> dict[str, Any]:
    """Return the first choice of a chat completion without chance in it."""
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, **more}
    answer = ask("/v1/chat/completions", body)
    assert "choices" in answer, answer
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def check_completion(ask: Ask, model: str) -> None:
    """The right answer to a question that this small a model can answer."""
    assert "Paris" in chat(ask, model, max_tokens=16)["message"]["content"]


def check_tool_call(ask: Ask, model: str) -> None:
    """A function named in tool_choice comes back as a call; ``strict`` holds the arguments to their schema."""
    tool = {"type": "function", "function": {"name": "book_room", "parameters": BOOKING, "strict": True}}
    choice = chat(
        ask,
        model,
        "Book the room maple-9 for 2 nights.",
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "book_room"}},
        max_tokens=64,
    )
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "book_room"
    check_booking(call["function"]["arguments"])
    assert not choice["message"].get("content")


def check_json_schema(ask: Ask, model: str) -> None:
    """An answer in a schema whose names only the schema tells."""
    form = {"type": "json_schema", "json_schema": {"name": "booking", "schema": BOOKING, "strict": True}}
    choice = chat(
        ask, model, "Book the room for 2 nights. Answer in JSON.", response_format=form, max_tokens=64
    )
    assert choice["finish_reason"] == "stop"
    check_booking(choice["message"]["content"])


def check_booking(text: str) -> None:
    """The text is JSON of BOOKING."""
    found = json.loads(text)
    assert set(found) == {"room", "nights"}
    assert found["room"] in ("cedar-7", "maple-9")
    assert isinstance(found["nights"], int)


def prefix_cache_hits(metrics: str) -> float:
    """Return the tokens that vLLM took from its prefix cache, summed over the models' lines."""
    hits = re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert hits, metrics[:2000]
    return sum(float(value) for value in hits)


def check_prefix_cache(ask: Ask, model: str) -> None:
    """The same long beginning is computed once: the second question's hits are nearly all of it."""
    beginning = " ".join(f"Item {number} of the list is number {number * 7}." for number in range(60))
    chat(ask, model, f"{beginning} What is item 3?", max_tokens=1)
    before = prefix_cache_hits(ask("/metrics", None))
    usage = ask(
        "/v1/chat/completions",
        {
            "model": model,
            "messages": [{"role": "user", "content": f"{beginning} What is item 5?"}],
            "max_tokens": 1,
        },
    )["usage"]
    hits = prefix_cache_hits(ask("/metrics", None)) - before
    assert hits > usage["prompt_tokens"] / 2


def check_adapters(ask: Ask, model: str, names: tuple[str, ...], *, max_tokens: int = 3) -> None:
    """Each adapter is a model of its own name; the model itself answers as it did before they were asked."""
    listed = {item["id"] for item in ask("/v1/models", None)["data"]}
    assert {model, *names} <= listed
    plain = chat(ask, model, max_tokens=max_tokens)["message"]["content"]
    answers = [chat(ask, name, max_tokens=max_tokens)["message"]["content"] for name in names]
    assert len({plain, *answers}) == 1 + len(names)
    assert chat(ask, names[0], max_tokens=max_tokens)["message"]["content"] == answers[0]
    assert chat(ask, model, max_tokens=max_tokens)["message"]["content"] == plain
