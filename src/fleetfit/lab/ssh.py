"""Keys, known hosts and the ssh configuration of the lab: host keys are generated here and checked."""

from __future__ import annotations

import time
from pathlib import Path

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

from .paths import LabPaths, write_atomically
from .process import run
from .state import LabState


def ensure_key(path: Path, comment: str) -> Path:
    """Return ``path`` holding an ed25519 private key (0600), with its public half beside it."""
    if not (path.exists() and path.with_name(path.name + ".pub").exists()):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)],
            what="make an SSH key",
        )
    return path


def user_key(paths: LabPaths) -> Path:
    """Return the private key with which this machine signs in to lab hosts."""
    return ensure_key(paths.folder / "keys" / "id_ed25519", f"fleetfit-lab-{paths.lab_id}")


def host_key(paths: LabPaths, host: str) -> Path:
    """Return the private host key of a lab host, made here so that it is known before the first contact."""
    return ensure_key(paths.folder / "keys" / host / "ssh_host_ed25519_key", host)


def config_path(paths: LabPaths) -> Path:
    """Return the path of the lab's ssh configuration."""
    return paths.folder / "ssh_config"


def render_config(paths: LabPaths, state: LabState) -> str:
    """Return the ssh configuration for all recorded hosts; it is used alone (``ssh -F``)."""
    lines = ["# Written by fleetfit lab; use it with: ssh -F .lab/ssh_config HOST", ""]
    for name, record in sorted(state.hosts.items()):
        lines += [
            f"Host {name}",
            "  HostName 127.0.0.1",
            f"  Port {record.ssh_port}",
            f"  User {record.user}",
            f"  HostKeyAlias {name}",
        ]
    lines += [
        "Host *",
        f'  IdentityFile "{user_key(paths)}"',
        "  IdentitiesOnly yes",
        f'  UserKnownHostsFile "{paths.folder / "known_hosts"}"',
        "  GlobalKnownHostsFile none",
        "  StrictHostKeyChecking yes",
        "  HostKeyAlgorithms ssh-ed25519",
        "  PasswordAuthentication no",
        "  ConnectTimeout 10",
        "",
    ]
    return "\n".join(lines)


def write_config(paths: LabPaths, state: LabState) -> None:
    """Write ssh_config and known_hosts for all recorded hosts."""
    known = []
    for name in sorted(state.hosts):
        public = host_key(paths, name).with_name("ssh_host_ed25519_key.pub").read_text().split()
        known.append(f"{name} {public[0]} {public[1]}\n")
    write_atomically(paths.folder / "known_hosts", "".join(known))
    write_atomically(config_path(paths), render_config(paths, state))


def ssh_argv(paths: LabPaths, host: str, *command: str) -> list[str]:
    """Return the argument list that runs a command on a lab host."""
    return ["ssh", "-F", str(config_path(paths)), "-o", "BatchMode=yes", host, *command]


def wait_for_host(paths: LabPaths, host: str, timeout_s: float = 90, remedy: str | None = None) -> str:
    """Wait until the host answers over SSH and systemd has finished booting; return systemd's state.

    Raises FleetfitError ``lab_host_silent`` after ``timeout_s`` with what ssh said last.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        done = run(
            ssh_argv(paths, host, "systemctl", "is-system-running", "--wait"),
            what=f"reach {host}",
            check=False,
            timeout_s=timeout_s,
        )
        answer = done.stdout.decode().strip()
        if answer in ("running", "degraded"):
            return answer
        if time.monotonic() > deadline:
            said = (done.stderr.decode() or answer).strip().splitlines()[-1:]
            raise FleetfitError(
                f"The lab host {host} did not answer over SSH within {timeout_s:.0f} s: {' '.join(said)}",
                code="lab_host_silent",
                remedy=remedy
                or f"Look with `podman logs {paths.container(host)}`, or start over: "
                "fleetfit lab down && fleetfit lab up.",
            )
        time.sleep(0.5)
