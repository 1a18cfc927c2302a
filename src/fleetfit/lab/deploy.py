"""The main job on the lab, and what it came to: the plan, each host's answer, and where to chat."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ansible_runner
import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from rich.console import Console
from rich.markup import escape

from fleetfit.verify import Outcome, print_outcome

from .console import console, step
from .forward import Forward
from .paths import LabPaths, checkout_root, write_atomically

PLAN_ACTION = "fleetfit.llm.plan_table"
INVENTORY = "inventory/lab"


@dataclass
class MainJob:
    """What the events of a run of site.yml told."""

    outcome: Outcome = field(default_factory=Outcome)
    plan_table: str = ""
    changed: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # host -> the task and what it said

    def add_event(self, event: Mapping[str, Any]) -> bool:
        """Take in one event of ansible-runner; True keeps it."""
        self.outcome.add_event(event)
        data = event.get("event_data") or {}
        result = data.get("res") or {}
        kind = event.get("event")
        if kind == "runner_on_ok" and data.get("resolved_action") == PLAN_ACTION:
            self.plan_table = str(result.get("table") or self.plan_table)
        elif kind in ("runner_on_failed", "runner_on_unreachable") and not data.get("ignore_errors"):
            said = " ".join(str(result.get("msg") or "").split())
            self.failed[str(data.get("host"))] = f"{data.get('task')}: {said}"
        elif kind == "playbook_on_stats":
            self.changed = dict.fromkeys(data.get("processed") or {}, 0)
            self.changed |= data.get("changed") or {}
        return True


def run_main_job() -> tuple[MainJob, int]:
    """Run site.yml on the lab with its output on the screen; return what it told and its exit code."""
    root = checkout_root()
    job = MainJob()
    with tempfile.TemporaryDirectory(prefix="fleetfit-lab-") as private:
        run = ansible_runner.run(
            private_data_dir=private,
            project_dir=str(root),
            playbook=str(root / "site.yml"),
            inventory=str(root / INVENTORY),
            envvars={
                "ANSIBLE_CONFIG": str(root / "ansible.cfg"),
                "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
                # ansible-runner gives Ansible a terminal of its own: Ansible cannot see where its output goes.
                **({} if sys.stdout.isatty() else {"ANSIBLE_NOCOLOR": "1"}),
            },
            event_handler=job.add_event,
        )
    if run.status == "canceled":  # ansible-runner takes SIGINT and stops Ansible itself
        raise KeyboardInterrupt
    return job, int(run.rc)


def admin_email() -> str:
    """Return the name under which Open WebUI's administrator signs in: the lab keeps the role's default."""
    defaults = yaml.safe_load((checkout_root() / "roles/open_webui/defaults/main.yml").read_text())
    return str(defaults["open_webui_admin_email"])


def password_file(paths: LabPaths, host: str) -> Path:
    """Return the file with the administrator's password of a host's Open WebUI."""
    return paths.folder / "secrets" / host / "open-webui.admin-password"


def print_ending(paths: LabPaths, job: MainJob, forwards: Sequence[Forward], out: Console) -> None:
    """Print the plan, the answer each host gave, and how to open the chat page."""
    if job.plan_table:
        out.print("\n[bold]The plan[/bold]: chosen from each host's memory")
        out.print(job.plan_table, markup=False, soft_wrap=True)
    if job.outcome.reports:
        out.print("\n[bold]The answers[/bold]: each host was asked for the capital of France")
        print_outcome(job.outcome, out)
    pages = [
        forward
        for forward in forwards
        if (job.outcome.reports.get(forward.host, {}).get("services") or {}).get("open-webui")
    ]
    if pages:
        out.print("\n[bold]Chat in your browser[/bold]")
        for forward in pages:
            out.print(f"  {forward.url}   Open WebUI on {forward.host}", soft_wrap=True)
            shown = os.path.relpath(password_file(paths, forward.host))
            out.print(f"    sign in as {escape(admin_email())}, password in {escape(shown)}", soft_wrap=True)
    changes = sum(job.changed.values())
    if job.changed:
        out.print(f"\n{changes or 'No'} change{'' if changes == 1 else 's'} on {len(job.changed)} hosts.")


def write_report(paths: LabPaths, job: MainJob, forwards: Sequence[Forward], seconds: float) -> None:
    """Write .lab/report.json, the ending for programs."""
    document = job.outcome.document()
    document["changed"] = job.changed
    document["failed"] = job.failed
    document["seconds"] = round(seconds, 1)
    document["open_webui"] = {forward.host: forward.url for forward in forwards}
    write_atomically(paths.folder / "report.json", json.dumps(document, indent=1) + "\n")


def deploy(paths: LabPaths, forwards: Sequence[Forward]) -> None:
    """Run the main job on the lab and print what it came to.

    Raises FleetfitError ``deploy_failed`` with the tasks that failed.
    """
    step(f"The main job: ansible-playbook site.yml -i {INVENTORY}")
    started = time.monotonic()
    job, status = run_main_job()
    seconds = time.monotonic() - started
    write_report(paths, job, forwards, seconds)
    print_ending(paths, job, forwards, console)
    console.print(f"The main job took {seconds / 60:.1f} minutes.")
    if status != 0:
        what = "\n".join(f"  {host}: {said}" for host, said in sorted(job.failed.items()))
        raise FleetfitError(
            f"The main job ended with exit code {status}.\n{what}",
            code="deploy_failed",
            remedy="\nMend what it names and run make lab again: it goes on where it stopped.",
        )
