"""Byte units: data holds bytes (int), people read GiB with one decimal."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


def format_gib(size_bytes: int) -> str:
    """Return ``size_bytes`` as GiB with one decimal, as people read it: ``11.6 GiB``."""
    return f"{size_bytes / GIB:.1f} GiB"


def format_size(size_bytes: int) -> str:
    """Return ``size_bytes`` in MiB below one GiB, else in GiB with one decimal."""
    if abs(size_bytes) < GIB:
        return f"{round(size_bytes / MIB)} MiB"
    return format_gib(size_bytes)
