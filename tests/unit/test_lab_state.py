"""Promises of lab.state and lab.paths: what a killed run or a reboot left is recognised; two labs never meet."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

from fleetfit.lab.paths import FIRST_PORT, PORT_COUNT, LabPaths, write_atomically
from fleetfit.lab.state import (
    ContainerInfo,
    HostRecord,
    LabState,
    host_action,
    read_state,
    write_state,
)

RECORD = HostRecord("c1", 21000, "root", "lab", "spec-1")


@pytest.mark.parametrize(
    ("actual", "record", "action"),
    [
        (None, None, "create"),  # first run
        (None, RECORD, "create"),  # somebody removed the container
        (ContainerInfo("c1", True, "spec-1"), RECORD, "keep"),
        (ContainerInfo("c1", False, "spec-1"), RECORD, "start"),  # after a reboot
        (ContainerInfo("c1", False, "spec-1"), None, "recreate"),  # killed before it was whole
        (ContainerInfo("c1", True, "spec-1"), None, "recreate"),
        (ContainerInfo("c2", True, "spec-1"), RECORD, "recreate"),  # not the one that was recorded
        (ContainerInfo("c1", True, "spec-0"), RECORD, "recreate"),  # made from an older image
    ],
)
def test_host_action(actual: ContainerInfo | None, record: HostRecord | None, action: str) -> None:
    assert host_action("spec-1", actual, record) == action


def test_state_comes_back_as_written(tmp_path: Path) -> None:
    paths = LabPaths(tmp_path)
    state = LabState(hosts={"a": RECORD}, forwards={"a open-webui": 22000})
    write_state(paths, state)
    assert read_state(paths) == state


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 1, "hosts": {"a": {}}}']
)
def test_a_broken_state_file_is_no_state(tmp_path: Path, text: str) -> None:
    write_atomically(tmp_path / ".lab/state.json", text)
    assert read_state(LabPaths(tmp_path)) == LabState()


def test_a_folder_in_the_states_place_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lab/state.json").mkdir(parents=True)
    with pytest.raises(FleetfitError, match=r"state\.json is no file") as caught:
        read_state(LabPaths(tmp_path))
    assert caught.value.remedy


def test_a_state_of_another_version_is_named(tmp_path: Path) -> None:
    write_atomically(tmp_path / ".lab/state.json", json.dumps({"schema_version": 9, "hosts": {}}))
    with pytest.raises(FleetfitError, match="schema version 9"):
        read_state(LabPaths(tmp_path))


def test_two_checkouts_share_no_name_and_no_first_port(tmp_path: Path) -> None:
    one, other = LabPaths(tmp_path / "one"), LabPaths(tmp_path / "other")
    assert one.network != other.network
    assert one.container("gpu-large") != other.container("gpu-large")
    assert next(one.port_candidates("ssh a")) != next(other.port_candidates("ssh a"))


def test_port_candidates_are_stable_and_cover_the_range_once(tmp_path: Path) -> None:
    paths = LabPaths(tmp_path)
    ports = list(paths.port_candidates("ssh a"))
    assert sorted(ports) == list(range(FIRST_PORT, FIRST_PORT + PORT_COUNT))
    assert list(itertools.islice(paths.port_candidates("ssh a"), 3)) == ports[:3]


def test_write_atomically_says_whether_it_changed_anything(tmp_path: Path) -> None:
    path = tmp_path / "folder/file"
    assert write_atomically(path, "one") is True
    assert path.stat().st_mode & 0o777 == 0o600
    assert write_atomically(path, "one") is False
    assert write_atomically(path, "two") is True
    assert [item.name for item in path.parent.iterdir()] == ["file"]
