"""The plan of many hosts as a table that people read in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..module_utils.downtime import downtime_text, expected_downtime
from ..module_utils.units import GIB

COLUMNS = ("host", "GPUs", "engine", "variant", "context", "memory", "tokens/s", "switch", "")
NO_PLAN = "no plan: see the failure above"


def _gpus(facts: Mapping[str, Any]) -> str:
    names: dict[str, int] = {}
    for accelerator in facts["stable"]["accelerators"]:
        names[accelerator["name"]] = names.get(accelerator["name"], 0) + 1
    return ", ".join(f"{count}x {name}" if count > 1 else name for name, count in names.items()) or "none"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f}"


def _memory(deployment: Mapping[str, Any]) -> str:
    """Return what the deployment takes of its GPUs' budgets, or of the RAM's where it has no GPU."""
    devices = deployment.get("devices") or []
    if not devices:
        terms = deployment.get("host") or deployment["memory_bytes"]
        return f"RAM {_gib(terms['total'])} of {_gib(terms['budget'])} GiB"
    total, budget = (sum(device[name] for device in devices) for name in ("total", "budget"))
    return f"{_gib(total)} of {_gib(budget)} GiB"


def host_row(
    host: str,
    facts: Mapping[str, Any] | None,
    plan: Mapping[str, Any] | None,
    downtime: Mapping[str, Any] | None,
) -> list[str]:
    """Return one host's cells; ``facts``, ``plan`` and ``downtime`` are None where the host gave none."""
    if not facts or not plan or not plan["deployments"]:
        return [host, _gpus(facts) if facts else "?", "", "", "", "", "", "", NO_PLAN]
    chosen = plan["deployments"][0]
    simulated = bool(chosen.get("cpu_mapping")) and bool(facts["stable"]["accelerators"])
    notes = ["kept" if plan.get("sticky") else "", "simulated GPU" if simulated else ""]
    return [
        host,
        _gpus(facts),
        chosen["engine"],
        chosen["variant"],
        f"{chosen['slots']}x {chosen['context_tokens']}",
        _memory(chosen),
        f"{chosen['expected_tokens_per_s']:.0f}" if chosen.get("expected_tokens_per_s") else "-",
        downtime_text(downtime) if downtime else "",
        ", ".join(note for note in notes if note),
    ]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return ``rows`` in columns, the first row as the head, without trailing blanks."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    rule = "  ".join("-" * width for width in widths if width)
    return "\n".join([lines[0], rule, *lines[1:]])


def _candidate_line(candidate: Mapping[str, Any], most_layers: int) -> str:
    rejected = candidate.get("rejected")
    verdict = f"no: {rejected['reason']}" if rejected else "fits"
    layers = candidate.get("gpu_layers") or 0
    if not rejected and candidate["engine"] == "llama_cpp" and layers < most_layers:
        verdict = f"fits, with {layers} of {most_layers} layers on GPU"
    return f"    {candidate['engine']} {candidate['variant']}: {verdict}"


def plan_text(
    hosts: Mapping[str, tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]],
    *,
    candidates: bool,
    last_starts: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> str:
    """Return the table of ``hosts`` (name to facts and plan), then why, and what is wrong with each host.

    ``last_starts`` is host → the fact fleetfit_last_start, from which the downtime of a switch follows.
    """
    starts = last_starts or {}
    downtimes = {
        host: expected_downtime(plan["deployments"][0], starts.get(host))
        for host, (_facts, plan) in hosts.items()
        if plan and plan["deployments"]
    }
    rows = [list(COLUMNS)] + [host_row(host, *pair, downtimes.get(host)) for host, pair in hosts.items()]
    lines = [format_table(rows)]
    # Hosts with the same words under the table share one line.
    sources: dict[str, list[str]] = {}
    for host, downtime in downtimes.items():
        if downtime["basis"] != "none":
            sources.setdefault(f"{downtime['basis']}: {downtime['source']}", []).append(host)
    for source, names in sources.items():
        lines.append(f"switch = time without answers if the release changes; {', '.join(names)}: {source}")
    for host, (facts, plan) in hosts.items():
        if plan and plan.get("reason"):
            lines.append(f"{host}: {plan['reason']}")
        if plan and plan.get("available"):
            available = plan["available"]
            what = (
                available.get("reason") or available.get("variant")
                if isinstance(available, Mapping)
                else available
            )
            lines.append(f"{host}: better is available: {what} (take it with -e fleetfit_replan=true)")
        if candidates and plan:
            # As many as any variant has there; a whole model counts its output layer too.
            most = max((candidate.get("gpu_layers") or 0 for candidate in plan["candidates"]), default=0)
            lines += [_candidate_line(candidate, most) for candidate in plan["candidates"]]
        for problem in (facts or {}).get("problems", []):
            text = f"{problem['message']} {problem.get('remedy') or ''}".rstrip()
            lines.append(f"{host}: problem {problem['code']}: {text}")
    return "\n".join(lines)
