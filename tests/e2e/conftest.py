"""Hosts of the lab for end-to-end tests, and the plays that users run, as users run them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..processes import kill_all

REPO = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SSH_CONFIG = REPO / ".lab/ssh_config"
# Everything that a host writes by itself while it runs.
VOLATILE = (
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/tmp",
    "/var/tmp",
    "/var/log",
    "/root/.ansible",
    "/var/lib/systemd",
)


@dataclass(frozen=True)
class Host:
    """A lab host, reached over SSH with the lab's own configuration, as root."""

    name: str

    def raw(self, command: str, *, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a shell command and return all of its result."""
        argv = ["ssh", "-F", str(SSH_CONFIG), self.name, command]
        return subprocess.run(argv, check=False, capture_output=True, text=True, timeout=timeout_s)

    def run(self, command: str, *, timeout_s: float = 120) -> str:
        """Run a shell command that must succeed; return its standard output without surrounding blanks."""
        done = self.raw(command, timeout_s=timeout_s)
        assert done.returncode == 0, f"{self.name}: {command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def files(self) -> dict[str, str]:
        """Return every lasting file below / with its type, mode, owner, size, time and link target."""
        pruned = " -o ".join(f"-path {path}" for path in VOLATILE)
        shown = "%p\\t%y %m %u %g %s %T@ %l\\n"
        listing = self.run(f"find / -xdev \\( {pruned} \\) -prune -o -printf '{shown}'")
        rows = dict(line.split("\t", 1) for line in listing.splitlines())
        # Signing in touches root's own directory.
        rows.pop("/root", None)
        return rows

    def manifest(self) -> dict[str, Any]:
        """Return the manifest's sections."""
        return dict(json.loads(self.run("cat /etc/fleetfit/manifest.json"))["sections"])

    def ready(self, service: str = "llama-server") -> dict[str, Any]:
        """Ask a service a question through the host helper, and return the gate result."""
        helper = "python3 -I /opt/fleetfit/libexec/current/fleetfit-host.pyz"
        done = self.raw(f"{helper} ready --service {service} --json", timeout_s=400)
        return dict(json.loads(done.stdout or "{}"))


@dataclass
class Played:
    """What an ansible-playbook run gave."""

    returncode: int
    output: str

    def recap(self) -> dict[str, dict[str, int]]:
        """Return host → counter → number from the recap."""
        found = {}
        for line in self.output.split("PLAY RECAP")[-1].splitlines():
            match = re.match(r"(\S+)\s*:\s+(ok=.*)", line)
            if match:
                found[match[1]] = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", match[2])}
        return found

    def changed_tasks(self) -> list[str]:
        """Return the names of the tasks that changed something."""
        tasks = self.output.split("\nTASK [")[1:]
        return [task.partition("] *")[0] for task in tasks if re.search(r"^changed: ", task, re.MULTILINE)]

    @property
    def text(self) -> str:
        """Return the output in one line, as messages are wrapped."""
        return " ".join(self.output.split())


@dataclass
class Fleet:
    """An inventory with lab hosts of our own beside inventory/lab, whose variables they share."""

    folder: Path
    hosts: list[str] = field(default_factory=list)

    def argv(self, playbook: str, variables: Mapping[str, Any], *options: str) -> list[str]:
        """Return the command line of a play on our own hosts."""
        own: dict[str, Any] = {
            # inventory/lab names these relative to itself.
            "ansible_ssh_common_args": f"-F {shlex.quote(str(SSH_CONFIG))}",
            "fleetfit_catalog_dirs": [str(REPO / ".lab/catalog")],
            "__lab_artifacts": yaml.safe_load((REPO / ".lab/artifacts.yml").read_text()),
            "__lab_forwards": {},
            "fleetfit_secrets_dir": str(self.folder / "secrets"),
            "fleetfit_open_webui": False,
        }
        inventory = {"all": {"children": {"llm_hosts": {"hosts": {n: dict(own) for n in self.hosts}}}}}
        (self.folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
        (self.folder / "variables.yml").write_text(yaml.safe_dump(dict(variables)))
        argv = [str(BIN / "ansible-playbook"), str(REPO / playbook), "-i", str(REPO / "inventory/lab")]
        argv += ["-i", str(self.folder / "hosts.yml"), "--limit", ",".join(self.hosts)]
        # In a file: what stands on a command line is no secret.
        return [*argv, "-e", f"@{self.folder / 'variables.yml'}", *options]

    def environ(self) -> dict[str, str]:
        """Return the environment of a play: the checkout's own configuration and nothing coloured."""
        return {**os.environ, "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}

    def play(
        self, playbook: str = "site.yml", *options: str, timeout_s: float = 900, **variables: Any
    ) -> Played:
        """Run a play to its end."""
        done = subprocess.run(
            self.argv(playbook, variables, *options),
            cwd=REPO,
            env=self.environ(),
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        return Played(done.returncode, done.stdout)

    def play_and_kill(self, at_task: int, playbook: str = "site.yml", **variables: Any) -> str:
        """Run a play and kill it with SIGKILL when its ``at_task``-th task begins; return its name."""
        process = subprocess.Popen(
            self.argv(playbook, variables),
            cwd=REPO,
            env=self.environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        seen, name = 0, ""
        for line in process.stdout:
            if line.startswith("TASK ["):
                seen, name = seen + 1, line.strip(" *\n")
                if seen == at_task:
                    break
        kill_all(process)
        process.stdout.close()
        return name


def lab_host(name: str, suite: str, profile: str | None = None, layer: str | None = None) -> Host:
    """Start a fresh lab host; ``layer`` names a service whose Python environment it has already."""
    stop_host(name)
    argv = [str(BIN / "fleetfit"), "lab", "host", "up", name, "--suite", suite]
    argv += ["--profile", profile] if profile else []
    argv += ["--layer", layer] if layer else []
    # A layer that this machine does not have yet is made from the wheelhouse.
    subprocess.run(argv, check=True, cwd=REPO, timeout=1800 if layer else 600)
    return Host(name)


def stop_host(name: str) -> None:
    """Remove a lab host of these tests."""
    subprocess.run([str(BIN / "fleetfit"), "lab", "host", "down", name], check=True, cwd=REPO, timeout=600)


@pytest.fixture(scope="module")
def start_host() -> Iterator[Callable[..., Host]]:
    """Return a function that starts a fresh lab host (name, suite, profile, layer); all are removed at the end."""
    started: list[str] = []

    def start(
        name: str, suite: str = "bookworm", profile: str | None = None, layer: str | None = None
    ) -> Host:
        started.append(name)
        return lab_host(name, suite, profile, layer)

    yield start
    for name in started:
        stop_host(name)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """Return an empty fleet."""
    return Fleet(tmp_path_factory.mktemp("fleet"))
