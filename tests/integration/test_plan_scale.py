"""The planner keeps its limits for a fleet: 10,000 hosts, at most 20 s, growth at most n^1.1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_ten_thousand_hosts() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sizing", "--rows", "scale"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 10,000 fact sets, 399 distinct" in done.stdout
    assert "| pass |" in done.stdout
