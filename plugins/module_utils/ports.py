"""Who listens on a TCP port of this host, and for which systemd unit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional

from .gate import listener_pids

_UNIT = re.compile(r"/([^/]+\.(?:service|scope|socket))(?=/|$)")


@dataclass(frozen=True)
class Listener:
    """A process that listens, and its systemd unit where it has one."""

    pid: int
    process: Optional[str]
    unit: Optional[str]


def unit_in_cgroups(text: str) -> Optional[str]:
    """Return the innermost systemd unit named in a text in the format of /proc/<pid>/cgroup, or None."""
    found = None
    for line in text.splitlines():
        units = _UNIT.findall(line.split(":", 2)[-1])
        found = units[-1] if units else found
    return found


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""  # the process has ended


def find_listeners(port: int) -> list[Listener]:
    """Return the processes that listen on TCP ``port`` on any address here (root sees all of them)."""
    return [
        Listener(
            pid, _text(f"/proc/{pid}/comm").strip() or None, unit_in_cgroups(_text(f"/proc/{pid}/cgroup"))
        )
        for pid in listener_pids(port)
    ]
