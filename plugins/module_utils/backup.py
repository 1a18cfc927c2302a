"""Backups of a service's data: what a switch takes and puts back, and what an operator asks for.

A backup is paired with the release whose data it is. The kind ``directory`` is a plain copy. The kind
``open_webui`` copies every SQLite database through SQLite's own backup interface, checks it, and writes
``backup.json`` beside it; so it can be taken while the service runs, and tells what is in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional
from urllib.parse import quote

from .errors import FleetfitError
from .manifest import HostPaths, fsync_directory, safe_to_delete, write_atomic
from .units import format_size

KINDS = ("directory", "open_webui")
SCHEMA_VERSION = 1
RECORD = "backup.json"
DATA = "data"
MANUAL = "manual-"
# The first bytes of every SQLite database (https://www.sqlite.org/fileformat.html, section 1.3), and the
# files that it keeps beside one.
SQLITE_MAGIC = b"SQLite format 3\0"
SQLITE_COMPANIONS = ("-wal", "-shm", "-journal")
# Open WebUI's database below its DATA_DIR, the table of its migrations (Alembic's) and that of its chats.
WEBUI_DATABASE = "webui.db"
# How long another connection may keep the database locked.
BUSY_TIMEOUT_S = 30.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def _refuse(message: str, remedy: str) -> FleetfitError:
    return FleetfitError(message, code="bad_backup", remedy=remedy)


def check_backup(spec: Mapping[str, Any]) -> None:
    """Raise FleetfitError unless ``spec`` names a directory of ours: ``{"kind": …, "path": …}``."""
    if spec.get("kind") not in KINDS:
        raise _refuse(f"The backup kind {spec.get('kind')!r} is not known.", f"Use {', '.join(KINDS)}.")
    path = spec.get("path")
    if not isinstance(path, str) or not safe_to_delete(path):
        raise _refuse(f"The backup path {path!r} is not below fleetfit's own directories.", "Correct it.")


def is_needed(spec: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether a switch between two releases (their ``release.json``) could change the data for good.

    Open WebUI changes its database when another version of its code starts. Releases that share their
    environment run the same code: what differs is arguments, and their switch needs no copy.
    """
    return spec.get("kind") != "open_webui" or old.get("environment") != new.get("environment")


def backups_directory(paths: HostPaths, service: str) -> str:
    """Return where the backups of ``service`` are, root only."""
    return paths.at(f"/var/lib/fleetfit/backups/{service}")


def check_room(paths: HostPaths, service: str, spec: Mapping[str, Any], extra_bytes: int = 0) -> str:
    """Return the directory to copy; raise FleetfitError where the disk has no room for the copy.

    A restore holds a second copy for a moment, so there must be room for two; ``extra_bytes`` is what else
    will be put beside.
    """
    check_backup(spec)
    source = paths.at(spec["path"])
    directory = _have_directory(paths, service)
    needed_bytes = 2 * tree_bytes(source) + extra_bytes
    free_bytes = shutil.disk_usage(directory).free
    if needed_bytes > free_bytes:
        raise FleetfitError(
            f"Backing up {source} needs {format_size(needed_bytes)}, {directory} has {format_size(free_bytes)}.",
            code="disk_too_small",
            remedy="Free space on the host.",
        )
    return source


def _have_directory(paths: HostPaths, service: str) -> str:
    directory = backups_directory(paths, service)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    return directory


def superseded(paths: HostPaths, service: str, keep: Sequence[str]) -> list[str]:
    """Return the backups that no release of ``keep`` (digests) could go back to: one each stays, the newest.

    What an operator asked for is theirs to delete.
    """
    directory = backups_directory(paths, service)
    if not os.path.isdir(directory):
        return []
    entries = [os.path.join(directory, name) for name in os.listdir(directory)]
    newest_first = sorted(entries, key=lambda path: os.lstat(path).st_ctime, reverse=True)
    seen: set[str] = set()
    doomed = []
    for path in newest_first:
        name = os.path.basename(path)
        release = name.split("-")[0]
        if name.startswith(MANUAL) and not name.endswith(".partial"):
            continue
        if name.endswith(".partial") or release not in keep or release in seen:
            doomed.append(path)
        else:
            seen.add(release)
    return sorted(path for path in doomed if safe_to_delete(path, root=paths.root))


def discard(paths: HostPaths, service: str, keep: Sequence[str]) -> list[str]:
    """Delete what superseded() names and return it. Call it with the service's switch lock held."""
    doomed = superseded(paths, service, keep)
    for path in doomed:
        _remove(path)
    return doomed


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def back_up(
    paths: HostPaths,
    service: str,
    spec: Mapping[str, Any],
    release: str,
    transaction: str,
    facts: Optional[Mapping[str, Any]] = None,
) -> dict[str, Any]:
    """Copy the stopped service's data and return where to, paired with the release it belongs to.

    ``facts`` are kept in the record of kind ``open_webui``: ``version`` and ``environment`` of the release.
    Raises FleetfitError where the disk has no room for it, or a database is damaged.
    """
    check_room(paths, service, spec)
    return _write_backup(paths, service, spec, release, f"{release}-{transaction[:8]}", facts or {})


def take(
    paths: HostPaths, service: str, spec: Mapping[str, Any], release: str, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Make a backup because an operator asked for one; return its row, as in list_backups().

    The service may run: databases are copied through SQLite's own interface. Call it with the service's
    switch lock held.
    """
    if spec.get("kind") != "open_webui":
        raise _refuse(
            f"The data of {service} cannot be copied while it runs (backup kind {spec.get('kind')!r}).",
            "Run site.yml once, which renews the release's record.",
        )
    check_room(paths, service, spec)
    name = MANUAL + time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    number = 1
    while os.path.lexists(os.path.join(backups_directory(paths, service), name)):
        number += 1
        name = name.split("_")[0] + f"_{number}"
    _write_backup(paths, service, spec, release, name, facts)
    return find_backup(paths, service, name)


def _write_backup(
    paths: HostPaths,
    service: str,
    spec: Mapping[str, Any],
    release: str,
    name: str,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    source = paths.at(spec["path"])
    directory = _have_directory(paths, service)
    final = os.path.join(directory, name)
    partial = final + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    copy = final
    if spec["kind"] == "open_webui":
        os.mkdir(partial, 0o700)
        copy = os.path.join(final, DATA)
        _copy_tree(source, os.path.join(partial, DATA), databases=True)
        record = {
            "schema_version": SCHEMA_VERSION,
            "service": service,
            "kind": spec["kind"],
            "release": release,
            "version": facts.get("version"),
            "environment": facts.get("environment"),
            "made_at": time.time(),
            "size_bytes": tree_bytes(os.path.join(partial, DATA)),
            **look_at(os.path.join(partial, DATA)),
        }
        _write_record(partial, record)
        fsync_directory(partial)
    else:
        _copy_tree(source, partial)
    os.rename(partial, final)
    fsync_directory(directory)
    return {"kind": spec["kind"], "source": source, "copy": copy, "release": release}


def _write_record(folder: str, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=2, sort_keys=True) + "\n"
    write_atomic(os.path.join(folder, RECORD), text.encode(), 0o600)


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


# --- what is there ---


def _read_record(folder: str) -> Optional[dict[str, Any]]:
    path = os.path.join(folder, RECORD)
    try:
        with open(path, encoding="utf-8") as stream:
            record = json.load(stream)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FleetfitError(
            f"{path} cannot be read ({error}).",
            code="backup_damaged",
            remedy="Use another backup.",
        ) from error
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        version = record.get("schema_version") if isinstance(record, dict) else None
        raise FleetfitError(
            f"{path} has schema version {version!r}; this fleetfit knows {SCHEMA_VERSION}.",
            code="backup_damaged",
            remedy="Use the fleetfit that wrote it, or a newer one.",
        )
    return record


def list_backups(paths: HostPaths, service: str) -> list[dict[str, Any]]:
    """Return the backups of kind ``open_webui``, newest first: their records with ``name`` and ``copy``."""
    directory = backups_directory(paths, service)
    rows = []
    for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else []:
        folder = os.path.join(directory, name)
        if name.startswith(".") or name.endswith(".partial"):
            continue
        record = _read_record(folder)
        if record is not None:
            rows.append({**record, "name": name, "copy": os.path.join(folder, DATA)})
    return sorted(rows, key=lambda row: float(row["made_at"]), reverse=True)


def find_backup(paths: HostPaths, service: str, name: str) -> dict[str, Any]:
    """Return the backup called ``name``, or the newest for ``latest``; else FleetfitError with the list."""
    rows = list_backups(paths, service)
    for row in rows:
        if name in ("latest", row["name"]):
            return row
    there = "; ".join(describe_backup(row) for row in rows) or "there is none"
    raise FleetfitError(
        f"There is no backup '{name}' of {service} on this host: {there}.",
        code="backup_missing",
        remedy="Name one of these.",
    )


def describe_backup(row: Mapping[str, Any]) -> str:
    """Return one backup as people read it."""
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(float(row["made_at"])))
    chats = "" if row.get("chats") is None else f", {row['chats']} chats"
    return f"{row['name']} ({row.get('version') or 'version unknown'}, {made}{chats})"


def backup_of_release(paths: HostPaths, service: str, release: str) -> Optional[dict[str, Any]]:
    """Return the newest backup that a switch took of the data of ``release``, or None."""
    for row in list_backups(paths, service):
        if row["release"] == release and not row["name"].startswith(MANUAL):
            return row
    return None


def delete_manual(paths: HostPaths, service: str, keep: int) -> list[str]:
    """Delete all but the ``keep`` newest backups that an operator asked for; return their names."""
    manual = [row["name"] for row in list_backups(paths, service) if row["name"].startswith(MANUAL)]
    doomed = manual[keep:]
    for name in doomed:
        shutil.rmtree(os.path.join(backups_directory(paths, service), name))
    return doomed


def look_at(data: str) -> dict[str, Any]:
    """Return ``{"schema": [...], "chats": n}`` of Open WebUI's database in ``data``; None for what is absent.

    ``schema`` is the state of its migrations: code that knows less than this cannot use the database.
    """
    path = os.path.join(data, WEBUI_DATABASE)
    if not is_database(path):
        return {"schema": None, "chats": None}
    with _opened(path) as connection:
        connection.execute("PRAGMA query_only = ON")
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        schema = None
        if "alembic_version" in tables:
            schema = sorted(
                str(row[0]) for row in connection.execute("SELECT version_num FROM alembic_version")
            )
        chats = None
        if "chat" in tables:
            chats = int(connection.execute("SELECT count(*) FROM chat").fetchone()[0])
    return {"schema": schema, "chats": chats}


# --- to and from the controller ---


def export_archive(row: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Write a backup as one tar file, 0600 and its directory's owner's; return ``path`` and ``size``."""
    folder = os.path.dirname(str(row["copy"]))
    status = os.stat(os.path.dirname(target))
    free_bytes = shutil.disk_usage(os.path.dirname(target)).free
    needed_bytes = tree_bytes(folder)
    if needed_bytes > free_bytes:
        raise FleetfitError(
            f"Packing {row['name']} needs {format_size(needed_bytes)}, {os.path.dirname(target)} has"
            f" {format_size(free_bytes)}.",
            code="disk_too_small",
            remedy="Free space on the host, or give Ansible another remote_tmp.",
        )
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        # The record first, so that a reader need not unpack what it will refuse.
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(os.path.join(folder, RECORD), RECORD)
            archive.add(os.path.join(folder, DATA), DATA)
        stream.flush()
        os.fsync(stream.fileno())
    os.chown(target, status.st_uid, status.st_gid)
    return {"path": target, "size": os.stat(target).st_size}


def _archive_member(member: tarfile.TarInfo, archive: str) -> str:
    parts = member.name.split("/")
    plain = member.isfile() or member.isdir()
    if not plain or member.name.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise FleetfitError(
            f"{archive} contains '{member.name}', which fleetfit does not put into a backup.",
            code="backup_damaged",
            remedy="Use a file that backup_webui.yml wrote.",
        )
    if parts[0] != DATA and member.name != RECORD:
        raise FleetfitError(
            f"{archive} is not a backup: it contains '{member.name}'.",
            code="backup_damaged",
            remedy="Use a file that backup_webui.yml wrote.",
        )
    return member.name


def import_archive(paths: HostPaths, service: str, archive: str) -> dict[str, Any]:
    """Unpack a file that export_archive() wrote among the host's backups; return its row.

    What is in it belongs to the owner of the service's data here. Raises FleetfitError for anything else.
    """
    digest = hashlib.sha256()
    with open(archive, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    name = f"{MANUAL}imported-{digest.hexdigest()[:12]}"
    directory = _have_directory(paths, service)
    final = os.path.join(directory, name)
    if os.path.isdir(final):
        return find_backup(paths, service, name)
    partial = final + ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    free_bytes = shutil.disk_usage(directory).free
    if os.stat(archive).st_size > free_bytes:
        raise FleetfitError(
            f"Unpacking {archive} needs {format_size(os.stat(archive).st_size)}, {directory} has"
            f" {format_size(free_bytes)}.",
            code="disk_too_small",
            remedy="Free space on the host.",
        )
    os.mkdir(partial, 0o700)
    try:
        _unpack(archive, partial)
        record = _read_record(partial)
        if record is None or record.get("service") != service or not os.path.isdir(f"{partial}/{DATA}"):
            raise FleetfitError(
                f"{archive} is not a backup of {service}.",
                code="backup_damaged",
                remedy="Use a file that backup_webui.yml wrote.",
            )
        for path in _databases(os.path.join(partial, DATA)):
            with _opened(path) as connection:
                _require_whole(connection, path)
        _write_record(partial, {**record, "imported_from": os.path.basename(archive)})
    except (tarfile.TarError, EOFError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise FleetfitError(
            f"{archive} is damaged ({error}).", code="backup_damaged", remedy="Use another backup."
        ) from error
    except FleetfitError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.rename(partial, final)
    fsync_directory(directory)
    return find_backup(paths, service, name)


def _unpack(archive: str, folder: str) -> None:
    with tarfile.open(archive, "r:") as source:
        for member in source:
            target = os.path.join(folder, *_archive_member(member, archive).split("/"))
            if member.isdir():
                os.makedirs(target, mode=0o700, exist_ok=True)
                continue
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
            content = source.extractfile(member) or io.BytesIO()
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                shutil.copyfileobj(content, stream)
                os.fchmod(stream.fileno(), stat.S_IMODE(member.mode) & 0o700 | 0o600)
                os.fsync(stream.fileno())


def give_to_owner(copy: str, source: str) -> None:
    """Give all below ``copy`` to the owner of ``source``: an imported backup has another host's numbers."""
    status = os.stat(source)
    for parent, directories, names in os.walk(copy):
        for path in [parent, *(os.path.join(parent, name) for name in [*directories, *names])]:
            os.lchown(path, status.st_uid, status.st_gid)


# --- SQLite ---


def is_database(path: str) -> bool:
    """Return whether the file is a SQLite database."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb") as stream:
            return stream.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
    except FileNotFoundError:
        return False


def _databases(folder: str) -> list[str]:
    found = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if is_database(path))


def _is_companion(path: str) -> bool:
    """Return whether the file is what SQLite keeps beside a database while it is open."""
    return any(path.endswith(suffix) and is_database(path[: -len(suffix)]) for suffix in SQLITE_COMPANIONS)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Yield a connection to the database at ``path``; what SQLite says of a damaged one is FleetfitError."""
    try:
        import sqlite3
    except ImportError as error:  # a Python that was taken apart, such as python3-minimal
        raise FleetfitError(
            "The host's Python has no sqlite3.",
            code="sqlite_missing",
            remedy="Install the system's full Python 3.",
        ) from error
    try:
        # As root SQLite gives the files that it makes to the database's owner (os_unix.c, robustFchown).
        uri = f"file:{quote(path)}?mode=rw"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S)) as connection:
            yield connection
    except sqlite3.Error as error:
        raise FleetfitError(
            f"The database {path} cannot be read: {error}.",
            code="backup_damaged",
            remedy="Look at it with sqlite3; restore a backup with restore_webui.yml.",
        ) from error


def _require_whole(connection: Any, path: str) -> None:
    verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if verdict != "ok":
        raise FleetfitError(
            f"The database {path} is damaged: {verdict}.",
            code="backup_damaged",
            remedy="Look at it with sqlite3; restore a backup with restore_webui.yml.",
        )


def copy_database(source: str, target: str) -> None:
    """Copy a SQLite database, also one in use, through SQLite's backup interface, and check the copy.

    https://www.sqlite.org/backup.html. Owner, mode and times are the source's; it is fsynced.
    """
    status = os.stat(source)
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with _opened(source) as one, _opened(target) as other:
        one.backup(other)
        _require_whole(other, source)
    os.chown(target, status.st_uid, status.st_gid)
    shutil.copystat(source, target)
    with open(target, "rb") as stream:
        os.fsync(stream.fileno())


# --- trees ---


def tree_bytes(directory: str) -> int:
    """Return the bytes of all files below ``directory``; one that goes away meanwhile counts as none."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _copy_tree(source: str, target: str, *, databases: bool = False) -> None:
    """Copy with owners, modes and times, and fsync every file.

    With ``databases``, SQLite's own files are copied by SQLite, and what it keeps beside them is left out.
    """

    def copy(one: str, other: str) -> str:
        if databases and is_database(one):
            copy_database(one, other)
            return other
        shutil.copy2(one, other, follow_symlinks=False)
        if not os.path.islink(other):
            status = os.stat(one)
            os.chown(other, status.st_uid, status.st_gid)
            with open(other, "rb") as stream:
                os.fsync(stream.fileno())
        return other

    def left_out(parent: str, names: list[str]) -> list[str]:
        return [name for name in names if databases and _is_companion(os.path.join(parent, name))]

    shutil.copytree(source, target, symlinks=True, copy_function=copy, ignore=left_out)
    for parent, _, _ in os.walk(target):
        status = os.stat(os.path.join(source, os.path.relpath(parent, target)))
        os.chown(parent, status.st_uid, status.st_gid)
        fsync_directory(parent)
