"""The build of vLLM for a host: driver, compute capability and Python against the wheelhouses that are offered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.fleetfit.llm.plugins.filter.vllm_choice import FilterModule
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.vllm_wheels import (
    choose_vllm_environment,
    fitting_wheels,
    wheel_of_requirements,
    wheels_of,
)
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_catalog
from ansible_collections.fleetfit.llm.plugins.plugin_utils.wheelhouse import read_lock
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
ENGINES = load_catalog().engines
WHEELS = wheels_of(ENGINES)
ADA, TURING, VOLTA, PASCAL = ("RTX 4090", "8.9"), ("T4", "7.5"), ("V100", "7.0"), ("GTX 1080 Ti", "6.1")


def wheelhouse(variant: str | None, **changes: Any) -> dict[str, Any]:
    digest = {"cuda": "a", "cuda12": "b", "cpu": "c"}.get(variant or "", "d") * 64
    entry = {
        "variant": variant,
        "python": "3.12",
        "arch": "x86_64",
        "glibc": "2.34",
        "url": "http://mirror/vllm.tar",
        "size": 1,
        "sha256": digest,
    }
    return {**entry, **changes}


CUDA, CUDA12, CPU = wheelhouse("cuda"), wheelhouse("cuda12"), wheelhouse("cpu", python="3.11")


def chosen(wheelhouses: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    host: dict[str, Any] = {
        "system_python": "3.12.3",
        "arch": "x86_64",
        "glibc": "2.39",
        "devices": [ADA],
        "driver_version": "580.95.05",
        **changes,
    }
    archives = host.pop("archives", [])
    return choose_vllm_environment(ENGINES, wheelhouses, archives, **host)


@pytest.mark.parametrize(
    ("offered", "host", "variant", "release"),
    [
        ([CUDA, CUDA12, CPU], {}, "cuda", "0.33.0"),
        ([CUDA12, CUDA], {}, "cuda", "0.33.0"),
        # What the operator brought is used where it runs, though another would be preferred.
        ([CUDA12], {}, "cuda12", "0.33.0"),
        ([CUDA, CUDA12], {"driver_version": "550.163.01"}, "cuda12", "0.33.0"),
        ([CUDA, CUDA12], {"driver_version": "535.261.03"}, "cuda12", "0.33.0"),
        ([CUDA], {"driver_version": "610.43"}, "cuda", "0.33.0"),
        ([CUDA], {"devices": [TURING, ADA]}, "cuda", "0.33.0"),
        ([wheelhouse("cuda", release="0.32.0")], {}, "cuda", "0.32.0"),
        ([wheelhouse("cuda", release="0.32.0"), CUDA], {}, "cuda", "0.33.0"),
        ([wheelhouse("cuda", arch="aarch64")], {"arch": "aarch64"}, "cuda", "0.33.0"),
        # Simulated GPUs: the CPU's build, whatever the driver says.
        ([CUDA, CPU], {"on_cpu": True, "system_python": "3.11.2"}, "cpu", "0.32.0"),
        (
            [CPU],
            {"on_cpu": True, "system_python": "3.11.2", "devices": [], "driver_version": None},
            "cpu",
            "0.32.0",
        ),
    ],
)
def test_the_variant_that_is_chosen(
    offered: list[dict[str, Any]], host: dict[str, Any], variant: str, release: str
) -> None:
    found = chosen(offered, **host)
    assert (found["variant"], found["release"]) == (variant, release)
    assert found["environment"].startswith("/opt/fleetfit/vllm/envs/")
    # python_runtime's own keys and no others: its argument specification refuses what it does not know.
    assert not {"variant", "release"} & set(found["wheelhouse"])


@pytest.mark.parametrize(
    ("offered", "host", "code", "words"),
    [
        # Both versions: what is there, and what is needed.
        ([CUDA], {"driver_version": "470.82.01"}, "driver_too_old", ["470.82.01", "525", "0.33.0"]),
        ([CUDA], {"driver_version": None}, "driver_too_old", ["none", "525"]),
        (
            [CUDA],
            {"driver_version": "550.163.01"},
            "no_wheelhouse_of_variant",
            ["550.163.01", "cuda12", "CUDA 13.0", "580"],
        ),
        ([CUDA], {"devices": [VOLTA]}, "compute_capability_too_low", ["V100", "7.0", "7.5"]),
        ([CUDA], {"devices": [ADA, PASCAL]}, "compute_capability_too_low", ["GTX 1080 Ti", "6.1", "7.5"]),
        ([CUDA], {"devices": [("A card", None)]}, "compute_capability_too_low", ["unknown", "7.5"]),
        # A newer driver does not help an old card, so the card is what is told.
        ([CUDA], {"devices": [VOLTA], "driver_version": "470.82.01"}, "compute_capability_too_low", ["7.0"]),
        ([CUDA], {"devices": []}, "no_gpu", []),
        ([CUDA, CUDA12], {"on_cpu": True}, "no_wheelhouse_of_variant", ["cpu", "0.32.0", "locks/vllm/cpu"]),
        ([], {}, "no_wheelhouse_of_variant", ["cuda", "empty", "locks/vllm/cuda-py312.txt"]),
        ([wheelhouse("rocm")], {}, "unknown_wheel", ["rocm", "cuda12 0.33.0"]),
        ([wheelhouse(None)], {}, "unknown_wheel", ["None"]),
        ([wheelhouse("cuda", release="9.9.9")], {}, "unknown_wheel", ["9.9.9", "catalog/engines.yml"]),
        ([wheelhouse("cuda", python="3.10")], {}, "python_not_supported", ["3.10", "3.11", "3.14"]),
        ([CUDA], {"arch": "riscv64"}, "arch_not_supported", ["riscv64", "x86_64"]),
        ([CUDA], {"glibc": "2.17"}, "glibc_too_old", ["2.17", "2.28"]),
        ([CUDA], {"glibc": "2.31"}, "no_fitting_wheelhouse", ["2.31"]),
        ([CUDA], {"system_python": "3.9.2"}, "no_fitting_python", ["3.12", "3.9.2"]),
    ],
)
def test_a_wrong_pair_is_refused_with_both_versions(
    offered: list[dict[str, Any]], host: dict[str, Any], code: str, words: list[str]
) -> None:
    with pytest.raises(FleetfitError) as caught:
        chosen(offered, **host)
    assert caught.value.code == code
    text = str(caught.value)
    assert [word for word in words if word not in text] == []
    assert caught.value.remedy


def test_a_release_with_known_holes_is_refused() -> None:
    vllm = ENGINES["engines"]["vllm"]
    old = {**ENGINES, "engines": {**ENGINES["engines"], "vllm": {**vllm, "security_floor": "0.32.1"}}}
    with pytest.raises(FleetfitError, match=r"0\.32\.0 is below 0\.32\.1") as caught:
        choose_vllm_environment(
            old, [CPU], [], system_python="3.11.2", arch="x86_64", glibc="2.36", on_cpu=True
        )
    assert caught.value.code == "below_security_floor"


@given(
    older=st.integers(300, 700),
    newer=st.integers(300, 700),
    major=st.integers(5, 13),
    minor=st.integers(0, 9),
)
def test_a_newer_driver_never_takes_a_build_away(older: int, newer: int, major: int, minor: int) -> None:
    def fitting(driver: int) -> set[str]:
        try:
            found = fitting_wheels(
                WHEELS,
                arch="x86_64",
                glibc="2.36",
                devices=[("card", f"{major}.{minor}")],
                driver_version=f"{driver}.1.2",
            )
        except FleetfitError:
            return set()
        return {wheel.requirement for wheel in found}

    older, newer = sorted((older, newer))
    assert fitting(older) <= fitting(newer)


def test_every_lock_named_by_the_data_exists_and_pins_that_build() -> None:
    named = [(lock, wheel) for wheel in WHEELS for lock in wheel.locks]
    assert {Path(lock).name for lock, _ in named} == {
        path.name for path in (ROOT / "locks/vllm").glob("*-py*.txt")
    }
    for lock, wheel in named:
        requirements = [str(pin) for pin in read_lock(ROOT / lock)]
        assert wheel_of_requirements(WHEELS, requirements) == wheel


def test_the_filter_reads_the_facts_of_the_planned_gpus_only() -> None:
    stable = {
        "arch": "x86_64",
        "os": {"python": "3.12.3", "glibc": "2.39"},
        "driver": {"version": "580.95.05"},
        "accelerators": [
            {"uuid": "GPU-old", "name": "GTX 1080 Ti", "compute_capability": "6.1"},
            {"uuid": "GPU-new", "name": "RTX 4090", "compute_capability": "8.9"},
        ],
    }
    choice = FilterModule().filters()["vllm_choice"]
    found = choice(stable, wheelhouses=[CUDA], archives=[], device_uuids=["GPU-new"])
    assert found["variant"] == "cuda"
    with pytest.raises(AnsibleFilterError, match=r"GTX 1080 Ti has compute capability 6\.1"):
        choice(stable, wheelhouses=[CUDA], archives=[], device_uuids=["GPU-new", "GPU-old"])
    with pytest.raises(AnsibleFilterError, match="GPU-gone"):
        choice(stable, wheelhouses=[CUDA], archives=[], device_uuids=["GPU-gone"])
