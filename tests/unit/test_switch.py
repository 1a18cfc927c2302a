"""The transaction's decisions, its records, and the engine's accounting before a switch."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import switch
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
    ("put_back", "rollback", None, "revert"),
    ("put_back", "restore", None, "revert"),
    ("flip", "switch", None, "revert"),
    ("gate", "restore", NOT_OK, "revert"),
    ("gate", "rollback", OK, "complete"),
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


def transaction(paths: HostPaths, kind: str, came_from: str, to: str) -> switch.Transaction:
    journal: dict[str, Any] = {"service": "engine", "kind": kind, "from": came_from, "to": to, "hashes": {}}
    journal.update(steps=[], started_at=None)
    return switch.Transaction(paths, journal)


def test_going_back_keeps_the_order_and_holds_until_the_next_switch(tmp_path: Path) -> None:
    paths = HostPaths(str(tmp_path))
    os.makedirs(paths.switch())

    def commit(kind: str, came_from: str, to: str) -> dict[str, Any]:
        work = transaction(paths, kind, came_from, to)
        work._remember(to, OK, work._hold())
        return switch.read_good(paths, "engine")

    commit("switch", "", "a")
    commit("switch", "a", "b")
    good = commit("rollback", "b", "a")
    assert (good["sequence"], good["history"]) == (["b", "a"], ["a", "b"])
    assert (good["hold"]["release"], good["hold"]["instead_of"]) == ("a", "b")
    for kind in ("restart", "restore"):
        assert commit(kind, "a", "a")["hold"]["release"] == "a"
    good = commit("switch", "a", "c")
    assert (good["sequence"], good["hold"]) == (["c", "b", "a"], None)
    commit("rollback", "c", "b")
    switch.end_hold(paths, "engine")
    assert switch.read_good(paths, "engine")["hold"] is None
    assert switch.read_good(paths, "engine")["history"][0] == "b"


def test_a_record_of_an_older_fleetfit_is_read(tmp_path: Path) -> None:
    paths = HostPaths(str(tmp_path))
    os.makedirs(paths.switch())
    Path(switch.good_path(paths, "engine")).write_text('{"schema_version": 1, "history": ["b", "a"]}')
    good = switch.read_good(paths, "engine")
    assert (good["sequence"], good["hold"]) == (["b", "a"], None)


def test_what_a_failed_restore_did_is_said(tmp_path: Path) -> None:
    journal = {
        **{"service": "page", "kind": "restore", "from": "a", "to": "a", "state": "reverted"},
        **{"put_back": {"name": "manual-1"}, "revert_gate": OK},
        "cause": {"step": "gate", "state": "crashed", "message": "it ended"},
    }
    message, code, _ = switch.explain_failure(journal)
    assert code == "gate_failed"
    assert "manual-1" in message
    assert "The data that it replaced is back" in message
