"""Promises of module_utils.engine_compile: one unit for a build; a failure has its log's last lines."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.engine_compile import Compilation
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError


class Systemd:
    """A systemd whose unit does its work when it is started, or goes on for ``polls`` looks."""

    def __init__(self, polls: int = 0, code: int = 0) -> None:
        self.polls, self.code = polls, code
        self.started: list[list[str]] = []
        self.looks = 0

    def __call__(self, argv: list[str]) -> tuple[int, str]:
        if argv[0] == "systemd-run":
            self.started.append(argv)
            self.looks = 0
            if self.code == 0:
                done = subprocess.run(argv[argv.index("--") + 1 :], capture_output=True, text=True)
                Path(argv[-1], "build.log").write_text(done.stdout + done.stderr)
            return self.code, "no such unit"
        if argv[:2] == ["systemctl", "show"]:
            self.looks += 1
            running = self.started and self.looks <= self.polls
            return 0, "active\n" if running else "inactive\n"
        return 0, ""


GOOD = 'mkdir -p "$3/bin" && echo program > "$3/bin/llama-server" && echo compiled'


def test_the_result_is_one_whole_file_and_nothing_is_started_twice(tmp_path: Path) -> None:
    systemd = Systemd()
    compilation = Compilation(str(tmp_path / "b"), "abc", systemd)
    (tmp_path / "b").mkdir()
    compilation.start(GOOD)
    state = compilation.wait(5)
    assert state["state"] == "finished"
    assert Path(state["archive"]).stat().st_size > 0
    assert state["log_tail"] == ["compiled"]
    assert compilation.finished()
    command = systemd.started[0]
    assert "--unit=fleetfit-build-abc.service" in command
    assert "--property=PrivateNetwork=yes" in command
    assert compilation.remove()
    assert not (tmp_path / "b").exists()
    assert not compilation.remove()


def test_a_unit_that_runs_is_waited_for_and_not_started_again(tmp_path: Path) -> None:
    systemd = Systemd(polls=2)
    compilation = Compilation(str(tmp_path), "abc", systemd)
    compilation.start(GOOD)
    compilation.start(GOOD)
    assert len(systemd.started) == 1
    assert compilation.wait(0)["state"] in ("running", "finished")


def test_a_failure_says_what_the_compiler_said_last(tmp_path: Path) -> None:
    compilation = Compilation(str(tmp_path), "abc", Systemd())
    compilation.start("echo one; echo 'cc: fatal error' >&2; exit 1")
    with pytest.raises(FleetfitError, match="cc: fatal error") as caught:
        compilation.wait(1)
    assert caught.value.code == "engine_build"
    assert "build.log" in str(caught.value.remedy)
    assert not compilation.finished()


def test_a_unit_that_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(FleetfitError, match="no such unit"):
        Compilation(str(tmp_path), "abc", Systemd(code=1)).start(GOOD)
