"""A relocatable CPython archive, from this machine's version manager, for hosts that have no fitting Python.

pyenv compiles an interpreter against this machine's libraries and for one prefix. The archive carries those
libraries and finds them relative to itself, so that it runs in any folder of a host with the same or a newer
glibc. Left out: the test suite, Tk, idle, and modules that a service does not need (readline, curses, dbm, nis).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_build import pack
from ansible_collections.fleetfit.llm.plugins.plugin_utils.pip_fetch import file_sha256

from .console import step
from .images import ensure_image
from .machine import Machine
from .oneoff import run_in_container
from .paths import cache_root, locked, write_atomically
from .process import run

# Raised when the archive is made in another way.
FORMAT = 1
# What every glibc system has (glibc's own libraries), and what must not be mixed with another glibc.
SYSTEM_LIBRARIES = ("libc.so", "libm.so", "libdl.so", "libpthread.so", "librt.so", "libutil.so", "ld-linux")
LEFT_OUT_MODULES = (
    "_tkinter",
    "_test",
    "_xxtestfuzz",
    "xxlimited",
    "readline",
    "_curses",
    "_dbm",
    "_gdbm",
    "nis",
)
LEFT_OUT_FOLDERS = (
    "test",
    "tkinter",
    "idlelib",
    "turtledemo",
    "site-packages",
    "lib2to3/tests",
    "__pycache__",
)
# Proves on the target system that the archive is whole: what pip, venv and Open WebUI import.
SELF_CHECK = (
    "import ssl, sqlite3, ctypes, lzma, bz2, zlib, hashlib, uuid, asyncio, multiprocessing, venv, ensurepip; "
    "ssl.create_default_context(); sqlite3.connect(':memory:').execute('select 1'); hashlib.new('sha3_256')"
)


@dataclass(frozen=True)
class PythonArchive:
    """A packed CPython: ``bin/python3`` at the top of the archive."""

    version: str  # 3.11.7
    path: Path
    sha256: str
    size: int  # bytes


def find_python(series: str) -> Path | None:
    """Return an interpreter of ``series`` ("3.11") from pyenv or uv, the newest patch version first."""
    home = Path.home()
    roots = [
        Path(os.environ.get("PYENV_ROOT") or home / ".pyenv") / "versions",
        Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or home / ".local/share/uv/python"),
    ]
    found: list[tuple[tuple[int, ...], Path]] = []
    for root in roots:
        for pattern in (f"{series}.*", f"cpython-{series}.*"):
            for folder in root.glob(pattern):
                python = folder / "bin" / f"python{series}"
                version = folder.name.removeprefix("cpython-").split("-")[0].split(".")
                if python.exists() and all(part.isdigit() for part in version):
                    found.append((tuple(int(part) for part in version), python))
    return max(found)[1] if found else None


def needed_libraries(file: Path, prefix: Path) -> dict[str, Path]:
    """Return the shared libraries outside ``prefix`` that a file loads, by name, without glibc's own."""
    done = subprocess.run(["ldd", str(file)], capture_output=True, text=True, check=False)
    found = {}
    for line in done.stdout.splitlines():
        name, arrow, rest = line.strip().partition(" => ")
        if not arrow or name.startswith(SYSTEM_LIBRARIES):
            continue
        path = Path(rest.split(" (")[0])
        if not path.is_absolute():
            raise FleetfitError(
                f"{file} needs {name}, which is not on this machine.",
                code="python_broken",
                remedy="Build that Python again with your version manager.",
            )
        if prefix not in path.parents:
            found[name] = path
    return found


def collect(python: Path, series: str, target: Path) -> None:
    """Copy the interpreter's tree and the libraries it needs to ``target`` (bin, lib)."""
    prefix = python.resolve().parent.parent
    library = target / "lib" / f"python{series}"

    def leave_out(folder: str, names: list[str]) -> set[str]:
        relative = Path(folder).relative_to(prefix / "lib" / f"python{series}")
        dropped = {
            name for name in names if str(relative / name) in LEFT_OUT_FOLDERS or name == "__pycache__"
        }
        if str(relative) == "lib-dynload":
            dropped |= {name for name in names if name.startswith(LEFT_OUT_MODULES)}
        return dropped | {name for name in names if name.startswith("config-")}

    shutil.copytree(prefix / "lib" / f"python{series}", library, symlinks=True, ignore=leave_out)
    (library / "site-packages").mkdir()
    binary = target / "bin" / f"python{series}"
    binary.parent.mkdir(parents=True)
    shutil.copy2(python.resolve(), binary)
    for name in ("python3", "python"):
        (binary.parent / name).symlink_to(binary.name)
    for shared in (prefix / "lib").glob(f"libpython{series}.so*"):
        if not shared.is_symlink():
            shutil.copy2(shared, target / "lib" / shared.name)
    libraries: dict[str, Path] = {}
    for module in [python, *(library / "lib-dynload").glob("*.so")]:
        libraries |= needed_libraries(module, prefix)
    for name, path in libraries.items():
        shutil.copy2(path.resolve(), target / "lib" / name)


PATCH_SCRIPT = """set -eu
cd /tree
for file in lib/*.so*; do
    chmod u+w "$file"
    patchelf --set-rpath '$ORIGIN' "$file"
done
for file in lib/python*/lib-dynload/*.so; do
    chmod u+w "$file"
    strip --strip-debug "$file"
    patchelf --set-rpath '$ORIGIN/../..' "$file"
done
for file in bin/python*; do
    [ -L "$file" ] || { strip --strip-debug "$file"; patchelf --set-rpath '$ORIGIN/../lib' "$file"; }
done
"""

CHECK_SCRIPT = """set -eu
mkdir -p /opt/elsewhere
tar --extract --gzip --file "/archive/$1" --directory /opt/elsewhere
/opt/elsewhere/bin/python3 -c "$2"
/opt/elsewhere/bin/python3 -m venv /tmp/venv
/tmp/venv/bin/python -c "$2"
/tmp/venv/bin/python -m pip --version
"""


def ensure_python_archive(machine: Machine, series: str, suite: str) -> PythonArchive:
    """Return the archive of CPython ``series``; where it is missing, make it and prove it on ``suite``.

    Raises FleetfitError ``python_not_found`` where no version manager of this machine has that series.
    """
    python = find_python(series)
    if python is None:
        raise FleetfitError(
            f"The lab needs a CPython {series} from a version manager on this machine, for its Debian 13 host, "
            "and found none.",
            code="python_not_found",
            remedy=f"Run `pyenv install {series}` or `uv python install {series}`, then this again.",
        )
    about = run([str(python), "-VV"], what=f"ask {python} for its version").stdout.decode().strip()
    version = about.split()[1]
    stamp = python.resolve().stat().st_mtime_ns
    key = hashlib.sha256(json.dumps([FORMAT, str(python), about, stamp, suite]).encode()).hexdigest()[:16]
    folder = cache_root() / "python" / key
    archive = folder / f"cpython-{version}-linux-{sysconfig.get_platform().rpartition('-')[2]}.tar.gz"
    record = folder / "archive.json"
    with locked(folder / "lock"):
        if record.exists() and archive.exists():
            data = json.loads(record.read_text())
            if archive.stat().st_size == data["size"]:
                return PythonArchive(version, archive, data["sha256"], data["size"])
        step(
            f"Packing CPython {version} from {python.resolve().parent.parent} for hosts without a fitting Python"
        )
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            tree = Path(scratch, "tree")
            tree.mkdir()
            collect(python, series, tree)
            run_in_container(
                machine,
                ensure_image("builder"),
                ["sh", "-c", PATCH_SCRIPT],
                what="make CPython relocatable",
                volumes={tree: "/tree"},
            )
            pack(tree, archive)
        run_in_container(
            machine,
            ensure_image(suite),
            ["sh", "-c", CHECK_SCRIPT, "check", archive.name, SELF_CHECK],
            what=f"run the packed CPython {version} on {suite}",
            volumes={folder: "/archive:ro"},
        )
        data = {"schema_version": 1, "sha256": file_sha256(archive), "size": archive.stat().st_size}
        write_atomically(record, json.dumps(data))
        return PythonArchive(version, archive, data["sha256"], data["size"])
