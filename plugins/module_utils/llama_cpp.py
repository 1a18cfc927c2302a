"""What the role llama_cpp asks of llama.cpp's own tools before it switches to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .engine_args import llama_memory_args
from .units import MIB

# llama-fit-params prints model, context and compute as whole MiB each (llama.cpp, common/fit.cpp).
FIT_ROUNDING_BYTES = 3 * MIB
# llama.cpp's names: main memory is one line, GPUs count from 0 in the order of CUDA_VISIBLE_DEVICES.
HOST_LINE = "Host"
DEVICE_LINE = "CUDA{index}"


def _allowed_bytes(terms: Mapping[str, Any]) -> int:
    """Return what the plan grants the engine itself (contracts.md §4): the total without the margin."""
    return int(terms["total"]) - int(terms["margin"]) + FIT_ROUNDING_BYTES


def fit_precheck(
    settings: Mapping[str, Any],
    *,
    devices: Sequence[Mapping[str, Any]],
    host: Mapping[str, Any],
    binary: str,
    model_path: str,
) -> dict[str, Any]:
    """Return the precheck (contracts.md §7) that lets llama.cpp itself account for a plan's settings.

    ``devices`` and ``host`` are the plan's memory terms in bytes, the devices in the order in which the
    engine sees them. Raises FleetfitError for settings that are not complete.
    """
    limits = {DEVICE_LINE.format(index=index): _allowed_bytes(terms) for index, terms in enumerate(devices)}
    limits[HOST_LINE] = _allowed_bytes(host)
    argv = [binary, "-m", model_path, *llama_memory_args(settings), "--fit-print", "on"]
    return {"kind": "llama_fit_params", "argv": argv, "limits": limits}
