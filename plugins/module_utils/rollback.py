"""Which releases a host could go back to, which one a word means, and what becomes of the service's data."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from . import backup as backups
from .errors import FleetfitError
from .manifest import HostPaths
from .release import current_digest, read_plan, read_release, release_version
from .switch import read_good

# Fewer digits than this could be anything.
SHORTEST_PREFIX = 4
DATA_CHOICES = ("auto", "keep", "restore")


def list_releases(paths: HostPaths, service: str) -> list[dict[str, Any]]:
    """Return the releases on the host, the newest first in the order in which they were switched to.

    Each has ``digest``, ``version``, ``current``, ``served`` (whether its gate ever passed), ``model``,
    ``variant`` and ``context_tokens`` (of its plan), ``environment``.
    """
    good = read_good(paths, service)
    directory = paths.releases(service)
    present = {
        name
        for name in (os.listdir(directory) if os.path.isdir(directory) else [])
        if os.path.exists(os.path.join(directory, name, "release.json")) and not name.startswith(".")
    }
    ordered = [digest for digest in good["sequence"] if digest in present]
    ordered += sorted(present - set(ordered))
    current = current_digest(paths, service)
    rows = []
    for digest in ordered:
        plan = read_plan(paths, service, digest)
        deployment = (plan.get("deployments") or [{}])[0]
        release = read_release(paths, service, digest)
        rows.append(
            {
                "digest": digest,
                "version": release_version(paths, service, digest),
                "current": digest == current,
                "served": digest in good["history"],
                "model": deployment.get("model") or release["gate"].get("model"),
                "variant": deployment.get("variant"),
                "context_tokens": deployment.get("context_tokens"),
                "environment": release.get("environment"),
            }
        )
    return rows


def describe_release(row: Mapping[str, Any]) -> str:
    """Return one release as people read it."""
    parts = [f"version {row['version']}" if row.get("version") else "version unknown"]
    if row.get("model"):
        parts.append(" ".join(str(row[name]) for name in ("model", "variant") if row.get(name)))
    if row.get("context_tokens"):
        parts.append(f"context {row['context_tokens']}")
    if row["current"]:
        parts.append("current")
    elif not row["served"]:
        parts.append("never served")
    return f"{row['digest']} ({', '.join(parts)})"


def _refuse(service: str, what: str, rows: Sequence[Mapping[str, Any]], remedy: str) -> FleetfitError:
    there = "; ".join(describe_release(row) for row in rows) or "none"
    return FleetfitError(
        f"{what} Releases of {service} here: {there}.", code="unknown_release", remedy=remedy
    )


def resolve(service: str, rows: Sequence[Mapping[str, Any]], wanted: str) -> str:
    """Return the digest of the release that ``wanted`` means, from list_releases().

    An empty text or ``previous`` is the one before the current one; else the beginning of a digest, or a
    version. Raises FleetfitError (``unknown_release``) with the list of what is there.
    """
    current = next((number for number, row in enumerate(rows) if row["current"]), None)
    if current is None:
        raise _refuse(service, f"{service} has no current release.", rows, "Run site.yml.")
    if wanted in ("", "previous"):
        older = [row for row in rows[current + 1 :] if row["served"]]
        if not older:
            raise _refuse(
                service,
                f"There is no release of {service} before the current one.",
                rows,
                "Change the inventory and run site.yml instead.",
            )
        return str(older[0]["digest"])
    found = [row for row in rows if row["version"] == wanted]
    if len(wanted) >= SHORTEST_PREFIX and re.fullmatch(r"[0-9a-f]+", wanted):
        found += [row for row in rows if row["digest"].startswith(wanted) and row not in found]
    usable = [row for row in found if row["served"]]
    if not found:
        raise _refuse(
            service,
            f"'{wanted}' is neither the beginning of a release's name nor a version.",
            rows,
            "Name one of these, or leave it out to go back by one.",
        )
    if not usable:
        raise _refuse(
            service, f"{found[0]['digest']} was never seen to serve.", rows, "Name one that has served."
        )
    if len(usable) > 1:
        raise _refuse(
            service, f"'{wanted}' means {len(usable)} releases.", rows, "Name one by its first digits."
        )
    return str(usable[0]["digest"])


def decide_data(
    paths: HostPaths, service: str, current: str, target: str, choice: str = "auto"
) -> dict[str, Any]:
    """Return what becomes of the service's data when it goes back from ``current`` to ``target``.

    ``{"action": "none" | "keep" | "restore", "message", "backup"}``. Older code cannot use a database that
    newer code has migrated: where the migrations differ, the backup that was taken of the target's data has
    to be put back, and what was made since then leaves the service; that needs ``choice`` ``restore``.
    Raises FleetfitError (``data_migrated``, ``backup_missing``).
    """
    if choice not in DATA_CHOICES:
        raise FleetfitError(
            f"'{choice}' is not known.", code="bad_rollback", remedy=f"Use {', '.join(DATA_CHOICES)}."
        )
    old, new = read_release(paths, service, current), read_release(paths, service, target)
    spec = new.get("backup") or {}
    if spec.get("kind") != "open_webui":
        return {"action": "none", "message": "it has no data of its own", "backup": None}
    backup = backups.backup_of_release(paths, service, target)
    if choice == "restore":
        if backup is None:
            raise FleetfitError(
                f"There is no backup of the data that {target} of {service} had.",
                code="backup_missing",
                remedy="Keep the data (fleetfit_rollback_data=keep), or name a backup to restore_webui.yml.",
            )
        return {"action": "restore", "message": _says(backup), "backup": backup}
    kept = {"action": "keep", "backup": None}
    if choice == "keep":
        return {**kept, "message": "the data stays, as was asked"}
    if old.get("environment") == new.get("environment"):
        return {**kept, "message": "the data stays: both releases run the same code"}
    live = backups.look_at(paths.at(spec["path"]))
    if backup is not None and live["schema"] == backup["schema"]:
        return {**kept, "message": "the data stays: no migration lies between the two releases"}
    versions = [release_version(paths, service, digest) for digest in (current, target)]
    if backup is None:
        if versions[0] is not None and versions[0] == versions[1]:
            return {**kept, "message": f"the data stays: both releases are version {versions[0]}"}
        raise FleetfitError(
            f"{service} {versions[1]} may be unable to use the data of {versions[0]}, and there is no backup of"
            " the data that it had.",
            code="backup_missing",
            remedy="Say fleetfit_rollback_data=keep to try it with the data as it is.",
        )
    raise FleetfitError(
        f"{service} {versions[0]} has migrated the database (from {_schema(backup)} to {_schema(live)}):"
        f" {versions[1]} cannot use it. {_says(backup)} The service has {_chats(live)} now; what was made since"
        " then would stay only in the backup that is taken before the switch.",
        code="data_migrated",
        remedy="Say fleetfit_rollback_data=restore to go back to that backup.",
    )


def _schema(data: Mapping[str, Any]) -> str:
    return " ".join(data.get("schema") or ["an unknown state"])


def _chats(data: Mapping[str, Any]) -> str:
    return "an unknown number of chats" if data.get("chats") is None else f"{data['chats']} chats"


def _says(backup: Mapping[str, Any]) -> str:
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(float(backup["made_at"])))
    return f"The backup {backup['name']} of {made} has {_chats(backup)}."


def data_to_put_back(
    paths: HostPaths, spec: Mapping[str, Any], backup: Optional[Mapping[str, Any]]
) -> Optional[dict[str, Any]]:
    """Return the journal's ``put_back`` for a backup, or None."""
    if backup is None:
        return None
    return {"source": paths.at(spec["path"]), "copy": backup["copy"], "name": backup["name"]}


def newer_than(version: Optional[str], installed: Optional[str]) -> bool:
    """Return whether ``version`` is newer than ``installed``; what cannot be compared is not."""

    def numbers(text: Optional[str]) -> list[int]:
        match = re.match(r"\d+(\.\d+)*", text or "")
        return [int(part) for part in match.group(0).split(".")] if match else []

    one, other = numbers(version), numbers(installed)
    length = max(len(one), len(other))
    return bool(one and other) and one + [0] * (length - len(one)) > other + [0] * (length - len(other))
