"""The long prompt that proves a release's memory: how long it is, and what each way to fail is called."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import gate, proof
from ansible_collections.fleetfit.llm.plugins.module_utils.gate import GateSpec
from ansible_collections.fleetfit.llm.plugins.module_utils.proof import Scale
from hypothesis import given
from hypothesis import strategies as st

READY = {"ok": True, "state": "ready", "message": "m answered in 0.10 s"}


class Engine(http.server.ThreadingHTTPServer):
    """A service that counts words as tokens, its template being seven, and prefills as a test says."""

    context = 2048
    tokens_per_s = 1e6
    cuts_at = 10**9
    # What happens to prompts above half of the context: "", "hang", "refuse", "fail".
    long_prompt = ""
    tells_timings = True
    prompts: list[str]
    most_at_once = 0
    at_once = 0


class Handler(http.server.BaseHTTPRequestHandler):
    server: Engine

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "m", "max_model_len": self.server.context}]})

    def reply(self, status: int, document: Any) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        engine = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        tokens = min(len(text.split()) + 7, engine.cuts_at)
        engine.prompts.append(text)
        if tokens + body["max_tokens"] > engine.context:
            self.reply(400, {"error": "the request exceeds the available context size"})
            return
        if tokens > engine.context // 2:
            if engine.long_prompt == "hang":
                time.sleep(3)
                return
            if engine.long_prompt in ("refuse", "fail"):
                self.reply({"refuse": 400, "fail": 500}[engine.long_prompt], {"error": "no"})
                return
            engine.at_once += 1
            engine.most_at_once = max(engine.most_at_once, engine.at_once)
            time.sleep(0.2)
            engine.at_once -= 1
        usage = {"prompt_tokens": tokens, "completion_tokens": 1}
        events: list[Any] = [{"choices": [{"delta": {"content": "Ten"}}]}, {"choices": [], "usage": usage}]
        if engine.tells_timings:
            events[1]["timings"] = {"prompt_per_second": engine.tokens_per_s}
        self.send_response(200)
        self.end_headers()
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    with Engine(("127.0.0.1", 0), Handler) as server:
        server.prompts = []
        # No unit and no journal stand behind this server.
        monkeypatch.setattr(gate, "CRASH_LOOK_S", 0.0)
        monkeypatch.setattr(gate, "SERVER_ERROR_LOOK_S", 0.0)
        monkeypatch.setattr(gate, "read_log", lambda *arguments: [])
        monkeypatch.setattr(proof, "read_log", lambda *arguments: [])
        monkeypatch.setattr(gate.Gate, "_process_problem", lambda self: None)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def prove(engine: Engine, **other: Any) -> dict[str, Any]:
    """Prove the engine as vLLM with the settings of the engine unless ``other`` has them."""
    options: dict[str, Any] = {
        "kind": "vllm",
        "timeout_s": 1.0,
        "settings": {"max_model_len": engine.context, "max_num_seqs": 1},
        **other,
    }
    url = f"http://127.0.0.1:{engine.server_address[1]}"
    spec = GateSpec(service="absent-in-tests", url=url, model="m", **options)
    return proof.prove(spec, READY, since=None, restarts=0)


def test_the_context_is_filled_to_the_last_line(engine: Engine) -> None:
    result = prove(engine)
    assert result["ok"], result
    found = result["proof"]
    full = engine.context - proof.ANSWER_TOKENS
    assert full - 2 * 10 < found["prompt_tokens"] <= full
    assert (found["of_tokens"], found["shortened"], found["slots"], found["of_slots"]) == (2048, False, 1, 1)
    assert "memory proven: a prompt of 2,0" in result["message"]
    assert result["message"].startswith(READY["message"])


def test_no_two_prompts_begin_alike(engine: Engine) -> None:
    prove(engine, settings={"max_model_len": engine.context, "max_num_seqs": 4})
    assert len({text[:8] for text in engine.prompts}) == len(engine.prompts) == 6


def test_all_slots_are_filled_at_once_where_there_is_time(engine: Engine) -> None:
    result = prove(engine, kind="llama_cpp", settings={"n_ctx": 3 * engine.context, "slots": 3})
    assert (result["proof"]["slots"], result["proof"]["of_slots"], engine.most_at_once) == (3, 3, 3)
    assert "3 prompts of" in result["message"]
    assert "all slots at once" in result["message"]
    engine.most_at_once, engine.tokens_per_s = 0, 80.0
    result = prove(engine, kind="llama_cpp", settings={"n_ctx": 3 * engine.context, "slots": 3})
    assert (result["proof"]["slots"], engine.most_at_once) == (2, 2)
    assert "2 of 3 slots" in result["message"]


def test_a_slow_engine_gets_a_shorter_prompt_and_it_is_called_so(engine: Engine) -> None:
    engine.tokens_per_s = 15.0
    result = prove(engine)
    found = result["proof"]
    assert found["shortened"]
    assert 850 <= found["prompt_tokens"] <= 15 * 60
    assert "memory proven in part" in result["message"]
    assert "of a context of 2,048, as much as prefills in 60 s" in result["message"]


def test_a_rate_that_the_engine_does_not_tell_is_taken_from_the_first_token(engine: Engine) -> None:
    engine.tells_timings = False
    assert prove(engine)["proof"]["prefill_tokens_per_s"] > 0


def test_a_longer_prompt_is_measured_before_the_proof_is_shortened(engine: Engine) -> None:
    engine.context, engine.tokens_per_s = 40_960, 600.0
    assert prove(engine)["proof"]["shortened"]
    lines = [text.count(proof.LINE) for text in engine.prompts]
    assert lines[:3] == [2, 26, 208]


def test_a_very_slow_engine_is_asked_nothing_twice(engine: Engine) -> None:
    engine.tokens_per_s = 3.0
    found = prove(engine, proof_s=20)["proof"]
    assert (found["shortened"], found["slots"]) == (True, 1)
    assert found["prompt_tokens"] < 100
    assert len(engine.prompts) == 2


@pytest.mark.parametrize(
    ("how", "state", "says"),
    [
        ("hang", "hung", "did not finish a long prompt in 1 s"),
        ("refuse", "wrong_settings", "its settings give each slot 2,048"),
        ("fail", "wrong_answer", "HTTP 500"),
    ],
)
def test_each_way_to_fail_at_a_long_prompt_has_its_name(
    engine: Engine, how: str, state: str, says: str
) -> None:
    engine.long_prompt = how
    result = prove(engine)
    assert (result["ok"], result["state"]) == (False, state)
    assert says in result["message"]
    assert "it answered a short prompt and failed at a long one of 2,0" in result["message"]
    assert (result["proof"]["ok"], result["proof"]["of_tokens"]) == (False, 2048)


def test_memory_that_ran_out_is_found_in_the_log_of_an_engine_that_lives_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 512.00 MiB on device 0: out of memory"
    monkeypatch.setattr(proof, "read_log", lambda *arguments: [line])
    engine.long_prompt = "fail"
    result = prove(engine)
    assert result["state"] == "out_of_memory"
    assert line in result["message"]


def test_an_engine_with_less_context_than_its_settings_say_is_refused(engine: Engine) -> None:
    assert prove(engine, settings={"max_model_len": 2 * engine.context})["state"] == "wrong_settings"


def test_an_engine_that_cuts_prompts_is_refused(engine: Engine) -> None:
    engine.cuts_at = 1000
    result = prove(engine)
    assert (result["state"], "it cuts prompts" in result["message"]) == ("wrong_settings", True)
    engine.cuts_at = 20
    assert prove(engine)["state"] == "wrong_settings"


def test_without_settings_the_engines_own_word_counts(engine: Engine) -> None:
    assert prove(engine, settings={})["proof"]["of_tokens"] == engine.context


@pytest.mark.parametrize(
    ("kind", "proof_s", "known", "due"),
    [
        ("vllm", 60, None, True),
        ("llama_cpp", 60, None, True),
        ("llama_cpp", 60, {"ok": False}, True),
        ("llama_cpp", 60, {"ok": True, "shortened": True}, False),
        ("vllm", 0, None, False),
        ("open_webui", 60, None, False),
    ],
)
def test_a_release_is_proven_once(kind: str, proof_s: float, known: Any, due: bool) -> None:
    spec = GateSpec(service="x", kind=kind, url="http://127.0.0.1:1", proof_s=proof_s)
    assert proof.is_due(spec, known) is due


def test_a_release_that_was_not_proven_is_called_so() -> None:
    assert proof.proof_text(None) == "memory not proven by a long prompt"


@given(
    context=st.integers(64, 200_000),
    slots=st.integers(1, 300),
    rate=st.floats(0.5, 1e6),
    proof_s=st.floats(0.1, 600),
)
def test_a_proof_fits_its_time_and_says_when_it_is_short(
    context: int, slots: int, rate: float, proof_s: float
) -> None:
    tokens, streams, shortened = proof.size_of_proof(context, slots, rate, proof_s)
    assert tokens * streams <= rate * proof_s or (streams == 1 and not shortened)
    assert 1 <= streams <= slots
    assert shortened is (tokens < context - proof.ANSWER_TOKENS)


@given(fixed=st.floats(1, 500), per_line=st.floats(10, 30), tokens=st.integers(1000, 200_000))
def test_lines_never_exceed_the_tokens_asked_for(fixed: float, per_line: float, tokens: int) -> None:
    scale = Scale(fixed, per_line)
    lines = scale.lines(tokens)
    assert scale.tokens(lines) <= tokens < scale.tokens(lines + 2) + 1
