"""Hosts that serve with vLLM: the lab's gpu-large as its users find it, and a host of our own with LoRA adapters.

The GPUs are simulated and vLLM is its build for the CPU. gpu-large must be deployed (`make lab`); it is only asked.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from .. import openai_checks as checks
from ..adapters import listed, write_gguf, write_peft
from .conftest import Fleet, Host

LARGE = Host("gpu-large")
MODEL = "smollm2-135m-instruct"
NAME = "e2e-vllm"
NAMES = ("curt", "tone")
ADMIN = "admin@fleetfit.internal"
PORTS = {"vllm": 8101, "open-webui": 3000}
# One request from the host itself, with the key that lies there: it is in no command line.
REQUEST = """
import json, sys, urllib.error, urllib.request
asked = json.load(sys.stdin)
headers = {"Content-Type": "application/json"}
if asked["key_file"]:
    headers["Authorization"] = "Bearer " + open(asked["key_file"]).read().strip()
if asked["token"]:
    headers["Authorization"] = "Bearer " + asked["token"]
if asked["password_file"]:
    asked["body"]["password"] = open(asked["password_file"]).read().strip()
data = None if asked["body"] is None else json.dumps(asked["body"]).encode()
try:
    with urllib.request.urlopen(urllib.request.Request(asked["url"], data, headers), timeout=600) as answer:
        print(answer.read().decode())
except urllib.error.HTTPError as error:
    print(json.dumps({"status": error.code, "detail": error.read().decode()}))
"""


def request(
    host: Host, service: str, path: str, body: Mapping[str, Any] | None = None, **secrets: str
) -> Any:
    """Return what a service of a host answers, as data where it is JSON."""
    asked = {
        "url": f"http://127.0.0.1:{PORTS[service]}{path}",
        "body": None if body is None else dict(body),
        **dict.fromkeys(("key_file", "password_file", "token")),
        **secrets,
    }
    script = f"echo {shlex.quote(json.dumps(asked))} | python3 -c {shlex.quote(REQUEST)}"
    text = host.run(script, timeout_s=700)
    try:
        return json.loads(text)
    except ValueError:
        return text


def asker(host: Host) -> checks.Ask:
    """Return a function that asks the host's vLLM with its key."""
    key_file = "/etc/fleetfit/credentials/vllm.api-key"
    return lambda path, body: request(host, "vllm", path, body, key_file=key_file)


def test_the_right_answer_through_vllms_api() -> None:
    checks.check_completion(asker(LARGE), MODEL)


def test_the_right_answer_through_open_webui() -> None:
    signed_in = request(
        LARGE,
        "open-webui",
        "/api/v1/auths/signin",
        {"email": ADMIN},
        password_file="/etc/fleetfit/credentials/open-webui.admin-password",
    )
    token = signed_in["token"]

    def ask(path: str, body: Mapping[str, Any] | None) -> Any:
        return request(LARGE, "open-webui", path.replace("/v1/chat", "/api/chat"), body, token=token)

    assert MODEL in {item["id"] for item in ask("/api/models", None)["data"]}
    checks.check_completion(ask, MODEL)


def test_a_named_function_is_called() -> None:
    checks.check_tool_call(asker(LARGE), MODEL)


def test_an_answer_follows_a_json_schema() -> None:
    checks.check_json_schema(asker(LARGE), MODEL)


def test_a_beginning_that_was_read_before_is_not_computed_again() -> None:
    checks.check_prefix_cache(asker(LARGE), MODEL)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters as their makers left them, on the controller; one of them is for another model."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES, 1):
        write_peft(folder / name, seed)
    write_peft(folder / "other", 3, base="Qwen/Qwen2.5-0.5B-Instruct")
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf/curt.gguf", 1)
    return folder


def settings(files: Path, *names: str) -> dict[str, Any]:
    return {
        "fleetfit_engine": "vllm",
        "fleetfit_min_context_tokens": 1024,
        "fleetfit_lora_adapters": [listed(name, files / name, "safetensors") for name in names],
    }


@pytest.fixture(scope="module")
def host(start_host: Callable[..., Host], fleet: Fleet, files: Path) -> Host:
    """Return a host of our own on which the main job has brought vLLM with two adapters."""
    fleet.hosts[:] = [NAME]
    started = start_host(NAME, profile="rtx-4090", layer="vllm")
    played = fleet.play(timeout_s=1800, **settings(files, *NAMES))
    assert played.returncode == 0, played.output[-4000:]
    return started


def current(host: Host) -> str:
    return host.run("readlink /opt/fleetfit/vllm/current; systemctl show vllm.service -p MainPID")


@pytest.mark.slow
def test_adapters_are_chosen_by_name(host: Host) -> None:
    checks.check_adapters(asker(host), MODEL, NAMES)


@pytest.mark.slow
def test_a_release_holds_its_adapters(host: Host) -> None:
    """Linked in the release, kept by the pruning of models, readable for the service alone."""
    for name in NAMES:
        directory = host.run(f"readlink /opt/fleetfit/vllm/current/adapter-{name}")
        assert directory.startswith(f"/var/lib/fleetfit/models/{MODEL}/adapter-{name}-")
        assert host.run(f"stat -c '%a %U:%G' {directory}/adapter_model.safetensors") == (
            "640 root:fleetfit-models"
        )


@pytest.mark.slow
def test_second_run_changes_nothing(host: Host, fleet: Fleet, files: Path) -> None:
    before = current(host)
    played = fleet.play(timeout_s=1800, **settings(files, *NAMES))
    assert played.returncode == 0, played.output[-4000:]
    assert played.recap()[NAME]["changed"] == 0, played.output[-4000:]
    assert current(host) == before


@pytest.mark.slow
def test_an_adapter_of_another_model_never_stops_the_engine(host: Host, fleet: Fleet, files: Path) -> None:
    before = current(host)
    played = fleet.play(timeout_s=1800, **settings(files, *NAMES, "other"))
    assert played.returncode != 0
    assert "Qwen/Qwen2.5-0.5B-Instruct" in played.text
    assert current(host) == before


@pytest.mark.slow
def test_an_adapter_in_llama_cpps_format_rules_vllm_out(host: Host, fleet: Fleet, files: Path) -> None:
    before = current(host)
    wanted = {
        **settings(files),
        "fleetfit_lora_adapters": [listed("curt", files / "gguf", "gguf")],
    }
    played = fleet.play(timeout_s=1800, **wanted)
    assert played.returncode != 0
    assert "vllm reads adapters in safetensors" in played.text
    assert current(host) == before
