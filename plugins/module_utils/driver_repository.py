"""A package repository of ours, put in place whole or not at all: key verified, files written, indexes fetched.

Where the repository cannot be reached, the files that were there before are there again.
"""

from __future__ import annotations

import base64
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

from .errors import FleetfitError
from .http_client import ClientSettings, open_url
from .openpgp_key import require_fingerprint
from .probe_root import Runner

# NVIDIA's keys have some 2 KB; anything far larger is no key.
KEY_LIMIT_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Change:
    """What a run writes: path to content, of the files that differ."""

    files: Mapping[str, bytes]
    refresh: bool


def fetch_key(url: str, settings: ClientSettings) -> bytes:
    """Return what ``url`` has; raises ``key_unreachable``."""
    try:
        answer = open_url(url, settings)
    except (OSError, FleetfitError) as error:
        raise _key_unreachable(url, str(error)) from None
    try:
        if answer.status != 200:
            raise _key_unreachable(url, f"HTTP status {answer.status} from {answer.describe()}")
        return answer.response.read(KEY_LIMIT_BYTES)
    except OSError as error:
        raise _key_unreachable(url, str(error)) from None
    finally:
        answer.close()


def _key_unreachable(url: str, why: str) -> FleetfitError:
    return FleetfitError(
        f"The repository's key {url} could not be fetched: {why}.",
        code="key_unreachable",
        remedy="Nothing was changed. Check the address, proxy and certificate authorities; or give the key as "
        "a file on the controller (nvidia_driver_key_file).",
    )


def read(path: str) -> Optional[bytes]:
    """Return a file's content, None where it is not there."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def plan(
    files: Sequence[Mapping[str, Any]],
    key: Optional[Mapping[str, Any]],
    get_key: Callable[[str], bytes],
) -> Change:
    """Return what has to be written. ``key`` has ``path``, ``fingerprint`` and ``content`` (base64) or ``url``.

    A key that is in place with the right fingerprint is not fetched again. Raises :class:`FleetfitError` before
    anything is written.
    """
    changed: dict[str, bytes] = {}
    if key:
        present = read(key["path"])
        wanted = base64.b64decode(key["content"]) if key.get("content") else None
        if not (present is not None and wanted in (None, present) and _is(present, key["fingerprint"])):
            origin = "the controller" if wanted is not None else key["url"]
            content = wanted if wanted is not None else get_key(key["url"])
            require_fingerprint(content, key["fingerprint"], origin)
            changed[key["path"]] = content
    for item in files:
        content = item["content"].encode("utf-8")
        if read(item["path"]) not in (content, without_signed_by(content)):
            changed[item["path"]] = content
    return Change(changed, bool(changed))


def _is(key: bytes, fingerprint: str) -> bool:
    try:
        require_fingerprint(key, fingerprint, "the host")
    except FleetfitError:
        return False
    return True


def without_signed_by(content: bytes) -> bytes:
    """Return the text of apt's sources without its Signed-By lines."""
    return re.sub(rb"(?m)^Signed-By: .*\n", b"", content)


def apply(change: Change, kind: str, sources: str, run: Runner) -> None:
    """Write the files and fetch the repository's index, or leave everything as it was.

    ``kind`` is ``apt``, ``apt_archive`` or ``dnf``, ``sources`` the file that defines the repository. Raises
    ``repository_unreachable``.
    """
    before = {path: read(path) for path in change.files}
    try:
        for path, content in change.files.items():
            _write(path, content)
        if kind == "apt_archive" and not _parses(run):
            # The host's own entry of this archive names no key: apt refuses two entries that differ in that, and
            # an archive of the distribution is signed with keys that apt trusts already.
            for path, content in change.files.items():
                _write(path, without_signed_by(content))
        problem = _refresh(kind, sources, run)
        if problem:
            raise FleetfitError(
                f"The driver's repository does not work: {problem}",
                code="repository_unreachable",
                remedy="The files and the driver that were there before are kept. Check address, proxy and "
                "certificate authorities (nvidia_driver_repository_url names a mirror).",
            )
    except BaseException:
        for path, old in before.items():
            if old is None:
                if os.path.exists(path):
                    os.unlink(path)
            else:
                _write(path, old)
        raise


def _parses(run: Runner) -> bool:
    code, output = run(["apt-get", "-q", "indextargets"])
    return code == 0 and "Conflicting values" not in output


def _refresh(kind: str, sources: str, run: Runner) -> Optional[str]:
    """Fetch the index of this repository alone; return what is wrong, None where nothing is."""
    if kind == "dnf":
        name = os.path.basename(sources).rpartition(".")[0]
        code, output = run(["dnf", "-q", "makecache", "--repo", name])
        lines = [line for line in output.splitlines() if line.startswith("Error")]
    else:
        code, output = run(
            [
                *("apt-get", "-q", "update", "-o", f"Dir::Etc::sourcelist={sources}"),
                *("-o", "Dir::Etc::sourceparts=/dev/null", "-o", "APT::Get::List-Cleanup=0"),
                # Without it a server that does not answer is a mere warning.
                *("-o", "APT::Update::Error-Mode=any", "-o", "Acquire::Retries=1"),
            ]
        )
        lines = [line for line in output.splitlines() if line.startswith(("E:", "W:"))]
    if code == 0:
        return None
    return (lines[0] if lines else f"{kind} ended with status {code}") + "."


def _write(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    temporary = f"{path}.fleetfit-new"
    with open(temporary, "wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
