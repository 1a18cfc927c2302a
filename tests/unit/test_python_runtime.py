"""Promises of module_utils.python_runtime: the system's Python first, then an archive, else a sentence."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.python_runtime import (
    choose_environment,
    choose_interpreter,
    needed_bytes,
    source_of,
)

HOST = {"arch": "x86_64", "glibc": "2.36"}


def archive(version: str, /, **changes: Any) -> dict[str, Any]:
    entry = {
        "version": version,
        "arch": "x86_64",
        "glibc": "2.34",
        "size": 1,
        "sha256": "a" * 64,
        "url": "http://m/x",
    }
    return {**entry, **changes}


def wheelhouse(python: str, **changes: Any) -> dict[str, Any]:
    entry = {
        "python": python,
        "arch": "x86_64",
        "glibc": "2.34",
        "size": 1,
        "sha256": "b" * 64,
        "url": "http://m/w",
    }
    return {**entry, **changes}


def test_the_systems_own_is_preferred() -> None:
    choice = choose_interpreter(["3.12", "3.11"], [archive("3.12.1")], system_python="3.11.2", **HOST)
    assert choice == {"minor": "3.11", "path": "/usr/bin/python3.11", "archive": None}


def test_a_managed_one_where_the_system_has_none() -> None:
    choice = choose_interpreter(["3.12", "3.11"], [archive("3.11.7")], system_python="3.13.5", **HOST)
    assert choice["path"] == "/opt/fleetfit/python/3.11.7-aaaaaaaaaaaaaaaa/bin/python3.11"


@pytest.mark.parametrize("changes", [{"arch": "aarch64"}, {"glibc": "2.39"}, {"version": "3.10.1"}])
def test_an_archive_that_does_not_fit_is_no_choice(changes: dict[str, str]) -> None:
    with pytest.raises(
        FleetfitError, match=r"3\.12 or 3\.11 is wanted, the host's own is 3\.13\.5"
    ) as caught:
        choose_interpreter(["3.12", "3.11"], [archive("3.11.7", **changes)], system_python="3.13.5", **HOST)
    assert "python_runtime_archives" in str(caught.value)


def test_versions_are_compared_as_numbers() -> None:
    choice = choose_interpreter(
        ["3.11"], [archive("3.11.7", glibc="2.9")], system_python="3.9.1", arch="x86_64", glibc="2.34"
    )
    assert choice["archive"] is not None


def test_environment_takes_the_wheelhouse_of_a_python_that_the_host_can_have() -> None:
    choice = choose_environment(
        "open-webui", [wheelhouse("3.12"), wheelhouse("3.11")], [], system_python="3.11.2", **HOST
    )
    assert choice["wheelhouse"]["python"] == "3.11"
    assert choice["environment"].startswith("/opt/fleetfit/open-webui/envs/")


def test_environment_is_named_by_wheelhouse_and_interpreter() -> None:
    def path(system_python: str, **changes: str) -> str:
        return str(
            choose_environment(
                "s", [wheelhouse("3.11", **changes)], [archive("3.11.7")], system_python=system_python, **HOST
            )["environment"]
        )

    assert len({path("3.11.2"), path("3.13.5"), path("3.11.2", sha256="c" * 64)}) == 3
    assert path("3.11.2") == path("3.11.9")  # an update of the system's Python keeps the environment


def test_no_wheelhouse_for_the_architecture_is_told() -> None:
    with pytest.raises(FleetfitError, match="None of the 1 wheelhouses of s fits x86_64"):
        choose_environment("s", [wheelhouse("3.11", arch="aarch64")], [], system_python="3.11.2", **HOST)


def test_sources() -> None:
    assert source_of({"url": "http://m/x", "path": "/x"}) == {"type": "http", "url": "http://m/x"}
    assert source_of({"path": "/x"}) == {"type": "file", "path": "/x", "location": "controller"}
    with pytest.raises(FleetfitError, match="neither url nor path"):
        source_of({"sha256": "0"})


def test_an_environment_needs_its_wheels_and_what_they_become() -> None:
    assert needed_bytes(wheelhouse("3.11", size=100, environment_size=350)) == 450
    assert needed_bytes(wheelhouse("3.11", size=100)) == 500
    choice = choose_environment("s", [wheelhouse("3.11", size=100)], [], system_python="3.11.2", **HOST)
    assert choice["needed_bytes"] == 500
