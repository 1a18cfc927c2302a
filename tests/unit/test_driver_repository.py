"""A repository that is put in place whole or not at all. apt is a stand-in here; Molecule runs the real one."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.driver_repository import (
    apply,
    fetch_key,
    plan,
    without_signed_by,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.http_client import ClientSettings

KEY = (Path(__file__).parent / "data/openpgp/ed25519.asc").read_bytes()
FINGERPRINT = "CBAD315311D02B303CE39453024C2F0793648743"
SOURCES = "Types: deb\nURIs: https://example.com/\nSuites: /\nSigned-By: /etc/apt/keyrings/x.asc\n"


class Host:
    """A directory that stands for a host, and what its package manager answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources = folder / "sources.list.d/fleetfit-nvidia.sources"
        self.key = folder / "keyrings/fleetfit-nvidia.asc"
        self.files = [{"path": str(self.sources), "content": SOURCES, "mode": "0644"}]
        self.answers: dict[str, tuple[int, str]] = {}
        self.ran: list[list[str]] = []
        self.fetched: list[str] = []

    def run(self, argv: Sequence[str]) -> tuple[int, str]:
        self.ran.append(list(argv))
        return self.answers.get(next(word for word in argv[1:] if not word.startswith("-")), (0, ""))

    def get_key(self, url: str) -> bytes:
        self.fetched.append(url)
        return KEY

    def wanted_key(self, **changes: Any) -> dict[str, Any]:
        return {"path": str(self.key), "fingerprint": FINGERPRINT, "url": "https://example.com/k", **changes}

    def go(self, kind: str = "apt", **key: Any) -> bool:
        change = plan(self.files, None if kind == "apt_archive" else self.wanted_key(**key), self.get_key)
        if change.files:
            apply(change, kind, str(self.sources), self.run)
        return bool(change.files)

    def everything(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_key_and_sources_are_there_and_the_index_was_fetched(host: Host) -> None:
    assert host.go() is True
    assert host.key.read_bytes() == KEY
    assert host.sources.read_text() == SOURCES
    assert [host.ran[-1][0], host.ran[-1][2]] == ["apt-get", "update"]
    assert host.key.stat().st_mode & 0o777 == 0o644


def test_a_second_run_fetches_and_writes_nothing(host: Host) -> None:
    host.go()
    host.ran.clear()
    host.fetched.clear()
    assert host.go() is False
    assert (host.ran, host.fetched) == ([], [])


def test_another_key_installs_nothing(host: Host) -> None:
    with pytest.raises(FleetfitError) as caught:
        host.go(fingerprint="0" * 40)
    assert caught.value.code == "key_fingerprint_mismatch"
    assert (host.everything(), host.ran) == ({}, [])


def test_a_key_of_the_controller_is_not_fetched(host: Host) -> None:
    host.go(content=base64.b64encode(KEY).decode())
    assert host.fetched == []
    assert host.key.read_bytes() == KEY


def test_a_key_on_the_host_that_is_not_the_wanted_one_is_replaced(host: Host) -> None:
    host.key.parent.mkdir()
    host.key.write_bytes(b"somebody else's")
    assert host.go() is True
    assert host.key.read_bytes() == KEY


def test_an_unreachable_repository_leaves_the_old_state(host: Host) -> None:
    host.go()
    before = host.everything()
    host.files[0]["content"] = SOURCES.replace("example.com", "gone.example.com")
    host.answers["update"] = (
        100,
        "E: Failed to fetch https://gone.example.com/InRelease  Could not resolve\n",
    )
    with pytest.raises(FleetfitError, match="Could not resolve") as caught:
        host.go()
    assert caught.value.code == "repository_unreachable"
    assert host.everything() == before


def test_an_unreachable_repository_leaves_nothing_on_a_bare_host(host: Host) -> None:
    host.answers["update"] = (100, "")
    with pytest.raises(FleetfitError):
        host.go()
    assert host.everything() == {}


def test_a_server_that_does_not_answer_is_an_error_to_apt(host: Host) -> None:
    host.go()
    assert "APT::Update::Error-Mode=any" in host.ran[-1]
    assert f"Dir::Etc::sourcelist={host.sources}" in host.ran[-1]


def test_an_archive_that_the_host_names_without_a_key_is_named_so_too(host: Host) -> None:
    host.answers["indextargets"] = (100, "E: Conflicting values set for option Signed-By regarding source\n")
    assert host.go("apt_archive") is True
    assert host.sources.read_bytes() == without_signed_by(SOURCES.encode())
    assert host.go("apt_archive") is False


def test_dnf_fetches_the_one_repository(host: Host) -> None:
    host.go("dnf")
    assert host.ran[-1] == ["dnf", "-q", "makecache", "--repo", "fleetfit-nvidia"]


@pytest.fixture
def server() -> Iterator[Callable[[str], str]]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/key.asc"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(KEY if found else b"not here")

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield lambda path: f"http://127.0.0.1:{httpd.server_port}{path}"
    httpd.shutdown()
    httpd.server_close()


def test_the_key_is_fetched(server: Callable[[str], str]) -> None:
    assert fetch_key(server("/key.asc"), ClientSettings()) == KEY


def test_a_key_that_is_not_there_is_a_sentence(server: Callable[[str], str]) -> None:
    with pytest.raises(FleetfitError, match="404") as caught:
        fetch_key(server("/other.asc"), ClientSettings())
    assert caught.value.code == "key_unreachable"


def test_a_server_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(FleetfitError, match=r"127\.0\.0\.1") as caught:
        fetch_key("http://127.0.0.1:9/key.asc", ClientSettings(timeout_s=2))
    assert caught.value.code == "key_unreachable"
