"""dpkg's holds: packages that no upgrade may touch. On the RHEL family dnf's versionlock does it, a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

from .errors import FleetfitError

# (argv, standard input) -> (status, standard output)
HoldRunner = Callable[[Sequence[str], Optional[str]], "tuple[int, str]"]


def selections(run: HoldRunner) -> dict[str, str]:
    """Return dpkg's selection of each package it knows: install, hold, deinstall."""
    code, output = run(["dpkg", "--get-selections"], None)
    if code:
        raise _failed("dpkg --get-selections", output)
    # A foreign architecture's package is written name:arch.
    return dict(line.split()[:2] for line in output.splitlines() if len(line.split()) == 2)


def plan(names: Sequence[str], state: str, current: dict[str, str]) -> list[str]:
    """Return the packages whose selection has to change for ``state`` held or unheld; unknown ones are skipped."""
    wanted = "hold" if state == "held" else "install"
    known = {name: selection for name, selection in current.items() if selection in ("install", "hold")}
    chosen = [name for name in known if name.split(":")[0] in names]
    return sorted(name for name in chosen if known[name] != wanted)


def apply(names: Sequence[str], state: str, run: HoldRunner) -> None:
    """Set the selections; raises ``hold_failed``."""
    wanted = "hold" if state == "held" else "install"
    code, output = run(["dpkg", "--set-selections"], "".join(f"{name} {wanted}\n" for name in names))
    if code:
        raise _failed("dpkg --set-selections", output)


def _failed(command: str, output: str) -> FleetfitError:
    tail: Any = output.strip().splitlines()[-1:] or ["no output"]
    return FleetfitError(
        f"`{command}` failed: {tail[0]}.", code="hold_failed", remedy="Run `dpkg --audit` on the host."
    )
