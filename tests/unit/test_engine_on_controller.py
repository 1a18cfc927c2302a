"""Promises of plugin_utils.engine_on_controller: one build for all, and none for hosts that cannot run it."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_build import (
    TARGETS,
    EngineBuild,
    finish_build,
)
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_on_controller import (
    build_engine,
    cpu_baseline,
    fitting_build,
    needed_glibc,
)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in TARGETS:
        (programs / name).write_bytes(b"\x7fELF GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.9\0")
    finish_build(EngineBuild(), tmp_path, programs)
    return tmp_path


def test_needed_glibc_is_the_newest_symbol_by_number(cache: Path) -> None:
    assert needed_glibc(cache / "programs" / "llama-server") == "2.34"


def test_a_finished_build_is_found_and_described(cache: Path) -> None:
    outcome = build_engine(EngineBuild(), glibc="2.36", cache=cache, only_look=False)
    assert outcome["built"] is False
    assert outcome["archive"]["glibc"] == "2.34"
    assert Path(outcome["archive"]["path"]).stat().st_size == outcome["archive"]["size"]


def test_host_with_an_older_library_is_refused_with_both_versions(cache: Path) -> None:
    with pytest.raises(FleetfitError, match=r"needs glibc 2\.34, the host has 2\.31"):
        build_engine(EngineBuild(), glibc="2.31", cache=cache, only_look=False)


def test_check_mode_builds_nothing(tmp_path: Path) -> None:
    outcome = build_engine(EngineBuild(), glibc="2.36", cache=tmp_path, only_look=True)
    assert outcome["archive"] is None
    assert list(tmp_path.iterdir()) == []


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FleetfitError, match="cannot be built on this controller"):
        build_engine(EngineBuild(arch="riscv64"), glibc="2.36", cache=tmp_path, only_look=False)


@pytest.mark.parametrize(
    ("isa", "baseline"),
    [(["avx", "avx2", "bmi2", "f16c", "fma", "sse4_2"], "x86-64-v3"), (["sse4_2", "avx"], "x86-64-v2")],
)
def test_baseline_follows_the_instruction_sets(isa: list[str], baseline: str) -> None:
    assert cpu_baseline(isa) == baseline


def made_on_host(cache: Path, glibc: str, needs: str) -> str:
    """Put a build into the cache that a host with ``glibc`` compiled; return its sha256."""
    programs = cache / f"programs-{glibc}"
    programs.mkdir()
    for name in TARGETS:
        (programs / name).write_bytes(f"\x7fELF GLIBC_2.2.5\0GLIBC_{needs}\0".encode())
    return finish_build(EngineBuild(glibc=glibc), cache, programs).sha256


def test_a_host_with_an_older_library_gets_a_build_of_its_own_and_the_others_keep_theirs(cache: Path) -> None:
    def served(glibc: str) -> str | None:
        found = fitting_build(EngineBuild(), cache, glibc)
        return found.sha256 if found else None

    own = served("2.36")
    assert own
    assert served("2.31") is None
    old = made_on_host(cache, "2.31", "2.30")
    assert served("2.31") == served("2.33") == old
    assert served("2.36") == served("2.41") == own
    older = made_on_host(cache, "2.28", "2.28")
    assert served("2.28") == older
    assert served("2.31") == old


def test_another_version_or_baseline_is_no_fit_and_rubbish_is_passed_over(cache: Path) -> None:
    (cache / "engine/other").mkdir()
    (cache / "engine/other/build.json").write_text("{")
    assert fitting_build(EngineBuild(version="1"), cache, "2.41") is None
    assert fitting_build(EngineBuild(cpu_baseline="x86-64-v2"), cache, "2.41") is None
    assert fitting_build(EngineBuild(), cache, "2.41") is not None


def test_a_build_of_this_machine_is_named_as_before_hosts_could_build() -> None:
    # As make lab put it into caches; another key would compile it again everywhere.
    assert "glibc" not in EngineBuild().identity()
    assert EngineBuild().key() != EngineBuild(glibc="2.34").key()
