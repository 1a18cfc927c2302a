"""What llama-server allocates, per device and on the host, before it is started.

Every figure was compared with llama.cpp's own accounting (``llama-fit-params``; tests/integration and
benchmarks/sizing). Terms of the CUDA backend alone were read in its source and not run; they are
named so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Optional

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
# Inputs are kept this often where several devices work in a pipeline (GGML_SCHED_MAX_COPIES).
PIPELINE_COPIES = 4
# Positions, token numbers and indices: a few values per token.
SMALL_INPUTS_BYTES = 256 * 1024


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


def check_graph(shape: ModelShape, *, slots: int, kv_type_k: str, kv_type_v: str) -> None:
    """Raise :class:`FleetfitError` (``kv_type_not_supported``) where llama.cpp aborts while it builds the
    graph.

    It reserves nodes by the number of tensors, of which models with fused projections (Phi-3, Phi-4) have
    too few for a rotated cache in several streams (seen with 0.6.0-dev: every quantized type, two slots
    and more).
    """
    quantized = is_quantized(kv_type_k) or is_quantized(kv_type_v)
    if shape.fused_projections and quantized and slots > 1 and shape.head_dim % 64 == 0:
        raise FleetfitError(
            f"llama.cpp aborts with a quantized KV cache and {slots} slots in {shape.architecture} models.",
            code="kv_type_not_supported",
            remedy="Choose f16, or one slot.",
        )


def graph_tokens(n_ubatch: int, context_tokens: int, slots: int) -> int:
    """Return the tokens llama.cpp reserves its graph for: a micro-batch within the context, a multiple of the
    slots.
    """
    tokens = min(n_ubatch, n_ctx(context_tokens, slots))
    return -(-tokens // slots) * slots


def attention_input_bytes(
    shape: ModelShape, *, tokens: int, context_tokens: int, n_ubatch: int, kv_type_k: str, kv_type_v: str
) -> int:
    """Return one copy of what attention is fed with: f16 masks, and the rotations of a quantized cache.

    A mask is ``2 tokens pad256(context)``, and one more for the window of sliding layers
    (llm_graph_input_attn_kv). Quantized caches are rotated with Hadamard matrices of at most head_dim for
    keys and 64 for values (llama_kv_cache, n_rot_k and n_rot_v).
    """
    masks = 2 * tokens * padded_context_tokens(context_tokens)
    if shape.sliding_window:
        masks += 2 * tokens * sliding_cache_tokens(shape, context_tokens, n_ubatch)
    rotations = 4 * shape.head_dim**2 if is_quantized(kv_type_k) else 0
    rotations += 4 * 64**2 if is_quantized(kv_type_v) else 0
    return masks + rotations * (2 if shape.sliding_window else 1)


def is_quantized(kv_type: str) -> bool:
    """Return whether a cache type stores blocks with scales."""
    return kv_type not in ("f32", "f16", "bf16")


def feed_forward_width(shape: ModelShape) -> int:
    """Return the elements per token alive at once in a feed-forward part: gate, up and their product."""
    if not shape.experts:
        return 3 * shape.intermediate_size
    used = shape.experts_used * shape.expert_intermediate_size
    shared = shape.shared_expert_intermediate_size
    return 3 * max(used, shared) + (2 * shape.hidden_size if shared > used else 0)


def expert_sum_width(shape: ModelShape) -> int:
    """Return the elements per token while the outputs of the experts used are weighted and summed; 0 if
    dense.

    The sum is taken where the block is, also when the experts themselves are in RAM.
    """
    return (2 * shape.experts_used + 3) * shape.hidden_size if shape.experts else 0


def block_width(shape: ModelShape, *, experts_here: bool = True) -> int:
    """Return the widest place of a block in elements per token."""
    summed = expert_sum_width(shape)
    return summed if shape.experts and not experts_here else max(feed_forward_width(shape), summed)


class Placement(NamedTuple):
    """What part of the model a device holds, as far as its compute buffer depends on it."""

    has_output: bool
    blocks: int
    has_experts: bool
    is_first: bool


class GraphMode(NamedTuple):
    """How llama.cpp runs the graph: everything on devices or not, and with pipeline copies or not."""

    all_offloaded: bool
    pipeline: bool


def device_compute_bytes(
    shape: ModelShape,
    placement: Placement,
    mode: GraphMode,
    *,
    tokens: int,
    context_tokens: int,
    attention_inputs: int,
) -> int:
    """Return an upper bound of one device's compute buffer in bytes.

    With V = vocabulary, h = hidden size, F = :func:`block_width` and 4 bytes an element per token,
    against llama.cpp's own figures for 41 shapes: everything on one device ``max(V, F) + 4h``; several
    devices, which keep four copies of the inputs, ``max(V + 9h, F + 11h)`` and 5h more on the first; a
    part of the model ``max(V + 2h, F + 3h)``. V counts where the output layer is. The graph allocator's
    gaps, wider where layers have unlike widths, are added by :func:`allocator_gap`.
    """
    h = shape.hidden_size
    vocabulary = shape.vocab_size if placement.has_output else 0
    width = block_width(shape, experts_here=placement.has_experts) if placement.blocks else 0
    if mode.pipeline:
        elements = max(vocabulary + 9 * h, width + 11 * h) + (5 * h if placement.is_first else 0)
        elements += pipeline_gap(shape)
        return 4 * tokens * elements + PIPELINE_COPIES * attention_inputs + SMALL_INPUTS_BYTES
    if mode.all_offloaded and placement.is_first:
        elements = max(vocabulary, width) + (4 * h if placement.has_experts else 5 * h) + whole_gap(shape)
        return 4 * tokens * elements + attention_inputs + SMALL_INPUTS_BYTES
    peaks = [0]
    if placement.has_output:
        # Where the experts' outputs are summed on the way to the output layer, they are inputs of it.
        summed = shape.experts and (shape.shared_expert_intermediate_size or not placement.blocks)
        beside = (shape.experts_used + 3) * h if summed else 2 * h
        if placement.blocks:
            # Behind other devices the inputs that arrive leave gaps of their own (seen once, in Gemma 2).
            beside += partial_gap(shape, context_tokens=context_tokens) + (0 if placement.is_first else 6 * h)
        peaks.append(4 * tokens * (vocabulary + beside))
    if placement.blocks:
        # Wide masks are placed without a gap: a third h is seen below 2h of mask only.
        narrow_masks = attention_inputs < 8 * tokens * h
        dense = feed_forward_width(shape) + (3 * h if narrow_masks or shape.experts else 2 * h + h // 4)
        dense += h if shape.fused_projections else 0
        widths = [dense] if placement.has_experts or not shape.experts else []
        if shape.experts:
            shared = 2 * h if shape.shared_expert_intermediate_size else 0
            widths.append(expert_sum_width(shape) + (5 * h if placement.has_experts else shared))
        if placement.blocks == 1 and placement.has_output:
            # The masks are free again before the feed-forward part of a single block.
            peaks.append(4 * tokens * (max(widths) + h) + min(attention_inputs, 4 * tokens * h))
            peaks.append(attention_inputs + 4 * tokens * 6 * h)
        else:
            peaks.append(4 * tokens * max(widths) + attention_inputs)
    return max(peaks) + SMALL_INPUTS_BYTES


def host_compute_bytes(
    shape: ModelShape,
    mode: GraphMode,
    *,
    tokens: int,
    attention_inputs: int,
    any_offloaded: bool,
    experts_on_host: bool,
) -> int:
    """Return an upper bound of the host's compute buffer in bytes, by the same comparison.

    Nothing offloaded ``max(V + 6h, F + 5h)``; a part ``F + 5h``; everything ``4h``, with pipeline copies
    ``10h``; everything but experts ``F + 2h``.
    """
    h = shape.hidden_size
    width = block_width(shape)
    copies = 1
    if not any_offloaded:
        elements = max(shape.vocab_size + 6 * h, width + 5 * h)
    elif not mode.all_offloaded:
        elements = width + 5 * h
    elif experts_on_host:
        elements = width + 2 * h
    elif mode.pipeline:
        elements = 10 * h
        copies = PIPELINE_COPIES
    else:
        elements = 4 * h
    return 4 * tokens * elements + copies * attention_inputs + SMALL_INPUTS_BYTES


def pipeline_gap(shape: ModelShape) -> int:
    """Return the elements per token lost to gaps between tensors of unlike size, with pipeline copies.

    Seen where queries are wider or narrower than the hidden state, where projections are fused, and with
    shared experts; models whose layers are all alike leave none.
    """
    if shape.shared_expert_intermediate_size:
        return 7 * shape.hidden_size
    return 4 * shape.hidden_size if _unlike_widths(shape) else 0


def whole_gap(shape: ModelShape) -> int:
    """Return the elements per token lost to gaps with everything on one device."""
    if shape.shared_expert_intermediate_size:
        return shape.hidden_size
    return 2 * shape.hidden_size if _unlike_widths(shape) else 0


def compute_bytes(
    shape: ModelShape, *, context_tokens: int, n_ubatch: int, with_output: bool, device_count: int
) -> int:
    """Return the largest compute buffer that a device may come to have, whatever part of the model it gets.

    For filling devices with layers before it is known how many they get; :func:`estimate` then says exactly.
    """
    inputs = attention_input_bytes(
        shape,
        tokens=n_ubatch,
        context_tokens=context_tokens,
        n_ubatch=n_ubatch,
        kv_type_k="q8_0",
        kv_type_v="q8_0",
    )
    modes = [GraphMode(True, device_count > 1), GraphMode(False, False)]
    return max(
        device_compute_bytes(
            shape,
            Placement(with_output, blocks, True, device_count == 1 or not with_output),
            mode,
            tokens=n_ubatch,
            context_tokens=context_tokens,
            attention_inputs=inputs,
        )
        for mode in modes
        for blocks in (0, shape.layers)
    )


def streamed_weight_bytes(layout: TensorLayout) -> int:
    """Return the most that CUDA needs on the first device for weights that stay in RAM."""
    return max(layout.block_largest)


def partial_gap(shape: ModelShape, *, context_tokens: int) -> int:
    """Return the elements per token lost before the logits with a part of the model on a device.

    In models with a narrow feed-forward part the allocator leaves a gap where a mask's row is about as
    wide as the hidden state or the queries (a quarter of slack is taken), with fused projections always.
    """
    h, q = shape.hidden_size, shape.q_dim
    if shape.fused_projections:
        return 2 * h
    if shape.experts or shape.qk_norm or shape.post_norms or shape.intermediate_size >= 3 * h:
        return 0
    mask_width = padded_context_tokens(context_tokens) / 2  # two bytes a token, against four an element
    return 3 * h if 0.6 * min(h, q) <= mask_width <= 1.25 * max(h, q) else 0


def _unlike_widths(shape: ModelShape) -> bool:
    return shape.q_dim != shape.hidden_size or shape.fused_projections


def kv_dequantization_bytes(shape: ModelShape, *, context_tokens: int, kv_type_k: str, kv_type_v: str) -> int:
    """Return CUDA's f16 copies of one layer of a quantized cache during prompts (read in its source, not
    run)."""
    copies = is_quantized(kv_type_k) + is_quantized(kv_type_v)
    return copies * 2 * padded_context_tokens(context_tokens) * shape.kv_dim


def layer_devices(shape: ModelShape, n_gpu_layers: int, split: Sequence[float]) -> tuple[Optional[int], ...]:
    """Return for every block, and last the output layer, the index of its device; None is the host.

    ``-ngl N`` puts the output layer and the last N-1 blocks on devices; among several devices layer i goes
    to the first whose cumulated share of ``split`` exceeds i/N (llama_model_base::load_tensors).
    """
    count = shape.layers + 1
    ranges = layer_ranges(count, n_gpu_layers, tuple(split))
    places: list[Optional[int]] = [None] * count
    for index, (start, stop) in enumerate(ranges):
        places[start:stop] = [index] * (stop - start)
    return tuple(places)


@lru_cache(maxsize=4096)
def layer_ranges(count: int, n_gpu_layers: int, split: tuple[float, ...]) -> tuple[tuple[int, int], ...]:
    """Return for every device the range of layers it gets, of ``count`` with the output layer as the last
    one."""
    offloaded = max(0, min(n_gpu_layers, count)) if split else 0
    first = count - offloaded
    total = float(sum(split))
    ranges = []
    start, cumulated = first, 0.0
    for part in split:
        cumulated += part
        stop = start
        while stop < count and cumulated / total > (stop - first) / offloaded:
            stop += 1
        ranges.append((start, stop))
        start = stop
    return tuple(ranges)


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
    check_graph(shape, slots=slots, kv_type_k=kv_type_k, kv_type_v=kv_type_v)
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
    kv = kv_cache_bytes_by_layer(
        shape,
        context_tokens=context_tokens,
        slots=slots,
        n_ubatch=n_ubatch,
        kv_type_k=kv_type_k,
        kv_type_v=kv_type_v,
    )
    count = all_layers(shape)
    ranges = layer_ranges(count, layers, split)
    used = [index for index, (start, stop) in enumerate(ranges) if start < stop]
    output_place = used[-1] if used else None
    # Blocks before the first device's are in RAM; of the others, the first n_cpu_moe leave their experts
    # there.
    host_blocks = ranges[used[0]][0] if used else shape.layers
    weights, cache = [], []
    host_weights = layout.token_embd + sum(layout.blocks[:host_blocks])
    host_weights += sum(layout.block_experts[host_blocks:n_cpu_moe])
    host_cache = sum(kv[:host_blocks])
    for start, stop in ranges:
        experts = sum(layout.block_experts[start : min(stop, n_cpu_moe)])
        weights.append(sum(layout.blocks[start:stop]) - experts)
        cache.append(sum(kv[start:stop]))
    if output_place is None:
        host_weights += layout.output_norm + (0 if layout.tied else layout.output)
    else:
        weights[output_place] += layout.output_norm + layout.output_head

    tokens = graph_tokens(n_ubatch, context_tokens, slots)
    inputs = attention_input_bytes(
        shape,
        tokens=tokens,
        context_tokens=context_tokens,
        n_ubatch=n_ubatch,
        kv_type_k=kv_type_k,
        kv_type_v=kv_type_v,
    )
    experts_on_host = bool(shape.experts and n_cpu_moe)
    everything = layers >= count and bool(used)
    # Pipeline copies need every layer on devices and no tensor overridden (llama_context's constructor).
    mode = GraphMode(everything, everything and len(devices) > 1 and not experts_on_host)
    conversion = kv_dequantization_bytes(
        shape, context_tokens=context_tokens, kv_type_k=kv_type_k, kv_type_v=kv_type_v
    )
    streamed = _largest_host_tensor(layout, host_blocks, n_cpu_moe)
    terms = []
    for index, device in enumerate(devices):
        if index not in used:
            # A visible device costs its context even where it gets no layer.
            terms.append(MemoryTerms(overhead=device.overhead, margin=device.margin, budget=device.budget))
            continue
        start, stop = ranges[index]
        blocks = min(stop, shape.layers) - start
        placement = Placement(
            has_output=index == output_place,
            blocks=blocks,
            has_experts=not shape.experts or min(stop, shape.layers) > n_cpu_moe,
            is_first=index == used[0],
        )
        compute = device_compute_bytes(
            shape, placement, mode, tokens=tokens, context_tokens=context_tokens, attention_inputs=inputs
        )
        cuda_only = (conversion if blocks else 0) + (streamed if index == used[0] else 0)
        terms.append(
            MemoryTerms(
                weights=weights[index],
                kv_cache=cache[index],
                compute=compute,
                overhead=device.overhead + cuda_only,
                margin=device.margin,
                budget=device.budget,
            )
        )
    host_terms = MemoryTerms(
        weights=host_weights,
        kv_cache=host_cache,
        compute=host_compute_bytes(
            shape,
            mode,
            tokens=tokens,
            attention_inputs=inputs,
            any_offloaded=bool(used),
            experts_on_host=experts_on_host,
        ),
        overhead=cache_ram_bytes,
        margin=0 if host is None else host.margin,
        budget=NO_HOST_LIMIT_BYTES if host is None else host.budget,
    )
    return Estimate(devices=tuple(terms), host=host_terms, device_ids=tuple(device.id for device in devices))


def _largest_host_tensor(layout: TensorLayout, host_blocks: int, n_cpu_moe: int) -> int:
    """Return the largest tensor that CUDA copies to a device while it runs a prompt through a layer in RAM.

    With operations offloaded (llama.cpp's default), each weight of such a layer is copied before its
    product and freed after it (ggml_backend_sched_split_graph starts a split per weight); read in the
    source, not run.
    """
    with_experts = n_cpu_moe if any(layout.block_experts) else 0
    return max(layout.block_largest[: max(host_blocks, with_experts)], default=0)


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
