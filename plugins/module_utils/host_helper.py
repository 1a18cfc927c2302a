"""Entry point of the host helper, ``fleetfit-host.pyz``: what runs on a host without Ansible.

Transient and boot-time units call it: downloads, the switch transaction, readiness and the device check.
Subcommands are imported when they are called, so that ``recover`` starts even if another part is broken.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from typing import Callable, cast

from .errors import FleetfitError

# Subcommand -> (module beside this one, function taking the remaining arguments and returning the exit code).
SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "download": ("download_job", "main"),
    "switch": ("switch", "main_switch"),
    "recover": ("switch", "main_recover"),
    "ready": ("ready", "main"),
    "check-devices": ("check_devices", "main"),
}
USAGE = f"usage: fleetfit-host.pyz --version | {{{','.join(SUBCOMMANDS)}}} [argument …]"
DIGEST_LENGTH = 16  # hexadecimal digits of the sha256: the directory's name under libexec


def archive_digest(data: bytes) -> str:
    """Return the digest that names an archive's directory: the first 16 digits of its sha256."""
    return hashlib.sha256(data).hexdigest()[:DIGEST_LENGTH]


def version_line(program: str) -> str:
    """Return ``fleetfit-host <digest>`` for the archive at ``program``; ``source`` where it is none."""
    if not os.path.isfile(program) or not program.endswith(".pyz"):
        return "fleetfit-host source"
    with open(program, "rb") as stream:
        return f"fleetfit-host {archive_digest(stream.read())}"


def main(argv: list[str]) -> int:
    """Run the subcommand that ``argv`` begins with; return its exit code, 2 for a user's mistake."""
    if argv[:1] == ["--version"]:
        sys.stdout.write(version_line(sys.argv[0]) + "\n")
        return 0
    if not argv or argv[0] not in SUBCOMMANDS:
        sys.stderr.write(USAGE + "\n")
        return 2
    module_name, function_name = SUBCOMMANDS[argv[0]]
    try:
        module = importlib.import_module(f".{module_name}", __package__)
        function = cast(Callable[[list[str]], int], getattr(module, function_name))
        return function(argv[1:])
    except FleetfitError as error:
        sys.stderr.write(f"fleetfit-host {argv[0]}: {error}\n")
        return 2
