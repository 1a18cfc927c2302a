"""Whether the GPUs of a plan are there, and their memory free: what an engine's unit asks before it starts."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Callable, Optional

from .errors import FleetfitError
from .gpu_facts import GpuFacts, gather
from .units import format_size

# The driver gives a killed process's memory back within seconds; a unit's TimeoutStartSec must be longer.
DEFAULT_WAIT_S = 60.0
POLL_S = 1.0
# What is wrong with a card that answers and computes. Hosts report it when they are checked; keeping the engine off
# for a card that is hot at this moment, or has logged an error since boot, would make an outage of a warning.
HARMLESS_PROBLEMS = frozenset(
    {
        "memory_not_supported",
        "xid",
        "row_remap_failed",
        "row_remap_pending",
        "ecc_uncorrected",
        "thermal_slowdown",
    }
)


def missing_devices(wanted: Sequence[str], facts: GpuFacts) -> list[str]:
    """Return one sentence per UUID in ``wanted`` (GPU-… or MIG-…) that cannot be used."""
    usable = {found.uuid for found in facts.accelerators if not found.mig_enabled}
    problems = {
        problem.device: problem for problem in facts.problems if problem.code not in HARMLESS_PROBLEMS
    }
    general = [problem for problem in facts.problems if problem.device is None]
    sentences = []
    for uuid in wanted:
        problem = problems.get(uuid)
        if uuid in usable and problem is None:
            continue
        why = [f"{known.message} {known.remedy}" for known in ([problem] if problem else general)]
        found = ", ".join(sorted(usable)) or "none"
        reason = " ".join(why) or f"This host has: {found}. Plan it again after a card was exchanged."
        sentences.append(f"The planned GPU {uuid} cannot be used. {reason}")
    return sentences


def occupied_devices(wanted: Mapping[str, int], facts: GpuFacts) -> list[str]:
    """Return one sentence per UUID of ``wanted`` (to bytes) that has less memory free than that.

    A device whose free memory nobody tells is passed over: there is nothing to wait for.
    """
    sentences = []
    for uuid, needed in wanted.items():
        live = facts.live_devices.get(uuid) or {}
        free: Optional[int] = live.get("free_bytes")
        if not needed or free is None or free >= needed:
            continue
        holders = [
            f"{process['name']} (pid {process['pid']}) holds {format_size(process['used_bytes'] or 0)}"
            for process in live.get("processes", [])
        ]
        sentences.append(
            f"The planned GPU {uuid} has {format_size(free)} free ({free} bytes), and the engine starts with"
            f" {format_size(needed)} ({needed} bytes)"
            + (f": {'; '.join(holders)}." if holders else ".")
            + " Stop what holds it, or plan the host again."
        )
    return sentences


def wait_for_devices(
    wanted: Mapping[str, int],
    *,
    wait_s: float,
    look: Callable[[], GpuFacts],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Wait until every device of ``wanted`` is there with so many bytes free; return what is wrong at last.

    A device that is missing is not waited for. ``wait_s`` bounds the wait for memory, in seconds.
    """
    end = clock() + wait_s
    while True:
        facts = look()
        sentences = missing_devices(list(wanted), facts)
        if sentences:
            return sentences
        sentences = occupied_devices(wanted, facts)
        if not sentences or clock() >= end:
            return sentences
        sleep(POLL_S)


def parse_device(text: str) -> tuple[str, int]:
    """Return (UUID, bytes) of ``UUID`` or ``UUID=BYTES``; raises FleetfitError."""
    uuid, _equals, size = text.partition("=")
    if not uuid or (size and not size.isdecimal()):
        raise FleetfitError(
            f"check-devices cannot read '{text}'.",
            code="bad_device",
            remedy="Write GPU-… or GPU-…=BYTES, the memory that must be free.",
        )
    return uuid, int(size or 0)


def main(argv: Sequence[str]) -> int:
    """Run ``check-devices [--wait-s S] UUID[=BYTES]…``.

    Exit code 0 if all are there with so much memory free, 1 with a sentence for each that is not.
    """
    parser = argparse.ArgumentParser(prog="fleetfit-host.pyz check-devices")
    parser.add_argument("--wait-s", type=float, default=DEFAULT_WAIT_S, help="wait so long for free memory")
    parser.add_argument("devices", nargs="*", metavar="UUID[=BYTES]")
    options = parser.parse_args(list(argv))
    if not options.devices:
        raise FleetfitError(
            "check-devices needs the UUIDs of GPUs.",
            code="no_devices",
            remedy="Name them: check-devices GPU-….",
        )
    wanted = dict(parse_device(text) for text in options.devices)
    sentences = wait_for_devices(wanted, wait_s=options.wait_s, look=gather)
    for sentence in sentences:
        sys.stderr.write(f"{sentence}\n")
    return 1 if sentences else 0
