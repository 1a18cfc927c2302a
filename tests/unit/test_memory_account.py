"""The plan's memory terms beside the engine's, as a person reads them after an engine ran out of memory."""

from __future__ import annotations

from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.memory_account import (
    memory_sentence,
    planned_memory,
)

GIB = 2**30
TERMS = {
    "weights": 4 * GIB,
    "kv_cache": GIB,
    "compute": GIB // 2,
    "overhead": GIB // 2,
    "margin": GIB,
    "total": 7 * GIB,
    "budget": 8 * GIB,
}
HOST = {**TERMS, "weights": 0, "total": 3 * GIB}


def plan(**other: Any) -> dict[str, Any]:
    """Return a plan with one GPU."""
    deployment = {"devices": [{"id": "GPU-a", "name": "RTX 3060", **TERMS}], "host": HOST, **other}
    return {"deployments": [deployment]}


def test_every_term_of_the_plan_stands_beside_what_the_engine_logged() -> None:
    sentence = memory_sentence(plan(), {"CUDA0": {"model": 4 * GIB, "kv": GIB}})
    assert sentence == (
        "Planned for RTX 3060: weights 4.0 GiB + kv_cache 1.0 GiB + compute 512 MiB + overhead 512 MiB"
        " + margin 1.0 GiB = 7.0 GiB of 8.0 GiB. The engine logged CUDA0: model 4.0 GiB, KV cache 1.0 GiB."
    )


def test_vllms_figures_are_named_alike() -> None:
    measured = {"vllm": {"model_bytes": 5 * GIB, "kv_bytes": 2 * GIB, "kv_tokens": 9}}
    assert "The engine logged vllm: model 5.0 GiB, KV cache 2.0 GiB." in memory_sentence(plan(), measured)


def test_an_engine_that_died_before_it_logged_anything() -> None:
    assert memory_sentence(plan(), {}).endswith("The engine logged no memory figures before it ended.")


def test_the_lab_shows_what_its_cpu_engine_was_started_for() -> None:
    assert [row["device"] for row in planned_memory(plan(cpu_mapping={"host": HOST}))] == ["RAM"]
    assert [row["device"] for row in planned_memory(plan(devices=[]))] == ["RAM"]


def test_without_a_plan_nothing_is_said() -> None:
    assert memory_sentence({}, {"CUDA0": {"model": 1}}) == ""
    assert planned_memory({"deployments": []}) == []
