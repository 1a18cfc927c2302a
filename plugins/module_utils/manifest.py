"""What fleetfit manages on a host: its paths, its manifest, and what it may delete."""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from typing import Any, Optional

from .errors import FleetfitError

SCHEMA_VERSION = 1
MANIFEST_PATH = "/etc/fleetfit/manifest.json"
# Only what lies under these belongs to us (docs/contracts.md, section 5).
OWN_PREFIXES = ("/opt/fleetfit", "/var/lib/fleetfit", "/etc/fleetfit")

_SERVICE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
_SECTION = re.compile(r"[a-z][a-z0-9_]{0,63}")
_LISTS = ("paths", "units", "users")


@dataclass(frozen=True)
class HostPaths:
    """Where fleetfit keeps things on a host; ``root`` is ``/`` everywhere but in tests."""

    root: str = "/"

    def at(self, path: str) -> str:
        """Return the absolute ``path`` below ``root``."""
        return os.path.join(self.root, path.lstrip("/"))

    def service(self, service: str) -> str:
        """Return ``/opt/fleetfit/<service>``."""
        return self.at(f"/opt/fleetfit/{service}")

    def releases(self, service: str) -> str:
        """Return the directory of the service's releases."""
        return os.path.join(self.service(service), "releases")

    def envs(self, service: str) -> str:
        """Return the directory of the service's environments."""
        return os.path.join(self.service(service), "envs")

    def current(self, service: str) -> str:
        """Return the link to the release that the unit runs."""
        return os.path.join(self.service(service), "current")

    def switch(self) -> str:
        """Return the root-only directory of switch journals."""
        return self.at("/var/lib/fleetfit/switch")

    def manifest(self) -> str:
        """Return the manifest's path."""
        return self.at(MANIFEST_PATH)


def check_service_name(service: str) -> str:
    """Return ``service`` if it can be a unit's name and a directory; raise FleetfitError otherwise."""
    if not _SERVICE.fullmatch(service):
        raise FleetfitError(
            f"'{service}' is not a service name.",
            code="bad_service_name",
            remedy="Use the unit's name without '.service': lower-case letters, digits and dashes.",
        )
    return service


def fsync_directory(path: str) -> None:
    """Make renames and new names in the directory ``path`` survive power loss."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str, data: bytes, mode: int) -> None:
    """Replace the file ``path`` with ``data`` so that a reader sees the old or the new one, never a part.

    ``mode`` (permission bits) is set before the first byte is written; file and directory are fsynced.
    """
    directory = os.path.dirname(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise
    fsync_directory(directory)


def read_manifest(path: str = MANIFEST_PATH) -> Optional[dict[str, Any]]:
    """Return the manifest, or None where there is none; raise FleetfitError for one that cannot be read."""
    try:
        with open(path, encoding="utf-8") as stream:
            document = json.load(stream)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise FleetfitError(
            f"{path} is not JSON ({error}).",
            code="manifest_unreadable",
            remedy="Move it away and run site.yml: each role writes its section again.",
        ) from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise FleetfitError(
            f"{path} has schema version {version!r}; this fleetfit knows version {SCHEMA_VERSION}.",
            code="manifest_version",
            remedy="Use the fleetfit that wrote it, or a newer one.",
        )
    if not isinstance(document.get("sections"), dict):
        raise FleetfitError(
            f"{path} has no sections.",
            code="manifest_unreadable",
            remedy="Move it away and run site.yml: each role writes its section again.",
        )
    return dict(document)


def check_section(name: str, content: dict[str, Any]) -> None:
    """Raise FleetfitError unless ``name`` and ``content`` can be a manifest section."""
    if not _SECTION.fullmatch(name):
        raise FleetfitError(
            f"'{name}' is not a section name.",
            code="bad_section",
            remedy="Use the role's name: lower-case letters, digits and underscores.",
        )
    for key in _LISTS:
        value = content.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise FleetfitError(
                f"'{key}' of section '{name}' is not a list of names: {value!r}.",
                code="bad_section",
                remedy=f"Give '{key}' as a list of non-empty strings.",
            )
    for path in content.get("paths", []):
        if not os.path.isabs(path) or os.path.normpath(path) != path:
            raise FleetfitError(
                f"'{path}' in 'paths' of section '{name}' is not a plain absolute path.",
                code="bad_section",
                remedy="Write the path from the root, without '..' and without a slash at its end.",
            )


def render_with_section(
    document: Optional[dict[str, Any]], name: str, content: Optional[dict[str, Any]]
) -> Optional[dict[str, Any]]:
    """Return ``document`` with section ``name`` replaced whole (None removes it)."""
    sections = dict((document or {}).get("sections", {}))
    if content is None:
        sections.pop(name, None)
    else:
        sections[name] = content
    if document is None and not sections:
        return None
    return {**(document or {}), "schema_version": SCHEMA_VERSION, "sections": sections}


def write_section(
    path: str, name: str, content: Optional[dict[str, Any]], *, check_mode: bool = False
) -> bool:
    """Replace section ``name`` of the manifest at ``path`` whole and atomically; return whether it changed.

    ``content`` None removes the section. In check mode nothing is written.
    """
    check_section(name, content or {})
    before = read_manifest(path)
    after = render_with_section(before, name, content)
    mode_is_right = before is None or stat.S_IMODE(os.stat(path).st_mode) == 0o600
    if after == before and mode_is_right:
        return False
    if not check_mode and after is not None:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        text = json.dumps(after, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomic(path, text.encode(), 0o600)
    return True


def safe_to_delete(path: str, *, root: str = "/") -> bool:
    """Return whether ``path`` lies strictly below one of our own directories once links are resolved.

    The last component itself is not followed: deleting a link deletes the link. ``root`` is for tests.
    """
    if not os.path.isabs(path) or "\0" in path:
        return False
    trimmed = os.path.normpath(path)
    resolved = os.path.join(os.path.realpath(os.path.dirname(trimmed)), os.path.basename(trimmed))
    for prefix in OWN_PREFIXES:
        own = os.path.realpath(os.path.join(root, prefix.lstrip("/")))
        if resolved.startswith(own + os.sep) and ".." not in path.split(os.sep):
            return True
    return False
