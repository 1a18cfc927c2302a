"""Readiness of an engine: its process, its health, and a real answer to a real question.

An engine can answer ``/health`` and die at the first request, find its port held by somebody else, or load
for ten minutes and log all the while: only the unit's state, the listener's owner, the journal and a
completion together tell ready, loading, hung, out of memory, crashed and wrong apart.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable, Optional
from urllib.parse import urlsplit

from .errors import FleetfitError
from .manifest import HostPaths, check_service_name
from .memory_account import memory_sentence, planned_memory
from .release import read_plan, read_release, read_settings
from .units import GIB, MIB

KINDS = ("llama_cpp", "vllm", "open_webui")
STATES = (
    "ready",
    "loading",
    "hung",
    "out_of_memory",
    "crashed",
    "port_in_use",
    "refused",
    "wrong_answer",
    "wrong_settings",
)
# A question that every instruction model of at least 0.1 billion parameters was seen to answer.
QUESTION = "What is the capital of France? Answer with its name."
EXPECT = r"(?i)paris"
# Room for the answer, then for a model that thinks before it answers.
ANSWER_TOKENS = 64
THINKING_TOKENS = 1024
LOG_TAIL_LINES = 20
# Lines in which the cause of a death is looked for: vLLM's processes write a traceback of up to 100 lines each.
CAUSE_LINES = 400
CAUSE_CHARS = 600
# Journal lines read for measurements: a start writes some hundreds, an hour of requests some thousands.
LOG_LINES = 20_000
CHAT_PATH = "/v1/chat/completions"
POLL_S = 0.5
PROBE_TIMEOUT_S = 5.0
# Crashes reach the unit's state a moment after the connection broke: how long to look for one. vLLM answers 500
# when its engine dies, then takes its other processes down (seen: 3 s on a busy machine) and ends in order.
CRASH_LOOK_S = 2.0
SERVER_ERROR_LOOK_S = 15.0
# How long the prompt that proves the memory may take to prefill (proof.py); 0: no such prompt.
PROOF_S = 60.0
# A log that never stops must not extend the wait for ever.
MAX_TIMEOUT_FACTOR = 6

# The engines' own errors: ggml's allocators and CUDA backend, PyTorch, vLLM's memory profiler, the kernel; and what
# the unit's device check says of a card whose memory somebody else holds (check_devices.py).
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|failed to allocate .*(buffer|memory)|unable to allocate .*buffer"
    r"|failed to allocate compute|std::bad_alloc|Cannot allocate memory|\bMemoryError\b"
    r"|killed by the OOM killer|Failed with result 'oom-kill'|No available memory for the cache blocks"
    r"|is less than desired GPU memory utilization"
    r"|larger than the (maximum number of tokens|available KV cache)"
    r"|The planned GPU \S+ has \S+ \S+ free",
    re.IGNORECASE,
)
_PORT_IN_USE = re.compile(
    r"couldn't bind HTTP server socket|address already in use|Errno 98\b", re.IGNORECASE
)
# Lines that our own polling makes in the engine's log are not progress, nor is vLLM's report every 10 s.
_ACCESS_LOG = re.compile(r"(GET|POST) /\S*|log_server_r|done request|Avg prompt throughput: ")
# What stands before a line's text and differs each time: vLLM's process, level, time and source line; any time.
_LINE_HEAD = re.compile(
    r"^\s*(?:\([^()]*pid=\d+\)\s*)*(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL):?\s+)?"
    r"(?:[\d.:,TZ+\-/]+\s+)*(?:\[[\w.]+:\d+\]\s?)?"
)
# What a Python library says of itself when its process ends, some hundred lines of it.
_NOISE = re.compile(r"^nanobind: | - leaked |^ - \.\.\. skipped|nanobind\.readthedocs")
# The last line of a Python traceback, the errors of argument parsers and of llama.cpp that say why, and what the
# unit's device check says of a card that is not there.
_SAID_WHY = re.compile(
    r"^(?:[A-Za-z_][\w.]*(?:Error|Exception)\b(?::.*)?$|\S+: error: |error: |error while loading )"
    r"|The planned GPU \S+ cannot be used"
    r"|error loading model|GGML_ASSERT\(|CUDA error|error while handling argument"
)
# These say that another process of the same engine has said why.
_SAID_ELSEWHERE = re.compile(
    r"(?:[Ss]ee|check the) (?:root cause|stack trace)|EngineDeadError|Engine process failed"
    r"|SystemExit|KeyboardInterrupt|exiting due to"
)
_BUFFER = re.compile(
    r"(?P<device>\S+)\s+(?P<kind>model|KV|RS|compute|output|LoRA) buffer size\s*=\s*(?P<mib>[0-9.]+) MiB"
)
# The CPU build (seen: 0.32.0) logs the size of the files in place of what loading took.
_VLLM_TERMS = (
    ("model_bytes", re.compile(r"Checkpoint size: ([0-9.]+) GiB"), GIB),
    ("model_bytes", re.compile(r"Model loading took ([0-9.]+) GiB"), GIB),
    ("kv_bytes", re.compile(r"Available KV cache memory: ([0-9.]+) GiB"), GIB),
    ("kv_bytes", re.compile(r"Explicitly set \(([0-9.]+)/[0-9.]+\) GiB for KV cache"), GIB),
    ("kv_tokens", re.compile(r"[GC]PU KV cache size: ([0-9,]+) tokens"), 1),
)


@dataclass(frozen=True)
class GateSpec:
    """What to ask: times in seconds; ``settings`` and ``plan`` are the release's, held against the engine.

    ``proof_s`` is how long the prompt that proves the memory may take to prefill, 0 for no such prompt.
    """

    service: str
    kind: str
    url: str
    credential: Optional[str] = None
    model: str = ""
    timeout_s: float = 300.0
    max_timeout_s: float = 0.0
    question: str = QUESTION
    expect: Optional[str] = EXPECT
    admin_email: str = ""
    proof_s: float = PROOF_S
    settings: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)

    @property
    def longest_s(self) -> float:
        """Return the time after which even an engine that still makes progress is given up."""
        return self.max_timeout_s or self.timeout_s * MAX_TIMEOUT_FACTOR

    @property
    def host(self) -> str:
        """Return the host of the URL."""
        return urlsplit(self.url).hostname or "127.0.0.1"

    @property
    def port(self) -> int:
        """Return the port of the URL."""
        return urlsplit(self.url).port or 80


def parse_gate(
    service: str,
    gate: Mapping[str, Any],
    settings: Mapping[str, Any],
    plan: Optional[Mapping[str, Any]] = None,
) -> GateSpec:
    """Return the gate as a checked value; raises FleetfitError that names the field at fault."""

    def refuse(message: str, remedy: str) -> FleetfitError:
        return FleetfitError(f"The gate of {service}: {message}", code="bad_gate", remedy=remedy)

    known = {name for name in GateSpec.__dataclass_fields__ if name not in ("service", "settings", "plan")}
    unknown = sorted(set(gate) - known)
    if unknown:
        raise refuse(f"'{unknown[0]}' is not a field.", f"Fields: {', '.join(sorted(known))}.")
    if gate.get("kind") not in KINDS:
        raise refuse(f"kind {gate.get('kind')!r} is not known.", f"Use one of {', '.join(KINDS)}.")
    parts = urlsplit(str(gate.get("url", "")))
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        raise refuse(f"url {gate.get('url')!r} is not an address.", "Write http://127.0.0.1:PORT.")
    if gate["kind"] == "open_webui" and not (gate.get("credential") and gate.get("admin_email")):
        raise refuse("signing in needs 'credential' and 'admin_email'.", "Give both.")
    values = {name: gate[name] for name in gate if gate[name] is not None or name == "expect"}
    spec = GateSpec(
        service=check_service_name(service), settings=dict(settings), plan=dict(plan or {}), **values
    )
    if spec.timeout_s <= 0 or spec.longest_s < spec.timeout_s:
        raise refuse(
            f"timeout_s {spec.timeout_s} is not usable.", "Use seconds above 0, at most max_timeout_s."
        )
    if not isinstance(spec.proof_s, (int, float)) or spec.proof_s < 0:
        raise refuse(f"proof_s {spec.proof_s!r} is not usable.", "Use seconds, 0 for no proof.")
    if spec.expect:
        try:
            re.compile(spec.expect)
        except re.error as error:
            raise refuse(f"'expect' is not a regular expression ({error}).", "Correct it.") from error
    return spec


@dataclass(frozen=True)
class UnitState:
    """The properties of a systemd unit that readiness is read from."""

    active: str = "inactive"
    sub: str = "dead"
    main_pid: int = 0
    n_restarts: int = 0
    result: str = "success"
    exit_code: str = ""
    job: str = ""
    control_group: str = ""
    load: str = "loaded"

    @property
    def starting(self) -> bool:
        """Return whether systemd is still working on starting it."""
        return self.active in ("activating", "reloading") or bool(self.job and self.job != "0")


_PROPERTIES = (
    "ActiveState,SubState,MainPID,NRestarts,Result,ExecMainCode,ExecMainStatus,Job,ControlGroup,LoadState"
)


def parse_unit(text: str) -> UnitState:
    """Return the state in the output of ``systemctl show``."""
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    code = {"1": "exit code", "2": "signal", "3": "signal (core dumped)"}.get(
        values.get("ExecMainCode", ""), ""
    )
    return UnitState(
        active=values.get("ActiveState", "inactive"),
        sub=values.get("SubState", "dead"),
        main_pid=int(values.get("MainPID") or 0),
        n_restarts=int(values.get("NRestarts") or 0),
        result=values.get("Result", "success"),
        exit_code=f"{code} {values.get('ExecMainStatus', '')}" if code else "",
        job=values.get("Job", ""),
        control_group=values.get("ControlGroup", ""),
        load=values.get("LoadState", "loaded"),
    )


def read_unit(service: str) -> UnitState:
    """Return the state of ``<service>.service`` now."""
    done = subprocess.run(
        ["systemctl", "show", f"{service}.service", f"--property={_PROPERTIES}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return parse_unit(done.stdout)


def read_log(service: str, since: Optional[float], lines: int = LOG_LINES) -> list[str]:
    """Return the unit's journal lines since ``since`` (Unix seconds), oldest first, in any namespace."""
    command = [
        "journalctl",
        "--namespace=*",
        f"--unit={service}.service",
        "--output=cat",
        "--no-pager",
        "--quiet",
    ]
    command.append(f"--lines={lines}")
    if since is not None:
        command.append(f"--since=@{since:.3f}")
    done = subprocess.run(command, check=False, capture_output=True, timeout=60)
    return done.stdout.decode("utf-8", "replace").splitlines()


def last_start(service: str) -> Optional[float]:
    """Return when the unit was last started, in Unix seconds, or None if it never was since boot."""
    done = subprocess.run(
        ["systemctl", "show", f"{service}.service", "--property=InactiveExitTimestamp", "--timestamp=unix"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    match = re.search(r"@(\d+)", done.stdout)
    return float(match.group(1)) if match else None


def redact(lines: Iterable[str], secrets: Sequence[str]) -> list[str]:
    """Return ``lines`` without the values in ``secrets``."""
    result = []
    for line in lines:
        for secret in secrets:
            line = line.replace(secret, "[redacted]")
        result.append(line)
    return result


def measured_memory(lines: Iterable[str]) -> dict[str, Any]:
    """Return what the engine itself logged about its memory, in bytes, as device → term → bytes.

    llama.cpp: ``CUDA0 model buffer size = X MiB`` and its siblings for KV, RS (recurrent state), compute,
    output and LoRA; buffers of one device and term add up, but compute and output are reserved anew: the
    last one counts. vLLM: its lines about model loading and the KV cache.
    """
    found: dict[str, Any] = {}
    for line in lines:
        match = _BUFFER.search(line)
        if match:
            terms = found.setdefault(match["device"], {})
            term = match["kind"].lower()
            size = round(float(match["mib"]) * MIB)
            terms[term] = size if term in ("compute", "output") else terms.get(term, 0) + size
        for name, pattern, unit in _VLLM_TERMS:
            vllm = pattern.search(line)
            if vllm:
                found.setdefault("vllm", {})[name] = round(float(vllm.group(1).replace(",", "")) * unit)
    return found


def classify(lines: Sequence[str], unit: UnitState) -> tuple[str, str]:
    """Return (state, cause) of an engine whose process died, from its last journal lines and its unit."""
    for pattern, state in ((_PORT_IN_USE, "port_in_use"), (_OUT_OF_MEMORY, "out_of_memory")):
        found = [line.strip() for line in reversed(lines) if pattern.search(line)]
        # Rather the line of the process that it happened to than one that repeats it.
        first_hand = [line for line in found if not _SAID_ELSEWHERE.search(line)]
        if found:
            return state, [*first_hand, *found][0][:CAUSE_CHARS]
    if unit.result == "oom-kill":
        return "out_of_memory", "the kernel killed it for memory"
    ended = f"result {unit.result}" + (f", {unit.exit_code}" if unit.exit_code else "")
    if unit.result == "success":
        ended = "its process ended"
    for line in reversed(lines):
        if re.search(r"Main process exited|Failed at step|Failed to (load|run|set up)", line):
            ended = line.strip()
            break
    why = said_why(lines)
    return "crashed", f"{why} ({ended})" if why else ended


def said_why(lines: Sequence[str]) -> str:
    """Return the last line in which the engine itself said why it died, an empty text if it did not.

    vLLM's processes die one after another, and all but the first say only that another one died: their lines
    do not count.
    """
    for position in range(len(lines) - 1, -1, -1):
        text = _LINE_HEAD.sub("", lines[position]).rstrip()
        if _SAID_WHY.search(text) and not _SAID_ELSEWHERE.search(text):
            if "validation error" in text:  # pydantic says what is wrong a line below, then shows the input
                below = _LINE_HEAD.sub("", lines[position + 1]).strip() if position + 1 < len(lines) else ""
                text += f": {below.partition(' [type=')[0]}"
            return text.strip()[:CAUSE_CHARS]
    return ""


def is_progress(line: str) -> str:
    """Return what identifies ``line`` as a new step of the engine, or an empty text for one that is none."""
    if _ACCESS_LOG.search(line):
        return ""
    return _LINE_HEAD.sub("", line).strip()


def listener_inodes(port: int, tables: Sequence[str]) -> set[str]:
    """Return the socket inodes that listen on TCP ``port``, from texts in the format of /proc/net/tcp."""
    found = set()
    for table in tables:
        for line in table.splitlines()[1:]:
            columns = line.split()
            # 0A is TCP_LISTEN, include/net/tcp_states.h.
            if len(columns) > 9 and columns[3] == "0A" and int(columns[1].rsplit(":", 1)[1], 16) == port:
                found.add(columns[9])
    return found


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""


def listener_pids(port: int) -> list[int]:
    """Return the processes that hold a listening socket on TCP ``port`` here (root sees all of them)."""
    inodes = listener_inodes(port, [_read_text("/proc/net/tcp"), _read_text("/proc/net/tcp6")])
    if not inodes:
        return []
    wanted = {f"socket:[{inode}]" for inode in inodes}
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            for descriptor in os.listdir(f"/proc/{name}/fd"):
                if os.readlink(f"/proc/{name}/fd/{descriptor}") in wanted:
                    found.append(int(name))
                    break
        except OSError:
            continue
    return found


def foreign_listener(port: int, control_group: str) -> Optional[str]:
    """Return the name of a process outside ``control_group`` that listens on ``port``, or None."""
    for pid in listener_pids(port):
        groups = _read_text(f"/proc/{pid}/cgroup")
        unit = control_group.rstrip("/")
        if not unit or not any(
            line.rsplit(":", 1)[-1] == unit or line.rsplit(":", 1)[-1].startswith(unit + "/")
            for line in groups.splitlines()
        ):
            return f"{_read_text(f'/proc/{pid}/comm').strip() or 'a process'} (pid {pid})"
    return None


class RefusedError(Exception):
    """The engine answered, and what it said is final: (state, message), and the HTTP status if that was it."""

    def __init__(self, state: str, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.state = state
        self.message = message
        self.status = status


@dataclass
class Talk:
    """One conversation with the service over HTTP, without proxies and without keeping a connection."""

    spec: GateSpec
    key: str

    def _open(
        self, method: str, path: str, body: Optional[Mapping[str, Any]], token: str, timeout_s: float
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.spec.host, self.spec.port, timeout=timeout_s)
        headers = {"Accept": "application/json", "Connection": "close"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        prefix = urlsplit(self.spec.url).path.rstrip("/")
        try:
            connection.request(method, prefix + path, body=data, headers=headers)
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def call(
        self,
        method: str,
        path: str,
        body: Optional[Mapping[str, Any]] = None,
        *,
        token: str = "",
        timeout_s: float = PROBE_TIMEOUT_S,
    ) -> tuple[int, bytes]:
        """Return (status, body) of one request; raises OSError and http.client.HTTPException."""
        connection, response = self._open(method, path, body, token, timeout_s)
        try:
            return response.status, response.read()
        finally:
            connection.close()

    def ask_json(
        self, method: str, path: str, body: Optional[Mapping[str, Any]], *, token: str, timeout_s: float
    ) -> dict[str, Any]:
        """Return the JSON object that the service answers; anything else is final."""
        status, data = self.call(method, path, body, token=token, timeout_s=timeout_s)
        excerpt = " ".join(data[:300].decode("utf-8", "replace").split())
        if status in (401, 403):
            raise RefusedError("refused", f"{path} refused the credential (HTTP {status}: {excerpt})")
        if status != 200:
            raise RefusedError("wrong_answer", f"{path} answered HTTP {status}: {excerpt}", status)
        try:
            document = json.loads(data)
        except ValueError as error:
            raise RefusedError("wrong_answer", f"{path} did not answer JSON: {excerpt}") from error
        if not isinstance(document, dict):
            raise RefusedError("wrong_answer", f"{path} did not answer a JSON object: {excerpt}")
        return document

    def stream(
        self, path: str, body: Mapping[str, Any], *, token: str, timeout_s: float
    ) -> Iterator[dict[str, Any]]:
        """Yield the events of a streamed completion; raises socket.timeout after ``timeout_s`` in all."""
        end = time.monotonic() + timeout_s
        connection, response = self._open("POST", path, body, token, timeout_s)
        try:
            if response.status != 200:
                excerpt = " ".join(response.read(300).decode("utf-8", "replace").split())
                message = f"{path} (streamed) answered HTTP {response.status}: {excerpt}"
                raise RefusedError("wrong_answer", message, response.status)
            for raw in response:
                if time.monotonic() > end:  # a server may send comments while its engine hangs
                    raise socket.timeout(f"no end after {timeout_s:.0f} s")
                line = raw.decode("utf-8", "replace").strip()
                if not line.startswith("data:"):
                    continue
                payload = line[len("data:") :].strip()
                if payload == "[DONE]":
                    return
                try:
                    event = json.loads(payload)
                except ValueError as error:
                    raise RefusedError(
                        "wrong_answer", f"{path} streamed what is not JSON: {payload[:200]}"
                    ) from error
                if isinstance(event, dict):
                    yield event
        finally:
            connection.close()


def answer_text(document: Mapping[str, Any]) -> tuple[str, str]:
    """Return (content, reasoning) of a chat completion; empty texts where there is none."""
    choices = document.get("choices")
    message = choices[0].get("message") if isinstance(choices, list) and choices else None
    if not isinstance(message, Mapping):
        return "", ""
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    return str(message.get("content") or ""), str(reasoning)


def _delta_text(event: Mapping[str, Any]) -> str:
    choices = event.get("choices")
    delta = choices[0].get("delta") if isinstance(choices, list) and choices else None
    if not isinstance(delta, Mapping):
        return ""
    return str(delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or "")


def slot_context_tokens(settings: Mapping[str, Any]) -> Optional[int]:
    """Return the context that llama-server gives each slot: ``n_ctx / slots`` rounded up to 256.

    The rounding is llama.cpp's own (src/llama-context.cpp, GGML_PAD(n_ctx_seq, 256)).
    """
    n_ctx, slots = settings.get("n_ctx"), settings.get("slots")
    if not isinstance(n_ctx, int) or not isinstance(slots, int) or slots < 1:
        return None
    return -(-(n_ctx // slots) // 256) * 256


def check_props(props: Mapping[str, Any], settings: Mapping[str, Any]) -> Optional[str]:
    """Return how llama-server's ``/props`` differ from the release's settings, or None."""
    slots = props.get("total_slots")
    if isinstance(settings.get("slots"), int) and slots != settings["slots"]:
        return f"it serves {slots} slots, its settings say {settings['slots']}"
    wanted = slot_context_tokens(settings)
    generation = props.get("default_generation_settings")
    n_ctx = generation.get("n_ctx") if isinstance(generation, Mapping) else None
    if wanted is not None and n_ctx != wanted:
        return f"its slots have a context of {n_ctx} tokens, its settings give {wanted}"
    return None


def read_credential(path: Optional[str]) -> str:
    """Return the secret in the file ``path``, an empty text for None; raises FleetfitError."""
    if not path:
        return ""
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read().strip()
    except OSError as error:
        raise FleetfitError(
            f"The credential file {path} cannot be read: {error.strerror}.",
            code="credential_unreadable",
            remedy="Run the service's role: it installs the credential.",
        ) from error


@dataclass(frozen=True)
class Streamed:
    """A streamed completion: seconds from the request on, tokens as the engine counts them, None if it does not.

    ``first_s`` is None where no text came.
    """

    first_s: Optional[float]
    seconds: float
    prompt_tokens: Optional[int]
    completion_tokens: Optional[int]
    prefill_tokens_per_s: Optional[float]
    tokens_per_s: Optional[float]


def _number(document: Any, name: str) -> Optional[float]:
    value = document.get(name) if isinstance(document, Mapping) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def read_stream(talk: Talk, path: str, body: Mapping[str, Any], *, token: str, timeout_s: float) -> Streamed:
    """Ask for a streamed completion with the engine's own counts and return its times and tokens."""
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    begun = time.monotonic()
    first: Optional[float] = None
    last = begun
    pieces = 0
    usage: Any = None
    timings: Any = None  # llama-server's own measurement
    for event in talk.stream(path, body, token=token, timeout_s=timeout_s):
        if _delta_text(event):
            last = time.monotonic()
            pieces += 1
            first = last if first is None else first
        if event.get("error"):
            # A request that fails after its first byte was sent still has the status 200.
            error = " ".join(json.dumps(event["error"]).split())[:300]
            raise RefusedError("wrong_answer", f"{path} (streamed) ended with an error: {error}", 500)
        usage = event.get("usage") or usage
        timings = event.get("timings") or timings
    prompt, completion = _number(usage, "prompt_tokens"), _number(usage, "completion_tokens")
    counted = (completion or pieces) - 1
    speed = counted / (last - first) if first is not None and counted > 0 and last > first else None
    return Streamed(
        first_s=None if first is None else first - begun,
        seconds=time.monotonic() - begun,
        prompt_tokens=None if prompt is None else int(prompt),
        completion_tokens=None if completion is None else int(completion),
        prefill_tokens_per_s=_number(timings, "prompt_per_second"),
        tokens_per_s=_number(timings, "predicted_per_second") or speed,
    )


class Gate:
    """One wait for readiness; ``wait()`` returns the gate result of docs/contracts.md section 7."""

    def __init__(self, spec: GateSpec, *, since: Optional[float], restarts: Optional[int] = None) -> None:
        """Look at the journal since ``since`` (Unix seconds); ``restarts`` are those that count as none."""
        self.spec = spec
        self.since = since
        self.restarts = restarts
        self.key = ""
        self.limit_s = spec.timeout_s
        self.seen: set[str] = set()
        self.health = "no answer yet"

    def wait(self) -> dict[str, Any]:
        """Wait until the service is ready, has failed for good, or the deadline has passed."""
        self.prepare()
        begun = time.monotonic()
        deadline = begun + self.spec.timeout_s
        last_resort = begun + self.spec.longest_s
        while True:
            problem = self._process_problem()
            if problem:
                return self.failed(*problem)
            if self._healthy():
                return self._converse()
            now = time.monotonic()
            if self._made_progress():
                deadline = now + self.spec.timeout_s
            if now >= last_resort:
                return self.failed(
                    "loading",
                    f"still loading after {now - begun:.0f} s, and its log still moves ({self.health})",
                )
            if now >= deadline:
                return self.failed(
                    "hung", f"nothing new in its log for {self.spec.timeout_s:.0f} s ({self.health})"
                )
            time.sleep(POLL_S)

    def prepare(self) -> None:
        """Read the credential, and what the unit has behind it."""
        self.key = read_credential(self.spec.credential)
        if self.restarts is None:
            self.restarts = read_unit(self.spec.service).n_restarts

    def log(self) -> list[str]:
        """Return the unit's journal since the start that is looked at, without the credential."""
        return redact(read_log(self.spec.service, self.since), [self.key] if self.key else [])

    def _made_progress(self) -> bool:
        steps = {step for step in map(is_progress, self.log()) if step}
        new = steps - self.seen
        self.seen |= new
        return bool(new)

    def _process_problem(self) -> Optional[tuple[str, str]]:
        """Return (state, cause) if the unit is not running or the port belongs to somebody else."""
        unit = read_unit(self.spec.service)
        if unit.load == "not-found":
            return "crashed", f"there is no unit {self.spec.service}.service"
        crashed = (
            unit.active == "failed"
            or unit.sub == "auto-restart"
            or unit.n_restarts > (self.restarts or 0)
            or (unit.active in ("inactive", "deactivating") and not unit.starting)
        )
        if crashed:
            time.sleep(POLL_S)  # the journal gets the process's last lines a moment later
            lines = self.log()[-CAUSE_LINES:]
            if unit.active == "inactive" and unit.result == "success" and not said_why(lines):
                return "crashed", "the unit is not running"
            return classify(lines, unit)
        if unit.active == "active":
            stranger = foreign_listener(self.spec.port, unit.control_group)
            if stranger:
                return "port_in_use", f"port {self.spec.port} is held by {stranger}"
        return None

    def _healthy(self) -> bool:
        path = "/ready" if self.spec.kind == "open_webui" else "/health"
        try:
            status, _ = Talk(self.spec, self.key).call("GET", path)
        except (OSError, http.client.HTTPException) as error:
            self.health = f"{path}: {type(error).__name__}"
            return False
        self.health = f"{path}: HTTP {status}"
        return status == 200

    def _converse(self) -> dict[str, Any]:
        talk = Talk(self.spec, self.key)

        def ask() -> dict[str, Any]:
            if self.spec.kind == "llama_cpp" and self.spec.settings:
                props = talk.ask_json("GET", "/props", None, token=self.key, timeout_s=PROBE_TIMEOUT_S)
                difference = check_props(props, self.spec.settings)
                if difference:
                    raise RefusedError("wrong_settings", difference)
            token, path = self.key, CHAT_PATH
            if self.spec.kind == "open_webui":
                token, path = self._sign_in(talk), "/api/chat/completions"
            answer = self._answer(talk, path, token)
            first_token_s, tokens_per_s = self._stream(talk, path, token)
            return {
                "ok": True,
                "state": "ready",
                "message": f"{self.spec.service} answered in {first_token_s:.2f} s",
                "answer": self.hide(answer),
                "first_token_s": round(first_token_s, 3),
                "tokens_per_s": round(tokens_per_s, 2) if tokens_per_s else None,
                "measured": measured_memory(self.log()),
                "log_tail": [],
            }

        return self.attempt(ask, "a short completion")

    def attempt(self, ask: Callable[[], dict[str, Any]], what: str) -> dict[str, Any]:
        """Return what ``ask()`` returns, or the failure that its exception and the unit together mean."""
        try:
            result = ask()
        except RefusedError as refusal:
            # What looks like a wrong answer may be the last breath of a process that is dying.
            if refusal.status < 500:
                return self.failed(*(self._late_crash() or (refusal.state, refusal.message)))
            why = said_why(self.log()[-CAUSE_LINES:])
            message = f"{refusal.message}; its log says: {why}" if why else refusal.message
            return self.failed(*(self._late_crash(SERVER_ERROR_LOOK_S) or (refusal.state, message)))
        except socket.timeout:
            message = f"it did not finish {what} in {self.limit_s:.0f} s"
            return self.failed(*(self._late_crash() or ("hung", message)))
        except (OSError, http.client.HTTPException) as error:
            message = f"the connection broke during {what} ({type(error).__name__})"
            return self.failed(*(self._late_crash() or ("wrong_answer", message)))
        problem = self._process_problem()
        return self.failed(*problem) if problem else result

    def hide(self, text: str) -> str:
        """Return ``text`` without the credential."""
        return redact([text], [self.key] if self.key else [])[0]

    def _late_crash(self, look_s: Optional[float] = None) -> Optional[tuple[str, str]]:
        end = time.monotonic() + (CRASH_LOOK_S if look_s is None else look_s)
        while time.monotonic() < end:
            problem = self._process_problem()
            if problem:
                return problem
            time.sleep(POLL_S)
        return None

    def _sign_in(self, talk: Talk) -> str:
        document = talk.ask_json(
            "POST",
            "/api/v1/auths/signin",
            {"email": self.spec.admin_email, "password": self.key},
            token="",
            timeout_s=self.spec.timeout_s,
        )
        token = document.get("token")
        if not isinstance(token, str) or not token:
            raise RefusedError("wrong_answer", "signing in gave no token")
        return token

    def _body(self, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.spec.model,
            "messages": [{"role": "user", "content": self.spec.question}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": False,
        }

    def _answer(self, talk: Talk, path: str, token: str) -> str:
        for max_tokens in (ANSWER_TOKENS, THINKING_TOKENS):
            document = talk.ask_json(
                "POST", path, self._body(max_tokens), token=token, timeout_s=self.spec.timeout_s
            )
            content, reasoning = answer_text(document)
            if content.strip() and (not self.spec.expect or re.search(self.spec.expect, content)):
                return content.strip()
            if not reasoning:
                break
        if not (content or reasoning).strip():
            raise RefusedError("wrong_answer", "the completion is empty")
        raise RefusedError(
            "wrong_answer", f"asked '{self.spec.question}' it said: {(content or reasoning)[:200]!r}"
        )

    def _stream(self, talk: Talk, path: str, token: str) -> tuple[float, Optional[float]]:
        """Return the seconds to the first token and the tokens per second after it."""
        streamed = read_stream(
            talk, path, self._body(ANSWER_TOKENS), token=token, timeout_s=self.spec.timeout_s
        )
        if streamed.first_s is None:
            raise RefusedError("wrong_answer", "the streamed completion is empty")
        return streamed.first_s, streamed.tokens_per_s

    def failed(self, state: str, message: str) -> dict[str, Any]:
        """Return the result of a gate that was not passed; out of memory with the plan's terms beside."""
        log = self.log()
        measured = measured_memory(log)
        sentence = memory_sentence(self.spec.plan, measured) if state == "out_of_memory" else ""
        result = {
            "ok": False,
            "state": state,
            "message": self.hide(message) + (f". {sentence}" if sentence else ""),
            "answer": None,
            "first_token_s": None,
            "tokens_per_s": None,
            "measured": measured,
            "log_tail": [line for line in log if not _NOISE.search(line)][-LOG_TAIL_LINES:],
        }
        if state == "out_of_memory":
            result["planned"] = planned_memory(self.spec.plan)
        return result


def wait_ready(
    spec: GateSpec, *, since: Optional[float] = None, restarts: Optional[int] = None
) -> dict[str, Any]:
    """Wait for the service and return the gate result; never raises for what the service does wrong."""
    try:
        return Gate(
            spec, since=since if since is not None else last_start(spec.service), restarts=restarts
        ).wait()
    except FleetfitError as error:
        return {
            "ok": False,
            "state": "refused",
            "message": str(error),
            "answer": None,
            "first_token_s": None,
            "tokens_per_s": None,
            "measured": {},
            "log_tail": [],
        }


def gate_of_release(paths: HostPaths, service: str, digest: str) -> GateSpec:
    """Return the gate that a release was written with."""
    return parse_gate(
        service,
        read_release(paths, service, digest)["gate"],
        read_settings(paths, service, digest),
        read_plan(paths, service, digest),
    )
