"""The planner keeps its limits for a fleet: 10,000 hosts, at most 20 s, growth at most n^1.1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "plan_scale.py"


@pytest.mark.slow
def test_ten_thousand_hosts() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--without-memo", "20"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 10000 | 399 |" in done.stdout
