"""The host helper: the same bytes everywhere, sent once, never pulled from under a running unit."""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.helper_install import (
    current_digest,
    current_helper,
    install_helper,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.host_helper import SUBCOMMANDS, archive_digest
from ansible_collections.fleetfit.llm.plugins.plugin_utils import helper_zip
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


@functools.cache
def python_of(version: str) -> str:
    """Return a CPython of this version, or skip."""
    managed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [f"/usr/bin/python{version}", shutil.which(f"python{version}")]
    for candidate in [*candidates, *managed.glob(f"{version}.*/bin/python{version}")]:
        # A version manager's shim stands on PATH and does not start.
        if candidate and shutil.which(candidate) and subprocess.run([candidate, "-c", ""]).returncode == 0:
            return str(candidate)
    pytest.skip(f"no CPython {version} on this machine")


def packed() -> dict[str, str]:
    """Return the modules in the helper's package and their sources."""
    with zipfile.ZipFile(io.BytesIO(build_helper_zip())) as archive:
        return {
            Path(name).stem: archive.read(name).decode()
            for name in archive.namelist()
            if name.startswith(f"{helper_zip.PACKAGE}/")
        }


@pytest.mark.parametrize("version", ["3.9", "3.11", "3.13"])
@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_every_subcommand_is_complete_in_the_archive(tmp_path: Path, version: str, subcommand: str) -> None:
    python = python_of(version)
    program = tmp_path / "fleetfit-host.pyz"
    program.write_bytes(build_helper_zip())
    module, function = SUBCOMMANDS[subcommand]
    code = (
        f"import importlib, sys; sys.path.insert(0, {str(program)!r})\n"
        f"getattr(importlib.import_module('fleetfit_host.{module}'), {function!r})"
    )
    subprocess.run([python, "-I", "-c", code], check=True, cwd="/")
    # download takes a folder and no options.
    arguments = ["/nonexistent"] if subcommand == "download" else ["--help"]
    done = subprocess.run([python, "-I", program, subcommand, *arguments], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if subcommand == "download" else 0), done.stderr


def test_what_the_archive_imports_late_is_in_it_too() -> None:
    # Not by the code that collects them: a text search, which sees imports inside functions as well.
    modules = packed()
    for name, source in modules.items():
        for match in re.finditer(r"^\s*from \.(\w*) import ([^(\n]+)", source, re.MULTILINE):
            wanted = [match[1]] if match[1] else [part.split()[0] for part in match[2].split(",")]
            assert set(wanted) <= set(modules), f"{name}: {match[0].strip()}"


@pytest.mark.parametrize(("edited", "same"), [("selection", True), ("plan", True), ("switch", False)])
def test_an_edit_of_what_hosts_do_not_run_leaves_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: str, same: bool
) -> None:
    before = build_helper_zip.__wrapped__()
    copy = tmp_path / "module_utils"
    shutil.copytree(MODULE_UTILS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / f"{edited}.py").open("a") as stream:
        stream.write("# edited\n")
    monkeypatch.setattr(helper_zip, "MODULE_UTILS", copy)
    assert (build_helper_zip.__wrapped__() == before) is same


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
