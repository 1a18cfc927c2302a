"""The lab's simulated libnvidia-ml.so.1, asked by the real nvidia-ml-py: it must answer as a driver does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
LAB = CHECKOUT / "lab/nvml"
PROFILES = sorted(path.stem for path in (LAB / "profiles").glob("*.ini"))
MIB = 1024 * 1024

# Runs in a process of its own: pynvml keeps one library per process.
ASK = r"""
import ctypes, json, sys
import pynvml
from ansible_collections.fleetfit.llm.plugins.module_utils.nvml import Reader

missing = set()
lookup = pynvml._nvmlGetFunctionPointer
def recording(name):
    try:
        return lookup(name)
    except pynvml.NVMLError:
        missing.add(name)
        raise
pynvml._nvmlGetFunctionPointer = recording
reading = Reader(pynvml, sys.argv[1]).read()

def tried(name, *arguments):
    try:
        value = getattr(pynvml, name)(*arguments)
    except pynvml.NVMLError as error:
        return {"error": error.value}
    if isinstance(value, ctypes.Structure):
        return {field: getattr(value, field) for field, *_ in value._fields_}
    return value if isinstance(value, (int, str, list, tuple, type(None))) else repr(value)

extra = {}
if reading["devices"] and not reading["devices"][0]["error"]:
    pynvml.nvmlInit()
    first = pynvml.nvmlDeviceGetHandleByIndex(0)
    uuid = reading["devices"][0]["uuid"]
    extra = {
        "v1": tried("nvmlDeviceGetMemoryInfo", first),
        "v2": tried("nvmlDeviceGetMemoryInfo", first, pynvml.nvmlMemory_v2),
        "by_uuid": tried("nvmlDeviceGetName", pynvml.nvmlDeviceGetHandleByUUID(uuid)),
        "unknown_uuid": tried("nvmlDeviceGetHandleByUUID", "GPU-nobody"),
        "index_too_high": tried("nvmlDeviceGetHandleByIndex", 99),
        "pci": tried("nvmlDeviceGetPciInfo", first),
        "attributes": tried("nvmlDeviceGetAttributes", first),
        "gpu_instance": tried("nvmlDeviceGetGpuInstanceId", first),
        "display_mode": tried("nvmlDeviceGetDisplayMode", first),
        "persistence": tried("nvmlDeviceGetPersistenceMode", first),
        "ecc": tried("nvmlDeviceGetEccMode", first),
        "events": tried("nvmlDeviceGetCurrentClocksEventReasons", first),
        "virtualization": tried("nvmlDeviceGetVirtualizationMode", first),
        "nvml": tried("nvmlSystemGetNVMLVersion"),
        "topology": tried("nvmlDeviceGetTopologyCommonAncestor", first, first),
    }
    pynvml.nvmlShutdown()
print(json.dumps({"reading": reading, "extra": extra, "missing": sorted(missing)}))
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the library with the script that the lab uses."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is needed to build the simulated library")
    out = tmp_path_factory.mktemp("nvml")
    subprocess.run([str(LAB / "build"), str(out)], check=True)
    return out / "libnvidia-ml.so.1"


def ask(library: Path, profile: Path, **environment: str) -> dict[str, Any]:
    """Ask the library everything, as a host with `profile`."""
    env = {
        **os.environ,
        "PYTHONPATH": str(CHECKOUT / "collections"),
        "FLEETFIT_LAB_NVML_PROFILE": str(profile),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(library)],
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def sections(profile: Path, name: str) -> list[dict[str, str]]:
    """Return the keys of a profile's sections called `name`."""
    found: list[dict[str, str]] = []
    keys: dict[str, str] = {}
    for line in profile.read_text().splitlines():
        if line.startswith("["):
            keys = {}
            if line == f"[{name}]":
                found.append(keys)
        elif "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            keys[key.strip()] = value.strip()
    return found


def profile_path(name: str) -> Path:
    return LAB / "profiles" / f"{name}.ini"


@pytest.mark.parametrize("name", [n for n in PROFILES if n not in ("fault-hang", "fault-crash")])
def test_every_call_of_ours_is_implemented(library: Path, name: str) -> None:
    assert ask(library, profile_path(name))["missing"] == []


@pytest.mark.parametrize(
    "name", ["rtx-3060-12gb", "t4", "rtx-4090", "2x-rtx-4090", "a100-80gb-mig", "lab-small"]
)
def test_cards_are_those_of_the_profile(library: Path, name: str) -> None:
    answer = ask(library, profile_path(name))
    reading, extra = answer["reading"], answer["extra"]
    assert (reading["error"], reading["driver_version"], reading["cuda_version"]) == (
        None,
        "580.95.05",
        "13.0",
    )
    cards = sections(profile_path(name), "gpu")
    assert len(reading["devices"]) == len(cards)
    for device, card in zip(reading["devices"], cards, strict=True):
        total, reserved = (int(card[f"memory_{key}_mib"]) * MIB for key in ("total", "reserved"))
        assert device["name"] == card["name"]
        assert device["uuid"] == card["uuid"]
        assert device["pci_bus_id"] == card["pci_bus_id"]
        assert device["pci_device_id"] == card["pci_device_id"]
        assert device["compute_capability"] == card["compute_capability"]
        assert device["memory"] == {
            "total_bytes": total,
            "reserved_bytes": reserved,
            "free_bytes": total - reserved,
            "used_bytes": 0,
        }
        assert device["display"] == (card.get("display") == "1")
    # A real driver (H100, 580.159.04): version 1 counts reserved memory as used.
    assert extra["v1"]["used"] == extra["v2"]["used"] + extra["v2"]["reserved"]
    assert extra["v1"]["free"] == extra["v2"]["free"]
    assert extra["by_uuid"] == cards[0]["name"]
    # The same codes as that driver's: NOT_FOUND, INVALID_ARGUMENT.
    assert extra["unknown_uuid"] == {"error": 6}
    assert extra["index_too_high"] == {"error": 2}
    assert extra["gpu_instance"] == {"error": 2}
    assert extra["attributes"] == {"error": 3}
    assert extra["pci"]["busId"] == cards[0]["pci_bus_id"]
    assert extra["nvml"] == "13.580.95.05"
    assert extra["ecc"] == ([1, 1] if cards[0].get("ecc") == "on" else {"error": 3})
    assert extra["persistence"] == 1
    assert extra["events"] == 0


def test_mig_instances_are_devices_of_their_own(library: Path) -> None:
    (card,) = ask(library, profile_path("a100-80gb-mig"))["reading"]["devices"]
    assert card["mig_enabled"]
    instances = sections(profile_path("a100-80gb-mig"), "mig")
    assert [i["uuid"] for i in card["instances"]] == [i["uuid"] for i in instances]
    assert [i["mig_profile"] for i in card["instances"]] == ["3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb"]
    assert [i["memory"]["total_bytes"] // MIB for i in card["instances"]] == [40448, 19968, 9728, 9728]


def test_gb10_does_not_tell_its_memory(library: Path) -> None:
    answer = ask(library, profile_path("gb10"))
    (device,) = answer["reading"]["devices"]
    assert device["memory"] is None
    assert device["memory_error"]["code"] == 3
    assert answer["extra"]["v1"] == answer["extra"]["v2"] == {"error": 3}
    assert device["addressing"] == 2


@pytest.mark.parametrize(("name", "code"), [("fault-library-mismatch", 18), ("fault-no-permission", 4)])
def test_faults_of_the_whole_driver(library: Path, name: str, code: int) -> None:
    reading = ask(library, profile_path(name))["reading"]
    assert (reading["error"]["stage"], reading["error"]["code"]) == ("init", code)


def test_a_lost_card_is_counted_and_does_not_answer(library: Path) -> None:
    devices = ask(library, profile_path("fault-gpu-lost"))["reading"]["devices"]
    assert [d["error"] and d["error"]["code"] for d in devices] == [None, 15]


def test_a_foreign_process_holds_memory(library: Path) -> None:
    (device,) = ask(library, profile_path("foreign-process"))["reading"]["devices"]
    assert device["processes"] == [{"pid": 1, "used_bytes": 3000 * MIB}]
    assert device["memory"]["used_bytes"] == 3000 * MIB


def test_no_profile_is_no_driver(library: Path, tmp_path: Path) -> None:
    reading = ask(library, tmp_path / "none.ini")["reading"]
    assert (reading["error"]["stage"], reading["error"]["code"]) == ("init", 9)


@pytest.mark.parametrize("text", ["nonsense\n", "[gpu]\nmemory = 3\ncolour = red\n", "[disk]\n"])
def test_a_broken_profile_says_which_line(library: Path, tmp_path: Path, text: str) -> None:
    profile = tmp_path / "broken.ini"
    profile.write_text(text)
    error = ask(library, profile)["reading"]["error"]
    assert re.fullmatch(
        rf"line {len(text.splitlines())} of the .*broken\.ini is not understood", error["text"]
    )


def device_plan(uuid: str) -> dict[str, Any]:
    """Return a plan's device (docs/contracts.md §4): margin, total and budget are held by nobody."""
    terms = {"weights": 900, "kv_cache": 200, "compute": 50, "overhead": 500, "margin": 700, "total": 2350}
    return {"id": uuid, "name": 'a "card" \\ ünï', **{k: v * MIB for k, v in terms.items()}, "budget": 1}


@pytest.mark.parametrize("service", ["llama-server", "vllm"])
@pytest.mark.parametrize("whole_plan", [True, False])
def test_a_running_engine_is_charged_with_its_planned_bytes(
    library: Path, tmp_path: Path, service: str, whole_plan: bool
) -> None:
    name = "2x-rtx-4090"
    _, second = (card["uuid"] for card in sections(profile_path(name), "gpu"))
    deployment = {
        "engine": "llama_cpp",
        "settings": {"rope": None, "jinja": True},
        "devices": [device_plan(second)],
    }
    plan = {"schema_version": 1, "deployments": [deployment], "candidates": []} if whole_plan else deployment
    release = tmp_path / f"opt/fleetfit/{service}/releases/abc"
    release.mkdir(parents=True)
    (release / "plan.json").write_text(json.dumps(plan))
    (release.parents[1] / "current").symlink_to("releases/abc")

    def devices() -> list[dict[str, Any]]:
        answer = ask(library, profile_path(name), FLEETFIT_LAB_ROOT=str(tmp_path))
        found: list[dict[str, Any]] = answer["reading"]["devices"]
        return found

    assert [d["memory"]["used_bytes"] for d in devices()] == [0, 0], "the engine is not running yet"
    ours = f"/system.slice/{service}.service"
    for pid, cgroup in ((77, ours), (78, ours), (9, f"/system.slice/not-{service}.service")):
        process = tmp_path / f"proc/{pid}"
        process.mkdir(parents=True)
        (process / "cgroup").write_text(f"12:memory:/\n0::{cgroup}\n")
        (process / "cmdline").write_text("engine\0--port\0")
    idle, busy = devices()
    assert idle["memory"]["used_bytes"] == 0
    assert idle["processes"] == []
    assert busy["memory"]["used_bytes"] == 1650 * MIB
    assert busy["processes"] == [{"pid": 77, "used_bytes": 1650 * MIB}]
    (tmp_path / "proc/77/cmdline").write_text("")  # a zombie holds nothing
    assert devices()[1]["processes"][0]["pid"] == 78
    (release / "plan.json").write_text('{"deployments": [{"devices": [')
    assert devices()[1]["memory"]["used_bytes"] == 0, "half a plan charges nothing"


def test_health_is_told_as_a_driver_does(library: Path) -> None:
    """Rows to be replaced (not supported before Ampere), uncorrectable errors and heat."""
    pending, failed, wrong, hot = ask(library, profile_path("fault-health"))["reading"]["devices"]
    assert pending["remapped_rows"] == {"pending": True, "failed": False}
    assert failed["remapped_rows"] == {"pending": False, "failed": True}
    assert wrong["remapped_rows"] == {"pending": False, "failed": False}
    assert [device["ecc_uncorrected"] for device in (pending, failed, wrong, hot)] == [0, 0, 3, 0]
    assert hot["throttle"] == 0x60
    (t4,) = ask(library, profile_path("t4"))["reading"]["devices"]
    assert t4["remapped_rows"] is None
