"""Loopback ports of this machine that lead to services on lab hosts: supervised ``ssh -L``.

A supervisor process runs ssh and starts it again when it ends. It is recognised by its pidfile together with
its command line, so that a number reused by another process after a reboot is never taken for it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

from .containers import choose_port, port_is_free
from .paths import LabPaths, locked, write_atomically
from .ssh import config_path
from .state import read_state, write_state

RESTART_PAUSE_S = 2.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Forward:
    """A service of a host and the loopback port that leads to it."""

    host: str
    service: str
    remote_port: int
    local_port: int

    @property
    def name(self) -> str:
        """The forward's name in state.json and of its pidfile."""
        return f"{self.host} {self.service}"

    @property
    def url(self) -> str:
        """The service's address on this machine."""
        return f"http://127.0.0.1:{self.local_port}"


def pidfile(paths: LabPaths, forward: Forward) -> Path:
    """Return where the supervisor's process id is kept."""
    return paths.folder / "forwards" / f"{forward.host}-{forward.service}.pid"


def supervisor_argv(paths: LabPaths, forward: Forward) -> list[str]:
    """Return the supervisor's command line."""
    spec = f"127.0.0.1:{forward.local_port}:127.0.0.1:{forward.remote_port}"
    return [sys.executable, "-m", "fleetfit.lab.forward", str(config_path(paths)), forward.host, spec]


def command_line(file: Path) -> list[str] | None:
    """Return the command line of the process that a pidfile names, or None where there is none."""
    try:
        raw = Path(f"/proc/{int(file.read_text())}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return [word.decode(errors="replace") for word in raw.split(b"\0")[:-1]]


def is_running(paths: LabPaths, forward: Forward) -> bool:
    """Return whether the supervisor runs with exactly this forward."""
    return command_line(pidfile(paths, forward)) == supervisor_argv(paths, forward)


def stop_forwards(paths: LabPaths, timeout_s: float = 5) -> None:
    """End all supervisors of this lab and their ssh, those of an earlier lab/lab.yml included."""
    for file in sorted((paths.folder / "forwards").glob("*.pid")):
        words = command_line(file)
        # A supervisor of this lab: `python -m fleetfit.lab.forward <this lab's ssh_config> host ports`.
        if words is not None and words[1:4] == ["-m", "fleetfit.lab.forward", str(config_path(paths))]:
            os.kill(int(file.read_text()), signal.SIGTERM)
            deadline = time.monotonic() + timeout_s
            while command_line(file) == words and time.monotonic() < deadline:
                time.sleep(0.05)
        file.unlink()


def planned_forwards(paths: LabPaths, definition: dict[str, Any]) -> list[Forward]:
    """Return the forwards of lab/lab.yml with their ports, recorded so that they stay the same.

    A recorded port that something else has taken meanwhile is replaced.
    """
    found = []
    with locked(paths.folder / "lock"):
        state = read_state(paths)
        for host, services in definition.get("forwards", {}).items():
            for service, remote_port in services.items():
                name = f"{host} {service}"
                known = state.forwards.get(name)
                forward = Forward(host, service, remote_port, known or 0)
                if known is None or not (is_running(paths, forward) or port_is_free(known)):
                    taken = {record.ssh_port for record in state.hosts.values()}
                    taken |= set(state.forwards.values())
                    port = choose_port(paths, f"forward {name}", taken)
                    forward = Forward(host, service, remote_port, port)
                    state.forwards[name] = port
                found.append(forward)
        write_state(paths, state)
    return found


def start_forward(paths: LabPaths, forward: Forward, timeout_s: float = 15) -> None:
    """Make the forward's supervisor run; raises FleetfitError ``forward_failed`` where its port stays closed."""
    log = pidfile(paths, forward).with_suffix(".log")
    if not is_running(paths, forward):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            process = subprocess.Popen(
                supervisor_argv(paths, forward),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                cwd="/",
            )
        write_atomically(pidfile(paths, forward), f"{process.pid}\n")
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not port_is_free(forward.local_port):
            return
        time.sleep(0.1)
    said = " ".join(log.read_text(errors="replace").split("\n")[-3:]).strip()
    raise FleetfitError(
        f"Nothing listens on 127.0.0.1:{forward.local_port}, which should lead to {forward.name}: {said}",
        code="forward_failed",
        remedy=f"Look at {log}, and run `fleetfit lab up` again.",
    )


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it dies, even by SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def supervise(config: str, host: str, spec: str) -> None:
    """Run ssh with the forward for ever, starting it again when it ends, until SIGTERM."""
    argv = ["ssh", "-F", config, "-N", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes"]
    argv += ["-o", "ServerAliveInterval=15", "-o", "ControlPath=none", "-L", spec, host]
    child: subprocess.Popen[bytes] | None = None

    def stop(_signal: int, _frame: object) -> None:
        if child is not None:
            child.terminate()
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    while Path(config).exists():
        child = subprocess.Popen(argv, preexec_fn=die_with_parent)
        child.wait()
        time.sleep(RESTART_PAUSE_S)


if __name__ == "__main__":
    supervise(*sys.argv[1:4])
