"""Reading a host's /proc, /sys and /etc below one injectable root: probes run on a made tree in tests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Callable, Optional

# Runs a command and returns (exit status, standard output); 127 where the program is not there.
Runner = Callable[[Sequence[str]], tuple[int, str]]


def tool_runner(module: Any) -> Runner:
    """Return what runs a tool for a probe through an AnsibleModule: in English, 127 where it is missing."""

    def run(arguments: Sequence[str]) -> tuple[int, str]:
        if module.get_bin_path(arguments[0]) is None:
            return 127, ""
        status, output, _error = module.run_command(
            list(arguments), environ_update={"LC_ALL": "C", "LANGUAGE": "C"}
        )
        return status, output

    return run


class ProbeRoot:
    """A host's files as the probes see them: ``/`` on a real host, a made tree in tests and in the lab."""

    def __init__(self, path: str = "/") -> None:
        self.base = path.rstrip("/")

    def path(self, absolute: str) -> str:
        """Return where the host's path ``absolute`` lies below this root."""
        return self.base + absolute

    def read(self, absolute: str, limit_bytes: int = 1 << 20) -> Optional[str]:
        """Return the file's text without surrounding space, or None where it cannot be read."""
        data = self.read_bytes(absolute, limit_bytes)
        return None if data is None else data.decode("utf-8", "replace").strip()

    def read_bytes(self, absolute: str, limit_bytes: int = 1 << 20) -> Optional[bytes]:
        """Return the file's bytes, or None where it cannot be read."""
        try:
            with open(self.path(absolute), "rb") as file:
                return file.read(limit_bytes)
        except OSError:
            return None

    def link_name(self, absolute: str) -> Optional[str]:
        """Return the last part of what the link ``absolute`` points to, or None where there is no link."""
        try:
            return os.path.basename(os.readlink(self.path(absolute)).rstrip("/"))
        except OSError:
            return None

    def names(self, absolute: str) -> list[str]:
        """Return the sorted names in a directory; none where it cannot be read."""
        try:
            return sorted(os.listdir(self.path(absolute)))
        except OSError:
            return []

    def exists(self, absolute: str) -> bool:
        """Return whether the path is there."""
        return os.path.exists(self.path(absolute))
