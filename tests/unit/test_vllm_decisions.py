"""The planner's decisions for vLLM against its written formula, and that the judge sees what is wrong."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.sizing import vllm_decisions as decisions

MODULE_UTILS = "ansible_collections.fleetfit.llm.plugins.module_utils"
CASES = decisions.draw_cases()[::5]


def test_no_false_fit_and_no_needless_refusal() -> None:
    findings = decisions.run(CASES, decisions.tight_cases(CASES)[::3])
    assert not findings.problems(), "\n".join(findings.problems())
    assert findings.cases >= 100
    assert set(findings.kinds) == {"nothing", *decisions.SCHEMES}


@pytest.mark.slow
def test_every_case() -> None:
    cases = decisions.draw_cases()
    findings = decisions.run(cases, decisions.tight_cases(cases))
    assert not findings.problems(), "\n".join(findings.problems())
    assert not findings.needless_candidates
    assert findings.cases >= 500


def test_a_planner_that_forgets_a_term_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE_UTILS}.memory_vllm.NON_TORCH_SINGLE_BYTES", 0)
    assert decisions.run([], decisions.tight_cases(CASES)).false_fits


def test_a_planner_that_takes_too_much_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE_UTILS}.memory_vllm.CUDA_GRAPH_BYTES", 2 << 30)
    findings = decisions.run(CASES, decisions.tight_cases(CASES)[::3])
    assert findings.beyond_bound
    assert findings.problems()


def test_a_planner_that_tries_one_order_of_unlike_cards_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage of a pipeline holds the embeddings, the last one the head: the order decides."""
    monkeypatch.setattr(f"{MODULE_UTILS}.selection.VLLM_EXHAUSTIVE_DEVICES", 0)
    cases = [case for case in decisions.draw_cases() if len(case.cards) > 1]
    assert decisions.run(cases).needless_candidates


def test_an_instance_of_a_partitioned_card_is_left_to_llama_cpp() -> None:
    whole = decisions.Card("A100", 40 << 30, 0, 0, "8.0", 1.5e12)
    case = replace(CASES[0], model="qwen2.5-7b", context=4096, slots=1, kv_type="f16", ram=64 << 30)
    case = replace(case, driver="580.95.05", lowest_tier="Q4_K_M", schemes=("AWQ",))
    served, (found,) = decisions.plan(replace(case, cards=(replace(whole, mig=True),)))
    assert served is None
    assert found["rejected"]["code"] == "mig_not_supported"
    served, (found,) = decisions.plan(replace(case, cards=(replace(whole, mig=True), whole)))
    assert served == "AWQ"
    assert [device["id"] for device in found["devices"]] == ["GPU-1"]
