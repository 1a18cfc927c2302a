"""Promises of module_utils.python_environment: whole or not at all, without an index, nothing left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.python_environment import (
    EnvironmentSpec,
    build,
    commands,
)


@pytest.fixture
def spec(tmp_path: Path) -> EnvironmentSpec:
    wheels = tmp_path / "wheelhouse/wheels"
    wheels.mkdir(parents=True)
    for name in ("uv", "python", "wheelhouse/requirements.txt"):
        (tmp_path / name).write_text("")
    return EnvironmentSpec(
        path=str(tmp_path / "envs/0123"),
        uv=str(tmp_path / "uv"),
        python=str(tmp_path / "python"),
        requirements=str(tmp_path / "wheelhouse/requirements.txt"),
        find_links=str(wheels),
    )


class Runner:
    """Does what uv does to the file system, or fails at the given step."""

    def __init__(self, fail_at: str = "") -> None:
        self.fail_at = fail_at
        self.calls: list[Sequence[str]] = []

    def __call__(self, argv: Sequence[str], env: dict[str, str]) -> tuple[int, str, str]:
        self.calls.append(argv)
        if argv[1] == self.fail_at:
            return 2, "", "error: hash mismatch\n"
        if argv[1] == "venv":
            Path(argv[-1]).mkdir()
            Path(argv[-1], "pyvenv.cfg").write_text("home = /usr/bin\n")
            Path(argv[-1], ".lock").touch(0o666)
        return 0, "", ""


def test_it_appears_whole_and_nothing_else_is_left(spec: EnvironmentSpec) -> None:
    assert build(spec, Runner()) is True
    envs = Path(spec.path).parent
    assert sorted(path.name for path in envs.iterdir()) == [".0123.lock", "0123"]
    assert sorted(path.name for path in Path(spec.path).iterdir()) == ["pyvenv.cfg"]


def test_what_is_there_is_not_touched(spec: EnvironmentSpec) -> None:
    build(spec, Runner())
    again = Runner()
    assert build(spec, again) is False
    assert again.calls == []


def test_a_failed_step_leaves_no_environment_and_is_told(spec: EnvironmentSpec) -> None:
    with pytest.raises(FleetfitError, match="hash mismatch"):
        build(spec, Runner(fail_at="pip"))
    assert not Path(spec.path).exists()


def test_what_an_interrupted_run_left_is_replaced(spec: EnvironmentSpec) -> None:
    leftover = Path(spec.path).parent / ".0123.partial"
    leftover.mkdir(parents=True)
    (leftover / "half").touch()
    assert build(spec, Runner()) is True
    assert not (Path(spec.path) / "half").exists()


def test_hashes_are_required_and_no_index_is_asked(spec: EnvironmentSpec) -> None:
    create, sync = commands(spec, "/x")
    assert {"--relocatable", "--no-python-downloads"} <= set(create)
    assert {"--require-hashes", "--no-index", "--offline"} <= set(sync)


@pytest.mark.parametrize("missing", ["uv", "python", "wheelhouse/requirements.txt"])
def test_a_missing_ingredient_is_named(spec: EnvironmentSpec, tmp_path: Path, missing: str) -> None:
    (tmp_path / missing).unlink()
    with pytest.raises(FleetfitError, match=missing):
        build(spec, Runner())
