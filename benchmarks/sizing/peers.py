"""What other planners would say of the same cases: their published formulas, computed and not run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ansible_collections.fleetfit.llm.plugins.module_utils.memory import DeviceBudget
from ansible_collections.fleetfit.llm.plugins.module_utils.memory_llama_cpp import (
    all_layers,
    estimate,
    kv_bytes_per_token,
    n_ctx,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import ModelShape
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import (
    layout_from_scheme,
    model_tensors,
)

from .memory import CONTEXTS
from .oracle import Oracle
from .shapes import SHAPES

MIB = 1 << 20


@dataclass(frozen=True)
class Load:
    """Everything on one device."""

    name: str
    scheme: str
    context: int
    slots: int
    kv_type: str

    @property
    def shape(self) -> ModelShape:
        return SHAPES[self.name]


def parameters(shape: ModelShape) -> int:
    """Return how many numbers the model's tensors hold."""
    return sum(tensor.cols * tensor.rows for tensor in model_tensors(shape))


def plain_kv(load: Load, kv_type: str | None = None) -> int:
    """Return the cache without padding and without sliding windows, as simple formulas have it."""
    kind = kv_type or load.kv_type
    return kv_bytes_per_token(load.shape, kind, kind) * load.shape.layers * load.context * load.slots


def accelerate(load: Load) -> float:
    """Return accelerate's estimate: parameters times the nearest width it knows (float16, int8, int4), and a
    fifth more for inference, as its documentation says."""
    width = {"Q4_K_M": 0.5, "F16": 2.0}.get(load.scheme, 1.0)
    return parameters(load.shape) * width * 1.2


def llmfit(load: Load) -> float:
    """Return llmfit's (1.1): parameters times a factor per quantization, the cache, and half a gigabyte."""
    factor = {"F16": 2.0, "Q8_0": 1.05, "Q6_K": 0.80, "Q5_K_M": 0.68, "Q4_K_M": 0.58}[load.scheme]
    return parameters(load.shape) * factor + plain_kv(load) + 0.5e9


def gguf_parser(load: Load) -> float:
    """Return gguf-parser-go's: exact tensors and cache, logits of a micro-batch, and its footprint of 250
    MiB."""
    layout = layout_from_scheme(load.shape, load.scheme)
    on_device = layout.tensor_bytes - (0 if layout.tied else layout.token_embd)
    logits = 4 * 512 * (load.shape.vocab_size + load.shape.hidden_size)
    return on_device + plain_kv(load) + logits + 250 * MIB


def ollama(load: Load) -> float:
    """Return Ollama's coarse check: the file and an f16 cache within 80 % of what is free."""
    return (layout_from_scheme(load.shape, load.scheme).file_bytes + plain_kv(load, "f16")) / 0.8


PEERS: dict[str, Callable[[Load], float]] = {
    "accelerate": accelerate,
    "gguf-parser-go": gguf_parser,
    "llmfit": llmfit,
    "Ollama": ollama,
}


@dataclass(frozen=True)
class Accuracy:
    """How far a planner's total on the device is from llama.cpp's, as shares of it."""

    planner: str
    loads: int
    mean: float
    under: float
    over: float


def compare(oracle: Oracle, ports: Sequence[int], names: Sequence[str]) -> list[Accuracy]:
    """Return every planner's errors over the loads of ``names``; only the buffers are compared, no margin."""
    device = DeviceBudget("RPC0", "RPC", 1 << 42)
    errors: dict[str, list[float]] = {"fleetfit": [], **{peer: [] for peer in PEERS}}
    for load in loads(names):
        shape = load.shape
        truth = oracle.ask(
            oracle.model(load.name, shape, load.scheme),
            n_ctx=n_ctx(load.context, load.slots),
            slots=load.slots,
            kv_type_k=load.kv_type,
            kv_type_v=load.kv_type,
            n_gpu_layers=all_layers(shape),
            rpc=ports[:1],
        ).devices[0]
        mine = estimate(
            shape,
            layout_from_scheme(shape, load.scheme),
            context_tokens=load.context,
            slots=load.slots,
            kv_type_k=load.kv_type,
            kv_type_v=load.kv_type,
            devices=[device],
        ).devices[0]
        # llama.cpp cuts each figure to whole MiB; half a MiB is the middle of what it may be.
        total = truth.model_mib + truth.context_mib + truth.compute_mib + 1.5
        errors["fleetfit"].append((mine.weights + mine.kv_cache + mine.compute) / MIB / total - 1)
        for peer, formula in PEERS.items():
            # Ollama's 80 % are no part of what it takes the model to need.
            need = formula(load) * (0.8 if peer == "Ollama" else 1.0)
            errors[peer].append(need / MIB / total - 1)
    return [
        Accuracy(name, len(found), statistics.mean(map(abs, found)), min(found), max(found))
        for name, found in errors.items()
    ]


def loads(names: Sequence[str]) -> list[Load]:
    """Return the loads of these shapes: every context with three schemes, KV types and slots."""
    found = []
    for name in names:
        for context in CONTEXTS:
            for scheme, slots, kv_type in (("Q4_K_M", 1, "f16"), ("Q8_0", 1, "q8_0"), ("F16", 4, "f16")):
                found.append(Load(name, scheme, context, slots, kv_type))
    return found
