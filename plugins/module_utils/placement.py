"""Where a model's layers go: on one device, over several unlike ones, partly in RAM, or on the CPU alone.

A placement is found by filling the fastest device from the model's end (the output layer is on the last
device, and it is read for every token), then the next one; what is left stays in RAM. So more memory
anywhere never leaves fewer layers on the fast devices, which is what makes a plan monotone. Every
placement is then checked by the memory model itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations, permutations
from math import inf
from typing import Optional

from . import memory_llama_cpp as llama
from .host_view import HostView
from .memory import DeviceBudget, Estimate
from .model_shape import ModelShape
from .speed import LLAMA_CPP_CPU, LLAMA_CPP_GPU, Efficiency, expected_tokens_per_s, roofline_tokens_per_s
from .tensor_sizes import TensorLayout

# With more devices than this only the fastest and the largest groups are tried, not every subset and order.
EXHAUSTIVE_DEVICES = 3


@dataclass(frozen=True)
class Placement:
    """One way to place a model, with its memory and speed; speeds are None where a bandwidth is unknown."""

    devices: tuple[DeviceBudget, ...]
    estimate: Estimate
    n_gpu_layers: int
    tensor_split: tuple[int, ...]
    n_cpu_moe: int
    resident: bool
    roofline_tokens_per_s: Optional[float]
    expected_tokens_per_s: Optional[float]

    @property
    def rank(self) -> tuple[int, float, int]:
        """Return what makes one placement of the same variant better than another; larger is better."""
        return (int(self.resident), self.expected_tokens_per_s or 0.0, -len(self.devices))


class LlamaPlacer:
    """Finds placements of one GGUF variant on one host; all contexts are per slot, in tokens."""

    def __init__(
        self,
        shape: ModelShape,
        layout: TensorLayout,
        view: HostView,
        *,
        slots: int,
        kv_type_k: str,
        kv_type_v: str,
        cache_ram_bytes: int = 0,
        n_ubatch: int = llama.DEFAULT_UBATCH_TOKENS,
    ) -> None:
        self.shape = shape
        self.layout = layout
        self.view = view
        self.slots = slots
        self.kv_type_k = kv_type_k
        self.kv_type_v = kv_type_v
        self.cache_ram_bytes = cache_ram_bytes
        self.n_ubatch = n_ubatch
        self._groups = device_groups(view.devices)
        self._sizes: dict[tuple[int, int], list[int]] = {}
        self._input_bytes: dict[int, tuple[int, int]] = {}
        self._buffer_bytes: dict[tuple[int, llama.GraphMode, bool, bool], int] = {}

    def best(self, context_tokens: int) -> Optional[Placement]:
        """Return the best placement that fits: resident on the GPUs, else partly offloaded, else on the
        CPU."""
        found = self._resident(context_tokens)
        if found is None:
            found = self._offloaded(context_tokens)
        if found is None:
            found = self._on_cpu(context_tokens)
            if not found.estimate.fits:
                return None
        return found

    def nearest(self, context_tokens: int) -> Placement:
        """Return the placement that misses its memory by the least, for explaining why a variant does not
        fit."""
        attempts = [self._on_cpu(context_tokens)]
        for group in self._groups:
            attempts.append(self._all_layers(group, context_tokens))
            partial = self._fill(group, context_tokens, n_cpu_moe=0)
            if partial is not None:
                attempts.append(self._placement(group, partial, 0, context_tokens))
        return min(attempts, key=lambda item: (_missing(item.estimate), len(item.devices)))

    def max_context_tokens(self, placement: Placement, limit_tokens: int) -> int:
        """Return the longest context (a multiple of 256, or the limit) that fits as well as ``placement`` does.

        For a resident model: at which it still is, on whatever devices; else at which it fits anyhow.
        """
        if not placement.resident:
            return self.max_context_anyhow(limit_tokens)
        return longest_context(self._holds_all, limit_tokens)

    def max_context_anyhow(self, limit_tokens: int) -> int:
        """Return the longest context at which any placement fits; 0 where not even 256 tokens do."""
        return longest_context(lambda tokens: self.best(tokens) is not None, limit_tokens)

    def _holds_all(self, context_tokens: int) -> bool:
        """Return whether some group of devices holds the whole model."""
        for group in self._groups:
            counts = self._filled(group, context_tokens, 0, everything=True)
            if counts is None or sum(counts) < self._all:
                continue
            if self._estimate(group, self._all, counts, 0, context_tokens).fits:
                return True
        return False

    @property
    def _all(self) -> int:
        return llama.all_layers(self.shape)

    def _resident(self, context_tokens: int) -> Optional[Placement]:
        found = []
        for group in self._groups:
            counts = self._fill(group, context_tokens, n_cpu_moe=0)
            if counts is None or sum(counts) < self._all:
                continue
            placement = self._placement(group, counts, 0, context_tokens)
            if placement.estimate.fits:
                found.append(self._balanced(placement, context_tokens))
        return _best(found)

    def _offloaded(self, context_tokens: int) -> Optional[Placement]:
        found = []
        for group in self._groups:
            for n_cpu_moe in self._expert_steps(group, context_tokens):
                counts = self._fill(group, context_tokens, n_cpu_moe=n_cpu_moe)
                if counts is None:
                    continue
                placement = self._trimmed(group, counts, n_cpu_moe, context_tokens)
                if placement is not None:
                    found.append(placement)
        return _best(found)

    def _trimmed(
        self,
        group: tuple[DeviceBudget, ...],
        counts: tuple[int, ...],
        n_cpu_moe: int,
        context_tokens: int,
    ) -> Optional[Placement]:
        """Return the placement with the most layers on the first device that the memory model allows.

        A part of a model has buffers that depend on which part it is; the filling takes a usual one.
        """
        while counts[0] > 0:
            placement = self._placement(group, counts, n_cpu_moe, context_tokens)
            if placement.estimate.fits:
                return placement
            if all(terms.fits for terms in placement.estimate.devices):
                return None  # the host's RAM is short, and fewer layers on devices need more of it
            counts = (counts[0] - 1, *counts[1:])
        return None

    def _on_cpu(self, context_tokens: int) -> Placement:
        return self._placement((), (), 0, context_tokens)

    def _all_layers(self, group: tuple[DeviceBudget, ...], context_tokens: int) -> Placement:
        """Return the placement of everything on ``group`` by budget, whether it fits or not."""
        budgets = [max(1, device.budget) for device in group]
        counts = _shares(budgets, self._all)
        return self._placement(group, counts, 0, context_tokens)

    def _expert_steps(self, group: tuple[DeviceBudget, ...], context_tokens: int) -> list[int]:
        """Return the values of ``--n-cpu-moe`` to try: the least that leaves all layers on the devices,
        else all."""
        if not self.shape.experts:
            return [0]
        low, high = 0, self.shape.layers
        counts = self._fill(group, context_tokens, n_cpu_moe=high)
        if counts is None or sum(counts) < self._all:
            return [0, high]
        while low < high:
            middle = (low + high) // 2
            counts = self._fill(group, context_tokens, n_cpu_moe=middle)
            if counts is not None and sum(counts) == self._all:
                high = middle
            else:
                low = middle + 1
        return [high]

    def _fill(
        self, group: Sequence[DeviceBudget], context_tokens: int, *, n_cpu_moe: int
    ) -> Optional[tuple[int, ...]]:
        """Return the layers per device (the last one's include the output layer), filling from the end.

        None where a device of the group would get nothing: a smaller group then says the same.
        """
        whole = self._filled(group, context_tokens, n_cpu_moe, everything=True)
        if whole is not None and sum(whole) == self._all:
            return whole
        counts = self._filled(group, context_tokens, n_cpu_moe, everything=False)
        if counts is None or sum(counts) == self._all:
            # What would need no part in RAM, but for the buffers that only a whole model has.
            counts = None if counts is None else (counts[0] - 1, *counts[1:])
        return None if counts is None or 0 in counts else counts

    def _filled(
        self, group: Sequence[DeviceBudget], context_tokens: int, n_cpu_moe: int, *, everything: bool
    ) -> Optional[tuple[int, ...]]:
        layout = self.layout
        sizes = self._cumulated(context_tokens, n_cpu_moe)
        mode = llama.GraphMode(everything, everything and len(group) > 1 and not n_cpu_moe)
        counts = [0] * len(group)
        placed = 0
        for index in range(len(group) - 1, -1, -1):
            device = group[index]
            is_last = index == len(group) - 1
            room = device.budget - device.overhead - device.margin
            room -= self._buffers(context_tokens, mode, is_last, index == 0)
            if index == 0 and (n_cpu_moe or not everything):
                room -= max(layout.block_largest[: n_cpu_moe if everything else None], default=0)
            if is_last:
                room -= layout.output_norm + layout.output_head
                if room < 0:
                    return None
                counts[index] = 1
            if device.memory_kind == "unified":
                # The host's part of the engine lives in the same memory.
                room -= self._host_need(context_tokens, mode, bool(n_cpu_moe))
            here = max(bisect_right(sizes, sizes[placed] + room) - 1 - placed, 0)
            if everything and self._slower(device, group[:index]):
                # A slow device that could take everything would leave nothing for the faster ones.
                here = min(here, max(self._all - 1 - placed - index, 0))
            counts[index] += here
            placed += here
            if counts[index] == 0:
                return None
        return tuple(counts)

    def _cumulated(self, context_tokens: int, n_cpu_moe: int) -> list[int]:
        """Return the bytes of the last 0, 1, 2 … blocks with their cache, without experts kept in RAM."""
        key = (context_tokens, n_cpu_moe)
        if key not in self._sizes:
            kv = llama.kv_cache_bytes_by_layer(
                self.shape,
                context_tokens=context_tokens,
                slots=self.slots,
                n_ubatch=self.n_ubatch,
                kv_type_k=self.kv_type_k,
                kv_type_v=self.kv_type_v,
            )
            layout = self.layout
            blocks = [
                layout.blocks[layer] + kv[layer] - (layout.block_experts[layer] if layer < n_cpu_moe else 0)
                for layer in range(self.shape.layers - 1, -1, -1)
            ]
            self._sizes[key] = list(accumulate(blocks, initial=0))
        return self._sizes[key]

    def _inputs(self, context_tokens: int) -> tuple[int, int]:
        """Return (tokens of a micro-batch, bytes of the attention's inputs)."""
        if context_tokens not in self._input_bytes:
            tokens = llama.graph_tokens(self.n_ubatch, context_tokens, self.slots)
            inputs = llama.attention_input_bytes(
                self.shape,
                tokens=tokens,
                context_tokens=context_tokens,
                n_ubatch=self.n_ubatch,
                kv_type_k=self.kv_type_k,
                kv_type_v=self.kv_type_v,
            )
            self._input_bytes[context_tokens] = (tokens, inputs)
        return self._input_bytes[context_tokens]

    def _buffers(self, context_tokens: int, mode: llama.GraphMode, is_last: bool, is_first: bool) -> int:
        """Return the compute buffer of a device with several blocks, and CUDA's converted cache layer."""
        key = (context_tokens, mode, is_last, is_first)
        if key not in self._buffer_bytes:
            tokens, inputs = self._inputs(context_tokens)
            self._buffer_bytes[key] = llama.device_compute_bytes(
                self.shape,
                llama.Placement(is_last, 2, True, is_first),
                mode,
                tokens=tokens,
                context_tokens=context_tokens,
                attention_inputs=inputs,
            ) + llama.kv_dequantization_bytes(
                self.shape, context_tokens=context_tokens, kv_type_k=self.kv_type_k, kv_type_v=self.kv_type_v
            )
        return self._buffer_bytes[key]

    def _balanced(self, placement: Placement, context_tokens: int) -> Placement:
        """Return the placement with its layers spread by budget, where the devices are equally fast and it
        fits."""
        if len(placement.devices) < 2:
            return placement
        if len({self._layer_seconds(device) for device in placement.devices}) > 1:
            return self._sped_up(placement, context_tokens)
        counts = _shares([device.budget for device in placement.devices], self._all)
        if 0 in counts:
            return placement
        spread = self._placement(placement.devices, counts, 0, context_tokens)
        return spread if spread.estimate.fits else placement

    def _layer_seconds(self, device: DeviceBudget) -> float:
        """Return what a middling block costs a token on this device: reading it, and its kernels.

        Not the bandwidth alone: where decoding was measured, kernels tell (a layer on an H200 can cost what it
        costs on an A100). Infinite where the bandwidth is not known.
        """
        if not device.bandwidth_bytes_per_s:
            return inf
        decode = device.decode or LLAMA_CPP_GPU
        read = self._read_bytes(self.shape.layers // 2)
        return read / (device.bandwidth_bytes_per_s * min(decode.factor, 1.0)) + decode.layer_seconds

    def _slower(self, device: DeviceBudget, others: Sequence[DeviceBudget]) -> bool:
        """Return whether a layer is known to cost less on one of ``others`` than on ``device``."""
        return any(self._layer_seconds(other) < self._layer_seconds(device) for other in others)

    def _sped_up(self, placement: Placement, context_tokens: int) -> Placement:
        """Return the placement with layers moved from slower devices to faster ones, as long as all still fits.

        The filling begins with the last device, whether it is the fastest or not: more memory on a slow one
        would take layers from a fast one.
        """
        seconds = [self._layer_seconds(device) for device in placement.devices]
        if inf in seconds:
            return placement
        fastest_first = sorted(range(len(seconds)), key=lambda index: (seconds[index], index))
        counts = list(placement.tensor_split)
        for fast in fastest_first:
            for slow in reversed(fastest_first):
                while seconds[slow] > seconds[fast] and counts[slow] > 1:
                    moved = list(counts)
                    moved[fast] += 1
                    moved[slow] -= 1
                    if not self._estimate(placement.devices, self._all, tuple(moved), 0, context_tokens).fits:
                        break
                    counts = moved
        return self._placement(placement.devices, counts, 0, context_tokens)

    def _placement(
        self,
        group: Sequence[DeviceBudget],
        counts: Sequence[int],
        n_cpu_moe: int,
        context_tokens: int,
    ) -> Placement:
        layers = sum(counts)
        estimate = self._estimate(tuple(group), layers, tuple(counts), n_cpu_moe, context_tokens)
        parts = self._parts(group, counts, n_cpu_moe)
        known = all(bandwidth > 0 for _, bandwidth, _ in parts)
        return Placement(
            devices=tuple(group),
            estimate=estimate,
            n_gpu_layers=layers,
            tensor_split=tuple(counts),
            n_cpu_moe=n_cpu_moe,
            resident=layers == self._all and n_cpu_moe == 0,
            roofline_tokens_per_s=(
                round(roofline_tokens_per_s([(size, speed) for size, speed, _ in parts]), 2)
                if known
                else None
            ),
            expected_tokens_per_s=(
                round(expected_tokens_per_s(parts, _layer_seconds(group, counts)), 2) if known else None
            ),
        )

    def _estimate(
        self,
        group: tuple[DeviceBudget, ...],
        n_gpu_layers: int,
        counts: tuple[int, ...],
        n_cpu_moe: int,
        context_tokens: int,
    ) -> Estimate:
        estimate = llama.estimate(
            self.shape,
            self.layout,
            context_tokens=context_tokens,
            slots=self.slots,
            n_ubatch=self.n_ubatch,
            kv_type_k=self.kv_type_k,
            kv_type_v=self.kv_type_v,
            n_gpu_layers=n_gpu_layers,
            n_cpu_moe=n_cpu_moe,
            devices=group,
            tensor_split=counts,
            cache_ram_bytes=self.cache_ram_bytes,
            host=self.view.host,
        )
        if not any(device.memory_kind == "unified" for device in group):
            return estimate
        host = estimate.host
        need = host.weights + host.kv_cache + host.compute + host.overhead
        terms = tuple(
            replace(item, budget=max(0, item.budget - need)) if device.memory_kind == "unified" else item
            for device, item in zip(group, estimate.devices)
        )
        return replace(estimate, devices=terms)

    def _host_need(self, context_tokens: int, mode: llama.GraphMode, experts_on_host: bool) -> int:
        """Return what the host holds beside fully offloaded layers: the embeddings and a compute buffer."""
        tokens, inputs = self._inputs(context_tokens)
        return (
            self.layout.token_embd
            + self.cache_ram_bytes
            + llama.host_compute_bytes(
                self.shape,
                mode,
                tokens=tokens,
                attention_inputs=inputs,
                any_offloaded=True,
                experts_on_host=experts_on_host,
            )
        )

    def _parts(
        self, group: Sequence[DeviceBudget], counts: Sequence[int], n_cpu_moe: int
    ) -> list[tuple[int, float, Efficiency]]:
        """Return what is read for one token and where: (bytes, bandwidth, efficiency); no bandwidth is 0."""
        layers = self.shape.layers
        ram = self.view.ram_bandwidth_bytes_per_s
        first = self._all - sum(counts)
        host_read = sum(self._read_bytes(layer) for layer in range(min(first, layers)))
        parts: list[tuple[int, float, Efficiency]] = []
        layer = first
        for device, count in zip(group, counts):
            read = 0
            for _ in range(count):
                if layer == layers:
                    read += self.layout.output_norm + self.layout.output_head
                elif layer < n_cpu_moe:
                    active = self._read_bytes(layer)
                    dense = self.layout.blocks[layer] - self.layout.block_experts[layer]
                    host_read += active - dense
                    read += dense
                else:
                    read += self._read_bytes(layer)
                layer += 1
            parts.append((read, device.bandwidth_bytes_per_s or 0.0, device.decode or LLAMA_CPP_GPU))
        if not counts:
            host_read += self.layout.output_norm + self.layout.output_head
        if host_read:
            parts.append((host_read, ram, LLAMA_CPP_CPU))
        return parts

    def _read_bytes(self, layer: int) -> int:
        """Return the bytes of a block that one token reads: of the experts only those used."""
        size, experts = self.layout.blocks[layer], self.layout.block_experts[layer]
        if not experts:
            return size
        return size - experts + experts * self.shape.experts_used // self.shape.experts


def device_groups(devices: Sequence[DeviceBudget]) -> list[tuple[DeviceBudget, ...]]:
    """Return the ordered groups of devices worth trying; the last of a group holds the output layer.

    MIG instances are never combined: a CUDA process sees one. Groups that differ only by which of several
    equal devices they take are tried once.
    """
    singles = [(device,) for device in devices]
    whole = [device for device in devices if not device.mig]
    groups: list[tuple[DeviceBudget, ...]] = []
    if len(whole) <= EXHAUSTIVE_DEVICES:
        for size in range(2, len(whole) + 1):
            for subset in combinations(whole, size):
                groups += _orders(subset)
    else:
        # Equal devices stay in NVML's order: which of them is taken depends on no name.
        by_speed = sorted(whole, key=lambda item: (-(item.bandwidth_bytes_per_s or 0.0), -item.budget))
        by_budget = sorted(whole, key=lambda item: -item.budget)
        for size in range(2, len(whole) + 1):
            for ranked in (by_speed, by_budget):
                groups += _orders(ranked[:size])
    unique: dict[tuple[object, ...], tuple[DeviceBudget, ...]] = {}
    for group in [*singles, *groups]:
        unique.setdefault(tuple(_kind(device) for device in group), group)
    return list(unique.values())


def longest_context(fits: Callable[[int], bool], limit_tokens: int) -> int:
    """Return the largest multiple of 256 (or the limit itself) that ``fits``, by bisection; 0 where none
    does."""
    if fits(limit_tokens):
        return limit_tokens
    step = llama.CONTEXT_PADDING_TOKENS
    low, high = 0, -(-limit_tokens // step)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * step):
            low = middle
        else:
            high = middle
    return low * step


def _orders(devices: Sequence[DeviceBudget]) -> list[tuple[DeviceBudget, ...]]:
    """Return the orders worth trying: all of a few devices, else slowest first and smallest first."""
    if len(devices) < 2:
        return [tuple(devices)]
    if len(devices) <= EXHAUSTIVE_DEVICES:
        orders = list(permutations(devices))
    else:
        orders = [
            tuple(sorted(devices, key=lambda item: (item.bandwidth_bytes_per_s or 0.0, item.budget))),
            tuple(sorted(devices, key=lambda item: item.budget)),
        ]
    unique: dict[tuple[object, ...], tuple[DeviceBudget, ...]] = {}
    for order in orders:
        unique.setdefault(tuple(_kind(device) for device in order), order)
    return list(unique.values())


def _kind(device: DeviceBudget) -> tuple[object, ...]:
    """Return what of a device matters to a placement; equal devices are interchangeable."""
    return (
        device.budget,
        device.overhead,
        device.margin,
        device.bandwidth_bytes_per_s,
        device.memory_kind,
        device.compute_capability,
        device.name,
        device.decode,
    )


def _layer_seconds(group: Sequence[DeviceBudget], counts: Sequence[int]) -> float:
    """Return what the layers' kernels add to a token, where that was measured for the device."""
    return sum((device.decode or LLAMA_CPP_GPU).layer_seconds * count for device, count in zip(group, counts))


def _shares(weights: Sequence[int], units: int) -> tuple[int, ...]:
    """Return ``units`` split in whole numbers in proportion to ``weights`` (largest remainders last)."""
    total = sum(weights)
    bounds = [0]
    cumulated = 0
    for weight in weights:
        cumulated += weight
        bounds.append((units * cumulated * 2 + total) // (2 * total))
    return tuple(after - before for before, after in zip(bounds, bounds[1:]))


def _best(found: Sequence[Placement]) -> Optional[Placement]:
    best: Optional[Placement] = None
    for item in found:
        if best is None or item.rank > best.rank:
            best = item
    return best


def _missing(estimate: Estimate) -> int:
    """Return the bytes missing in all places together."""
    return sum(max(0, terms.short_by) for terms in (*estimate.devices, estimate.host))
