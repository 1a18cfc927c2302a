"""Find the build of llama.cpp that runs on a host, or build it on this controller, once for all such hosts."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..module_utils.errors import FleetfitError
from .engine_build import (
    BUILD_PACKAGES,
    BuiltEngine,
    EngineBuild,
    build_script,
    fetch_source,
    finish_build,
    finished_build,
    unpack_source,
)

# x86-64-v3 of the x86-64 psABI, by the names under which host facts list instruction sets.
V3_ISA = frozenset({"avx", "avx2", "bmi2", "f16c", "fma"})
TOOLS = ("cmake", "ninja", "gcc", "g++", "strip")
_GLIBC_SYMBOL = re.compile(rb"GLIBC_(\d+)\.(\d+)")


def cpu_baseline(isa: Sequence[str]) -> str:
    """Return the CPU baseline of a build for a host with these instruction sets."""
    return "x86-64-v3" if set(isa) >= V3_ISA else "x86-64-v2"


def needed_glibc(program: Path) -> str:
    """Return the newest C library version that ``program`` asks for by versioned symbols, such as 2.34."""
    versions = {(int(major), int(minor)) for major, minor in _GLIBC_SYMBOL.findall(program.read_bytes())}
    major, minor = max(versions, default=(2, 0))
    return f"{major}.{minor}"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _require_tools(build: EngineBuild) -> None:
    if platform.machine() != build.arch:
        raise FleetfitError(
            f"llama.cpp for {build.arch} cannot be built on this controller, which is {platform.machine()}.",
            code="engine_build_arch",
            remedy="Build it on such a machine and add the archive to llama_cpp_archives.",
        )
    missing = [
        tool for tool in (*TOOLS, *(["nvcc"] if build.backend == "cuda" else [])) if not shutil.which(tool)
    ]
    if missing:
        cuda = " and the CUDA toolkit" if "nvcc" in missing else ""
        raise FleetfitError(
            f"Building llama.cpp on this controller needs {', '.join(missing)}.",
            code="engine_build_tools",
            remedy=f"Install {' '.join(BUILD_PACKAGES)}{cuda}.",
        )


def _compile(build: EngineBuild, cache: Path) -> BuiltEngine:
    folder = cache / "engine" / build.key()
    work = folder / "controller"
    source = unpack_source(fetch_source(build, folder), work)
    script = work / "build.sh"
    script.write_text(build_script(build, os.cpu_count() or 1))
    log = folder / "build.log"
    with log.open("w") as output:
        done = subprocess.run(
            ["nice", "sh", str(script), str(source), str(work / "build"), str(work / "out")],
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise FleetfitError(
            f"Building llama.cpp {build.version} failed: {last[0]}",
            code="engine_build",
            remedy=f"Read {log}.",
        )
    built = finish_build(build, cache, work / "out" / "bin")
    shutil.rmtree(work)
    return built


def fitting_build(build: EngineBuild, cache: Path, glibc: str) -> BuiltEngine | None:
    """Return the finished build in the cache that runs with this C library, or None.

    One that this machine made comes first, then those that hosts made, the newest C library first: a host
    that joins with an older one gets a build of its own, and the others keep theirs.
    """
    found: list[tuple[bool, tuple[int, ...], BuiltEngine]] = []
    for record in sorted((cache / "engine").glob("*/build.json")):
        try:
            made = EngineBuild(**json.loads(record.read_text())["build"])
        except (ValueError, KeyError, TypeError):
            continue  # of another version of fleetfit
        if replace(made, glibc="") != replace(build, glibc="") or made.key() != record.parent.name:
            continue
        built = finished_build(made, cache)
        if built is None:
            continue
        needed = _version(needed_glibc(built.bin_dir / "llama-server"))
        if needed <= _version(glibc):
            found.append((not made.glibc, needed, built))
    return max(found, key=lambda item: item[:2])[2] if found else None


def build_engine(build: EngineBuild, *, glibc: str, cache: Path, only_look: bool) -> dict[str, Any]:
    """Return ``{"key", "archive", "built"}``; ``archive`` is an entry as in llama_cpp_archives.

    Whoever comes first builds, the others wait for it. ``archive`` is null where ``only_look`` and nothing
    was built yet. Raises FleetfitError where this controller cannot build it, or the result does not run
    with ``glibc``.
    """
    folder = cache / "engine" / build.key()
    found = fitting_build(build, cache, glibc)
    compiled = False
    if found is None and only_look:
        return {"key": build.key(), "archive": None, "built": True}
    if found is None:
        found = finished_build(build, cache)
    if found is None:
        with locked(folder / "lock"):
            found = finished_build(build, cache)
            if found is None:
                _require_tools(build)
                found = _compile(build, cache)
                compiled = True
    needed = needed_glibc(found.bin_dir / "llama-server")
    if _version(needed) > _version(glibc):
        raise FleetfitError(
            f"llama.cpp as this controller builds it needs glibc {needed}, the host has {glibc}.",
            code="engine_build_glibc",
            remedy="Set llama_cpp_build_on to oldest_host, or add an archive built there to llama_cpp_archives.",
        )
    archive = {
        "version": build.version,
        "backend": build.backend,
        "arch": build.arch,
        "glibc": needed,
        "path": str(found.archive),
        "size": found.size,
        "sha256": found.sha256,
    }
    return {"key": build.key(), "archive": archive, "built": compiled}
