"""Build a virtual environment from an unpacked wheelhouse: whole or not at all, without any package index."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Callable

from .errors import FleetfitError
from .manifest import fsync_directory

RunCommand = Callable[[Sequence[str], dict[str, str]], tuple[int, str, str]]


@dataclass(frozen=True)
class EnvironmentSpec:
    """Where the environment goes, and what it is made from; all paths are absolute."""

    path: str
    uv: str
    python: str
    requirements: str
    find_links: str
    compile_bytecode: bool = True


def exists(spec: EnvironmentSpec) -> bool:
    """Return whether the environment is there; it gets its name in one rename, so that it is then whole."""
    return os.path.exists(os.path.join(spec.path, "pyvenv.cfg"))


def check_ingredients(spec: EnvironmentSpec) -> None:
    """Raise FleetfitError that names the first thing missing."""
    for name, path, remedy in (
        ("uv", spec.uv, "The role python_runtime installs it."),
        ("the interpreter", spec.python, "Install it on the host, or add it to python_runtime_archives."),
        ("the requirements file", spec.requirements, "Unpack the wheelhouse first."),
        ("the wheels' directory", spec.find_links, "Unpack the wheelhouse first."),
    ):
        if not os.path.exists(path):
            raise FleetfitError(
                f"For {spec.path}, {name} is missing: {path}.", code="environment_incomplete", remedy=remedy
            )


def commands(spec: EnvironmentSpec, directory: str) -> list[list[str]]:
    """Return the commands that build the environment in ``directory``.

    ``uv pip sync`` and not ``install``: it takes the list as it is, so that a package that the lock leaves
    out on purpose is not asked for again.
    """
    sync = [spec.uv, "pip", "sync", "--python", os.path.join(directory, "bin", "python"), "--require-hashes"]
    sync += ["--no-index", "--offline", "--find-links", spec.find_links]
    if spec.compile_bytecode:
        sync.append("--compile-bytecode")
    create = [spec.uv, "venv", "--relocatable", "--no-python-downloads", "--python", spec.python, directory]
    return [create, [*sync, spec.requirements]]


def clean_environment(cache: str) -> dict[str, str]:
    """Return the variables for uv: nothing of the caller's own settings, a cache on the same file system."""
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": cache,
        "LC_ALL": "C.UTF-8",
        "UV_CACHE_DIR": cache,
        "UV_NO_CONFIG": "1",
        "UV_NO_PROGRESS": "1",
    }


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold ``path``: a run that was cut off from its host may still be building the same environment."""
    with open(path, "w", encoding="ascii") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def build(spec: EnvironmentSpec, run_command: RunCommand) -> bool:
    """Build the environment unless it is there; return whether it was built.

    It is built beside, under a hidden name, and renamed when it is whole; what an interrupted run left is
    removed. Raises FleetfitError with the tool's last lines where a step fails.
    """
    envs, name = os.path.split(spec.path)
    os.makedirs(envs, mode=0o755, exist_ok=True)
    with _locked(os.path.join(envs, f".{name}.lock")):
        if exists(spec):
            return False
        check_ingredients(spec)
        partial = os.path.join(envs, f".{name}.partial")
        cache = os.path.join(envs, f".{name}.cache")
        for leftover in (partial, cache, spec.path):
            shutil.rmtree(leftover, ignore_errors=True)
        os.mkdir(cache, 0o700)
        for argv in commands(spec, partial):
            code, out, err = run_command(argv, clean_environment(cache))
            if code != 0:
                lines = (line.strip() for line in (err.strip() or out.strip() or "no output").splitlines())
                # uv takes seven lines to say which package has which hash in place of which.
                last = "; ".join([line for line in lines if line][-8:])
                raise FleetfitError(
                    f"{' '.join(argv[:3])} failed with exit code {code}: {last}.",
                    code="environment_failed",
                    remedy="Check that the wheelhouse is whole, and was built for this Python and architecture:"
                    " `fleetfit wheelhouse build` makes it again.",
                )
        shutil.rmtree(cache)
        # uv's own lock, which everybody could write; nothing changes this environment any more.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(partial, ".lock"))
        os.chmod(partial, 0o755)  # noqa: S103 - the service's user reads it
        os.rename(partial, spec.path)
        fsync_directory(envs)
        return True
