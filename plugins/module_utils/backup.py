"""Backups that a switch takes of a stopped service's data, and puts back when the new release fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import FleetfitError
from .manifest import HostPaths, fsync_directory, safe_to_delete
from .units import format_size

KINDS = ("directory",)


def _refuse(message: str, remedy: str) -> FleetfitError:
    return FleetfitError(message, code="bad_backup", remedy=remedy)


def check_backup(spec: Mapping[str, Any]) -> None:
    """Raise FleetfitError unless ``spec`` names a directory of ours: ``{"kind": "directory", "path": …}``."""
    if spec.get("kind") not in KINDS:
        raise _refuse(f"The backup kind {spec.get('kind')!r} is not known.", f"Use {', '.join(KINDS)}.")
    path = spec.get("path")
    if not isinstance(path, str) or not safe_to_delete(path):
        raise _refuse(f"The backup path {path!r} is not below fleetfit's own directories.", "Correct it.")


def backups_directory(paths: HostPaths, service: str) -> str:
    """Return where the backups of ``service`` are, root only."""
    return paths.at(f"/var/lib/fleetfit/backups/{service}")


def check_room(paths: HostPaths, service: str, spec: Mapping[str, Any]) -> str:
    """Return the directory to copy; raise FleetfitError where the disk has no room for the copy.

    A restore holds a second copy for a moment, so there must be room for two.
    """
    check_backup(spec)
    source = paths.at(spec["path"])
    directory = backups_directory(paths, service)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    needed_bytes = 2 * _tree_bytes(source)
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes > free_bytes:
        raise FleetfitError(
            f"Backing up {source} needs {format_size(needed_bytes)}, {directory} has {format_size(free_bytes)}.",
            code="disk_too_small",
            remedy="Free space on the host.",
        )
    return source


def superseded(paths: HostPaths, service: str, keep: Sequence[str]) -> list[str]:
    """Return the backups that no release of ``keep`` (digests) could go back to: one each stays, the newest."""
    directory = backups_directory(paths, service)
    if not os.path.isdir(directory):
        return []
    entries = [os.path.join(directory, name) for name in os.listdir(directory)]
    newest_first = sorted(entries, key=lambda path: os.lstat(path).st_ctime, reverse=True)
    seen: set[str] = set()
    doomed = []
    for path in newest_first:
        release = os.path.basename(path).split("-")[0]
        if path.endswith(".partial") or release not in keep or release in seen:
            doomed.append(path)
        else:
            seen.add(release)
    return sorted(path for path in doomed if safe_to_delete(path, root=paths.root))


def discard(paths: HostPaths, service: str, keep: Sequence[str]) -> list[str]:
    """Delete what superseded() names and return it. Call it with the service's switch lock held."""
    doomed = superseded(paths, service, keep)
    for path in doomed:
        shutil.rmtree(path)
    return doomed


def back_up(
    paths: HostPaths, service: str, spec: Mapping[str, Any], release: str, transaction: str
) -> dict[str, Any]:
    """Copy the stopped service's data and return where to, paired with the release it belongs to.

    Raises FleetfitError where the disk has no room for it.
    """
    source = check_room(paths, service, spec)
    directory = backups_directory(paths, service)
    final = os.path.join(directory, f"{release}-{transaction[:8]}")
    partial = final + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    _copy_tree(source, partial)
    os.rename(partial, final)
    fsync_directory(directory)
    return {"kind": spec["kind"], "source": source, "copy": final, "release": release}


def restore(paths: HostPaths, done: Mapping[str, Any]) -> None:
    """Put a backup back in place of the service's data; it may be called again after an interruption."""
    source, copy = done["source"], done["copy"]
    fresh = source + ".restored"
    if not os.path.isdir(copy) or not safe_to_delete(source, root=paths.root):
        raise FleetfitError(
            f"The backup {copy} of {source} cannot be restored.",
            code="backup_missing",
            remedy="Look for it under /var/lib/fleetfit/backups.",
        )
    shutil.rmtree(fresh, ignore_errors=True)
    _copy_tree(copy, fresh)
    failed = source + ".failed"
    shutil.rmtree(failed, ignore_errors=True)
    if os.path.isdir(source):
        os.rename(source, failed)
    os.rename(fresh, source)
    fsync_directory(os.path.dirname(source))
    shutil.rmtree(failed, ignore_errors=True)


def _tree_bytes(directory: str) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _copy_tree(source: str, target: str) -> None:
    """Copy with owners, modes and times, and fsync every file."""

    def copy(one: str, other: str) -> str:
        shutil.copy2(one, other, follow_symlinks=False)
        if not os.path.islink(other):
            status = os.stat(one)
            os.chown(other, status.st_uid, status.st_gid)
            with open(other, "rb") as stream:
                os.fsync(stream.fileno())
        return other

    shutil.copytree(source, target, symlinks=True, copy_function=copy)
    for parent, _, _ in os.walk(target):
        status = os.stat(os.path.join(source, os.path.relpath(parent, target)))
        os.chown(parent, status.st_uid, status.st_gid)
        fsync_directory(parent)
