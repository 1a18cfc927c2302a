"""Whose process it is decides what memory a plan may count on."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.ownership import Ownership
from ansible_collections.fleetfit.llm.plugins.module_utils.probe_root import ProbeRoot

CONTAINER = "/machine.slice/libpod-abc.scope"


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def host(root: Path, cgroup: str, *, init: str = "0::/init.scope") -> Ownership:
    """A host with our llama-server, somebody's own vllm.service, and process 50 in `cgroup`."""
    units = "etc/systemd/system"
    write(
        root, f"{units}/llama-server.service", "[Service]\nExecStart=/opt/fleetfit/llama-server/current/run\n"
    )
    write(root, f"{units}/vllm.service", "[Service]\nExecStart=/home/me/venv/bin/vllm serve\n")
    write(root, "proc/1/cgroup", init + "\n")
    write(root, "proc/50/cgroup", cgroup + "\n")
    return Ownership(ProbeRoot(str(root)))


@pytest.mark.parametrize(
    ("cgroup", "owner"),
    [
        ("0::/system.slice/llama-server.service", "fleetfit"),
        ("0::/system.slice/llama-server.service/worker", "fleetfit"),
        ("0::/system.slice/system-llm.slice/llama-server.service", "fleetfit"),
        (
            "12:memory:/system.slice/llama-server.service\n1:name=systemd:/system.slice/llama-server.service",
            "fleetfit",
        ),
        ("0::/system.slice/fleetfit-switch-llama-server.service", "fleetfit"),
        ("0::/system.slice/vllm.service", "other"),
        ("0::/system.slice/ollama.service", "other"),
        ("0::/system.slice/my-llama-server.service", "other"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/llama-server.service", "other"),
        ("0::/system.slice/docker-abc.scope/system.slice/llama-server.service", "other"),
        ("0::/", "other"),
        ("", "other"),
        ("nonsense", "other"),
    ],
)
def test_owner_is_told_by_the_unit(tmp_path: Path, cgroup: str, owner: str) -> None:
    assert host(tmp_path, cgroup).owner(50) == owner


def test_a_container_on_cgroup_v1_has_its_own_prefix(tmp_path: Path) -> None:
    cgroup = f"1:name=systemd:{CONTAINER}/system.slice/llama-server.service"
    assert host(tmp_path, cgroup, init=f"1:name=systemd:{CONTAINER}/init.scope").owner(50) == "fleetfit"


def test_another_containers_engine_is_not_ours(tmp_path: Path) -> None:
    assert host(tmp_path, f"0::{CONTAINER}/system.slice/llama-server.service").owner(50) == "other"


def test_a_process_that_is_gone_or_in_another_namespace_is_not_ours(tmp_path: Path) -> None:
    assert host(tmp_path, "0::/").owner(4000) == "other"


@pytest.mark.parametrize(
    ("cgroup", "runs"),
    [
        ("0::/system.slice/llama-server.service", True),
        ("0::/system.slice/fleetfit-download-1.service", False),
    ],
)
def test_only_an_engine_counts_as_a_running_engine(tmp_path: Path, cgroup: str, runs: bool) -> None:
    assert host(tmp_path, cgroup).engine_runs() is runs
