"""Promises of the fleetfit command: help imports nothing heavy, mistakes are one line, every subcommand exists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from click.testing import CliRunner

from fleetfit import cli


def test_help_lists_all_subcommands_and_imports_none_of_them() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from fleetfit.cli import cli;"
        "print(CliRunner().invoke(cli, ['--help']).output);"
        "print([name for name in sys.modules if name.startswith('fleetfit.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in cli.SUBCOMMANDS)
    assert done.stdout.splitlines()[-1] == "['fleetfit.cli']"


@pytest.mark.parametrize("name", sorted(cli.SUBCOMMANDS))
def test_every_subcommand_has_help(name: str) -> None:
    answer = CliRunner().invoke(cli.cli, [name, "--help"])
    assert answer.exit_code == 0, answer.output


def test_version() -> None:
    assert CliRunner().invoke(cli.cli, ["--version"]).output.startswith("fleetfit, version ")


def run_main(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    @click.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "cli", fail)
    monkeypatch.setattr(sys, "argv", ["fleetfit"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(str(stop.value.code))


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (FleetfitError("It broke.", code="x", remedy="Mend it."), 2, "fleetfit: It broke. Mend it.\n"),
        (KeyboardInterrupt(), 130, "\nfleetfit: interrupted; the same command goes on from here\n"),
        (
            PermissionError(13, "Permission denied", "/x/y"),
            2,
            "fleetfit: Permission denied: /x/y. Look at that path, its permissions and the disk.\n",
        ),
        (click.exceptions.Exit(1), 1, ""),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    text: str,
) -> None:
    assert run_main(monkeypatch, error) == code
    assert capsys.readouterr().err == text


def test_output_that_nobody_reads_to_its_end_is_no_error() -> None:
    fleetfit = Path(sys.executable).with_name("fleetfit")
    script = f"{fleetfit} catalog show qwen2.5-7b-instruct | head -1"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""


def test_an_unknown_subcommand_is_a_usage_error() -> None:
    assert CliRunner().invoke(cli.cli, ["no-such"]).exit_code == 2
