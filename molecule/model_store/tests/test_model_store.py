"""What a host is like after the role model_store."""

from __future__ import annotations

import json
from typing import Any

import pytest
from testinfra.host import Host

MODELS = "/var/lib/fleetfit/models"


@pytest.fixture(scope="module")
def section(machine: Host) -> dict[str, Any]:
    manifest = json.loads(machine.file("/etc/fleetfit/manifest.json").content_string)
    return dict(manifest["sections"]["model_store"])


def test_every_file_is_whole(machine: Host, section: dict[str, Any]) -> None:
    assert section["files"]
    for file in section["files"]:
        path = f"{MODELS}/{section['model']}/{section['variant']}/{file['name']}"
        assert machine.check_output(f"sha256sum {path}").split()[0] == file["sha256"]
        assert machine.file(path).size == file["size"]


def test_services_can_read_and_nobody_else(machine: Host, section: dict[str, Any]) -> None:
    directory = f"{MODELS}/{section['model']}/{section['variant']}"
    for file in section["files"]:
        found = machine.file(f"{directory}/{file['name']}")
        assert (found.user, found.group, found.mode) == ("root", "fleetfit-models", 0o640)
    assert machine.run(f"runuser -u nobody -- ls {directory}").rc != 0
    assert machine.run(f"runuser -u nobody -g fleetfit-models -- ls {directory}").rc == 0


def test_nothing_half_written_is_visible(machine: Host) -> None:
    assert machine.check_output(f"find {MODELS} -name '*.partial*'") == ""
