"""Whether the GPUs of a plan are there: what an engine's unit asks before it starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .errors import FleetfitError
from .gpu_facts import GpuFacts, gather


def missing_devices(wanted: Sequence[str], facts: GpuFacts) -> list[str]:
    """Return one sentence per UUID in ``wanted`` (GPU-… or MIG-…) that cannot be used."""
    usable = {found.uuid for found in facts.accelerators if not found.mig_enabled}
    problems = {problem.device: problem for problem in facts.problems}
    general = [problem for problem in facts.problems if problem.device is None]
    sentences = []
    for uuid in wanted:
        problem = problems.get(uuid)
        if uuid in usable and (problem is None or problem.code == "memory_not_supported"):
            continue
        why = [f"{known.message} {known.remedy}" for known in ([problem] if problem else general)]
        found = ", ".join(sorted(usable)) or "none"
        reason = " ".join(why) or f"This host has: {found}. Plan it again after a card was exchanged."
        sentences.append(f"The planned GPU {uuid} cannot be used. {reason}")
    return sentences


def main(argv: Sequence[str]) -> int:
    """Run ``check-devices UUID…``; exit code 0 if all are there, 1 with a sentence for each that is not."""
    if not argv:
        raise FleetfitError(
            "check-devices needs the UUIDs of GPUs.",
            code="no_devices",
            remedy="Name them: check-devices GPU-….",
        )
    sentences = missing_devices(argv, gather())
    for sentence in sentences:
        sys.stderr.write(f"{sentence}\n")
    return 1 if sentences else 0
