"""Readiness: what the journal, the listener and the engine's answers say."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import gate
from ansible_collections.fleetfit.llm.plugins.module_utils.check_devices import wait_for_devices
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.gate import GateSpec, UnitState
from ansible_collections.fleetfit.llm.plugins.module_utils.gpu_facts import Accelerator, GpuFacts

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


UNIT_LOG = "vllm.service: Control process exited, code=exited, status=1/FAILURE"


def sentence_of_the_device_check(wanted: dict[str, int], facts: GpuFacts) -> str:
    """Return what the unit's ExecStartPre writes."""
    (sentence,) = wait_for_devices(wanted, wait_s=0, look=lambda: facts)
    return sentence


def test_a_planned_gpu_that_is_missing_is_the_cause_with_its_uuid() -> None:
    said = sentence_of_the_device_check({"GPU-gone": 1}, GpuFacts())
    state, cause = gate.classify([said, UNIT_LOG], UnitState(active="failed", result="exit-code"))
    assert state == "crashed"
    assert cause.startswith("The planned GPU GPU-gone cannot be used.")


@pytest.mark.parametrize("free_bytes", [100 * MIB, 3 * 1024 * MIB])
def test_a_planned_gpu_whose_memory_another_engine_holds_is_out_of_memory(free_bytes: int) -> None:
    card = Accelerator("GPU-a", 0, "A", "8.9", 1, 0, "dedicated", False, None, None, False, "0", "10de:1")
    holder = {"pid": 7, "name": "ollama", "used_bytes": 9 * 1024 * MIB, "owner": "other"}
    live = {"GPU-a": {"free_bytes": free_bytes, "processes": [holder]}}
    said = sentence_of_the_device_check(
        {"GPU-a": 8 * 1024 * MIB}, GpuFacts(accelerators=[card], live_devices=live)
    )
    state, cause = gate.classify([said, UNIT_LOG], UnitState(sub="auto-restart", result="exit-code"))
    assert state == "out_of_memory"
    for part in ("GPU-a", "ollama (pid 7) holds 9.0 GiB", "8.0 GiB", "Stop what holds it"):
        assert part in cause


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
    broken_stream = False


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
            if self.server.broken_stream:
                self.wfile.write(b'data: {"error": {"message": "EngineCore encountered an issue."}}\n\n')
                return
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
        monkeypatch.setattr(gate, "SERVER_ERROR_LOOK_S", 0.0)
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


LOGS = Path(__file__).parent / "data/vllm_logs"


def vllm_log(name: str) -> list[str]:
    """Return the log of a real vLLM; its README says how it was captured."""
    return (LOGS / f"{name}.log").read_text().splitlines()


@pytest.mark.parametrize(
    ("name", "state", "cause"),
    [
        (
            "dies_at_first_request",
            "crashed",
            "RuntimeError: Unsupported CPU attention configuration: head_dim=16 isa=2 kv_cache_idx=0",
        ),
        (
            "bad_argument",
            "crashed",
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig: Value error, "
            "User-specified max_model_len (999999) is greater than the derived max_model_len",
        ),
    ],
)
def test_the_cause_is_the_line_of_the_process_that_died_first(name: str, state: str, cause: str) -> None:
    found = gate.classify(vllm_log(name), UnitState(active="inactive"))
    assert found[0] == state
    assert found[1].startswith(cause)


@pytest.mark.parametrize(
    ("name", "state", "cause"),
    [
        ("small_cache", "out_of_memory", "(0.04 GiB KV cache is needed, which is larger than"),
        ("gpu_worker_out_of_memory", "out_of_memory", "Tried to allocate 2.32 GiB"),
        ("gpu_no_room_for_cache", "out_of_memory", "No available memory for the cache blocks"),
        ("gpu_dies_while_serving", "crashed", "torch.AcceleratorError: CUDA error: misaligned address"),
    ],
)
def test_the_cause_is_never_the_line_that_points_elsewhere(name: str, state: str, cause: str) -> None:
    found = gate.classify(vllm_log(name), UnitState(active="failed", result="exit-code"))
    assert found[0] == state
    assert cause in found[1]
    assert "Engine core initialization failed" not in found[1]


def test_a_starting_vllm_moves_with_each_of_its_lines_and_not_with_its_reports() -> None:
    seen: set[str] = set()
    for line in vllm_log("start"):
        step = gate.is_progress(line)
        if "Avg prompt throughput" in line or '"GET /health' in line or '"POST /v1' in line:
            assert step == "", line
        elif step:
            seen.add(step)
    text = "\n".join(seen)
    for moved in (
        "Starting to load model",
        "Completed | 1/1",
        "Loading weights took",
        "init engine",
        "KV cache size",
    ):
        assert moved in text
    assert "pid=" not in text
    assert "11-24" not in text


@pytest.mark.parametrize(
    "line",
    [
        "(EngineCore pid=79) INFO 12-25 04:53:12 [backends.py:1148] Dynamo bytecode transform time: 8.52 s",
        "(EngineCore pid=79) INFO 12-25 04:53:40 [monitor.py:34] torch.compile takes 26.70 s in total",
        "Capturing CUDA graphs (decode, FULL):  75%|███████▍  | 38/51 [00:02<00:00, 15.69it/s]",
        "(EngineCore pid=79) INFO 12-25 04:54:03 [gpu_model_runner.py:4587] Graph capturing finished in 9 secs",
        "(Worker_TP0 pid=34322) INFO 05-06 20:59:59 [gpu_model_runner.py:4879] Model loading took 12.66 GiB memory",
    ],
)
def test_a_vllm_on_a_gpu_moves_with_what_it_compiles_and_captures(line: str) -> None:
    assert gate.is_progress(line)


def test_the_same_warning_of_vllm_a_minute_later_is_no_progress() -> None:
    text = "No available shared memory broadcast block found in 60 seconds."
    first = f"(APIServer pid=7) INFO 11-24 11:26:45 [shm_broadcast.py:466] {text}"
    assert gate.is_progress(first) == gate.is_progress(first.replace("11:26", "11:27")) == text


def test_the_cpu_builds_figures_are_read() -> None:
    measured = gate.measured_memory(vllm_log("start"))
    assert measured == {"vllm": {"model_bytes": 256 * MIB, "kv_bytes": 1024 * MIB, "kv_tokens": 46592}}


def test_an_answer_that_breaks_off_with_an_error_is_no_answer(service: Service) -> None:
    service.replies = {CHAT: (200, completion("Paris"))}
    service.broken_stream = True
    result = talk(service)
    assert result["state"] == "wrong_answer"
    assert "ended with an error" in result["message"]


def test_out_of_memory_shows_the_plans_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "read_log", lambda *arguments: ["CUDA0 model buffer size = 100.00 MiB"])
    terms = dict.fromkeys(("weights", "kv_cache", "compute", "overhead", "margin"), 10 * MIB)
    device = {"name": "A", **terms, "total": 50 * MIB, "budget": 60 * MIB}
    plan = {"deployments": [{"devices": [device], "host": {}}]}
    spec = gate.parse_gate("engine", GATE, {}, plan)
    failed = gate.Gate(spec, since=None).failed("out_of_memory", "cudaMalloc failed")
    assert failed["message"].startswith("cudaMalloc failed. Planned for A: weights 10 MiB + ")
    assert failed["message"].endswith("The engine logged CUDA0: model 100 MiB.")
    assert failed["planned"][0]["budget"] == 60 * MIB
    assert "planned" not in gate.Gate(spec, since=None).failed("crashed", "x")


@pytest.mark.parametrize("proof_s", [-1, "long"])
def test_a_proof_of_no_length_is_refused(proof_s: Any) -> None:
    with pytest.raises(FleetfitError, match="proof_s"):
        gate.parse_gate("engine", {**GATE, "proof_s": proof_s}, {})
