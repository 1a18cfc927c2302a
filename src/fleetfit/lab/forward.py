"""Loopback ports of this machine that lead to services on lab hosts: supervised ``ssh -L``.

A supervisor process runs ssh and starts it again when it ends. It is recognised by its pidfile together with
its command line, so that a number reused by another process after a reboot is never taken for it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

from .containers import choose_port
from .paths import LabPaths, locked, write_atomically
from .ssh import config_path
from .state import read_state, write_state

RESTART_PAUSE_S = 2.0


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


def supervisor_pid(paths: LabPaths, forward: Forward) -> int | None:
    """Return the supervisor's process id where it runs with exactly this forward, else None."""
    try:
        pid = int(pidfile(paths, forward).read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    except (OSError, ValueError):
        return None
    return pid if [word.decode() for word in words] == supervisor_argv(paths, forward) else None


def stop_forward(paths: LabPaths, forward: Forward, timeout_s: float = 5) -> None:
    """End the supervisor and its ssh; nothing happens where it does not run."""
    pid = supervisor_pid(paths, forward)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while supervisor_pid(paths, forward) == pid and time.monotonic() < deadline:
            time.sleep(0.05)
    pidfile(paths, forward).unlink(missing_ok=True)


def planned_forwards(paths: LabPaths, definition: dict[str, Any]) -> list[Forward]:
    """Return the forwards of lab/lab.yml with their ports: the recorded ones, or newly chosen and recorded."""
    found = []
    with locked(paths.folder / "lock"):
        state = read_state(paths)
        taken = {record.ssh_port for record in state.hosts.values()} | set(state.forwards.values())
        for host, services in definition.get("forwards", {}).items():
            for service, remote_port in services.items():
                name = f"{host} {service}"
                if name not in state.forwards:
                    state.forwards[name] = choose_port(paths, f"forward {name}", taken)
                    taken.add(state.forwards[name])
                found.append(Forward(host, service, remote_port, state.forwards[name]))
        write_state(paths, state)
    return found


def start_forward(paths: LabPaths, forward: Forward, timeout_s: float = 10) -> None:
    """Make the forward's supervisor run; raises FleetfitError ``forward_failed`` where its port stays closed."""
    if supervisor_pid(paths, forward) is None:
        log = pidfile(paths, forward).with_suffix(".log")
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
        try:
            socket.create_connection(("127.0.0.1", forward.local_port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise FleetfitError(
        f"Nothing answers on 127.0.0.1:{forward.local_port}, which should lead to {forward.name}.",
        code="forward_failed",
        remedy=f"Look at {pidfile(paths, forward).with_suffix('.log')}.",
    )


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
        child = subprocess.Popen(argv)
        child.wait()
        time.sleep(RESTART_PAUSE_S)


if __name__ == "__main__":
    supervise(*sys.argv[1:4])
