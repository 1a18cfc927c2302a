"""What the lab remembers in .lab/state.json, and what to do about a host given what is really there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

from .paths import LabPaths, write_atomically

SCHEMA_VERSION = 1
Action = Literal["create", "recreate", "start", "keep"]


@dataclass(frozen=True)
class HostRecord:
    """A host that was prepared completely: its container has its keys and its port is published."""

    container_id: str
    ssh_port: int
    user: str
    kind: str  # "lab" or "test"
    spec: str  # digest of everything that the container was created from
    profile: str | None = None  # of the simulated GPU
    gpu: str = ""  # digest of the simulated GPU's files in the host


@dataclass
class LabState:
    """The content of state.json."""

    hosts: dict[str, HostRecord] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=dict)  # "gpu-large open-webui" -> loopback port


@dataclass(frozen=True)
class ContainerInfo:
    """A container as podman knows it."""

    container_id: str
    running: bool
    spec: str


def host_action(wanted_spec: str, actual: ContainerInfo | None, record: HostRecord | None) -> Action:
    """Return what makes the host as wanted, from what podman has and what was recorded when it was whole.

    A container without a record was left behind half-made by a run that was killed.
    """
    if actual is None:
        return "create"
    if record is None or record.container_id != actual.container_id or actual.spec != wanted_spec:
        return "recreate"
    return "keep" if actual.running else "start"


def read_state(paths: LabPaths) -> LabState:
    """Return the recorded state, empty where there is none; raises on an unknown schema version."""
    path = paths.folder / "state.json"
    if not path.exists():
        return LabState()
    if not path.is_file():
        raise FleetfitError(
            f"{path} is no file, so that the lab's state cannot be kept there.",
            code="bad_lab_state",
            remedy="Remove it; `fleetfit lab up` finds the lab's containers without it.",
        )
    try:
        data = json.loads(path.read_text())
        version = data["schema_version"]
        if version != SCHEMA_VERSION:
            raise FleetfitError(
                f"{path} has schema version {version}, this fleetfit knows {SCHEMA_VERSION}.",
                code="unknown_schema_version",
                remedy="Run `fleetfit lab down` with the fleetfit that made it.",
            )
        hosts = {name: HostRecord(**record) for name, record in data["hosts"].items()}
        return LabState(hosts=hosts, forwards=dict(data.get("forwards", {})))
    except (ValueError, KeyError, TypeError):
        # Not ours or cut short by a full disk: everything in it can be made again.
        return LabState()


def write_state(paths: LabPaths, state: LabState) -> None:
    """Write the state atomically."""
    data = {
        "schema_version": SCHEMA_VERSION,
        "checkout": str(paths.root),
        "hosts": {name: asdict(record) for name, record in sorted(state.hosts.items())},
        "forwards": dict(sorted(state.forwards.items())),
    }
    write_atomically(paths.folder / "state.json", json.dumps(data, indent=1) + "\n")
