"""Promises of the one function that maps a plan to the CPU, for vLLM (llama.cpp's are in test_plan.py)."""

from __future__ import annotations

from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.cpu_mapping import VLLM_ON_CPU
from ansible_collections.fleetfit.llm.plugins.module_utils.engine_args import VLLM_SETTINGS
from ansible_collections.fleetfit.llm.plugins.module_utils.memory_vllm import estimate_on_cpu
from ansible_collections.fleetfit.llm.plugins.module_utils.plan import make_plan
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import safetensors_layout
from ansible_collections.fleetfit.llm.plugins.module_utils.units import GIB
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import check_schema_of_plan
from hypothesis import given
from hypothesis import strategies as st

from .planning import CATALOG, cards, facts, request


def deployment(*names: str, **variables: Any) -> dict[str, Any]:
    """Return the deployment of a 0.5B model by vLLM on simulated cards."""
    host = facts(cards(*(names or ("RTX 4090",))))
    wanted = {"simulated_gpus": True, "engine": "vllm", **variables}
    plan = make_plan(
        request("qwen2.5-0.5b-instruct", host, engines=("vllm",), **wanted), host, catalog_digest="0" * 64
    )
    check_schema_of_plan(plan)
    return dict(plan["deployments"][0])


def test_the_share_of_gpu_memory_becomes_the_bytes_of_the_kv_cache() -> None:
    planned = deployment(min_context_tokens=8192, slots=2)
    mapping = planned["cpu_mapping"]
    # 24 layers x 2 x 2 heads x 64 x 2 B, for 2 x 64 blocks of 128 tokens and the null block.
    kv = 24 * 2 * 2 * 64 * 2 * 128 * (2 * 64 + 1)
    assert mapping["changed"]["kv_cache_memory_bytes"] == [None, kv]
    assert mapping["changed"]["gpu_memory_utilization"][1] is None
    assert mapping["host"]["kv_cache"] == kv


def test_what_changes_is_listed_and_nothing_else_changes() -> None:
    planned = deployment("RTX 4090", "RTX 4090", kv_type="fp8")
    mapping = planned["cpu_mapping"]
    assert set(mapping["settings"]) == set(VLLM_SETTINGS)
    assert set(mapping["changed"]) <= {*VLLM_ON_CPU, "kv_cache_memory_bytes"}
    for name, value in mapping["settings"].items():
        if name in mapping["changed"]:
            assert mapping["changed"][name] == [planned["settings"][name], value]
        else:
            assert planned["settings"][name] == value
    assert mapping["settings"]["device_uuids"] == []
    assert mapping["settings"]["enforce_eager"] is True
    assert mapping["settings"]["kv_cache_dtype"] == "auto"


def test_the_prediction_is_the_hosts_and_adds_up() -> None:
    planned = deployment()
    host = planned["cpu_mapping"]["host"]
    parts = ("weights", "kv_cache", "compute", "overhead", "margin")
    assert host["total"] == sum(host[name] for name in parts)
    assert host["weights"] == planned["devices"][0]["weights"]
    assert (host["margin"], host["budget"]) == (planned["host"]["margin"], planned["host"]["budget"])
    assert host["overhead"] < 8 * GIB


@given(
    context=st.integers(min_value=256, max_value=32768),
    slots=st.integers(min_value=1, max_value=64),
)
def test_more_context_or_slots_never_need_less(context: int, slots: int) -> None:
    entry = CATALOG.entry("qwen2.5-0.5b-instruct")
    layout = safetensors_layout(entry.shape, "BF16")

    def total(tokens: int, count: int) -> int:
        found = estimate_on_cpu(
            entry.shape,
            layout,
            context_tokens=tokens,
            slots=count,
            max_num_seqs=max(16, count),
            max_num_batched_tokens=2048,
            margin=0,
            budget=0,
        )
        assert found.host.kv_cache == found.kv_cache_memory_bytes
        return found.host.total

    base = total(context, slots)
    assert total(context + 128, slots) > base
    assert total(context, slots + 1) > base
