"""Secrets: files on a host that services read as credentials, and the controller's store beside them."""

from __future__ import annotations

import os
import secrets
import stat
import string
from typing import Optional

from .errors import FleetfitError
from .manifest import write_atomic

# 62 characters, 5.95 bits each: 32 of them are 190 bits. Nothing that a shell or a URL treats specially.
ALPHABET = string.ascii_letters + string.digits
MIN_LENGTH = 8


def check_value(name: str, value: str) -> str:
    """Return ``value`` if it can be a secret; raise FleetfitError, which does not repeat it, otherwise."""
    if len(value) < MIN_LENGTH or any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise FleetfitError(
            f"The value of the secret {name} has control characters or fewer than {MIN_LENGTH} characters.",
            code="bad_secret",
            remedy="Give one line of at least 8 characters, or leave it empty to have one generated.",
        )
    return value


def generate(length: int) -> str:
    """Return ``length`` random letters and digits from the system's generator."""
    if length < MIN_LENGTH:
        raise FleetfitError(
            f"A secret of {length} characters is too short.", code="bad_secret", remedy="Use 8 or more."
        )
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def read_secret(path: str) -> Optional[str]:
    """Return the secret in the file, or None where there is no file or nothing in it."""
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read().strip() or None
    except FileNotFoundError:
        return None


def _is_private(path: str) -> bool:
    status = os.stat(path)
    return stat.S_IMODE(status.st_mode) == 0o600 and status.st_uid == os.geteuid()


def write_secret(path: str, value: str, *, check_mode: bool = False) -> bool:
    """Make the file hold ``value`` and be readable by its owner alone; return whether anything changed."""
    if read_secret(path) == value and _is_private(path):
        return False
    if not check_mode:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        write_atomic(path, value.encode(), 0o600)
    return True
