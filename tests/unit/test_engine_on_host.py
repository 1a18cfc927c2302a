"""Promises of plugin_utils.engine_on_host: the oldest C library compiles, and what arrives is whole."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_build import (
    TARGETS,
    EngineBuild,
    finished_build,
)
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_on_host import (
    Wanted,
    choose_builders,
    take_result,
)

ABLE = {
    "new": ("x86_64", "2.41"),
    "old-b": ("x86_64", "2.9"),
    "old-a": ("x86_64", "2.9"),
    "arm": ("aarch64", "2.17"),
}


def test_the_oldest_library_of_the_right_architecture_compiles_for_all_of_a_kind() -> None:
    lacking = {
        "new": Wanted("k3", "x86_64", "2.41"),
        "old-b": Wanted("k2", "x86_64", "2.9"),
        "old-a": Wanted("k3", "x86_64", "2.9"),
        "arm": Wanted("ka", "aarch64", "2.17"),
    }
    builds = choose_builders(lacking, ABLE)
    # By number: 2.9 is older than 2.41. One host asks for each, the first that lacks it.
    assert builds == {
        "k3": {"builder": "old-a", "asker": "new"},
        "k2": {"builder": "old-a", "asker": "old-b"},
        "ka": {"builder": "arm", "asker": "arm"},
    }
    assert choose_builders({}, ABLE) == {}


def result(folder: Path, *names: str) -> Path:
    programs = folder / "made/bin"
    programs.mkdir(parents=True)
    for name in names:
        (programs / name).write_bytes(b"\x7fELF GLIBC_2.34\0")
    with tarfile.open(folder / "from-host.tar.gz", "w:gz") as tar:
        tar.add(programs, "bin")
    return folder / "from-host.tar.gz"


def test_what_a_host_made_is_in_the_cache_once_it_arrived_whole(tmp_path: Path) -> None:
    build = EngineBuild(glibc="2.34")
    archive = result(tmp_path, *TARGETS)
    with pytest.raises(FleetfitError) as caught:
        take_result(build, tmp_path / "cache", archive, "0" * 64)
    assert caught.value.code == "engine_build_damaged"
    assert finished_build(build, tmp_path / "cache") is None
    take_result(build, tmp_path / "cache", archive, hashlib.sha256(archive.read_bytes()).hexdigest())
    assert finished_build(build, tmp_path / "cache") is not None


def test_a_result_without_a_program_is_no_build(tmp_path: Path) -> None:
    archive = result(tmp_path, *TARGETS[1:])
    with pytest.raises(FleetfitError, match="left out llama-server"):
        take_result(
            EngineBuild(), tmp_path / "cache", archive, hashlib.sha256(archive.read_bytes()).hexdigest()
        )
    assert finished_build(EngineBuild(), tmp_path / "cache") is None
