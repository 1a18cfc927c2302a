"""A remembered plan has the same bytes as one made anew, on every host of a fleet."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.plan import plan_host
from ansible_collections.fleetfit.llm.plugins.module_utils.plan_memo import PlanMemo, anonymous_facts
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import Policy
from ansible_collections.fleetfit.llm.plugins.module_utils.units import GIB, MIB

from .planning import CATALOG, accelerator, facts


def plan(host: Mapping[str, Any], policy: Policy, previous: Mapping[str, Any] | None) -> dict[str, Any]:
    entry = CATALOG.entry(policy.model)
    return plan_host(
        host,
        policy,
        entry=entry,
        gpus=CATALOG.gpus,
        engines=CATALOG.engines,
        available_engines=frozenset(["llama_cpp", "vllm"]),
        siblings=CATALOG.siblings(entry),
        previous=previous,
        require_pinned=False,
    )


def host(number: int, names: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    """Return a host with UUIDs of its own, in any order."""
    dice = random.Random(number)  # noqa: S311
    devices = [
        accelerator(
            name, index=index, uuid=f"GPU-{dice.getrandbits(64):016x}", pci_bus_id=f"0:{number}:{index}"
        )
        for index, name in enumerate(names)
    ]
    found = facts(devices, **changes)
    found["stable"]["machine_id"] = f"{number:032x}"
    return found


FLEET = [
    (("RTX 4090", "RTX 4090"), "qwen2.5-14b-instruct"),
    (("RTX 3060 12GB", "RTX 4090"), "qwen2.5-14b-instruct"),
    (("RTX 3060 8GB",) * 4, "qwen2.5-14b-instruct"),
    (("T4",), "qwen2.5-7b-instruct"),
    ((), "qwen2.5-0.5b-instruct"),
]


@pytest.mark.parametrize(("names", "model"), FLEET)
def test_the_same_bytes_and_one_planning_for_all_hosts_of_a_kind(names: tuple[str, ...], model: str) -> None:
    memo = PlanMemo(plan)
    policy = Policy(model=model)
    for number in range(6):
        found = host(number, names, ram_gib=96)
        assert json.dumps(memo(found, policy)) == json.dumps(json.loads(canonical(plan(found, policy, None))))
    assert memo.planned == 1


def canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True)


def test_what_planning_reads_is_told_apart() -> None:
    memo = PlanMemo(plan)
    base = host(1, ("RTX 4090",))
    policy = Policy(model="qwen2.5-7b-instruct")
    memo(base, policy)
    uuid = base["stable"]["accelerators"][0]["uuid"]
    for other in (
        {**base, "foreign_bytes": {uuid: GIB}},
        facts([{**base["stable"]["accelerators"][0], "memory_total_bytes": 8 * GIB}]),
        facts([{**base["stable"]["accelerators"][0], "display": True}]),
        facts([{**base["stable"]["accelerators"][0]}], ram_gib=16),
    ):
        before = memo.planned
        assert canonical(memo(other, policy)) == canonical(plan(other, policy, None))
        assert memo.planned == before + 1
    before = memo.planned
    memo(base, Policy(model="qwen2.5-7b-instruct", slots=4))
    last = memo(base, Policy(model="qwen2.5-7b-instruct", prefer="speed"))
    assert memo.planned == before + 2
    assert canonical(memo(base, policy, last)) == canonical(plan(base, policy, last))
    # What moves by the minute changes nothing.
    before = memo.planned
    memo({**base, "live": {"devices": {uuid: {"free_bytes": MIB}}}}, policy)
    assert memo.planned == before


def test_a_failure_names_the_hosts_own_device_and_is_not_remembered() -> None:
    memo = PlanMemo(plan)
    unknown = host(3, ("GB10",))
    unknown["stable"]["accelerators"][0].update(memory_total_bytes=None, memory_kind="unknown")
    uuid = unknown["stable"]["accelerators"][0]["uuid"]
    for _ in range(2):
        with pytest.raises(FleetfitError, match=uuid):
            memo(unknown, Policy(model="qwen2.5-7b-instruct"))


def test_instances_of_a_partitioned_card_keep_their_parent() -> None:
    parent = accelerator("A100 80GB", uuid="GPU-x", mig_enabled=True)
    instance = accelerator(
        "A100 80GB",
        uuid="MIG-y",
        index=1,
        mig_parent="GPU-x",
        mig_profile="3g.40gb",
        memory_total_bytes=40 * GIB,
        memory_reserved_bytes=0,
    )
    found = facts([parent, instance], ram_gib=128)
    anonymous, names = anonymous_facts(found)
    assert sorted(names.values()) == ["GPU-x", "MIG-y"]
    assert (
        anonymous["stable"]["accelerators"][1]["mig_parent"] == anonymous["stable"]["accelerators"][0]["uuid"]
    )
    policy = Policy(model="qwen2.5-7b-instruct")
    assert canonical(PlanMemo(plan)(found, policy)) == canonical(plan(found, policy, None))
