"""A site's own certificate authorities in a host's trust store, judged by what the bundle really holds."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Callable

from .errors import FleetfitError

PREFIX = "fleetfit-"
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")

RunCommand = Callable[[list[str]], tuple[int, str, str]]


@dataclass(frozen=True)
class TrustStore:
    """Where one family of distributions keeps added authorities, their bundle, and what rebuilds it."""

    directory: str
    bundle: str
    command: tuple[str, ...]


# Debian's update-ca-certificates(8) and Fedora's update-ca-trust(8).
TRUST_STORES = (
    TrustStore(
        "/usr/local/share/ca-certificates",
        "/etc/ssl/certs/ca-certificates.crt",
        ("/usr/sbin/update-ca-certificates",),
    ),
    TrustStore(
        "/etc/pki/ca-trust/source/anchors",
        "/etc/pki/tls/certs/ca-bundle.crt",
        ("/usr/bin/update-ca-trust", "extract"),
    ),
)


@dataclass
class Changes:
    """What has to be done: files to write and to remove, and whether the bundle is rebuilt."""

    write: dict[str, str] = field(default_factory=dict)
    remove: list[str] = field(default_factory=list)
    rebuild: bool = False

    @property
    def any(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.write or self.remove or self.rebuild)


def find_trust_store(root: str = "/") -> TrustStore:
    """Return the trust store that this host has below ``root``; raise FleetfitError where none is known."""
    for store in TRUST_STORES:
        if os.path.exists(os.path.join(root, store.command[0].lstrip("/"))):
            return store
    raise FleetfitError(
        "This host has neither update-ca-certificates nor update-ca-trust, so no authority can be added.",
        code="no_trust_store",
        remedy="Install the package ca-certificates on the host.",
    )


def certificate_bodies(pem: str) -> list[str]:
    """Return the base64 text of every certificate in ``pem``, without white space."""
    return ["".join(body.split()) for body in _CERTIFICATE.findall(pem)]


def check_certificates(certificates: dict[str, str]) -> None:
    """Raise FleetfitError for a name that is no plain file name or a text that holds no certificate."""
    for name, pem in certificates.items():
        if not _NAME.match(name):
            raise FleetfitError(
                f"The certificate name {name!r} is not a plain file name.",
                code="bad_certificate_name",
                remedy="Use letters, digits, dots, dashes and underscores.",
            )
        if not certificate_bodies(pem):
            raise FleetfitError(
                f"The certificate {name!r} holds no PEM certificate (BEGIN CERTIFICATE).",
                code="not_a_certificate",
                remedy="Give the authority in PEM form; openssl x509 -inform der -in FILE converts it.",
            )


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def plan_changes(certificates: dict[str, str], store: TrustStore, root: str = "/") -> Changes:
    """Return what makes the host trust exactly ``certificates`` (name to PEM) among those that we manage.

    The bundle is rebuilt when it lacks one of them, so a run that was killed between the copy and the rebuild
    is finished by the next.
    """
    directory = os.path.join(root, store.directory.lstrip("/"))
    changes = Changes()
    wanted = {f"{PREFIX}{name}.crt": pem for name, pem in certificates.items()}
    for filename, pem in sorted(wanted.items()):
        path = os.path.join(directory, filename)
        if _read(path) != pem:
            changes.write[path] = pem
    present = os.listdir(directory) if os.path.isdir(directory) else []
    for filename in sorted(present):
        if filename.startswith(PREFIX) and filename.endswith(".crt") and filename not in wanted:
            changes.remove.append(os.path.join(directory, filename))
    bundle = set(certificate_bodies(_read(os.path.join(root, store.bundle.lstrip("/")))))
    lacking = any(body not in bundle for pem in certificates.values() for body in certificate_bodies(pem))
    changes.rebuild = lacking or bool(changes.write or changes.remove)
    return changes


def apply_changes(changes: Changes, store: TrustStore, run_command: RunCommand) -> None:
    """Carry out ``changes``; raise FleetfitError when the bundle cannot be rebuilt."""
    for path, pem in changes.write.items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.partial"
        with open(partial, "w", encoding="utf-8") as file:
            file.write(pem)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    for path in changes.remove:
        os.unlink(path)
    if changes.rebuild:
        code, out, err = run_command(list(store.command))
        if code != 0:
            detail = (err or out).strip().splitlines()[-1:] or ["no output"]
            raise FleetfitError(
                f"{store.command[0]} failed with exit code {code}: {detail[0]}.",
                code="trust_store_failed",
                remedy="Run it on the host by hand to see why.",
            )
