"""Measured memory against predicted memory: records that planning prefers over constants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Optional

from .errors import FleetfitError
from .memory import CUDA_OVERHEAD_BYTES, DeviceBudget, calibrated_margin_bytes

SCHEMA_VERSION = 1
# What identifies the circumstances of a measurement; records of other circumstances say nothing.
BUFFERS = ("weights", "kv_cache", "compute")
KEY = ("engine", "engine_version", "gpu", "model", "variant")


def measurement(
    *,
    engine: str,
    engine_version: str,
    gpu: str,
    model: str,
    variant: str,
    predicted: Mapping[str, int],
    measured: Mapping[str, int],
) -> dict[str, Any]:
    """Return one measurement: bytes predicted and measured for one device.

    ``predicted`` are the plan's terms of the device; ``measured`` has ``total`` (what the driver says the
    engine's process holds) and, where the engine logs them, ``weights``, ``kv_cache`` and ``compute``.
    Raises ``bad_measurement`` for sizes that are not bytes.
    """
    for name, terms in (("predicted", predicted), ("measured", measured)):
        for term, value in terms.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise _bad(f"{name} {term} is {value!r}, which is not a size in bytes")
    for term in BUFFERS:
        if term not in predicted:
            raise _bad(f"the predicted {term} is missing")
    if "total" not in measured:
        raise _bad("the measured total is missing")
    return {
        "engine": engine,
        "engine_version": engine_version,
        "gpu": gpu,
        "model": model,
        "variant": variant,
        "predicted": dict(predicted),
        "measured": dict(measured),
    }


def measurements_of_host(facts: Mapping[str, Any], plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the measurements that a host's live facts and its plan make: one per device that holds an
    engine.

    What the driver says of our own processes is the measured total. A host with simulated GPUs gives none:
    what a simulation charges was not measured.
    """
    live = (facts.get("live") or {}).get("devices") or {}
    names = {item["uuid"]: item["name"] for item in facts["stable"].get("accelerators") or ()}
    found = []
    for deployment in plan.get("deployments") or ():
        if deployment.get("cpu_mapping") is not None:
            continue
        for device in deployment.get("devices") or ():
            processes = (live.get(device["id"]) or {}).get("processes") or ()
            used = sum(
                item["used_bytes"]
                for item in processes
                if item.get("owner") == "fleetfit" and isinstance(item.get("used_bytes"), int)
            )
            if not used:
                continue
            found.append(
                measurement(
                    engine=deployment["engine"],
                    engine_version=deployment["engine_version"],
                    gpu=names.get(device["id"], device["name"]),
                    model=deployment["model"],
                    variant=deployment["variant"],
                    predicted={name: device[name] for name in (*BUFFERS, "total", "margin")},
                    measured={"total": used},
                )
            )
    return found


def overhead_of(item: Mapping[str, Any]) -> int:
    """Return what the process holds beside model, cache and compute, in bytes: the overhead that was real.

    Where the engine logged its buffers they are taken from the total, else the predicted ones.
    """
    measured, predicted = item["measured"], item["predicted"]
    buffers = sum(measured.get(term, predicted[term]) for term in BUFFERS)
    return max(0, int(measured["total"]) - int(buffers))


def records_of(measurements: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one record per set of circumstances: the largest overhead seen, and the largest residual.

    The residual of a measurement is |total measured - (predicted buffers + the record's overhead)|.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for item in measurements:
        groups.setdefault(tuple(str(item[name]) for name in KEY), []).append(item)
    records = []
    for key in sorted(groups):
        items = groups[key]
        overhead = max(overhead_of(item) for item in items)
        residual = max(
            abs(
                int(item["measured"]["total"])
                - sum(int(item["predicted"][term]) for term in BUFFERS)
                - overhead
            )
            for item in items
        )
        records.append(
            {
                **dict(zip(KEY, key)),
                "count": len(items),
                "overhead_bytes": overhead,
                "residual_bytes": residual,
            }
        )
    return records


def find_record(
    records: Sequence[Mapping[str, Any]],
    *,
    engine: str,
    engine_version: str,
    gpu: str,
    model: str,
    variant: str,
) -> Optional[Mapping[str, Any]]:
    """Return the record of exactly these circumstances, or None."""
    wanted = (engine, engine_version, gpu, model, variant)
    for item in records:
        if tuple(item[name] for name in KEY) == wanted:
            return item
    return None


def calibrated(
    device: DeviceBudget, record: Optional[Mapping[str, Any]]
) -> tuple[DeviceBudget, Optional[str]]:
    """Return the device with the record's overhead and margin, and the sentence that says so; else as it
    was."""
    if record is None:
        return device, None
    margin = calibrated_margin_bytes(int(record["residual_bytes"]), display=device.display)
    changed = replace(device, overhead_bytes=int(record["overhead_bytes"]), margin_bytes=margin)
    times = "once" if record["count"] == 1 else f"{record['count']} times"
    return changed, (
        f"calibrated: measured {times} with {record['engine']} {record['engine_version']} on {record['gpu']} "
        f"(constant overhead would be {CUDA_OVERHEAD_BYTES >> 20} MiB)"
    )


def _bad(problem: str) -> FleetfitError:
    return FleetfitError(
        f"A memory measurement cannot be used: {problem}.",
        code="bad_measurement",
        remedy="Measure again with `fleetfit verify`, or remove the record.",
    )
