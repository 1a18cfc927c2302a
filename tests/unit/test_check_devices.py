"""Promises of module_utils.check_devices: a planned GPU that is missing is named, never passed over."""

from __future__ import annotations

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.check_devices import main, missing_devices
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.gpu_facts import Accelerator, GpuFacts, Problem


def card(uuid: str, *, mig_enabled: bool = False) -> Accelerator:
    return Accelerator(
        uuid,
        0,
        "GPU",
        "8.9",
        1,
        0,
        "dedicated",
        mig_enabled,
        None,
        None,
        False,
        "00000000:01:00.0",
        "10de:2684",
    )


def test_all_there() -> None:
    assert missing_devices(["GPU-a", "GPU-b"], GpuFacts(accelerators=[card("GPU-b"), card("GPU-a")])) == []


def test_a_missing_one_is_named_with_what_is_there() -> None:
    (sentence,) = missing_devices(["GPU-a", "GPU-b"], GpuFacts(accelerators=[card("GPU-a")]))
    assert "GPU-b" in sentence
    assert "This host has: GPU-a" in sentence


def test_a_lost_one_is_told_with_its_own_problem() -> None:
    facts = GpuFacts(
        accelerators=[card("GPU-a")],
        problems=[Problem("gpu_lost", "It fell off the bus.", "Reboot.", "GPU-a")],
    )
    assert missing_devices(["GPU-a"], facts) == [
        "The planned GPU GPU-a cannot be used. It fell off the bus. Reboot."
    ]


def test_a_broken_driver_is_the_reason() -> None:
    facts = GpuFacts(problems=[Problem("driver_library_mismatch", "The versions differ.", "Reboot.")])
    assert "The versions differ. Reboot." in missing_devices(["GPU-a"], facts)[0]


def test_the_parent_of_mig_instances_serves_nothing() -> None:
    assert missing_devices(["GPU-a"], GpuFacts(accelerators=[card("GPU-a", mig_enabled=True)]))


def test_unified_memory_is_no_reason() -> None:
    facts = GpuFacts(
        accelerators=[card("GPU-a")],
        problems=[Problem("memory_not_supported", "No memory figures.", "", "GPU-a")],
    )
    assert missing_devices(["GPU-a"], facts) == []


def test_no_uuid_is_a_mistake() -> None:
    with pytest.raises(FleetfitError, match="needs the UUIDs"):
        main([])
