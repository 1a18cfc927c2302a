"""Bring the whole lab up, or repair it: hosts, mirror and artifacts side by side, then the forwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.wheelhouse import build_first

from fleetfit.wheelhouse import wheelhouse_entry

from . import containers, mirror, model
from .certificates import copy_authorities
from .console import note, step
from .engine import GLIBC, ensure_engine, lab_build
from .forward import Forward, planned_forwards, start_forward
from .layers import LAYERS
from .machine import Machine, ready_machine
from .paths import LabPaths, cache_root, checkout_root, locked
from .process import stop_children
from .python_archive import ensure_python_archive

# gpu-small is Debian 13 (Python 3.13), on which Open WebUI does not run: it gets a managed CPython.
PYTHON_SERIES = "3.11"


def lab_definition() -> dict[str, Any]:
    """Return the content of lab/lab.yml."""
    definition: dict[str, Any] = yaml.safe_load((checkout_root() / "lab/lab.yml").read_text())
    return definition


class Artifacts:
    """What the mirror serves so far; each addition is written at once, so that a killed run keeps it."""

    def __init__(self, paths: LabPaths) -> None:
        self.paths = paths
        self.lock = threading.Lock()

    def publish(self, name: str, source: Path, sha256: str, **more: Any) -> None:
        """Serve a file and record it under ``name`` in .lab/artifacts.yml."""
        with self.lock, locked(self.paths.folder / "artifacts.lock"):
            known = mirror.read_artifacts(self.paths)
            known[name] = mirror.publish_file(self.paths, source, sha256, **more)
            mirror.write_artifacts(self.paths, known)


def start_hosts(paths: LabPaths, machine: Machine) -> None:
    """Start the mirror and the hosts of lab/lab.yml."""
    mirror.start_mirror(paths, machine)
    for name, entry in lab_definition()["hosts"].items():
        step(f"Host {name}: Debian {entry['suite']}, {entry['profile'] or 'no'} GPU")
        containers.start_host(
            name,
            entry["suite"],
            user=entry["user"],
            profile=entry["profile"],
            kind="lab",
            paths=paths,
            machine=machine,
        )


def make_engine_and_models(artifacts: Artifacts, machine: Machine) -> None:
    """Build the engine, quantize the lab's model with it, and serve both."""
    base = model.base_file()
    build = lab_build()
    engine = ensure_engine(machine, build)
    artifacts.publish(
        "llama_cpp",
        engine.archive,
        engine.sha256,
        version=build.version,
        backend=build.backend,
        arch=build.arch,
        glibc=GLIBC,
    )
    files = model.quantized_files(machine, engine, base)
    safetensors = model.safetensors_files(base)
    mirror.publish_hub(artifacts.paths, [base, *files.values(), *safetensors])
    model.write_overlay(artifacts.paths.folder / "catalog", files, safetensors)


def make_python(artifacts: Artifacts, machine: Machine) -> None:
    """Pack a CPython for gpu-small and serve it."""
    python = ensure_python_archive(machine, PYTHON_SERIES, "trixie")
    artifacts.publish("python", python.path, python.sha256, version=python.version, arch=machine.arch)


def make_wheelhouse(artifacts: Artifacts, service: str, what: str) -> None:
    """Build a service's wheelhouse, the one that its layer is made from, and serve it."""
    locks = [checkout_root() / name for name in LAYERS[service]]
    reported = False

    def report(line: str) -> None:
        nonlocal reported
        if not reported:
            step(f"Fetching {what}'s packages (about 1 GB; verified against the lock)")
            reported = True
        note(line)

    built = build_first(locks, PYTHON_SERIES, cache_root() / "wheelhouse", report=report)
    entry = wheelhouse_entry(built)
    about = {key: entry[key] for key in ("variant", "release") if key in entry}
    artifacts.publish(
        f"{service.replace('-', '_')}_wheelhouse",
        built.tar,
        built.sha256,
        python=built.python,
        platform=built.platform,
        **about,
    )


def run_side_by_side(jobs: Mapping[str, Callable[[], None]]) -> None:
    """Run the jobs at the same time, all to their end, then raise the first one's error if any failed.

    An interrupt ends the programs that the jobs started and is raised as KeyboardInterrupt.
    """

    def finish(name: str, job: Callable[[], None]) -> None:
        try:
            job()
        except FleetfitError as error:
            if not interrupted.is_set():
                note(f"{name}: failed: {error.message} Finishing what else is under way.")
            raise

    interrupted = threading.Event()
    pool = ThreadPoolExecutor(len(jobs))
    running = [pool.submit(finish, name, job) for name, job in jobs.items()]
    try:
        wait(running)
    except KeyboardInterrupt:
        interrupted.set()
        stop_children()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    for job in running:
        job.result()


def bring_up(paths: LabPaths, *, hosts_only: bool = False) -> list[Forward]:
    """Bring the lab up and return its forwards; whatever is there and whole is left alone.

    Builds run side by side. Where one fails the others are finished first, so that a second run finds them;
    then the first error is raised.
    """
    machine = ready_machine()
    copy_authorities(paths)
    artifacts = Artifacts(paths)
    jobs: dict[str, Callable[[], None]] = {"hosts": lambda: start_hosts(paths, machine)}
    if not hosts_only:
        jobs |= {
            "engine and models": lambda: make_engine_and_models(artifacts, machine),
            "CPython": lambda: make_python(artifacts, machine),
            "Open WebUI's wheelhouse": lambda: make_wheelhouse(artifacts, "open-webui", "Open WebUI"),
            "vLLM's wheelhouse": lambda: make_wheelhouse(artifacts, "vllm", "vLLM"),
        }
    run_side_by_side(jobs)
    forwards = planned_forwards(paths, lab_definition())
    for forward in forwards:
        start_forward(paths, forward)
    return forwards
