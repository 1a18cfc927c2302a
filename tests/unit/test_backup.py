"""Backups: exact copies, checked databases, kept with their releases, carried as one file."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import stat
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import backup
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.manifest import HostPaths

PLAIN = {"kind": "directory", "path": "/var/lib/fleetfit/page/data"}
WEBUI = {"kind": "open_webui", "path": "/var/lib/fleetfit/page/data"}
FACTS = {"version": "0.12.4", "environment": "/opt/fleetfit/page/envs/one"}


@pytest.fixture
def data(tmp_path: Path) -> tuple[HostPaths, Path]:
    """Return a host with a service's data."""
    folder = tmp_path / "var/lib/fleetfit/page/data"
    (folder / "deep").mkdir(parents=True)
    (folder / "webui.db").write_text("old")
    (folder / "deep" / "file").write_text("x")
    (folder / "deep" / "file").chmod(0o640)
    (folder / "link").symlink_to("webui.db")
    return HostPaths(str(tmp_path)), folder


def listing(folder: Path) -> list[Any]:
    """Return names, modes, owners, link targets and contents of a tree."""
    return sorted(
        (
            str(path.relative_to(folder)),
            path.lstat().st_mode,
            path.lstat().st_uid,
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "",
        )
        for path in folder.rglob("*")
    )


def test_a_backup_is_put_back_exactly_and_again(data: tuple[HostPaths, Path]) -> None:
    paths, folder = data
    before = listing(folder)
    done = backup.back_up(paths, "page", PLAIN, "abc", "1234567890")
    (folder / "webui.db").write_text("migrated")
    (folder / "new").write_text("x")
    backup.restore(paths, done)
    assert listing(folder) == before
    # Cut short between its two renames: what is there now is gone, and the copy still serves.
    folder.rename(folder.with_name("data.failed"))
    backup.restore(paths, done)
    assert listing(folder) == before
    assert os.listdir(folder.parent) == ["data"]
    assert stat.S_IMODE(os.stat(backup.backups_directory(paths, "page")).st_mode) == 0o700


def test_the_newest_backup_of_each_kept_release_stays(data: tuple[HostPaths, Path]) -> None:
    paths, _ = data
    for release, transaction in (("old", "1" * 8), ("kept", "2" * 8), ("kept", "3" * 8)):
        backup.back_up(paths, "page", PLAIN, release, transaction)
    directory = Path(backup.backups_directory(paths, "page"))
    (directory / "kept-44444444.partial").mkdir()
    (directory / ".pushed.tar").write_text("left by a run that was killed")
    removed = [os.path.basename(path) for path in backup.discard(paths, "page", ["kept"])]
    assert removed == [".pushed.tar", "kept-22222222", "kept-44444444.partial", "old-11111111"]
    assert os.listdir(directory) == ["kept-33333333"]
    assert backup.discard(paths, "nothing", ["kept"]) == []


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "tar", "path": "/var/lib/fleetfit/x"},
        {"kind": "directory", "path": "/etc"},
        {"kind": "directory"},
    ],
)
def test_what_is_not_ours_is_not_backed_up(spec: dict[str, Any]) -> None:
    with pytest.raises(FleetfitError) as caught:
        backup.check_backup(spec)
    assert caught.value.code == "bad_backup"


def test_no_room_is_said_with_both_sizes(data: tuple[HostPaths, Path]) -> None:
    paths, _ = data
    with pytest.raises(FleetfitError, match=r"needs .* GiB, .* has") as caught:
        backup.check_room(paths, "page", WEBUI, 2**60)
    assert caught.value.code == "disk_too_small"


def test_only_another_environment_can_migrate_the_database() -> None:
    one, other = {"environment": "/envs/one"}, {"environment": "/envs/two"}
    assert not backup.is_needed(WEBUI, one, dict(one))
    assert backup.is_needed(WEBUI, one, other)
    assert backup.is_needed(PLAIN, one, dict(one))


# --- Open WebUI's kind, with real databases ---


def chats_of(folder: Path) -> list[Any]:
    with closing(sqlite3.connect(folder / "webui.db")) as connection:
        return connection.execute("SELECT id, title FROM chat ORDER BY id").fetchall()


def make_database(folder: Path, chats: int, schema: str = "aaa") -> None:
    with closing(sqlite3.connect(folder / "webui.db")) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE chat (id INTEGER, title TEXT)")
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES (?)", (schema,))
        connection.executemany("INSERT INTO chat VALUES (?, ?)", [(n, f"chat {n}") for n in range(chats)])
        connection.commit()
    (folder / "webui.db").chmod(0o600)


@pytest.fixture
def webui(tmp_path: Path) -> tuple[HostPaths, Path]:
    """Return a host with Open WebUI's data: a database with 20 chats, and an upload."""
    folder = tmp_path / "var/lib/fleetfit/page/data"
    (folder / "uploads").mkdir(parents=True)
    (folder / "uploads" / "a.pdf").write_bytes(b"pdf")
    make_database(folder, 20)
    return HostPaths(str(tmp_path)), folder


def test_a_database_in_use_is_copied_whole(webui: tuple[HostPaths, Path]) -> None:
    """With a writer that has an open transaction, and pages that are in the write-ahead log only."""
    paths, folder = webui
    with closing(sqlite3.connect(folder / "webui.db")) as writer:
        writer.execute("INSERT INTO chat VALUES (100, 'committed')")
        writer.commit()
        writer.execute("INSERT INTO chat VALUES (101, 'not committed')")
        assert (folder / "webui.db-wal").stat().st_size > 0
        row = backup.take(paths, "page", WEBUI, "abc", FACTS)
    copy = Path(row["copy"])
    assert sorted(path.name for path in copy.iterdir()) == ["uploads", "webui.db"]
    assert len(chats_of(copy)) == 21
    assert (row["chats"], row["schema"], row["version"]) == (21, ["aaa"], "0.12.4")
    assert stat.S_IMODE((copy / "webui.db").stat().st_mode) == 0o600
    assert row["name"].startswith("manual-")


def test_a_damaged_database_is_not_taken_for_a_backup(webui: tuple[HostPaths, Path]) -> None:
    paths, folder = webui
    content = bytearray((folder / "webui.db").read_bytes())
    content[4096:8192] = b"\xff" * 4096
    (folder / "webui.db").write_bytes(content)
    with pytest.raises(FleetfitError) as caught:
        backup.back_up(paths, "page", WEBUI, "abc", "1234567890")
    assert caught.value.code == "backup_damaged"
    assert "webui.db" in str(caught.value)
    assert backup.list_backups(paths, "page") == []


def test_a_restored_database_has_no_log_of_the_one_it_replaced(webui: tuple[HostPaths, Path]) -> None:
    paths, folder = webui
    done = backup.back_up(paths, "page", WEBUI, "abc", "1234567890", FACTS)
    with closing(sqlite3.connect(folder / "webui.db")) as writer:
        writer.execute("DELETE FROM chat")
        writer.commit()
        backup.restore(paths, done)  # as after a kill: the old log is still there
    assert len(chats_of(folder)) == 20
    row = backup.backup_of_release(paths, "page", "abc")
    assert row is not None
    assert (row["copy"], row["environment"]) == (done["copy"], FACTS["environment"])


def test_what_an_operator_asked_for_stays_until_they_say_how_many(webui: tuple[HostPaths, Path]) -> None:
    paths, _ = webui
    names = [backup.take(paths, "page", WEBUI, "gone", FACTS)["name"] for _ in range(3)]
    assert len(set(names)) == 3
    assert backup.discard(paths, "page", []) == []
    assert backup.backup_of_release(paths, "page", "gone") is None
    newest = backup.find_backup(paths, "page", "latest")["name"]
    assert len(backup.delete_manual(paths, "page", 1)) == 2
    assert [row["name"] for row in backup.list_backups(paths, "page")] == [newest]


def test_an_unknown_name_is_answered_with_the_list(webui: tuple[HostPaths, Path]) -> None:
    paths, _ = webui
    with pytest.raises(FleetfitError, match="there is none"):
        backup.find_backup(paths, "page", "latest")
    row = backup.take(paths, "page", WEBUI, "abc", FACTS)
    with pytest.raises(FleetfitError) as caught:
        backup.find_backup(paths, "page", "manual-x")
    assert row["name"] in str(caught.value)
    assert "0.12.4" in str(caught.value)
    assert "20 chats" in str(caught.value)


def test_a_running_service_without_databases_of_its_own_is_not_copied(data: tuple[HostPaths, Path]) -> None:
    with pytest.raises(FleetfitError) as caught:
        backup.take(data[0], "page", PLAIN, "abc", FACTS)
    assert caught.value.code == "bad_backup"


def test_one_file_carries_a_backup_to_another_host(webui: tuple[HostPaths, Path], tmp_path: Path) -> None:
    paths, folder = webui
    row = backup.take(paths, "page", WEBUI, "abc", FACTS)
    place = tmp_path / "place"
    place.mkdir()
    done = backup.export_archive(row, str(place / "page.tar"))
    assert stat.S_IMODE(os.stat(done["path"]).st_mode) == 0o600
    other = HostPaths(str(tmp_path / "other"))
    imported = backup.import_archive(other, "page", done["path"])
    contents = [[(row[0], row[-1]) for row in listing(Path(each["copy"]))] for each in (imported, row)]
    assert contents[0] == contents[1]
    assert (imported["chats"], imported["version"]) == (20, "0.12.4")
    assert backup.import_archive(other, "page", done["path"])["name"] == imported["name"]
    backup.give_to_owner(imported["copy"], str(folder))
    assert len(chats_of(Path(imported["copy"]))) == 20


def archive_of(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return str(path)


def link(name: str, target: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    return entry


RECORD = json.dumps({"schema_version": 1, "service": "page", "made_at": 1.0, "release": "a"}).encode()


@pytest.mark.parametrize(
    "members",
    [
        {"backup.json": RECORD, "data/../../x": b"x"},
        {"backup.json": RECORD, "/etc/x": b"x"},
        {"backup.json": RECORD, "data/x": link("data/x", "/etc/shadow")},
        {"backup.json": RECORD, "other": b"x"},
        {"data/x": b"x"},
        {"backup.json": RECORD},
        {"backup.json": RECORD.replace(b"page", b"shop"), "data/x": b"x"},
        {"backup.json": RECORD.replace(b": 1,", b": 9,"), "data/x": b"x"},
        {"backup.json": b"{", "data/x": b"x"},
        {"backup.json": RECORD, "data/webui.db": backup.SQLITE_MAGIC + b"\xff" * 5000},
    ],
    ids=range(10),
)
def test_a_file_that_is_no_backup_leaves_nothing(tmp_path: Path, members: dict[str, Any]) -> None:
    paths = HostPaths(str(tmp_path / "host"))
    with pytest.raises(FleetfitError) as caught:
        backup.import_archive(paths, "page", archive_of(tmp_path / "a.tar", members))
    assert caught.value.code == "backup_damaged"
    assert os.listdir(backup.backups_directory(paths, "page")) == []
    assert not (tmp_path / "host/x").exists()


def test_a_file_that_is_no_archive_is_said_so(tmp_path: Path) -> None:
    paths = HostPaths(str(tmp_path / "host"))
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(FleetfitError, match="damaged"):
        backup.import_archive(paths, "page", str(tmp_path / "a.tar"))
    assert os.listdir(backup.backups_directory(paths, "page")) == []
