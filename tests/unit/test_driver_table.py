"""Promises of plugin_utils.driver_table: every host has a row, every reason and problem its sentence."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.plugin_utils.driver_table import (
    COLUMNS,
    NO_FACTS,
    drivers_json,
    drivers_text,
    host_row,
)

from .driver_hosts import NVIDIA, Host, modinfo

OLD, NEW = "6.1.0-41-amd64", "6.1.0-42-amd64"
BRANCHES = {
    "580": {"end_of_life": "2028-06-30", "supported": True},
    "550": {"end_of_life": None, "supported": False},
}


@pytest.fixture
def well(tmp_path: Path) -> dict[str, Any]:
    """Return the driver facts of a host with two cards that is as it should be."""
    host = Host(tmp_path)
    for address in ("0000:01:00.0", "0000:02:00.0"):
        host.card("10de:2684", address)
    for name in ("libnvidia-ml1", "nvidia-kernel-open-dkms"):
        host.package(name, "580.95.05-1", maintainer=NVIDIA, status="hold ok installed")
    host.kernel(OLD, running=True)
    host.dkms("580.95.05", OLD, module="nvidia")
    host.loaded("580.95.05")
    host.tools["modinfo"] = modinfo({OLD: "580.95.05"})
    return host.state(branches=BRANCHES)


def cells(state: dict[str, Any] | None) -> dict[str, str]:
    return dict(zip(COLUMNS, host_row("gpu-1", state), strict=True))


def test_a_host_that_is_as_it_should_be(well: dict[str, Any]) -> None:
    assert cells(well) == {
        "host": "gpu-1",
        "GPUs": "2x GeForce RTX 4090",
        "loaded": "580.95.05 open",
        "installed": "580.95.05 open",
        "newer": "-",
        "source": "nvidia",
        "held": "yes",
        "branch until": "2028-06-30",
        "Secure Boot": "none",
        "kernels with module": "1 of 1",
        "reboot": "no",
    }


def test_hosts_without_driver_and_without_an_answer_have_rows(well: dict[str, Any], tmp_path: Path) -> None:
    bare = Host(tmp_path / "bare").state()
    lines = drivers_text({"good": well, "bare": bare, "gone": None}).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["good", "bare", "gone"]
    assert lines[4].endswith(NO_FACTS)
    assert cells(bare)["GPUs"] == "none"
    assert {cells(bare)[name] for name in ("loaded", "installed", "held", "kernels with module")} == {"-"}


@pytest.mark.parametrize(
    ("candidate", "shown"),
    [("580.105.08", "580.105.08"), ("580.95.05", "-"), ("580.82.07", "-"), (None, "-")],
)
def test_only_a_newer_candidate_is_shown(well: dict[str, Any], candidate: str | None, shown: str) -> None:
    well["candidate"]["version"] = candidate
    assert cells(well)["newer"] == shown


def test_what_is_not_as_it_should_be_is_in_the_row(well: dict[str, Any]) -> None:
    well["installed"]["held"] = ["libnvidia-ml1"]
    well["secure_boot"], well["mok"] = "enabled", {"enrolled": False, "pending": False}
    well["branch_end_of_life"] = "2026-06-30"
    well["problems"] = [{"code": "driver_branch_end_of_life", "message": "m", "remedy": "r", "device": None}]
    well["reboot_reasons"] = [{"code": "driver_mismatch", "message": "Loaded is not installed."}]
    row = cells(well)
    assert row["held"] == "1 of 2"
    assert row["Secure Boot"] == "on, key not enrolled"
    assert row["branch until"] == "2026-06-30 (over)"
    assert row["reboot"] == "yes"
    well["installed"]["held"] = []
    well["mok"]["pending"] = True
    well["branch_end_of_life"], well["branch_supported"] = None, False
    row = cells(well)
    assert (row["held"], row["Secure Boot"], row["branch until"]) == ("no", "on, key pending", "over")


def test_kernels_reasons_and_problems_follow_the_table(well: dict[str, Any]) -> None:
    new = copy.deepcopy(well["kernels"][0])
    new.update(release=NEW, running=False, dkms="failed", dkms_error="nv.c:1: error: no", module_version=None)
    well["kernels"][0]["newest"] = False
    well["kernels"].append(new)
    well["reboot_reasons"] = [{"code": "kernel_outdated", "message": "Kernel 42 is installed."}]
    well["problems"] = [
        {"code": "dkms_failed", "message": "It failed.", "remedy": "Read the log.", "device": None}
    ]
    text = drivers_text({"gpu-1": well})
    assert f"gpu-1: kernel {OLD} (running, headers): 580.95.05, DKMS installed\n" in text
    assert f"gpu-1: kernel {NEW} (newest, headers): no module, DKMS failed: nv.c:1: error: no\n" in text
    assert "gpu-1: reboot: Kernel 42 is installed.\n" in text
    assert text.endswith("gpu-1: problem dkms_failed: It failed. Read the log.")
    assert cells(well)["kernels with module"] == "1 of 2"


def test_the_json_is_the_facts_of_every_host(well: dict[str, Any]) -> None:
    document = json.loads(drivers_json({"gpu-1": well, "gone": None}))
    assert document == {"schema_version": 1, "hosts": {"gpu-1": well, "gone": None}}
