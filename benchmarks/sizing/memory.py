"""Weights, KV cache and compute, term by term and place by place, against llama.cpp's own accounting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ansible_collections.fleetfit.llm.plugins.module_utils.memory import DeviceBudget
from ansible_collections.fleetfit.llm.plugins.module_utils.memory_llama_cpp import (
    all_layers,
    estimate,
    n_ctx,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import layout_from_scheme

from .oracle import Oracle
from .shapes import SHAPES

MIB = 1 << 20
CONTEXTS = (1000, 8193, 32768)
SLOTS = (1, 3, 4)
KV_TYPES = ("f16", "q8_0")
# Tied, sliding windows, experts, a small vocabulary, fused projections, unlike widths: one of each kind.
SAMPLE = (
    "qwen2.5-0.5b",
    "qwen2.5-7b",
    "qwen3-4b",
    "qwen3-30b-a3b",
    "qwen1.5-moe-a2.7b",
    "llama-3.1-8b",
    "llama-3.2-3b",
    "mistral-7b",
    "mistral-nemo-12b",
    "mixtral-8x7b",
    "gemma-2-2b",
    "gemma-3-1b",
    "phi-4",
    "smollm2-135m",
)
# Weights and KV: within one of these in every cell.
EXACT_MIB, EXACT_SHARE = 1.0, 0.001
# Compute on a single device: at most one of these over, never under.
OVER_MIB, OVER_SHARE = 32.0, 0.10


@dataclass(frozen=True)
class Cell:
    """One case: context per slot, slots, KV type, devices, ``-ngl``, ``--n-cpu-moe``."""

    context: int
    slots: int = 1
    kv_type: str = "f16"
    devices: int = 0
    layers: int = 0
    cpu_moe: int = 0
    split: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Term:
    """One term in one place: the plan's MiB, and llama.cpp's, which it prints cut to whole MiB."""

    model: str
    cell: Cell
    where: str
    what: str
    plan_mib: float
    truth_mib: int
    single: bool

    @property
    def error_mib(self) -> float:
        """Return how far the plan is from what the printed number can stand for; below it is negative."""
        if self.plan_mib < self.truth_mib:
            return self.plan_mib - self.truth_mib
        return max(self.plan_mib - (self.truth_mib + 1), 0.0)

    @property
    def share(self) -> float:
        """Return the error as a share of llama.cpp's figure; where that is 0, of 1 MiB."""
        return self.error_mib / max(self.truth_mib, 1)

    @property
    def problem(self) -> str | None:
        """Return what is wrong, or None."""
        error = abs(self.error_mib)
        if self.what == "compute":
            if self.error_mib < 0:
                return f"{self}: under by {error:.1f} MiB"
            if self.single and error > OVER_MIB and error > OVER_SHARE * self.truth_mib:
                return f"{self}: {error:.0f} MiB over"
            return None
        if error > EXACT_MIB and error > EXACT_SHARE * self.truth_mib:
            return f"{self}: off by {self.error_mib:.1f} MiB"
        return None

    def __str__(self) -> str:
        cell = self.cell
        placed = f"{cell.devices} devices -ngl {cell.layers}" if cell.devices else "CPU"
        moe = f" --n-cpu-moe {cell.cpu_moe}" if cell.cpu_moe else ""
        return (
            f"{self.model} {cell.context} x {cell.slots} {cell.kv_type} {placed}{moe}, {self.where} {self.what}"
            f" {self.plan_mib:.1f} MiB, llama.cpp {self.truth_mib}"
        )


def measure(
    oracle: Oracle, ports: Sequence[int], name: str, cell: Cell, scheme: str = "Q4_K_M"
) -> Iterator[Term]:
    """Yield every term of a cell in every place, the plan's beside llama.cpp's."""
    shape = SHAPES[name]
    truth = oracle.ask(
        oracle.model(name, shape, scheme),
        n_ctx=n_ctx(cell.context, cell.slots),
        slots=cell.slots,
        kv_type_k=cell.kv_type,
        kv_type_v=cell.kv_type,
        n_gpu_layers=cell.layers,
        n_cpu_moe=cell.cpu_moe,
        rpc=ports[: cell.devices],
        tensor_split=cell.split,
    )
    # Without --tensor-split llama.cpp divides by free memory, which is the same for every RPC server here.
    budgets = [DeviceBudget(f"RPC{i}", "RPC", 1 << 40) for i in range(cell.devices)]
    mine = estimate(
        shape,
        layout_from_scheme(shape, scheme),
        context_tokens=cell.context,
        slots=cell.slots,
        kv_type_k=cell.kv_type,
        kv_type_v=cell.kv_type,
        n_gpu_layers=cell.layers,
        n_cpu_moe=cell.cpu_moe,
        devices=budgets,
        tensor_split=cell.split,
    )
    places = [*zip(mine.devices, truth.devices, strict=True), (mine.host, truth.host)]
    for place, (terms, buffers) in enumerate(places):
        on_host = place == cell.devices
        where = "host" if on_host else f"device {place}"
        # The host's own buffer beside devices is bounded from below alone.
        single = cell.devices == 0 or (cell.devices == 1 and not on_host)
        for what, plan, counted in (
            ("weights", terms.weights, buffers.model_mib),
            ("kv_cache", terms.kv_cache, buffers.context_mib),
            ("compute", terms.compute, buffers.compute_mib),
        ):
            yield Term(name, cell, where, what, plan / MIB, counted, single)


def problems(
    oracle: Oracle, ports: Sequence[int], name: str, cell: Cell, scheme: str = "Q4_K_M"
) -> list[str]:
    """Return what is wrong in one cell, a sentence each."""
    found = (term.problem for term in measure(oracle, ports, name, cell, scheme))
    return [problem for problem in found if problem is not None]


def cells(name: str, contexts: Sequence[int] = CONTEXTS, slots: Sequence[int] = SLOTS) -> list[Cell]:
    """Return the matrix for one model: every context, slots and KV type on each placement."""
    shape = SHAPES[name]
    full, half = all_layers(shape), shape.layers // 2
    placements = [
        (0, 0, 0),
        *((1, layers, 0) for layers in (1, half, shape.layers, full)),
        (2, full, 0),
        (2, half, 0),
    ]
    if shape.experts:
        placements += [(1, full, half), (1, full, shape.layers), (2, full, half)]
    found = []
    for context in contexts:
        for count in slots:
            for kv_type in KV_TYPES:
                if aborts(name, count, kv_type):
                    continue
                found += [Cell(context, count, kv_type, *placement) for placement in placements]
    return found


def aborts(name: str, slots: int, kv_type: str) -> bool:
    """Return whether llama.cpp itself aborts here; the planner refuses it (check_graph, which has its own
    test)."""
    shape = SHAPES[name]
    return kv_type == "q8_0" and slots > 1 and shape.fused_projections and shape.head_dim % 64 == 0
