"""Compiling llama.cpp on a host: a transient unit that needs no controller, and its result as one file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from typing import Any, Callable

from .errors import FleetfitError

UNIT_PREFIX = "fleetfit-build-"
LOG, RESULT = "build.log", "result.tar.gz"
LOG_LINES = 15
# tar makes the result beside and renames it: it is whole or not there.
RUN = """#!/bin/sh
set -eu
cd "$1"
sh build.sh "$1/source" "$1/work" "$1/out"
tar -C out -czf result.partial bin
mv result.partial result.tar.gz
"""

RunCommand = Callable[[list[str]], tuple[int, str]]


class Compilation:
    """The build in one directory of the host: ``source`` is unpacked there, the result appears there."""

    def __init__(self, directory: str, key: str, run: RunCommand) -> None:
        self.directory = directory
        self.unit = f"{UNIT_PREFIX}{key}.service"
        self._run = run

    def path(self, name: str) -> str:
        """Return the path of a file of this build."""
        return os.path.join(self.directory, name)

    def finished(self) -> bool:
        """Return whether the result is there."""
        return os.path.isfile(self.path(RESULT))

    def active(self) -> bool:
        """Return whether the unit runs."""
        output = self._run(["systemctl", "show", "--property=ActiveState", "--value", self.unit])[1]
        return output.strip() in ("active", "activating", "deactivating", "reloading")

    def start(self, script: str) -> None:
        """Start the unit, unless it runs; finished objects of a killed build are kept.

        Raises FleetfitError ``unit_not_started``.
        """
        if self.active():
            return
        for name, text in (("build.sh", script), ("run.sh", RUN)):
            with open(self.path(name), "w", encoding="utf-8") as stream:
                stream.write(text)
        if os.path.exists(self.path(LOG)):
            os.unlink(self.path(LOG))
        properties = {
            "Nice": "10",
            "IOSchedulingClass": "idle",
            "StandardOutput": f"append:{self.path(LOG)}",
            "StandardError": f"append:{self.path(LOG)}",
            "UMask": "0022",
            "NoNewPrivileges": "yes",
            "CapabilityBoundingSet": "",
            "ProtectSystem": "strict",
            "ProtectHome": "yes",
            "PrivateTmp": "yes",
            "PrivateDevices": "yes",
            "PrivateNetwork": "yes",
            "ReadWritePaths": f'"{self.directory}"',
        }
        command = ["systemd-run", "--quiet", "--collect", f"--unit={self.unit}"]
        command += ["--description=fleetfit: compile llama.cpp"]
        command += [f"--property={name}={value}" for name, value in properties.items()]
        command += ["--setenv=PATH=/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin"]
        code, output = self._run([*command, "--", "/bin/sh", self.path("run.sh"), self.directory])
        if code != 0:
            raise FleetfitError(
                f"Starting the unit {self.unit} failed: {output.strip()}.",
                code="unit_not_started",
                remedy="Look at systemctl status on the host.",
            )

    def wait(self, seconds: float) -> dict[str, Any]:
        """Return the state when the unit has ended, or after ``seconds``.

        ``{"state": "running" | "finished", "log_tail"}``, finished with ``archive`` and ``sha256``. Raises
        FleetfitError ``engine_build`` with the last lines of the log where it ended without a result.
        """
        deadline = time.monotonic() + seconds
        while self.active():
            if time.monotonic() >= deadline:
                return {"state": "running", "log_tail": self.log_tail()}
            time.sleep(1)
        if self.finished():
            return self.result()
        tail = self.log_tail()
        raise FleetfitError(
            f"Compiling llama.cpp failed: {' | '.join(tail) or 'its log is empty'}",
            code="engine_build",
            remedy=f"Read {self.path(LOG)} on the host, mend what it names, and run the play again.",
        )

    def result(self) -> dict[str, Any]:
        """Return the finished state."""
        digest = hashlib.sha256()
        with open(self.path(RESULT), "rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
        return {
            "state": "finished",
            "archive": self.path(RESULT),
            "sha256": digest.hexdigest(),
            "log_tail": self.log_tail(),
        }

    def log_tail(self) -> list[str]:
        """Return the last lines of the log."""
        try:
            with open(self.path(LOG), encoding="utf-8", errors="replace") as stream:
                return stream.read().strip().splitlines()[-LOG_LINES:]
        except OSError:
            return []

    def remove(self) -> bool:
        """Stop the unit and delete the directory; return whether there was anything."""
        if self.active():
            self._run(["systemctl", "stop", self.unit])
        if not os.path.isdir(self.directory):
            return False
        shutil.rmtree(self.directory)
        with contextlib.suppress(OSError):  # of another build
            os.rmdir(os.path.dirname(self.directory))
        return True
