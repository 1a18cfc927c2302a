"""Fetching one artifact into ``<dest>.partial``: resumed, verified, never spliced blindly.

What a proxy or a mirror may do to a download, and what happens then: a range is ignored (starts again), a
wrong Content-Range (refused, starts again without ranges), a block page with status 200 (refused before the
first byte is kept), a cut or stalled connection (resumed, a bounded number of times), a signed address that
expired (asked for again), other bytes than promised (removed).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.client
import os
import re
import socket
import stat
import time
from dataclasses import dataclass, field
from typing import BinaryIO, Callable, Optional

from .artifact import (
    Artifact,
    Settings,
    Source,
    boot_id,
    make_parent,
    partial_bytes,
    read_json,
    remove_partial,
    write_json,
)
from .errors import FleetfitError
from .http_client import Answer, ClientSettings, describe_route, open_url, proxy_for
from .units import KIB, MIB, format_size

_CHUNK_BYTES = 256 * KIB  # a progress step; larger reads measured no faster over loopback
_SYNC_EVERY_BYTES = 64 * MIB  # what a power cut may cost
_LOWEST_SPEED_BYTES_PER_S = 1 * KIB  # below it for stall_s a connection counts as stalled
_LONGEST_WAIT_S = 30.0  # between two tries
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)\Z")
_RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)

# Called with the bytes that the partial file holds now.
Progress = Callable[[int], None]


@dataclass
class Fetched:
    """How an artifact's content came: from which source, bytes moved, and from which offset it went on."""

    source: str
    bytes_fetched: int
    resumed_from: int
    warnings: list[str] = field(default_factory=list)


class SourceError(Exception):
    """This source cannot deliver the artifact; the next one may."""

    def __init__(self, code: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy


class _InterruptedError(Exception):
    """The transfer stopped for a reason that may pass."""

    def __init__(self, code: str, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        self.wait_s = wait_s


class _RangeError(Exception):
    """This server must be asked for the whole file."""


class Limiter:
    """Keeps the average of all transfers of a job below a number of bytes per second; 0 is no limit."""

    def __init__(self, bytes_per_s: int) -> None:
        self.bytes_per_s = bytes_per_s
        self._next = 0.0

    def chunk_bytes(self) -> int:
        """Return how much to read at once: a tenth of a second's worth, so that the rate stays even."""
        return max(KIB, min(_CHUNK_BYTES, self.bytes_per_s // 10)) if self.bytes_per_s else _CHUNK_BYTES

    def wait(self, count: int) -> None:
        """Sleep until ``count`` more bytes are within the limit."""
        if not self.bytes_per_s:
            return
        now = time.monotonic()
        self._next = max(self._next, now) + count / self.bytes_per_s
        time.sleep(max(0.0, self._next - now))


class PartialFile:
    """``<dest>.partial``, locked for this process, with its content's hash and notes for the next run."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        make_parent(artifact.dest)
        kept = partial_bytes(artifact)
        descriptor = os.open(artifact.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._stream: BinaryIO = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._stream.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise FleetfitError(
                f"Another process is downloading {artifact.dest}.",
                code="download_in_progress",
                remedy="Wait until it has finished, then run again.",
            ) from None
        self.size = 0
        self.received = 0  # bytes from the network, discarded ones too
        self.resumed_from = kept
        self.pieces = 0  # how many answers the content is made of
        self._digest = hashlib.sha256()
        self._synced = 0
        # Which source's answer this is part of, and its strong ETag: the guard of the next range.
        notes = read_json(artifact.sidecar) if kept else None
        self.validator = (str((notes or {}).get("source")), (notes or {}).get("etag"))
        self._adopt(kept)

    def _adopt(self, kept: int) -> None:
        os.ftruncate(self._stream.fileno(), kept)
        while self.size < kept:
            chunk = self._stream.read(4 * MIB)
            if not chunk:
                break
            self._digest.update(chunk)
            self.size += len(chunk)
        self._synced = self.size
        self.pieces = 1 if self.size else 0
        self._write_notes()

    def restart(self) -> None:
        """Forget the content."""
        os.ftruncate(self._stream.fileno(), 0)
        self._stream.seek(0)
        self._digest = hashlib.sha256()
        self.size = self._synced = self.pieces = 0
        self._write_notes()

    def write(self, data: bytes) -> None:
        """Append ``data`` that came over the network."""
        self.received += len(data)
        self.append(data)

    def append(self, data: bytes) -> None:
        """Append ``data``."""
        view = memoryview(data)
        while view:
            view = view[self._stream.write(view) :]
        self._digest.update(data)
        self.size += len(data)
        if self.size - self._synced >= _SYNC_EVERY_BYTES:
            self.sync()

    def sync(self) -> None:
        """Write the content to the disk and note how much of it a power cut cannot take."""
        os.fsync(self._stream.fileno())
        self._synced = self.size
        self._write_notes()

    def _write_notes(self) -> None:
        write_json(
            self.artifact.sidecar,
            {
                "sha256": self.artifact.sha256,
                "size": self.artifact.size,
                "synced_bytes": self._synced,
                "source": self.validator[0],
                "etag": self.validator[1],
                "boot_id": boot_id(),
            },
        )

    def note_validator(self, source: str, etag: Optional[str]) -> None:
        """Remember the ETag of the answer that is being written, None where it has no strong one."""
        if self.validator != (source, etag):
            self.validator = (source, etag)
            self._write_notes()

    @property
    def sha256(self) -> str:
        """Return the hash of what was written so far."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Release the file; its content stays for the next run."""
        self._stream.close()


def fetch_artifact(
    artifact: Artifact, settings: Settings, limiter: Limiter, progress: Optional[Progress] = None
) -> Fetched:
    """Fetch ``artifact`` from the first of its sources that delivers it into ``artifact.partial``, verified.

    Sources on the controller are passed over. Raises FleetfitError with the code of the last source's failure
    and every source's reason; after a wrong checksum nothing partial is left.
    """
    partial = PartialFile(artifact)
    resumed_from = partial.size
    warnings: list[str] = []
    failures: list[SourceError] = []
    try:
        for source in artifact.sources:
            if source.on_controller:
                continue
            try:
                if partial.size != artifact.size or partial.sha256 != artifact.sha256:
                    _fetch_from(source, artifact, settings, partial, limiter, progress or _ignore, warnings)
                partial.sync()
                return Fetched(source.describe(), partial.received, resumed_from, warnings)
            except SourceError as error:
                failures.append(error)
    finally:
        partial.close()
    if not partial.size:
        remove_partial(artifact)
    raise _all_failed(artifact, failures, partial.size)


def _ignore(_bytes: int) -> None:
    pass


def _all_failed(artifact: Artifact, failures: list[SourceError], kept: int) -> FleetfitError:
    reasons = " ".join(error.message for error in failures) or "It has no source that this host can reach."
    kept_text = f" {format_size(kept)} are kept, the next run goes on from there." if kept else ""
    last = (
        failures[-1] if failures else SourceError("no_source", "", "Give an http, hub or host file source.")
    )
    return FleetfitError(
        f"The artifact {artifact.name} was not fetched: {reasons}{kept_text}",
        code=last.code,
        remedy=last.remedy,
    )


def _fetch_from(
    source: Source,
    artifact: Artifact,
    settings: Settings,
    partial: PartialFile,
    limiter: Limiter,
    progress: Progress,
    warnings: list[str],
) -> None:
    if source.type == "file":
        _copy_file(source, artifact, partial, progress)
        _verify(source.describe(), artifact, partial)
        return
    download = _Download(source, artifact, settings, partial, limiter, progress, warnings)
    download.run()
    if partial.sha256 != artifact.sha256 and partial.pieces > 1:
        # The pieces may be from different contents: one clean try decides.
        partial.restart()
        download.run()
    _verify(describe_route(source.address(), download.proxy), artifact, partial)


def _verify(origin: str, artifact: Artifact, partial: PartialFile) -> None:
    if partial.sha256 == artifact.sha256:
        return
    found = partial.sha256
    partial.restart()
    raise SourceError(
        "wrong_checksum",
        f"{origin} sent {artifact.size} bytes with the sha256 {found}, expected was {artifact.sha256}.",
        "The file was removed and any older one left in place. Compare the checksum with its publisher: the "
        "source or a proxy changed the content, or the pinned checksum is wrong.",
    )


def _copy_file(source: Source, artifact: Artifact, partial: PartialFile, progress: Progress) -> None:
    partial.restart()
    try:
        with open(source.path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != artifact.size:
                raise SourceError(
                    "wrong_size",
                    f"{source.path} on this host has {size} bytes, expected were {artifact.size}.",
                    "Put the pinned file there, or correct the artifact's size and sha256.",
                )
            while True:
                chunk = stream.read(4 * MIB)
                if not chunk:
                    return
                partial.append(chunk)
                progress(partial.size)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise SourceError(
            "file_missing",
            f"{source.path} on this host cannot be read: {error.strerror}.",
            "Put the file there, or name another source.",
        ) from error


class _Download:
    """One HTTP or hub source: tries until the partial file has the artifact's size."""

    def __init__(
        self,
        source: Source,
        artifact: Artifact,
        settings: Settings,
        partial: PartialFile,
        limiter: Limiter,
        progress: Progress,
        warnings: list[str],
    ) -> None:
        self.source = source
        self.artifact = artifact
        self.settings = settings
        self.partial = partial
        self.limiter = limiter
        self.progress = progress
        self.client = ClientSettings(
            settings.proxy_http,
            settings.proxy_https,
            settings.no_proxy,
            settings.ca_file,
            settings.timeout_s,
        )
        self.url = source.address()
        self.proxy = proxy_for(self.url, self.client)
        self.token = self._read_token(warnings)
        self.ranges = True
        noted_source, etag = partial.validator
        self.etag: Optional[str] = etag if noted_source == source.describe() else None

    def _read_token(self, warnings: list[str]) -> Optional[str]:
        path = self.settings.token_file
        if self.source.type != "hub" or not path:
            return None
        if not self.url.startswith("https://"):
            warnings.append(f"The token was not sent to {self.source.endpoint}, which is not https.")
            return None
        try:
            status = os.stat(path)
            if stat.S_IMODE(status.st_mode) & 0o077:
                raise FleetfitError(
                    f"The token file {path} has the mode {stat.S_IMODE(status.st_mode):04o}, so others "
                    "can read it.",
                    code="token_file_readable",
                    remedy=f"Run chmod 600 {path}, and replace the token if others may have read it.",
                )
            with open(path, encoding="utf-8") as stream:
                return stream.read().strip() or None
        except OSError as error:
            raise FleetfitError(
                f"The token file {path} cannot be read on this host: {error.strerror}.",
                code="token_file_missing",
                remedy="Put the hub's token there with mode 0600, or leave token_file empty.",
            ) from error

    def run(self) -> None:
        """Fetch until the size is reached; raises SourceError where this source cannot."""
        failures, best = 0, self.partial.size
        while self.partial.size < self.artifact.size:
            try:
                self._try_once()
            except _RangeError:
                self.ranges = False
            except (_InterruptedError, OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in (
                    errno.ENOSPC,
                    errno.EDQUOT,
                    errno.EROFS,
                    errno.EIO,
                ):
                    raise FleetfitError(
                        f"Writing {self.artifact.partial} failed: {error.strerror}.",
                        code="disk_write_failed",
                        remedy="Free space or repair the disk, then run again: it goes on from here.",
                    ) from error
                # Only bytes that no earlier try had count: a server that always cuts at one place must end.
                failures = 0 if self.partial.size > best else failures
                best = max(best, self.partial.size)
                failures += 1
                if failures > self.settings.retries:
                    raise self._gave_up(error, failures) from error
                wait_s = self.settings.backoff_s * 2 ** (failures - 1)
                asked_s = error.wait_s if isinstance(error, _InterruptedError) else 0.0
                time.sleep(min(max(wait_s, asked_s), _LONGEST_WAIT_S))

    def _gave_up(self, error: Exception, tries: int) -> SourceError:
        code = error.code if isinstance(error, _InterruptedError) else "connection_failed"
        if isinstance(error, socket.timeout):
            code = "connection_stalled"
        reason = str(error) or type(error).__name__
        return SourceError(
            code,
            f"{describe_route(self.url, self.proxy)} failed {tries} times without getting further: {reason}.",
            "Check the network, the proxy settings and the server, then run again.",
        )

    def _try_once(self) -> None:
        start = self.partial.size if self.ranges else 0
        headers = {}
        if start:
            headers["Range"] = f"bytes={start}-"
            if self.etag:
                headers["If-Range"] = self.etag
        try:
            answer = open_url(self.url, self.client, headers=headers, token=self.token)
        except FleetfitError as error:
            raise SourceError(error.code, error.message, error.remedy or "") from error
        try:
            self.proxy = answer.proxy
            self._check_promises(answer)
            self._check_status(answer, start)
            self._check_content(answer)
            if answer.status == 206:
                self._check_range(answer, start)
            self._receive(answer, start)
        finally:
            answer.close()

    def _check_promises(self, answer: Answer) -> None:
        """Compare what a hub says of the file before it redirects (X-Linked-Size, X-Linked-Etag)."""
        size = answer.first_headers.get("x-linked-size", "")
        sha256 = answer.first_headers.get("x-linked-etag", "").strip('"')
        if size.isdecimal() and int(size) != self.artifact.size:
            raise self._wrong_size(answer, int(size))
        if re.fullmatch(r"[0-9a-f]{64}", sha256) and sha256 != self.artifact.sha256:
            raise SourceError(
                "wrong_checksum",
                f"{answer.describe()} announces the sha256 {sha256}, expected was {self.artifact.sha256}.",
                "Nothing was downloaded. Pin the file again with fleetfit catalog pin if its publisher "
                "replaced it.",
            )

    def _check_status(self, answer: Answer, start: int) -> None:
        status = answer.status
        if status == 200 or (status == 206 and start):
            return
        where = answer.describe()
        if status == 206:
            raise SourceError(
                "wrong_content_range",
                f"{where} answered 206 (a part) where the whole file was asked for.",
                "Use another source, or have the proxy pass requests on unchanged.",
            )
        if status == 416 and start:
            raise _RangeError
        if status in _RETRY_STATUS:
            raise _InterruptedError("server_error", f"{where} answered {status}", _retry_after(answer))
        if status == 403 and answer.redirected:
            # Storage behind a hub refuses an expired signature: the next try asks the hub for a new one.
            raise _InterruptedError("signed_url_refused", f"{where} answered 403 to a signed address")
        if status == 407:
            raise SourceError(
                "proxy_refused",
                f"{where} answered 407: the proxy wants a user and a password.",
                "Write them into the proxy's URL: http://user:password@host:port.",
            )
        if status in (401, 403):
            remedy = (
                "Accept the model's licence on the hub and give a token in token_file."
                if self.source.type == "hub"
                else "Allow this host at the server or proxy."
            )
            raise SourceError("access_refused", f"{where} answered {status}.", remedy)
        raise SourceError(
            "not_found" if status in (404, 410) else "server_error",
            f"{where} answered {status}.",
            "Correct the source's address, or put the file on the mirror.",
        )

    def _check_content(self, answer: Answer) -> None:
        encoding = (answer.header("Content-Encoding") or "identity").lower()
        if encoding != "identity":
            raise SourceError(
                "content_encoded",
                f"{answer.describe()} sent the file with Content-Encoding {encoding}, which was not asked "
                "for.",
                "Switch off compression for this path on the server or proxy, or use another source.",
            )
        length = answer.header("Content-Length")
        whole = int(length) if length and length.isdecimal() and answer.status == 200 else None
        html = (answer.header("Content-Type") or "").lower().startswith("text/html")
        if html and whole != self.artifact.size:
            raise self._block_page(answer)
        if whole is not None and whole != self.artifact.size:
            raise self._wrong_size(answer, whole)

    def _block_page(self, answer: Answer) -> SourceError:
        return SourceError(
            "block_page",
            f"{answer.describe()} answered with an HTML page instead of the file, as a proxy's block page "
            "or a "
            "login page does.",
            "Allow this address at the proxy, list its host in no_proxy, or use a mirror.",
        )

    def _wrong_size(self, answer: Answer, size: int) -> SourceError:
        return SourceError(
            "wrong_size",
            f"{answer.describe()} offers {size} bytes, expected were {self.artifact.size}.",
            "Pin the file again if its publisher replaced it; else a proxy or mirror holds something else.",
        )

    def _check_range(self, answer: Answer, start: int) -> None:
        text = answer.header("Content-Range") or ""
        match = _CONTENT_RANGE.match(text)
        fits = (
            match is not None
            and int(match[1]) == start
            and int(match[2]) < self.artifact.size
            and match[3] in ("*", str(self.artifact.size))
        )
        if not fits:
            raise _RangeError
        etag = answer.header("ETag")
        if self.etag and etag and etag != self.etag:
            raise _RangeError

    def _receive(self, answer: Answer, start: int) -> None:
        # A weak validator does not promise the same bytes (RFC 9110, 8.8.1), so it cannot guard a range.
        etag = answer.header("ETag")
        self.etag = etag if etag and not etag.startswith("W/") else None
        slowest = _LOWEST_SPEED_BYTES_PER_S
        if self.limiter.bytes_per_s:
            slowest = min(slowest, self.limiter.bytes_per_s // 2)
        deadline, counted = time.monotonic() + self.settings.stall_s, 0
        fresh = True
        while self.partial.size < self.artifact.size or fresh:
            data = answer.response.read1(self.limiter.chunk_bytes())
            if not data:
                raise _InterruptedError(
                    "connection_cut", f"{answer.describe()} ended the connection too early"
                )
            if fresh:
                self._begin(answer, data)
                fresh = False
            if self.partial.size + len(data) > self.artifact.size:
                received = self.partial.size + len(data)
                self.partial.restart()
                raise self._wrong_size(answer, received)
            self.partial.write(data)
            self.progress(self.partial.size)
            self.limiter.wait(len(data))
            counted += len(data)
            if time.monotonic() > deadline:
                if counted < slowest * self.settings.stall_s:
                    raise _InterruptedError("connection_stalled", f"{answer.describe()} sends almost nothing")
                deadline, counted = time.monotonic() + self.settings.stall_s, 0

    def _begin(self, answer: Answer, data: bytes) -> None:
        """Decide on the first bytes, before anything kept is given up."""
        if answer.status == 200:
            kind = answer.header("Content-Type")
            page = data.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html"))
            if page and not kind and answer.header("Content-Length") is None:
                raise self._block_page(answer)
            if self.partial.size:
                self.partial.restart()
        self.partial.note_validator(self.source.describe(), self.etag)
        self.partial.pieces += 1


def _retry_after(answer: Answer) -> float:
    text = answer.header("Retry-After") or ""
    return float(text) if text.isdecimal() else 0.0
