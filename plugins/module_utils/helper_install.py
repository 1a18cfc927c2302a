"""Installing the host helper under ``libexec/<digest>/``; ``libexec/current`` links to the newest."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass, field
from typing import Optional

from .errors import FleetfitError
from .host_helper import DIGEST_LENGTH, archive_digest

HELPER_NAME = "fleetfit-host.pyz"
_DIGEST = re.compile(rf"[0-9a-f]{{{DIGEST_LENGTH}}}\Z")
# Where systemd keeps the files of transient units (systemd.unit(5), "System Unit Search Path").
TRANSIENT_UNITS = "run/systemd/transient"


@dataclass
class InstallResult:
    """What an installation found and did; ``missing`` is true where the archive's bytes are needed first."""

    changed: bool = False
    missing: bool = False
    previous: Optional[str] = None
    removed: list[str] = field(default_factory=list)


def install_helper(
    libexec_dir: str, sha256: str, archive: Optional[bytes], *, root: str = "/", check_mode: bool = False
) -> InstallResult:
    """Make the helper with this sha256 the current one, and remove those that nothing runs.

    ``archive`` is None on the first call: where the host has the digest already, no bytes need to be
    sent. ``root`` is where ``/proc`` and ``/run`` are looked at. Raises FleetfitError (``helper_corrupt``)
    for bytes of another sha256.
    """
    digest = sha256[:DIGEST_LENGTH]
    path = os.path.join(libexec_dir, digest, HELPER_NAME)
    result = InstallResult(previous=current_digest(libexec_dir))
    if not _is_installed(path, sha256):
        result.changed = True
        if archive is None:
            result.missing = True
            return result
        if hashlib.sha256(archive).hexdigest() != sha256 or archive_digest(archive) != digest:
            raise FleetfitError(
                f"The host helper that arrived has another sha256 than {sha256}.",
                code="helper_corrupt",
                remedy="Run the play again; if it stays, something on the way to the host changes the data.",
            )
        if not check_mode:
            _write_archive(path, archive)
    if result.previous != digest:
        result.changed = True
        if not check_mode:
            _link_current(libexec_dir, digest)
    for old in _unused_digests(libexec_dir, keep=digest, root=root):
        result.changed = True
        result.removed.append(old)
        if not check_mode:
            shutil.rmtree(os.path.join(libexec_dir, old))
    return result


def current_digest(libexec_dir: str) -> Optional[str]:
    """Return the digest that ``libexec/current`` links to, None where there is none."""
    try:
        return os.path.basename(os.readlink(os.path.join(libexec_dir, "current")))
    except OSError:
        return None


def current_helper(libexec_dir: str) -> Optional[str]:
    """Return the current helper's path by its digest (a unit keeps its version); None where missing."""
    digest = current_digest(libexec_dir)
    if digest is None:
        return None
    path = os.path.join(libexec_dir, digest, HELPER_NAME)
    return path if os.path.isfile(path) else None


def _is_installed(path: str, sha256: str) -> bool:
    try:
        with open(path, "rb") as stream:
            return hashlib.sha256(stream.read()).hexdigest() == sha256 and os.access(path, os.X_OK)
    except OSError:
        return False


def _write_archive(path: str, archive: bytes) -> None:
    directory = os.path.dirname(path)
    os.makedirs(directory, mode=0o755, exist_ok=True)
    for folder in (os.path.dirname(directory), directory):
        os.chmod(folder, 0o755)  # noqa: S103  a strict umask must not hide it from the services' users
    partial = f"{path}.partial"
    with open(partial, "wb") as stream:
        stream.write(archive)
        os.fchmod(stream.fileno(), 0o755)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
    _sync_directory(directory)


def _link_current(libexec_dir: str, digest: str) -> None:
    link = os.path.join(libexec_dir, "current")
    temporary = f"{link}.new"
    if os.path.lexists(temporary):
        os.unlink(temporary)
    os.symlink(digest, temporary)
    os.replace(temporary, link)
    _sync_directory(libexec_dir)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unused_digests(libexec_dir: str, *, keep: str, root: str) -> list[str]:
    try:
        present = {name for name in os.listdir(libexec_dir) if _DIGEST.match(name)}
    except OSError:
        return []
    old = present - {keep}
    return sorted(old - _digests_in_use(libexec_dir, old, root)) if old else []


def _digests_in_use(libexec_dir: str, digests: set[str], root: str) -> set[str]:
    """Return the digests that a process runs, or that a transient unit would start again."""
    proc = os.path.join(root, "proc")
    files = [os.path.join(proc, name, "cmdline") for name in _list_directory(proc) if name.isdecimal()]
    transient = os.path.join(root, TRANSIENT_UNITS)
    files += [
        os.path.join(transient, name) for name in _list_directory(transient) if name.endswith(".service")
    ]
    used: set[str] = set()
    for path in files:
        try:
            with open(path, "rb") as stream:
                text = stream.read()
        except OSError:
            continue  # the process ended in the meantime
        used |= {digest for digest in digests if f"{libexec_dir}/{digest}/".encode() in text}
    return used


def _list_directory(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []
