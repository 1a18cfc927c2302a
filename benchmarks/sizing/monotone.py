"""More memory, or a shorter context, never gives a lower policy score: many drawn hosts, each changed once."""

from __future__ import annotations

import random
from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.host_view import view_of_facts
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import Policy
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import Request, choose, evaluate
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_catalog

MIB, GIB = 1 << 20, 1 << 30
SEED = 20261129
MODELS = (
    "qwen2.5-0.5b-instruct",
    "qwen2.5-1.5b-instruct",
    "qwen2.5-7b-instruct",
    "qwen2.5-14b-instruct",
    "qwen2.5-32b-instruct",
    "smollm2-135m-instruct",
)
CATALOG = load_catalog()


def host(sizes_mib: list[int], names: list[str], ram: int) -> dict[str, Any]:
    """Return the facts of a host with cards of these names and sizes, nothing reserved."""
    by_name = {card["name"]: card for card in CATALOG.gpus["gpus"]}
    return {
        "schema_version": 1,
        "stable": {
            "machine_id": "",
            "ram_total_bytes": ram,
            "cgroup_limit_bytes": None,
            "cpu": {"threads": 8},
            "driver": {"version": "580.95.05"},
            "accelerators": [
                {
                    "uuid": f"GPU-{index}",
                    "index": index,
                    "name": (by_name[name]["nvml_names"] or [name])[0],
                    "compute_capability": by_name[name]["compute_capability"],
                    "memory_total_bytes": size * MIB,
                    "memory_reserved_bytes": 0,
                    "memory_kind": "dedicated",
                    "mig_enabled": False,
                    "display": False,
                }
                for index, (size, name) in enumerate(zip(sizes_mib, names, strict=True))
            ],
        },
        "foreign_bytes": {},
        "problems": [],
    }


def score(facts: dict[str, Any], policy: Policy) -> tuple[float, ...] | None:
    """Return the policy's score of what is chosen; None where nothing fits."""
    request = Request(
        entry=CATALOG.entry(policy.model),
        policy=policy,
        view=view_of_facts(facts, policy, CATALOG.gpus),
        engines=CATALOG.engines,
        available_engines=frozenset({"llama_cpp", "vllm"}),
        require_pinned=False,
    )
    best = choose(evaluate(request), policy.prefer)
    return None if best is None else best.score(policy.prefer)


def worse(before: tuple[float, ...] | None, after: tuple[float, ...] | None) -> bool:
    """Return whether the second is the worse one."""
    if before is None or after is None:
        return before is not None and after is None
    return after < before


def run(hosts: int) -> tuple[int, list[str]]:
    """Return (comparisons made, sentences about those that got worse)."""
    dice = random.Random(SEED)  # noqa: S311 - the same hosts every time
    cards = [card["name"] for card in CATALOG.gpus["gpus"] if "memory_kind" not in card]
    compared, found = 0, []
    for _ in range(hosts):
        names = [dice.choice(cards) for _ in range(dice.choice((1, 1, 1, 2, 2)))]
        sizes = [dice.choice((dice.randrange(1024, 12288), dice.randrange(1024, 49152))) for _ in names]
        ram = dice.choice((4, 8, 16, 32, 64)) * GIB
        model = dice.choice(MODELS)
        native = CATALOG.entry(model).native_context_tokens
        context = dice.choice([tokens for tokens in (512, 4096, 8192, 20000, 32768) if tokens <= native])
        policy = Policy(
            model=model,
            min_context_tokens=context,
            slots=dice.choice((1, 2, 4)),
            prefer=dice.choice(("quality", "speed", "context")),
            min_quality_tier=dice.choice(("Q4_K_M", "rest")),
            engine=dice.choice(("auto", "auto", "llama_cpp", "vllm")),
        )
        before = score(host(sizes, names, ram), policy)
        changed = dice.randrange(len(sizes))
        larger = [size + dice.randrange(1, 16384) * (index == changed) for index, size in enumerate(sizes)]
        shorter = Policy(
            **{name: getattr(policy, name) for name in policy.__dataclass_fields__}
            | {"min_context_tokens": dice.randrange(1, context + 1)}
        )
        tries = [
            (f"{larger} MiB", score(host(larger, names, ram), policy)),
            (f"{(ram >> 30) + 8} GiB of RAM", score(host(sizes, names, ram + 8 * GIB), policy)),
        ]
        if policy.prefer != "context":
            # What more context would fit is another figure for another context.
            tries.append((f"{shorter.min_context_tokens} tokens", score(host(sizes, names, ram), shorter)))
        for what, after in tries:
            compared += 1
            if worse(before, after):
                found.append(
                    f"{policy} on {names} {sizes} MiB, {ram >> 30} GiB: {before}; with {what}: {after}"
                )
    return compared, found
