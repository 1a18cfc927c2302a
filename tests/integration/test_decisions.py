"""The planner's decisions against a brute force over llama.cpp's own accounting (benchmarks/sizing).

No false fit, at most 1 % needless refusals, each missing by at most max(256 MiB, 2 % of the card). ``make
test`` judges a sample, ``make test-all`` all cases.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.sizing import decisions
from benchmarks.sizing.oracle import Oracle, OracleMissingError

CASES = 574
SAMPLE = 60


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[decisions.Truth]:
    """The oracle; without it these tests fail and say how to build it: a skipped comparison proves
    nothing."""
    try:
        with decisions.open_truth(Oracle(tmp_path_factory.mktemp("sparse"))) as truth:
            yield truth
    except OracleMissingError as missing:
        pytest.fail(str(missing), pytrace=False)


def test_sample(truth: decisions.Truth) -> None:
    """Some of every kind; a card made to measure for one load in ten."""
    cases = decisions.draw_cases(CASES)[:: CASES // SAMPLE]
    findings = decisions.run(truth, cases, decisions.tight_loads(cases)[::10])
    assert not findings.problems(), "\n".join(findings.problems())
    assert findings.cases >= SAMPLE
    assert {"resident", "partial", "nothing"} <= set(findings.kinds)


@pytest.mark.slow
def test_every_case(truth: decisions.Truth) -> None:
    cases = decisions.draw_cases(CASES)
    findings = decisions.run(truth, cases, decisions.tight_loads(cases))
    assert not findings.problems(), "\n".join(findings.problems())
    assert findings.cases >= 500


def test_what_is_too_small_by_a_mebibyte_is_found(truth: decisions.Truth) -> None:
    """The judge itself: a card that the planner is told is larger than it is gives a false fit."""
    load = decisions.Load("qwen2.5-7b", 8192, 2, "f16")
    everything = decisions.Place((0,), (load.layers,))
    need = truth.needs(load, "Q8_0", everything)[0][0]
    card = decisions.Card("exact", 1 << 15)
    exact = replace(card, foreign=int(card.room - need))
    case = decisions.Case(load, (exact,), 1 << 16)
    assert 0 <= truth.slack(case, "Q8_0", everything) < 1
    less = replace(case, cards=(replace(exact, foreign=exact.foreign + 1),))
    assert truth.slack(less, "Q8_0", everything) < 0
    assert truth.resident(less, "Q8_0") is None
    assert truth.resident(less, "Q6_K") is not None


def test_the_judge_counts_a_false_fit(truth: decisions.Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a planner that forgets CUDA's context the same cases must fail."""
    monkeypatch.setattr("ansible_collections.fleetfit.llm.plugins.module_utils.memory.CUDA_OVERHEAD_BYTES", 0)
    load = decisions.Load("qwen2.5-7b", 8192, 2, "f16")
    findings = decisions.run(truth, [], [load])
    assert findings.false_fits
