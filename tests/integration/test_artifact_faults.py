"""Downloads against real servers and proxies on loopback that misbehave in the ways that networks do."""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import http.server
import ipaddress
import json
import os
import random
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.artifact import (
    Artifact,
    Settings,
    Source,
    artifact_to_dict,
    check_disk,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.download import Fetched, Limiter, fetch_artifact
from ansible_collections.fleetfit.llm.plugins.module_utils.download_job import run_artifacts
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.helper_zip import build_helper_zip
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

CONTENT = random.Random(7).randbytes(3_000_000)  # noqa: S311
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CUT = 1_000_000  # where a fault strikes
# The interpreter of Debian's hosts where there is one: what runs there is not the controller's Python.
HOST_PYTHON = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable
ROOT = Path(__file__).resolve().parents[2]

Fault = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT with ranges; each request takes the next fault of its server, if there is one."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            (fault or serve)(self)

    def do_CONNECT(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        if self.server.refuse_connect:
            self.send_error(403)
            return
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as upstream:
            self.send_response(200)
            self.end_headers()
            self.wfile.flush()
            pump(self.connection, upstream)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass

    def begin(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        names = {"Content-Type": "application/octet-stream"}
        names |= {name.replace("_", "-"): value for name, value in headers.items()}
        if length is not None:
            names["Content-Length"] = str(length)
        for name, value in names.items():
            self.send_header(name, value)
        self.end_headers()

    @property
    def start(self) -> int:
        return int((self.headers.get("Range") or "bytes=0-")[6:-1])


class Server(http.server.ThreadingHTTPServer):
    """A server that remembers its requests and the bytes it sent."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, scheme: str = "http") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.refuse_connect = False
        self.released = threading.Event()
        self.url = f"{scheme}://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        pass  # a client that goes away is what these tests are about

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]


def pump(left: socket.socket, right: socket.socket) -> None:
    while True:
        readable, _, _ = select.select([left, right], [], [], 10)
        for end in readable:
            data = end.recv(65536)
            if not data:
                return
            (right if end is left else left).sendall(data)
        if not readable:
            return


# --- what a server may do


def serve(handler: Handler) -> None:
    start = handler.start
    if start:
        content_range = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        handler.begin(206, len(CONTENT) - start, Content_Range=content_range, ETag='"v1"')
    else:
        handler.begin(200, len(CONTENT), ETag='"v1"', Accept_Ranges="bytes")
    handler.wfile.write(CONTENT[start:])


def cut(handler: Handler) -> None:
    handler.begin(200 if not handler.start else 206, len(CONTENT) - handler.start, **ranged(handler))
    handler.wfile.write(CONTENT[handler.start : handler.start + CUT])
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def ranged(handler: Handler) -> dict[str, str]:
    start = handler.start
    return {"Content_Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"} if start else {}


def stall(handler: Handler) -> None:
    handler.begin(200, len(CONTENT))
    handler.wfile.write(CONTENT[:CUT])
    handler.wfile.flush()
    handler.server.released.wait(20)
    handler.close_connection = True


def drip(handler: Handler) -> None:
    handler.begin(200, len(CONTENT))
    while not handler.server.released.wait(0.05):
        handler.wfile.write(b"x")
        handler.wfile.flush()
    handler.close_connection = True


def ignore_range(handler: Handler) -> None:
    handler.begin(200, len(CONTENT))
    handler.wfile.write(CONTENT)


def wrong_content_range(handler: Handler) -> None:
    # A proxy that answers a range with the beginning of what it has cached.
    handler.begin(206, len(CONTENT), Content_Range=f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}")
    handler.wfile.write(CONTENT)


def unasked_part(handler: Handler) -> None:
    handler.begin(206, CUT, Content_Range=f"bytes 0-{CUT - 1}/{len(CONTENT)}")
    handler.wfile.write(CONTENT[:CUT])


PAGE = b"<!DOCTYPE html><html><title>Blocked by policy</title></html>"


def block_page(handler: Handler) -> None:
    handler.begin(200, len(PAGE), Content_Type="text/html; charset=utf-8")
    handler.wfile.write(PAGE)


def block_page_without_length(handler: Handler) -> None:
    handler.begin(200, None, Content_Type="text/html", Connection="close")
    handler.wfile.write(PAGE)
    handler.close_connection = True


def wrong_bytes(handler: Handler) -> None:
    handler.begin(200, len(CONTENT))
    handler.wfile.write(bytes(len(CONTENT)))


def wrong_size(handler: Handler) -> None:
    handler.begin(200, 12)
    handler.wfile.write(b"another file")


def endless(handler: Handler) -> None:
    handler.begin(200, None, Connection="close")
    handler.close_connection = True
    for _ in range(20):
        handler.wfile.write(CONTENT)


def compressed(handler: Handler) -> None:
    handler.begin(200, 20, Content_Encoding="gzip")
    handler.wfile.write(bytes(20))


def status(code: int, **headers: str) -> Fault:
    def answer(handler: Handler) -> None:
        handler.begin(code, 0, **headers)

    return answer


def redirect(url: str, **headers: str) -> Fault:
    return status(302, Location=url, **headers)


def forward(handler: Handler) -> None:
    """Be a forward proxy: fetch the absolute address with the client's headers."""
    parts = urlsplit(handler.path)
    assert parts.scheme == "http", f"not an absolute address: {handler.path}"
    with socket.create_connection((parts.hostname, parts.port)) as upstream:
        lines = [f"GET {parts.path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in handler.headers.items() if "Proxy" not in name]
        upstream.sendall(("\r\n".join(lines) + "\r\nConnection: close\r\n\r\n").encode())
        while data := upstream.recv(65536):
            handler.wfile.write(data)
    handler.close_connection = True


def with_password(fault: Fault) -> Fault:
    def answer(handler: Handler) -> None:
        wanted = "Basic " + base64.b64encode(b"user:pass word").decode()
        (fault if handler.headers.get("Proxy-Authorization") == wanted else status(407))(handler)

    return answer


# --- fixtures


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server()) as started:
        yield started


@pytest.fixture
def proxy() -> Iterator[Server]:
    with running(Server()) as started:
        started.always = forward
        yield started


@dataclass
class Place:
    """A directory to download to, with settings that do not wait long."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)

    def artifact(self, *sources: Source, **changes: Any) -> Artifact:
        values = {"name": "x.gguf", "size": len(CONTENT), "sha256": SHA256, **changes}
        return Artifact(dest=str(self.folder / "x.gguf"), sources=sources, **values)

    def fetch(self, *sources: Source, **settings: Any) -> Fetched:
        artifact = self.artifact(*sources)
        fetched = fetch_artifact(artifact, self.make_settings(**settings), Limiter(0))
        assert Path(artifact.partial).read_bytes() == CONTENT
        return fetched

    def fails(self, *sources: Source, **settings: Any) -> FleetfitError:
        with pytest.raises(FleetfitError) as caught:
            fetch_artifact(self.artifact(*sources), self.make_settings(**settings), Limiter(0))
        return caught.value

    def make_settings(self, **changes: Any) -> Settings:
        defaults = {"backoff_s": 0.01, "timeout_s": 0.5, "retries": 3, "reserve_bytes": 0}
        return Settings(**{**defaults, "state_dir": str(self.folder.parent / "state"), **changes})

    def names(self) -> list[str]:
        return sorted(os.listdir(self.folder)) if self.folder.exists() else []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "models")


def http_source(server: Server, path: str = "/x.gguf") -> Source:
    return Source("http", url=server.url + path)


# --- what must happen


def test_a_cut_connection_is_resumed_where_it_broke(server: Server, place: Place) -> None:
    server.faults = [cut, cut]
    fetched = place.fetch(http_source(server))
    assert fetched.bytes_fetched == len(CONTENT)  # not a byte twice
    assert server.ranges() == [None, f"bytes={CUT}-", f"bytes={2 * CUT}-"]


def test_a_connection_that_is_always_cut_at_one_place_ends_and_keeps_what_it_has(
    server: Server, place: Place
) -> None:
    def cut_at_once(handler: Handler) -> None:
        handler.begin(206, len(CONTENT) - handler.start, **ranged(handler))
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True

    server.faults = [cut]
    server.always = cut_at_once
    error = place.fails(http_source(server), retries=3)
    assert error.code == "connection_cut"
    assert "the next run goes on from there" in error.message
    assert len(server.requests) == 4  # the first one and three retries
    server.always = None
    again = place.fetch(http_source(server))
    assert (again.resumed_from, again.bytes_fetched) == (CUT, len(CONTENT) - CUT)


def test_a_server_without_ranges_that_always_cuts_is_given_up(server: Server, place: Place) -> None:
    def cut_whole(handler: Handler) -> None:
        handler.begin(200, len(CONTENT))
        handler.wfile.write(CONTENT[:CUT])
        handler.close_connection = True

    server.always = cut_whole
    assert place.fails(http_source(server), retries=3).code == "connection_cut"
    assert len(server.requests) <= 5


def test_a_stalled_connection_is_left_and_resumed(server: Server, place: Place) -> None:
    server.faults = [stall]
    started = time.monotonic()
    assert place.fetch(http_source(server)).bytes_fetched == len(CONTENT)
    assert time.monotonic() - started < 5


def test_a_connection_that_only_drips_counts_as_stalled(server: Server, place: Place) -> None:
    server.always = drip
    error = place.fails(http_source(server), stall_s=0.3, retries=1)
    assert error.code == "connection_stalled"
    assert "almost nothing" in error.message


def test_an_ignored_range_starts_again_cleanly(server: Server, place: Place) -> None:
    server.faults = [cut, ignore_range]
    assert place.fetch(http_source(server)).bytes_fetched == len(CONTENT) + CUT


def test_a_wrong_content_range_is_refused_and_never_spliced(server: Server, place: Place) -> None:
    server.faults = [cut, wrong_content_range]
    place.fetch(http_source(server))
    assert server.ranges() == [None, f"bytes={CUT}-", None]


def test_a_part_that_nobody_asked_for_is_refused(server: Server, place: Place) -> None:
    server.always = unasked_part
    assert place.fails(http_source(server)).code == "wrong_content_range"
    assert place.names() == []


def test_a_file_that_changed_between_two_tries_is_fetched_whole(server: Server, place: Place) -> None:
    def first_version(handler: Handler) -> None:
        handler.begin(200, len(CONTENT), ETag='"v0"')
        handler.wfile.write(bytes(CUT))
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True

    server.faults = [first_version]
    place.fetch(http_source(server))
    assert server.requests[1][1]["If-Range"] == '"v0"'


@pytest.mark.parametrize("page", [block_page, block_page_without_length])
def test_a_block_page_with_status_200_names_the_proxy_and_costs_nothing(
    server: Server, proxy: Server, place: Place, page: Fault
) -> None:
    server.faults = [cut]
    source = http_source(server)
    assert place.fails(source, retries=0).code == "connection_cut"
    proxy.always = page
    error = place.fails(source, proxy_http=proxy.url)
    assert error.code == "block_page"
    assert f"127.0.0.1:{proxy.server_port}" in error.message
    assert source.url in error.message
    assert "no_proxy" in (error.remedy or "")
    assert len(proxy.requests) == 1  # a policy does not change by asking again
    assert place.fetch(source).resumed_from == CUT  # what was there before the page is still there


def test_wrong_bytes_never_become_visible_and_the_old_file_stays(server: Server, place: Place) -> None:
    place.folder.mkdir()
    (place.folder / "x.gguf").write_bytes(b"the old file")
    server.always = wrong_bytes
    outcomes: dict[str, Any] = {}
    artifact = place.artifact(http_source(server))
    run_artifacts([artifact], place.make_settings(), outcomes.__setitem__)
    assert outcomes[artifact.dest]["error"]["code"] == "wrong_checksum"
    assert place.names() == ["x.gguf"]
    assert (place.folder / "x.gguf").read_bytes() == b"the old file"
    assert len(server.requests) == 1  # the whole file came in one piece: asking again gives the same


def test_wrong_bytes_in_a_resumed_part_get_one_clean_try(server: Server, place: Place) -> None:
    def wrong_tail(handler: Handler) -> None:
        handler.begin(206, len(CONTENT) - handler.start, **ranged(handler))
        handler.wfile.write(bytes(len(CONTENT) - handler.start))

    server.faults = [cut, wrong_tail]
    place.fetch(http_source(server))
    assert server.ranges()[-1] is None


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (wrong_size, "wrong_size"),
        (endless, "wrong_size"),
        (compressed, "content_encoded"),
        (status(404), "not_found"),
        (status(401), "access_refused"),
        (status(403), "access_refused"),
        (status(416), "server_error"),
        (status(500), "server_error"),
    ],
    ids=["wrong size", "endless", "compressed", "404", "401", "403", "416", "500"],
)
def test_each_failure_has_its_name_a_remedy_and_leaves_nothing(
    server: Server, place: Place, fault: Fault, code: str
) -> None:
    server.always = fault
    error = place.fails(http_source(server))
    assert error.code == code
    assert error.remedy
    assert server.url in error.message
    assert place.names() == []


def test_a_busy_server_is_asked_again(server: Server, place: Place) -> None:
    server.faults = [status(503), status(429, Retry_After="1"), status(502)]
    started = time.monotonic()
    place.fetch(http_source(server))
    assert time.monotonic() - started >= 1


def test_the_next_source_takes_over_what_the_first_one_left(server: Server, place: Place) -> None:
    with running(Server()) as dying:
        dying.faults = [cut]
        dying.always = status(503)
        fetched = place.fetch(http_source(dying), http_source(server))
        assert fetched.bytes_fetched == len(CONTENT)
        assert fetched.source == server.url + "/x.gguf"


def test_a_refused_port_says_so(place: Place) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
        error = place.fails(Source("http", url=url), retries=1)
    assert error.code == "connection_failed"
    assert url in error.message


# --- hub


def hub_source(server: Server) -> Source:
    return Source("hub", repository="org/name", revision="abc", filename="x.gguf", endpoint=server.url)


def test_a_hub_is_asked_again_when_its_signed_address_expired(server: Server, place: Place) -> None:
    with running(Server()) as storage:
        signed = iter(range(10))
        server.always = lambda handler: redirect(f"{storage.url}/blob?sig={next(signed)}")(handler)
        storage.faults = [cut, status(403)]
        fetched = place.fetch(hub_source(server))
        assert fetched.bytes_fetched == len(CONTENT)
        assert [path for path, _ in storage.requests] == ["/blob?sig=0", "/blob?sig=1", "/blob?sig=2"]
        assert server.requests[0][0] == "/org/name/resolve/abc/x.gguf"


def test_a_signed_address_that_is_always_refused_is_not_shown(server: Server, place: Place) -> None:
    with running(Server()) as storage:
        server.always = redirect(f"{storage.url}/blob?sig=secret")
        storage.always = status(403)
        error = place.fails(hub_source(server))
        assert error.code == "signed_url_refused"
        assert "secret" not in str(error)


def test_a_hub_that_announces_another_file_is_believed_at_once(server: Server, place: Place) -> None:
    with running(Server()) as storage:
        server.always = redirect(storage.url, X_Linked_Size="12")
        assert place.fails(hub_source(server)).code == "wrong_size"
        server.always = redirect(storage.url, X_Linked_Etag=f'"{"0" * 64}"')
        assert place.fails(hub_source(server)).code == "wrong_checksum"


def test_a_redirect_loop_ends(server: Server, place: Place) -> None:
    server.always = redirect("/again")
    assert place.fails(hub_source(server)).code == "too_many_redirects"


# --- TLS and proxies


@dataclass
class Authority:
    ca_file: Path
    server: Server


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Authority]:
    """Start an HTTPS server with a certificate of a test authority."""
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fleetfit test authority")])

    def build(subject: x509.Name, public: Any, extensions: list[tuple[Any, bool]]) -> x509.Certificate:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(ca_name).public_key(public)
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=1))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(ca_key, hashes.SHA256())

    identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = build(ca_name, ca_key.public_key(), [(x509.BasicConstraints(True, None), True), (identifier, False)])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    leaf_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    leaf = build(leaf_name, key.public_key(), [(names, False), (issuer, False)])
    pem = serialization.Encoding.PEM
    (tmp_path / "ca.pem").write_bytes(ca.public_bytes(pem))
    (tmp_path / "leaf.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + leaf.public_bytes(pem)
    )
    server = Server("https")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "leaf.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with running(server):
        yield Authority(tmp_path / "ca.pem", server)


def test_https_works_with_the_given_authority_only(secure: Authority, place: Place) -> None:
    source = http_source(secure.server)
    error = place.fails(source)
    assert error.code == "certificate_not_trusted"
    assert "host_baseline_ca_certificates" in (error.remedy or "")
    assert place.fetch(source, ca_file=str(secure.ca_file)).bytes_fetched == len(CONTENT)


def test_a_token_goes_to_the_hub_and_nowhere_else(
    secure: Authority, server: Server, place: Place, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("hf_canary\n")
    token.chmod(0o600)
    secure.server.always = redirect(f"{server.url}/blob?sig=1")
    place.fetch(hub_source(secure.server), ca_file=str(secure.ca_file), token_file=str(token))
    assert secure.server.requests[0][1]["Authorization"] == "Bearer hf_canary"
    assert server.requests
    assert all("Authorization" not in headers for _, headers in server.requests)


def test_a_token_is_never_sent_in_the_clear(server: Server, place: Place, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hf_canary\n")
    token.chmod(0o600)
    fetched = place.fetch(hub_source(server), token_file=str(token))
    assert any("not https" in warning for warning in fetched.warnings)
    assert "hf_canary" not in json.dumps(server.requests)


def test_a_password_in_an_address_stays_with_its_server(server: Server, place: Place) -> None:
    with running(Server()) as storage:
        server.always = redirect(f"{storage.url}/blob")
        url = server.url.replace("http://", "http://user:canary@") + "/x"
        fetched = place.fetch(Source("http", url=url))
        assert "canary" not in fetched.source
        assert server.requests[0][1]["Authorization"].startswith("Basic ")
        assert "Authorization" not in storage.requests[0][1]


def test_http_goes_through_the_proxy_with_its_password(server: Server, proxy: Server, place: Place) -> None:
    proxy.always = with_password(forward)
    server.faults = [cut]
    url = proxy.url.replace("http://", "http://user:pass%20word@")
    place.fetch(http_source(server), proxy_http=url)
    assert [urlsplit(path).netloc for path, _ in proxy.requests] == [f"127.0.0.1:{server.server_port}"] * 2
    assert all("Proxy-Authorization" not in headers for _, headers in server.requests)


def test_a_proxy_that_wants_a_password_is_named(server: Server, proxy: Server, place: Place) -> None:
    proxy.always = with_password(forward)
    error = place.fails(http_source(server), proxy_http=proxy.url.replace("//", "//user:canary@"))
    assert error.code == "proxy_refused"
    assert f"127.0.0.1:{proxy.server_port}" in error.message
    assert "canary" not in str(error)


def test_https_is_tunnelled_through_the_proxy(secure: Authority, proxy: Server, place: Place) -> None:
    secure.server.faults = [cut]
    place.fetch(http_source(secure.server), proxy_https=proxy.url, ca_file=str(secure.ca_file))
    assert {path for path, _ in proxy.requests} == {f"127.0.0.1:{secure.server.server_port}"}


def test_a_proxy_that_refuses_the_tunnel_is_named(secure: Authority, proxy: Server, place: Place) -> None:
    proxy.refuse_connect = True
    error = place.fails(http_source(secure.server), proxy_https=proxy.url, ca_file=str(secure.ca_file))
    assert error.code == "proxy_refused"
    assert f"127.0.0.1:{proxy.server_port}" in error.message
    assert len(proxy.requests) == 1


def test_no_proxy_goes_straight(server: Server, proxy: Server, place: Place) -> None:
    place.fetch(http_source(server), proxy_http=proxy.url, no_proxy="localhost,127.0.0.0/8")
    assert proxy.requests == []


def test_a_proxy_that_drops_ranges_only_costs_time(server: Server, proxy: Server, place: Place) -> None:
    def without_range(handler: Handler) -> None:
        del handler.headers["Range"]
        forward(handler)

    proxy.always = without_range
    server.faults = [cut]
    place.fetch(http_source(server), proxy_http=proxy.url)


# --- limits


def test_the_bandwidth_limit_holds(server: Server, place: Place) -> None:
    artifact = place.artifact(http_source(server))
    started = time.monotonic()
    fetch_artifact(artifact, place.make_settings(), Limiter(2_000_000))
    assert 1.4 < time.monotonic() - started < 4


def test_a_full_disk_is_found_before_anything_is_fetched(server: Server, place: Place) -> None:
    artifact = place.artifact(http_source(server))
    with pytest.raises(FleetfitError) as caught:
        run_artifacts([artifact], place.make_settings(reserve_bytes=10**18), lambda *_: None)
    assert caught.value.code == "disk_too_small"
    assert server.requests == []
    assert place.names() == []


def test_what_is_partial_already_is_not_asked_of_the_disk_again(server: Server, place: Place) -> None:
    server.faults = [cut]
    artifact = place.artifact(http_source(server))
    place.fails(http_source(server), retries=0)
    left = len(CONTENT) - CUT
    check_disk([(artifact, left)], 0, free_bytes=lambda path: left)


# --- killed and run again, as the program that hosts run


@pytest.fixture(scope="session")
def helper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("helper") / "fleetfit-host.pyz"
    path.write_bytes(build_helper_zip())
    return path


def write_job(folder: Path, artifact: Artifact, settings: Settings) -> Path:
    folder.mkdir(exist_ok=True)
    spec = {"schema_version": 1, "artifacts": [artifact_to_dict(artifact)], "settings": vars(settings)}
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder


def test_kill_9_of_the_download_costs_nothing_that_had_come(
    server: Server, place: Place, helper: Path, tmp_path: Path
) -> None:
    artifact = place.artifact(http_source(server))
    slow = place.make_settings(bandwidth_limit_bytes_per_s=1_000_000, timeout_s=5)
    job = write_job(tmp_path / "job", artifact, slow)
    command = [HOST_PYTHON, "-I", str(helper), "download", str(job)]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 20
    while not os.path.exists(artifact.partial) or os.stat(artifact.partial).st_size < CUT:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    had = os.stat(artifact.partial).st_size
    assert place.names() == ["x.gguf.partial", "x.gguf.partial.json"]  # nothing under its final name

    write_job(job, artifact, place.make_settings(timeout_s=5))
    subprocess.run(command, check=True)
    outcome = json.loads((job / "status.json").read_text())["outcomes"][artifact.dest]
    assert outcome["state"] == "downloaded"
    assert outcome["resumed_from"] == had
    assert outcome["bytes_fetched"] == len(CONTENT) - had
    assert Path(artifact.dest).read_bytes() == CONTENT
    assert place.names() == ["x.gguf"]


def test_a_failed_job_says_why_and_exits_with_1(
    server: Server, place: Place, helper: Path, tmp_path: Path
) -> None:
    server.always = block_page
    job = write_job(tmp_path / "job", place.artifact(http_source(server)), place.make_settings())
    command = [HOST_PYTHON, "-I", str(helper), "download", str(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "block page" in done.stderr
    outcome = json.loads((job / "status.json").read_text())
    assert outcome["finished"]
    assert next(iter(outcome["outcomes"].values()))["error"]["code"] == "block_page"
    assert (job / "status.json").stat().st_mode & 0o077 == 0


def test_a_job_of_another_version_is_refused(helper: Path, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text('{"schema_version": 99}')
    command = [HOST_PYTHON, "-I", str(helper), "download", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "99" in done.stderr
