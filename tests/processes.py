"""Ending a controller as its power loss would."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any


def kill_all(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that descend from it.

    Ansible's workers have sessions of their own since ansible-core 2.19: the group that the main process leads
    is not all of it, and what is left finishes its task.
    """
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    doomed = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in doomed} - doomed:
        doomed |= more
    for pid in sorted(doomed):  # the main process first, so that it starts no other
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=30)
