"""Commands in a throw-away container of a lab image: compilers and checks that need another system's libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .machine import Machine, podman, ulimit_options
from .process import run

# The first process of a container ignores signals that it has no handler for: pass them on, so that an
# interrupted `fleetfit lab up` does not leave a compiler behind.
FIRST_PROCESS = 'trap "kill -TERM -1; exit 130" TERM INT; "$@" & wait $!'


def run_in_container(
    machine: Machine,
    image: str,
    command: Sequence[str],
    *,
    what: str,
    volumes: Mapping[Path, str],
    name: str | None = None,
    log: Path | None = None,
) -> None:
    """Run a command to its end in a container without network that is removed afterwards.

    ``volumes`` maps folders of this machine to paths in the container (``/out``, ``/source:ro``). A
    container of the same ``name`` that a killed run left behind is removed first. Raises like ``run``.
    """
    options = ["--rm", "--network=none", *ulimit_options(machine)]
    if name is not None:
        remove = ["rm", "--force", "--ignore", "--time=0", name]
        run(podman(machine, *remove), what=f"remove what is left of {name}")
        options.append(f"--name={name}")
    options += [f"--volume={folder}:{target}" for folder, target in volumes.items()]
    argv = podman(machine, "run", *options, image, "sh", "-c", FIRST_PROCESS, "sh", *command)
    run(argv, what=what, log=log)
