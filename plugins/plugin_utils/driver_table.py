"""The NVIDIA drivers of many hosts as a table that people read in a terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..module_utils.driver_packages import version_key
from .plan_table import format_table

SCHEMA_VERSION = 1
COLUMNS = (
    *("host", "GPUs", "loaded", "installed", "newer", "source", "held", "branch until", "Secure Boot"),
    *("kernels with module", "reboot"),
)
NO_FACTS = "no answer: see the failure above"


def _gpus(state: Mapping[str, Any]) -> str:
    names: dict[str, int] = {}
    for gpu in state["gpus"]:
        name = gpu["name"].removeprefix("NVIDIA ")
        names[name] = names.get(name, 0) + 1
    return ", ".join(f"{count}x {name}" if count > 1 else name for name, count in names.items()) or "none"


def _version(part: Mapping[str, Any]) -> str:
    return " ".join(text for text in (part["version"], part["flavour"]) if text) if part["version"] else "-"


def newer_candidate(state: Mapping[str, Any]) -> str:
    """Return the candidate where it is newer than what is installed, or where nothing is; else ``-``."""
    candidate, installed = state["candidate"]["version"], state["installed"]["version"]
    if candidate is None or (installed and version_key(candidate) <= version_key(installed)):
        return "-"
    return str(candidate)


def _held(state: Mapping[str, Any]) -> str:
    installed = state["installed"]
    if not installed["packages"]:
        return "-"
    held, all_of_them = len(installed["held"]), len(installed["packages"])
    return "yes" if held == all_of_them else ("no" if not held else f"{held} of {all_of_them}")


def _until(state: Mapping[str, Any], problems: set[str]) -> str:
    if not state["installed"]["branch"]:
        return "-"
    end = state["branch_end_of_life"] or ("unknown" if state["branch_supported"] is not False else "over")
    return f"{end} (over)" if "driver_branch_end_of_life" in problems and end != "over" else str(end)


def _secure_boot(state: Mapping[str, Any]) -> str:
    words = {"enabled": "on", "disabled": "off", "unsupported": "none", "unknown": "?"}[state["secure_boot"]]
    if state["secure_boot"] != "enabled":
        return words
    if state["mok"]["pending"]:
        return f"{words}, key pending"
    return {True: f"{words}, key enrolled", False: f"{words}, key not enrolled", None: words}[
        state["mok"]["enrolled"]
    ]


def _modules(state: Mapping[str, Any]) -> str:
    if not state["installed"]["version"]:
        return "-"
    having = [k for k in state["kernels"] if k["module_version"] or k["dkms"] == "installed"]
    return f"{len(having)} of {len(state['kernels'])}"


def host_row(host: str, state: Mapping[str, Any] | None) -> list[str]:
    """Return one host's cells; ``state`` is None where the host gave none."""
    if not state:
        return [host, "?", *[""] * (len(COLUMNS) - 3), NO_FACTS]
    return [
        host,
        _gpus(state),
        _version(state["loaded"]),
        _version(state["installed"]),
        newer_candidate(state),
        state["installed"]["source"] or "-",
        _held(state),
        _until(state, {problem["code"] for problem in state["problems"]}),
        _secure_boot(state),
        _modules(state),
        "yes" if state["reboot_reasons"] else "no",
    ]


def _kernel_line(kernel: Mapping[str, Any]) -> str:
    notes = [word for word in ("running", "newest") if kernel[word]]
    notes.append("headers" if kernel["headers"] else "no headers")
    module = kernel["module_version"] or "no module"
    dkms = f", DKMS {kernel['dkms']}" if kernel["dkms"] else ""
    error = f": {kernel['dkms_error']}" if kernel["dkms_error"] else ""
    return f"kernel {kernel['release']} ({', '.join(notes)}): {module}{dkms}{error}"


def drivers_text(hosts: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Return the table of ``hosts`` (name to driver facts), then each one's kernels, reasons, problems."""
    lines = [format_table([list(COLUMNS)] + [host_row(host, state) for host, state in hosts.items()])]
    for host, state in hosts.items():
        if not state:
            continue
        if state["gpus"] or state["installed"]["version"]:
            lines += [f"{host}: {_kernel_line(kernel)}" for kernel in state["kernels"]]
        lines += [f"{host}: reboot: {reason['message']}" for reason in state["reboot_reasons"]]
        lines += [
            f"{host}: problem {problem['code']}: {problem['message']} {problem['remedy']}"
            for problem in state["problems"]
        ]
    return "\n".join(lines)


def drivers_json(hosts: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Return the same as JSON: ``{"schema_version": 1, "hosts": {name: driver facts or null}}``."""
    document = {"schema_version": SCHEMA_VERSION, "hosts": dict(hosts)}
    return json.dumps(document, indent=1, sort_keys=True, default=str) + "\n"
