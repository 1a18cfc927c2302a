"""Virtual machines for what containers cannot show: a reboot, an initramfs, kernel modules, power loss.

QEMU emulates the processor, so no virtualization extensions are needed; a boot takes tens of seconds. The disk is
an overlay over the recipe's (vm_disk.py): every machine begins with the same one.
"""

from __future__ import annotations

import random
import shlex
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

from .containers import choose_port
from .machine import missing_vm_packages, ready_machine
from .paths import LabPaths
from .process import run
from .ssh import host_key, ssh_argv, user_key, wait_for_host, write_config
from .state import HostRecord, LabState
from .vm_disk import ensure_disk

# On two busy cores a boot took up to 90 s; beside 15 busy processes (28 Nov 2026) more than 400 s.
BOOT_TIMEOUT_S = 1200
SHUTDOWN_TIMEOUT_S = 120
# Where a guest of QEMU's user network finds the machine that it runs on.
GATEWAY = "10.0.2.2"


def qemu_argv(disk: Path, seed: Path, console: Path, port: int, *, memory_mib: int, cpus: int) -> list[str]:
    """Return QEMU's command line: only the guest's SSH is reachable, on loopback.

    QEMU ends with the process that started it, so that a killed test run leaves no machine behind.
    """
    # Writes that were not flushed stay in QEMU's memory or in the overlay's unwritten tables: a killed QEMU
    # is a power cut.
    drive = "if=virtio,cache=writeback,discard=unmap"
    return [
        "setpriv",
        "--pdeathsig=KILL",
        "qemu-system-x86_64",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        # KVM would be quicker where it works; a result should not depend on it.
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
        "-smp",
        str(cpus),
        "-m",
        str(memory_mib),
        "-device",
        "virtio-rng-pci",
        "-drive",
        f"file={disk},format=qcow2,{drive}",
        "-drive",
        f"file={seed},format=raw,if=virtio,readonly=on",
        "-netdev",
        f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22",
        "-device",
        "virtio-net-pci,netdev=net",
        "-serial",
        f"file:{console}",
    ]


class VirtualMachine:
    """A Debian machine with a disk of its own; a context manager that removes both at its end."""

    def __init__(
        self, name: str, paths: LabPaths, *, recipe: str = "bookworm", memory_mib: int = 1536, cpus: int = 2
    ) -> None:
        """Describe a machine whose keys, disk and ssh configuration lie in ``paths``' own folder."""
        self.name = name
        self.paths = paths
        self.recipe = recipe
        self.memory_mib = memory_mib
        self.cpus = cpus
        self.folder = paths.folder / "vm" / name
        self.console = self.folder / "console.log"
        self.port = 0
        self.boots_s: list[float] = []
        self._qemu: subprocess.Popen[bytes] | None = None
        # One connection for all commands of a boot: each of its own takes seconds of emulated cryptography. The
        # socket's path must be short.
        self._socket = Path(tempfile.gettempdir()) / f"fleetfit-vm-{uuid.uuid4().hex[:12]}"
        self._ssh: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Make the disk and boot."""
        ready_machine(missing_vm_packages)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        base = ensure_disk(self.recipe)
        overlay = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base)]
        run([*overlay, str(self._disk)], what=f"make the disk of {self.name}")
        self._make_seed()
        self.port = choose_port(self.paths, f"ssh {self.name} {random.random()}", ())  # noqa: S311
        record = HostRecord("", self.port, "root", "vm", "")
        write_config(self.paths, LabState(hosts={self.name: record}))
        try:
            self.boot()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the machine."""
        self.remove()

    @property
    def _disk(self) -> Path:
        return self.folder / "disk.qcow2"

    @property
    def _seed(self) -> Path:
        return self.folder / "seed.img"

    def _make_seed(self) -> None:
        """Make the small second disk with the host's key and whom it lets in."""
        tree = self.folder / "seed"
        tree.mkdir(0o755)
        files = {
            "ssh_host_ed25519_key": (host_key(self.paths, self.name).read_bytes(), 0o600),
            "authorized_keys": (user_key(self.paths).with_name("id_ed25519.pub").read_bytes(), 0o644),
        }
        for name, (content, mode) in files.items():
            (tree / name).write_bytes(content)
            (tree / name).chmod(mode)
        argv = ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "root_owner=0:0"]
        run([*argv, "-d", str(tree), str(self._seed), "1M"], what=f"make the keys' disk of {self.name}")

    def boot(self) -> None:
        """Switch the machine on and wait until systemd has started everything; raises FleetfitError."""
        if self.is_on():
            raise RuntimeError(f"{self.name} is on already")
        started = time.monotonic()
        argv = qemu_argv(
            self._disk, self._seed, self.console, self.port, memory_mib=self.memory_mib, cpus=self.cpus
        )
        with (self.folder / "qemu.log").open("ab") as log:
            self._qemu = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.wait_booted()
        self.boots_s.append(time.monotonic() - started)
        shared = ssh_argv(self.paths, self.name)
        shared[1:1] = ["-N", "-M", "-S", str(self._socket)]
        self._ssh = subprocess.Popen(
            shared, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def wait_booted(self) -> str:
        """Wait until systemd has started everything that it starts at boot; return its state."""
        return wait_for_host(
            self.paths, self.name, BOOT_TIMEOUT_S, remedy=f"Its console is in {self.console}."
        )

    def is_on(self) -> bool:
        """Return whether the machine has power."""
        return self._qemu is not None and self._qemu.poll() is None

    def cut_power(self) -> None:
        """End the machine at once (SIGKILL to QEMU): what it had not written to its disk is lost."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._ssh is not None:
            self._ssh.kill()
            self._ssh.wait()
        self._socket.unlink(missing_ok=True)

    def lose_power(self) -> None:
        """Cut the power and boot again from what is on the disk."""
        self.cut_power()
        self.boot()

    def shut_down(self) -> None:
        """Shut the machine down as an operator would, and wait until it is off."""
        self.run_raw("systemctl", "poweroff")
        if self._qemu is not None:
            self._qemu.wait(SHUTDOWN_TIMEOUT_S)
        self._disconnect()

    def wait_off(self) -> None:
        """Wait until the machine is off, however long that takes."""
        if self._qemu is not None:
            self._qemu.wait()

    def remove(self) -> None:
        """Switch the machine off and delete its disk; the console's log stays."""
        self.cut_power()
        for path in (self._disk, self._seed):
            path.unlink(missing_ok=True)

    def boot_id(self) -> str:
        """Return the kernel's id of this boot."""
        return self.run("cat", "/proc/sys/kernel/random/boot_id").strip()

    def run_raw(
        self,
        *command: str,
        stdin: str | bytes = "",
        timeout_s: float = 300,
        environ: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the guest as root and return all of its result."""
        words = ["env", *[f"{name}={value}" for name, value in (environ or {}).items()], *command]
        data = stdin.encode() if isinstance(stdin, str) else stdin
        # What ssh passes on is read by a shell; ssh itself does not tell how a killed program ended.
        argv = ssh_argv(self.paths, self.name, f"{shlex.join(words)}; exit $?")
        argv[1:1] = ["-S", str(self._socket)]
        done = run(argv, what=f"run {command[0]}", stdin=data, timeout_s=timeout_s, check=False)
        out, err = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
        return subprocess.CompletedProcess(argv, done.returncode, out, err)

    def run(self, *command: str, stdin: str | bytes = "", check: bool = True, timeout_s: float = 300) -> str:
        """Run a command in the guest and return its standard output; raises FleetfitError where it fails."""
        done = self.run_raw(*command, stdin=stdin, timeout_s=timeout_s)
        if check and done.returncode != 0:
            raise FleetfitError(
                f"{' '.join(command)} ended with {done.returncode} in {self.name}: {done.stdout}{done.stderr}",
                code="command_failed",
            )
        return done.stdout

    def put(self, path: str, content: str | bytes, mode: str = "0644") -> None:
        """Write a file into the guest."""
        script = 'mkdir -p "$(dirname "$1")" && cat > "$1" && chmod "$2" "$1"'
        self.run("sh", "-c", script, "sh", path, mode, stdin=content)
