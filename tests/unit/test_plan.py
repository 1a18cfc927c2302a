"""A plan is data that says why; it sticks, it maps to the CPU in the lab, and equal inputs give equal bytes."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.engine_args import (
    LLAMA_CPP_SETTINGS,
    llama_server_argv,
    vllm_args,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.plan import make_plan, plan_host, previous_of
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import policy_from_variables
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import evaluate
from ansible_collections.fleetfit.llm.plugins.module_utils.units import GIB, MIB
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import check_schema_of_plan

from .planning import CATALOG, accelerator, cards, facts, lab_entry, request


def plan(host: dict[str, Any], *, previous: Any = None, model: str = "", **variables: Any) -> dict[str, Any]:
    entry = CATALOG.entry(model) if model else lab_entry()
    named = {f"fleetfit_{name}": value for name, value in variables.items()}
    result = plan_host(
        host,
        policy_from_variables({"fleetfit_model": entry.id, **named}),
        entry=entry,
        gpus=CATALOG.gpus,
        engines=CATALOG.engines,
        available_engines=frozenset(["llama_cpp"]),
        siblings=CATALOG.siblings(entry),
        previous=previous,
        require_pinned=not model,
    )
    check_schema_of_plan(result)
    return result


SMALL = [accelerator("RTX 3060 8GB", memory_total_bytes=1610 * MIB, memory_reserved_bytes=0)]


def text(data: Any) -> str:
    return json.dumps(data, sort_keys=True)


def test_a_replan_beside_the_running_engine_is_the_same_plan() -> None:
    host = facts(cards("RTX 4090"))
    first = plan(host)
    running = copy.deepcopy(host)
    running["live"] = {"devices": {"GPU-0": {"free_bytes": 1, "used_bytes": 24 * GIB}}}
    assert text(plan(running, previous=first)) == text(first)


def test_a_host_keeps_its_variant_and_hears_of_a_better_one() -> None:
    before = plan(facts(SMALL))
    assert before["deployments"][0]["variant"] == "Q4_K_M"
    bigger = facts(cards("RTX 4090"))
    kept = plan(bigger, previous=before)
    assert kept["deployments"][0]["variant"] == "Q4_K_M"
    assert kept["sticky"] is True
    assert kept["available"]["variant"] == "Q8_0"
    # The next run says the same, and so does the compact form that host_state hands on.
    assert text(plan(bigger, previous=kept)) == text(kept)
    assert text(plan(bigger, previous=previous_of(kept))) == text(kept)
    taken = plan(bigger, previous=kept, replan=True)
    assert taken["deployments"][0]["variant"] == "Q8_0"
    assert taken["sticky"] is False
    assert taken["available"] is None


def test_a_changed_policy_or_a_variant_that_no_longer_fits_is_planned_anew() -> None:
    before = plan(facts(SMALL))
    assert plan(facts(cards("RTX 4090")), previous=before, slots=1)["deployments"][0]["variant"] == "Q8_0"
    large = plan(facts(cards("RTX 4090")))
    # It would still fit with layers in RAM, which nobody asked for.
    assert plan(facts(SMALL), previous=large)["deployments"][0]["variant"] == "Q4_K_M"


def test_a_plan_of_another_version_is_refused_by_name_and_replanned_on_request() -> None:
    with pytest.raises(FleetfitError, match="schema_version 9") as caught:
        plan(facts(SMALL), previous={"schema_version": 9})
    assert caught.value.code == "plan_schema_version"
    assert plan(facts(SMALL), previous={"schema_version": 9}, replan=True)["deployments"]


def test_the_reason_names_the_choice_and_the_hurdle_of_the_better_ones() -> None:
    reason = plan(facts(SMALL))["reason"]
    assert reason.startswith("Q4_K_M with llama_cpp on RTX 3060 8GB: the best quality")
    assert "Q8_0 would leave layers in RAM" in reason


def test_the_reason_of_a_slow_choice_says_what_would_be_faster() -> None:
    """Quality comes before speed, also among what has layers in RAM: that it costs speed is not kept quiet."""
    host = facts(cards("RTX 3060 12GB"))
    slow = make_plan(request("qwen2.5-14b-instruct", host), host, catalog_digest="")
    assert slow["deployments"][0]["variant"] == "Q8_0"
    assert "with layers in RAM" in slow["reason"]
    assert re.search(r"about \d\.\d tokens/s, Q4_K_M would be \d\.\d times as fast", slow["reason"])
    resident = make_plan(request("qwen2.5-7b-instruct", host), host, catalog_digest="")
    assert "times as fast" not in resident["reason"]


def test_the_reason_says_why_a_gpu_stays_unused() -> None:
    unused = "the GPU budget has no room for any layer of it"
    reason = plan(facts(SMALL), vram_reserve_bytes=1 << 40)["reason"]
    assert "on the CPU: " in reason
    assert unused in reason
    assert unused not in plan(facts(SMALL))["reason"]
    assert unused not in plan(facts([]))["reason"]


def test_settings_are_complete_and_render_to_the_same_arguments_as_the_candidate() -> None:
    result = plan(facts(cards("RTX 4090")))
    settings = result["deployments"][0]["settings"]
    assert set(settings) == set(LLAMA_CPP_SETTINGS)
    argv = llama_server_argv(
        settings,
        binary="{release}/env/bin/llama-server",
        model_path="/m.gguf",
        host="127.0.0.1",
        port=8080,
        api_key_file="{credentials}/api-key",
        chat_template_file="{release}/chat_template.jinja",
    )
    chosen = next(item for item in result["candidates"] if item["variant"] == "Q8_0")
    start = argv.index("-c")
    assert argv[start : start + len(chosen["args"])] == chosen["args"]
    wanted = "-c -np -b -ub -ngl -fa -ctk -ctv --fit --split-mode --cache-ram --load-mode --no-repack --port"
    for flag in [*wanted.split(), "--metrics", "--no-slots", "--jinja", "--api-key-file", "--host"]:
        assert argv.count(flag) == 1, flag
    assert argv[argv.index("--fit") + 1] == "off"
    assert argv[argv.index("-c") + 1] == "16384"
    incomplete = {name: value for name, value in settings.items() if name != "n_ctx"}
    with pytest.raises(FleetfitError, match="n_ctx"):
        llama_server_argv(
            incomplete,
            binary="x",
            model_path="m",
            host="h",
            port=1,
            api_key_file=None,
            chat_template_file=None,
        )


def test_several_cards_and_rope_and_vllm_are_rendered() -> None:
    best = max(
        (
            item
            for item in evaluate(
                request(
                    "qwen2.5-32b-instruct",
                    facts(cards("RTX 4090", "RTX 4090")),
                    min_context_tokens=40960,
                    slots=1,
                )
            )
            if item.fits and item.resident
        ),
        key=lambda item: item.score("quality"),
    )
    args = best.args()
    split = args[args.index("--tensor-split") + 1].split(",")
    assert sum(int(part) for part in split) == best.gpu_layers == 65
    assert args[args.index("--split-mode") + 1] == "layer"
    assert args[args.index("--rope-scale") + 1] == "4"
    assert args[args.index("--yarn-orig-ctx") + 1] == "32768"
    awq = next(
        item
        for item in evaluate(
            request("qwen2.5-7b-instruct", facts(cards("RTX 4090")), engines=("vllm",), engine="vllm")
        )
        if item.variant.name == "AWQ"
    )
    assert awq.fits
    rendered = vllm_args(awq.settings)
    assert rendered[rendered.index("--max-model-len") + 1] == "8192"
    assert "--quantization" not in rendered


def test_mapping_to_the_cpu_changes_what_must_and_says_so() -> None:
    result = plan(facts(cards("RTX 4090", "RTX 4090")), simulated_gpus=True)
    deployment = result["deployments"][0]
    mapping = deployment["cpu_mapping"]
    assert mapping["settings"]["n_gpu_layers"] == 0
    assert mapping["settings"]["device_uuids"] == []
    assert mapping["changed"]["n_gpu_layers"] == [31, 0]
    for name, value in mapping["settings"].items():
        if name not in mapping["changed"]:
            assert value == deployment["settings"][name]
    # On the CPU the tied embeddings exist once, and everything lies in RAM.
    assert mapping["host"]["weights"] < deployment["memory_bytes"]["weights"]
    assert mapping["host"]["kv_cache"] == deployment["memory_bytes"]["kv_cache"]
    assert mapping["memory_bytes"] == mapping["host"]
    assert plan(facts(cards("RTX 4090")))["deployments"][0]["cpu_mapping"] is None


def test_calibration_replaces_the_constants_and_the_plan_says_so() -> None:
    entry = lab_entry()
    record = {
        "engine": "llama_cpp",
        "engine_version": CATALOG.engines["engines"]["llama_cpp"]["version"],
        "gpu": "NVIDIA GeForce RTX 4090",
        "model": entry.id,
        "variant": "Q8_0",
        "count": 2,
        "overhead_bytes": 300 * MIB,
        "residual_bytes": 10 * MIB,
    }

    def planned(records: list[dict[str, Any]]) -> dict[str, Any]:
        return plan_host(
            facts(cards("RTX 4090")),
            policy_from_variables({"fleetfit_model": entry.id}),
            entry=entry,
            gpus=CATALOG.gpus,
            engines=CATALOG.engines,
            available_engines=frozenset(["llama_cpp"]),
            calibration=records,
        )["deployments"][0]

    device = planned([record])["devices"][0]
    assert device["overhead"] == 300 * MIB
    assert device["margin"] == 256 * MIB
    assert "measured 2 times" in planned([record])["sources"]["overhead"]
    other = planned([{**record, "engine_version": "0"}])
    assert other["devices"][0]["overhead"] == 512 * MIB
    assert "constant" in other["sources"]["overhead"]


def test_digests_follow_what_they_are_of() -> None:
    host = facts(cards("RTX 4090"))
    first = plan(host)
    moved = {**host, "foreign_bytes": {"GPU-0": 256 * MIB}}
    assert plan(moved)["facts_digest"] == first["facts_digest"]
    entry = lab_entry()
    other = plan_host(
        host,
        policy_from_variables({"fleetfit_model": entry.id}),
        entry=replace(entry, digest="1" * 64),
        gpus=CATALOG.gpus,
        engines=CATALOG.engines,
        available_engines=frozenset(["llama_cpp"]),
    )
    assert other["catalog_digest"] != first["catalog_digest"]
