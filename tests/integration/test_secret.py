"""The module secret, through Ansible: where a secret comes from, where it goes, and where it never is."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ANSIBLE = Path(sys.executable).with_name("ansible")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Return (the file on the host, the controller's store)."""
    return tmp_path / "host" / "credentials" / "engine.api-key", tmp_path / "store"


def run(
    folders: tuple[Path, Path], *options: str, environment: dict[str, str] | None = None, **arguments: Any
) -> tuple[dict[str, Any], str]:
    """Run the module once on this machine, as talkative as it can be; return its result and all output."""
    path, store = folders
    given = {"name": "engine.api-key", "path": str(path), "store_dir": str(store), **arguments}
    done = subprocess.run(
        [
            *[str(ANSIBLE), "localhost", "--inventory", "localhost,", "--connection", "local", "-vvvv"],
            *["--extra-vars", f"ansible_python_interpreter={sys.executable}"],
            *["--module-name", "fleetfit.llm.secret", "--args", json.dumps(given), *options],
        ],
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("AWX_")},
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    text = done.stdout + done.stderr
    start = done.stdout.index("=> {") + 3
    result, _ = json.JSONDecoder().raw_decode(done.stdout[start:])
    return result, text


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_generated_secret_is_kept_on_both_sides_and_said_nowhere(folders: tuple[Path, Path]) -> None:
    path, store = folders
    result, text = run(folders, length=40)
    secret = path.read_text()
    assert (result["changed"], result["origin"]) == (True, "generated")
    assert len(secret) == 40
    assert secret.isalnum()
    assert (store / "engine.api-key").read_text() == secret
    assert secret not in text
    assert (mode(path), mode(store / "engine.api-key"), mode(store), mode(path.parent)) == (
        0o600,
        0o600,
        0o700,
        0o700,
    )
    assert (store / ".gitignore").read_text() == "*\n"

    again, _ = run(folders)
    assert (again["changed"], again["origin"]) == (False, "store")
    assert path.read_text() == secret


def test_a_host_that_lost_its_file_gets_the_stores_secret_again(folders: tuple[Path, Path]) -> None:
    path, store = folders
    store.mkdir()
    (store / "engine.api-key").write_text("kept-by-the-store\n")
    result, text = run(folders)
    assert (result["changed"], result["origin"], path.read_text()) == (True, "store", "kept-by-the-store")
    assert "kept-by-the-store" not in text


def test_a_hosts_own_secret_is_adopted_and_not_replaced(folders: tuple[Path, Path]) -> None:
    path, store = folders
    path.parent.mkdir(parents=True)
    path.write_text("made-by-hand-on-the-host")
    path.chmod(0o600)
    result, text = run(folders)
    assert (result["changed"], result["origin"]) == (True, "host")
    assert (store / "engine.api-key").read_text() == path.read_text() == "made-by-hand-on-the-host"
    assert "made-by-hand-on-the-host" not in text
    assert run(folders)[0]["changed"] is False


def test_a_variable_wins_and_rights_are_put_right(folders: tuple[Path, Path]) -> None:
    path, store = folders
    path.parent.mkdir(parents=True)
    path.write_text("rotated-by-variable")
    path.chmod(0o644)
    result, text = run(folders, value="rotated-by-variable")
    assert (result["changed"], result["origin"], mode(path)) == (True, "value", 0o600)
    assert not store.exists()
    # The command line of this test holds the value; what Ansible made of it must not.
    assert text.count("rotated-by-variable") == 0


def test_check_mode_generates_and_writes_nothing(folders: tuple[Path, Path]) -> None:
    path, store = folders
    result, _ = run(folders, "--check")
    assert result["changed"] is True
    assert not path.exists()
    assert not store.exists()


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [({"store_dir": ""}, {}), ({}, {"AWX_PRIVATE_DATA_DIR": "/tmp/job"})],
)
def test_nothing_is_generated_that_nobody_would_keep(
    folders: tuple[Path, Path], arguments: dict[str, str], environment: dict[str, str]
) -> None:
    path, _ = folders
    result, _ = run(folders, environment=environment, **arguments)
    assert result["code"] == "no_secret_store"
    assert "variable" in result["msg"]
    assert not path.exists()


def test_ansible_runner_alone_is_not_taken_for_awx(folders: tuple[Path, Path]) -> None:
    path, store = folders
    result, _ = run(folders, environment={"AWX_ISOLATED_DATA_DIR": "/tmp/artifacts"})
    assert (result["changed"], result["origin"]) == (True, "generated")
    assert path.read_text() == (store / "engine.api-key").read_text()


def test_a_value_that_is_no_secret_is_refused_without_repeating_it(folders: tuple[Path, Path]) -> None:
    result, _ = run(folders, value="two\nlines-of-text")
    assert result["code"] == "bad_secret"
    assert "lines-of-text" not in result["msg"]
