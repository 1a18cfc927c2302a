"""The driver's role on a machine that really boots: nouveau, initramfs and the reboot itself.

There is no card: no display device of QEMU has NVIDIA's vendor id. A unit asks for what udev would load for one, by
its name, and the driver's own module, built for this kernel, finds nothing to drive.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
import yaml

from fleetfit.lab.paths import LabPaths
from fleetfit.lab.ssh import config_path
from fleetfit.lab.vm import VirtualMachine

from .conftest import BIN, REPO, Played

pytestmark = pytest.mark.slow

STOPPED = "/var/lib/llama-server-stopped"
PLAY_TIMEOUT_S = 3600  # every task starts a Python under emulation


def play(machine: VirtualMachine, reboot: str) -> Played:
    """Apply the role with a reboot policy."""
    variables = {
        "nvidia_driver_source": "distribution",
        "nvidia_driver_require_gpu": False,
        "nvidia_driver_reboot": reboot,
    }
    plays = [
        {"hosts": "all", "gather_facts": False, "vars": variables, "roles": ["fleetfit.llm.nvidia_driver"]}
    ]
    path = machine.folder / "play.yml"
    path.write_text(yaml.safe_dump(plays))
    argv = [str(BIN / "ansible-playbook"), str(path), "-i", f"{machine.name},", "--user=root"]
    argv += [f"--ssh-common-args=-F {config_path(machine.paths)}"]
    environ = {**os.environ, "ANSIBLE_CONFIG": str(REPO / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(
        argv, cwd=REPO, env=environ, capture_output=True, text=True, check=False, timeout=PLAY_TIMEOUT_S
    )
    return Played(done.returncode, done.stdout + done.stderr)


def loaded(machine: VirtualMachine) -> set[str]:
    """Return the names of the kernel modules that are loaded."""
    return {line.split()[0] for line in machine.run("lsmod").splitlines()[1:]}


def initramfs(machine: VirtualMachine) -> list[str]:
    """Return the files in the initramfs of the next boot."""
    # zstd reads no symbolic link.
    return machine.run("sh", "-c", "lsinitramfs $(readlink -f /initrd.img)").split()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualMachine]:
    """Yield a machine with the driver's packages, nouveau loaded and an engine running."""
    paths = LabPaths(tmp_path_factory.mktemp("vm"))
    with VirtualMachine("driver", paths, recipe="bookworm-nvidia", memory_mib=2048) as guest:
        # Tells what systemd was about when the engine was stopped.
        told = f"[Service]\nExecStop=/bin/sh -c 'systemctl is-system-running > {STOPPED}'\n"
        guest.put("/etc/systemd/system/llama-server.service.d/told.conf", told)
        guest.run("systemctl", "daemon-reload")
        guest.run("systemctl", "start", "llama-server.service")
        yield guest


def test_without_leave_nothing_reboots(machine: VirtualMachine) -> None:
    assert "nouveau" in loaded(machine)
    assert any(name.endswith("/nouveau.ko") for name in initramfs(machine))
    boot, engine = machine.boot_id(), machine.run("systemctl", "show", "-P", "MainPID", "llama-server")
    played = play(machine, "never")
    assert played.returncode == 0, played.output[-3000:]
    assert "nouveau holds the card" in played.text
    assert "nvidia_driver_reboot is never" in played.text
    assert machine.boot_id() == boot
    assert machine.run("systemctl", "show", "-P", "MainPID", "llama-server") == engine
    # What the next boot needs is there all the same.
    assert "etc/modprobe.d/fleetfit-nvidia.conf" in initramfs(machine)


def test_with_leave_it_reboots_and_what_ran_runs_again(machine: VirtualMachine) -> None:
    boot = machine.boot_id()
    played = play(machine, "if_needed")
    assert played.returncode == 0, played.output[-3000:]
    assert machine.boot_id() != boot
    # It was stopped by the role, before the reboot and not by it: systemd would say "stopping" then.
    assert machine.run("cat", STOPPED).strip() in ("running", "degraded")
    assert machine.run("systemctl", "is-active", "llama-server").strip() == "active"


def test_nouveau_is_out_after_the_reboot(machine: VirtualMachine) -> None:
    assert "nouveau" not in loaded(machine)
    # The same request as before.
    machine.run_raw("systemctl", "restart", "card.service")
    assert "nouveau" not in loaded(machine)
    assert "nouveau" not in machine.run("cat", "/proc/cmdline")  # it is the files that keep it out


def test_uvm_is_loaded_at_boot_and_finds_no_card(machine: VirtualMachine) -> None:
    """There is no card: the driver's own module, built for this kernel, was loaded to say so."""
    assert machine.run("cat", "/etc/modules-load.d/fleetfit-nvidia.conf").split()[-1] == "nvidia-uvm"
    assert "NVRM: No NVIDIA GPU found" in machine.run("journalctl", "-b", "-k", "-o", "cat")
    journal = machine.run("journalctl", "-b", "-u", "systemd-modules-load.service", "-o", "cat")
    assert "nvidia" in journal


def test_a_second_run_changes_nothing_and_does_not_reboot(machine: VirtualMachine) -> None:
    boot = machine.boot_id()
    played = play(machine, "if_needed")
    assert played.returncode == 0, played.output[-3000:]
    assert played.changed_tasks() == []
    assert played.recap()["driver"]["changed"] == 0
    assert machine.boot_id() == boot
