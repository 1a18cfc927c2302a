"""This scenario has one host."""

from __future__ import annotations

import os

import pytest
import testinfra
from testinfra.host import Host


@pytest.fixture(scope="session")
def machine() -> Host:
    """Return the scenario's host, as root."""
    return testinfra.get_host("ssh://molecule-bookworm", ssh_config=os.environ["LAB_SSH_CONFIG"])
