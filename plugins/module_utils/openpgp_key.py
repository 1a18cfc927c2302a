"""The fingerprint of an OpenPGP public key, without gnupg: what is compared before a repository is trusted.

Sources: RFC 9580 (packets 4.2, version 4 fingerprints 5.5.4.2, ASCII armor 6).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator

from .errors import FleetfitError

_PUBLIC_KEY = 6
_ARMOR = re.compile(
    rb"-----BEGIN PGP PUBLIC KEY BLOCK-----\r?\n(.*?)\r?\n?-----END PGP PUBLIC KEY BLOCK-----", re.DOTALL
)


def fingerprints(key: bytes) -> list[str]:
    """Return the fingerprints of all primary keys in a key file, armored or binary: 40 digits, upper case.

    Raises ``key_unreadable`` for anything that is not a version 4 public key.
    """
    found = []
    for binary in _binaries(key):
        for tag, body in _packets(binary):
            if tag != _PUBLIC_KEY:
                continue
            if not body or body[0] != 4:
                raise _unreadable("it has a key of another version than 4")
            # RFC 9580 5.5.4.2: SHA-1 over 0x99, the body's length in two octets, the body.
            digest = hashlib.sha1(  # noqa: S324 - the fingerprint is defined so
                b"\x99" + len(body).to_bytes(2, "big") + body
            )
            found.append(digest.hexdigest().upper())
    if not found:
        raise _unreadable("there is no public key in it")
    return found


def require_fingerprint(key: bytes, fingerprint: str, origin: str) -> None:
    """Raise ``key_fingerprint_mismatch`` unless the file's only primary key has this fingerprint."""
    wanted = "".join(fingerprint.split()).upper()
    found = fingerprints(key)
    if found != [wanted]:
        raise FleetfitError(
            f"The key from {origin} has the fingerprint {' and '.join(found)}, and {wanted} is expected.",
            code="key_fingerprint_mismatch",
            remedy="Nothing was installed. Find out who changed the key before you trust another one "
            "(nvidia_driver_key_fingerprint).",
        )


def _binaries(key: bytes) -> Iterator[bytes]:
    # RFC 9580 4.2: bit 7 of a packet's first octet is set, which no armored text begins with.
    if key[:1] >= b"\x80" or b"-----BEGIN PGP" not in key:
        yield key
        return
    for match in _ARMOR.finditer(key):
        text = match.group(1)
        # Headers end at the first empty line; without headers the block begins with one.
        body = text.partition(b"\n\n" if b"\n\n" in text else b"\r\n\r\n")[2]
        lines = (body or text).split()
        try:
            yield base64.b64decode(
                b"".join(line for line in lines if not line.startswith(b"=")), validate=True
            )
        except binascii.Error:
            raise _unreadable("its armor is damaged") from None


def _packets(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and body of each packet; partial lengths do not occur in keys."""
    at = 0
    while at < len(data):
        head = data[at]
        if not head & 0x80:
            raise _unreadable("it is no OpenPGP key")
        at += 1
        if head & 0x40:
            tag = head & 0x3F
            first = data[at] if at < len(data) else 0
            if first < 192:
                size, width = first, 1
            elif first < 224:
                size, width = ((first - 192) << 8) + int.from_bytes(data[at + 1 : at + 2], "big") + 192, 2
            elif first == 255:
                size, width = int.from_bytes(data[at + 1 : at + 5], "big"), 5
            else:
                raise _unreadable("it has packets of an unknown length")
        else:
            tag = (head >> 2) & 0x0F
            kind = head & 3
            if kind == 3:
                raise _unreadable("it has packets of an unknown length")
            width = 1 << kind
            size = int.from_bytes(data[at : at + width], "big")
        at += width
        if at + size > len(data):
            raise _unreadable("it ends too early")
        yield tag, data[at : at + size]
        at += size


def _unreadable(why: str) -> FleetfitError:
    return FleetfitError(
        f"The repository's key cannot be read: {why}.",
        code="key_unreadable",
        remedy="Give a version 4 OpenPGP public key, armored or binary (nvidia_driver_key_url, "
        "nvidia_driver_key_file).",
    )
