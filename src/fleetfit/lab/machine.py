"""What this machine can do, and the container options that follow from it.

Looking (`look_at_machine`) and deciding (`container_options`, `missing_packages`) are kept apart, so that
decisions are tested with descriptions of machines that are not here.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

from .console import step
from .process import run

# podman's built-in defaults (containers-common, containers.conf(5) default_ulimits): a machine whose hard
# limits are lower and that may not raise them refuses every container.
PODMAN_NOFILE = 1048576
PODMAN_NPROC = 4194304
CAP_SYS_RESOURCE = 24  # linux/capability.h

# program -> Debian package that brings it
PROGRAMS = {
    "podman": "podman",
    "mmdebstrap": "mmdebstrap",
    "iptables": "iptables",  # netavark calls it, and podman's package does not bring it
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}
# The same for virtual machines (lab/vm.py), which need no containers.
VM_PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "mkfs.ext4": "e2fsprogs",
    "setpriv": "util-linux",
    "mmdebstrap": "mmdebstrap",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}


@dataclass(frozen=True)
class Machine:
    """The traits of the controller that decide how containers are run."""

    root: bool
    arch: str  # as uname says: x86_64
    debian_like: bool
    cgroup: str  # "v2", "hybrid" (v1 with a cgroup2 mount beside) or "v1"
    raise_limits: bool  # may raise its own hard limits (CAP_SYS_RESOURCE)
    nofile_hard: int  # -1: no limit
    nproc_hard: int  # -1: no limit
    pid_max: int  # /proc/sys/kernel/pid_max
    programs: frozenset[str]  # of those in PROGRAMS and VM_PROGRAMS, crun, runc, netavark, aardvark-dns


def cgroup_kind(mounts: str) -> str:
    """Return "v2", "hybrid" or "v1" from the text of /proc/self/mounts."""
    kinds: dict[str, str] = {}
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) >= 3 and fields[2] in ("cgroup", "cgroup2"):
            kinds[fields[1]] = fields[2]
    if kinds.get("/sys/fs/cgroup") == "cgroup2":
        return "v2"
    return "hybrid" if "cgroup2" in kinds.values() else "v1"


def look_at_machine() -> Machine:
    """Return the traits of the machine that this runs on."""
    release = Path("/etc/os-release")
    words = release.read_text().replace('"', "").replace("=", " ").split() if release.exists() else []
    effective = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/lib/podman"])
    wanted = [*PROGRAMS, *VM_PROGRAMS, "crun", "runc", "netavark", "aardvark-dns"]
    return Machine(
        root=os.geteuid() == 0,
        arch=os.uname().machine,
        debian_like="debian" in words and shutil.which("apt-get") is not None,
        cgroup=cgroup_kind(Path("/proc/self/mounts").read_text()),
        raise_limits=bool(effective & (1 << CAP_SYS_RESOURCE)),
        nofile_hard=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        nproc_hard=resource.getrlimit(resource.RLIMIT_NPROC)[1],
        pid_max=int(Path("/proc/sys/kernel/pid_max").read_text()),
        programs=frozenset(name for name in wanted if shutil.which(name, path=path)),
    )


def container_runtime(machine: Machine) -> str | None:
    """Return the OCI runtime to name, or None where podman's own choice works.

    crun refuses hybrid cgroups ("cgroups in hybrid mode not supported", crun 1.8 on Debian 12).
    """
    return "runc" if machine.cgroup == "hybrid" else None


def podman(machine: Machine, *arguments: str) -> list[str]:
    """Return the argument list of a podman command with the runtime that fits the machine."""
    runtime = container_runtime(machine)
    return ["podman", *(["--runtime", runtime] if runtime else []), *arguments]


def ulimit_options(machine: Machine) -> list[str]:
    """Return podman's --ulimit options: none where this machine may raise its limits as podman wishes."""
    options = []
    if machine.root and not machine.raise_limits:
        if 0 <= machine.nofile_hard < PODMAN_NOFILE:
            options.append(f"--ulimit=nofile={machine.nofile_hard}:{machine.nofile_hard}")
        if 0 <= machine.nproc_hard < PODMAN_NPROC:
            # podman first lowers its own limit to pid_max, and cannot raise it again for the container.
            nproc = min(machine.nproc_hard, machine.pid_max)
            options.append(f"--ulimit=nproc={nproc}:{nproc}")
    return options


def container_options(machine: Machine) -> list[str]:
    """Return podman's options for a container with systemd and hardened units on this machine."""
    options = ["--systemd=always"]
    # systemd's sandboxing mounts and new namespaces need these; without them a hardened unit dies
    # with 226/NAMESPACE. sshd writes audit records.
    options += ["--cap-add=SYS_ADMIN", "--cap-add=AUDIT_WRITE"]
    options += ["--security-opt=seccomp=unconfined", "--security-opt=apparmor=unconfined"]
    # podman gives 64 MiB; vLLM's processes talk through 160 MiB, and a machine has half of its RAM there.
    options += ["--shm-size=1g"]
    return options + ulimit_options(machine)


def init_command() -> list[str]:
    """Return the first command of a container with systemd.

    On a machine systemd itself makes the root's mounts shared; in a container it leaves that to whoever
    starts it. Without it, what LoadCredential= mounts never reaches a service that runs as another user.
    """
    return ["/bin/sh", "-c", "mount --make-rshared / && exec /sbin/init"]


def missing_packages(machine: Machine) -> list[str]:
    """Return the Debian packages that the lab still needs on this machine, sorted."""
    missing = {package for program, package in PROGRAMS.items() if program not in machine.programs}
    runtime = container_runtime(machine)
    if runtime is not None and runtime not in machine.programs:
        missing.add(runtime)
    elif not machine.programs & {"crun", "runc"}:
        missing.add("crun")
    if "netavark" not in machine.programs:
        missing |= {"netavark", "aardvark-dns"}
    return sorted(missing)


def missing_vm_packages(machine: Machine) -> list[str]:
    """Return the Debian packages that virtual machines still need on this machine, sorted."""
    return sorted({package for program, package in VM_PROGRAMS.items() if program not in machine.programs})


def refuse_reason(
    machine: Machine, needs: Callable[[Machine], list[str]] = missing_packages
) -> FleetfitError | None:
    """Return why this machine cannot run the lab, with what to do; None where it can.

    ``needs`` tells which packages are missing: those of containers, or ``missing_vm_packages``.
    """
    if machine.arch != "x86_64":
        return FleetfitError(
            f"The lab builds x86_64 hosts and this machine is {machine.arch}.",
            code="lab_arch_not_supported",
            remedy="Run the lab on an x86_64 machine; real hosts may be of either architecture.",
        )
    missing = needs(machine)
    if missing and not (machine.root and machine.debian_like):
        why = "this is not a Debian system" if machine.root else "you are not root"
        return FleetfitError(
            f"The lab needs {', '.join(missing)} on this machine, and cannot install them because {why}.",
            code="lab_programs_missing",
            remedy=f"Install them with your package manager (Debian: apt-get install {' '.join(missing)}).",
        )
    return None


def install_packages(packages: Sequence[str]) -> None:
    """Install Debian packages on this machine, saying so; raises FleetfitError where apt fails."""
    step(f"Installing on this machine with apt: {', '.join(packages)}")
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    run(["apt-get", "update", "--quiet"], what="read the package lists", env=env)
    run(
        ["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *packages],
        what=f"install {', '.join(packages)}",
        env=env,
    )


def ready_machine(needs: Callable[[Machine], list[str]] = missing_packages) -> Machine:
    """Return this machine's traits after installing what is missing; raises FleetfitError with a remedy.

    ``needs`` as in ``refuse_reason``.
    """
    machine = look_at_machine()
    reason = refuse_reason(machine, needs)
    if reason is not None:
        raise reason
    missing = needs(machine)
    if missing:
        install_packages(missing)
        machine = look_at_machine()
    return machine
