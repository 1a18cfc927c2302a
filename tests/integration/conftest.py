"""A real systemd host in a container, shared by the tests of one run."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleetfit.lab.images import ensure_image
from fleetfit.lab.machine import container_options, init_command, look_at_machine, podman, refuse_reason

from .helper_host import HelperHost

# 5 s on a machine that has nothing else to do.
BOOT_S = 300


class SystemdHost(HelperHost):
    """A container that runs systemd; everything goes through ``podman exec``, so it needs no network."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.machine = look_at_machine()

    def podman(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run podman with the runtime that this machine needs."""
        return subprocess.run(
            podman(self.machine, *arguments),
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
            **options,
        )

    def run_raw(
        self, *command: str, stdin: str = "", timeout_s: float = 120, environ: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the host and return all of its result."""
        extra = [f"--env={name}={value}" for name, value in (environ or {}).items()]
        return subprocess.run(
            podman(self.machine, "exec", "-i", *extra, self.name, *command),
            check=False,
            capture_output=True,
            text=True,
            input=stdin,
            timeout=timeout_s,
        )

    def put(self, path: str, content: str | bytes, mode: str = "0644") -> None:
        """Write a file into the host."""
        data = content.encode() if isinstance(content, str) else content
        script = 'mkdir -p "$(dirname "$1")" && cat > "$1" && chmod "$2" "$1"'
        subprocess.run(
            podman(self.machine, "exec", "-i", self.name, "sh", "-c", script, "sh", path, mode),
            check=True,
            input=data,
            capture_output=True,
            timeout=120,
        )

    def wait_booted(self) -> None:
        """Wait until systemd has started everything that it starts at boot."""
        end = time.monotonic() + BOOT_S
        state = ""
        while state not in ("running", "degraded"):
            if time.monotonic() > end:
                raise AssertionError(f"the container did not boot in {BOOT_S} s: {state}")
            state = self.run_raw("systemctl", "is-system-running").stdout.strip()
            time.sleep(0.3)

    def lose_power(self) -> None:
        """Kill everything in the host at once, and boot it again."""
        self.podman("kill", "--signal=KILL", self.name)
        self.podman("wait", self.name)
        self.podman("start", self.name)
        self.wait_booted()


def start_host(folder: Path, image: str = "bookworm") -> SystemdHost:
    """Start a host and wait until systemd has booted it; ``image`` is a suite, or the reference of an image."""
    reason = refuse_reason(look_at_machine())
    if reason is not None:
        pytest.fail(f"This machine cannot run the lab: {reason}")
    reference = image if "/" in image else ensure_image(image)
    host = SystemdHost(f"fleetfit-test-{os.getpid()}-{uuid.uuid4().hex[:6]}", folder)
    options = [*container_options(host.machine), "--network=none", f"--name={host.name}"]
    host.podman("run", "--detach", *options, reference, *init_command())
    try:
        host.wait_booted()
        host.install_helper()
    except BaseException:
        host.podman("rm", "--force", "--time=0", host.name)
        raise
    return host


@pytest.fixture(scope="session")
def systemd_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemdHost]:
    """Yield a booted Debian 12 host that has the helper; it is removed at the end."""
    host = start_host(tmp_path_factory.mktemp("host"))
    try:
        yield host
    finally:
        subprocess.run(
            podman(host.machine, "rm", "--force", "--time=0", host.name), check=False, capture_output=True
        )
