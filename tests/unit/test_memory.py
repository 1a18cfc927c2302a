"""Budgets, margins and the terms of the plan's memory."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.memory import (
    DeviceBudget,
    Estimate,
    HostBudget,
    MemoryTerms,
    calibrated_margin_bytes,
    device_margin_bytes,
    terms_from_dict,
)

MIB = 1 << 20
GIB = 1 << 30


def device(total_mib: int = 12288, **more: Any) -> DeviceBudget:
    return DeviceBudget("GPU-1", "RTX 3060", total_mib * MIB, **more)


def test_the_budget_is_total_less_reserved_foreign_and_reserve() -> None:
    card = device(reserved_bytes=382 * MIB, foreign_bytes=512 * MIB, reserve_bytes=100 * MIB)
    assert card.budget == (12288 - 382 - 512 - 100) * MIB
    assert card.usable_bytes == 11906 * MIB
    assert device(foreign_bytes=99999 * MIB).budget == 0


def test_unified_memory_leaves_the_system_its_share() -> None:
    assert device(65536, memory_kind="unified").budget == (65536 - 8192) * MIB
    assert device(131072, memory_kind="unified").budget == 131072 * MIB - int(0.1 * 131072 * MIB)


@pytest.mark.parametrize(
    ("total_mib", "display", "margin_mib"),
    [(6144, False, 512), (12288, False, 614), (24576, False, 1024), (81920, False, 1024), (6144, True, 1024)],
)
def test_the_margin_is_five_percent_within_limits(total_mib: int, display: bool, margin_mib: int) -> None:
    assert device_margin_bytes(total_mib * MIB, display=display) // MIB == margin_mib


def test_calibration_replaces_overhead_and_margin() -> None:
    card = device().with_calibration(overhead_bytes=300 * MIB, residual_bytes=-20 * MIB)
    assert (card.overhead, card.margin) == (300 * MIB, 256 * MIB)
    assert calibrated_margin_bytes(200 * MIB, display=True) == (600 + 512) * MIB
    assert device().overhead == 512 * MIB


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"total_bytes": -1}, "bad_device"),
        ({"total_bytes": 0}, "memory_not_supported"),
        ({"foreign_bytes": -5}, "bad_device"),
        ({"reserved_bytes": 1.5}, "bad_device"),
        ({"memory_kind": "warm"}, "bad_device"),
    ],
)
def test_impossible_devices_are_refused(change: dict[str, Any], code: str) -> None:
    with pytest.raises(FleetfitError) as caught:
        DeviceBudget(**{"id": "GPU-1", "name": "x", "total_bytes": GIB, **change})
    assert caught.value.code == code


def test_a_cgroup_limit_is_the_host_s_budget() -> None:
    assert HostBudget(64 * GIB, 16 * GIB).budget == 16 * GIB
    assert HostBudget(64 * GIB).budget == 64 * GIB
    assert HostBudget(64 * GIB, open_webui=True).margin - HostBudget(64 * GIB).margin == GIB


def test_terms_add_up_and_go_through_plain_data() -> None:
    terms = MemoryTerms(weights=5, kv_cache=4, compute=3, overhead=2, margin=1, budget=14)
    assert terms.total == 15
    assert terms.short_by == 1
    assert not terms.fits
    assert list(terms.as_dict()) == [
        "weights",
        "kv_cache",
        "compute",
        "overhead",
        "margin",
        "total",
        "budget",
    ]
    assert terms_from_dict(terms.as_dict()) == terms
    assert (terms + terms).as_dict()["total"] == 30


def test_an_estimate_names_the_place_that_is_most_short() -> None:
    tight = MemoryTerms(weights=10, budget=8)
    worse = MemoryTerms(weights=10, budget=2)
    roomy = MemoryTerms(weights=10, budget=20)
    assert Estimate((tight, worse), roomy, ("a", "b")).worst == ("b", 8)
    assert Estimate((roomy,), tight, ("a",)).worst == (None, 2)
    fitting = Estimate((roomy,), roomy, ("a",))
    assert fitting.fits
    assert fitting.worst == (None, 0)
    assert fitting.total.as_dict()["budget"] == 40
