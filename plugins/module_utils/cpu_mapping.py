"""What runs on a host whose GPUs are simulated: the plan's settings for the CPU, and the memory they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import memory_llama_cpp as llama
from . import memory_vllm as vllm
from .lora import layout_with_adapters
from .memory import HostBudget, MemoryTerms
from .model_shape import ModelShape
from .tensor_sizes import layout_from_scheme, safetensors_layout
from .units import MIB

# What differs between a plan for GPUs and the same release on the CPU; nothing else may.
LLAMA_CPP_ON_CPU: Mapping[str, Any] = {
    "n_gpu_layers": 0,
    "split_mode": "none",
    "tensor_split": None,
    "n_cpu_moe": 0,
    "device_uuids": [],
}
# Beside these, the share of GPU memory becomes the KV cache's own size in bytes.
VLLM_ON_CPU: Mapping[str, Any] = {
    "gpu_memory_utilization": None,
    "startup_free_bytes": [],
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
    "kv_cache_dtype": "auto",
    # The CPU build has no CUDA graphs, and compiling takes longer than it would ever win here.
    "enforce_eager": True,
    "device_uuids": [],
}


def map_to_cpu(deployment: Mapping[str, Any], facts: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """Return ``settings``, ``memory_bytes``, ``host`` and ``changed`` ({name: [planned, run]}) for the CPU.

    Everything else of the plan runs as it is: the same files, context and slots, and llama.cpp's KV type.
    """
    planned = dict(deployment["settings"])
    if deployment["engine"] == "vllm":
        settings, terms = _vllm(deployment, shape)
    else:
        settings, terms = _llama_cpp(deployment, facts, shape)
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


def _llama_cpp(
    deployment: Mapping[str, Any], facts: Mapping[str, Any], shape: ModelShape
) -> tuple[dict[str, Any], MemoryTerms]:
    settings = {**deployment["settings"], **LLAMA_CPP_ON_CPU}
    stable = facts["stable"]
    estimate = llama.estimate(
        shape,
        layout_with_adapters(
            layout_from_scheme(shape, deployment["scheme"]),
            [sum(file["size"] for file in adapter["files"]) for adapter in deployment["adapters"]],
        ),
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
    return settings, replace(estimate.host, margin=deployment["host"]["margin"])


def _vllm(deployment: Mapping[str, Any], shape: ModelShape) -> tuple[dict[str, Any], MemoryTerms]:
    settings = {**deployment["settings"], **VLLM_ON_CPU}
    host = deployment["host"]
    estimate = vllm.estimate_on_cpu(
        shape,
        safetensors_layout(shape, deployment["scheme"]),
        context_tokens=deployment["context_tokens"],
        slots=deployment["slots"],
        max_num_seqs=settings["max_num_seqs"],
        max_num_batched_tokens=settings["max_num_batched_tokens"],
        max_loras=settings["max_loras"],
        max_lora_rank=settings["max_lora_rank"],
        margin=host["margin"],
        budget=host["budget"],
    )
    settings["kv_cache_memory_bytes"] = estimate.kv_cache_memory_bytes
    return settings, estimate.host
