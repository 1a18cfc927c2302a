"""What a host tells of its NVIDIA driver: installed, loaded, offered, held, per kernel, and why to reboot.

The shape is that of docs/contracts.md §14. Everything is read below one root; tools run through ``run``. A file
or a tool that is missing leaves null, ``unknown`` or nothing, never an error.
"""

from __future__ import annotations

import datetime
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from .driver_kernels import kernels, nouveau
from .driver_packages import read_packages
from .gpu_facts import PciCard, Problem, loaded_driver_version, long_bus_id, pci_cards
from .host_facts import disk_free_bytes
from .pci_ids import NVIDIA_VENDOR_ID, card_generation, card_name
from .probe_root import ProbeRoot, Runner

SCHEMA_VERSION = 1
# "Bridge: other" of the PCI class codes: how an NVSwitch shows itself.
_SWITCH_CLASS = "0x0680"
# From Blackwell on the switches are behind ConnectX-7 bridges, told from network cards by the model in their vital
# product data: SMDL=SW_MNG (Fabric Manager user guide; bottlerocket and NVIDIA's driver container look for it).
_SWITCH_MANAGER = b"SW_MNG"
_EFI_VARIABLES = "/sys/firmware/efi/efivars"
# EFI_GLOBAL_VARIABLE of the UEFI specification, and SHIM_LOCK_GUID of shim.
_GLOBAL_GUID = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
_SHIM_GUID = "605dab50-e046-4300-abb6-3dd810dd8b23"
# The kernel's view of an efivarfs file: 4 bytes of attributes, then the data (efivarfs.rst).
_EFI_ATTRIBUTES_BYTES = 4
# Where DKMS and Ubuntu's shim-signed keep the certificate that signs modules, in DER.
_MOK_CERTIFICATES = ("/var/lib/dkms/mok.pub", "/var/lib/shim-signed/mok/MOK.der")
# Options of crypttab(5) with which nobody has to type.
_UNATTENDED = re.compile(r"\b(tpm2-device|fido2-device|pkcs11-uri|keyscript)=")
_UNITS = ("nvidia-persistenced", "nvidia-fabricmanager")
_PERSISTENCED = ("/usr/bin/nvidia-persistenced", "/usr/sbin/nvidia-persistenced")


def driver_state(
    root: str = "/",
    *,
    run: Runner,
    accelerators: Sequence[Mapping[str, Any]] = (),
    driver_kernels: Optional[Sequence[str]] = None,
    controller_boot_id: Optional[str] = None,
    local_connection: bool = False,
    branches: Optional[Mapping[str, Any]] = None,
    today: Optional[str] = None,
    problems: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the driver facts of this host; changes nothing.

    ``accelerators`` and ``problems`` are those of the GPU facts (where NVML answered), ``driver_kernels`` replaces
    the kernels installed, ``branches`` maps a branch to its ``end_of_life`` (a day, or null) and whether it is
    ``supported`` (catalog/drivers.yml), ``today`` is an ISO date (default: the host's own).
    """
    probe = ProbeRoot(root)
    cards = pci_cards(probe)
    packages = read_packages(probe, run)
    installed = packages.installed
    loaded = {"version": loaded_driver_version(probe), "flavour": loaded_flavour(probe)}
    listed = kernels(probe, run, driver_kernels)
    running = next(kernel for kernel in listed if kernel["running"])
    installed["flavour"] = installed["flavour"] or running["module_flavour"]
    active = active_units(run)
    switches = nvswitch_count(probe)
    boot_id = probe.read("/proc/sys/kernel/random/boot_id") or ""
    state: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "os": operating_system(probe),
        "gpus": [gpu(card, accelerators, nvswitch=switches > 0) for card in cards],
        "nvswitch_count": switches,
        "loaded": loaded,
        "installed": installed,
        "candidate": packages.candidate,
        "kernels": [{k: v for k, v in kernel.items() if k != "module_flavour"} for kernel in listed],
        "secure_boot": secure_boot(probe),
        "mok": {"enrolled": mok_enrolled(probe), "pending": _efi(probe, "MokNew", _SHIM_GUID) is not None},
        "nouveau": nouveau(probe, run, listed, look=bool(cards or installed["version"])),
        "boot_free_bytes": disk_free_bytes(probe, "/boot") if probe.exists("/boot") else None,
        "boot_id": boot_id,
        "root_needs_passphrase": root_needs_passphrase(probe),
        "dpkg_audit": packages.audit,
        "foreign_sources": packages.foreign_sources,
        "persistenced": {
            "installed": any(probe.exists(path) for path in _PERSISTENCED),
            "active": "nvidia-persistenced" in active,
        },
        "fabricmanager": {
            "installed_version": packages.fabric_manager,
            "active": "nvidia-fabricmanager" in active,
        },
        "uvm_loaded": probe.exists("/sys/module/nvidia_uvm"),
        "is_controller": local_connection or bool(boot_id and boot_id == controller_boot_id),
    }
    state["reboot_reasons"] = reboot_reasons(state)
    entry = (branches or {}).get(installed["branch"] or "") or {}
    state["branch_end_of_life"] = entry.get("end_of_life")
    state["branch_supported"] = entry.get("supported") if entry else None
    day = today or datetime.date.today().isoformat()
    state["problems"] = merged_problems(problems, driver_problems(state, day))
    return state


def merged_problems(seen: Sequence[Mapping[str, Any]], found: Sequence[Problem]) -> list[dict[str, Any]]:
    """Return the problems of the cards with those of the driver; one that both found is told with its versions."""
    codes = {problem.code for problem in found}
    merged = [dict(problem) for problem in seen if problem["code"] not in codes]
    return merged + [
        {"code": p.code, "message": p.message, "remedy": p.remedy, "device": p.device} for p in found
    ]


def operating_system(probe: ProbeRoot) -> dict[str, Any]:
    """Return distribution, version and codename of os-release(5), and the machine's architecture."""
    text = probe.read("/etc/os-release") or probe.read("/usr/lib/os-release") or ""
    fields = {
        match.group(1): match.group(2).strip().strip("\"'")
        for match in re.finditer(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE)
    }
    return {
        "distribution": fields.get("ID"),
        "version": fields.get("VERSION_ID"),
        "codename": fields.get("VERSION_CODENAME"),
        "arch": platform.machine(),
    }


def gpu(card: PciCard, accelerators: Sequence[Mapping[str, Any]], *, nvswitch: bool) -> dict[str, Any]:
    """Return one card: by the PCI id table, and by NVML where it answered."""
    bus_id = long_bus_id(card.address)
    known = next((a for a in accelerators if a.get("pci_bus_id") == bus_id and not a.get("mig_parent")), {})
    generation, capability = card_generation(card.device_id, known.get("compute_capability"))
    return {
        "pci_bus_id": bus_id,
        "pci_device_id": card.device_id,
        "name": known.get("name") or card_name(card.device_id),
        "compute_capability": capability,
        "generation": generation,
        "nvswitch": nvswitch,
    }


def nvswitch_count(probe: ProbeRoot) -> int:
    """Return the number of NVSwitches on the PCI bus, or of the bridges that manage them (B200 and later)."""
    count = 0
    for address in probe.names("/sys/bus/pci/devices"):
        folder = f"/sys/bus/pci/devices/{address}"
        vendor = (probe.read(f"{folder}/vendor") or "").replace("0x", "")
        if vendor == NVIDIA_VENDOR_ID and (probe.read(f"{folder}/class") or "").startswith(_SWITCH_CLASS):
            count += 1
    for device in probe.names("/sys/class/infiniband"):
        if _SWITCH_MANAGER in (
            probe.read_bytes(f"/sys/class/infiniband/{device}/device/vpd", 32 << 10) or b""
        ):
            count += 1
    return count


def loaded_flavour(probe: ProbeRoot) -> Optional[str]:
    """Return the flavour of the kernel module that is loaded, by how it introduces itself."""
    text = probe.read("/proc/driver/nvidia/version") or ""
    if "Kernel Module" not in text:
        return None
    return "open" if "Open Kernel Module" in text else "proprietary"


def active_units(run: Runner) -> set[str]:
    """Return which of the driver's services are active; none where there is no systemd."""
    units = [f"{name}.service" for name in _UNITS]
    status, output = run(["systemctl", "show", "--property=Id,ActiveState", "--", *units])
    found = set()
    for block in output.split("\n\n") if status == 0 else ():
        fields = dict(line.partition("=")[::2] for line in block.splitlines())
        if fields.get("ActiveState") == "active":
            found.add(fields.get("Id", "").partition(".")[0])
    return found


# ---- Secure Boot and disks ------------------------------------------------------------------------------------


def _efi(probe: ProbeRoot, name: str, guid: str) -> Optional[bytes]:
    """Return the data of an EFI variable, or None where there is none."""
    data = probe.read_bytes(f"{_EFI_VARIABLES}/{name}-{guid}")
    return None if data is None else data[_EFI_ATTRIBUTES_BYTES:]


def secure_boot(probe: ProbeRoot) -> str:
    """Return ``enabled``, ``disabled``, ``unsupported`` (no EFI) or ``unknown``, as the kernel decides it.

    The kernel takes shim's own switch into account (drivers/firmware/efi/libstub/secureboot.c).
    """
    if not probe.exists("/sys/firmware/efi"):
        return "unsupported"
    state = _efi(probe, "SecureBoot", _GLOBAL_GUID)
    if not state:
        return "unknown"
    validation_off = (_efi(probe, "MokSBStateRT", _SHIM_GUID) or b"\0")[:1] == b"\1"
    return "enabled" if state[:1] == b"\1" and not validation_off else "disabled"


def mok_enrolled(probe: ProbeRoot) -> Optional[bool]:
    """Return whether the key that signs DKMS modules is in shim's list; None without a key or a list."""
    # The variable holds what fits; the kernel keeps the whole list beside it.
    lists = [
        probe.read_bytes("/sys/firmware/efi/mok-variables/MokListRT"),
        _efi(probe, "MokListRT", _SHIM_GUID),
    ]
    readable = [data for data in lists if data]
    keys = [key for key in map(probe.read_bytes, _MOK_CERTIFICATES) if key]
    if not readable or not keys:
        return None
    return any(key in data for key in keys for data in readable)


def root_needs_passphrase(probe: ProbeRoot) -> bool:
    """Return whether somebody has to type a passphrase before this host's root file system is there."""
    blocks = {name: probe.read(f"/sys/class/block/{name}/dev") for name in probe.names("/sys/class/block")}
    to_look: list[str] = []
    for line in (probe.read("/proc/1/mountinfo") or probe.read("/proc/self/mountinfo") or "").splitlines():
        fields = line.split()
        if len(fields) > 9 and fields[4] in ("/", "/usr", "/var"):
            # Of btrfs the number is its own and only the source tells the device.
            source = fields[fields.index("-") + 2]
            to_look += [
                name
                for name, number in blocks.items()
                if number == fields[2] or source in (f"/dev/{name}", f"/dev/mapper/{_mapper(probe, name)}")
            ]
    crypttab = {
        fields[0]: fields
        for fields in (line.split() for line in (probe.read("/etc/crypttab") or "").splitlines())
        if fields and not fields[0].startswith("#")
    }
    seen: set[str] = set()
    while to_look:
        name = to_look.pop()
        if name in seen:
            continue
        seen.add(name)
        to_look += probe.names(f"/sys/class/block/{name}/slaves")
        if (probe.read(f"/sys/class/block/{name}/dm/uuid") or "").startswith("CRYPT-"):
            entry = (crypttab.get(_mapper(probe, name) or "") or []) + ["", "", "none", ""]
            if entry[2] in ("none", "-", "") and not _UNATTENDED.search(entry[3]):
                return True
    return False


def _mapper(probe: ProbeRoot, block: str) -> Optional[str]:
    return probe.read(f"/sys/class/block/{block}/dm/name")


# ---- what follows ---------------------------------------------------------------------------------------------


def reboot_reasons(state: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return why this host needs a reboot for its driver, a code and a sentence each; none without one."""
    loaded, installed = state["loaded"], state["installed"]
    if not (state["gpus"] or installed["version"] or loaded["version"]):
        return []
    running = next(kernel for kernel in state["kernels"] if kernel["running"])
    newest = next(kernel for kernel in state["kernels"] if kernel["newest"])
    found: list[tuple[str, str]] = []
    if loaded["version"] and installed["version"] and loaded["version"] != installed["version"]:
        found.append(
            (
                "driver_mismatch",
                f"The kernel runs the driver's module {loaded['version']}, the user space installed is "
                f"{installed['version']}.",
            )
        )
    on_disk = running["module_version"]
    if loaded["version"] and on_disk and on_disk != loaded["version"]:
        found.append(
            (
                "module_mismatch",
                f"The module on disk for the running kernel is {on_disk}, the one loaded is {loaded['version']}.",
            )
        )
    if loaded["flavour"] and installed["flavour"] and loaded["flavour"] != installed["flavour"]:
        found.append(
            (
                "flavour_mismatch",
                f"The {loaded['flavour']} kernel module is loaded, the {installed['flavour']} one is installed.",
            )
        )
    if state["nouveau"]["loaded"]:
        found.append(("nouveau_loaded", "The module nouveau holds the card; it leaves only with a reboot."))
    others = [kernel for kernel in state["kernels"] if kernel["module_version"] and not kernel["running"]]
    if installed["version"] and not loaded["version"] and not on_disk and others:
        found.append(
            (
                "kernel_without_module",
                f"The running kernel {running['release']} has no NVIDIA module, {others[-1]['release']} has.",
            )
        )
    if newest is not running:
        found.append(
            (
                "kernel_outdated",
                f"Kernel {newest['release']} is installed, {running['release']} is running.",
            )
        )
    if state["mok"]["pending"]:
        found.append(
            (
                "mok_pending",
                "A signing key waits to be enrolled: shim asks for it at the console at the next boot.",
            )
        )
    return [{"code": code, "message": message} for code, message in found]


def driver_problems(state: Mapping[str, Any], today: str) -> list[Problem]:
    """Return what is wrong with the driver, each with a remedy; ``today`` is an ISO date."""
    checks = (_mismatch, _end_of_life, _newest_kernel, _mixed_sources, _fabric_manager, _mok)
    return [problem for check in checks for problem in check(state, today)]


def _mismatch(state: Mapping[str, Any], _today: str) -> list[Problem]:
    loaded, installed = state["loaded"]["version"], state["installed"]["version"]
    if not loaded or not installed or loaded == installed:
        return []
    held = state["installed"]["held"]
    cause = "" if held else " The packages are not held, so an automatic upgrade can do this again."
    return [
        Problem(
            "driver_library_mismatch",
            f"The NVIDIA kernel module loaded is {loaded}, the libraries installed are {installed}: programs that "
            f"start now find no GPU, those that run go on.{cause}",
            "Reboot the host in a maintenance window (the role nvidia_driver does it with "
            "nvidia_driver_reboot=if_needed) and hold the driver's packages.",
        )
    ]


def _end_of_life(state: Mapping[str, Any], today: str) -> list[Problem]:
    end, number = state["branch_end_of_life"], state["installed"]["branch"]
    if end and today > end:
        what = f"ended on {end}"
    elif state["branch_supported"] is False:
        what = "is no more on NVIDIA's list of supported branches"
    else:
        return []
    return [
        Problem(
            "driver_branch_end_of_life",
            f"The driver's branch {number} {what}: it gets no security fixes.",
            "Move to a supported branch in a maintenance window: set nvidia_driver_branch, and "
            "nvidia_driver_source where the distribution has none.",
        )
    ]


def _newest_kernel(state: Mapping[str, Any], _today: str) -> list[Problem]:
    """The next boot takes the newest kernel: without a module for it the GPU is gone."""
    newest = next(kernel for kernel in state["kernels"] if kernel["newest"])
    if not state["installed"]["version"]:
        return []
    elsewhere = any(kernel["module_version"] for kernel in state["kernels"] if not kernel["newest"])
    if (
        newest["dkms"] == "installed"
        or (newest["dkms"] is None and not elsewhere)
        or newest["module_version"]
    ):
        return []
    release = newest["release"]
    when = "" if newest["running"] else " After the next reboot this host would have no GPU."
    headers = "" if newest["headers"] else f" The headers of {release} are not installed."
    rpm = state["os"]["distribution"] not in ("debian", "ubuntu")
    package = f"kernel-devel-{release}" if rpm else f"linux-headers-{release}"
    build = f"run `dkms autoinstall -k {release}`"
    fix = (
        f"Before a reboot, {build}."
        if newest["headers"]
        else f"Before a reboot, install {package} and {build}."
    )
    if newest["dkms"] == "failed":
        return [
            Problem(
                "dkms_failed",
                f"Building the NVIDIA module for kernel {release} failed: {newest['dkms_error']}.{when}{headers}",
                f"Read the log below /var/lib/dkms; a driver older than the kernel needs an upgrade. {fix}",
            )
        ]
    if newest["dkms"] is None:
        fix = f"Install the prebuilt NVIDIA modules of kernel {release}, or boot the kernel that has them."
    return [
        Problem("dkms_missing", f"Kernel {release} has no NVIDIA module.{when}{headers}", fix),
    ]


def _mixed_sources(state: Mapping[str, Any], _today: str) -> list[Problem]:
    """Two sources of which one is pinned away do no harm: what would be taken is of the installed one."""
    kinds = {source["kind"] for source in state["foreign_sources"]}
    installed, offered = state["installed"]["source"], state["candidate"]["source"]
    unpinned = len(kinds) > 1 and offered is not None and installed is not None and offered != installed
    if not unpinned and not ("runfile" in kinds and state["installed"]["packages"]):
        return []
    evidence = ", ".join(f"{source['kind']} ({source['evidence']})" for source in state["foreign_sources"])
    return [
        Problem(
            "driver_sources_mixed",
            f"The driver comes from more than one source: {evidence}.",
            "Keep one: remove a .run installation with `nvidia-uninstall`, and the other repositories or pin them.",
        )
    ]


def _fabric_manager(state: Mapping[str, Any], _today: str) -> list[Problem]:
    if not state["nvswitch_count"] or not state["installed"]["version"]:
        return []
    found, wanted = state["fabricmanager"]["installed_version"], state["installed"]["version"]
    if found == wanted and state["fabricmanager"]["active"]:
        return []
    what = f"is {found}" if found and found != wanted else ("is not active" if found else "is not installed")
    return [
        Problem(
            "fabric_manager_mismatch",
            f"The host has NVSwitches and its Fabric Manager {what}: CUDA fails with error 802 without one of "
            f"exactly the driver's version ({wanted}).",
            f"Install nvidia-fabricmanager {wanted}, then enable and start the service nvidia-fabricmanager.",
        )
    ]


def _mok(state: Mapping[str, Any], _today: str) -> list[Problem]:
    own = any(kernel["dkms"] in ("installed", "built") for kernel in state["kernels"])
    if state["secure_boot"] != "enabled" or not own or state["mok"]["enrolled"] or state["loaded"]["version"]:
        return []
    step = (
        "Reboot with somebody at the console or its remote one, and choose Enroll MOK there."
        if state["mok"]["pending"]
        else "Run `mokutil --import /var/lib/dkms/mok.pub`, reboot with somebody at the console, choose Enroll MOK."
    )
    return [
        Problem(
            "mok_enrolment_pending",
            "Secure Boot is on and the key that signs this host's DKMS modules is not enrolled: the kernel refuses "
            "the driver.",
            step,
        )
    ]
