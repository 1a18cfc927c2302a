"""Everything that a run needs to know about a host before it decides, in one look: docs/contracts.md §2."""

from __future__ import annotations

import json
import os
from typing import Any, Optional

from . import gpu_facts
from .errors import FleetfitError
from .host_facts import host_facts
from .manifest import MANIFEST_PATH, read_manifest
from .ownership import SERVICES
from .probe_root import ProbeRoot, Runner

_LIBEXEC = "/opt/fleetfit/libexec"


def host_state(
    root: str = "/",
    *,
    run: Runner,
    pynvml_source: Optional[str] = None,
    library_path: Optional[str] = None,
    probe_timeout_s: float = 20,
    reference_time_s: Optional[float] = None,
) -> dict[str, Any]:
    """Return ``facts``, ``manifest``, ``services`` and ``helper_digest`` of this host; changes nothing.

    A manifest that cannot be read is null and a problem. Options as in gpu_facts.gather and host_facts.
    """
    probe = ProbeRoot(root)
    gpu = gpu_facts.gather(
        root, pynvml_source=pynvml_source, library_path=library_path, probe_timeout_s=probe_timeout_s
    )
    facts = host_facts(root, gpu, reference_time_s=reference_time_s)
    manifest: Optional[dict[str, Any]] = None
    try:
        manifest = read_manifest(probe.path(MANIFEST_PATH))
    except FleetfitError as error:
        facts["problems"].append(_problem(error.code, error.message, error.remedy or ""))
    except OSError as error:
        facts["problems"].append(
            _problem(
                "manifest_unreadable",
                f"{MANIFEST_PATH} cannot be read: {error.strerror or error}.",
                "Run with become: true: the manifest is root's.",
            )
        )
    return {
        "facts": facts,
        "manifest": manifest,
        "services": services(probe, run),
        "helper_digest": probe.link_name(f"{_LIBEXEC}/current"),
    }


def services(probe: ProbeRoot, run: Runner) -> dict[str, dict[str, Any]]:
    """Return our services: ``active`` (systemd's word), the current ``release``'s digest, ``unit_file``.

    Also ``last_start``, where it is known: how many seconds its last good start took (switch.py).
    """
    states = _active_states(run)
    return {
        service: {
            "active": states.get(f"{service}.service", "unknown"),
            "release": _release(probe, service),
            "unit_file": probe.exists(f"/etc/systemd/system/{service}.service"),
            **_last_start(probe, service),
        }
        for service in SERVICES
    }


def _active_states(run: Runner) -> dict[str, str]:
    """Ask systemd about all units in one call; none where there is no systemd."""
    units = [f"{service}.service" for service in SERVICES]
    try:
        status, output = run(["systemctl", "show", "--property=Id,ActiveState", "--", *units])
    except OSError:
        return {}
    if status:
        return {}
    states = {}
    for block in output.split("\n\n"):
        fields = dict(line.partition("=")[::2] for line in block.splitlines())
        if "Id" in fields:
            states[fields["Id"]] = fields.get("ActiveState", "unknown")
    return states


def _release(probe: ProbeRoot, service: str) -> Optional[str]:
    """Return the digest that ``current`` links to, or None where nothing is released."""
    try:
        target = os.readlink(probe.path(f"/opt/fleetfit/{service}/current"))
    except OSError:
        return None
    folder, _slash, digest = target.rstrip("/").rpartition("/")
    return digest if folder == "releases" or folder.endswith("/releases") else None


def _last_start(probe: ProbeRoot, service: str) -> dict[str, Any]:
    try:
        with open(probe.path(f"/var/lib/fleetfit/switch/{service}.good"), encoding="utf-8") as stream:
            document = json.load(stream)
    except (OSError, ValueError):
        return {}  # an estimate takes its place
    found = document.get("last_start") if isinstance(document, dict) else None
    return {"last_start": found} if isinstance(found, dict) else {}


def _problem(code: str, message: str, remedy: str) -> dict[str, Any]:
    return {"code": code, "message": message, "remedy": remedy, "device": None}
