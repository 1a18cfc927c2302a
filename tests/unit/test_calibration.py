"""Measurements become records: the largest overhead and the largest residual seen, never of a simulation."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.calibration import (
    find_record,
    measurement,
    measurements_of_host,
    records_of,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.units import MIB

PREDICTED = {"weights": 1000 * MIB, "kv_cache": 200 * MIB, "compute": 300 * MIB}


def measured(total_mib: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "engine": "llama_cpp",
        "engine_version": "1",
        "gpu": "card",
        "model": "m",
        "variant": "Q8_0",
        "predicted": PREDICTED,
        "measured": {"total": total_mib * MIB},
    }
    return measurement(**{**values, **changes})


def test_a_record_takes_the_largest_overhead_and_the_spread_as_residual() -> None:
    records = records_of([measured(1800), measured(1760)])
    assert len(records) == 1
    assert records[0]["count"] == 2
    assert records[0]["overhead_bytes"] == 300 * MIB
    assert records[0]["residual_bytes"] == 40 * MIB


def test_what_the_engine_logged_is_not_counted_as_overhead() -> None:
    logged = {"total": 1800 * MIB, "compute": 320 * MIB}
    assert records_of([measured(0, measured=logged)])[0]["overhead_bytes"] == 280 * MIB


def test_circumstances_are_kept_apart() -> None:
    records = records_of([measured(1800), measured(1900, gpu="other")])
    assert len(records) == 2
    circumstances = {"engine": "llama_cpp", "model": "m", "variant": "Q8_0", "engine_version": "1"}
    assert find_record(records, gpu="other", **circumstances) == records[1]
    assert find_record(records, gpu="third", **circumstances) is None


@pytest.mark.parametrize("total", [-1, True, "1", None])
def test_what_is_no_size_is_refused(total: Any) -> None:
    with pytest.raises(FleetfitError) as caught:
        measured(0, measured={"total": total})
    assert caught.value.code == "bad_measurement"


def host(owner: str = "fleetfit", mapping: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    facts = {
        "stable": {"accelerators": [{"uuid": "GPU-0", "name": "card"}]},
        "live": {"devices": {"GPU-0": {"processes": [{"pid": 1, "used_bytes": 1800 * MIB, "owner": owner}]}}},
    }
    device = {"id": "GPU-0", "name": "card", **PREDICTED, "total": 1, "margin": 0}
    deployment = {
        "engine": "llama_cpp",
        "engine_version": "1",
        "model": "m",
        "variant": "Q8_0",
        "devices": [device],
        "cpu_mapping": mapping,
    }
    return facts, {"deployments": [deployment]}


def test_a_hosts_own_processes_are_what_is_measured() -> None:
    assert records_of(measurements_of_host(*host()))[0]["overhead_bytes"] == 300 * MIB
    assert measurements_of_host(*host(owner="other")) == []


def test_simulated_gpus_measure_nothing() -> None:
    assert measurements_of_host(*host(mapping={"settings": {}})) == []
