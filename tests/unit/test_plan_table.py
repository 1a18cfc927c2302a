"""Promises of plugin_utils.plan_table: every host has a row, every problem its remedy."""

from __future__ import annotations

from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.units import GIB
from ansible_collections.fleetfit.llm.plugins.plugin_utils.plan_table import format_table, plan_text


def facts(*names: str, problems: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"stable": {"accelerators": [{"name": name} for name in names]}, "problems": problems or []}


def plan(**changes: Any) -> dict[str, Any]:
    deployment = {
        "engine": "llama_cpp",
        "variant": "Q4_K_M",
        "slots": 2,
        "context_tokens": 8192,
        "memory_bytes": {"total": 5 * GIB, "budget": 40 * GIB},
        "devices": [{"total": 3 * GIB, "budget": 11 * GIB}],
        "host": {"total": 2 * GIB, "budget": 29 * GIB},
        "expected_tokens_per_s": 41.6,
        "cpu_mapping": {"settings": {}},
    }
    rejected = {
        "code": "too_large",
        "reason": "short by 2.0 GiB",
        "device": "GPU-a",
        "short_by_bytes": 2 * GIB,
    }
    candidates = [
        {"engine": "llama_cpp", "variant": "Q8_0", "rejected": rejected},
        {"engine": "llama_cpp", "variant": "Q4_K_M", "rejected": None},
    ]
    base = {"deployments": [deployment], "candidates": candidates, "available": None, "sticky": False}
    return {**base, "reason": "the best that fits", **changes}


def test_a_row_says_what_is_served_and_that_the_gpu_is_simulated() -> None:
    text = plan_text({"edge": (facts("A", "A"), plan())}, candidates=False)
    row = next(line for line in text.splitlines() if line.startswith("edge  "))
    assert row.split() == [
        *("edge", "2x", "A", "llama_cpp", "Q4_K_M", "2x", "8192", "3.0", "of", "11.0", "GiB", "42"),
        *("none", "simulated", "GPU"),
    ]
    assert "edge: the best that fits" in text
    assert "short by" not in text


def test_a_host_without_a_gpu_shows_its_ram_and_nothing_simulated() -> None:
    deployment = {**plan()["deployments"][0], "devices": []}
    text = plan_text({"edge": (facts(), plan(deployments=[deployment]))}, candidates=False)
    row = next(line for line in text.splitlines() if line.startswith("edge  "))
    assert "RAM 2.0 of 29.0 GiB" in row
    assert "simulated" not in row


def test_candidates_show_why_not() -> None:
    text = plan_text({"edge": (facts("A"), plan())}, candidates=True)
    assert "llama_cpp Q8_0: no: short by 2.0 GiB" in text
    assert "llama_cpp Q4_K_M: fits" in text


def test_candidates_with_layers_in_ram_say_so() -> None:
    layers = {"Q8_0": 20, "Q4_K_M": 29}
    candidates = [
        {"engine": "llama_cpp", "variant": variant, "rejected": None, "gpu_layers": number}
        for variant, number in layers.items()
    ]
    lines = plan_text({"edge": (facts("A"), plan(candidates=candidates))}, candidates=True).splitlines()
    assert "    llama_cpp Q8_0: fits, with 20 of 29 layers on GPU" in lines
    assert "    llama_cpp Q4_K_M: fits" in lines


def test_a_host_without_a_plan_keeps_its_row() -> None:
    text = plan_text({"gone": (None, None), "bare": (facts(), None)}, candidates=False)
    assert text.count("no plan") == 2


def test_problems_come_with_their_remedy() -> None:
    problem = {"code": "gpu_lost", "message": "A card is lost.", "remedy": "Reboot.", "device": None}
    text = plan_text({"edge": (facts(problems=[problem]), plan())}, candidates=False)
    assert "edge: problem gpu_lost: A card is lost. Reboot." in text


def test_a_better_variant_is_reported_with_the_way_to_take_it() -> None:
    text = plan_text({"edge": (facts("A"), plan(available={"variant": "Q8_0"}))}, candidates=False)
    assert "Q8_0 (take it with -e fleetfit_replan=true)" in text


def test_columns_line_up() -> None:
    lines = format_table([["a", "bb"], ["ccc", "d"]]).splitlines()
    assert lines == ["a    bb", "---  --", "ccc  d"]


def test_the_time_without_answers_is_said_with_where_it_comes_from() -> None:
    hosts = {name: (facts("A"), plan()) for name in ("one", "two", "new", "old")}
    measured = {"llama-server": {"ready_s": 11.0, "stop_s": 1.0}}
    starts = {"one": measured, "two": measured, "new": {}, "old": {"llama-server": {}}}
    text = plan_text(hosts, candidates=False, last_starts=starts)
    cells = {line.split()[0]: line for line in text.splitlines() if "GiB" in line}
    assert ["12 s" in cells[name] for name in hosts] == [True, True, False, False]
    assert "  none  " in cells["new"]
    assert "; one, two: measured: this host's last good start" in text
    assert "; old: unknown: the size of the model is not known" in text
