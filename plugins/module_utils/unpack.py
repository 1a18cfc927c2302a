"""Unpacking an archive beside its place and renaming the tree whole; an archive cannot write anywhere else.

Python's own filter for this is missing from some Python 3.9 and 3.11 that hosts run, so the rules stand here:
names stay inside the tree, only files, directories and links are made, links point inside, no set-user-id
bits, and no symbolic link exists while files are written, so that none can be followed.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from typing import IO, Callable, Optional, Union

from .artifact import (
    MARKER_NAME,
    SCHEMA_VERSION,
    Artifact,
    existing_parent,
    make_parent,
    read_json,
    require_free,
    set_attributes,
    sync_path,
    write_json,
)
from .errors import FleetfitError
from .units import MIB

_COPY_BYTES = 1 * MIB
_LONGEST_PATH_BYTES = 4096  # PATH_MAX of Linux (limits.h)
_BLOCK_BYTES = 4096  # what the smallest file and directory take on common file systems


@dataclass
class _Member:
    name: str  # inside the tree, after strip
    kind: str  # file, directory, symlink, hardlink
    mode: int
    size: int
    target: str
    handle: Union[tarfile.TarInfo, zipfile.ZipInfo]


def unpack_archive(artifact: Artifact, archive_path: str, reserve_bytes: int) -> None:
    """Unpack the verified archive at ``archive_path`` to ``artifact.unpack.dest``, whole or not at all.

    A tree from another archive is replaced; a directory that fleetfit did not unpack is refused
    (``unpack_dest_taken``). Raises FleetfitError also for ``archive_unsafe``, ``archive_damaged``,
    ``archive_unknown`` and ``disk_too_small``.
    """
    unpack = artifact.unpack
    if unpack is None:
        raise ValueError("the artifact is not to be unpacked")
    require_ours(artifact, unpack.dest)
    make_parent(unpack.dest)
    partial, old = f"{unpack.dest}.partial", f"{unpack.dest}.old"
    for leftover in (partial, old):
        if os.path.lexists(leftover):
            shutil.rmtree(leftover)
    try:
        _extract(archive_path, partial, artifact.name, unpack.strip, reserve_bytes)
        if unpack.creates and not os.path.lexists(os.path.join(partial, unpack.creates)):
            raise FleetfitError(
                f"The archive {artifact.name} does not contain {unpack.creates} "
                f"({unpack.strip} leading path parts removed).",
                code="archive_unexpected",
                remedy="Correct unpack.strip or unpack.creates, or use another archive.",
            )
        if artifact.owner or artifact.group:
            _give_to(partial, artifact.owner, artifact.group)
        write_json(
            os.path.join(partial, MARKER_NAME),
            {
                "schema_version": SCHEMA_VERSION,
                "name": artifact.name,
                "sha256": artifact.sha256,
                "strip": unpack.strip,
            },
        )
        os.chmod(os.path.join(partial, MARKER_NAME), 0o644)
        # One sync for thousands of small files: a sync of each took many times as long.
        os.sync()
        if os.path.lexists(unpack.dest):
            os.rename(unpack.dest, old)
        os.rename(partial, unpack.dest)
        sync_path(os.path.dirname(unpack.dest))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if os.path.lexists(old):
        shutil.rmtree(old)


def require_ours(artifact: Artifact, dest: str) -> None:
    """Raise FleetfitError (``unpack_dest_taken``) where ``dest`` holds what fleetfit did not unpack."""
    if not os.path.lexists(dest):
        return
    ours = os.path.isdir(dest) and not os.path.islink(dest)
    if ours and (read_json(os.path.join(dest, MARKER_NAME)) or not os.listdir(dest)):
        return
    raise FleetfitError(
        f"{dest} exists and was not unpacked by fleetfit, so {artifact.name} is not unpacked over it.",
        code="unpack_dest_taken",
        remedy="Choose another unpack.dest, or move what is there away.",
    )


def _extract(archive_path: str, tree: str, name: str, strip: int, reserve_bytes: int) -> None:
    try:
        # tar first: a tar whose last member is a zip, such as a wheel, ends like a zip.
        if tarfile.is_tarfile(archive_path):
            with tarfile.open(archive_path) as tar:
                _write_tree(
                    [_tar_member(entry, name) for entry in tar],
                    tree,
                    name,
                    strip,
                    reserve_bytes,
                    tar.extractfile,  # type: ignore[arg-type]
                )
        elif zipfile.is_zipfile(archive_path):
            with zipfile.ZipFile(archive_path) as archive:
                members = [_zip_member(archive, entry) for entry in archive.infolist()]
                _write_tree(members, tree, name, strip, reserve_bytes, archive.open)  # type: ignore[arg-type]
        else:
            raise FleetfitError(
                f"The artifact {name} is neither a zip nor a tar (plain, gz, bz2, xz).",
                code="archive_unknown",
                remedy="Pack it as tar.gz, tar.xz or zip; zstd needs a newer Python than hosts have.",
            )
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise FleetfitError(
            f"The archive {name} is damaged although its sha256 is right: {error}.",
            code="archive_damaged",
            remedy="Have its publisher make it again, and pin the new file.",
        ) from error


def _tar_member(entry: tarfile.TarInfo, name: str) -> _Member:
    kinds = {
        tarfile.DIRTYPE: "directory",
        tarfile.SYMTYPE: "symlink",
        tarfile.LNKTYPE: "hardlink",
    }
    kind = "file" if entry.isreg() else kinds.get(entry.type)
    if kind is None:
        raise _unsafe(name, f"{entry.name} is a device, pipe or other special file")
    return _Member(entry.name, kind, entry.mode, entry.size, entry.linkname, entry)


def _zip_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> _Member:
    mode = entry.external_attr >> 16
    if entry.is_dir():
        return _Member(entry.filename, "directory", mode or 0o755, 0, "", entry)
    if stat.S_ISLNK(mode):
        if entry.file_size > _LONGEST_PATH_BYTES:
            raise _unsafe(entry.filename, "its link is longer than a path can be")
        target = archive.read(entry).decode("utf-8", "surrogateescape")
        return _Member(entry.filename, "symlink", mode, 0, target, entry)
    return _Member(entry.filename, "file", mode or 0o644, entry.file_size, "", entry)


def _write_tree(
    members: list[_Member],
    tree: str,
    name: str,
    strip: int,
    reserve_bytes: int,
    open_member: Callable[[object], Optional[IO[bytes]]],
) -> None:
    kept = [(path, member) for member in members for path in [_inside(member.name, name, strip)] if path]
    blocks = sum(-(-member.size // _BLOCK_BYTES) + 1 for _path, member in kept)
    require_free(existing_parent(tree), blocks * _BLOCK_BYTES, reserve_bytes)
    os.mkdir(tree, 0o755)
    os.chmod(tree, 0o755)  # noqa: S103  whatever the umask: services read the tree
    files: set[str] = set()
    links: list[tuple[str, _Member]] = []
    for path, member in kept:
        place = os.path.join(tree, path)
        _make_directories(tree, os.path.dirname(path), name)
        if member.kind == "directory":
            _make_directories(tree, path, name)
        elif member.kind == "symlink":
            links.append((path, member))
        elif member.kind == "hardlink":
            target = _inside(member.target, name, strip)
            if target not in files:
                raise _unsafe(
                    name, f"{member.name} is a hard link to {member.target}, which is not a file in it"
                )
            _remove_file(place)
            os.link(os.path.join(tree, target), place)
            files.add(path)
        else:
            source = open_member(member.handle)
            if source is None:
                raise _unsafe(name, f"{member.name} has no content")
            _remove_file(place)
            with source, open(place, "xb") as stream:
                shutil.copyfileobj(source, stream, _COPY_BYTES)
                # Readable by services, writable by its owner only, never set-user-id.
                os.fchmod(stream.fileno(), (member.mode & 0o755) | 0o644)
            files.add(path)
    _make_links(links, tree, name)


def _inside(path: str, name: str, strip: int) -> str:
    """Return ``path`` without ``strip`` leading parts, perhaps empty; raises for a way out of the tree."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts or "\0" in path:
        raise _unsafe(name, f"{path!r} leads out of the tree")
    return "/".join(parts[strip:])


def _make_directories(tree: str, path: str, name: str) -> None:
    place = tree
    for part in path.split("/") if path else []:
        place = os.path.join(place, part)
        try:
            os.mkdir(place, 0o755)
        except FileExistsError:
            if not os.path.isdir(place):
                raise _unsafe(name, f"{path} lies below a file") from None
        else:
            os.chmod(place, 0o755)  # noqa: S103


def _remove_file(place: str) -> None:
    # A tar may hold a name twice; the last one counts.
    if os.path.isfile(place):
        os.unlink(place)


def _make_links(links: list[tuple[str, _Member]], tree: str, name: str) -> None:
    root = os.path.realpath(tree)
    for path, member in links:
        if member.target.startswith("/"):
            raise _unsafe(name, f"{member.name} links to {member.target}, outside the tree")
        place = os.path.join(tree, path)
        if os.path.islink(place) or os.path.isfile(place):
            os.unlink(place)
        elif os.path.isdir(place):
            raise _unsafe(name, f"{member.name} is a directory and a link")
        # A directory reached through a link made just now would lead somewhere else.
        if os.path.realpath(os.path.dirname(place)) != os.path.join(root, os.path.dirname(path)).rstrip("/"):
            raise _unsafe(name, f"{member.name} lies behind another link")
        os.symlink(member.target, place)
    # Only now does every link have its final meaning.
    for path, member in links:
        real = os.path.realpath(os.path.join(tree, path))
        if real != root and not real.startswith(root + os.sep):
            raise _unsafe(name, f"{member.name} links to {member.target}, outside the tree")


def _give_to(tree: str, owner: Optional[str], group: Optional[str]) -> None:
    set_attributes(tree, None, owner, group)
    for folder, directories, files in os.walk(tree):
        for entry in directories + files:
            set_attributes(os.path.join(folder, entry), None, owner, group)


def _unsafe(name: str, problem: str) -> FleetfitError:
    return FleetfitError(
        f"The archive {name} is refused: {problem}.",
        code="archive_unsafe",
        remedy="Nothing was unpacked. Use an archive whose files and links stay inside its own tree.",
    )
