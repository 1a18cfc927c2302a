"""The host helper: the same bytes everywhere, sent once, never pulled from under a running unit."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.helper_install import (
    current_digest,
    current_helper,
    install_helper,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.host_helper import archive_digest
from ansible_collections.fleetfit.llm.plugins.plugin_utils.helper_zip import MODULE_UTILS, build_helper_zip


def install(libexec: Path, archive: bytes, *, send: bool = True, **options: object):
    sha256 = hashlib.sha256(archive).hexdigest()
    return install_helper(
        str(libexec), sha256, archive if send else None, root=str(libexec.parent), **options
    )


def test_two_builds_give_the_same_bytes() -> None:
    first = build_helper_zip.__wrapped__()
    assert first == build_helper_zip.__wrapped__()


def test_no_module_util_imports_the_collection_by_name() -> None:
    # Under the name fleetfit_host there is no ansible_collections: such an import breaks it on every host.
    guilty = {
        f"{path.name}: {name}"
        for path in MODULE_UTILS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in [getattr(node, "module", None) or node.names[0].name]
        if name.startswith("ansible")
    }
    assert guilty == set()


def test_the_archive_runs_isolated_and_knows_its_digest(tmp_path: Path) -> None:
    archive = build_helper_zip()
    install(tmp_path / "libexec", archive)
    path = tmp_path / "libexec" / "current" / "fleetfit-host.pyz"
    done = subprocess.run(
        [sys.executable, "-I", path, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"fleetfit-host {archive_digest(archive)}\n"
    wrong = subprocess.run([sys.executable, "-I", path, "nonsense"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("usage: fleetfit-host.pyz")


def test_an_installed_helper_needs_no_bytes_and_no_change(tmp_path: Path) -> None:
    libexec = tmp_path / "libexec"
    assert install(libexec, b"one", send=False).missing
    assert not libexec.exists()
    assert install(libexec, b"one").changed
    again = install(libexec, b"one", send=False)
    assert not again.changed
    assert not again.missing
    assert current_helper(str(libexec)) == str(libexec / archive_digest(b"one") / "fleetfit-host.pyz")


def test_a_damaged_helper_is_asked_for_again(tmp_path: Path) -> None:
    libexec = tmp_path / "libexec"
    install(libexec, b"one")
    (libexec / "current" / "fleetfit-host.pyz").write_bytes(b"damaged")
    assert install(libexec, b"one", send=False).missing


def test_bytes_with_another_hash_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FleetfitError) as caught:
        install_helper(str(tmp_path / "libexec"), "0" * 64, b"one", root=str(tmp_path))
    assert caught.value.code == "helper_corrupt"
    assert current_digest(str(tmp_path / "libexec")) is None


def test_check_mode_reports_and_changes_nothing(tmp_path: Path) -> None:
    libexec = tmp_path / "libexec"
    assert install(libexec, b"one", send=False, check_mode=True).changed
    assert not libexec.exists()


@pytest.mark.parametrize("user", ["process", "transient unit"])
def test_an_old_helper_in_use_stays_until_nothing_runs_it(tmp_path: Path, user: str) -> None:
    libexec = tmp_path / "libexec"
    install(libexec, b"one")
    old = libexec / archive_digest(b"one")
    if user == "process":
        holder = tmp_path / "proc" / "4242" / "cmdline"
        text = f"/usr/bin/python3\0-I\0{old}/fleetfit-host.pyz\0download\0"
    else:
        holder = tmp_path / "run/systemd/transient/fleetfit-download-1.service"
        text = f'ExecStart="/usr/bin/python3" "-I" "{old}/fleetfit-host.pyz" "download"\n'
    holder.parent.mkdir(parents=True)
    holder.write_text(text)

    assert install(libexec, b"two").removed == []
    assert current_digest(str(libexec)) == archive_digest(b"two")
    assert old.exists()

    os.unlink(holder)
    assert install(libexec, b"two").removed == [old.name]
    assert not old.exists()
