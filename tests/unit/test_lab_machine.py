"""Promises of lab.machine: what is done on machines that are not this one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fleetfit.lab.machine import (
    PROGRAMS,
    VM_PROGRAMS,
    Machine,
    cgroup_kind,
    container_options,
    container_runtime,
    missing_packages,
    missing_vm_packages,
    podman,
    refuse_reason,
    ulimit_options,
)

HYBRID = """tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0
"""
V1 = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"
V2 = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n"

EVERYTHING = frozenset({*PROGRAMS, "crun", "runc", "netavark", "aardvark-dns"})
WORKSTATION = Machine(
    root=True,
    arch="x86_64",
    debian_like=True,
    cgroup="v2",
    raise_limits=True,
    nofile_hard=524288,
    nproc_hard=127000,
    pid_max=4194304,
    programs=EVERYTHING,
)
# A virtual machine with hybrid cgroups that may not raise its limits: measured on one.
CONFINED = replace(
    WORKSTATION, cgroup="hybrid", raise_limits=False, nofile_hard=20000, nproc_hard=96365, pid_max=32768
)


@pytest.mark.parametrize(("mounts", "kind"), [(HYBRID, "hybrid"), (V1, "v1"), (V2, "v2"), ("", "v1")])
def test_cgroup_kind(mounts: str, kind: str) -> None:
    assert cgroup_kind(mounts) == kind


def test_an_ordinary_workstation_gets_podmans_own_runtime_and_limits() -> None:
    assert container_runtime(WORKSTATION) is None
    assert podman(WORKSTATION, "ps") == ["podman", "ps"]
    assert ulimit_options(WORKSTATION) == []


def test_hybrid_cgroups_get_runc() -> None:
    assert podman(CONFINED, "ps") == ["podman", "--runtime", "runc", "ps"]


def test_limits_that_may_not_be_raised_are_named() -> None:
    assert ulimit_options(CONFINED) == ["--ulimit=nofile=20000:20000", "--ulimit=nproc=32768:32768"]


def test_limits_at_or_above_podmans_wish_are_left_to_podman() -> None:
    generous = replace(CONFINED, nofile_hard=1048576, nproc_hard=-1)
    assert ulimit_options(generous) == []


def test_an_ordinary_user_keeps_its_own_limits() -> None:
    assert ulimit_options(replace(CONFINED, root=False)) == []


def test_hardened_units_get_what_they_need_everywhere() -> None:
    for machine in (WORKSTATION, CONFINED):
        options = container_options(machine)
        assert "--cap-add=SYS_ADMIN" in options
        assert "--security-opt=seccomp=unconfined" in options
        # vLLM's processes talk through more shared memory than podman gives by default.
        assert "--shm-size=1g" in options
        assert "--privileged" not in options


@pytest.mark.parametrize(
    ("lost", "packages"),
    [
        (set(), []),
        ({"podman"}, ["podman"]),
        ({"ssh", "ssh-keygen"}, ["openssh-client"]),
        ({"netavark", "aardvark-dns"}, ["aardvark-dns", "netavark"]),
        ({"crun", "runc"}, ["crun"]),
    ],
)
def test_missing_programs_are_named_as_packages(lost: set[str], packages: list[str]) -> None:
    assert missing_packages(replace(WORKSTATION, programs=EVERYTHING - lost)) == packages


def test_hybrid_cgroups_need_runc_although_crun_is_there() -> None:
    assert missing_packages(replace(CONFINED, programs=EVERYTHING - {"runc"})) == ["runc"]


def test_virtual_machines_need_qemu_and_no_podman() -> None:
    assert missing_vm_packages(replace(WORKSTATION, programs=frozenset(VM_PROGRAMS))) == []
    assert missing_vm_packages(WORKSTATION) == ["e2fsprogs", "qemu-system-x86", "qemu-utils", "util-linux"]
    reason = refuse_reason(replace(WORKSTATION, root=False), missing_vm_packages)
    assert reason is not None
    assert "apt-get install e2fsprogs qemu-system-x86" in str(reason)


def test_root_on_debian_is_not_refused_for_what_apt_can_install() -> None:
    assert refuse_reason(replace(WORKSTATION, programs=frozenset())) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [({"root": False}, "you are not root"), ({"debian_like": False}, "not a Debian system")],
)
def test_who_cannot_install_is_told_what_to_install(change: dict[str, bool], why: str) -> None:
    reason = refuse_reason(replace(WORKSTATION, programs=EVERYTHING - {"podman"}, **change))
    assert reason is not None
    assert why in reason.message
    assert "apt-get install podman" in str(reason)


def test_another_architecture_is_refused_with_its_name() -> None:
    reason = refuse_reason(replace(WORKSTATION, arch="aarch64"))
    assert reason is not None
    assert "aarch64" in reason.message
