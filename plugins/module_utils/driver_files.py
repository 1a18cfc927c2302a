"""The files that keep an NVIDIA driver where it was put: repositories, pins, exclusions, module options.

Pure: a decision of `driver_decision` and catalog data in, paths with their text out. What was not run on a
real host of
its distribution is labelled so in tests/golden/drivers.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

# In the name of every file of ours: what else names NVIDIA's repository is somebody else's.
OWN_MARK = "fleetfit-nvidia"
_HEADER = "# Managed by fleetfit (role nvidia_driver); changes are overwritten."

APT_SOURCES = f"/etc/apt/sources.list.d/{OWN_MARK}.sources"
APT_PREFERENCES = f"/etc/apt/preferences.d/{OWN_MARK}"
APT_UNATTENDED = f"/etc/apt/apt.conf.d/52{OWN_MARK}"
DNF_REPOSITORY = f"/etc/yum.repos.d/{OWN_MARK}.repo"
DNF_MODULE = "/etc/dnf/modules.d/nvidia-driver.module"
DNF_VERSIONLOCK = "/etc/dnf/plugins/versionlock.list"
DNF_AUTOMATIC = "/etc/dnf/automatic.conf"
MODPROBE = f"/etc/modprobe.d/{OWN_MARK}.conf"
MODULES_LOAD = f"/etc/modules-load.d/{OWN_MARK}.conf"


def key_path(kind: str) -> str:
    """Return where a repository's verified key lies, for ``apt`` or ``dnf``."""
    return (
        f"/etc/apt/keyrings/{OWN_MARK}.asc" if kind == "apt" else f"/etc/pki/rpm-gpg/RPM-GPG-KEY-{OWN_MARK}"
    )


def render(decision: Mapping[str, Any], data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the files: ``path``, ``content``, ``mode``, ``part`` and ``block``.

    ``part`` is ``repository`` (placed with the key, in one step), ``exclusion`` or ``module``. ``block`` is null,
    or the
    expression after whose line the content is put into a file that belongs to somebody else.
    """
    files: list[dict[str, Any]] = []

    def add(part: str, path: str, lines: Sequence[str], block: Any = None) -> None:
        text = [*lines] if block is not None else [_HEADER, *lines]
        files.append(
            {"part": part, "path": path, "content": "\n".join(text) + "\n", "mode": "0644", "block": block}
        )

    repository = decision["repository"]
    if decision["family"] == "debian":
        if repository:
            add("repository", APT_SOURCES, _apt_sources(repository))
        if decision["pins"]:
            add("repository", APT_PREFERENCES, _apt_preferences(decision["pins"]))
        add("exclusion", APT_UNATTENDED, _unattended_upgrades(data))
    else:
        add("repository", DNF_REPOSITORY, _dnf_repository(repository))
        if decision["lock"]["kind"] == "module_stream":
            add("repository", DNF_MODULE, _dnf_module(decision["lock"]["stream"]))
        # It stands while packages change; after that the same block names each package with its version
        # (versionlock_entries). A pattern without a version, as NVIDIA's guide gives to the command
        # (\*nvidia\*580\*), locks nothing here: the command resolves it, the file has names and versions.
        version = decision["lock"]["version"]
        locked = [f"{name}-{version}" for name in data["driver_packages"]["dnf_locked"]]
        add("repository", DNF_VERSIONLOCK, locked, block="EOF")
        patterns = " ".join(data["driver_packages"]["patterns"])
        add("exclusion", DNF_AUTOMATIC, [f"excludepkgs = {patterns}"], block=r"^\[base\]")
    add("module", MODPROBE, ["blacklist nouveau", "options nouveau modeset=0"])
    add("module", MODULES_LOAD, decision["modules_load"])
    return files


def versionlock_entries(packages: Mapping[str, str]) -> list[str]:
    """Return what holds each package (name to epoch:version-release) at its version in dnf's versionlock.list.

    The form is the one that `dnf versionlock add` writes (pkgtup2spec of dnf-plugins-core's versionlock.py):
    name-epoch:version-release.*, with 0 for no epoch.
    """
    return [
        f"{name}-{version if ':' in version else f'0:{version}'}.*"
        for name, version in sorted(packages.items())
    ]


def _apt_sources(repository: Mapping[str, Any]) -> list[str]:
    """Return deb822 text; NVIDIA's repository is flat, so that its suite is a path and has no components."""
    if repository["kind"] == "apt":
        return [
            "Types: deb",
            f"URIs: {repository['url']}",
            "Suites: /",
            f"Signed-By: {repository['signed_by']}",
        ]
    components = f"Components: {' '.join(repository['components'])}"
    signed_by = f"Signed-By: {repository['signed_by']}"
    lines = [
        "Types: deb",
        f"URIs: {repository['url']}",
        f"Suites: {' '.join(repository['suites'])}",
        components,
        signed_by,
    ]
    if repository["security_url"] and repository["security_suites"]:
        suites = f"Suites: {' '.join(repository['security_suites'])}"
        lines += ["", "Types: deb", f"URIs: {repository['security_url']}", suites, components, signed_by]
    return lines


def _apt_preferences(pins: Sequence[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for pin in pins:
        lines += [
            *([""] if lines else []),
            f"Package: {' '.join(pin['packages'])}",
            f"Pin: {pin['pin']}",
            f"Pin-Priority: {pin['priority']}",
        ]
    return lines


def _unattended_upgrades(data: Mapping[str, Any]) -> list[str]:
    """Return the blacklist of unattended-upgrades, whose entries are regular expressions from a "
    "name's start."""
    lines = ["Unattended-Upgrade::Package-Blacklist {"]
    lines += [f'    "{_expression(pattern)}";' for pattern in data["driver_packages"]["patterns"]]
    return [*lines, "};"]


def _expression(pattern: str) -> str:
    """Return the regular expression of a shell pattern, as apt's configuration takes it: no backslashes."""
    plain = pattern.rstrip("*")
    if plain == pattern:
        return f"^{plain}$"
    if "*" in plain or "?" in plain:
        return "^" + fnmatch.translate(plain)
    return f"^{plain}"


def _dnf_repository(repository: Mapping[str, Any]) -> list[str]:
    return [
        f"[{OWN_MARK}]",
        "name=NVIDIA driver",
        f"baseurl={repository['url']}",
        "enabled=1",
        "gpgcheck=1",
        f"gpgkey=file://{repository['signed_by']}",
    ]


def _dnf_module(stream: str) -> list[str]:
    return ["[nvidia-driver]", "name=nvidia-driver", f"stream={stream}", "profiles=", "state=enabled"]
