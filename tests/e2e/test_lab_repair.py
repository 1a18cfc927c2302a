"""A lab left half-up, by a killed run or a reboot, is recognised, repaired, and serves as before.

Needs the deployed lab (`make lab`), whose hosts it stops and starts; nothing of what they hold is lost.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import Any

import pytest

from fleetfit.lab.paths import lab_paths

from .conftest import BIN, REPO, Host

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (REPO / ".lab/state.json").exists(), reason="no lab here: run `make lab`"),
]

STOPPED = "gpu-small"
# Long enough for the command to have begun, too short for it to have repaired anything.
KILL_AFTER_S = 2.0
UP_TIMEOUT_S = 300
SERVE_TIMEOUT_S = 120


def status() -> tuple[int, dict[tuple[str, str], str]]:
    """Return the exit code of `fleetfit lab status` and what it says of each part."""
    done = subprocess.run(
        [str(BIN / "fleetfit"), "lab", "status", "--json"],
        cwd=REPO,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, {(part["kind"], part["name"]): part["state"] for part in document["parts"]}


def up() -> subprocess.Popen[bytes]:
    """Start `fleetfit lab up` with a process group of its own."""
    return subprocess.Popen(
        [str(BIN / "fleetfit"), "lab", "up"],
        cwd=REPO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def podman(*arguments: str) -> None:
    subprocess.run(["podman", *arguments], check=True, capture_output=True, timeout=60)


def test_what_a_reboot_and_a_killed_repair_leave_is_repaired() -> None:
    before, parts = status()
    assert before == 0, parts
    host = Host(STOPPED)
    release = host.run("readlink /opt/fleetfit/llama-server/current")
    machine_id = host.run("cat /etc/machine-id")

    podman("stop", "--time", "10", lab_paths().container(STOPPED))
    podman("kill", lab_paths().container("mirror"))
    code, parts = status()
    assert code == 1
    assert parts["host", STOPPED] == "stopped"
    assert parts["mirror", next(name for kind, name in parts if kind == "mirror")] == "stopped"
    assert parts["host", "edge-cpu"] == "running"

    killed = up()
    time.sleep(KILL_AFTER_S)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(timeout=30)

    assert up().wait(timeout=UP_TIMEOUT_S) == 0
    code, parts = status()
    assert (code, set(parts.values())) == (0, {"running"}), parts
    # The same host, not a new one: what it served it serves again, without a deployment.
    assert host.run("cat /etc/machine-id") == machine_id
    assert host.run("readlink /opt/fleetfit/llama-server/current") == release
    end = time.monotonic() + SERVE_TIMEOUT_S
    while not (result := host.ready()).get("ok") and time.monotonic() < end:
        time.sleep(2)
    assert result["state"] == "ready", result
