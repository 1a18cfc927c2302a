"""The transaction's decisions, its records, and the engine's accounting before a switch."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import backup, switch
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.manifest import HostPaths

MIB = 2**20
OK = {"ok": True}
NOT_OK = {"ok": False}
UNPROVEN = {"ok": True, "proof_due": True}

DECISIONS = [
    ("requested", "switch", None, "run"),
    ("requested", "restart", None, "run"),
    ("precheck", "switch", None, "refuse"),
    ("stop", "switch", None, "revert"),
    ("backup", "switch", None, "revert"),
    ("flip", "switch", None, "revert"),
    ("start", "switch", None, "revert"),
    ("gate", "switch", None, "revert"),
    ("gate", "switch", NOT_OK, "revert"),
    ("gate", "switch", OK, "complete"),
    ("gate", "switch", UNPROVEN, "revert"),
    ("prove", "switch", UNPROVEN, "revert"),
    ("prove", "switch", NOT_OK, "revert"),
    ("prove", "switch", OK, "complete"),
    ("record", "switch", OK, "complete"),
    ("revert_flip", "switch", NOT_OK, "revert"),
    ("revert_gate", "switch", None, "revert"),
    ("stop", "restart", None, "again"),
    ("gate", "restart", NOT_OK, "again"),
    ("prove", "restart", UNPROVEN, "again"),
    ("gate", "restart", OK, "complete"),
]


@pytest.mark.parametrize(("step", "kind", "gate", "decision"), DECISIONS)
def test_what_to_do_with_a_transaction_that_was_cut_short(
    step: str, kind: str, gate: Any, decision: str
) -> None:
    journal = {"state": "running", "step": step, "kind": kind, "gate": gate}
    assert switch.decide_recovery(journal) == decision
    for state in switch.FINAL_STATES:
        assert switch.decide_recovery({**journal, "state": state}) == "nothing"


def test_every_step_has_a_decision() -> None:
    decided = {step for step, *_ in DECISIONS}
    assert set(switch.FORWARD_STEPS) <= decided


FIT = "some log\nCUDA0 4096 448 304 \nCUDA1 10 20 30\nHost 292 0 12 \n"


def test_the_engines_accounting_is_read_in_mib() -> None:
    assert switch.parse_fit_params(FIT) == {"CUDA0": 4848 * MIB, "CUDA1": 60 * MIB, "Host": 304 * MIB}


@pytest.mark.parametrize(
    ("limits", "difference"),
    [
        ({"CUDA0": 4848 * MIB, "Host": 400 * MIB}, None),
        ({"CUDA0": 4848 * MIB - 1}, "the engine itself needs 4848 MiB on CUDA0, the plan allows 4847 MiB"),
        ({"CUDA2": 100 * MIB}, "the engine reported no memory for CUDA2, the plan puts 100 MiB there"),
        ({"CUDA2": 0}, None),
        ({}, None),
    ],
)
def test_both_numbers_are_said(limits: dict[str, int], difference: str | None) -> None:
    assert switch.compare_fit(switch.parse_fit_params(FIT), limits) == difference


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo CUDA0 1 2 3", "within the plan"),
        ("echo failed to load >&2; exit 3", "ended with 3: failed to load"),
        ("echo nothing", "printed no memory figures"),
    ],
)
def test_a_check_that_fails_says_how(script: str, message: str) -> None:
    precheck = {"kind": "llama_fit_params", "argv": ["/bin/sh", "-c", script], "limits": {"CUDA0": 6 * MIB}}
    result = switch.run_precheck("absent-in-tests", precheck, "/r", {})
    assert message in result["message"]
    assert result["ok"] is (message == "within the plan")


def test_a_check_whose_program_is_missing_says_so() -> None:
    precheck = {"kind": "llama_fit_params", "argv": ["{release}/absent"], "limits": {}}
    result = switch.run_precheck("absent-in-tests", precheck, "/nowhere", {})
    assert not result["ok"]
    assert "/nowhere/absent could not be run" in result["message"]


def test_hashes_tell_changed_missing_and_same(tmp_path: Path) -> None:
    paths = HostPaths(str(tmp_path))
    (tmp_path / "one").write_text("1")
    first = switch.hash_files(paths, ["/one", "/two"])
    assert first["/two"] is None
    assert switch.hash_files(paths, ["/one", "/two"]) == first
    (tmp_path / "one").write_text("2")
    assert switch.hash_files(paths, ["/one"])["/one"] != first["/one"]


def test_one_at_a_time(tmp_path: Path) -> None:
    paths = HostPaths(str(tmp_path))
    with switch.switch_lock(paths, "engine") as held:
        assert held
        with switch.switch_lock(paths, "engine") as again:
            assert not again
        with switch.switch_lock(paths, "other") as other:
            assert other
    with switch.switch_lock(paths, "engine") as held:
        assert held
    assert stat.S_IMODE(os.stat(paths.switch()).st_mode) == 0o700


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    paths = HostPaths(str(tmp_path))
    os.makedirs(paths.switch())
    for text in ('{"schema_version": 9}', "{", "[]"):
        Path(switch.journal_path(paths, "engine")).write_text(text)
        with pytest.raises(FleetfitError) as caught:
            switch.read_journal(paths, "engine")
        assert caught.value.code == "journal_unreadable"
    assert switch.read_journal(paths, "absent") is None


@pytest.fixture
def data(tmp_path: Path) -> tuple[HostPaths, Path]:
    """Return a host with a service's data."""
    folder = tmp_path / "var/lib/fleetfit/page/data"
    (folder / "deep").mkdir(parents=True)
    (folder / "webui.db").write_text("old")
    (folder / "deep" / "file").write_text("x")
    (folder / "deep" / "file").chmod(0o640)
    (folder / "link").symlink_to("webui.db")
    return HostPaths(str(tmp_path)), folder


SPEC = {"kind": "directory", "path": "/var/lib/fleetfit/page/data"}


def listing(folder: Path) -> list[Any]:
    """Return names, modes, owners, link targets and contents of a tree."""
    return sorted(
        (
            str(path.relative_to(folder)),
            path.lstat().st_mode,
            path.lstat().st_uid,
            os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else "",
        )
        for path in folder.rglob("*")
    )


def test_a_backup_is_put_back_exactly_and_again(data: tuple[HostPaths, Path]) -> None:
    paths, folder = data
    before = listing(folder)
    done = backup.back_up(paths, "page", SPEC, "abc", "1234567890")
    (folder / "webui.db").write_text("migrated")
    (folder / "new").write_text("x")
    backup.restore(paths, done)
    assert listing(folder) == before
    # Cut short between its two renames: what is there now is gone, and the copy still serves.
    folder.rename(folder.with_name("data.failed"))
    backup.restore(paths, done)
    assert listing(folder) == before
    assert os.listdir(folder.parent) == ["data"]
    assert stat.S_IMODE(os.stat(backup.backups_directory(paths, "page")).st_mode) == 0o700


def test_the_newest_backup_of_each_kept_release_stays(data: tuple[HostPaths, Path]) -> None:
    paths, _ = data
    for release, transaction in (("old", "1" * 8), ("kept", "2" * 8), ("kept", "3" * 8)):
        backup.back_up(paths, "page", SPEC, release, transaction)
    directory = Path(backup.backups_directory(paths, "page"))
    (directory / "kept-44444444.partial").mkdir()
    removed = [os.path.basename(path) for path in backup.discard(paths, "page", ["kept"])]
    assert removed == ["kept-22222222", "kept-44444444.partial", "old-11111111"]
    assert os.listdir(directory) == ["kept-33333333"]
    assert backup.discard(paths, "nothing", ["kept"]) == []


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "tar", "path": "/var/lib/fleetfit/x"},
        {"kind": "directory", "path": "/etc"},
        {"kind": "directory"},
    ],
)
def test_what_is_not_ours_is_not_backed_up(spec: dict[str, Any]) -> None:
    with pytest.raises(FleetfitError) as caught:
        backup.check_backup(spec)
    assert caught.value.code == "bad_backup"
