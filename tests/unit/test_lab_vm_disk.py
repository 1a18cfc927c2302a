"""Promises of lab.vm_disk: disks that a BIOS starts, named by what they are made of."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

from fleetfit.lab import vm_disk
from fleetfit.lab.vm_disk import PARTITION_SECTOR, boot_sector, disk_path, ensure_disk, flat, load_vm_recipes


def test_the_first_sector_starts_grub_and_names_the_partition() -> None:
    sector = boot_sector(b"G" * 512, 6144 * 2048)
    assert len(sector) == 512
    assert sector[:446] == b"G" * 446
    assert sector[510:] == b"\x55\xaa"
    flag, _, kind, _, start, count = struct.unpack("<B3sB3sII", sector[446:462])
    assert (flag, kind, start) == (0x80, 0x83, PARTITION_SECTOR)
    assert start + count == 6144 * 2048
    assert not any(sector[462:510])  # no second partition


def test_lists_of_recipes_may_be_nested() -> None:
    assert flat(["a", ["b", ["c"]], "d"]) == ["a", "b", "c", "d"]
    for recipe in load_vm_recipes().values():
        assert all(isinstance(part, str) for part in [*recipe["packages"], *recipe["hooks"]])


def test_a_changed_recipe_makes_another_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    before = disk_path("bookworm")
    assert disk_path("bookworm") == before
    changed = load_vm_recipes()
    changed["bookworm"]["packages"].append("less")
    monkeypatch.setattr(vm_disk, "load_vm_recipes", lambda: changed)
    assert disk_path("bookworm") != before


def test_an_unknown_machine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(FleetfitError, match="bookworm"):
        disk_path("nosuch")


def test_without_root_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(FleetfitError) as caught:
        ensure_disk("bookworm")
    assert caught.value.code == "vm_needs_root"
