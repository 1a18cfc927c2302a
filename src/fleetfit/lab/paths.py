"""Where the lab keeps things, and names derived from the checkout's path so that two labs never meet."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Below Linux's default range of ephemeral ports (32768-60999, net.ipv4.ip_local_port_range).
FIRST_PORT = 20000
PORT_COUNT = 12000


def checkout_root() -> Path:
    """Return the checkout that this package is installed from (editable)."""
    return Path(__file__).resolve().parents[3]


def cache_root() -> Path:
    """Return the user's cache folder for fleetfit, keyed by content below."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fleetfit"


@dataclass(frozen=True)
class LabPaths:
    """The lab of one checkout: its folder and its names."""

    root: Path

    @property
    def lab_id(self) -> str:
        """Eight hex digits of the checkout path's hash."""
        return hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:8]

    @property
    def folder(self) -> Path:
        """The lab's state folder, .lab in the checkout."""
        return self.root / ".lab"

    @property
    def network(self) -> str:
        """The container network's name."""
        return f"fleetfit-{self.lab_id}"

    def container(self, host: str) -> str:
        """Return the name of a host's container."""
        return f"fleetfit-{self.lab_id}-{host}"

    def port_candidates(self, purpose: str) -> Iterator[int]:
        """Yield loopback ports for a purpose ("ssh edge-cpu"), the same ones in the same order each time."""
        seed = hashlib.sha256(f"{self.lab_id} {purpose}".encode()).digest()
        start = int.from_bytes(seed[:4], "big") % PORT_COUNT
        for distance in range(PORT_COUNT):
            yield FIRST_PORT + (start + distance) % PORT_COUNT


def lab_paths() -> LabPaths:
    """Return the lab of the checkout that this package is installed from."""
    return LabPaths(checkout_root())


def write_atomically(path: Path, content: str | bytes, mode: int = 0o600) -> bool:
    """Write a file beside ``path`` and rename it over; return whether the content differed."""
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and path.read_bytes() == data and path.stat().st_mode & 0o777 == mode:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            os.fchmod(stream.fileno(), mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the kernel drops it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
