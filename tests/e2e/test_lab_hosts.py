"""The lab's three hosts as `make lab` leaves them: each serves its own choice, and says why.

The GPUs are simulated. The hosts are only asked.
"""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest

from .conftest import BIN, REPO, Host

HOSTS = ("edge-cpu", "gpu-small", "gpu-large")


@pytest.fixture(scope="module")
def verified() -> dict[str, Any]:
    """Return what `fleetfit verify --json` says of the lab."""
    argv = [str(BIN / "fleetfit"), "verify", "-i", "inventory/lab", "--json"]
    done = subprocess.run(argv, cwd=REPO, capture_output=True, text=True, timeout=900)
    document: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == document["exit_code"] == 0, document
    return document


def test_every_host_answers(verified: dict[str, Any]) -> None:
    assert set(verified["hosts"]) == set(HOSTS)
    for name, report in verified["hosts"].items():
        assert report["state"] == "ok", name
        assert "paris" in report["answer"].lower(), name


def test_the_engines_own_apis_name_variants_that_differ(verified: dict[str, Any]) -> None:
    variants = {}
    for name, report in verified["hosts"].items():
        (check,) = [
            check for check in report["checks"] if check["name"] == "engine serves the plan's variant"
        ]
        assert check["ok"], check
        # What the engine says of itself, not what was planned.
        said = check["message"].partition("the engine says ")[2]
        assert report["variant"] in said, name
        variants[name] = report["variant"]
    assert variants["gpu-small"] == "Q4_K_M"
    assert variants["gpu-large"] == "BF16"


@pytest.mark.parametrize("name", HOSTS)
def test_the_plan_says_why(name: str) -> None:
    plan = json.loads(Host(name).run("sudo -n cat /etc/fleetfit/manifest.json"))["sections"]["plan"]
    chosen = plan["deployments"][0]
    assert chosen["variant"] in plan["reason"]
    rejected = [item["rejected"] for item in plan["candidates"] if item["rejected"]]
    assert all(item["code"] and item["reason"] for item in rejected)
    if name == "gpu-small":
        # Why not the better one.
        assert "Q8_0 would leave layers in RAM" in plan["reason"]


@pytest.mark.parametrize("name", HOSTS)
def test_only_ssh_listens_outside(name: str) -> None:
    addresses = [line.split()[4] for line in Host(name).run("ss -H -ltun").splitlines()]
    outside = [
        item for item in addresses if not item.startswith(("127.", "[::1]")) and not item.endswith(":22")
    ]
    assert outside == []
    assert addresses


@pytest.mark.parametrize("name", HOSTS)
def test_exposure_of_the_units(name: str) -> None:
    host = Host(name)
    units = [
        unit
        for unit in ("llama-server", "vllm", "open-webui")
        if not host.raw(f"systemctl -q is-active {unit}").returncode
    ]
    assert units
    for unit in units:
        last = host.run(f"systemd-analyze security --no-pager {unit}.service").splitlines()[-1]
        figure = re.search(r": ([0-9.]+)", last)
        assert figure
        assert float(figure[1]) <= 2.0, unit
