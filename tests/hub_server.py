"""A server on loopback that speaks the model hub's API: what a repository holds, its files, gates and ranges.

That it speaks it is shown by reading it with the real ``huggingface_hub`` (tests/integration/test_catalog_add.py).
"""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test_token_of_an_account_that_accepted"


@dataclass(frozen=True)
class Large:
    """A large (LFS) file: listed with size and sha256; its content is ``path``'s, where there is one."""

    size: int
    sha256: str
    path: Path | None = None


@dataclass
class Repo:
    """One repository; a small file is its bytes."""

    files: dict[str, bytes | Large]
    licence: str | None = None
    gated: bool = False
    card: dict[str, Any] = field(default_factory=dict)


def large(name: str, size: int) -> Large:
    """Return a large file whose content nobody asks for."""
    return Large(size, hashlib.sha256(name.encode()).hexdigest())


def large_file(path: Path) -> Large:
    """Return a large file with a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return Large(path.stat().st_size, digest.hexdigest(), path)


class HubServer:
    """The server, its repositories, and what was asked: (method, path, Range or None, token or None)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repo] = {}
        self.asked: list[tuple[str, str, str | None, str | None]] = []
        self.sent_bytes = 0
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: Any) -> None:
                pass

        # The hub keeps large files with another host, to which it redirects.
        self.servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{item.server_port}" for item in self.servers)
        for item in self.servers:
            threading.Thread(target=item.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        for item in self.servers:
            item.shutdown()
            item.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler, *, body: bool) -> None:
        """Answer one request as the hub does."""
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.asked.append((request.command, request.path, request.headers.get("Range"), token))
        url = urlsplit(request.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
            self._tree(request, "/".join(parts[2:4]), body)
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            revision = parts[5] if parts[4:5] == ["revision"] else "main"
            self._describe(request, "/".join(parts[2:4]), revision, "blobs" in parse_qs(url.query), body)
        elif parts[2:3] == ["resolve"] and len(parts) >= 5:
            self._resolve(request, "/".join(parts[:2]), "/".join(parts[4:]), token, body)
        elif parts[0] == "storage":
            self._storage(request, parts[1], body)
        else:
            self._refuse(request, 404, "EntryNotFound", "no such page")

    def _describe(
        self, request: http.server.BaseHTTPRequestHandler, name: str, revision: str, blobs: bool, body: bool
    ) -> None:
        repository = self.repositories.get(name)
        if repository is None:
            self._refuse(request, 401, "RepoNotFound", "Invalid username or password.")
            return
        if revision not in ("main", COMMIT):
            self._refuse(request, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        document = {
            "_id": "0" * 24,
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "private": False,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [f"license:{repository.licence}"] if repository.licence else [],
            "cardData": {
                **({"license": repository.licence} if repository.licence else {}),
                **repository.card,
            },
            "siblings": [_sibling(file, content, blobs) for file, content in repository.files.items()],
        }
        self._send(request, 200, json.dumps(document).encode(), {"Content-Type": "application/json"}, body)

    def _tree(self, request: http.server.BaseHTTPRequestHandler, name: str, body: bool) -> None:
        repository = self.repositories.get(name)
        if repository is None:
            self._refuse(request, 401, "RepoNotFound", "Invalid username or password.")
            return
        entries = []
        for file, content in repository.files.items():
            listed = _sibling(file, content, True)
            entry = {"type": "file", "path": file, "size": listed["size"], "oid": listed["blobId"]}
            if "lfs" in listed:
                lfs = listed["lfs"]
                entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
            entries.append(entry)
        self._send(request, 200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, body)

    def _resolve(
        self,
        request: http.server.BaseHTTPRequestHandler,
        name: str,
        file: str,
        token: str | None,
        body: bool,
    ) -> None:
        repository = self.repositories.get(name)
        if repository is None:
            self._refuse(request, 401, "RepoNotFound", "Invalid username or password.")
        elif repository.gated and token != TOKEN:
            text = f"Access to model {name} is restricted and you are not in the authorized list."
            self._refuse(request, 401 if token is None else 403, "GatedRepo", text)
        elif file not in repository.files:
            self._refuse(request, 404, "EntryNotFound", "Entry not found")
        elif isinstance(content := repository.files[file], Large):
            headers = {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(content.size),
                "X-Linked-ETag": f'"{content.sha256}"',
                "ETag": f'"{content.sha256}"',
                "Location": f"{self.storage}/storage/{content.sha256}",
            }
            self._send(request, 302, b"", headers, body)
        else:
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_git_hash(content)}"'}
            self._send(request, 200, content, headers, body)

    def _storage(self, request: http.server.BaseHTTPRequestHandler, sha256: str, body: bool) -> None:
        """Send a large file's content, or the part of it that is asked for."""
        found = [
            content
            for repository in self.repositories.values()
            for content in repository.files.values()
            if isinstance(content, Large) and content.sha256 == sha256 and content.path is not None
        ]
        if not found or found[0].path is None:
            self._refuse(request, 404, "EntryNotFound", "listed only")
            return
        first, last = 0, found[0].size - 1
        wanted = request.headers.get("Range")
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(last, int(end) if end else last)
        with found[0].path.open("rb") as stream:
            stream.seek(first)
            data = stream.read(last - first + 1)
        headers = {"Content-Range": f"bytes {first}-{last}/{found[0].size}"} if wanted else {}
        self._send(request, 206 if wanted else 200, data, headers, body)

    def _refuse(
        self, request: http.server.BaseHTTPRequestHandler, status: int, code: str, message: str
    ) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        self._send(
            request, status, json.dumps({"error": message}).encode(), headers, request.command == "GET"
        )

    def _send(
        self,
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: dict[str, str],
        body: bool,
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if body:
            self.sent_bytes += len(content)
            request.wfile.write(content)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a server for a while."""
    found = HubServer()
    try:
        yield found
    finally:
        found.close()


def _sibling(name: str, content: bytes | Large, blobs: bool) -> dict[str, Any]:
    """Return a file as the API lists it; with blobs=true sizes and hashes too."""
    if not blobs:
        return {"rfilename": name}
    if isinstance(content, Large):
        lfs = {"sha256": content.sha256, "size": content.size, "pointerSize": 134}
        return {"rfilename": name, "size": content.size, "blobId": "f" * 40, "lfs": lfs}
    return {"rfilename": name, "size": len(content), "blobId": _git_hash(content)}


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
