"""docs/drivers.md: every complaint names tests that are there, every problem code is one that is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
TEXT = (REPO / "docs/drivers.md").read_text()


def table(title: str) -> list[list[str]]:
    """Return the rows of the table below a title, without its head."""
    section = TEXT.split(f"## {title}", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


COMPLAINTS = table("What people complain about")


@pytest.mark.parametrize("row", COMPLAINTS, ids=lambda row: row[0][:40])
def test_a_complaint_has_threads_an_answer_and_tests_that_exist(row: list[str]) -> None:
    _complaint, threads, answer, shown = row
    assert re.search(r"#\d+|skill", threads)
    assert len(answer) > 20
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", shown)
    assert named, "a complaint without a test needs a reason, and a test that comes nearest"
    for path, function in named:
        assert re.search(rf"^def {function}\(", (REPO / path).read_text(), re.MULTILINE), (
            f"{path}::{function}"
        )


def test_every_kind_of_complaint_is_there() -> None:
    assert len(COMPLAINTS) >= 21


def test_every_problem_is_documented() -> None:
    documented = {code for row in table("Problems") for code in re.findall(r"`(\w+)`", row[0])}
    told = set()
    for name in ("driver_facts.py", "gpu_facts.py"):
        source = (REPO / "plugins/module_utils" / name).read_text()
        told |= set(re.findall(r'Problem\(\s*"(\w+)"', source))
    told -= {  # of the probe itself: docs/contracts.md, section 1
        *(
            "driver_missing",
            "nvml_not_found",
            "nvml_no_permission",
            "nvml_error",
            "gpu_lost",
            "memory_not_supported",
        ),
        "probe_failed",
    }
    assert told == documented
