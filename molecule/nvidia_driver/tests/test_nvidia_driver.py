"""What a host is like after the role nvidia_driver has installed Debian's own driver."""

from __future__ import annotations

import json

import pytest
from testinfra.host import Host

BRANCHES = {"12": "535", "13": "550"}
KERNEL_MODULES = {"12": "nvidia-kernel-dkms", "13": "nvidia-open-kernel-dkms"}


def release(machine: Host) -> str:
    return str(machine.system_info.release).split(".")[0]


def driver_packages(machine: Host) -> list[str]:
    lines = machine.check_output(
        "dpkg-query -W -f '${Package} ${db:Status-Abbrev}\n' 'nvidia-*' 'libnvidia-*' 'firmware-nvidia-*' libcuda1 "
        "| grep ' .i'"
    )
    return [line.split()[0] for line in lines.splitlines()]


def test_the_driver_is_debians_and_of_its_branch(machine: Host) -> None:
    package = machine.package(KERNEL_MODULES[release(machine)])
    assert package.is_installed
    assert package.version.startswith(f"{BRANCHES[release(machine)]}.")
    libraries = machine.package("libcuda1").version
    assert libraries == package.version


def test_nothing_of_a_desktop_came_with_it(machine: Host) -> None:
    for name in ("xserver-xorg-video-nvidia", "nvidia-settings", "nvidia-driver", "nvidia-cuda-toolkit"):
        assert not machine.package(name).is_installed


def test_every_package_of_the_driver_is_held(machine: Host) -> None:
    held = machine.check_output("apt-mark showhold").split()
    installed = driver_packages(machine)
    assert len(installed) >= 8
    assert sorted(set(installed) - set(held) - {"nvidia-installer-cleanup", "nvidia-support"}) == []


def test_an_upgrade_of_everything_leaves_the_driver_alone(machine: Host) -> None:
    simulated = machine.check_output("apt-get -s -o Debug::NoLocking=1 dist-upgrade")
    touched = [line for line in simulated.splitlines() if line.startswith(("Inst", "Remv"))]
    assert [line for line in touched if "nvidia" in line or "libcuda1" in line] == []


def test_unattended_upgrades_is_told_to_leave_the_driver_alone(machine: Host) -> None:
    config = machine.check_output("apt-config dump Unattended-Upgrade::Package-Blacklist")
    assert '"^nvidia-"' in config
    assert '"^libcuda1$"' in config


def test_nouveau_is_kept_out(machine: Host) -> None:
    config = machine.check_output("modprobe --showconfig")
    assert "blacklist nouveau" in config.splitlines()
    assert "options nouveau modeset=0" in config.splitlines()


def test_uvm_is_loaded_at_boot(machine: Host) -> None:
    assert (
        "nvidia-uvm" in machine.file("/etc/modules-load.d/fleetfit-nvidia.conf").content_string.splitlines()
    )


def test_apt_is_sound(machine: Host) -> None:
    assert machine.check_output("dpkg --audit") == ""
    policy = machine.check_output("LC_ALL=C apt-get indextargets 2>&1")
    assert "Conflicting" not in policy
    assert "non-free" in policy


@pytest.mark.parametrize(
    "path",
    [
        "/etc/apt/sources.list.d/fleetfit-nvidia.sources",
        "/etc/apt/apt.conf.d/52fleetfit-nvidia",
        "/etc/modprobe.d/fleetfit-nvidia.conf",
    ],
)
def test_files_of_the_role_are_roots(machine: Host, path: str) -> None:
    file = machine.file(path)
    assert (file.user, file.mode) == ("root", 0o644)


def test_the_manifest_tells_what_is_managed(machine: Host) -> None:
    manifest = json.loads(machine.file("/etc/fleetfit/manifest.json").content_string)
    section = manifest["sections"]["nvidia_driver"]
    assert section["source"] == "distribution"
    assert section["branch"] == BRANCHES[release(machine)]
    assert section["version"].startswith(f"{section['branch']}.")
    assert "libcuda1" in section["held"]


def test_a_refused_repository_left_nothing(machine: Host) -> None:
    """The scenario's side_effect asked for one with another key, and for one that does not answer."""
    assert not machine.file("/etc/apt/sources.list.d/refused.sources").exists
    assert not machine.file("/etc/apt/keyrings/refused.asc").exists
    assert machine.package("libcuda1").is_installed


def test_the_host_was_not_rebooted(machine: Host) -> None:
    """The role's default is never."""
    assert "reboot" not in machine.check_output(
        "journalctl -b -t systemd --no-pager -q | grep -i 'reboot.target' || true"
    )
