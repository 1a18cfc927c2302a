"""Hosts of the scenario for its tests, over the lab's own SSH configuration."""

from __future__ import annotations

import os

import pytest
import testinfra
from testinfra.host import Host

HOSTS = ("molecule-bookworm", "molecule-trixie")


@pytest.fixture(scope="session", params=HOSTS)
def machine(request: pytest.FixtureRequest) -> Host:
    """Return each host of the scenario, as root."""
    return testinfra.get_host(f"ssh://{request.param}", ssh_config=os.environ["LAB_SSH_CONFIG"])
