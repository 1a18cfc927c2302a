"""Facts about a host other than its cards: system, CPU, RAM and its limit, disks, clock.

The shapes are those of docs/contracts.md §1.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
from typing import Any, Optional

from .gpu_facts import GpuFacts, Problem, meminfo_bytes
from .probe_root import ProbeRoot

SCHEMA_VERSION = 1
# More than a minute off, and TLS certificates and signed download links begin to fail.
MAX_CLOCK_OFFSET_S = 60.0

# Instruction sets that the engines have separate code for (ggml's CPU backend, vLLM's CPU build).
_X86_ISA = frozenset(
    (
        *("avx", "avx2", "avx512_bf16", "avx512_vnni", "avx512bw", "avx512f", "avx_vnni"),
        *("amx_bf16", "amx_int8", "bmi2", "f16c", "fma", "sse4_2"),
    )
)
_ARM_ISA = frozenset(("asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2"))
_DISKS = ("/opt/fleetfit", "/var/lib/fleetfit")
_HELD = ("/var/lib/fleetfit",)
# A models folder has hundreds of files; more than this is a cache of somebody's and not worth the time.
_HELD_LIMIT_FILES = 50_000
# Where a limit may stand that our services run under: the host's or container's own, then the system slice's.
_CGROUP_V2_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/system.slice/memory.max")
_CGROUP_V1_LIMITS = (
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    "/sys/fs/cgroup/memory/system.slice/memory.limit_in_bytes",
)
# Virtualized CPUs can have names of any length; facts stay small.
_NAME_LIMIT = 48


def host_facts(
    root: str, gpu: GpuFacts, *, reference_time_s: Optional[float] = None, now_s: Optional[float] = None
) -> dict[str, Any]:
    """Return the whole facts document of a host: its own facts joined with those of its cards.

    ``reference_time_s`` is the controller's clock (seconds since the epoch) when it sent the question;
    without it ``clock_offset_s`` is null. ``now_s`` replaces the host's clock in tests.
    """
    probe = ProbeRoot(root)
    ram_total = meminfo_bytes(probe, "MemTotal")
    offset = clock_offset_s(reference_time_s, time.time() if now_s is None else now_s)
    part = gpu.to_dict()
    return {
        "schema_version": SCHEMA_VERSION,
        "stable": {
            "machine_id": probe.read("/etc/machine-id") or None,
            "arch": platform.machine(),
            "os": os_facts(probe),
            "cpu": cpu_facts(probe),
            "ram_total_bytes": ram_total,
            "cgroup_limit_bytes": cgroup_limit_bytes(probe, ram_total),
            "driver": part["driver"],
            "accelerators": part["accelerators"],
            "links": part["links"],
        },
        "foreign_bytes": part["foreign_bytes"],
        "live": {
            "devices": part["live"]["devices"],
            "memory_available_bytes": meminfo_bytes(probe, "MemAvailable"),
            "disk_free_bytes": {path: disk_free_bytes(probe, path) for path in _DISKS},
            "disk_held_bytes": {path: held_bytes(probe, path) for path in _HELD},
            "clock_offset_s": offset,
        },
        "problems": part["problems"] + clock_problems(offset),
    }


def facts_digest(facts: dict[str, Any]) -> str:
    """Return the sha256 of the canonical JSON of ``stable``: what moves by the minute is not in it."""
    canonical = json.dumps(facts["stable"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def os_facts(probe: ProbeRoot) -> dict[str, Optional[str]]:
    """Return distribution, version and codename from os-release, glibc's version and this Python's."""
    release: dict[str, str] = {}
    text = probe.read("/etc/os-release") or probe.read("/usr/lib/os-release") or ""
    for line in text.splitlines():
        key, separator, value = line.partition("=")
        if separator:
            release[key.strip()] = value.strip().strip("\"'")
    return {
        "distribution": release.get("ID"),
        "version": release.get("VERSION_ID"),
        "codename": release.get("VERSION_CODENAME"),
        "glibc": glibc_version(),
        "python": platform.python_version(),
    }


def glibc_version() -> Optional[str]:
    """Return the C library's version that this process runs on; None where it is not glibc."""
    try:
        name, _space, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (OSError, ValueError):
        return None
    return version if name == "glibc" and version else None


def cpu_facts(probe: ProbeRoot) -> dict[str, Any]:
    """Return the CPU's name, its threads and the instruction sets that engines care about, sorted."""
    text = probe.read("/proc/cpuinfo") or ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            fields.setdefault(key.strip(), value.strip())
    flags = (
        set(fields.get("flags", "").split()) & _X86_ISA | set(fields.get("Features", "").split()) & _ARM_ISA
    )
    model = fields.get("model name") or fields.get("Model") or fields.get("Hardware")
    return {
        "model": re.sub(r"\s+", " ", model)[:_NAME_LIMIT] if model else None,
        "threads": len(re.findall(r"^processor\s*:", text, re.MULTILINE)) or os.cpu_count() or 1,
        "isa": sorted(flags),
    }


def cgroup_limit_bytes(probe: ProbeRoot, ram_total_bytes: Optional[int]) -> Optional[int]:
    """Return the smallest memory limit above our services (cgroup v2 or v1); None where RAM is the limit."""
    limits = []
    for path in _CGROUP_V2_LIMITS + _CGROUP_V1_LIMITS:
        text = probe.read(path) or ""
        # "max" (v2) or a number beyond any RAM (v1: 2^63 less a page) says: no limit.
        if text.isdecimal() and (ram_total_bytes is None or int(text) < ram_total_bytes):
            limits.append(int(text))
    return min(limits) if limits else None


def disk_free_bytes(probe: ProbeRoot, path: str) -> Optional[int]:
    """Return the bytes free on the disk that holds ``path`` or will; None where that cannot be told."""
    at = probe.path(path)
    while not os.path.exists(at):
        parent = os.path.dirname(at)
        if parent == at:
            return None
        at = parent
    try:
        status = os.statvfs(at)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def held_bytes(probe: ProbeRoot, path: str) -> int:
    """Return the bytes on disk of the files below ``path``: links not followed, sparse files as stored."""
    total, left, folders = 0, _HELD_LIMIT_FILES, [probe.path(path)]
    while folders and left:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    left -= 1
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        # st_blocks counts 512 bytes whatever the file system's block is (stat(2)).
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if not left:
                        break
        except OSError:
            continue  # a folder that went away while we looked
    return total


def clock_offset_s(reference_time_s: Optional[float], now_s: float) -> Optional[float]:
    """Return how far this clock is ahead of the reference in seconds, the question's way included."""
    return None if reference_time_s is None else round(now_s - reference_time_s, 1)


def settle_clock(facts: dict[str, Any], elapsed_s: float) -> None:
    """Take the question's way out of ``clock_offset_s``, in place; the controller does it with the answer.

    The host looked at its clock at some moment of the ``elapsed_s`` seconds between question and answer: an
    offset within them is none, so that a slow link or a waiting sudo never looks like a wrong clock.
    """
    offset = facts["live"]["clock_offset_s"]
    if offset is None:
        return
    offset = round(offset - min(max(offset, 0.0), elapsed_s), 1)
    facts["live"]["clock_offset_s"] = offset
    others = [problem for problem in facts["problems"] if problem["code"] != "clock_offset"]
    facts["problems"] = others + clock_problems(offset)


def clock_problems(offset_s: Optional[float]) -> list[dict[str, Any]]:
    """Return the problem of a clock that is more than a minute off, as the facts hold it."""
    if offset_s is None or abs(offset_s) <= MAX_CLOCK_OFFSET_S:
        return []
    direction = "ahead of" if offset_s > 0 else "behind"
    problem = Problem(
        "clock_offset",
        f"The host's clock is {abs(offset_s):.0f} s {direction} the controller's (at most "
        f"{MAX_CLOCK_OFFSET_S:.0f} s are allowed: certificates and signed links depend on it).",
        "Turn on time synchronisation (`timedatectl set-ntp true`, with systemd-timesyncd or chrony).",
    )
    return [
        {"code": problem.code, "message": problem.message, "remedy": problem.remedy, "device": problem.device}
    ]
