"""Downloading, the parts that need no server: proxies' exceptions, the limit, copies, locks and the token."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.artifact import Artifact, Settings, Source
from ansible_collections.fleetfit.llm.plugins.module_utils.download import (
    Limiter,
    PartialFile,
    fetch_artifact,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.http_client import (
    ClientSettings,
    bypasses_proxy,
    origin,
    proxy_for,
)

CONTENT = b"0123456789" * 1000


@pytest.mark.parametrize(
    ("host", "no_proxy", "direct"),
    [
        ("mirror.example", "mirror.example", True),
        ("mirror.example", "example", True),
        ("mirror.example", ".example", True),
        ("mirror.example", "*.example", True),
        ("badexample", "example", False),
        ("mirror.example", "mirror.example:8080", False),
        ("mirror.example", "mirror.example:80", True),
        ("mirror.example", "other, mirror.example", True),
        ("MIRROR.example.", "mirror.EXAMPLE", True),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", False),
        ("fd00::1", "fd00::/8", True),
        ("fd00::1", "[fd00::1]", True),
        ("anything", "*", True),
        ("anything", "", False),
        ("anything", None, False),
    ],
)
def test_no_proxy_is_read_as_people_write_it(host: str, no_proxy: str | None, direct: bool) -> None:
    assert bypasses_proxy(host, 80, no_proxy) is direct


def test_only_the_named_proxies_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://environment:1")
    assert proxy_for("http://host/x", ClientSettings()) is None
    settings = ClientSettings(proxy_http="one:1", proxy_https="http://two:2", no_proxy="local")
    assert proxy_for("http://host/x", settings) == "http://one:1"
    assert proxy_for("https://host/x", settings) == "http://two:2"
    assert proxy_for("https://local/x", settings) is None


def test_an_origin_has_its_default_port() -> None:
    assert origin("https://Hub.example/x") == origin("https://hub.example:443/y")
    assert origin("https://hub.example") != origin("http://hub.example")
    assert origin("https://hub.example") != origin("https://cdn.hub.example")


def test_the_limit_holds_over_many_chunks() -> None:
    limiter = Limiter(1_000_000)
    started = time.monotonic()
    for _ in range(10):
        limiter.wait(20_000)
    assert 0.19 <= time.monotonic() - started < 0.5
    assert limiter.chunk_bytes() == 100_000


def test_no_limit_does_not_wait() -> None:
    started = time.monotonic()
    Limiter(0).wait(10**12)
    assert time.monotonic() - started < 0.1


def artifact_for(tmp_path: Path, *sources: Source, content: bytes = CONTENT) -> Artifact:
    return Artifact(
        "x", len(content), hashlib.sha256(content).hexdigest(), str(tmp_path / "store/x"), sources=sources
    )


def on_host(path: Path) -> Source:
    return Source("file", path=str(path), location="host")


def test_a_file_on_the_host_is_copied_and_verified(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(CONTENT)
    artifact = artifact_for(tmp_path, on_host(tmp_path / "good"))
    fetched = fetch_artifact(artifact, Settings(), Limiter(0))
    assert Path(artifact.partial).read_bytes() == CONTENT
    assert fetched.source == f"{tmp_path}/good (on the host)"
    assert fetched.bytes_fetched == 0  # nothing crossed the network


def test_sources_are_tried_in_order_until_one_delivers(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(CONTENT[:-1])
    (tmp_path / "other").write_bytes(bytes(len(CONTENT)))
    (tmp_path / "good").write_bytes(CONTENT)
    names = ("missing", "short", "other", "good")
    artifact = artifact_for(tmp_path, *(on_host(tmp_path / name) for name in names))
    assert fetch_artifact(artifact, Settings(), Limiter(0)).source.startswith(f"{tmp_path}/good")


def test_when_all_sources_fail_each_says_why_and_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(len(CONTENT)))
    artifact = artifact_for(tmp_path, on_host(tmp_path / "missing"), on_host(tmp_path / "other"))
    with pytest.raises(FleetfitError) as caught:
        fetch_artifact(artifact, Settings(), Limiter(0))
    assert caught.value.code == "wrong_checksum"
    assert f"{tmp_path}/missing" in str(caught.value)
    assert f"{tmp_path}/other" in str(caught.value)
    assert os.listdir(tmp_path / "store") == []


def test_two_downloads_of_one_file_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(CONTENT)
    artifact = artifact_for(tmp_path, on_host(tmp_path / "good"))
    first = PartialFile(artifact)
    with pytest.raises(FleetfitError) as caught:
        fetch_artifact(artifact, Settings(), Limiter(0))
    assert caught.value.code == "download_in_progress"
    first.close()
    fetch_artifact(artifact, Settings(), Limiter(0))


def test_a_partial_file_goes_on_with_the_right_hash(tmp_path: Path) -> None:
    artifact = artifact_for(tmp_path)
    first = PartialFile(artifact)
    first.write(CONTENT[:6000])
    first.close()
    second = PartialFile(artifact)
    assert second.size == second.resumed_from == 6000
    second.write(CONTENT[6000:])
    assert second.sha256 == artifact.sha256
    assert Path(artifact.partial).stat().st_mode & 0o077 == 0
    second.close()


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hf_secret\n")
    token.chmod(0o644)
    source = Source("hub", repository="o/n", revision="r", filename="f", endpoint="https://127.0.0.1:1")
    with pytest.raises(FleetfitError) as caught:
        fetch_artifact(artifact_for(tmp_path, source), Settings(token_file=str(token)), Limiter(0))
    assert caught.value.code == "token_file_readable"
    assert "hf_secret" not in str(caught.value)
