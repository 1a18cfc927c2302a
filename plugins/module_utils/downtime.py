"""How long a switch to another release keeps a service from answering.

Two releases do not fit into the memory together: the old one is stopped before the new one loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

SERVICES = {"llama_cpp": "llama-server", "vllm": "vllm"}
# A SATA 3 link carries at most 600 MB/s (8b/10b on 6 Gbit/s), a disk behind it less: what a host has at least.
# Faster disks were seen to load 1.4 GB/s into vLLM (305.8 GiB in 226.5 s, a public log of version 0.2x).
READ_BYTES_PER_S = 500e6
# What vLLM does after the weights are there: profile, compile, capture graphs. Seen 40 to 91 s in public logs of
# an H100 and smaller cards without a cache of compiled graphs; llama.cpp has nothing like it.
START_S = {"llama_cpp": 0.0, "vllm": 90.0}


def expected_downtime(
    deployment: Mapping[str, Any], last_starts: Optional[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return ``seconds`` (None where unknown), ``basis`` and ``source`` of a switch to ``deployment``.

    ``last_starts`` is the fact fleetfit_last_start: service → what its last good start took, for services that
    have a release. ``basis``: ``none`` nothing serves yet, ``measured``, ``estimated`` or ``unknown``.
    """
    if not last_starts:
        return {"seconds": 0.0, "basis": "none", "source": "nothing serves on this host yet"}
    engine = str(deployment.get("engine"))
    last = last_starts.get(SERVICES.get(engine, "")) or {}
    if isinstance(last.get("ready_s"), (int, float)):
        seconds = float(last["ready_s"]) + float(last.get("stop_s") or 0.0)
        return {"seconds": round(seconds, 1), "basis": "measured", "source": "this host's last good start"}
    sizes = [item.get("size") for item in deployment.get("files") or ()]
    if engine not in START_S or not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        return {"seconds": None, "basis": "unknown", "source": "the size of the model is not known"}
    seconds = sum(sizes) / READ_BYTES_PER_S + START_S[engine]
    source = f"the model's files at {READ_BYTES_PER_S / 1e6:.0f} MB/s, a SATA disk's speed"
    if START_S[engine]:
        source += f", and {START_S[engine]:.0f} s for {engine} to compile and capture graphs"
    return {"seconds": round(seconds, 1), "basis": "estimated", "source": source}


def downtime_text(downtime: Mapping[str, Any]) -> str:
    """Return an expected downtime for a table: ``12 s``, ``~12 s`` where it is estimated, ``?``, ``none``."""
    if downtime["basis"] == "none":
        return "none"
    if downtime["seconds"] is None:
        return "?"
    mark = "~" if downtime["basis"] == "estimated" else ""
    return f"{mark}{max(round(downtime['seconds']), 1)} s"
