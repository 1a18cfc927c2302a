"""What runs on a host whose GPUs are simulated: the plan's settings for the CPU, and the memory they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import memory_llama_cpp as llama
from .errors import FleetfitError
from .memory import HostBudget
from .model_shape import ModelShape
from .tensor_sizes import layout_from_scheme
from .units import MIB

# What differs between a plan for GPUs and the same release on the CPU; nothing else may.
CPU_SETTINGS: Mapping[str, Any] = {
    "n_gpu_layers": 0,
    "split_mode": "none",
    "tensor_split": None,
    "n_cpu_moe": 0,
    "device_uuids": [],
}


def map_to_cpu(deployment: Mapping[str, Any], facts: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """Return ``settings``, ``memory_bytes``, ``host`` and ``changed`` ({name: [planned, run]}) for the CPU.

    Everything else of the plan runs as it is: the same files, context, slots and KV type. Raises
    ``engine_needs_gpu`` for an engine that fleetfit runs on GPUs only.
    """
    if deployment["engine"] != "llama_cpp":
        raise FleetfitError(
            f"{deployment['engine']} is planned for GPUs, and this host's are simulated.",
            code="engine_needs_gpu",
            remedy="Set fleetfit_engine=llama_cpp for hosts with simulated GPUs.",
        )
    planned = dict(deployment["settings"])
    settings = {**planned, **CPU_SETTINGS}
    stable = facts["stable"]
    layout = layout_from_scheme(shape, deployment["scheme"])
    estimate = llama.estimate(
        shape,
        layout,
        context_tokens=deployment["context_tokens"],
        slots=settings["slots"],
        n_ubatch=settings["n_ubatch"],
        kv_type_k=settings["kv_type_k"],
        kv_type_v=settings["kv_type_v"],
        n_gpu_layers=0,
        cache_ram_bytes=settings["cache_ram_mib"] * MIB,
        host=HostBudget(
            ram_total_bytes=stable["ram_total_bytes"], cgroup_limit_bytes=stable.get("cgroup_limit_bytes")
        ),
    )
    # The operating system and the chat page take what the plan already knows.
    terms = replace(estimate.host, margin=deployment["host"]["margin"])
    return {
        "settings": settings,
        "memory_bytes": terms.as_dict(),
        "host": terms.as_dict(),
        "changed": {
            name: [planned.get(name), value]
            for name, value in sorted(settings.items())
            if planned.get(name) != value
        },
    }
