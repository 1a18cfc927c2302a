"""Unpacking: the tree appears whole, and no archive writes, links or grants anything outside of it."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.artifact import Artifact, Unpack, inspect_artifact
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.unpack import unpack_archive


def info(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode = kind, target, mode
    return member


def make_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def artifact_of(path: Path, tree: Path, strip: int = 0, creates: str | None = None) -> Artifact:
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    return Artifact(path.name, len(content), sha256, str(path), unpack=Unpack(str(tree), strip, creates))


def unpack(path: Path, tree: Path, strip: int = 0, creates: str | None = None) -> Artifact:
    artifact = artifact_of(path, tree, strip, creates)
    unpack_archive(artifact, str(path), reserve_bytes=0)
    return artifact


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_a_tar_is_unpacked_with_links_and_modes(tmp_path: Path, mode: str) -> None:
    archive = make_tar(
        tmp_path / "engine.tar",
        (info("engine-1/bin", tarfile.DIRTYPE), b""),
        (info("engine-1/bin/server", mode=0o4777), b"program"),
        (info("engine-1/bin/copy", tarfile.LNKTYPE, "engine-1/bin/server"), b""),
        (info("engine-1/lib/so.1", mode=0o600), b"library"),
        (info("engine-1/lib/so", tarfile.SYMTYPE, "so.1"), b""),
        (info("engine-1/top", tarfile.SYMTYPE, "lib/../bin/server"), b""),
        mode=mode,
    )
    tree = tmp_path / "tree"
    artifact = unpack(archive, tree, strip=1, creates="bin/server")
    assert (tree / "top").read_bytes() == b"program"
    assert (tree / "lib/so").readlink() == Path("so.1")
    assert (tree / "bin/copy").stat().st_ino == (tree / "bin/server").stat().st_ino
    # Neither set-user-id nor for all to write; and readable by services.
    assert stat.S_IMODE((tree / "bin/server").stat().st_mode) == 0o755
    assert stat.S_IMODE((tree / "lib/so.1").stat().st_mode) == 0o644

    os.unlink(archive)
    assert inspect_artifact(artifact, str(tmp_path / "state")).present
    os.unlink(tree / "bin/server")
    assert not inspect_artifact(artifact, str(tmp_path / "state")).present


def test_a_zip_keeps_programs_and_links(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        program, link = zipfile.ZipInfo("bin/x"), zipfile.ZipInfo("x")
        program.external_attr, link.external_attr = 0o100755 << 16, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(program, b"program")
        archive.writestr(link, "bin/x")
    unpack(path, tmp_path / "tree")
    assert (tmp_path / "tree/x").read_bytes() == b"program"
    assert os.access(tmp_path / "tree/bin/x", os.X_OK)


EVIL = {
    "parent": [(info("../evil"), b"x")],
    "absolute": [(info("/tmp/evil"), b"x")],
    "parent after strip": [(info("a/../../evil"), b"x")],
    "absolute link": [(info("link", tarfile.SYMTYPE, "/etc/passwd"), b"")],
    "link to the parent": [(info("link", tarfile.SYMTYPE, ".."), b"")],
    "write through a link": [(info("link", tarfile.SYMTYPE, ".."), b""), (info("link/evil"), b"x")],
    # Each link looks harmless by its text; together they lead out.
    "chain of links": [
        (info("a/b/c/keep"), b"x"),
        (info("a/b/c/up", tarfile.SYMTYPE, "../../.."), b""),
        (info("out", tarfile.SYMTYPE, "a/b/c/up/../evil"), b""),
    ],
    "link behind a link": [
        (info("first", tarfile.SYMTYPE, "sub"), b""),
        (info("sub/keep"), b"x"),
        (info("first/second", tarfile.SYMTYPE, "../../evil"), b""),
    ],
    "hard link outside": [(info("hard", tarfile.LNKTYPE, "../../etc/passwd"), b"")],
    "hard link to nothing in it": [(info("hard", tarfile.LNKTYPE, "etc/passwd"), b"")],
    "file below a file": [(info("good/evil"), b"x")],
    "device": [(info("null", tarfile.CHRTYPE), b"")],
    "pipe": [(info("pipe", tarfile.FIFOTYPE), b"")],
}


def test_a_tar_whose_last_member_is_a_zip_is_a_tar(tmp_path: Path) -> None:
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("module.py", "")
    path = make_tar(
        tmp_path / "a.tar",
        (info("requirements.txt"), b"x\n"),
        (info("wheels/one.whl"), wheel.getvalue()),
        mode="w",
    )
    unpack(path, tmp_path / "tree", creates="requirements.txt")
    assert (tmp_path / "tree/wheels/one.whl").read_bytes() == wheel.getvalue()


@pytest.mark.parametrize("members", EVIL.values(), ids=list(EVIL))
def test_an_archive_that_leaves_its_tree_is_refused_whole(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    archive = make_tar(tmp_path / "evil.tar.gz", (info("good"), b"good"), *members)
    with pytest.raises(FleetfitError) as caught:
        unpack(archive, inner / "tree")
    assert caught.value.code == "archive_unsafe"
    assert list(inner.iterdir()) == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["evil.tar.gz", "inner"]


def test_a_new_archive_replaces_the_tree_of_the_old(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    unpack(make_tar(tmp_path / "1.tar.gz", (info("old"), b"1")), tree)
    unpack(make_tar(tmp_path / "2.tar.gz", (info("new"), b"2")), tree)
    assert (tree / "new").exists()
    assert not (tree / "old").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1.tar.gz", "2.tar.gz", "tree"]


def test_a_failed_archive_leaves_the_old_tree(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    unpack(make_tar(tmp_path / "1.tar.gz", (info("old"), b"1")), tree)
    with pytest.raises(FleetfitError, match="bin/x"):
        unpack(make_tar(tmp_path / "2.tar.gz", (info("new"), b"2")), tree, creates="bin/x")
    assert (tree / "old").read_bytes() == b"1"
    assert not (tmp_path / "tree.partial").exists()


def test_a_directory_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "precious").write_text("data")
    with pytest.raises(FleetfitError) as caught:
        unpack(make_tar(tmp_path / "1.tar.gz", (info("x"), b"1")), tree)
    assert caught.value.code == "unpack_dest_taken"
    assert (tree / "precious").read_text() == "data"


def test_leftovers_of_a_killed_run_do_not_matter(tmp_path: Path) -> None:
    for name in ("tree.partial", "tree.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    unpack(make_tar(tmp_path / "1.tar.gz", (info("x"), b"1")), tmp_path / "tree")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1.tar.gz", "tree"]
    assert not (tmp_path / "tree/half").exists()


def test_the_true_size_is_compared_with_the_disk_before_unpacking(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "bomb.tar.gz", (info("zeros"), bytes(30_000_000)))
    artifact = artifact_of(archive, tmp_path / "tree")
    assert artifact.size < 100_000
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(FleetfitError) as caught:
        unpack_archive(artifact, str(archive), reserve_bytes=free - 20_000_000)
    assert caught.value.code == "disk_too_small"
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize(("content", "code"), [(b"plain text", "archive_unknown"), (None, "archive_damaged")])
def test_what_is_no_archive_is_said_so(tmp_path: Path, content: bytes | None, code: str) -> None:
    path = make_tar(tmp_path / "x.tar.gz", (info("x"), os.urandom(100_000)))
    path.write_bytes(path.read_bytes()[:50_000] if content is None else content)
    with pytest.raises(FleetfitError) as caught:
        unpack(path, tmp_path / "tree")
    assert caught.value.code == code
