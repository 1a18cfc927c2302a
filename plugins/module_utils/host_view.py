"""A host as the planner sees it: budgets of its devices and its RAM, made from facts and the card catalog."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from .errors import FleetfitError
from .memory import DeviceBudget, HostBudget
from .policy import Policy
from .speed import DEFAULT_RAM_BANDWIDTH_BYTES_PER_S, decode_efficiency
from .units import GIB, MIB

FACTS_SCHEMA_VERSION = 1
# Problems that leave it unknown what GPUs the host can use: planning without them would silently degrade it.
BLOCKING_PROBLEMS = frozenset(
    {
        "driver_missing",
        "driver_library_mismatch",
        "nvml_not_found",
        "nvml_no_permission",
        "nvml_error",
        "gpu_lost",
        "memory_not_supported",
        "probe_failed",
    }
)
# A partitioned card's memory is cut in eighths (NVIDIA's MIG user guide: 8 memory slices).
MIG_MEMORY_SLICES = 8
_MIG_PROFILE = re.compile(r"^\d+(?:c\.\d+)?g\.(\d+)gb", re.ASCII)


@dataclass(frozen=True)
class HostView:
    """What planning knows of one host; ``devices`` are those that may take a deployment, in NVML's order."""

    devices: tuple[DeviceBudget, ...]
    host: HostBudget
    threads: int
    driver_version: Optional[str]
    ram_bandwidth_bytes_per_s: float
    ram_bandwidth_source: str
    notes: tuple[str, ...] = ()

    @property
    def driver_major(self) -> Optional[int]:
        """Return the driver's branch, e.g. 580; None where no driver is loaded."""
        return None if self.driver_version is None else leading_number(self.driver_version)


@dataclass(frozen=True)
class Card:
    """One card of catalog/gpus.yml."""

    name: str
    nvml_names: tuple[str, ...]
    total_mib: int
    reserved_mib: Optional[int]
    compute_capability: str
    bandwidth_bytes_per_s: float
    memory_kind: str
    source: str


def leading_number(text: str) -> int:
    """Return the number that a version begins with (580 of 580.95.05); 0 where there is none."""
    match = re.match(r"\d+", text)
    return int(match.group()) if match else 0


def compute_capability_number(text: str) -> tuple[int, int]:
    """Return a compute capability as numbers that compare: (8, 9) of 8.9."""
    major, _, minor = text.partition(".")
    return leading_number(major), leading_number(minor)


def cards_of(gpus: Mapping[str, Any]) -> tuple[Card, ...]:
    """Return the cards of the catalog's gpus.yml."""
    return tuple(
        Card(
            name=item["name"],
            nvml_names=tuple(item["nvml_names"]),
            total_mib=item["total_mib"],
            reserved_mib=item["reserved_mib"],
            compute_capability=item["compute_capability"],
            bandwidth_bytes_per_s=item["bandwidth_gb_per_s"] * 1e9,
            memory_kind=item.get("memory_kind", "dedicated"),
            source=item["source"],
        )
        for item in gpus["gpus"]
    )


def find_card(cards: Sequence[Card], nvml_name: str, total_bytes: Optional[int]) -> Optional[Card]:
    """Return the card that NVML calls so; among several, the one whose memory is nearest."""
    folded = nvml_name.casefold()
    found = [card for card in cards if folded in (name.casefold() for name in card.nvml_names)]
    if not found:
        return None
    if total_bytes is None:
        return found[0]
    return min(found, key=lambda card: (abs(card.total_mib * MIB - total_bytes), card.name))


def view_of_facts(
    facts: Mapping[str, Any],
    policy: Policy,
    gpus: Mapping[str, Any],
) -> HostView:
    """Return the planner's view of a host's facts (contract 1).

    Reads ``stable``, ``foreign_bytes`` and ``problems`` only. Raises :class:`FleetfitError`: the problem's
    own code where the host's GPUs cannot be used as they are, ``unified_memory_not_recognised`` for a device
    whose memory is neither reported nor recognised as the host's own.
    """
    if facts.get("schema_version") != FACTS_SCHEMA_VERSION:
        raise FleetfitError(
            f"The host's facts have schema_version {facts.get('schema_version')!r}; this fleetfit reads "
            f"version {FACTS_SCHEMA_VERSION}.",
            code="facts_schema_version",
            remedy="Gather the facts again with this version (fleetfit.llm.host_state).",
        )
    stable = facts["stable"]
    host = HostBudget(
        ram_total_bytes=stable["ram_total_bytes"],
        cgroup_limit_bytes=stable.get("cgroup_limit_bytes"),
        open_webui=policy.open_webui,
    )
    driver = stable.get("driver") or {}
    devices: tuple[DeviceBudget, ...] = ()
    notes: list[str] = []
    if policy.use_gpus:
        _check_problems(facts.get("problems") or (), policy.accepted_problems)
        devices = _devices(facts, policy, gpus, host, notes)
    elif stable.get("accelerators"):
        notes.append("fleetfit_use_gpus is false: the host's GPUs are left alone")
    cpu = stable.get("cpu") or {}
    measured = stable.get("ram_bandwidth_bytes_per_s")
    return HostView(
        devices=devices,
        host=host,
        threads=_threads(cpu, policy),
        driver_version=driver.get("version"),
        ram_bandwidth_bytes_per_s=float(measured or DEFAULT_RAM_BANDWIDTH_BYTES_PER_S),
        ram_bandwidth_source="facts" if measured else "assumed: two channels of DDR4-3200",
        notes=tuple(notes),
    )


def _threads(cpu: Mapping[str, Any], policy: Policy) -> int:
    threads = max(1, int(cpu.get("threads") or 1))
    # More threads than the processor has wait for each other at every layer, and slow all of them down.
    if policy.cpu_threads > threads:
        raise FleetfitError(
            f"fleetfit_cpu_threads is {policy.cpu_threads}, and the host's processor has {threads} threads.",
            code="bad_policy",
            remedy=f"Set fleetfit_cpu_threads to at most {threads}, or to 0 for all of them.",
        )
    return policy.cpu_threads or threads


def _check_problems(problems: Sequence[Mapping[str, Any]], accepted: Sequence[str]) -> None:
    for problem in problems:
        if problem["code"] in BLOCKING_PROBLEMS and problem["code"] not in accepted:
            raise FleetfitError(
                str(problem["message"]),
                code=str(problem["code"]),
                remedy=f"{problem.get('remedy') or ''} (Or plan without: fleetfit_use_gpus=false.)".strip(),
            )


def _devices(
    facts: Mapping[str, Any],
    policy: Policy,
    gpus: Mapping[str, Any],
    host: HostBudget,
    notes: list[str],
) -> tuple[DeviceBudget, ...]:
    cards = cards_of(gpus)
    foreign = facts.get("foreign_bytes") or {}
    accelerators = sorted(
        facts["stable"].get("accelerators") or (), key=lambda item: (item.get("index") or 0, item["uuid"])
    )
    parents = {item["uuid"]: item for item in accelerators}
    devices = []
    for item in accelerators:
        if item.get("mig_enabled"):
            notes.append(f"{item['name']} is partitioned (MIG): only its instances take a deployment")
            continue
        name = item["name"]
        total = item.get("memory_total_bytes")
        parent = parents.get(item.get("mig_parent") or "")
        card = find_card(
            cards, parent["name"] if parent else name, (parent or item).get("memory_total_bytes")
        )
        if total is None:
            if not policy.accepted_problems:
                raise FleetfitError(
                    f"The driver does not report the memory of {name} ({item['uuid']}), and it is no device "
                    "that is known to share the host's memory.",
                    code="unified_memory_not_recognised",
                    remedy="Repair the driver, or leave the GPUs out with fleetfit_use_gpus=false.",
                )
            notes.append(f"{name} ({item['uuid']}) is left out: its memory is not known")
            continue
        kind = "unified" if item.get("memory_kind") == "unified" else "dedicated"
        if kind == "unified":
            # What a device shares with the host is the host's, within its own limit.
            total = min(int(total), host.budget)
        reserved = item.get("memory_reserved_bytes")
        if reserved is None:
            reserved = 0 if kind == "unified" else _unseen_reserved(card, total, gpus)
        devices.append(
            DeviceBudget(
                id=item["uuid"],
                name=name,
                total_bytes=int(total),
                reserved_bytes=int(reserved),
                foreign_bytes=int(foreign.get(item["uuid"], 0)),
                display=bool(item.get("display")),
                memory_kind=kind,
                compute_capability=item.get("compute_capability"),
                bandwidth_bytes_per_s=_bandwidth(item, parent, card),
                reserve_bytes=policy.vram_reserve_bytes,
                mig=parent is not None or bool(item.get("mig_profile")),
                decode=decode_efficiency(gpus, "llama_cpp", item.get("compute_capability")),
            )
        )
    return tuple(devices)


def _unseen_reserved(card: Optional[Card], total: int, gpus: Mapping[str, Any]) -> int:
    """Return the driver's own share where NVML (version 1) does not say: the catalog's, else an upper
    bound."""
    if card is not None and card.reserved_mib is not None:
        return card.reserved_mib * MIB
    return unseen_reserved_bytes(gpus, total)


def unseen_reserved_bytes(gpus: Mapping[str, Any], total_bytes: int) -> int:
    """Return more than any card's log shows the driver to keep (catalog/gpus.yml, unseen_reserved_*)."""
    fraction = float(gpus["unseen_reserved_fraction"])
    return min(total_bytes, int(gpus["unseen_reserved_mib"]) * MIB + int(total_bytes * fraction))


def _bandwidth(
    item: Mapping[str, Any], parent: Optional[Mapping[str, Any]], card: Optional[Card]
) -> Optional[float]:
    """Return bytes/s: what the driver reports, else the catalog's; a MIG instance has its memory slices'
    share."""
    reported = (parent or item).get("memory_bandwidth_bytes_per_s")
    whole = float(reported) if reported else (card.bandwidth_bytes_per_s if card else None)
    if whole is None or parent is None:
        return whole
    slices = mig_memory_slices(str(item.get("mig_profile") or ""), parent.get("memory_total_bytes"))
    return None if slices is None else whole * slices / MIG_MEMORY_SLICES


def mig_memory_slices(profile: str, parent_total_bytes: Optional[int]) -> Optional[int]:
    """Return how many eighths of the card's memory a MIG profile has: 4 for 3g.40gb of 80 GB."""
    match = _MIG_PROFILE.match(profile)
    if match is None or not parent_total_bytes:
        return None
    # The profile's gb are an eighth's multiple of what the card is called by; its total is a little less.
    slices = round(int(match.group(1)) * GIB / parent_total_bytes * MIG_MEMORY_SLICES)
    return min(max(slices, 1), MIG_MEMORY_SLICES)
