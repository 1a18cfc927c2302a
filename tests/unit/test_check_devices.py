"""Promises of module_utils.check_devices: a planned GPU that is missing is named, never passed over."""

from __future__ import annotations

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.check_devices import (
    HARMLESS_PROBLEMS,
    main,
    missing_devices,
    parse_device,
    wait_for_devices,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.gpu_facts import (
    Accelerator,
    GpuFacts,
    Problem,
    health_problems,
)


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


@pytest.mark.parametrize("code", sorted(HARMLESS_PROBLEMS))
def test_a_card_that_answers_serves_whatever_its_health_is(code: str) -> None:
    """A restart of the engine must not fail since the card is hot, or logged an error some days ago."""
    problem = Problem(code, "Something to look after.", "Look after it.", "GPU-a")
    assert missing_devices(["GPU-a"], GpuFacts(accelerators=[card("GPU-a")], problems=[problem])) == []


def test_every_problem_that_a_sick_card_has_is_known_as_harmless() -> None:
    device = {
        "remapped_rows": {"failed": True},
        "ecc_uncorrected": 3,
        # nvmlClocksEventReasonHwThermalSlowdown
        "throttle": 0x40,
    }
    pending = {"remapped_rows": {"pending": True}}
    found = [*health_problems(card("GPU-a"), device, [79]), *health_problems(card("GPU-a"), pending, [])]
    codes = {problem.code for problem in found}
    assert len(codes) == 5
    assert codes <= HARMLESS_PROBLEMS


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


def holding(uuid: str, free: int | None) -> GpuFacts:
    process = {"name": "VLLM::Worker", "pid": 7, "used_bytes": 4 << 30}
    return GpuFacts(
        accelerators=[card(uuid)],
        live_devices={uuid: {"free_bytes": free, "processes": [process] if not free else []}},
    )


class Host:
    """A host whose looks are given, one after the other, and whose time is counted by its sleeps."""

    def __init__(self, *looks: GpuFacts) -> None:
        self.looks = list(looks)
        self.now = 0.0

    def look(self) -> GpuFacts:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, wanted: dict[str, int], wait_s: float) -> list[str]:
        return wait_for_devices(
            wanted, wait_s=wait_s, look=self.look, sleep=self.sleep, clock=lambda: self.now
        )


def test_memory_that_comes_back_is_waited_for() -> None:
    host = Host(holding("GPU-a", 0), holding("GPU-a", 0), holding("GPU-a", 9 << 30))
    assert host.wait({"GPU-a": 8 << 30}, 60) == []
    assert host.now == 2


def test_memory_that_does_not_come_back_fails_with_device_wanted_and_free_bytes_and_who_holds_it() -> None:
    host = Host(holding("GPU-a", 0))
    (sentence,) = host.wait({"GPU-a": 8 << 30}, 5)
    assert 5 <= host.now <= 7
    for part in ("GPU-a", "0 bytes", f"{8 << 30} bytes", "VLLM::Worker (pid 7)"):
        assert part in sentence


def test_a_missing_device_is_not_waited_for() -> None:
    host = Host(holding("GPU-a", 1))
    assert "GPU-b" in host.wait({"GPU-b": 1}, 60)[0]
    assert host.now == 0


def test_memory_that_nobody_tells_is_no_reason_to_wait() -> None:
    assert Host(holding("GPU-a", None)).wait({"GPU-a": 8 << 30}, 60) == []


def test_devices_are_written_with_or_without_bytes() -> None:
    assert parse_device("GPU-a") == ("GPU-a", 0)
    assert parse_device("MIG-b=17") == ("MIG-b", 17)
    for text in ("=5", "GPU-a=5x"):
        with pytest.raises(FleetfitError):
            parse_device(text)
