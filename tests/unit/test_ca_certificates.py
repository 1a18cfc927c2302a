"""Promises of module_utils.ca_certificates: the bundle itself decides, stale files go, bad input is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.ca_certificates import (
    TRUST_STORES,
    TrustStore,
    apply_changes,
    certificate_bodies,
    check_certificates,
    find_trust_store,
    plan_changes,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

STORE = TRUST_STORES[0]
PEM = "-----BEGIN CERTIFICATE-----\nTUlJQ\nkFB\n-----END CERTIFICATE-----\n"
OTHER = PEM.replace("kFB", "zzz")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / STORE.directory.lstrip("/")).mkdir(parents=True)
    (tmp_path / STORE.bundle.lstrip("/")).parent.mkdir(parents=True)
    (tmp_path / STORE.bundle.lstrip("/")).write_text(OTHER)
    return tmp_path


def test_bodies_ignore_line_breaks() -> None:
    assert certificate_bodies(PEM) == certificate_bodies(PEM.replace("\nkFB", "kFB")) == ["TUlJQkFB"]


def test_new_authority_is_written_and_bundle_rebuilt(root: Path) -> None:
    changes = plan_changes({"proxy": PEM}, STORE, str(root))
    assert [Path(path).name for path in changes.write] == ["fleetfit-proxy.crt"]
    calls: list[list[str]] = []
    apply_changes(changes, STORE, lambda argv: (calls.append(argv), (0, "", ""))[1])
    assert calls == [["/usr/sbin/update-ca-certificates"]]
    assert (root / STORE.directory.lstrip("/") / "fleetfit-proxy.crt").read_text() == PEM


def test_nothing_to_do_when_bundle_holds_it(root: Path) -> None:
    (root / STORE.directory.lstrip("/") / "fleetfit-proxy.crt").write_text(PEM)
    (root / STORE.bundle.lstrip("/")).write_text(OTHER + PEM)
    assert not plan_changes({"proxy": PEM}, STORE, str(root)).any


@pytest.mark.parametrize("store", TRUST_STORES, ids=["Debian", "Red Hat"])
def test_each_family_has_its_own_store(tmp_path: Path, store: TrustStore) -> None:
    program = tmp_path / store.command[0].lstrip("/")
    program.parent.mkdir(parents=True)
    program.touch()
    assert find_trust_store(str(tmp_path)) == store
    calls: list[list[str]] = []
    changes = plan_changes({"proxy": PEM}, store, str(tmp_path))
    apply_changes(changes, store, lambda argv: (calls.append(argv), (0, "", ""))[1])
    assert (tmp_path / store.directory.lstrip("/") / "fleetfit-proxy.crt").read_text() == PEM
    assert calls == [list(store.command)]
    (tmp_path / store.bundle.lstrip("/")).parent.mkdir(parents=True)
    (tmp_path / store.bundle.lstrip("/")).write_text(PEM)
    assert not plan_changes({"proxy": PEM}, store, str(tmp_path)).any


def test_killed_between_copy_and_rebuild_is_finished(root: Path) -> None:
    (root / STORE.directory.lstrip("/") / "fleetfit-proxy.crt").write_text(PEM)
    changes = plan_changes({"proxy": PEM}, STORE, str(root))
    assert changes.rebuild
    assert not changes.write


def test_only_our_own_stale_files_are_removed(root: Path) -> None:
    directory = root / STORE.directory.lstrip("/")
    (directory / "fleetfit-old.crt").write_text(PEM)
    (directory / "corporate.crt").write_text(PEM)
    assert [Path(path).name for path in plan_changes({}, STORE, str(root)).remove] == ["fleetfit-old.crt"]


@pytest.mark.parametrize(
    ("certificates", "code"),
    [({"../x": PEM}, "bad_certificate_name"), ({"x": "not pem"}, "not_a_certificate")],
)
def test_bad_input_is_named(certificates: dict[str, str], code: str) -> None:
    with pytest.raises(FleetfitError) as caught:
        check_certificates(certificates)
    assert caught.value.code == code


def test_host_without_a_trust_store(tmp_path: Path) -> None:
    with pytest.raises(FleetfitError, match="ca-certificates"):
        find_trust_store(str(tmp_path))


def test_failing_rebuild_is_told(root: Path) -> None:
    with pytest.raises(FleetfitError, match="exit code 3: broken"):
        apply_changes(plan_changes({"p": PEM}, STORE, str(root)), STORE, lambda _: (3, "", "x\nbroken"))
