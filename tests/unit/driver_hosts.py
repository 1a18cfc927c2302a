"""Root trees of hosts with NVIDIA drivers, written small: what the files and tools of each say."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.driver_facts import driver_state
from ansible_collections.fleetfit.llm.plugins.module_utils.probe_root import ProbeRoot

DEBIAN = "Debian NVIDIA Maintainers <pkg-nvidia-devel@lists.alioth.debian.org>"
DEBIAN_TEAM = "Debian Kernel Team <debian-kernel@lists.debian.org>"
NVIDIA = "NVIDIA <cudatools@nvidia.com>"
UBUNTU = "Ubuntu Core Developers <ubuntu-devel-discuss@lists.ubuntu.com>"
SHIM = "605dab50-e046-4300-abb6-3dd810dd8b23"
SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
ATTRIBUTES = b"\x06\0\0\0"
OPEN_MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build\n"
CLOSED_MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Sep 16 19:03:05 UTC 2025\n"


class Host:
    """A host below a folder: files are written into it, tools answer from a table."""

    def __init__(
        self, root: Path, distribution: str = "debian", version: str = "12", codename: str = ""
    ) -> None:
        self.root = root
        self.tools: dict[str, tuple[int, str] | Callable[[Sequence[str]], tuple[int, str]]] = {}
        self.calls: list[list[str]] = []
        self.status: list[str] = []
        self.write("proc/sys/kernel/random/boot_id", "5f12ea3d-e3e1-400a-a321-d493c1aec38c\n")
        self.write(
            "etc/os-release", f'ID={distribution}\nVERSION_ID="{version}"\nVERSION_CODENAME={codename}\n'
        )
        self.write("proc/cmdline", "BOOT_IMAGE=/boot/vmlinuz root=/dev/sda1 ro quiet\n")
        (root / "boot").mkdir()

    def write(self, path: str, content: str | bytes) -> Path:
        """Write a file below the root."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)
        return target

    def card(self, device: str = "10de:2684", address: str = "0000:01:00.0", kind: str = "0x030000") -> None:
        """Put a PCI device into the host."""
        vendor, number = device.split(":")
        for name, value in (("vendor", f"0x{vendor}"), ("device", f"0x{number}"), ("class", kind)):
            self.write(f"sys/bus/pci/devices/{address}/{name}", f"{value}\n")

    def loaded(self, version: str, *, flavour: str = "open") -> None:
        """Have a kernel module loaded."""
        self.write("sys/module/nvidia/version", f"{version}\n")
        text = OPEN_MODULE if flavour == "open" else CLOSED_MODULE
        self.write("proc/driver/nvidia/version", text.format(version))

    def package(
        self, name: str, version: str, *, maintainer: str = DEBIAN, status: str = "install ok installed"
    ) -> None:
        """Have a package in dpkg's database."""
        self.status.append(
            f"Package: {name}\nStatus: {status}\nMaintainer: {maintainer}\nArchitecture: amd64\n"
            f"Version: {version}\nDescription: of the driver\n with a second line: Version: 1\n"
        )
        self.write("var/lib/dpkg/status", "\n".join(self.status))

    def kernel(self, release: str, *, running: bool = False, headers: bool = True) -> None:
        """Have a kernel installed."""
        self.write(f"boot/vmlinuz-{release}", "kernel")
        (self.root / f"lib/modules/{release}/kernel").mkdir(parents=True)
        if running:
            self.write("proc/sys/kernel/osrelease", f"{release}\n")
        if headers:
            self.write(f"usr/src/linux-headers-{release}/Makefile", "all:\n")

    def dkms(
        self,
        version: str,
        release: str,
        *,
        module: str = "nvidia-current",
        installed: bool = True,
        ending: str = ".ko",
    ) -> None:
        """Have DKMS's module built, and installed, for a kernel."""
        tree = f"var/lib/dkms/{module}/{version}"
        self.write(f"{tree}/source/dkms.conf", "")
        self.write(f"{tree}/{release}/x86_64/module/{module}{ending}", "ELF")
        self.write(
            f"{tree}/{release}/x86_64/log/make.log", f"DKMS make.log for {module} for kernel {release}\n"
        )
        if installed:
            self.write(f"lib/modules/{release}/updates/dkms/{module}{ending}", "ELF")

    def run(self, arguments: Sequence[str]) -> tuple[int, str]:
        """Answer as the tool does; 127 where the host has none."""
        self.calls.append(list(arguments))
        for name in (" ".join(arguments[:2]), arguments[0]):
            answer = self.tools.get(name)
            if answer is not None:
                return answer(arguments) if callable(answer) else answer
        return 127, ""

    def policy(self, packages: str, general: str) -> None:
        """Have apt-cache policy answer for packages and in general."""
        self.tools["apt-cache policy"] = lambda arguments: (0, packages if len(arguments) > 2 else general)
        self.tools["apt-cache pkgnames"] = (0, "")

    @property
    def probe(self) -> ProbeRoot:
        """Return the host as probes see it."""
        return ProbeRoot(str(self.root))

    def state(self, **options: Any) -> dict[str, Any]:
        """Return the driver facts."""
        options.setdefault("today", "2026-11-24")
        return driver_state(str(self.root), run=self.run, **options)


def codes(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the codes of problems or reasons."""
    return [entry["code"] for entry in entries]


def modinfo(versions: Mapping[str, str], *, license_text: str = "Dual MIT/GPL") -> Any:
    """Return a modinfo that tells the version by a part of the path."""

    def answer(arguments: Sequence[str]) -> tuple[int, str]:
        for part, version in versions.items():
            if part in arguments[-1]:
                return (
                    0,
                    f"filename:       {arguments[-1]}\nversion:        {version}\nlicense:        {license_text}\n",
                )
        return 1, ""

    return answer


def set_age(path: Path, seconds: int) -> None:
    """Make a file so many seconds older."""
    status = path.stat()
    os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))
