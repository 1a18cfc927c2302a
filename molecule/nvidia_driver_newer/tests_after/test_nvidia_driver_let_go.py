"""What is left after the role let the driver go; the scenario's side_effect asserts what came before that."""

from __future__ import annotations

import json

import pytest
from testinfra.host import Host


def test_nothing_is_held_and_the_driver_is_still_there(machine: Host) -> None:
    assert machine.check_output("apt-mark showhold") == ""
    assert machine.package("libcuda1").version == "580.105.08-1"


@pytest.mark.parametrize("folder", ["/etc/apt", "/etc/modprobe.d", "/etc/modules-load.d"])
def test_no_file_of_the_role_is_left(machine: Host, folder: str) -> None:
    assert machine.check_output(f"find {folder} -name '*fleetfit-nvidia*'") == ""


def test_the_manifest_has_no_driver(machine: Host) -> None:
    manifest = json.loads(machine.file("/etc/fleetfit/manifest.json").content_string)
    assert "nvidia_driver" not in manifest["sections"]
