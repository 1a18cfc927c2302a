"""Promises of lab.vm: a machine that nobody else reaches, and that needs no virtualization extensions."""

from __future__ import annotations

from pathlib import Path

from fleetfit.lab.vm import qemu_argv

ARGV = qemu_argv(Path("/x/disk"), Path("/x/seed"), Path("/x/log"), 21000, memory_mib=1024, cpus=2)


def option(name: str) -> list[str]:
    """Return the values that an option is given."""
    return [ARGV[at + 1] for at, word in enumerate(ARGV) if word == name]


def test_only_ssh_is_reachable_and_only_from_this_machine() -> None:
    assert option("-netdev") == ["user,id=net,hostfwd=tcp:127.0.0.1:21000-:22"]
    assert not {"-vnc", "-monitor", "-qmp", "-gdb", "-s"} & set(ARGV)
    assert option("-display") == ["none"]


def test_it_is_emulated() -> None:
    assert option("-accel") == ["tcg,thread=multi"]


def test_no_write_is_on_the_disk_before_the_guest_asked_for_it() -> None:
    disk = next(value for value in option("-drive") if "/x/disk" in value)
    assert "cache=writeback" in disk
    assert "format=qcow2" in disk


def test_it_ends_with_whoever_started_it() -> None:
    assert ARGV[:2] == ["setpriv", "--pdeathsig=KILL"]
