"""A host whose simulated card is served by vLLM, and that goes from one engine to the other and back."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from .conftest import REPO, Fleet, Host

pytestmark = pytest.mark.slow

NAME = "e2e-engines"
SETTINGS: dict[str, Any] = {"fleetfit_min_context_tokens": 4096}
LLAMA = {**SETTINGS, "fleetfit_engine": "llama_cpp"}
VLLM = {**SETTINGS, "fleetfit_engine": "vllm"}
# Limits of memory are no way to break it here: MemoryMax= has no effect in a container under version 1 of control
# groups, and with too little address space its libraries spin for ever.
BROKEN_UNIT = "[Service]\nExecStartPre=/bin/sh -c 'echo broken by the test >&2; exit 1'\n"
BROKEN_PATH = "/etc/systemd/system/vllm.service.d/broken.conf"


@pytest.fixture(scope="module")
def host(start_host: Callable[..., Host], fleet: Fleet) -> Host:
    """Return a host that has vLLM's environment, and nothing of fleetfit else."""
    fleet.hosts[:] = [NAME]
    return start_host(NAME, profile="rtx-4090", layer="vllm")


def unit_states(host: Host) -> dict[str, tuple[str, str]]:
    """Return whether each engine runs, and whether it starts at boot."""
    return {
        unit: (
            host.raw(f"systemctl is-active {unit}").stdout.strip(),
            host.raw(f"systemctl is-enabled {unit}").stdout.strip(),
        )
        for unit in ("llama-server", "vllm")
    }


def wheelhouse(**changes: Any) -> dict[str, Any]:
    """Return the lab's wheelhouse of vLLM as the role takes it, changed."""
    entry = yaml.safe_load((REPO / ".lab/artifacts.yml").read_text())["vllm_wheelhouse"]
    arch, _, glibc = entry["platform"].partition("-glibc")
    about = {"variant": entry["variant"], "python": entry["python"], "arch": arch, "glibc": glibc}
    files = {name: entry[name] for name in ("url", "size", "sha256")}
    return {**about, **files, **changes}


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no wheelhouse": (lambda: {"vllm_wheelhouses": []}, "build --lock locks/vllm/cpu-py311.txt"),
    "wheelhouse of another variant": (
        lambda: {"vllm_wheelhouses": [wheelhouse(variant="cuda")]},
        "This host runs vLLM 0.32.0 for the CPU",
    ),
    "disk too small for two releases": (
        lambda: {"vllm_wheelhouses": [wheelhouse(sha256="0" * 64, environment_size=10**16)]},
        "GiB beside the present one, which stays until the new one has answered",
    ),
    "variant of another plan": (lambda: {"vllm_variant": "cuda"}, "the plan is for cpu"),
    "reserved port": (lambda: {"vllm_port": 80}, "vllm_port 80 is not between 1024 and 65535"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_the_host_is_touched(host: Host, fleet: Fleet, case: str) -> None:
    settings, sentence = REFUSED[case]
    before = host.files()
    played = fleet.play(**VLLM, **settings())
    assert played.returncode != 0
    assert sentence in played.text, played.text[-2000:]
    after = host.files()
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == set()


def test_one_engine_gives_way_to_the_other(host: Host, fleet: Fleet) -> None:
    played = fleet.play(timeout_s=1800, **LLAMA)
    assert played.returncode == 0, played.text[-3000:]
    assert unit_states(host)["llama-server"] == ("active", "enabled")

    # vLLM cannot start: the old engine serves again.
    folder = BROKEN_PATH.rpartition("/")[0]
    host.run(f"mkdir -p {folder} && printf %s {shlex.quote(BROKEN_UNIT)} > {BROKEN_PATH}")
    played = fleet.play(timeout_s=1800, **VLLM)
    assert played.returncode != 0
    assert "llama-server serves again" in played.text
    assert host.ready("llama-server")["ok"]
    states = unit_states(host)
    assert (states["llama-server"], states["vllm"][1]) == (("active", "enabled"), "disabled")

    host.run(f"rm -r {folder}")
    played = fleet.play(timeout_s=1800, **VLLM)
    assert played.returncode == 0, played.text[-3000:]
    assert unit_states(host) == {"llama-server": ("inactive", "disabled"), "vllm": ("active", "enabled")}
    assert "Paris" in host.ready("vllm")["answer"]


def test_a_second_run_changes_nothing_and_restarts_nothing(host: Host, fleet: Fleet) -> None:
    before = host.run("systemctl show vllm --property=InvocationID --value")
    played = fleet.play(timeout_s=1800, **VLLM)
    assert played.returncode == 0, played.text[-3000:]
    assert played.recap()[NAME]["changed"] == 0
    assert host.run("systemctl show vllm --property=InvocationID --value") == before


def test_nothing_of_it_listens_outside(host: Host) -> None:
    listening = {line.split()[3] for line in host.run("ss -H -ltn").splitlines()}
    assert "127.0.0.1:8101" in listening
    assert {
        a for a in listening if not a.startswith(("127.0.0.1:", "[::1]:")) and not a.endswith(":22")
    } == set()


def test_the_way_back_is_a_switch_too(host: Host, fleet: Fleet) -> None:
    played = fleet.play(timeout_s=1800, **LLAMA)
    assert played.returncode == 0, played.text[-3000:]
    assert unit_states(host) == {"llama-server": ("active", "enabled"), "vllm": ("inactive", "disabled")}
    assert host.ready("llama-server")["ok"]
