"""What llama-server allocates, per device and on the host, before it is started.

Every figure was compared with llama.cpp's own accounting (``llama-fit-params``; tests/integration and
benchmarks/memory_oracle.py). Terms of the CUDA backend alone were read in its source and not run; they are
named so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Optional

from .errors import FleetfitError
from .memory import DeviceBudget, Estimate, HostBudget, MemoryTerms
from .model_shape import ModelShape
from .tensor_sizes import GGML_TYPES, TensorLayout, row_bytes

# llama-server's defaults (-b, -ub).
DEFAULT_BATCH_TOKENS = 2048
DEFAULT_UBATCH_TOKENS = 512
# llama.cpp rounds every slot's context up to this many tokens.
CONTEXT_PADDING_TOKENS = 256
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
NO_HOST_LIMIT_BYTES = 1 << 62


def padded_context_tokens(context_tokens: int) -> int:
    """Return the context of one slot as llama.cpp allocates it: rounded up to 256 tokens."""
    return -(-context_tokens // CONTEXT_PADDING_TOKENS) * CONTEXT_PADDING_TOKENS


def n_ctx(context_tokens: int, slots: int) -> int:
    """Return the value for ``-c``: the padded context of one slot, times the slots."""
    return padded_context_tokens(context_tokens) * slots


def all_layers(shape: ModelShape) -> int:
    """Return the ``-ngl`` value that puts everything on the devices: every block and the output layer."""
    return shape.layers + 1


def sliding_cache_tokens(shape: ModelShape, context_tokens: int, n_ubatch: int) -> int:
    """Return the tokens that a sliding-window layer keeps per slot: pad256(min(context, window + ubatch))."""
    return min(padded_context_tokens(context_tokens), padded_context_tokens(shape.sliding_window + n_ubatch))


def kv_bytes_per_token(shape: ModelShape, kv_type_k: str, kv_type_v: str) -> int:
    """Return the key and value bytes of one token in one layer."""
    return _row(kv_type_k, shape.kv_dim) + _row(kv_type_v, shape.kv_dim)


def kv_cache_bytes_by_layer(
    shape: ModelShape, *, context_tokens: int, slots: int, n_ubatch: int, kv_type_k: str, kv_type_v: str
) -> tuple[int, ...]:
    """Return the KV cache of every layer in bytes, all slots together."""
    per_token = kv_bytes_per_token(shape, kv_type_k, kv_type_v) * slots
    full = per_token * padded_context_tokens(context_tokens)
    if not shape.sliding_window:
        return (full,) * shape.layers
    window = per_token * sliding_cache_tokens(shape, context_tokens, n_ubatch)
    return tuple(window if shape.is_sliding(layer) else full for layer in range(shape.layers))


def compute_bytes(
    shape: ModelShape, *, context_tokens: int, n_ubatch: int, with_output: bool, device_count: int
) -> int:
    """Return an upper bound of the compute buffer of one device in bytes.

    One device: ``4 U max(V + 6h, 3ff + 5h) + masks``; several (pipeline copies): ``4 U max(V + 13h, 3ff +
    16h) + 4 masks``, V only where the output layer is. A mask is ``2 U pad256(context)``.
    """
    h = shape.hidden_size
    ff = _ffn_width(shape)
    vocabulary = shape.vocab_size if with_output else 0
    mask = 2 * n_ubatch * padded_context_tokens(context_tokens)
    if shape.sliding_window:
        mask += 2 * n_ubatch * sliding_cache_tokens(shape, context_tokens, n_ubatch)
    if device_count > 1:
        return 4 * n_ubatch * max(vocabulary + 13 * h, 3 * ff + 16 * h) + 4 * mask
    return 4 * n_ubatch * max(vocabulary + 6 * h, 3 * ff + 5 * h) + mask


def kv_dequantization_bytes(shape: ModelShape, *, context_tokens: int, kv_type_k: str, kv_type_v: str) -> int:
    """Return CUDA's f16 copies of one layer of a quantized cache (from source, not run)."""
    rows = sum(kv_type not in ("f16", "bf16", "f32") for kv_type in (kv_type_k, kv_type_v))
    return rows * 2 * padded_context_tokens(context_tokens) * shape.kv_dim


def layer_devices(shape: ModelShape, n_gpu_layers: int, split: Sequence[float]) -> tuple[Optional[int], ...]:
    """Return for every block, and last the output layer, the index of its device; None is the host.

    ``-ngl N`` puts the output layer and the last N-1 blocks on devices; among several devices layer i goes
    to the first whose cumulated share of ``split`` exceeds i/N (llama_model_base::load_tensors).
    """
    count = shape.layers + 1
    offloaded = max(0, min(n_gpu_layers, count)) if split else 0
    first = count - offloaded
    total = float(sum(split)) if split else 0.0
    shares: list[float] = []
    cumulated = 0.0
    for part in split:
        cumulated += part
        shares.append(cumulated / total)
    places: list[Optional[int]] = [None] * first
    for layer in range(first, count):
        position = (layer - first) / offloaded
        places.append(next((i for i, share in enumerate(shares) if share > position), len(shares) - 1))
    return tuple(places)


def estimate(
    shape: ModelShape,
    layout: TensorLayout,
    *,
    context_tokens: int,
    slots: int = 1,
    n_ubatch: int = DEFAULT_UBATCH_TOKENS,
    kv_type_k: str = "f16",
    kv_type_v: str = "f16",
    n_gpu_layers: Optional[int] = None,
    n_cpu_moe: int = 0,
    devices: Sequence[DeviceBudget] = (),
    tensor_split: Optional[Sequence[float]] = None,
    cache_ram_bytes: int = 0,
    host: Optional[HostBudget] = None,
) -> Estimate:
    """Return what llama-server needs on each of ``devices`` and on the host.

    ``context_tokens`` is per slot; ``n_gpu_layers`` None means all; ``tensor_split`` defaults to the
    devices' budgets. Raises :class:`FleetfitError` for numbers that llama-server would refuse.
    """
    _check(context_tokens, slots, n_ubatch, kv_type_k, kv_type_v, n_cpu_moe)
    if layout.format != "gguf":
        raise FleetfitError(
            f"llama.cpp reads GGUF files, not {layout.format}.",
            code="format_not_supported",
            remedy="Choose a GGUF variant.",
        )
    split = tuple(tensor_split) if tensor_split is not None else tuple(float(d.budget) for d in devices)
    if len(split) != len(devices) or any(part < 0 for part in split) or (devices and sum(split) <= 0):
        raise FleetfitError(
            f"The tensor split {split} does not fit {len(devices)} devices.",
            code="bad_tensor_split",
            remedy="Give one share of zero or more per device, not all zero.",
        )
    layers = all_layers(shape) if n_gpu_layers is None else n_gpu_layers
    places = layer_devices(shape, layers, split)
    kv = kv_cache_bytes_by_layer(
        shape,
        context_tokens=context_tokens,
        slots=slots,
        n_ubatch=n_ubatch,
        kv_type_k=kv_type_k,
        kv_type_v=kv_type_v,
    )
    weights = [0] * len(devices)
    cache = [0] * len(devices)
    host_weights = layout.token_embd
    host_cache = 0
    for layer, place in enumerate(places[:-1]):
        size = layout.blocks[layer]
        if place is None:
            host_weights += size
            host_cache += kv[layer]
            continue
        if layer < n_cpu_moe:
            host_weights += layout.block_experts[layer]
            size -= layout.block_experts[layer]
        weights[place] += size
        cache[place] += kv[layer]
    output_place = places[-1]
    if output_place is None:
        host_weights += layout.output_norm + (0 if layout.tied else layout.output)
    else:
        weights[output_place] += layout.output_norm + layout.output_head

    used = [index for index in range(len(devices)) if index in places]
    terms = []
    for index, device in enumerate(devices):
        if index not in used:
            terms.append(MemoryTerms(overhead=device.overhead, margin=device.margin, budget=device.budget))
            continue
        compute = compute_bytes(
            shape,
            context_tokens=context_tokens,
            n_ubatch=n_ubatch,
            with_output=index == output_place,
            device_count=len(used),
        )
        compute += kv_dequantization_bytes(
            shape, context_tokens=context_tokens, kv_type_k=kv_type_k, kv_type_v=kv_type_v
        )
        terms.append(
            MemoryTerms(weights[index], cache[index], compute, device.overhead, device.margin, device.budget)
        )
    host_compute = compute_bytes(
        shape,
        context_tokens=context_tokens,
        n_ubatch=n_ubatch,
        with_output=output_place is None,
        device_count=1,
    )
    host_terms = MemoryTerms(
        weights=host_weights,
        kv_cache=host_cache,
        compute=host_compute,
        overhead=cache_ram_bytes,
        margin=0 if host is None else host.margin,
        budget=NO_HOST_LIMIT_BYTES if host is None else host.budget,
    )
    return Estimate(devices=tuple(terms), host=host_terms, device_ids=tuple(device.id for device in devices))


def _ffn_width(shape: ModelShape) -> int:
    if shape.experts:
        return shape.experts_used * shape.expert_intermediate_size + shape.shared_expert_intermediate_size
    return shape.intermediate_size


@lru_cache(maxsize=1024)
def _row(kv_type: str, cols: int) -> int:
    if kv_type not in KV_TYPES:
        raise FleetfitError(
            f"The KV cache type {kv_type!r} is not one of llama.cpp's.",
            code="unknown_kv_type",
            remedy=f"Known types: {', '.join(KV_TYPES)}.",
        )
    name = kv_type.upper()
    elements = GGML_TYPES[name][0]
    if cols % elements:
        raise FleetfitError(
            f"The KV cache type {kv_type!r} needs rows divisible by {elements}; this model's have {cols}.",
            code="kv_type_not_supported",
            remedy="Choose f16.",
        )
    return row_bytes(name, cols)


def _check(
    context_tokens: int, slots: int, n_ubatch: int, kv_type_k: str, kv_type_v: str, n_cpu_moe: int
) -> None:
    for name, value, minimum in (
        ("context_tokens", context_tokens, 1),
        ("slots", slots, 1),
        ("n_ubatch", n_ubatch, 1),
        ("n_cpu_moe", n_cpu_moe, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise FleetfitError(
                f"{name} is {value!r}; it must be a whole number of at least {minimum}.",
                code="bad_setting",
                remedy="Correct the policy or the argument.",
            )
    for kv_type in (kv_type_k, kv_type_v):
        _row(kv_type, 256)
