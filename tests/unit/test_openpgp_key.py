"""The fingerprint of a repository's key, compared without gnupg. The keys in data/openpgp are of gpg 2.2."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.openpgp_key import (
    fingerprints,
    require_fingerprint,
)
from hypothesis import given
from hypothesis import strategies as st

DATA = Path(__file__).parent / "data/openpgp"
# As `gpg --list-keys --with-colons` shows them.
ED25519 = "CBAD315311D02B303CE39453024C2F0793648743"
RSA = "FA215F17F1E889F0C302507AD88CD59B7B04E8A5"


def key(name: str) -> bytes:
    return (DATA / name).read_bytes()


def test_fingerprints_are_gpgs() -> None:
    assert fingerprints(key("ed25519.asc")) == [ED25519]
    assert fingerprints(key("rsa2048.gpg")) == [RSA]
    assert sorted(fingerprints(key("two-keys.asc"))) == sorted([ED25519, RSA])


def test_line_ends_and_a_text_around_the_block_do_not_matter() -> None:
    text = b"Our key:\r\n\r\n" + key("ed25519.asc").replace(b"\n", b"\r\n") + b"\r\nthe end\r\n"
    assert fingerprints(text) == [ED25519]


def test_an_old_armor_with_a_version_line() -> None:
    text = key("ed25519.asc").replace(b"BLOCK-----\n\n", b"BLOCK-----\nVersion: GnuPG v2.0.22\n\n", 1)
    assert fingerprints(text) == [ED25519]


def test_the_expected_key_is_taken_however_it_is_written() -> None:
    require_fingerprint(key("ed25519.asc"), "cbad 3153 11d0 2b30 3ce3  9453 024c 2f07 9364 8743", "here")


@pytest.mark.parametrize("name", ["rsa2048.gpg", "two-keys.asc"])
def test_another_key_or_a_second_one_is_refused(name: str) -> None:
    """A file that holds the right key beside somebody else's would make apt trust both."""
    with pytest.raises(FleetfitError, match=RSA) as caught:
        require_fingerprint(key(name), ED25519, "https://mirror.example.com/key.asc")
    assert caught.value.code == "key_fingerprint_mismatch"
    assert "mirror.example.com" in caught.value.message
    assert "Nothing was installed" in str(caught.value)


def test_one_changed_bit_is_another_key() -> None:
    damaged = bytearray(key("rsa2048.gpg"))
    damaged[100] ^= 1
    assert fingerprints(bytes(damaged)) != [RSA]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>404</html>",
        b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n!!!\n-----END PGP PUBLIC KEY BLOCK-----\n",
        b"\x99\x01\x0d\x04short",
        b"\x98\x02\x03\x00",
        b"\xb4\x01x",
    ],
)
def test_what_is_no_key_is_a_sentence(content: bytes) -> None:
    with pytest.raises(FleetfitError) as caught:
        fingerprints(content)
    assert caught.value.code == "key_unreadable"


@given(st.binary(max_size=300))
def test_no_content_ends_in_a_traceback(content: bytes) -> None:
    try:
        found = fingerprints(content)
    except FleetfitError:
        return
    assert all(len(item) == 40 for item in found)


@given(st.binary(min_size=1, max_size=400).map(lambda tail: b"\x04" + tail))
def test_every_way_to_write_a_length_gives_the_same_fingerprint(body: bytes) -> None:
    size = len(body)
    expected = hashlib.sha1(b"\x99" + size.to_bytes(2, "big") + body).hexdigest().upper()  # noqa: S324
    old = b"\x99" + size.to_bytes(2, "big") + body
    long = b"\xc6\xff" + size.to_bytes(4, "big") + body
    if size < 192:
        short = b"\xc6" + bytes([size]) + body
    else:
        short = b"\xc6" + bytes([192 + ((size - 192) >> 8), (size - 192) & 0xFF]) + body
    assert fingerprints(old) == fingerprints(long) == fingerprints(short) == [expected]
