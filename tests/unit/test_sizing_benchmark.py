"""`python -m benchmarks.sizing`: one table, and judges that see what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_catalog

from benchmarks.sizing import files, memory, monotone
from benchmarks.sizing.run import REPORTED, Report
from benchmarks.sizing.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[2]


def term(what: str, plan_mib: float, truth_mib: int, *, single: bool = True) -> memory.Term:
    return memory.Term("a model", memory.Cell(8192), "device 0", what, plan_mib, truth_mib, single)


@pytest.mark.parametrize("what", ["weights", "kv_cache"])
@pytest.mark.parametrize(
    ("plan_mib", "truth_mib", "ok"),
    [
        (100.0, 100, True),
        (100.99, 100, True),  # llama.cpp cuts to whole MiB
        (102.0, 100, True),
        (102.1, 100, False),
        (99.0, 100, True),
        (98.9, 100, False),
        (9992.0, 10000, True),  # 0.1 %
        (9989.0, 10000, False),
        (10010.0, 10000, True),
        (10012.0, 10000, False),
    ],
)
def test_weights_and_kv_are_exact(what: str, plan_mib: float, truth_mib: int, ok: bool) -> None:
    assert (term(what, plan_mib, truth_mib).problem is None) == ok


@pytest.mark.parametrize(
    ("plan_mib", "truth_mib", "single", "ok"),
    [
        (100.0, 100, True, True),
        (99.9, 100, True, False),  # never under
        (99.9, 100, False, False),
        (132.9, 100, True, True),
        (134.0, 100, True, False),
        (1099.0, 1000, True, True),  # 10 %
        (1102.0, 1000, True, False),
        (1102.0, 1000, False, True),  # several devices: bounded from below alone
    ],
)
def test_compute_is_never_under_and_not_far_over(
    plan_mib: float, truth_mib: int, single: bool, ok: bool
) -> None:
    assert (term("compute", plan_mib, truth_mib, single=single).problem is None) == ok


def test_the_cells_are_those_of_the_table() -> None:
    cells = memory.cells("qwen3-30b-a3b")
    assert {cell.context for cell in cells} == {1000, 8193, 32768}
    assert {cell.slots for cell in cells} == {1, 3, 4}
    assert {cell.kv_type for cell in cells} == {"f16", "q8_0"}
    assert {cell.devices for cell in cells} == {0, 1, 2}
    layers = 48
    assert {cell.layers for cell in cells if cell.devices == 1} == {1, layers // 2, layers, layers + 1}
    assert any(cell.cpu_moe for cell in cells)
    assert len(memory.SAMPLE) >= 12


def test_every_shape_of_the_catalog_is_compared_with_llama_cpp() -> None:
    """A model that is added to the catalog is added to benchmarks/sizing/shapes.py; its context may differ."""
    compared = {replace(shape, native_context_tokens=1) for shape in SHAPES.values()}
    missing = [
        name
        for name, entry in load_catalog().entries.items()
        if replace(entry.shape, native_context_tokens=1) not in compared
    ]
    assert not missing


def test_where_more_is_worse_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert monotone.run(20)[1] == []
    scores = iter(range(10_000, 0, -1))
    monkeypatch.setattr(monotone, "score", lambda facts, policy: (float(next(scores)),))
    compared, worse = monotone.run(20)
    assert compared == len(worse) > 20


def test_a_row_that_fails_fails_the_table() -> None:
    report = Report()
    report.add("a", "b", "c", True)
    report.add("a", "b", "c", REPORTED)
    assert report.ok
    report.add("a", "b", "c", False)
    assert not report.ok
    assert report.table()[-1] == "| a | b | c | FAIL |"


def test_one_command_prints_one_table_and_writes_the_page(tmp_path: Path) -> None:
    page, parts = tmp_path / "page.md", tmp_path / "parts"
    command = [sys.executable, "-m", "benchmarks.sizing", "--rows", "files,gpu", "--out", str(page)]
    command += ["--parts", str(parts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    kept = json.loads((parts / "files.json").read_text())
    kept["rows"][0]["measured"] = "kept from before"
    (parts / "files.json").write_text(json.dumps(kept))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "kept from before" in again.stdout
    (parts / "files.json").write_text(json.dumps({**kept, "versions": "another build"}))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "kept from before" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == "| what | must be | measured | |"
    assert len(lines) >= 6
    assert all(line in page.read_text().splitlines() for line in lines)
    assert "CPython" in page.read_text()
    wrong = subprocess.run(
        [sys.executable, "-m", "benchmarks.sizing", "--rows", "nonsense"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert wrong.returncode == 2
    assert "nonsense" in wrong.stderr


def test_a_wrong_file_size_is_seen() -> None:
    assert not files.FileSize("m", "Q4_K_M", 4.71, 4.68, 0.0234).ok
    assert files.FileSize("m", "Q4_K_M", 4.70, 4.68, 0.0234).ok
