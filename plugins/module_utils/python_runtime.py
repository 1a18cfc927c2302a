"""Which Python a service's packages can run on at a host: the system's own, or a managed archive."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from .errors import FleetfitError

PYTHONS = "/opt/fleetfit/python"
SERVICES = "/opt/fleetfit"
# As for releases: 64 bits tell a host's environments apart, and can be read.
DIGEST_LENGTH = 16
# How many times its wheelhouse's size an environment takes where the entry does not say: unpacked wheels and
# compiled bytecode. Open WebUI 0.12.4's 242 wheels (770,734,080 bytes) contain 2,396,786,097 bytes, 344,942,188
# of them Python source, whose bytecode comes on top: 3.1 to 3.6 times. CUDA libraries shrink less: fewer times.
ENVIRONMENT_FACTOR = 4


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _fits(entry: Mapping[str, Any], arch: str, glibc: str) -> bool:
    return bool(entry["arch"] == arch and _version(entry["glibc"]) <= _version(glibc))


def choose_interpreter(
    wanted: Sequence[str],
    archives: Sequence[Mapping[str, Any]],
    *,
    system_python: str,
    arch: str,
    glibc: str,
) -> dict[str, Any]:
    """Return ``{"minor", "path", "archive"}`` for the first of ``wanted`` (such as 3.12) that a host can have.

    The system's own interpreter is preferred to a managed one, whose ``archive`` is then not null: an entry
    with ``version``, ``arch``, ``glibc``, ``size``, ``sha256`` and ``url`` or ``path``. Raises FleetfitError
    where neither fits.
    """
    own = _minor(system_python)
    if own in wanted:
        return {"minor": own, "path": f"/usr/bin/python{own}", "archive": None}
    for minor in wanted:
        for archive in archives:
            if _minor(archive["version"]) == minor and _fits(archive, arch, glibc):
                home = f"{PYTHONS}/{archive['version']}-{archive['sha256'][:DIGEST_LENGTH]}"
                return {
                    "minor": minor,
                    "path": f"{home}/bin/python{minor}",
                    "archive": {**archive, "home": home},
                }
    raise FleetfitError(
        f"No Python fits: {' or '.join(wanted) or 'none'} is wanted, the host's own is {system_python},"
        f" and none of the {len(archives)} python_runtime_archives fits {arch} with glibc {glibc}.",
        code="no_fitting_python",
        remedy="Install one of them on the host, or add an archive of it to python_runtime_archives.",
    )


def choose_environment(
    service: str,
    wheelhouses: Sequence[Mapping[str, Any]],
    archives: Sequence[Mapping[str, Any]],
    *,
    system_python: str,
    arch: str,
    glibc: str,
) -> dict[str, Any]:
    """Return the interpreter, the wheelhouse and the path of a service's environment on a host.

    A wheelhouse is an entry with ``python`` (3.11), ``arch``, ``glibc``, ``size``, ``sha256`` and ``url``
    or ``path``. The path names the digest of wheelhouse and interpreter. Raises FleetfitError where nothing
    fits.
    """
    fitting = [entry for entry in wheelhouses if _fits(entry, arch, glibc)]
    if not fitting:
        raise FleetfitError(
            f"None of the {len(wheelhouses)} wheelhouses of {service} fits {arch} with glibc {glibc}.",
            code="no_fitting_wheelhouse",
            remedy="Build one with `fleetfit wheelhouse build` for this system.",
        )
    interpreter = choose_interpreter(
        [str(entry["python"]) for entry in fitting],
        archives,
        system_python=system_python,
        arch=arch,
        glibc=glibc,
    )
    wheelhouse = next(entry for entry in fitting if str(entry["python"]) == interpreter["minor"])
    identity = f"{wheelhouse['sha256']} {interpreter['path']}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:DIGEST_LENGTH]
    return {
        **interpreter,
        "wheelhouse": dict(wheelhouse),
        "environment": f"{SERVICES}/{service}/envs/{digest}",
        "unpacked": f"{SERVICES}/{service}/envs/.wheelhouse-{wheelhouse['sha256'][:DIGEST_LENGTH]}",
        "needed_bytes": needed_bytes(wheelhouse),
    }


def needed_bytes(wheelhouse: Mapping[str, Any]) -> int:
    """Return the bytes of disk that making an environment takes: its wheels, unpacked, and what they become.

    The environment that serves stays beside it until the new one has answered, so nothing of it counts as
    free. ``environment_size`` of the entry is used where it is there.
    """
    size = int(wheelhouse["size"])
    return size + int(wheelhouse.get("environment_size") or size * ENVIRONMENT_FACTOR)


def source_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the artifact source (contracts.md §6) of an entry with ``url``, or ``path`` on the controller.

    Raises FleetfitError for an entry with neither.
    """
    url: Optional[str] = entry.get("url")
    if url:
        return {"type": "http", "url": url}
    if entry.get("path"):
        return {"type": "file", "path": entry["path"], "location": "controller"}
    raise FleetfitError(
        f"The archive with sha256 {entry.get('sha256')} has neither url nor path.",
        code="no_source",
        remedy="Say where hosts download it (url), or where it lies on the controller (path).",
    )
