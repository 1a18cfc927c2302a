"""Artifacts: what they are, what a host has of them, room on its disk, and how a file becomes visible.

One mechanism for models, wheelhouses, CPython and engine builds. A file is written to ``<dest>.partial``,
verified, synced and renamed, so that whoever opens ``dest`` sees the old file or the whole new one.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import json
import os
import pwd
import re
from dataclasses import dataclass
from typing import Any, Callable, Optional
from urllib.parse import quote, urlsplit, urlunsplit

from .errors import FleetfitError
from .units import GIB, MIB, format_size

SCHEMA_VERSION = 1
DEFAULT_ENDPOINT = "https://huggingface.co"
DEFAULT_STATE_DIR = "/var/lib/fleetfit/artifacts"
MARKER_NAME = ".fleetfit-artifact.json"  # in an unpacked tree: which archive it came from
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_MODE = re.compile(r"0?[0-7]{3}\Z")
_HASH_CHUNK_BYTES = 4 * MIB  # large enough that reading, not Python, is the limit


@dataclass(frozen=True)
class Source:
    """One place an artifact can come from; which fields are set depends on ``type`` (file, http, hub)."""

    type: str
    path: str = ""
    location: str = ""
    url: str = ""
    repository: str = ""
    revision: str = ""
    filename: str = ""
    endpoint: str = DEFAULT_ENDPOINT

    @property
    def on_controller(self) -> bool:
        """Return whether the file lies on the controller and has to be pushed."""
        return self.type == "file" and self.location == "controller"

    def address(self) -> str:
        """Return the address to ask; a hub's is ``<endpoint>/<repository>/resolve/<revision>/<filename>``."""
        if self.type == "hub":
            parts = (self.repository, "resolve", self.revision, self.filename)
            return "/".join([self.endpoint.rstrip("/"), *(quote(part) for part in parts)])
        return self.url

    def describe(self) -> str:
        """Return the source as people read it, without passwords and signatures."""
        if self.type == "file":
            return f"{self.path} (on the {self.location})"
        return redact_url(self.address())


@dataclass(frozen=True)
class Unpack:
    """An archive to unpack into the directory ``dest``, without ``strip`` leading path parts."""

    dest: str
    strip: int = 0
    creates: Optional[str] = None


@dataclass(frozen=True)
class Artifact:
    """A file with known size (bytes) and sha256, its place on the host and where it can be had."""

    name: str
    size: int
    sha256: str
    dest: str
    mode: str = "0644"
    owner: Optional[str] = None
    group: Optional[str] = None
    unpack: Optional[Unpack] = None
    sources: tuple[Source, ...] = ()

    @property
    def partial(self) -> str:
        """Return the path that is written until the content is verified."""
        return f"{self.dest}.partial"

    @property
    def sidecar(self) -> str:
        """Return the path of the notes beside the partial file: which content it belongs to."""
        return f"{self.dest}.partial.json"


@dataclass(frozen=True)
class Settings:
    """How to fetch; times in seconds. Timeouts and retries are curl-like defaults, not measured values."""

    bandwidth_limit_bytes_per_s: int = 0
    proxy_http: Optional[str] = None
    proxy_https: Optional[str] = None
    no_proxy: Optional[str] = None
    ca_file: Optional[str] = None
    token_file: Optional[str] = None
    reserve_bytes: int = GIB
    state_dir: str = DEFAULT_STATE_DIR
    timeout_s: float = 30.0  # without one byte
    stall_s: float = 60.0  # below the lowest speed
    retries: int = 6  # in a row without getting further
    backoff_s: float = 1.0  # doubled at each retry, at most 30


@dataclass
class Presence:
    """What a host has of an artifact; ``bytes_to_fetch`` counts what is partial already."""

    present: bool
    bytes_to_fetch: int = 0
    reason: str = ""


def redact_url(url: str) -> str:
    """Return ``url`` without user, password and query, which may hold a signature."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", ""))


def parse_artifacts(entries: list[dict[str, Any]], *, need_sources: bool = True) -> list[Artifact]:
    """Return the artifacts described by ``entries`` (contracts §6).

    ``need_sources`` is false on a host where the action plugin keeps the sources that it serves itself.
    Raises FleetfitError (``artifact_invalid``) naming the entry and the key; an entry without checksum is
    refused.
    """
    artifacts = [
        _parse_artifact(entry, f"artifacts[{index}]", need_sources) for index, entry in enumerate(entries)
    ]
    seen: dict[str, str] = {}
    for artifact in artifacts:
        if artifact.dest in seen:
            raise _invalid(artifact.name, f"has the same dest as {seen[artifact.dest]}: {artifact.dest}.")
        seen[artifact.dest] = artifact.name
    return artifacts


def artifact_to_dict(artifact: Artifact) -> dict[str, Any]:
    """Return ``artifact`` as JSON data, the inverse of ``parse_artifacts`` for one entry."""
    unpack = artifact.unpack
    return {
        **{
            key: getattr(artifact, key)
            for key in ("name", "size", "sha256", "dest", "mode", "owner", "group")
        },
        "unpack": unpack and {"dest": unpack.dest, "strip": unpack.strip, "creates": unpack.creates},
        "sources": [
            {key: value for key, value in vars(source).items() if value} for source in artifact.sources
        ],
    }


def _parse_artifact(entry: dict[str, Any], place: str, need_sources: bool) -> Artifact:
    name = entry.get("name") or place
    size, sha256, mode = entry.get("size"), str(entry.get("sha256") or ""), str(entry.get("mode") or "0644")
    if isinstance(size, str) and size.isdecimal():
        size = int(size)
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise _invalid(name, f"has the size {size!r}, which is not a positive number of bytes.")
    if not _SHA256.match(sha256):
        raise _invalid(name, f"has the sha256 {sha256!r}, which is not 64 hexadecimal digits.")
    if not _MODE.match(mode):
        raise _invalid(name, f"has the mode {mode!r}; write it as a string such as '0640'.")
    listed = entry.get("sources") or []
    if not isinstance(listed, list) or not all(isinstance(source, dict) for source in listed):
        raise _invalid(name, f"has sources that are not a list of sources: {listed!r}.")
    sources = tuple(_parse_source(source, name) for source in listed)
    if need_sources and not sources:
        raise _invalid(name, "has no sources.")
    unpack = None
    if entry.get("unpack"):
        given = entry["unpack"]
        if not isinstance(given, dict) or not str(given.get("strip") or 0).isdecimal():
            raise _invalid(
                name, f"has unpack {given!r}, which is not a dest with a number of parts to strip."
            )
        creates = given.get("creates")
        if creates and (os.path.isabs(creates) or ".." in creates.split("/")):
            raise _invalid(name, f"has unpack.creates {creates!r}, which is not a path inside the tree.")
        unpack = Unpack(
            dest=_absolute(given.get("dest"), name, "unpack.dest"),
            strip=int(given.get("strip") or 0),
            creates=creates or None,
        )
    return Artifact(
        name=str(name),
        size=size,
        sha256=sha256,
        dest=_absolute(entry.get("dest"), name, "dest"),
        mode=mode,
        owner=entry.get("owner") or None,
        group=entry.get("group") or None,
        unpack=unpack,
        sources=sources,
    )


def _parse_source(source: dict[str, Any], name: str) -> Source:
    kind = source.get("type")
    needed = {
        "file": ("path", "location"),
        "http": ("url",),
        "hub": ("repository", "revision", "filename"),
    }.get(str(kind))
    if needed is None:
        raise _invalid(name, f"has a source of type {kind!r}; known are file, http and hub.")
    for key in needed:
        if not source.get(key):
            raise _invalid(name, f"has a source of type {kind} without {key}.")
    values = {key: str(source[key]) for key in (*needed, "endpoint") if source.get(key)}
    parsed = Source(type=str(kind), **values)
    if kind == "file" and parsed.location not in ("controller", "host"):
        raise _invalid(
            name, f"has a file source with the location {parsed.location!r}; say controller or host."
        )
    if kind != "file" and urlsplit(parsed.address()).scheme not in ("http", "https"):
        raise _invalid(name, f"has the address {parsed.describe()}, which is neither http nor https.")
    return parsed


def _absolute(path: Any, name: str, key: str) -> str:
    if not isinstance(path, str) or not os.path.isabs(path) or os.path.normpath(path) == "/":
        raise _invalid(name, f"has {key} {path!r}, which is not an absolute path.")
    return os.path.normpath(path)


def _invalid(name: Any, problem: str) -> FleetfitError:
    return FleetfitError(
        f"The artifact {name} {problem}",
        code="artifact_invalid",
        remedy="Correct this entry; every artifact needs name, size, sha256, dest and sources.",
    )


# --- what the host has


def sha256_of_file(path: str) -> str:
    """Return the sha256 of the file at ``path``."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for chunk in iter(lambda: stream.read(_HASH_CHUNK_BYTES), b""):
            digest.update(chunk)
    return digest.hexdigest()


def inspect_artifact(
    artifact: Artifact, state_dir: str, *, verify: bool = False, write_stamp: bool = True
) -> Presence:
    """Return whether the host has ``artifact``, and how much is missing.

    A file's hash is computed once and remembered, with the file's identity (inode, size, times), in
    ``state_dir``; ``verify`` computes it again. An unpacked tree is present by its marker, also without the
    archive.
    """
    if artifact.unpack:
        return _inspect_tree(artifact, artifact.unpack, state_dir, verify, write_stamp)
    return _inspect_file(artifact, state_dir, verify, write_stamp)


def _inspect_tree(
    artifact: Artifact, unpack: Unpack, state_dir: str, verify: bool, write_stamp: bool
) -> Presence:
    marker = read_json(os.path.join(unpack.dest, MARKER_NAME))
    if marker and marker.get("sha256") == artifact.sha256 and marker.get("strip") == unpack.strip:
        if unpack.creates is None or os.path.lexists(os.path.join(unpack.dest, unpack.creates)):
            return Presence(present=True)
        reason = f"{unpack.creates} is missing in {unpack.dest}"
    elif marker:
        reason = "another archive is unpacked there"
    else:
        reason = "not unpacked"
    archive = _inspect_file(artifact, state_dir, verify, write_stamp)
    return Presence(present=False, bytes_to_fetch=archive.bytes_to_fetch, reason=reason)


def _inspect_file(artifact: Artifact, state_dir: str, verify: bool, write_stamp: bool) -> Presence:
    missing = artifact.size - partial_bytes(artifact)
    try:
        status = os.stat(artifact.dest)
    except FileNotFoundError:
        return Presence(present=False, bytes_to_fetch=missing, reason="missing")
    if not os.path.isfile(artifact.dest):
        raise FleetfitError(
            f"{artifact.dest} is not a regular file, so the artifact {artifact.name} cannot go there.",
            code="dest_not_a_file",
            remedy="Choose another dest, or remove what is there.",
        )
    if status.st_size != artifact.size:
        return Presence(present=False, bytes_to_fetch=missing, reason=f"has {status.st_size} bytes")
    if verify or not _stamp_matches(artifact, state_dir, status):
        if sha256_of_file(artifact.dest) != artifact.sha256:
            return Presence(present=False, bytes_to_fetch=missing, reason="has another sha256")
        if write_stamp:
            remember_hash(artifact, state_dir)
    return Presence(present=True)


def _stamp_path(dest: str, state_dir: str) -> str:
    return os.path.join(state_dir, hashlib.sha256(dest.encode()).hexdigest()[:32] + ".json")


def _identity(status: os.stat_result) -> dict[str, int]:
    # The change time shows a write that sets the modification time back.
    return {
        "inode": status.st_ino,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _stamp_matches(artifact: Artifact, state_dir: str, status: os.stat_result) -> bool:
    stamp = read_json(_stamp_path(artifact.dest, state_dir))
    expected = {"sha256": artifact.sha256, "dest": artifact.dest, **_identity(status)}
    return stamp is not None and all(stamp.get(key) == value for key, value in expected.items())


def remember_hash(artifact: Artifact, state_dir: str) -> None:
    """Record that the file at ``dest`` was seen with the artifact's sha256, for ``inspect_artifact``."""
    os.makedirs(state_dir, mode=0o700, exist_ok=True)
    stamp = {"sha256": artifact.sha256, "dest": artifact.dest, **_identity(os.stat(artifact.dest))}
    write_json(_stamp_path(artifact.dest, state_dir), stamp)


def partial_bytes(artifact: Artifact) -> int:
    """Return how many bytes of ``artifact`` an interrupted download left; 0 if it was for other content."""
    notes = read_json(artifact.sidecar)
    if not notes or notes.get("sha256") != artifact.sha256 or notes.get("size") != artifact.size:
        return 0
    try:
        size = os.stat(artifact.partial).st_size
    except OSError:
        return 0
    # After a power cut the file may be longer than what reached the disk: count what was synced.
    if notes.get("boot_id") != boot_id():
        size = min(size, int(notes.get("synced_bytes", 0)))
    return min(size, artifact.size)


def boot_id() -> str:
    """Return the kernel's identifier of this boot, empty where there is none."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
            return stream.read().strip()
    except OSError:
        return ""


# --- disk


def free_bytes_at(path: str) -> int:
    """Return the bytes that an unprivileged writer has free on the file system of ``path``."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def check_disk(
    missing: list[tuple[Artifact, int]],
    reserve_bytes: int,
    free_bytes: Callable[[str], int] = free_bytes_at,
) -> None:
    """Raise FleetfitError (``disk_too_small``) where what is missing does not fit beside ``reserve_bytes``.

    ``missing`` pairs artifacts with the bytes still to fetch; sums are per file system. An archive to be
    unpacked counts once more at its tree's place, the least that it can need: the true size is checked before
    unpacking.
    """
    needs: dict[int, int] = {}
    places: dict[int, str] = {}
    for artifact, bytes_to_fetch in missing:
        parts = [(artifact.dest, bytes_to_fetch)]
        if artifact.unpack:
            parts.append((artifact.unpack.dest, artifact.size))
        for path, size in parts:
            place = existing_parent(path)
            device = os.stat(place).st_dev
            needs[device] = needs.get(device, 0) + size
            places.setdefault(device, place)
    for device, need in needs.items():
        require_free(places[device], need, reserve_bytes, free_bytes)


def require_free(
    place: str, need: int, reserve_bytes: int, free_bytes: Callable[[str], int] = free_bytes_at
) -> None:
    """Raise FleetfitError (``disk_too_small``) unless ``need`` bytes fit at ``place`` beside the reserve."""
    free = free_bytes(place)
    short = need + reserve_bytes - free
    if need and short > 0:
        raise FleetfitError(
            f"The disk at {place} is too small: {format_size(need)} are needed and "
            f"{format_size(reserve_bytes)} "
            f"must stay free, but {format_size(free)} are free.",
            code="disk_too_small",
            remedy=f"Free at least {format_size(short)} ({short} bytes) there, choose a smaller variant, "
            "or lower "
            "reserve_bytes. Nothing was downloaded.",
        )


def existing_parent(path: str) -> str:
    """Return the nearest directory above ``path`` that exists."""
    parent = os.path.dirname(path)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    return parent


# --- making a file visible


def place_file(artifact: Artifact, path: str, state_dir: str) -> None:
    """Make the verified file at ``path`` (same file system) visible at ``dest``: synced, then renamed."""
    set_attributes(path, artifact.mode, artifact.owner, artifact.group)
    sync_path(path)
    os.replace(path, artifact.dest)
    # Before the sync: after it, a power loss would bring the notes back beside the file.
    remove_partial(artifact)
    sync_path(os.path.dirname(artifact.dest))
    remember_hash(artifact, state_dir)


def remove_partial(artifact: Artifact) -> None:
    """Remove what an interrupted or failed download left."""
    for path in (artifact.partial, artifact.sidecar):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def make_parent(path: str) -> None:
    """Make the directory of ``path``, readable by all; directories that exist keep their mode."""
    parent = os.path.dirname(path)
    if os.path.isdir(parent):
        return
    make_parent(parent)
    try:
        os.mkdir(parent)
    except FileExistsError:
        return
    os.chmod(parent, 0o755)  # noqa: S103  whatever the umask: services' users walk through it


def set_attributes(
    path: str, mode: Optional[str], owner: Optional[str], group: Optional[str], *, check_mode: bool = False
) -> bool:
    """Give ``path`` this mode (octal text), owner and group where they differ; return whether they did.

    Raises FleetfitError (``unknown_owner``) for a user or group that the host does not have, except in check
    mode, where a role that would create it has not run.
    """
    status = os.lstat(path)
    try:
        uid = _user_id(owner) if owner else status.st_uid
        gid = _group_id(group) if group else status.st_gid
    except KeyError as error:
        if check_mode:
            return True
        raise FleetfitError(
            f"{path} is to belong to {owner or 'root'}:{group or 'root'}, but this host has no "
            f"{error.args[0]}.",
            code="unknown_owner",
            remedy="Create the user and the group first; host_baseline does it for fleetfit's own.",
        ) from None
    wanted_mode = int(mode, 8) if mode else None
    changed = (uid, gid) != (status.st_uid, status.st_gid)
    if changed and not check_mode:
        os.chown(path, uid, gid, follow_symlinks=False)
    if wanted_mode is not None and (status.st_mode & 0o7777) != wanted_mode:
        changed = True
        if not check_mode:
            os.chmod(path, wanted_mode)
    return changed


def _user_id(name: str) -> int:
    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise KeyError(f"user {name}") from None


def _group_id(name: str) -> int:
    if name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise KeyError(f"group {name}") from None


def sync_path(path: str) -> None:
    """Write the file or directory at ``path`` to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: str) -> Optional[dict[str, Any]]:
    """Return the JSON object in the file at ``path``; None where it is missing or not one."""
    try:
        with open(path, encoding="utf-8") as stream:
            value = json.load(stream)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: str, value: dict[str, Any]) -> None:
    """Write ``value`` to ``path`` in one step, readable by its owner only."""
    temporary = f"{path}.{os.getpid()}.new"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(value, stream, sort_keys=True)
    os.replace(temporary, path)
