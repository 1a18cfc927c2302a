"""Build llama.cpp for the lab's hosts, once, in a container with the oldest glibc among them."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_build import (
    BuiltEngine,
    EngineBuild,
    best_baseline,
    build_script,
    fetch_source,
    finish_build,
    finished_build,
    unpack_source,
)

from .console import step
from .images import ensure_image
from .machine import Machine, ready_machine
from .oneoff import run_in_container
from .paths import cache_root, locked

GLIBC = "2.36"  # of the image "builder", Debian 12: what the build needs at least
BUILD_MINUTES = 8  # on two cores, measured 22 Nov 2026


def this_cpus_baseline() -> str:
    """Return the CPU baseline of this machine, on which the lab's hosts run too."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return best_baseline(line.partition(":")[2].split())
    return best_baseline([])


def lab_build() -> EngineBuild:
    """Return which build of llama.cpp the lab serves."""
    return EngineBuild(cpu_baseline=this_cpus_baseline())


def ensure_engine(machine: Machine | None = None, build: EngineBuild | None = None) -> BuiltEngine:
    """Return the built engine from the cache; build it, or go on with a killed build, where it is missing."""
    build = build or lab_build()
    cache = cache_root()
    found = finished_build(build, cache)
    if found is not None:
        return found
    machine = machine or ready_machine()
    folder = cache / "engine" / build.key()
    with locked(folder / "lock"):
        found = finished_build(build, cache)
        if found is not None:
            return found
        image = ensure_image("builder")
        jobs = os.cpu_count() or 1
        step(
            f"Building llama.cpp {build.version} ({build.backend}, {build.cpu_baseline}) once: "
            f"about {BUILD_MINUTES * 2 / jobs:.0f} minutes on {jobs} cores; log: {folder / 'build.log'}"
        )
        started = time.monotonic()
        work = folder / "work"
        unpack_source(fetch_source(build, folder), work)
        (work / "build.sh").write_text(build_script(build, jobs))
        run_in_container(
            machine,
            image,
            ["nice", "sh", "/work/build.sh", "/work/llama.cpp", "/work/build", "/work/out"],
            what="build llama.cpp",
            volumes={work: "/work"},
            name=f"fleetfit-build-{build.key()}",
            log=folder / "build.log",
        )
        built = finish_build(build, cache, work / "out" / "bin")
        shutil.rmtree(work)
        step(f"Built llama.cpp in {time.monotonic() - started:.0f} s")
    return built
