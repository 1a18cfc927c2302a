"""LoRA adapters in the real llama-server: chosen by a request, counted as planned, and never there unasked.

The adapters are drawn from a seed: with one of them the model talks nonsense, the same each time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.engine_args import llama_lora_args
from ansible_collections.fleetfit.llm.plugins.module_utils.gate import measured_memory
from ansible_collections.fleetfit.llm.plugins.module_utils.lora import check_files
from ansible_collections.fleetfit.llm.plugins.module_utils.units import MIB

from fleetfit.lab.engine import ensure_engine
from fleetfit.lab.model import base_file

from ..adapters import listed, write_gguf
from .test_argv_real_server import Server, lab_entry, make_plan, serve

NAMES = ("curt", "tone")


@pytest.fixture(scope="module")
def binary() -> Path:
    """The real llama-server, built once for the lab."""
    return ensure_engine().bin_dir / "llama-server"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a release, as far as it links to adapters."""
    release = tmp_path_factory.mktemp("release")
    for seed, name in enumerate(NAMES, 1):
        (release / f"adapter-{name}").mkdir()
        write_gguf(release / f"adapter-{name}/{name}.gguf", seed)
    return release


@pytest.fixture(scope="module")
def deployment(adapters: Path) -> dict[str, Any]:
    """The plan of a host without GPUs that serves the model with both adapters."""
    wanted = [listed(name, adapters / f"adapter-{name}", "gguf") for name in reversed(NAMES)]
    return make_plan(
        lab_entry(), [], fleetfit_lora_adapters=wanted, fleetfit_min_context_tokens=1024, fleetfit_slots=1
    )


@pytest.fixture(scope="module")
def server(
    binary: Path, deployment: dict[str, Any], adapters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The server as the role starts it."""
    template, folder = deployment["chat_template"], tmp_path_factory.mktemp("server")
    with serve(binary, deployment["settings"], folder, template, adapters_directory=str(adapters)) as running:
        yield running


def answer(server: Server, **more: Any) -> str:
    body = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 8,
        "temperature": 0,
        **more,
    }
    return str(server.ask("/v1/chat/completions", body)["choices"][0]["message"]["content"])


def test_a_request_chooses_its_adapter_and_the_others_are_answered_by_the_model(server: Server) -> None:
    """Ids are in the order of the names, and the name is in the path that the server shows."""
    shown = server.ask("/lora-adapters")
    assert [Path(item["path"]).parent.name for item in shown] == ["adapter-curt", "adapter-tone"]
    assert [(item["id"], item["scale"]) for item in shown] == [(0, 0.0), (1, 0.0)]
    plain = answer(server)
    assert plain.strip()
    curt = answer(server, lora=[{"id": 0, "scale": 1.0}])
    tone = answer(server, lora=[{"id": 1, "scale": 1.0}])
    assert len({plain, curt, tone}) == 3
    assert answer(server) == plain
    assert answer(server, lora=[{"id": 0, "scale": 1.0}]) == curt


def test_the_adapters_take_what_was_planned(
    server: Server, deployment: dict[str, Any], adapters: Path
) -> None:
    """The server's own figures: LoRA buffers are counted, and nothing else grows with them."""
    measured = [
        float(mib) for mib in re.findall(r"LoRA buffer size = +([0-9.]+) MiB", server.log.read_text())
    ]
    files = [item.stat().st_size for item in adapters.rglob("*.gguf")]
    assert len(measured) == len(files) == 2
    assert 0.9 * sum(files) < sum(measured) * MIB <= sum(files)
    without = make_plan(lab_entry(), [], fleetfit_min_context_tokens=1024, fleetfit_slots=1)
    planned = deployment["host"]["weights"] - without["host"]["weights"]
    assert sum(files) <= planned < sum(files) + 64
    terms = measured_memory(server.log.read_text().splitlines())
    assert sum(device.get("lora", 0) for device in terms.values()) == pytest.approx(
        sum(measured) * MIB, rel=0.01
    )


def test_files_of_the_plan_are_for_the_model_that_is_served(
    deployment: dict[str, Any], adapters: Path
) -> None:
    model = base_file().path
    for item in deployment["adapters"]:
        check_files(
            item,
            str(adapters / f"adapter-{item['name']}"),
            model_directory=str(model.parent),
            model_format="gguf",
            model_file=model.name,
        )


def test_kept_prompts_would_leave_an_adapter_in_the_next_answer(
    binary: Path, deployment: dict[str, Any], adapters: Path, tmp_path: Path
) -> None:
    """What --no-cache-prompt is for: when a newer llama.cpp no longer needs it, this says so."""
    assert "--no-cache-prompt" in llama_lora_args(deployment["settings"], "")
    template = deployment["chat_template"]
    options = {"adapters_directory": str(adapters), "more": ["--cache-prompt"]}
    with serve(binary, deployment["settings"], tmp_path, template, **options) as server:
        plain = answer(server)
        answer(server, lora=[{"id": 0, "scale": 1.0}])
        assert answer(server) != plain
