"""Memory as the planner sees it: budgets of devices and hosts, and the seven terms that are held against
them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Optional

from .errors import FleetfitError
from .speed import Efficiency
from .units import GIB, MIB, format_size

# CUDA context and libraries, per process and card. Seen: 180 MiB (RTX 2000 Ada), 264 (RTX 3090), 472 (RTX
# 4090), 518 (H100, an empty context); Ollama reserves 457. On an H100 what lies outside llama.cpp's own buffers
# was 607 to 624 MiB for quantized models and 708 for F16 (benchmarks/gpu_memory/results), while its compute
# buffer was 130 to 190 MiB below the plan's: the totals held. A calibration record says better.
CUDA_OVERHEAD_BYTES = 512 * MIB
MARGIN_MIN_BYTES = 512 * MIB
MARGIN_MAX_BYTES = 1024 * MIB
# A margin of 5 % keeps a 6 GB card usable, where llama.cpp's flat 1 GiB would take 17 %.
MARGIN_FRACTION = 0.05
# A desktop's compositor and browser come and go, so a card with a display keeps this much more free.
DISPLAY_MARGIN_BYTES = 512 * MIB
# After calibration: three times the largest residual seen, never below this.
CALIBRATED_MARGIN_MIN_BYTES = 256 * MIB
# Unified memory (GB10, Jetson): the operating system lives in the same memory.
UNIFIED_RESERVE_MIN_BYTES = 8 * GIB
UNIFIED_RESERVE_FRACTION = 0.10
# Host RAM that is not the engine's: the operating system, and Open WebUI where it is installed (800 MB RSS
# measured).
HOST_OS_BYTES = 2 * GIB
OPEN_WEBUI_BYTES = 1 * GIB
# systemd MemoryMax of an engine's unit: its need and a tenth.
UNIT_MEMORY_MAX_FACTOR = 1.10

TERM_NAMES = ("weights", "kv_cache", "compute", "overhead", "margin", "total", "budget")
MEMORY_KINDS = ("dedicated", "unified", "unknown")


@dataclass(frozen=True)
class MemoryTerms:
    """What one device (or the host) must hold, in bytes, beside the budget it is held against."""

    weights: int = 0
    kv_cache: int = 0
    compute: int = 0
    overhead: int = 0
    margin: int = 0
    budget: int = 0

    @property
    def total(self) -> int:
        """Return the sum of the five terms in bytes."""
        return self.weights + self.kv_cache + self.compute + self.overhead + self.margin

    @property
    def short_by(self) -> int:
        """Return the bytes by which the total exceeds the budget; zero or less where it fits."""
        return self.total - self.budget

    @property
    def fits(self) -> bool:
        """Return whether the total is within the budget."""
        return self.short_by <= 0

    def as_dict(self) -> dict[str, int]:
        """Return the terms under the plan contract's names, ``total`` and ``budget`` included."""
        return {name: getattr(self, name) for name in TERM_NAMES}

    def __add__(self, other: MemoryTerms) -> MemoryTerms:
        """Return the term-by-term sum, budgets included."""
        return MemoryTerms(
            self.weights + other.weights,
            self.kv_cache + other.kv_cache,
            self.compute + other.compute,
            self.overhead + other.overhead,
            self.margin + other.margin,
            self.budget + other.budget,
        )


@dataclass(frozen=True)
class DeviceBudget:
    """One accelerator as the planner sees it; all sizes in bytes.

    ``reserved_bytes`` is what the driver keeps (NVML v2 ``reserved``), ``foreign_bytes`` what processes
    outside our units hold, ``reserve_bytes`` what the policy wants kept free. ``margin_bytes`` and
    ``overhead_bytes`` replace the constants where a calibration record exists.
    """

    id: str
    name: str
    total_bytes: int
    reserved_bytes: int = 0
    foreign_bytes: int = 0
    display: bool = False
    memory_kind: str = "dedicated"
    compute_capability: Optional[str] = None
    bandwidth_bytes_per_s: Optional[float] = None
    reserve_bytes: int = 0
    mig: bool = False
    margin_bytes: Optional[int] = None
    overhead_bytes: Optional[int] = None
    # llama.cpp's decode speed where it was measured on such cards; None: the engine's constant.
    decode: Optional[Efficiency] = None

    def __post_init__(self) -> None:
        """Refuse sizes that no card has."""
        for name in ("total_bytes", "reserved_bytes", "foreign_bytes", "reserve_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise FleetfitError(
                    f"{name} of device {self.id} is {value!r}, which is not a size in bytes.",
                    code="bad_device",
                    remedy="Give sizes as whole numbers of bytes, zero or more.",
                )
        if self.total_bytes == 0:
            raise FleetfitError(
                f"Device {self.id} ({self.name}) reports no memory.",
                code="memory_not_supported",
                remedy="Name the card's memory in the inventory, or leave the device out.",
            )
        if self.memory_kind not in MEMORY_KINDS:
            raise FleetfitError(
                f"Device {self.id} has the memory kind {self.memory_kind!r}.",
                code="bad_device",
                remedy=f"Known kinds: {', '.join(MEMORY_KINDS)}.",
            )

    @property
    def usable_bytes(self) -> int:
        """Return total - reserved, near what CUDA calls total (an RTX 3060's 12288 MiB are 11906 MiB to
        CUDA)."""
        return max(0, self.total_bytes - self.reserved_bytes)

    @property
    def budget(self) -> int:
        """Return the bytes a plan may use: total - reserved - foreign - reserve - the OS's share of
        unified memory.

        Never derived from free memory: with our own engine running that is about zero, and a re-plan would
        shrink the model.
        """
        taken = self.reserved_bytes + self.foreign_bytes + self.reserve_bytes
        if self.memory_kind == "unified":
            taken += unified_reserve_bytes(self.total_bytes)
        return max(0, self.total_bytes - taken)

    @property
    def overhead(self) -> int:
        """Return the bytes of CUDA context and libraries per process: calibrated, else the constant."""
        return CUDA_OVERHEAD_BYTES if self.overhead_bytes is None else self.overhead_bytes

    @property
    def margin(self) -> int:
        """Return the safety margin in bytes: calibrated, else by :func:`device_margin_bytes`."""
        if self.margin_bytes is not None:
            return self.margin_bytes
        return device_margin_bytes(self.total_bytes, display=self.display)

    def with_calibration(self, *, overhead_bytes: int, residual_bytes: int) -> DeviceBudget:
        """Return this device with a measured overhead and the margin that follows from the largest
        residual seen."""
        return replace(
            self,
            overhead_bytes=overhead_bytes,
            margin_bytes=calibrated_margin_bytes(residual_bytes, display=self.display),
        )


@dataclass(frozen=True)
class HostBudget:
    """The host's RAM as the planner sees it, in bytes."""

    ram_total_bytes: int
    cgroup_limit_bytes: Optional[int] = None
    open_webui: bool = False

    @property
    def budget(self) -> int:
        """Return min(RAM total, cgroup limit) in bytes."""
        if self.cgroup_limit_bytes is None:
            return self.ram_total_bytes
        return min(self.ram_total_bytes, self.cgroup_limit_bytes)

    @property
    def margin(self) -> int:
        """Return the RAM that is not the engine's: the operating system's and Open WebUI's."""
        return HOST_OS_BYTES + (OPEN_WEBUI_BYTES if self.open_webui else 0)


@dataclass(frozen=True)
class Estimate:
    """One engine's memory on every device, in the order given, and on the host."""

    devices: tuple[MemoryTerms, ...]
    host: MemoryTerms
    device_ids: tuple[str, ...] = ()

    @property
    def total(self) -> MemoryTerms:
        """Return the plan's ``memory_bytes``: each term summed over the devices plus the host."""
        result = self.host
        for terms in self.devices:
            result = result + terms
        return result

    @property
    def fits(self) -> bool:
        """Return whether every device and the host hold their share."""
        return self.host.fits and all(terms.fits for terms in self.devices)

    @property
    def worst(self) -> tuple[Optional[str], int]:
        """Return (device id or None for the host, bytes missing) of the place that is most short; (None,
        0) if none."""
        places: list[tuple[Optional[str], int]] = [(None, self.host.short_by)]
        places += [(name, terms.short_by) for name, terms in zip(self.device_ids, self.devices)]
        place = max(places, key=lambda item: item[1])
        return place if place[1] > 0 else (None, 0)

    @property
    def unit_memory_max_bytes(self) -> int:
        """Return ``MemoryMax`` of the engine's unit: its own host need (not the OS's share) and a tenth."""
        need = self.host.weights + self.host.kv_cache + self.host.compute + self.host.overhead
        return round(need * UNIT_MEMORY_MAX_FACTOR)


def device_margin_bytes(total_bytes: int, *, display: bool) -> int:
    """Return clamp(5 % of total, 512 MiB, 1 GiB), and 512 MiB more where the card drives a display."""
    margin = min(max(int(total_bytes * MARGIN_FRACTION), MARGIN_MIN_BYTES), MARGIN_MAX_BYTES)
    return margin + (DISPLAY_MARGIN_BYTES if display else 0)


def calibrated_margin_bytes(residual_bytes: int, *, display: bool) -> int:
    """Return max(256 MiB, 3 x the largest residual seen), and the display's share."""
    margin = max(CALIBRATED_MARGIN_MIN_BYTES, 3 * abs(residual_bytes))
    return margin + (DISPLAY_MARGIN_BYTES if display else 0)


def unified_reserve_bytes(total_bytes: int) -> int:
    """Return what the operating system keeps of unified memory: max(8 GiB, 10 %)."""
    return max(UNIFIED_RESERVE_MIN_BYTES, int(total_bytes * UNIFIED_RESERVE_FRACTION))


def shortfall_sentence(device: Optional[str], short_by_bytes: int) -> str:
    """Return one sentence saying where memory is missing and how much."""
    place = "the host's RAM" if device is None else f"device {device}"
    return f"{place} is short by {format_size(short_by_bytes)}"


def terms_from_dict(data: dict[str, Any]) -> MemoryTerms:
    """Return the terms of a plan's ``memory_bytes``; ``total`` is recomputed, unknown keys are ignored."""
    return MemoryTerms(**{field.name: int(data[field.name]) for field in fields(MemoryTerms)})
