"""Facts become budgets: hardware that breaks naive code, and problems that must not become 'no GPU'."""

from __future__ import annotations

import re
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.host_view import (
    HostView,
    find_card,
    mig_memory_slices,
    unseen_reserved_bytes,
    view_of_facts,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import Policy
from ansible_collections.fleetfit.llm.plugins.module_utils.units import GIB, MIB

from .planning import CARDS, CATALOG, accelerator, cards, facts


def view(host: dict[str, Any], **changes: Any) -> HostView:
    return view_of_facts(host, Policy(model="m", **changes), CATALOG.gpus)


def test_the_budget_is_total_minus_reserved_foreign_and_reserve() -> None:
    host = facts(cards("RTX 3060 12GB"), foreign={"GPU-0": 512 * MIB})
    found = view(host, vram_reserve_bytes=GIB).devices[0]
    assert found.budget == (12288 - 382 - 512 - 1024) * MIB


def test_threads_are_the_hosts_unless_the_policy_says_fewer() -> None:
    host = facts()
    threads = host["stable"]["cpu"]["threads"]
    assert view(host).threads == threads
    assert view(host, cpu_threads=1).threads == 1
    with pytest.raises(FleetfitError, match=f"{threads + 1}, and the host's processor has {threads} threads"):
        view(host, cpu_threads=threads + 1)


def test_reserved_that_nvml_does_not_tell_is_taken_from_the_catalog_or_above_the_largest_seen() -> None:
    known = view(facts([accelerator("RTX 3060 12GB", memory_reserved_bytes=None)])).devices[0]
    assert known.reserved_bytes == 382 * MIB
    unknown = view(facts(cards("T4"))).devices[0]
    assert unknown.reserved_bytes == 512 * MIB + int(15360 * MIB * 0.005)


@pytest.mark.parametrize(
    ("total_mib", "cuda_total_mib"),
    [
        (8192, 7817),
        (11264, 10823),
        (12288, 11906),
        (15360, 14918),
        (16376, 16072),
        (23028, 22516),
        (24564, 24080),
        (32607, 32101),
        (32768, 32480),
        (46068, 45373),
        (49140, 48790),
        (81559, 81008),
        (81920, 81038),
    ],
)
def test_what_no_log_tells_is_above_what_every_log_shows(total_mib: int, cuda_total_mib: int) -> None:
    """Totals of nvidia-smi and of CUDA in public logs; an estimate below would plan memory that is not there."""
    assert unseen_reserved_bytes(CATALOG.gpus, total_mib * MIB) >= (total_mib - cuda_total_mib) * MIB


def test_unified_memory_is_the_hosts_less_the_systems_share() -> None:
    host = facts([accelerator("GB10", memory_total_bytes=120 * GIB, memory_reserved_bytes=0)], ram_gib=120)
    found = view(host).devices[0]
    assert found.memory_kind == "unified"
    assert found.budget == 120 * GIB - 12 * GIB


def test_memory_that_is_not_told_is_refused_and_never_taken_for_unified() -> None:
    card = accelerator("RTX 4090", memory_total_bytes=None, memory_kind="unknown")
    with pytest.raises(FleetfitError, match="does not report the memory") as caught:
        view(facts([card]))
    assert caught.value.code == "unified_memory_not_recognised"
    assert view(facts([card]), use_gpus=False).devices == ()


@pytest.mark.parametrize(
    "code",
    ["driver_missing", "driver_library_mismatch", "nvml_no_permission", "gpu_lost", "memory_not_supported"],
)
def test_a_broken_driver_is_an_error_with_its_remedy_and_not_a_host_without_gpus(code: str) -> None:
    problem = {"code": code, "message": "It is broken.", "remedy": "Mend it.", "device": None}
    with pytest.raises(FleetfitError, match=r"It is broken\. Mend it\.") as caught:
        view(facts(problems=[problem]))
    assert caught.value.code == code
    assert view(facts(problems=[problem]), accepted_problems=(code,)).devices == ()
    assert view(facts(problems=[{**problem, "code": "clock_offset"}])).devices == ()


def test_a_partitioned_card_gives_its_instances_with_their_share_of_the_bandwidth() -> None:
    parent = accelerator("A100 80GB", mig_enabled=True)
    part = accelerator(
        "A100 80GB",
        uuid="MIG-1",
        name="NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        mig_profile="3g.40gb",
        mig_parent="GPU-0",
        memory_total_bytes=40192 * MIB,
        memory_reserved_bytes=0,
    )
    found = view(facts([parent, part]))
    assert [device.id for device in found.devices] == ["MIG-1"]
    assert found.devices[0].mig
    assert found.devices[0].bandwidth_bytes_per_s == pytest.approx(2039e9 / 2)


@pytest.mark.parametrize(
    ("profile", "total_gib", "slices"),
    [("1g.10gb", 80, 1), ("2g.20gb", 80, 2), ("3g.40gb", 80, 4), ("7g.80gb", 80, 8), ("1g.5gb", 40, 1)],
)
def test_memory_slices(profile: str, total_gib: int, slices: int) -> None:
    assert mig_memory_slices(profile, total_gib * GIB) == slices


def test_two_cards_of_one_name_are_told_apart_by_their_memory() -> None:
    listed = list(CARDS.values())
    found = find_card(listed, "NVIDIA A100-SXM4-80GB", 81920 * MIB)
    assert found is not None
    assert found.name == "A100 80GB"
    assert find_card(listed, "nvidia geforce rtx 4090", None) == CARDS["RTX 4090"]
    assert find_card(listed, "A card of tomorrow", None) is None


def test_an_unknown_version_of_the_facts_is_refused_by_name() -> None:
    with pytest.raises(FleetfitError, match="schema_version 2") as caught:
        view({**facts(), "schema_version": 2})
    assert caught.value.code == "facts_schema_version"


def test_the_hosts_budget_is_the_smaller_of_ram_and_limit() -> None:
    host = facts()
    host["stable"]["cgroup_limit_bytes"] = 4 * GIB
    assert view(host).host.budget == 4 * GIB


def test_every_card_has_its_sources_and_logged_clocks_give_its_bandwidth() -> None:
    listed = CATALOG.gpus["gpus"]
    assert len(listed) >= 40
    names = [name.casefold() for card in listed for name in card["nvml_names"]]
    assert len(names) == len(set(names))
    logged = 0
    for card in listed:
        assert card["memory_source"]
        assert card["source"]
        match = re.search(r"deviceQuery: (\d+) MHz x 2 x (\d+) bit", card["source"])
        if match is not None:
            logged += 1
            bandwidth = int(match.group(1)) * 2 * int(match.group(2)) / 8 / 1000
            assert card["bandwidth_gb_per_s"] == pytest.approx(bandwidth, rel=0.002), card["name"]
    assert logged >= 20
