"""Planning again on a host whose free memory moves: the modules as plays run them, on a simulated driver."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.manifest import write_section

from .test_gpu_facts import CARD, CHECKOUT, LAB, SimulatedHost

MIB = 1024 * 1024
FOREIGN_PID = 777
PLAY = """
- hosts: localhost
  connection: local
  gather_facts: false
  vars:
    fleetfit_model: smollm2-135m-instruct
    fleetfit_engine: llama_cpp
    fleetfit_min_quality_tier: rest
  tasks:
    - fleetfit.llm.host_state:
        root: "{{ probe_root }}"
        library_path: "{{ library }}"
    - fleetfit.llm.select_quantization:
    - ansible.builtin.copy:
        content: "{{ ansible_facts['fleetfit'] | to_json }}"
        dest: "{{ out }}/facts.json"
        mode: "0600"
    - ansible.builtin.copy:
        content: "{{ ansible_facts['fleetfit_plan'] | to_json }}"
        dest: "{{ out }}/plan.json"
        mode: "0600"
"""


@dataclass
class PlannedHost:
    """A simulated host that is planned for by ansible-playbook."""

    host: SimulatedHost
    folder: Path

    @property
    def profile(self) -> Path:
        return self.folder / "profile.ini"

    def hold(self, mib: int) -> None:
        """Let somebody else's process hold so much of the card."""
        process = f"\n[process]\npid = {FOREIGN_PID}\nused_mib = {mib}\n"
        self.profile.write_text((LAB / "profiles/rtx-4090.ini").read_text() + process)

    def plan(self) -> tuple[dict[str, Any], bytes]:
        """Return the facts and the plan's bytes of one run."""
        play = self.folder / "play.yml"
        play.write_text(PLAY)
        variables = {
            "probe_root": str(self.host.root),
            "library": str(self.host.library),
            "out": str(self.folder),
            # The modules run with the interpreter of the tests.
            "ansible_python_interpreter": sys.executable,
        }
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("ansible-playbook")),
                "-i",
                "localhost,",
                str(play),
                "-e",
                json.dumps(variables),
            ],
            cwd=CHECKOUT,
            env={**os.environ, "ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        facts: dict[str, Any] = json.loads((self.folder / "facts.json").read_bytes())
        return facts, (self.folder / "plan.json").read_bytes()


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlannedHost:
    """An RTX 4090 of which somebody else's process holds 100 MiB."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is needed to build the simulated library")
    subprocess.run([str(LAB / "build"), str(tmp_path)], check=True)
    made = PlannedHost(
        SimulatedHost(tmp_path / "libnvidia-ml.so.1", tmp_path / "root", monkeypatch), tmp_path
    )
    made.hold(100)
    made.host.use(made.profile)
    made.host.process(FOREIGN_PID, "/user.slice/session-1.scope", "blender")
    return made


def free(facts: dict[str, Any]) -> int:
    return int(facts["live"]["devices"][CARD]["free_bytes"])


def test_free_memory_that_moves_within_a_step_leaves_the_plans_bytes_alone(planned: PlannedHost) -> None:
    _, first = planned.plan()
    deployment = json.loads(first)["deployments"][0]
    # From here on the host has a plan and an engine, as after a first run.
    planned.host.engine({CARD: deployment["memory_bytes"]["weights"]})
    write_section(str(planned.host.root / "etc/fleetfit/manifest.json"), "plan", json.loads(first))
    before, kept = planned.plan()
    assert before["foreign_bytes"] == {CARD: 256 * MIB}

    planned.hold(200)
    within, again = planned.plan()
    assert free(within) == free(before) - 100 * MIB, "the free memory has really moved"
    assert within["foreign_bytes"] == before["foreign_bytes"]
    assert again == kept

    planned.hold(300)
    beyond, other = planned.plan()
    assert beyond["foreign_bytes"] == {CARD: 512 * MIB}
    assert other != kept
    budgets = [json.loads(text)["deployments"][0]["memory_bytes"]["budget"] for text in (kept, other)]
    assert budgets[0] - budgets[1] == 256 * MIB
    assert beyond["stable"] == before["stable"]
