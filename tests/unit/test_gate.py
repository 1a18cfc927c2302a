"""Readiness: what the journal, the listener and the engine's answers say."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import gate
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.gate import GateSpec, UnitState

MIB = 2**20
GATE = {"kind": "llama_cpp", "url": "http://127.0.0.1:8080", "model": "m", "timeout_s": 10}

DEATHS = [
    ("alloc_buffer: allocating 6144.00 MiB on device 0: cudaMalloc failed: out of memory", "out_of_memory"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "out_of_memory"),
    ("ValueError: No available memory for the cache blocks.", "out_of_memory"),
    ("Free memory on device (10.1/23.6 GiB) is less than desired GPU memory utilization", "out_of_memory"),
    ("terminate called after throwing an instance of 'std::bad_alloc'", "out_of_memory"),
    ("llama-server.service: A process of this unit has been killed by the OOM killer.", "out_of_memory"),
    ("srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080", "port_in_use"),
    ("[Errno 98] error while attempting to bind on address: address already in use", "port_in_use"),
    ("llama-server.service: Main process exited, code=dumped, status=6/ABRT", "crashed"),
    ("engine.service: Failed at step NAMESPACE spawning /opt/x: Operation not permitted", "crashed"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "state"), DEATHS)
def test_the_cause_of_death_is_read_from_the_journal(line: str, state: str) -> None:
    log = ["loading model", line, "engine.service: Scheduled restart job, restart counter is at 1."]
    assert gate.classify(log, UnitState(active="failed", result="exit-code")) == (state, line)


def test_the_kernels_kill_is_known_from_the_unit_alone() -> None:
    assert gate.classify([], UnitState(result="oom-kill"))[0] == "out_of_memory"
    assert (
        gate.classify([], UnitState(result="signal", exit_code="signal 11"))[1] == "result signal, signal 11"
    )


def test_the_engines_own_figures_are_summed_per_device() -> None:
    log = [
        "0.00.1 I load_tensors:        CUDA0 model buffer size =  4096.50 MiB",
        "load_tensors:   CPU_Mapped model buffer size =   292.36 MiB",
        "llama_kv_cache:      CUDA0 KV buffer size =   448.00 MiB",
        "llama_kv_cache:      CUDA0 KV buffer size =    64.00 MiB",
        "sched_reserve:      CUDA0 compute buffer size =   999.00 MiB",
        "sched_reserve:      CUDA0 compute buffer size =   304.00 MiB",
        "llama_context:  CUDA_Host  output buffer size =     1.16 MiB",
        "(EngineCore pid=9) Model loading took 14.27 GiB memory and 3.1 seconds",
        "(EngineCore pid=9) Available KV cache memory: 3.50 GiB",
        "(EngineCore pid=9) GPU KV cache size: 65,536 tokens",
    ]
    assert gate.measured_memory(log) == {
        "CUDA0": {"model": round(4096.5 * MIB), "kv": 512 * MIB, "compute": 304 * MIB},
        "CPU_Mapped": {"model": round(292.36 * MIB)},
        "CUDA_Host": {"output": round(1.16 * MIB)},
        "vllm": {"model_bytes": round(14.27 * 1024 * MIB), "kv_bytes": 3584 * MIB, "kv_tokens": 65536},
    }


@pytest.mark.parametrize(
    ("line", "moves"),
    [
        ("Loading safetensors checkpoint shards: 25% Completed | 1/4", True),
        ("load_tensors: loading tensor 7", True),
        ('INFO: 127.0.0.1:5 - "GET /health HTTP/1.1" 503', False),
        ("srv  log_server_r: done request: GET /health 127.0.0.1 503", False),
        ("", False),
    ],
)
def test_our_own_polling_is_no_progress(line: str, moves: bool) -> None:
    assert bool(gate.is_progress(line)) is moves


def test_a_heartbeat_that_only_changes_its_time_is_one_step() -> None:
    first, second = "2026-11-23 03:24:25 still waiting", "2026-11-23 03:24:26 still waiting"
    assert gate.is_progress(first) == gate.is_progress(second) != ""


def test_a_listener_is_found_and_told_from_the_units_own() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        port = server.server_address[1]
        assert gate.listener_pids(port) == [os.getpid()]
        stranger = gate.foreign_listener(port, "/system.slice/engine.service")
        assert stranger is not None
        assert f"pid {os.getpid()}" in stranger
        with open("/proc/self/cgroup") as stream:
            own = [line.rsplit(":", 1)[-1].strip() for line in stream]
        deepest = max(own, key=len)
        if deepest != "/":  # a process in the root group belongs to no unit
            assert gate.foreign_listener(port, deepest) is None
    assert gate.foreign_listener(port, "/system.slice/engine.service") is None


PROPS = {"total_slots": 2, "default_generation_settings": {"n_ctx": 2048}}


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"n_ctx": 4096, "slots": 2}, None),
        ({"n_ctx": 4000, "slots": 2}, None),  # llama.cpp rounds 2000 up to 2048
        ({}, None),
        ({"n_ctx": 4096, "slots": 4}, "it serves 2 slots, its settings say 4"),
        ({"n_ctx": 8192, "slots": 2}, "its slots have a context of 2048 tokens, its settings give 4096"),
    ],
)
def test_props_are_held_against_the_settings(settings: dict[str, Any], difference: str | None) -> None:
    assert gate.check_props(PROPS, settings) == difference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "ollama"}, "kind 'ollama'"),
        ({"url": "https://127.0.0.1:1"}, "not an address"),
        ({"url": "127.0.0.1:1"}, "not an address"),
        ({"timeout": 5}, "'timeout' is not a field"),
        ({"timeout_s": 0}, "not usable"),
        ({"max_timeout_s": 5}, "not usable"),
        ({"expect": "("}, "regular expression"),
        ({"kind": "open_webui"}, "admin_email"),
    ],
)
def test_a_gate_that_could_not_be_asked_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FleetfitError, match=message) as caught:
        gate.parse_gate("engine", {**GATE, **change}, {})
    assert caught.value.code == "bad_gate"


def test_secrets_do_not_reach_the_log_that_is_shown() -> None:
    assert gate.redact(["the key s3cr3t, again s3cr3t", "none"], ["s3cr3t"]) == [
        "the key [redacted], again [redacted]",
        "none",
    ]


class Service(http.server.ThreadingHTTPServer):
    """A service that answers what a test says."""

    replies: dict[str, tuple[int, Any]]
    requests: list[tuple[str, str | None, Any]]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Service

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        if body.get("stream"):
            self.send_response(200)
            self.end_headers()
            for word in ("Par", "is", "."):
                event = {"choices": [{"delta": {"content": word}}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.write(
                b'data: {"choices": [], "timings": {"predicted_per_second": 42.5}}\n\ndata: [DONE]\n\n'
            )
            return
        status, document = self.server.replies[self.path]
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with Service(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        # No unit stands behind this server whose crash could be looked for.
        monkeypatch.setattr(gate, "CRASH_LOOK_S", 0.0)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def talk(service: Service, kind: str = "vllm", **other: Any) -> dict[str, Any]:
    """Have the gate's conversation with the service; return its result."""
    url = f"http://127.0.0.1:{service.server_address[1]}"
    spec = GateSpec(service="absent-in-tests", kind=kind, url=url, model="m", timeout_s=5, **other)
    asked = gate.Gate(spec, since=None, restarts=0)
    asked.key = "s3cr3t"
    asked._process_problem = lambda: None  # type: ignore[method-assign]
    return asked._converse()


def completion(content: str, **other: Any) -> dict[str, Any]:
    """Return a chat completion."""
    return {"choices": [{"message": {"role": "assistant", "content": content, **other}}]}


CHAT = "/v1/chat/completions"


def test_an_answer_is_asked_for_twice_once_streamed(service: Service) -> None:
    service.replies = {CHAT: (200, completion("Paris, said s3cr3t."))}
    result = talk(service)
    assert (result["ok"], result["state"], result["tokens_per_s"]) == (True, "ready", 42.5)
    assert result["answer"] == "Paris, said [redacted]."
    assert [(path, key, body["stream"]) for path, key, body in service.requests] == [
        (CHAT, "Bearer s3cr3t", False),
        (CHAT, "Bearer s3cr3t", True),
    ]


def test_a_model_that_thinks_first_gets_room_to_answer(service: Service) -> None:
    service.replies = {CHAT: (200, completion("", reasoning_content="France, so"))}
    result = talk(service)
    assert result["state"] == "wrong_answer"
    assert [body["max_tokens"] for _, _, body in service.requests] == [64, 1024]


@pytest.mark.parametrize(
    ("status", "document", "state"),
    [
        (200, completion("Berlin"), "wrong_answer"),
        (200, completion("   "), "wrong_answer"),
        (200, {"choices": []}, "wrong_answer"),
        (200, b"<html>proxy</html>", "wrong_answer"),
        (200, [1], "wrong_answer"),
        (404, {"error": "The model `m` does not exist."}, "wrong_answer"),
        (500, {"error": "compute failed"}, "wrong_answer"),
        (401, {"error": "Invalid API Key"}, "refused"),
    ],
)
def test_what_is_no_answer_fails(service: Service, status: int, document: Any, state: str) -> None:
    service.replies = {CHAT: (status, document)}
    result = talk(service)
    assert (result["ok"], result["state"]) == (False, state)


def test_the_expected_answer_is_the_callers_choice(service: Service) -> None:
    service.replies = {CHAT: (200, completion("Berlin"))}
    assert talk(service, question="Where?", expect="Berlin")["ok"]
    assert talk(service, expect=None)["ok"]
    assert service.requests[0][2]["messages"] == [{"role": "user", "content": "Where?"}]


def test_the_page_is_asked_as_its_admin(service: Service) -> None:
    service.replies = {
        "/api/v1/auths/signin": (200, {"token": "t0k3n"}),
        "/api/chat/completions": (200, completion("Paris")),
    }
    assert talk(service, "open_webui", admin_email="a@b")["ok"]
    assert service.requests[0] == ("/api/v1/auths/signin", None, {"email": "a@b", "password": "s3cr3t"})
    assert {key for _, key, _ in service.requests[1:]} == {"Bearer t0k3n"}


def test_a_refused_sign_in_is_told_apart(service: Service) -> None:
    service.replies = {"/api/v1/auths/signin": (401, {"detail": "The email or password is incorrect."})}
    assert talk(service, "open_webui", admin_email="a@b")["state"] == "refused"
