"""What was planned for an engine's memory, beside what the engine itself logged of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .units import format_size

# The plan's terms in the order in which people add them up.
TERMS = ("weights", "kv_cache", "compute", "overhead", "margin")
# What gate.measured_memory calls the figures of an engine's log; counts of tokens are no memory.
_LOGGED = {
    "model": "model",
    "kv": "KV cache",
    "rs": "recurrent state",
    "compute": "compute",
    "output": "output",
    "lora": "LoRA",
    "model_bytes": "model",
    "kv_bytes": "KV cache",
}


def run_terms(deployment: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]]:
    """Return (devices, host) of the plan that the engine was really started with: the CPU's in the lab."""
    mapping = deployment.get("cpu_mapping")
    if mapping:
        return [], mapping.get("host") or mapping.get("memory_bytes") or {}
    return list(deployment.get("devices") or []), deployment.get("host") or {}


def planned_memory(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return ``device``, the terms, ``total`` and ``budget`` in bytes of every device of a plan, or of RAM."""
    deployments = plan.get("deployments")
    if not isinstance(deployments, list) or not deployments:
        return []
    devices, host = run_terms(deployments[0])
    rows = [(str(device.get("name") or device.get("id")), device) for device in devices]
    if not rows and host:
        rows = [("RAM", host)]
    return [
        {"device": name, **{term: int(terms.get(term) or 0) for term in (*TERMS, "total", "budget")}}
        for name, terms in rows
    ]


def memory_sentence(plan: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """Return the plan's terms and what the engine logged before it ended, for people; empty without a plan."""
    planned = planned_memory(plan)
    if not planned:
        return ""
    parts = []
    for row in planned:
        terms = " + ".join(f"{term} {format_size(row[term])}" for term in TERMS)
        parts.append(
            f"{row['device']}: {terms} = {format_size(row['total'])} of {format_size(row['budget'])}"
        )
    return f"Planned for {'; '.join(parts)}. The engine logged {_logged(measured)}."


def _logged(measured: Mapping[str, Any]) -> str:
    found = []
    for device, terms in measured.items():
        texts = [f"{label} {format_size(terms[name])}" for name, label in _LOGGED.items() if name in terms]
        if texts:
            found.append(f"{device}: {', '.join(texts)}")
    return "; ".join(found) or "no memory figures before it ended"
