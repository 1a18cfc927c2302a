"""What of the lab is there, what is not, and what to do about it."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.units import format_size
from rich.console import Console
from rich.table import Table

from . import mirror
from .containers import find_container
from .forward import Forward, is_running
from .paths import LabPaths
from .process import run
from .ssh import ssh_argv
from .state import LabState, host_action, read_state

SSH_TIMEOUT_S = 15


@dataclass(frozen=True)
class Part:
    """One part of the lab: a host, the mirror, a forward or an artifact."""

    kind: str
    name: str
    state: str  # "running", "missing", "stopped", "half-made", "silent"
    detail: str

    @property
    def ok(self) -> bool:
        """Whether nothing needs to be done about it."""
        return self.state == "running"


def host_part(paths: LabPaths, state: LabState, name: str, profile: str | None) -> Part:
    """Return the state of one host: its container, and whether it answers over SSH."""
    found = find_container(paths.container(name)) if shutil.which("podman") else None
    record = state.hosts.get(name)
    card = profile or "no GPU"
    if found is None:
        return Part("host", name, "missing", card)
    # Compared with its own spec: whether it is what lab.yml wants now is for `up` to see.
    action = host_action(found.spec, found, record)
    if action != "keep" or record is None:
        return Part("host", name, "stopped" if action == "start" else "half-made", card)
    argv = ssh_argv(paths, name, "true")
    done = run(argv, what=f"reach {name}", check=False, timeout_s=SSH_TIMEOUT_S)
    detail = f"{card}; 127.0.0.1:{record.ssh_port} as {record.user}"
    return Part("host", name, "running" if done.returncode == 0 else "silent", detail)


def mirror_part(paths: LabPaths) -> Part:
    """Return the state of the mirror and how much it serves."""
    found = find_container(paths.container("mirror")) if shutil.which("podman") else None
    size = sum(entry["size"] for entry in mirror.read_artifacts(paths).values())
    state = "missing" if found is None else "running" if found.running else "stopped"
    return Part("mirror", mirror.URL, state, f"{format_size(size)} of artifacts, for the hosts alone")


def forward_part(paths: LabPaths, host: str, service: str, remote_port: int, port: int | None) -> Part:
    """Return the state of the way from this machine to a service of a host."""
    forward = Forward(host, service, remote_port, port or 0)
    running = port is not None and is_running(paths, forward)
    detail = forward.url if port is not None else ""
    return Part("forward", forward.name, "running" if running else "missing", detail)


def look(paths: LabPaths, definition: dict[str, Any]) -> list[Part]:
    """Return all parts of the lab with their states; changes nothing."""
    state = read_state(paths)
    parts = [host_part(paths, state, name, entry["profile"]) for name, entry in definition["hosts"].items()]
    parts.append(mirror_part(paths))
    for host, services in definition.get("forwards", {}).items():
        for service, remote_port in services.items():
            port = state.forwards.get(f"{host} {service}")
            parts.append(forward_part(paths, host, service, remote_port, port))
    others = sorted(name for name, record in state.hosts.items() if record.kind != "lab")
    parts += [host_part(paths, state, name, state.hosts[name].profile) for name in others]
    return parts


def print_status(parts: list[Part], out: Console) -> None:
    """Print a table of the parts, and what to do where one is not as it should be."""
    table = Table(box=None, pad_edge=False)
    for column in ("part", "name", "state", ""):
        table.add_column(column, overflow="fold")
    for part in parts:
        colour = "green" if part.ok else "red"
        table.add_row(part.kind, part.name, f"[{colour}]{part.state}[/{colour}]", part.detail)
    out.print(table)
    if all(part.ok for part in parts):
        out.print("\nThe lab is up: ssh -F .lab/ssh_config HOST")
    elif any(part.ok or part.state != "missing" for part in parts):
        out.print("\nNot all of it is up: `fleetfit lab up` repairs it.")
    else:
        out.print("\nThe lab is down: `fleetfit lab up` starts it.")


def as_document(parts: list[Part]) -> dict[str, Any]:
    """Return the parts for programs."""
    return {
        "schema_version": 1,
        "up": all(part.ok for part in parts),
        "parts": [asdict(part) for part in parts],
    }
