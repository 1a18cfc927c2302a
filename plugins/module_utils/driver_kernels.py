"""Kernels of a host, and what each would do with an NVIDIA card: module, headers, DKMS, nouveau, initramfs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, Optional

from .probe_root import ProbeRoot, Runner

_DKMS_TREE = "/var/lib/dkms"
# DKMS modules whose names begin like the driver's and that are not it (GPUDirect Storage, peer memory).
_NOT_DRIVER = re.compile(r"^nvidia-(fs|peermem|gds|p2p)")
# The driver's main module as Debian (nvidia-current), its legacy branches and everybody else name the file.
_MODULE_FILE = re.compile(
    r"^nvidia(-current|-tesla(-\d+)?|-legacy-\d+xx)?(-open)?\.ko(?P<compressed>\.xz|\.zst|\.gz)?$"
)
# Where that file lies below /lib/modules/<release>: DKMS (Debian, Ubuntu; RHEL's extra), packages (weak-updates,
# Canonical's kernel/nvidia-580srv-open), the .run installer's kernel/drivers/video.
_MODULE_FOLDERS = ("updates/dkms", "extra", "weak-updates", "updates", "kernel/drivers/video", "kernel")
# A log of a failed build has thousands of lines before its error; this is its end.
_LOG_LIMIT_BYTES = 4 << 20
_ERROR_LINE = re.compile(r"\b(fatal )?error:|\berror \d+\b|\*\*\* |: No such file", re.IGNORECASE)
_COMPILER_ERROR = re.compile(r"\b(fatal )?error:", re.IGNORECASE)
_MODPROBE_FOLDERS = (
    *(
        "/etc/modprobe.d",
        "/run/modprobe.d",
        "/usr/local/lib/modprobe.d",
        "/usr/lib/modprobe.d",
        "/lib/modprobe.d",
    ),
)
_BLACKLIST = re.compile(r"^\s*(blacklist\s+nouveau\b|install\s+nouveau\s+/bin/(false|true)\b)", re.MULTILINE)
_CMDLINE_BLACKLIST = re.compile(
    r"(modprobe\.blacklist|module_blacklist|rd\.driver\.blacklist)=\S*\bnouveau\b"
)


def release_key(release: str) -> tuple[tuple[int, str], ...]:
    """Return a key that orders kernel releases by their numbers: 6.1.0-9 is older than 6.1.0-42."""
    return tuple(
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.findall(r"\d+|[^\d]+", release)
    )


def installed_releases(probe: ProbeRoot) -> list[str]:
    """Return the kernels that could be booted; headers alone are none."""
    found = {name[len("vmlinuz-") :] for name in probe.names("/boot") if name.startswith("vmlinuz-")}
    for name in probe.names("/lib/modules"):
        folder = f"/lib/modules/{name}"
        if probe.exists(f"{folder}/vmlinuz") or probe.exists(f"{folder}/kernel"):
            found.add(name)
    # A rescue image (RHEL's 0-rescue-<machine id>) is no kernel of its own.
    return sorted((name for name in found if not name.startswith("0-rescue-")), key=release_key)


def kernels(probe: ProbeRoot, run: Runner, replaced: Optional[Sequence[str]] = None) -> list[dict[str, Any]]:
    """Return the ``kernels`` of the driver facts, oldest first; ``replaced`` stands in for those installed.

    The running kernel is always one of them; of ``replaced`` the first one, where it is not among them.
    """
    running = probe.read("/proc/sys/kernel/osrelease") or os.uname().release
    releases = list(replaced) if replaced else installed_releases(probe)
    if replaced and running not in releases:
        running = releases[0]
    releases = sorted({*releases, running}, key=release_key)
    trees = dkms_trees(probe)
    found = []
    for release in releases:
        state, error, version = dkms_state(probe, release, trees)
        module = module_file(probe, release)
        about = modinfo(probe, run, module) if module else {}
        found.append(
            {
                "release": release,
                "running": release == running,
                "newest": release == releases[-1],
                "headers": has_headers(probe, release),
                "dkms": state,
                "dkms_error": error,
                "module_version": about.get("version") or (version if module else None),
                "module_flavour": flavour_of_license(about.get("license")),
            }
        )
    return found


def has_headers(probe: ProbeRoot, release: str) -> bool:
    """Return whether the kernel's build tree is there (Debian and Ubuntu; RHEL; a kernel built by hand)."""
    build = f"/lib/modules/{release}/build"
    places = [f"/usr/src/linux-headers-{release}", f"/usr/src/kernels/{release}"]
    if not os.path.islink(probe.path(build)):
        places.append(build)
    return any(probe.exists(f"{place}/Makefile") for place in places)


# ---- DKMS -----------------------------------------------------------------------------------------------------


def dkms_trees(probe: ProbeRoot) -> list[str]:
    """Return the folders of the NVIDIA driver in DKMS's tree, one per module and version."""
    return [
        f"{_DKMS_TREE}/{module}/{version}"
        for module in probe.names(_DKMS_TREE)
        if module.startswith("nvidia") and not _NOT_DRIVER.match(module)
        for version in probe.names(f"{_DKMS_TREE}/{module}")
        # kernel-<release>-<arch> are links to what is installed, not versions.
        if not version.startswith("kernel-") and version != "original_module"
    ]


def dkms_state(
    probe: ProbeRoot, release: str, trees: Sequence[str]
) -> tuple[Optional[str], Optional[str], Optional[str]]:
    """Return state, first error line and module version for one kernel, the best of all trees.

    The state is ``installed``, ``built``, ``failed``, ``missing``, or None where DKMS has no NVIDIA module.
    """
    if not trees:
        return None, None, None
    failed = None
    for tree in trees:
        version = tree.rpartition("/")[2]
        for arch in probe.names(f"{tree}/{release}"):
            folder = f"{tree}/{release}/{arch}"
            modules = [match for match in map(_MODULE_FILE.match, probe.names(f"{folder}/module")) if match]
            if modules:
                installed = any(_module_in(probe, release, place) for place in _MODULE_FOLDERS[:4])
                return ("installed" if installed else "built"), None, version
            failed = failed or build_error(probe, f"{folder}/log/make.log", release)
        failed = failed or build_error(probe, f"{tree}/build/make.log", release)
    return ("failed", failed, None) if failed else ("missing", None, None)


def build_error(probe: ProbeRoot, path: str, release: str) -> Optional[str]:
    """Return the first error line of a build's log, if the log is of this kernel; a build that goes on has none."""
    data = probe.read_bytes(path, _LOG_LIMIT_BYTES)
    if data is None:
        return None
    text = data.decode("utf-8", "replace")
    head = re.search(r"make\.log for .* for kernel (\S+)", text[:2000])
    if head and head.group(1) != release:
        return None
    lines = [line.strip() for line in text.splitlines()]
    for pattern in (_COMPILER_ERROR, _ERROR_LINE):
        for line in lines:
            if pattern.search(line):
                return line[:300]
    return None


# ---- the module's file ----------------------------------------------------------------------------------------


def module_file(probe: ProbeRoot, release: str) -> Optional[str]:
    """Return the path of the NVIDIA module that this kernel would load, below the root, or None."""
    for place in _MODULE_FOLDERS:
        found = _module_in(probe, release, place)
        if found:
            return found
    return None


def _module_in(probe: ProbeRoot, release: str, place: str) -> Optional[str]:
    """Return the module's file in a folder or in a folder of it whose name begins with nvidia."""
    folder = f"/lib/modules/{release}/{place}"
    names = probe.names(folder)
    folders = [
        folder,
        *(f"{folder}/{name}" for name in names if name.startswith("nvidia") and ".ko" not in name),
    ]
    for inside in folders:
        for name in probe.names(inside):
            if _MODULE_FILE.match(name):
                return f"{inside}/{name}"
    return None


def modinfo(probe: ProbeRoot, run: Runner, path: str) -> dict[str, str]:
    """Return version and license of a module's file; empty where modinfo is missing or fails."""
    status, output = run(["modinfo", probe.path(path)])
    if status:
        return {}
    found: dict[str, str] = {}
    for line in output.splitlines():
        key, _colon, value = line.partition(":")
        if key in ("version", "license"):
            found.setdefault(key, value.strip())
    return found


def flavour_of_license(text: Optional[str]) -> Optional[str]:
    """Return the flavour by the module's license: ``NVIDIA``, or ``Dual MIT/GPL`` of the open one."""
    if not text:
        return None
    return "open" if "GPL" in text else "proprietary"


# ---- nouveau --------------------------------------------------------------------------------------------------


def nouveau(probe: ProbeRoot, run: Runner, found: Sequence[dict[str, Any]], *, look: bool) -> dict[str, Any]:
    """Return the ``nouveau`` of the driver facts; initramfs are listed (seconds) only with ``look``."""
    files = blacklist_files(probe)
    cmdline = bool(_CMDLINE_BLACKLIST.search(probe.read("/proc/cmdline") or ""))
    inside: Optional[bool] = None
    if look and not cmdline:
        for kernel in found:
            if kernel["running"] or kernel["newest"]:
                loads = initramfs_loads_nouveau(probe, run, kernel["release"], files)
                if loads is not None:
                    inside = bool(inside) or loads
    return {
        "loaded": probe.exists("/sys/module/nouveau"),
        "blacklisted": cmdline or bool(files),
        "in_initramfs": inside,
    }


def blacklist_files(probe: ProbeRoot) -> list[str]:
    """Return the files that keep nouveau from being loaded."""
    paths = [
        f"{folder}/{name}"
        for folder in _MODPROBE_FOLDERS
        for name in probe.names(folder)
        if name.endswith(".conf")
    ]
    return [path for path in paths if _BLACKLIST.search(probe.read(path) or "")]


def initramfs_loads_nouveau(
    probe: ProbeRoot, run: Runner, release: str, files: Sequence[str]
) -> Optional[bool]:
    """Return whether the kernel's initramfs has nouveau without today's blacklist; None where nobody can tell."""
    for path, tool in (
        (f"/boot/initrd.img-{release}", "lsinitramfs"),
        (f"/boot/initramfs-{release}.img", "lsinitrd"),
    ):
        if not probe.exists(path):
            continue
        status, output = run([tool, probe.path(path)])
        if status or not output.strip():
            return None
        if not re.search(r"/nouveau\.ko", output):
            return False
        made = os.stat(probe.path(path)).st_mtime
        for blacklist in files:
            name = os.path.basename(blacklist)
            current = os.stat(probe.path(blacklist)).st_mtime <= made
            if current and re.search(rf"modprobe\.d/{re.escape(name)}\b", output):
                return False
        return True
    return None
