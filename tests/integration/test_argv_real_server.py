"""The plan's command line in the real llama-server: served as planned, and every rendered one accepted.

The server is the lab's own CPU build with the lab's model; plans for cards are rendered as they would run
there, and read by the same program's argument parser.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.catalog_entry import CatalogEntry
from ansible_collections.fleetfit.llm.plugins.module_utils.engine_args import llama_server_argv
from ansible_collections.fleetfit.llm.plugins.module_utils.gate import check_props
from ansible_collections.fleetfit.llm.plugins.module_utils.gguf_reader import read_gguf
from ansible_collections.fleetfit.llm.plugins.module_utils.host_view import Card, cards_of
from ansible_collections.fleetfit.llm.plugins.module_utils.plan import plan_host
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import policy_from_variables
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import NothingFitsError
from ansible_collections.fleetfit.llm.plugins.module_utils.units import GIB, MIB
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_catalog

from fleetfit.lab.engine import ensure_engine
from fleetfit.lab.model import MODEL, base_file

CATALOG = load_catalog()
KEY = "key-of-this-test"
START_S = 120


@pytest.fixture(scope="module")
def binary() -> Path:
    """The real llama-server, built once for the lab."""
    return ensure_engine().bin_dir / "llama-server"


def make_plan(entry: CatalogEntry, cards: list[Card], **variables: Any) -> dict[str, Any]:
    """Return the deployment of a model on a host with these cards and 64 GiB of RAM."""
    accelerators = [
        {
            "uuid": f"GPU-{index}",
            "index": index,
            "name": (card.nvml_names or (card.name,))[0],
            "compute_capability": card.compute_capability,
            "memory_total_bytes": card.total_mib * MIB,
            "memory_reserved_bytes": None if card.reserved_mib is None else card.reserved_mib * MIB,
            "memory_kind": card.memory_kind,
            "mig_enabled": False,
            "mig_profile": None,
            "mig_parent": None,
            "display": False,
        }
        for index, card in enumerate(cards)
    ]
    facts = {
        "schema_version": 1,
        "stable": {
            "machine_id": "0" * 32,
            "ram_total_bytes": 64 * GIB,
            "cgroup_limit_bytes": None,
            "cpu": {"threads": 2},
            "driver": {"version": "580.95.05"} if cards else None,
            "accelerators": accelerators,
        },
        "foreign_bytes": {},
        "live": {},
        "problems": [],
    }
    wanted = {"fleetfit_model": entry.id, "fleetfit_engine": "llama_cpp", "fleetfit_min_quality_tier": "rest"}
    licences = {"fleetfit_accepted_licences": [entry.licence]}
    made = plan_host(
        facts,
        policy_from_variables({**wanted, **licences, **variables}),
        entry=entry,
        gpus=CATALOG.gpus,
        engines=CATALOG.engines,
        available_engines=frozenset({"llama_cpp"}),
        require_pinned=False,
    )
    deployment: dict[str, Any] = made["deployments"][0]
    return deployment


def lab_entry(**changes: Any) -> CatalogEntry:
    """Return the lab's model with the variant that is a real file here."""
    entry = CATALOG.entry(MODEL)
    return replace(entry, variants=(entry.variant("Q4_1"),), **changes)


class Server:
    """A running llama-server."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port = port
        self.process = process
        self.log = log

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON that a path answers with."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def wait_ready(self) -> None:
        """Wait until the model is loaded."""
        end = time.monotonic() + START_S
        while True:
            try:
                self.ask("/health")
                return
            except (OSError, urllib.error.URLError):
                ended = self.process.poll()
                assert ended is None, f"llama-server ended with {ended}: {self.log.read_text()[-2000:]}"
                assert time.monotonic() < end, f"not ready in {START_S} s: {self.log.read_text()[-2000:]}"
                time.sleep(0.2)


def free_port() -> int:
    """Return a port that nobody listens on, below those that the kernel gives to outgoing connections."""
    while True:
        port = random.randrange(20000, 32000)  # noqa: S311
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@contextmanager
def serve(
    binary: Path,
    settings: Mapping[str, Any],
    tmp_path: Path,
    template: str | None,
    *,
    adapters_directory: str = "",
    more: Sequence[str] = (),
) -> Iterator[Server]:
    """Run the server with a plan's settings as the role does."""
    port = free_port()
    key_file = tmp_path / "api-key"
    key_file.write_text(KEY)
    template_file = tmp_path / "chat_template.jinja"
    if template:
        template_file.write_text(template)
    argv = llama_server_argv(
        settings,
        binary=str(binary),
        model_path=str(base_file().path),
        host="127.0.0.1",
        port=port,
        api_key_file=str(key_file),
        chat_template_file=str(template_file) if template else None,
        adapters_directory=adapters_directory,
    )
    argv += more
    log = tmp_path / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            ["nice", "env", "LLAMA_ARG_LOG_VERBOSITY=4", *argv], stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            server = Server(port, process, log)
            server.wait_ready()
            yield server
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.mark.parametrize(
    ("variables", "slot_tokens"),
    [
        ({"fleetfit_min_context_tokens": 1000, "fleetfit_slots": 3}, 1024),
        ({"fleetfit_min_context_tokens": 8192, "fleetfit_slots": 2, "fleetfit_kv_type": "q8_0"}, 8192),
    ],
)
def test_slots_and_context_are_the_plans(
    binary: Path, tmp_path: Path, variables: dict[str, Any], slot_tokens: int
) -> None:
    deployment = make_plan(lab_entry(), [], **variables)
    settings = deployment["settings"]
    with serve(binary, settings, tmp_path, deployment["chat_template"]) as server:
        props = server.ask("/props")
        assert props["total_slots"] == variables["fleetfit_slots"] == deployment["slots"]
        assert props["default_generation_settings"]["n_ctx"] == slot_tokens
        assert settings["n_ctx"] == slot_tokens * deployment["slots"]
        assert check_props(props, settings) is None
        answer = server.ask(
            "/v1/chat/completions",
            {
                "model": settings["served_model_name"],
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "max_tokens": 16,
                "temperature": 0,
            },
        )
        assert answer["choices"][0]["message"]["content"].strip()
        assert answer["model"] == MODEL


def test_a_stop_waits_no_longer_than_it_can_be_of_use(binary: Path, tmp_path: Path) -> None:
    """What the unit's short TimeoutStopSec is for: when a newer llama.cpp ends by itself then, this says so."""
    deployment = make_plan(lab_entry(), [], fleetfit_min_context_tokens=2048, fleetfit_slots=1)
    answers: list[Any] = []

    def ask(server: Server) -> None:
        try:
            messages = [{"role": "user", "content": "Tell a long story."}]
            answers.append(server.ask("/v1/chat/completions", {"messages": messages, "max_tokens": 2000}))
        except (OSError, http.client.HTTPException):
            answers.append(None)

    with serve(binary, deployment["settings"], tmp_path, deployment["chat_template"]) as server:
        client = threading.Thread(target=ask, args=(server,))
        client.start()
        while "launch_slot_" not in server.log.read_text():
            time.sleep(0.1)
        server.process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(timeout=5)
        server.process.kill()
        client.join()
    assert answers == [None]
    unit = (Path(__file__).parents[2] / "roles/llama_cpp/templates/llama-server.service.j2").read_text()
    assert "\nTimeoutStopSec=5\n" in unit


def test_yarn_serves_the_longer_context(binary: Path, tmp_path: Path) -> None:
    """Beyond the native 8192 tokens the server serves all of the plan's, and says that it stretches."""
    entry = lab_entry(extended_context_tokens=16384, rope_scaling="yarn")
    deployment = make_plan(entry, [], fleetfit_min_context_tokens=10000, fleetfit_slots=1)
    settings = deployment["settings"]
    assert settings["rope"] == {"scaling": "yarn", "scale": 2.0, "original_context_tokens": 8192}
    with serve(binary, settings, tmp_path, deployment["chat_template"]) as server:
        props = server.ask("/props")
        assert props["default_generation_settings"]["n_ctx"] == 10240 == settings["n_ctx"]
        assert check_props(props, settings) is None
        log = server.log.read_text()
        assert "custom YaRN scaling detected" in log, log[-3000:]
        assert "n_ctx_train adjusted to 16384" in log
        assert re.search(r"freq_scale\s*=\s*0\.5", log)


def test_without_yarn_the_server_would_cap_the_context(binary: Path, tmp_path: Path) -> None:
    """What the rope settings are for: when a newer llama.cpp no longer caps, this says so."""
    entry = lab_entry(extended_context_tokens=16384, rope_scaling="yarn")
    deployment = make_plan(entry, [], fleetfit_min_context_tokens=10000, fleetfit_slots=1)
    settings = {**deployment["settings"], "rope": None}
    with serve(binary, settings, tmp_path, None) as server:
        props = server.ask("/props")
        assert props["default_generation_settings"]["n_ctx"] == 8192
        assert check_props(props, settings) is not None


def test_without_a_template_of_ours_the_files_own_is_used(binary: Path, tmp_path: Path) -> None:
    """As for most models of the catalog: what a plan without a chat template serves."""
    deployment = make_plan(lab_entry(chat_template=None), [], fleetfit_slots=1)
    assert deployment["chat_template"] is None
    with serve(binary, deployment["settings"], tmp_path, None) as server:
        used = server.ask("/props")["chat_template"]
        answer = server.ask(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8},
        )
    own = read_gguf(base_file().path).metadata
    assert used.strip() == str(own["tokenizer.chat_template"]).strip()
    assert answer["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, list[str]]]:
    """All the command lines, rendered once."""
    return command_lines(tmp_path_factory.mktemp("lines"))


def command_lines(tmp_path: Path) -> list[tuple[str, list[str]]]:
    """Return (case, argv) of every catalog model on cards of several sizes, pairs and long contexts too."""
    key_file = tmp_path / "api-key"
    key_file.write_text(KEY)
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}")
    cards = [card for card in cards_of(CATALOG.gpus) if card.memory_kind == "dedicated"]
    cards.sort(key=lambda card: (card.total_mib, card.name))
    hosts = [[card] for card in cards[:: max(1, len(cards) // 3)]]
    hosts += [[cards[len(cards) // 2]] * 2, [cards[len(cards) // 3], cards[-1]]]
    found = []
    for entry in CATALOG.entries.values():
        for index, host in enumerate(hosts):
            # What differs between the other models is numbers: every second host is enough.
            if entry.family != "qwen2.5-instruct" and index % 2:
                continue
            kv_type = "q8_0" if index % 2 and "q8_0" in entry.kv_keys else "f16"
            long = index % 3 == 0
            context = entry.max_context_tokens if long else min(8192, entry.native_context_tokens)
            name = f"{entry.id} on {' + '.join(card.name for card in host)}, {context} tokens, {kv_type}"
            try:
                deployment = make_plan(
                    entry,
                    host,
                    fleetfit_min_context_tokens=context,
                    fleetfit_slots=1 + index % 3,
                    fleetfit_kv_type=kv_type,
                )
            except NothingFitsError:
                continue
            argv = llama_server_argv(
                deployment["settings"],
                binary="llama-server",
                model_path=str(tmp_path / "absent.gguf"),
                host="127.0.0.1",
                port=1,
                api_key_file=str(key_file),
                chat_template_file=str(template),
            )
            found.append((name, argv))
    return found


def test_the_real_parser_accepts_every_rendered_command_line(
    binary: Path, lines: list[tuple[str, list[str]]]
) -> None:
    """With a model that does not exist the only complaint is about the file."""
    assert len(lines) >= 40
    flags = {item for _, argv in lines for item in argv}
    assert {"--rope-scaling", "--tensor-split", "q8_0"} <= flags, "the cases are too alike"
    problems = []
    for name, argv in lines:
        said = complaint(binary, argv)
        if said is not None:
            problems.append(f"{name}: {said}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "wrong", [["--no-such-option"], ["-ctk", "q9_9"], ["-ngl", "many"], ["--rope-scaling", "rubber"]]
)
def test_the_real_parser_refuses_what_is_wrong(
    binary: Path, lines: list[tuple[str, list[str]]], wrong: list[str]
) -> None:
    """The comparison itself: one wrong argument is seen."""
    _, argv = lines[0]
    assert complaint(binary, argv) is None
    assert complaint(binary, [*argv, *wrong]) is not None


def complaint(binary: Path, argv: list[str]) -> str | None:
    """Return what the server says against the arguments; None where it only misses the model's file."""
    # A port of the kernel's choice: it listens before it reads the model.
    argv = [str(binary), *argv[1:]]
    argv[argv.index("--port") + 1] = "0"
    done = subprocess.run(["nice", *argv], capture_output=True, text=True, timeout=60, check=False)
    text = done.stdout + done.stderr
    bad = re.search(r"^error.*|.*(?:invalid argument|is deprecated|been removed).*", text, re.MULTILINE)
    if "failed to open GGUF file" in text and bad is None:
        return None
    return bad.group() if bad else text[-500:]
