"""The NVIDIA kernel module from Debian's archive, really built by DKMS against Debian's own kernel headers.

The host is a container: its module is built and never loaded. The kernel that it is built for is named to the role,
as the one that runs is this machine's.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from .conftest import BIN, REPO, SSH_CONFIG, Host, Played

pytestmark = pytest.mark.slow

# The build alone took 5 minutes of processor time (24 Nov 2026): on a busy machine, most of an hour.
PLAY_TIMEOUT_S = 3600


@dataclass
class Driver:
    """A host, and the kernel of Debian's that its driver is for."""

    host: Host
    folder: Path
    kernel: str

    def play(self, *kernels: str) -> Played:
        """Apply the role for these kernels, the newest last."""
        plays = [
            {
                "hosts": "all",
                "gather_facts": False,
                "vars": {
                    "nvidia_driver_source": "distribution",
                    "nvidia_driver_require_gpu": False,
                    "nvidia_driver_kernels": list(kernels),
                },
                "pre_tasks": [{"name": "Read the host's state", "fleetfit.llm.host_state": None}],
                "roles": ["fleetfit.llm.host_baseline", "fleetfit.llm.nvidia_driver"],
            }
        ]
        (self.folder / "play.yml").write_text(yaml.safe_dump(plays))
        argv = [str(BIN / "ansible-playbook"), str(self.folder / "play.yml"), "-i", f"{self.host.name},"]
        argv += [f"--ssh-common-args=-F {SSH_CONFIG}", "--user=root"]
        environ = {**os.environ, "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        done = subprocess.run(
            argv, cwd=REPO, env=environ, capture_output=True, text=True, check=False, timeout=PLAY_TIMEOUT_S
        )
        return Played(done.returncode, done.stdout + done.stderr)

    def dkms(self) -> list[str]:
        """Return what DKMS says of its modules, a line each."""
        return self.host.run("dkms status").splitlines()


@pytest.fixture(scope="module")
def driver(start_host: Callable[..., Host], tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """Return a Debian 12 host on which the role has installed Debian's driver, its module built."""
    host = start_host("e2e-driver-build")
    host.run("apt-get update -q", timeout_s=600)
    depends = host.run("apt-cache depends linux-headers-amd64")
    kernel = next(word for word in depends.split() if word.startswith("linux-headers-6"))
    built = Driver(host, tmp_path_factory.mktemp("driver"), kernel.removeprefix("linux-headers-"))
    played = built.play(built.kernel)
    assert played.returncode == 0, played.output[-3000:]
    return built


def test_dkms_has_built_and_installed_the_module(driver: Driver) -> None:
    lines = [line for line in driver.dkms() if line.startswith("nvidia")]
    assert [line.rsplit(": ", 1)[1] for line in lines] == ["installed"]
    assert driver.kernel in lines[0]
    version = driver.host.run("dpkg-query -W -f '${Version}' libcuda1").split("-")[0]
    paths = driver.host.run(f"find /lib/modules/{driver.kernel}/updates -name 'nvidia*.ko*'").splitlines()
    assert len(paths) >= 4  # nvidia, -modeset, -drm, -uvm
    for path in paths:
        about = dict(
            line.split(":", 1) for line in driver.host.run(f"modinfo {path}").splitlines() if ":" in line
        )
        assert about["vermagic"].split()[0] == driver.kernel
        if "version" in about:
            assert about["version"].strip() == version


def test_a_second_run_builds_nothing(driver: Driver) -> None:
    played = driver.play(driver.kernel)
    assert played.returncode == 0, played.output[-3000:]
    assert played.changed_tasks() == []
    assert played.recap()[driver.host.name]["changed"] == 0


def test_a_new_kernel_without_module_stops_the_play_with_the_reason(driver: Driver) -> None:
    """The headers of another kernel are there and damaged, as an interrupted upgrade or a full disk leaves them."""
    other = driver.kernel.replace("-amd64", "-cloud-amd64")
    # Installing them would build the module right away, before they are damaged.
    driver.host.run(
        "touch /etc/dkms/no-autoinstall && DEBIAN_FRONTEND=noninteractive apt-get install -q -y "
        f"--no-install-recommends linux-headers-{other}; rm /etc/dkms/no-autoinstall",
        timeout_s=900,
    )
    driver.host.run(f"rm /usr/src/linux-headers-{other}/include/generated/autoconf.h")
    played = driver.play(driver.kernel, other)
    assert played.returncode != 0
    assert played.recap()[driver.host.name]["failed"] == 1
    log = driver.host.run("cat /var/lib/dkms/nvidia-current/*/build/make.log")
    line = next(line for line in log.splitlines() if "ERROR" in line or "error:" in line)
    assert " ".join(line.split()) in played.text.replace("\\n", " "), played.output[-3000:]
    assert other in played.text
    # What worked before works on.
    assert any(driver.kernel in line and "installed" in line for line in driver.dkms())
    assert not any(other in line and "installed" in line for line in driver.dkms())
