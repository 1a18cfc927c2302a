"""A newer driver in the repository is told and never taken; what is installed stays held."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from testinfra.host import Host

PACKAGES = ("libnvidia-ml1", "libcuda1", "nvidia-driver-cuda", "nvidia-kernel-open-dkms")
CHECKOUT = Path(__file__).resolve().parents[3]


def facts(machine: Host) -> dict[str, Any]:
    """Return the host's driver facts, as anybody would ask for them."""
    name = machine.backend.get_hostname()
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible")),
            *("-i", f"{name},", name, "-b", "-m", "fleetfit.llm.gpu_facts", "-a", "drivers=true"),
            *("-e", "ansible_python_interpreter=/usr/bin/python3"),
            *("-e", f"ansible_ssh_common_args='-F {os.environ['LAB_SSH_CONFIG']}'"),
        ],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        # Molecule asks for colours, which are no JSON.
        env={name: value for name, value in os.environ.items() if name != "ANSIBLE_FORCE_COLOR"}
        | {"ANSIBLE_NOCOLOR": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.find("{") :])["ansible_facts"][
        "fleetfit_drivers"
    ]
    return found


def test_the_second_run_installed_nothing_newer(machine: Host) -> None:
    """Molecule's idempotence ran the role with 580.105.08 and 595.71.05 in the repository: changed=0."""
    for name in PACKAGES:
        assert machine.package(name).version == "580.95.05-1", name


def test_apt_itself_would_not_take_it_either(machine: Host) -> None:
    simulated = machine.check_output("apt-get -s -o Debug::NoLocking=1 dist-upgrade")
    assert [line for line in simulated.splitlines() if line.startswith("Inst") and "nvidia" in line] == []
    assert set(PACKAGES) <= set(machine.check_output("apt-mark showhold").split())


def test_the_newer_driver_is_told_as_a_candidate(machine: Host) -> None:
    state = facts(machine)
    assert (state["installed"]["version"], state["installed"]["source"]) == ("580.95.05", "nvidia")
    assert (state["candidate"]["version"], state["candidate"]["source"]) == ("580.105.08", "nvidia")
    assert [offer["version"] for offer in state["candidate"]["offered"]][:2] == ["595.71.05", "580.105.08"]
    assert set(state["installed"]["held"]) == set(PACKAGES)
    assert "driver_branch_end_of_life" not in {problem["code"] for problem in state["problems"]}
