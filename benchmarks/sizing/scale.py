"""How long the pure planner takes for a fleet: 10,000 hosts with at least 200 kinds of hardware and load.

Hosts of equal hardware, load and policy are planned once (``PlanMemo``); those that no variant fits are not in
the fleet: they are not remembered, and cost a planning each. CPU time is what counts: on a machine that does
nothing else wall time is the same.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.plan import plan_host
from ansible_collections.fleetfit.llm.plugins.module_utils.plan_memo import PlanMemo
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import Policy
from ansible_collections.fleetfit.llm.plugins.module_utils.units import GIB, MIB
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_catalog

SIZES = (1250, 2500, 5000, 10_000)
KINDS = 400
MIN_KINDS = 200
LIMIT_S = 20.0
LIMIT_EXPONENT = 1.1
SEED = 20261123
CATALOG = load_catalog()


def kinds() -> list[tuple[dict[str, Any], Policy]]:
    """Return ``KINDS`` different hosts, each of which has a plan: hardware, foreign memory and policy vary."""
    dice = random.Random(SEED)  # noqa: S311 - reproducible, not secret
    cards = [card for card in CATALOG.gpus["gpus"] if "memory_kind" not in card]
    found: list[tuple[dict[str, Any], Policy]] = []
    while len(found) < KINDS:
        chosen = [dice.choice(cards)] * dice.choice((0, 1, 1, 1, 1, 2, 2, 4))
        if len(chosen) == 2 and dice.random() < 0.3:
            chosen = [chosen[0], dice.choice(cards)]
        devices = [
            {
                "uuid": f"GPU-{index}",
                "index": index,
                "name": (card["nvml_names"] or [card["name"]])[0],
                "compute_capability": card["compute_capability"],
                "memory_total_bytes": card["total_mib"] * MIB,
                "memory_reserved_bytes": (card["reserved_mib"] or 400) * MIB,
                "memory_kind": "dedicated",
                "mig_enabled": False,
                "display": dice.random() < 0.2,
            }
            for index, card in enumerate(chosen)
        ]
        facts = {
            "schema_version": 1,
            "stable": {
                "machine_id": "",
                "ram_total_bytes": dice.choice((16, 32, 64, 128, 256)) * GIB,
                "cgroup_limit_bytes": None,
                "cpu": {"threads": dice.choice((4, 8, 16, 32))},
                "driver": {"version": "580.95.05"} if devices else None,
                "accelerators": devices,
            },
            "foreign_bytes": {item["uuid"]: dice.choice((0, 0, 256, 1024)) * MIB for item in devices},
            "problems": [],
        }
        policy = Policy(
            model=dice.choice(("qwen2.5-0.5b-instruct", "qwen2.5-1.5b-instruct", "qwen2.5-7b-instruct")),
            min_context_tokens=dice.choice((4096, 8192, 16384)),
            slots=dice.choice((1, 2, 4)),
            min_quality_tier="rest",
        )
        found.append((facts, policy))
    return found


def fleet(size: int) -> list[tuple[dict[str, Any], Policy]]:
    """Return ``size`` hosts, each of one of the kinds, with a machine id and UUIDs of its own."""
    dice = random.Random(SEED + size)  # noqa: S311
    some = kinds()
    hosts = []
    for number in range(size):
        facts, policy = some[number % len(some)]
        names = {
            item["uuid"]: f"GPU-{dice.getrandbits(128):032x}" for item in facts["stable"]["accelerators"]
        }
        devices = [{**item, "uuid": names[item["uuid"]]} for item in facts["stable"]["accelerators"]]
        stable = {**facts["stable"], "machine_id": f"{number:032x}", "accelerators": devices}
        foreign = {names[uuid]: count for uuid, count in facts["foreign_bytes"].items()}
        hosts.append(({**facts, "stable": stable, "foreign_bytes": foreign}, policy))
    dice.shuffle(hosts)
    return hosts


def plan(facts: Mapping[str, Any], policy: Policy, previous: Mapping[str, Any] | None) -> dict[str, Any]:
    """Plan one host with this checkout's catalog; files need not be pinned."""
    entry = CATALOG.entry(policy.model)
    return plan_host(
        facts,
        policy,
        entry=entry,
        gpus=CATALOG.gpus,
        engines=CATALOG.engines,
        available_engines=frozenset(["llama_cpp", "vllm"]),
        siblings=CATALOG.siblings(entry),
        previous=previous,
        require_pinned=False,
    )


def measure(size: int) -> tuple[float, float, int]:
    """Return (seconds, CPU seconds, hosts really planned) for a fleet of ``size`` with an empty memo."""
    hosts = fleet(size)
    memo = PlanMemo(plan)
    start, start_cpu = time.perf_counter(), time.process_time()
    for facts, policy in hosts:
        memo(facts, policy)
    return time.perf_counter() - start, time.process_time() - start_cpu, memo.planned


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """Return the slope of log(seconds) over log(size), by least squares."""
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum(
        (x - mean_x) ** 2 for x in xs
    )


@dataclass(frozen=True)
class Scale:
    """How a fleet was planned: sizes, CPU seconds of each, kinds really planned, growth, one host alone."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    planned: int
    growth: float
    alone_ms: float

    @property
    def ok(self) -> bool:
        """Return whether every limit is kept."""
        return self.seconds[-1] <= LIMIT_S and self.growth <= LIMIT_EXPONENT and self.planned >= MIN_KINDS


def run(sizes: tuple[int, ...] = SIZES, alone: int = 100) -> Scale:
    """Plan fleets of these sizes, and ``alone`` hosts each by itself."""
    measure(KINDS)  # warm up: imports, layouts of the models
    found = [measure(size) for size in sizes]
    seconds = [taken for _, taken, _ in found]
    sample = fleet(max(sizes))[:alone]
    start = time.process_time()
    for facts, policy in sample:
        plan(facts, policy, None)
    each = (time.process_time() - start) / len(sample)
    return Scale(sizes, tuple(seconds), found[-1][2], exponent(sizes, seconds), 1000 * each)
