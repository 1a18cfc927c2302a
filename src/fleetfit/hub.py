"""A small client of a model hub's API: what a repository holds, and its small files."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.http_client import ClientSettings, open_url

DEFAULT_ENDPOINT = "https://huggingface.co"
REPOSITORY = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")
_REVISION = re.compile(r"^[0-9a-f]{40}$")
# API answers and configuration files; weights are never fetched here.
MAX_SMALL_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; ``sha256`` is known for large (LFS) files only, ``size`` in bytes.

    ``git_hash`` is git's own hash of a small file's content, where the hub tells it.
    """

    name: str
    size: int | None
    sha256: str | None
    git_hash: str | None = None


@dataclass(frozen=True)
class Repository:
    """A repository at one revision (a commit, forty hex digits), and what its card says of the licence."""

    name: str
    revision: str
    files: tuple[HubFile, ...]
    licence: str | None = None
    gated: bool = False

    def file(self, name: str) -> HubFile | None:
        """Return the file of that name, or None."""
        return next((item for item in self.files if item.name == name), None)


class Hub:
    """One hub or mirror; the token comes from HF_TOKEN and goes to its origin only."""

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        if not self.endpoint.startswith(("http://", "https://")):
            raise FleetfitError(
                f"The hub's address {self.endpoint!r} is not a URL.",
                code="bad_endpoint",
                remedy="Give --endpoint as https://host.",
            )
        environment = {name.lower(): value for name, value in os.environ.items()}
        self._settings = ClientSettings(
            proxy_http=environment.get("http_proxy") or None,
            proxy_https=environment.get("https_proxy") or None,
            no_proxy=environment.get("no_proxy") or None,
            ca_file=os.environ.get("SSL_CERT_FILE") or None,
        )
        self._token = os.environ.get("HF_TOKEN") or None

    def repository(self, name: str, revision: str = "main") -> Repository:
        """Return what the repository holds at ``revision`` (a branch, a tag or a commit).

        Raises :class:`FleetfitError`: ``hub_unreachable``, ``hub_refused`` (gated or private),
        ``hub_not_found``, ``hub_bad_answer``.
        """
        check_repository(name)
        path = f"/api/models/{name}/revision/{quote(revision, safe='')}?blobs=true"
        try:
            data = json.loads(self._get(path, name))
            commit = str(data["sha"])
            files = tuple(sorted((_file(item) for item in data["siblings"]), key=lambda item: item.name))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._bad_answer(name, "it is not a model's description") from None
        if not _REVISION.match(commit):
            raise self._bad_answer(name, f"its revision {commit!r} is no commit")
        return Repository(
            name=name, revision=commit, files=files, licence=_licence(data), gated=bool(data.get("gated"))
        )

    def small_file(self, repository: Repository, name: str) -> bytes:
        """Return the content of a small file at the repository's revision."""
        path = f"/{repository.name}/resolve/{repository.revision}/{quote(name)}"
        return self._get(path, repository.name)

    def pinned(self, repository: Repository, file: HubFile) -> HubFile:
        """Return the file with size and sha256: the hub's for large files, hashed here for small ones."""
        if file.sha256 is not None and file.size is not None:
            return file
        if (file.size or 0) > MAX_SMALL_BYTES:
            raise self._bad_answer(repository.name, f"it tells no sha256 of {file.name}")
        data = self.small_file(repository, file.name)
        if file.size is not None and file.size != len(data):
            raise self._bad_answer(
                repository.name, f"{file.name} has {len(data)} bytes where {file.size} are declared"
            )
        if file.git_hash is not None and file.git_hash != _git_hash(data):
            raise self._bad_answer(repository.name, f"{file.name} is not the content that the hub declares")
        return HubFile(file.name, len(data), hashlib.sha256(data).hexdigest())

    def first_bytes(self, repository: Repository, name: str, count: int) -> bytes:
        """Return the first ``count`` bytes of a file (fewer where it is shorter), without the rest of it."""
        path = f"/{repository.name}/resolve/{repository.revision}/{quote(name)}"
        return self._get(path, repository.name, first=count)

    def _get(self, path: str, repository: str, *, first: int | None = None) -> bytes:
        url = self.endpoint + path
        headers = None if first is None else {"Range": f"bytes=0-{first - 1}"}
        try:
            answer = open_url(url, self._settings, token=self._token, headers=headers)
        except (OSError, http.client.HTTPException) as error:
            raise FleetfitError(
                f"The hub at {self.endpoint} cannot be reached: {error or type(error).__name__}.",
                code="hub_unreachable",
                remedy="Check the network and the proxy variables, or name a mirror with --endpoint.",
            ) from None
        try:
            if answer.status in (401, 403):
                # The hub's own word for it (huggingface_hub, utils/_http.py).
                gated = answer.header("X-Error-Code") == "GatedRepo"
                raise FleetfitError(
                    f"The hub at {self.endpoint} refuses {repository} (HTTP {answer.status}): "
                    + (
                        "it is gated, and its licence was not accepted."
                        if gated
                        else "it is gated, private, or does not exist."
                    ),
                    code="hub_refused",
                    remedy=(
                        f"Accept the licence on {self.endpoint}/{repository} and set HF_TOKEN to a token "
                        "of that account."
                    ),
                )
            if answer.status == 404:
                raise FleetfitError(
                    f"The hub at {self.endpoint} has no {repository} (HTTP 404 for {path.partition('?')[0]}).",
                    code="hub_not_found",
                    remedy="Check the repository's name and the revision.",
                )
            if answer.status != 200 and (first is None or answer.status != 206):
                raise self._bad_answer(repository, f"HTTP {answer.status}")
            if first is not None:
                # A server that does not know ranges sends everything; the rest is not read.
                return bytes(answer.response.read(first))
            data = answer.response.read(MAX_SMALL_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise self._bad_answer(repository, f"the connection broke: {error}") from None
        finally:
            answer.close()
        if len(data) > MAX_SMALL_BYTES:
            raise self._bad_answer(repository, f"more than {MAX_SMALL_BYTES >> 20} MiB")
        return data

    def _bad_answer(self, repository: str, what: str) -> FleetfitError:
        return FleetfitError(
            f"The hub at {self.endpoint} answered badly for {repository}: {what}.",
            code="hub_bad_answer",
            remedy="Try again; if a proxy or mirror stands between, look at its log.",
        )


def check_repository(name: str) -> None:
    """Raise ``bad_repository`` for a name that no hub has."""
    if not REPOSITORY.match(name) or ".." in name:
        raise FleetfitError(
            f"{name!r} is not the name of a hub repository.",
            code="bad_repository",
            remedy="Write it as organisation/name.",
        )


def _licence(data: dict[str, Any]) -> str | None:
    """Return the licence's id on the model's card, else that of its tags; the name of one that is "other"."""
    card = data.get("cardData")
    card = card if isinstance(card, dict) else {}
    found = card.get("license_name") if card.get("license") == "other" else card.get("license")
    if isinstance(found, str) and found:
        return found
    tags = data.get("tags")
    for tag in tags if isinstance(tags, list) else ():
        if isinstance(tag, str) and tag.startswith("license:"):
            return tag.partition(":")[2]
    return None


def _git_hash(data: bytes) -> str:
    """Return the name that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _file(item: dict[str, Any]) -> HubFile:
    name = str(item["rfilename"])
    if not name or name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise ValueError("a file name that leaves the repository")
    lfs = item.get("lfs") or {}
    sha256 = lfs.get("sha256") or lfs.get("oid")
    size = lfs.get("size", item.get("size"))
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(sha256)):
        raise ValueError("a large file without a sha256")
    if size is not None and (not isinstance(size, int) or size < 0):
        raise ValueError("a size that is none")
    git_hash = str(item.get("blobId") or "")
    return HubFile(
        name,
        size,
        None if sha256 is None else str(sha256),
        git_hash if sha256 is None and _REVISION.match(git_hash) else None,
    )
