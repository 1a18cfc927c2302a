"""`fleetfit verify`: ask the deployed services of all hosts whether they really answer."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ansible_runner
import click
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.units import format_size
from ansible_collections.fleetfit.llm.plugins.module_utils.verify import sentence
from rich.console import Console
from rich.markup import escape
from rich.table import Table

SCHEMA_VERSION = 1
EXIT_OK, EXIT_FAILED, EXIT_NOT_CHECKED = 0, 1, 2
# Tasks whose results carry a host's report.
VERIFY_ACTION = "fleetfit.llm.verify_host"
# The colours of a terminal, which ansible-runner asks ansible-playbook for.
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Outcome:
    """What is known of each host after a run; ``problem`` says why the run itself did not work."""

    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    problem: str | None = None

    def add_event(self, event: Mapping[str, Any]) -> None:
        """Take in one event of ansible-runner."""
        kind, data = event.get("event"), event.get("event_data") or {}
        host = data.get("host")
        if not isinstance(host, str):
            return
        result = data.get("res") or {}
        report = result.get("report")
        if kind == "runner_on_unreachable":
            self.reports[host] = _not_checked("unreachable", result)
        elif data.get("resolved_action", data.get("task_action")) == VERIFY_ACTION and isinstance(
            report, dict
        ):
            self.reports[host] = report
        elif kind == "runner_on_failed" and not data.get("ignore_errors"):
            self.reports[host] = _not_checked("error", result)

    @property
    def exit_code(self) -> int:
        """Return 1 if a host failed, else 2 if one could not be checked (or there was none), else 0."""
        states = [report["state"] for report in self.reports.values()]
        if "failed" in states:
            return EXIT_FAILED
        if self.problem is not None or not states or any(state != "ok" for state in states):
            return EXIT_NOT_CHECKED
        return EXIT_OK

    def document(self) -> dict[str, Any]:
        """Return the result for programs."""
        return {
            "schema_version": SCHEMA_VERSION,
            "ok": self.exit_code == EXIT_OK,
            "exit_code": self.exit_code,
            "problem": self.problem,
            "hosts": dict(sorted(self.reports.items())),
        }


def _not_checked(state: str, result: Mapping[str, Any]) -> dict[str, Any]:
    message = " ".join(str(result.get("msg") or "no message").split())
    return {"schema_version": SCHEMA_VERSION, "state": state, "message": message, "checks": []}


def checkout_root() -> Path:
    """Return the checkout that this package is installed from (editable)."""
    return Path(__file__).resolve().parents[2]


def run_verify(
    inventory: Path | None, limit: str | None, extra_vars: Mapping[str, Any], *, verbose: bool = False
) -> Outcome:
    """Run playbooks/verify_fleet.yml and return what it found.

    ``inventory`` None is the one that ansible.cfg names. Raises FleetfitError where it does not exist.
    """
    if inventory is not None and not inventory.exists():
        raise FleetfitError(
            f"The inventory {inventory} does not exist.",
            code="inventory_not_found",
            remedy="Name a file or folder, such as inventory/lab.",
        )
    root = checkout_root()
    outcome = Outcome()
    # Events and output lie in a folder of this run alone, which is gone afterwards.
    with tempfile.TemporaryDirectory(prefix="fleetfit-verify-") as private:
        run = ansible_runner.run(
            private_data_dir=private,
            project_dir=str(root),
            playbook=str(root / "playbooks/verify_fleet.yml"),
            inventory=str(inventory.resolve()) if inventory is not None else None,
            limit=limit,
            extravars=dict(extra_vars),
            envvars={
                "ANSIBLE_CONFIG": str(root / "ansible.cfg"),
                "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            },
            event_handler=outcome.add_event,
            quiet=not verbose,
        )
        status, output = run.rc, run.stdout.read()
    # 2 and 4 are ansible's own codes for failed and unreachable hosts: those are in the reports.
    if status not in (0, 2, 4) or (status != 0 and not outcome.reports):
        outcome.problem = reason_of(output) or f"ansible-playbook ended with {status}"
    elif not outcome.reports:
        outcome.problem = "The inventory has no host in the group llm_hosts that fits."
    return outcome


def reason_of(output: str) -> str:
    """Return, in one line, why ansible-playbook ended before it asked a host: its errors, then its warnings."""
    lines = [line.strip() for line in _ESCAPES.sub("", output).splitlines() if line.strip()]
    errors = [line.removeprefix("[ERROR]: ") for line in lines if line.startswith("[ERROR]: ")]
    warnings = [line.removeprefix("[WARNING]: ") for line in lines if line.startswith("[WARNING]: ")]
    places = [line for line in lines if re.match(r"Origin: /\S+:\d+", line)]
    return " ".join(dict.fromkeys([*errors, *warnings[:2], *places[:1]])) or " ".join(lines[-6:])


def memory_text(report: Mapping[str, Any]) -> str:
    """Return predicted and measured bytes of a report, a line for each device, and the prompt that proved it."""
    lines = [
        f"{row['device']}: {format_size(row['predicted_bytes'])} / {format_size(row['measured_bytes'])}"
        for row in report.get("memory") or []
    ]
    proof = report.get("proof")
    if proof:
        slots = f"{proof['slots']} x " if proof["slots"] > 1 else ""
        short = ", shortened" if proof["shortened"] else ""
        lines.append(f"proven: {slots}{proof['prompt_tokens']:,} of {proof['of_tokens']:,} tokens{short}")
    return "\n".join(lines)


def page_text(report: Mapping[str, Any]) -> str:
    """Return how the chat page answered: yes, no, or a dash where there is none."""
    page = (report.get("services") or {}).get("open-webui")
    if page is None:
        return "-"
    return "answers" if page.get("state") == "ready" else str(page.get("state") or "no")


def speed_text(report: Mapping[str, Any]) -> str:
    """Return measured and expected tokens per second; a simulated card's expectation is named as such."""
    measured, expected = report.get("tokens_per_s"), report.get("expected_tokens_per_s")
    text = f"{measured:.0f}" if measured else "-"
    if expected:
        text += f" (planned card: {expected:.0f})" if report.get("simulated_gpus") else f" of {expected:.0f}"
    if report.get("speed_is_impossible"):
        text += f" (impossible: at most {report['roofline_tokens_per_s']:.0f})"
    return text


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Print a table of all hosts, then what went wrong and what to do."""
    table = Table(box=None, pad_edge=False)
    for column in ("host", "verdict", "model", "answer", "tokens/s", "chat page", "memory: plan / log"):
        table.add_column(column, overflow="fold")
    for host, report in sorted(outcome.reports.items()):
        model = f"{report['model']} {report['variant']}" if report.get("variant") else "-"
        answer = " ".join(str(report.get("answer") or "-").split())[:48]
        verdict = "[green]ok[/green]" if report["state"] == "ok" else f"[red]{report['state']}[/red]"
        table.add_row(
            *(escape(host), verdict, escape(model), escape(answer)),
            *(speed_text(report), page_text(report), memory_text(report)),
        )
    if outcome.reports:
        console.print(table)
    for host, report in sorted(outcome.reports.items()):
        if report["state"] in ("failed", "not_deployed"):
            console.print(f"\n{sentence(host, report)}", markup=False, soft_wrap=True)
        elif report["state"] != "ok":
            console.print(f"\n{host}: {report['state']}: {report['message']}", markup=False, soft_wrap=True)
    if any(report.get("simulated_gpus") for report in outcome.reports.values()):
        console.print("\nGPUs are simulated: these engines ran on the CPU, with the settings mapped for it.")
    if outcome.problem:
        console.print(f"{chr(10) if outcome.reports else ''}{outcome.problem}", markup=False, soft_wrap=True)


@click.command()
@click.option(
    "-i", "--inventory", type=click.Path(path_type=Path), help="Default: what ansible.cfg names (the lab)."
)
@click.option("-l", "--limit", help="Hosts or groups, as ansible-playbook takes them.")
@click.option("--prompt", help="The question to ask in place of the default one.")
@click.option("--expected", help="A regular expression that the answer must contain.")
@click.option(
    "--report-dir", type=click.Path(path_type=Path, file_okay=False), help="Write <host>.json there."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Show ansible-playbook's output too.")
def verify(
    inventory: Path | None,
    limit: str | None,
    prompt: str | None,
    expected: str | None,
    report_dir: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Ask every host's engine, and Open WebUI where it is installed, a question with a known answer.

    Exit code 0: all hosts answered; 1: a host failed; 2: a host could not be checked.
    """
    try:
        re.compile(expected or "")
    except re.error as error:
        raise FleetfitError(
            f"--expected {expected!r} is not a regular expression: {error}.",
            code="bad_option",
            remedy="Correct --expected; a backslash before a special character takes it literally.",
        ) from None
    extra: dict[str, Any] = {}
    if prompt is not None:
        extra["verify_prompt"] = prompt
        extra["verify_expected"] = expected or ""
    elif expected is not None:
        extra["verify_expected"] = expected
    if report_dir is not None:
        extra["verify_report_dir"] = str(report_dir.resolve())
    outcome = run_verify(inventory, limit, extra, verbose=verbose)
    if as_json:
        click.echo(json.dumps(outcome.document(), indent=2))
    else:
        # Into a file or a pipe, wide enough for whole lines.
        print_outcome(outcome, Console(width=None if sys.stdout.isatty() else 160))
    sys.exit(outcome.exit_code)
