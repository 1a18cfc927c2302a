"""The helper's subcommand ``ready``: ask a service now whether it serves."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, Callable, Optional

from .errors import FleetfitError
from .gate import last_start, parse_gate, wait_ready
from .manifest import HostPaths, check_service_name
from .proof import KINDS, proof_text, prove
from .release import current_digest, read_plan, read_release, read_settings
from .switch import read_good


def main(argv: Sequence[str], write: Optional[Callable[[str], Any]] = None) -> int:
    """Run ``ready``: ask a service now and print the gate result; exit code 0 ready, 1 not, 2 cannot ask."""
    parser = argparse.ArgumentParser(
        prog="fleetfit-host.pyz ready", description="Ask a service whether it serves."
    )
    parser.add_argument("--service", required=True, help="the unit's name without .service")
    parser.add_argument("--timeout-s", type=float, help="wait at most this long without progress")
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON")
    parser.add_argument(
        "--prove", action="store_true", help="fill the context of a slot again, beside what is being served"
    )
    options = parser.parse_args(list(argv))
    paths = HostPaths()
    digest = current_digest(paths, check_service_name(options.service))
    if digest is None:
        raise FleetfitError(
            f"{options.service} has no current release.",
            code="no_release",
            remedy="Run the service's role.",
        )
    gate = dict(read_release(paths, options.service, digest)["gate"])
    if options.timeout_s:
        gate.update(timeout_s=options.timeout_s, max_timeout_s=None)
    spec = parse_gate(
        options.service,
        gate,
        read_settings(paths, options.service, digest),
        read_plan(paths, options.service, digest),
    )
    result = {**wait_ready(spec), "release": digest}
    if result["ok"] and spec.kind in KINDS:
        if options.prove:
            result = prove(spec, result, since=last_start(options.service), restarts=None)
        else:
            result["proof"] = read_good(paths, options.service)["proofs"].get(digest)
            result["message"] += f"; {proof_text(result['proof'])}"
    text = json.dumps(result, sort_keys=True) if options.json else f"{result['state']}: {result['message']}"
    (write or sys.stdout.write)(text + "\n")
    return 0 if result["ok"] else 1
