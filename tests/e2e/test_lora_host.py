"""LoRA adapters on a llama.cpp host: brought, linked, asked for, and refused where they do not fit."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..adapters import listed, write_gguf
from .conftest import Fleet, Host

pytestmark = pytest.mark.slow

NAME = "e2e-lora"
MODEL = "smollm2-135m-instruct"
NAMES = ("curt", "tone")
ASK = """
import json, sys, urllib.request

key = open("/etc/fleetfit/credentials/llama-server.api-key").read().strip()
path, body = json.loads(sys.argv[1])
data = None if body is None else json.dumps(body).encode()
headers = {"Authorization": "Bearer " + key, "Content-Type": "application/json"}
request = urllib.request.Request("http://127.0.0.1:8080" + path, data, headers)
print(urllib.request.urlopen(request, timeout=300).read().decode())
"""


def ask(host: Host, path: str, body: dict[str, Any] | None = None) -> Any:
    """Return what llama-server answers to a request from the host itself."""
    asked = shlex.quote(json.dumps([path, body]))
    return json.loads(host.run(f"python3 -c {shlex.quote(ASK)} {asked}", timeout_s=300))


def answer(host: Host, **more: Any) -> str:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"messages": messages, "max_tokens": 6, "temperature": 0, **more}
    return str(ask(host, "/v1/chat/completions", body)["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters on the controller; one says that it was made for another model, one has its shape."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in (*NAMES, "other", "wide"):
        (folder / name).mkdir()
    for seed, name in enumerate(NAMES, 1):
        write_gguf(folder / name / f"{name}.gguf", seed)
    write_gguf(folder / "other/other.gguf", 3, base="Qwen2.5-0.5B-Instruct")
    write_gguf(folder / "wide/wide.gguf", 4, layers=31)
    return folder


def settings(files: Path, *names: str) -> dict[str, Any]:
    return {
        "fleetfit_min_context_tokens": 1024,
        "fleetfit_lora_adapters": [listed(name, files / name, "gguf") for name in names],
    }


@pytest.fixture(scope="module")
def host(start_host: Callable[..., Host], fleet: Fleet, files: Path) -> Host:
    """Return a host on which the main job has brought the model with two adapters."""
    fleet.hosts[:] = [NAME]
    started = start_host(NAME)
    played = fleet.play(timeout_s=1500, **settings(files, *NAMES))
    assert played.returncode == 0, played.output[-4000:]
    return started


def current(host: Host) -> str:
    return host.run(
        "readlink /opt/fleetfit/llama-server/current; systemctl show llama-server.service -p MainPID"
    )


def test_a_request_chooses_its_adapter(host: Host) -> None:
    shown = ask(host, "/lora-adapters")
    assert [Path(item["path"]).parent.name for item in shown] == [f"adapter-{name}" for name in NAMES]
    plain = answer(host)
    assert len({plain, *(answer(host, lora=[{"id": number, "scale": 1}]) for number in (0, 1))}) == 3
    assert answer(host) == plain


def test_a_release_holds_its_adapters(host: Host) -> None:
    for name in NAMES:
        directory = host.run(f"readlink /opt/fleetfit/llama-server/current/adapter-{name}")
        assert directory.startswith(f"/var/lib/fleetfit/models/{MODEL}/adapter-{name}-")
        assert host.run(f"stat -c '%a %U:%G' {directory}/{name}.gguf") == "640 root:fleetfit-models"


def test_second_run_changes_nothing(host: Host, fleet: Fleet, files: Path) -> None:
    before = current(host)
    played = fleet.play(timeout_s=1500, **settings(files, *NAMES))
    assert played.returncode == 0, played.output[-4000:]
    assert played.recap()[NAME]["changed"] == 0, played.output[-4000:]
    assert current(host) == before


@pytest.mark.parametrize(
    ("name", "said"), [("other", "was made for Qwen2.5-0.5B-Instruct"), ("wide", "has 30 layers")]
)
def test_an_adapter_of_another_model_never_stops_the_engine(
    host: Host, fleet: Fleet, files: Path, name: str, said: str
) -> None:
    before = current(host)
    played = fleet.play(timeout_s=1500, **settings(files, *NAMES, name))
    assert played.returncode != 0
    assert said in played.text
    assert current(host) == before


def test_an_adapter_that_is_taken_out_stays_while_a_kept_release_links_to_it(
    host: Host, fleet: Fleet, files: Path
) -> None:
    played = fleet.play(timeout_s=1500, **settings(files, NAMES[0]))
    assert played.returncode == 0, played.output[-4000:]
    assert len(ask(host, "/lora-adapters")) == 1
    # What no release ever linked to is gone, the last release's adapters are not.
    left = host.run(f"ls /var/lib/fleetfit/models/{MODEL}")
    assert all(f"adapter-{name}-" in left for name in NAMES)
    assert not any(f"adapter-{name}-" in left for name in ("other", "wide"))
