"""A disk that is too small for two releases of a Python service is refused before anything is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
PLAY: list[dict[str, Any]] = [
    {
        "name": "Look at a host that the facts describe",
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "tasks": [
            {
                "name": "Take the facts",
                "ansible.builtin.set_fact": {"cacheable": True, "fleetfit": "{{ given_facts }}"},
            },
            {
                "name": "Require room",
                "ansible.builtin.include_role": {
                    "name": "fleetfit.llm.python_runtime",
                    "tasks_from": "environment_preflight",
                },
            },
        ],
    }
]


def preflight(folder: Path, free_bytes: int) -> subprocess.CompletedProcess[str]:
    """Run the preflight of a wheelhouse of 1 GiB on a host with ``free_bytes`` of free disk."""
    facts = {
        "stable": {"arch": "x86_64", "os": {"python": "3.11.2", "glibc": "2.36"}},
        "live": {"disk_free_bytes": {"/opt/fleetfit": free_bytes}},
    }
    entry = {"python": "3.11", "arch": "x86_64", "glibc": "2.34", "size": GIB, "sha256": "e" * 64}
    variables = {
        "given_facts": facts,
        "python_runtime_service": "absent-in-tests",
        "python_runtime_wheelhouses": [{**entry, "url": "http://nowhere/x"}],
        "ansible_python_interpreter": sys.executable,
    }
    (folder / "play.yml").write_text(json.dumps(PLAY))
    return subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible-playbook")),
            *[str(folder / "play.yml"), "-i", "localhost,", "-e", json.dumps(variables)],
        ],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(("free_gib", "fits"), [(6, True), (5.9, False)])
def test_two_releases_must_fit(tmp_path: Path, free_gib: float, fits: bool) -> None:
    """1 GiB of wheels, 4 GiB of environment, 1 GiB in reserve."""
    done = preflight(tmp_path, int(free_gib * GIB))
    output = " ".join(done.stdout.split())
    assert (done.returncode == 0) is fits, output
    if not fits:
        for words in ("has 5.9 GiB free", "needs 5.0 GiB beside the present one", "1.0 GiB stay free"):
            assert words in output, output
