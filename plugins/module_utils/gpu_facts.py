"""Facts about a host's NVIDIA cards: what the driver tells, what only the PCI bus shows, and what is wrong.

The shapes are those of docs/contracts.md §1. Only `gather` asks anything; the rest turns data into data.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any, Optional

from . import nvml
from .ownership import Ownership
from .pci_ids import NVIDIA_VENDOR_ID, card_name
from .probe_root import ProbeRoot
from .units import MIB

# Foreign memory is counted in steps, so that small movements never change a plan (docs/contracts.md §1).
FOREIGN_STEP_BYTES = 256 * MIB
# Memory that no process accounts for: the driver's own small allocations stay below this and belong to the
# plan's margin; what exceeds it is somebody's whom the driver does not list (WSL: cognithor#318).
UNLISTED_ALLOWANCE_BYTES = 256 * MIB
# What a driver may keep for itself where it does not say: catalog/gpus.yml, unseen_reserved_* (512 MiB and 0.5 %,
# above every card's log). The planner takes as much off the budget, or the card's own figure.
UNTOLD_RESERVED_BYTES = 512 * MIB
UNTOLD_RESERVED_PART = 200
MAX_PROCESSES_PER_DEVICE = 8

# Integrated devices that share the machine's RAM, by the name that the driver gives them (GB10, and Jetson's
# "Orin (nvgpu)"). A card that merely cannot tell its memory is not one of them (gpustat#179).
_UNIFIED_NAMES = re.compile(r"\bGB10\b|\(nvgpu\)|\bOrin\b|\bXavier\b|\bThor\b")
# NVML_DEVICE_ADDRESSING_MODE_ATS of nvml.h: CPU and GPU share page tables. HMM (1) is an ordinary card's
# (llama.cpp#17536).
_ADDRESSING_ATS = 2
# nvmlClocksEventReason… of nvml.h; an idle GPU and applied clock settings are no throttling.
_THROTTLE_REASONS = {
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
}
_THERMAL_REASONS = ("sw_thermal_slowdown", "hw_thermal_slowdown")
# Xid errors that tell of a program, not of the card: what NVIDIA's k8s-device-plugin leaves out of its health check
# (internal/rm/health.go), after NVIDIA's "Xid Errors". All others are a problem.
_APPLICATION_XIDS = frozenset((13, 31, 43, 45, 68, 109))
# What the ones that operators meet most stand for (NVIDIA, "Xid Errors").
_XID_MEANINGS = {
    48: "uncorrectable memory error",
    63: "row remapping or page retirement recorded",
    64: "row remapping or page retirement failed",
    74: "NVLink error",
    79: "fallen off the bus",
    94: "contained memory error",
    95: "uncontained memory error",
    119: "GSP does not answer",
    120: "GSP error",
}
# PCI base classes: VGA and 3D controllers; sound and USB functions of a card have others.
_DISPLAY_CLASSES = ("0x0300", "0x0302")
_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
_KERNEL_LOG_LIMIT_RECORDS = 20000

_REBOOT = "Reboot the host."
_NVIDIA_DRIVER_ROLE = "Install the NVIDIA driver for this kernel (the role nvidia_driver does it)"


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong on a host: a stable code, what is wrong, what to do, and the device it concerns."""

    code: str
    message: str
    remedy: str
    device: Optional[str] = None


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One card or MIG instance; memory in bytes, null where the driver does not tell."""

    uuid: str
    index: Optional[int]
    name: str
    compute_capability: Optional[str]
    memory_total_bytes: Optional[int]
    memory_reserved_bytes: Optional[int]
    memory_kind: str
    mig_enabled: bool
    mig_profile: Optional[str]
    mig_parent: Optional[str]
    display: bool
    pci_bus_id: Optional[str]
    pci_device_id: Optional[str]


@dataclasses.dataclass
class GpuFacts:
    """The accelerators' part of the host facts."""

    driver: Optional[dict[str, Optional[str]]] = None
    accelerators: list[Accelerator] = dataclasses.field(default_factory=list)
    links: list[dict[str, str]] = dataclasses.field(default_factory=list)
    foreign_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    live_devices: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the part as the module gpu_facts shows it: JSON types only."""
        return {
            "driver": self.driver,
            "accelerators": [dataclasses.asdict(a) for a in self.accelerators],
            "links": self.links,
            "foreign_bytes": self.foreign_bytes,
            "live": {"devices": self.live_devices},
            "problems": [dataclasses.asdict(p) for p in self.problems],
        }


@dataclasses.dataclass(frozen=True)
class PciCard:
    """A card on the PCI bus: ``address`` 0000:01:00.0, ``device_id`` 10de:2684, its kernel driver."""

    address: str
    device_id: str
    kernel_driver: Optional[str]


def gather(
    root: str = "/",
    *,
    pynvml_source: Optional[str] = None,
    library_path: Optional[str] = None,
    probe_timeout_s: float = 20,
) -> GpuFacts:
    """Return what can be known about the host's cards; a broken driver is a problem in it, never an error.

    ``pynvml_source`` is the text of the controller's pynvml.py (None: an installed one), ``library_path``
    names a libnvidia-ml other than the loader's, ``probe_timeout_s`` limits the driver's answer in seconds.
    """
    probe = ProbeRoot(root)
    cards = pci_cards(probe)
    loaded = loaded_driver_version(probe)
    facts = GpuFacts()
    reading: dict[str, Any] = {"error": None, "driver_version": None, "cuda_version": None, "devices": []}
    try:
        reading = nvml.read(pynvml_source=pynvml_source, library_path=library_path, timeout_s=probe_timeout_s)
    except nvml.DeadlineError as error:
        facts.problems.append(
            Problem(
                "probe_failed",
                f"The NVIDIA driver does not answer: {error}.",
                "Look for NVRM lines in `journalctl -k`; a driver that hangs usually needs a reboot.",
            )
        )
    except nvml.ChildError as error:
        facts.problems.append(
            Problem(
                "probe_failed",
                f"Reading the NVIDIA driver failed: {error}.",
                "Run `nvidia-smi` on the host; if it fails too, reinstall the driver and reboot.",
            )
        )
    version = reading["driver_version"] or loaded
    facts.driver = {"version": version, "cuda_version": reading["cuda_version"]} if version else None
    if reading["error"]:
        problem = library_problem(
            reading["error"], loaded=loaded, cards=cards, library_path=library_path, probe=probe
        )
        if problem:
            facts.problems.append(problem)
    _add_devices(facts, reading["devices"], probe)
    _add_unanswered(facts, reading, cards, probe)
    facts.links = nvlink_links(reading["devices"])
    return facts


def pci_cards(probe: ProbeRoot) -> list[PciCard]:
    """Return the NVIDIA cards on the PCI bus, by address, with or without a driver."""
    cards = []
    for address in probe.names("/sys/bus/pci/devices"):
        folder = f"/sys/bus/pci/devices/{address}"
        vendor = (probe.read(f"{folder}/vendor") or "").replace("0x", "")
        if vendor != NVIDIA_VENDOR_ID or not (probe.read(f"{folder}/class") or "").startswith(
            _DISPLAY_CLASSES
        ):
            continue
        device = (probe.read(f"{folder}/device") or "0x0").replace("0x", "")
        cards.append(PciCard(address, f"{vendor}:{device}", probe.link_name(f"{folder}/driver")))
    return cards


def loaded_driver_version(probe: ProbeRoot) -> Optional[str]:
    """Return the version of the NVIDIA kernel module that is loaded, or None."""
    version = probe.read("/sys/module/nvidia/version")
    if version:
        return version
    text = probe.read("/proc/driver/nvidia/version") or ""
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match.group(1) if match else None


def library_problem(
    error: dict[str, Any],
    *,
    loaded: Optional[str],
    cards: list[PciCard],
    library_path: Optional[str],
    probe: ProbeRoot,
) -> Optional[Problem]:
    """Return the problem behind a library that would not load or start; None on a host without a card."""
    code, text = error["code"], error["text"]
    if error["stage"] == "load":
        if library_path:
            return Problem(
                "nvml_not_found",
                f"The NVIDIA management library {library_path} could not be loaded: {text}.",
                "Correct the option library_path, or leave it out to use the driver's own library.",
            )
        if loaded is None:
            return None  # no driver at all: the cards, if any, get their own problem
        return Problem(
            "nvml_not_found",
            f"The NVIDIA driver {loaded} is loaded but its library libnvidia-ml.so.1 could not be: {text}.",
            f"Install the compute libraries of driver {loaded} (Debian: libnvidia-ml1; NVIDIA's repository: "
            "libnvidia-compute) and run `ldconfig`.",
        )
    if code == nvml.DRIVER_NOT_LOADED:
        if not cards and loaded is None:
            return None
        return Problem(
            "driver_missing",
            "The NVIDIA driver's libraries are installed but its kernel module is not loaded.",
            "Run `modprobe nvidia`; if that fails, see `dkms status` (built for this kernel?) and `mokutil "
            "--sb-state` (Secure Boot refuses unsigned modules).",
        )
    if code == nvml.LIB_RM_VERSION_MISMATCH:
        return Problem(
            "driver_library_mismatch",
            f"The NVIDIA kernel module loaded is {loaded or 'of an unknown version'} and the library on disk "
            "is of another version: the driver was upgraded and the old module is still running.",
            f"{_REBOOT} Hold the driver packages back from automatic upgrades to keep it from coming back.",
        )
    if code == nvml.NO_PERMISSION:
        return Problem(
            "nvml_no_permission",
            f"The NVIDIA driver refused this user ({text}): the files /dev/nvidia* are closed to it.",
            "Run with become: true, or give the user the group that owns /dev/nvidia*.",
        )
    return Problem(
        "nvml_error",
        f"The NVIDIA management library answered '{text}' (code {code}).",
        "Run `nvidia-smi` and `journalctl -k --grep NVRM` on the host; reinstall the driver if it is broken.",
    )


def _add_devices(facts: GpuFacts, devices: list[dict[str, Any]], probe: ProbeRoot) -> None:
    """Add accelerators, foreign memory, live state and memory problems of every device that answered."""
    answered = [device for device in devices if not device["error"]]
    if not answered:
        return
    ownership = Ownership(probe)
    xids = xid_errors(probe)
    for device in answered:
        whole = _accelerator(device, device, None, probe)
        _add_device(
            facts, whole, device, ownership, xids.get(_short_bus_id(device.get("pci_bus_id")), []), probe
        )
        for instance in device["instances"]:
            part = _accelerator(instance, device, whole.uuid, probe)
            _add_device(facts, part, instance, ownership, [], probe)


def _accelerator(
    device: dict[str, Any], card: dict[str, Any], parent: Optional[str], probe: ProbeRoot
) -> Accelerator:
    """Return one accelerator; ``card`` is the whole card that a MIG instance is a part of."""
    memory = device["memory"]
    total = memory["total_bytes"] if memory else None
    reserved = memory["reserved_bytes"] if memory else None
    kind = memory_kind(device["name"] or "", device["memory_error"], card.get("addressing"))
    if kind == "unified":
        # The device's memory is the machine's (ollama#12283): what is in use of it is live, not stable.
        total, reserved = meminfo_bytes(probe, "MemTotal"), 0
    return Accelerator(
        uuid=device["uuid"],
        index=card["index"],
        name=device["name"] or "unknown",
        compute_capability=card.get("compute_capability"),
        memory_total_bytes=total,
        memory_reserved_bytes=reserved,
        memory_kind=kind,
        mig_enabled=parent is None and card["mig_enabled"],
        mig_profile=device.get("mig_profile"),
        mig_parent=parent,
        display=card["display"],
        pci_bus_id=card.get("pci_bus_id"),
        pci_device_id=card.get("pci_device_id"),
    )


def memory_kind(name: str, memory_error: Optional[dict[str, Any]], addressing: Optional[int]) -> str:
    """Return ``dedicated``, ``unified`` (shared with the CPU, recognised devices only) or ``unknown``.

    A driver that says "not supported" is not enough, and a lost card never looks unified.
    """
    if memory_error is None:
        return "unified" if _UNIFIED_NAMES.search(name) else "dedicated"
    if memory_error["code"] != nvml.NOT_SUPPORTED:
        return "unknown"
    return "unified" if _UNIFIED_NAMES.search(name) or addressing == _ADDRESSING_ATS else "unknown"


def _add_device(
    facts: GpuFacts,
    accelerator: Accelerator,
    device: dict[str, Any],
    ownership: Ownership,
    xids: list[int],
    probe: ProbeRoot,
) -> None:
    uuid = accelerator.uuid
    facts.accelerators.append(accelerator)
    facts.problems.extend(health_problems(accelerator, device, xids))
    if accelerator.memory_kind == "unknown" and device["memory_error"]:
        facts.problems.append(device_problem(device["memory_error"], uuid, accelerator.name, memory=True))
    processes = [{**process, "owner": ownership.owner(process["pid"])} for process in device["processes"]]
    memory = device["memory"]
    used = memory["used_bytes"] if memory else sum(p["used_bytes"] or 0 for p in processes)
    free = memory["free_bytes"] if memory else None
    if accelerator.memory_kind == "unified":
        free = meminfo_bytes(probe, "MemAvailable")
        used = sum(p["used_bytes"] or 0 for p in processes)
    allowance = UNLISTED_ALLOWANCE_BYTES
    if memory and memory["reserved_bytes"] is None:
        # Version 1 of the driver's call counts what the driver reserves as used.
        allowance = UNTOLD_RESERVED_BYTES + memory["total_bytes"] // UNTOLD_RESERVED_PART
    facts.foreign_bytes[uuid] = foreign_bytes(
        used, processes, engine_runs=ownership.engine_runs, allowance=allowance
    )
    largest = sorted(processes, key=lambda p: (-(p["used_bytes"] or 0), p["pid"]))[:MAX_PROCESSES_PER_DEVICE]
    facts.live_devices[uuid] = {
        "free_bytes": free,
        "used_bytes": used,
        "throttle": throttle_reasons(device.get("throttle")),
        "ecc_uncorrected": device.get("ecc_uncorrected"),
        "xid": xids,
        "processes": [
            {
                "pid": p["pid"],
                "name": probe.read(f"/proc/{p['pid']}/comm") or "unknown",
                "used_bytes": p["used_bytes"],
                "owner": p["owner"],
            }
            for p in largest
        ],
        "process_count": len(processes),
    }


def health_problems(accelerator: Accelerator, device: dict[str, Any], xids: list[int]) -> list[Problem]:
    """Return what is wrong with a card that answers: errors in the kernel's log, memory, heat."""
    name, uuid = accelerator.name, accelerator.uuid
    found = []
    serious = [number for number in xids if number not in _APPLICATION_XIDS]
    if serious:
        told = ", ".join(f"{n} ({_XID_MEANINGS[n]})" if n in _XID_MEANINGS else str(n) for n in serious)
        found.append(
            Problem(
                "xid",
                f"{name} has logged Xid {told} since boot.",
                "See `journalctl -k --grep Xid` and NVIDIA's list of Xid errors; drain the host and reset the card "
                "(`nvidia-smi -r`) or reboot. If it comes back, have the card replaced.",
                uuid,
            )
        )
    remapped = device.get("remapped_rows") or {}
    if remapped.get("failed"):
        found.append(
            Problem(
                "row_remap_failed",
                f"{name} has failing memory rows that it could not replace.",
                "Have the card replaced; do not serve from it until then.",
                uuid,
            )
        )
    elif remapped.get("pending"):
        found.append(
            Problem(
                "row_remap_pending",
                f"{name} has replaced failing memory rows, which takes effect only with a reset.",
                "Drain the host and reset the card (`nvidia-smi -r`), or reboot in a maintenance window.",
                uuid,
            )
        )
    errors = device.get("ecc_uncorrected")
    if errors:
        found.append(
            Problem(
                "ecc_uncorrected",
                f"{name} has counted {errors} uncorrectable memory errors since the driver was loaded.",
                "Restart what runs on it, and reset the card (`nvidia-smi -r`) or reboot; have it replaced if the "
                "count grows again.",
                uuid,
            )
        )
    hot = [reason for reason in throttle_reasons(device.get("throttle")) if reason in _THERMAL_REASONS]
    if hot:
        found.append(
            Problem(
                "thermal_slowdown",
                f"{name} is too hot and slows itself down ({', '.join(hot)}).",
                "Look after fans, dust and the air flow of the room; `nvidia-smi -q -d TEMPERATURE,PERFORMANCE` "
                "shows the limits.",
                uuid,
            )
        )
    return found


def foreign_bytes(
    used: int,
    processes: list[dict[str, Any]],
    *,
    engine_runs: Any,
    allowance: int = UNLISTED_ALLOWANCE_BYTES,
) -> int:
    """Return the bytes held by others than our units, rounded up to a step of 256 MiB.

    Counts the listed processes of others and, beyond an ``allowance`` for the driver itself, memory that no
    listed process accounts for. Where our process's use is not told, or our engine runs (``engine_runs()``,
    asked only then) and the driver lists no process at all, that memory may be our own and is not counted.
    """
    others = sum(p["used_bytes"] or 0 for p in processes if p["owner"] != "fleetfit")
    listed = sum(p["used_bytes"] or 0 for p in processes)
    unlisted = max(0, used - listed - allowance)
    if unlisted:
        ours_untold = any(p["used_bytes"] is None and p["owner"] == "fleetfit" for p in processes)
        if ours_untold or (not processes and engine_runs()):
            unlisted = 0
    return -(-(others + unlisted) // FOREIGN_STEP_BYTES) * FOREIGN_STEP_BYTES


def throttle_reasons(bits: Optional[int]) -> list[str]:
    """Return the names of the reasons that slow a card down now; idling is none."""
    return [name for bit, name in _THROTTLE_REASONS.items() if (bits or 0) & bit]


def device_problem(
    error: dict[str, Any], device: Optional[str], name: str, *, memory: bool = False
) -> Problem:
    """Return the problem of one device that answered with an NVML error code."""
    code, text = error["code"], error["text"]
    if code == nvml.GPU_IS_LOST:
        return Problem(
            "gpu_lost",
            f"{name} has fallen off the bus: the driver lost it while running.",
            f"{_REBOOT} If it happens again, check power, cooling and seating (`journalctl -k --grep Xid`).",
            device,
        )
    if code == nvml.NO_PERMISSION:
        return Problem(
            "nvml_no_permission",
            f"The NVIDIA driver refused this user access to {name} ({text}).",
            "Run with become: true, or give the user the group that owns /dev/nvidia*.",
            device,
        )
    if memory and code == nvml.NOT_SUPPORTED:
        return Problem(
            "memory_not_supported",
            f"{name} does not tell its memory, and it is not a device known to share the machine's RAM.",
            "Update the NVIDIA driver; for a vGPU, check its licence. Nothing is planned on this device.",
            device,
        )
    return Problem(
        "nvml_error",
        f"{name} answered '{text}' (code {code}).",
        "Run `nvidia-smi -q` and `journalctl -k --grep NVRM` on the host; a reboot clears most causes.",
        device,
    )


def _add_unanswered(facts: GpuFacts, reading: dict[str, Any], cards: list[PciCard], probe: ProbeRoot) -> None:
    """Add the cards that only the PCI bus shows, and a problem for every card that should have answered."""
    known = {_short_bus_id(a.pci_bus_id) for a in facts.accelerators}
    unseen = [card for card in cards if card.address.lower() not in known]
    silent = [device for device in reading["devices"] if device["error"]]
    asked = reading["error"] is None and not any(p.code == "probe_failed" for p in facts.problems)
    for card in unseen:
        accelerator = _bus_only(card)
        facts.accelerators.append(accelerator)
        facts.foreign_bytes[accelerator.uuid] = 0
        if card.kernel_driver != "nvidia":
            # Another module's card, or nobody's: NVML can say nothing about it.
            if not any(p.code == "driver_missing" and p.device is None for p in facts.problems):
                facts.problems.append(driver_missing(card, accelerator))
        elif silent:
            facts.problems.append(device_problem(silent.pop(0)["error"], accelerator.uuid, accelerator.name))
        elif asked:
            facts.problems.append(
                Problem(
                    "nvml_error",
                    f"The NVIDIA driver has taken {accelerator.name} at {card.address} but does not list it.",
                    "See `journalctl -k --grep NVRM`: the usual cause is the wrong module flavour (open or "
                    "proprietary) for the card.",
                    accelerator.uuid,
                )
            )
    for device in silent:
        facts.problems.append(device_problem(device["error"], None, f"GPU {device['index']}"))


def _bus_only(card: PciCard) -> Accelerator:
    return Accelerator(
        uuid=f"pci-{card.address}",
        index=None,
        name=card_name(card.device_id),
        compute_capability=None,
        memory_total_bytes=None,
        memory_reserved_bytes=None,
        memory_kind="unknown",
        mig_enabled=False,
        mig_profile=None,
        mig_parent=None,
        display=False,
        pci_bus_id=long_bus_id(card.address),
        pci_device_id=card.device_id,
    )


def driver_missing(card: PciCard, accelerator: Accelerator) -> Problem:
    """Return the problem of a card that the NVIDIA driver does not drive."""
    where = f"{accelerator.name} at {card.address}"
    if card.kernel_driver is None:
        message, remedy = f"{where} has no driver.", f"{_NVIDIA_DRIVER_ROLE}, then run again."
    elif card.kernel_driver.startswith("vfio"):
        message = f"{where} is set aside for virtual machines ({card.kernel_driver})."
        remedy = "Provision the virtual machine that has the card, or release it from vfio-pci."
    else:
        message = f"{where} is driven by {card.kernel_driver}, which cannot run models."
        remedy = f"{_NVIDIA_DRIVER_ROLE}, keep {card.kernel_driver} from loading, and reboot."
    return Problem("driver_missing", message, remedy, accelerator.uuid)


def nvlink_links(devices: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return NVLink connections between cards; a pair that is not connected by them talks over PCIe.

    Direct links are listed pair by pair; cards that meet in a switch as a chain, each with the next.
    """
    by_bus = {d["pci_bus_id"].upper(): d["uuid"] for d in devices if not d["error"] and d.get("pci_bus_id")}
    pairs: list[tuple[str, str]] = []
    switches: dict[str, list[str]] = {}
    for device in devices:
        for peer in () if device["error"] else device["nvlink_peers"]:
            other = by_bus.get(peer.upper())
            if other is None:
                switches.setdefault(peer, []).append(device["uuid"])
            elif other != device["uuid"]:
                pairs.append((min(device["uuid"], other), max(device["uuid"], other)))
    for members in switches.values():
        pairs.extend(zip(members, members[1:]))
    return [{"a": a, "b": b, "kind": "nvlink"} for a, b in sorted(set(pairs))]


def xid_errors(probe: ProbeRoot) -> dict[str, list[int]]:
    """Return NVIDIA's error numbers (Xid) in the kernel log since boot, by PCI address without function."""
    found: dict[str, list[int]] = {}
    try:
        log = os.open(probe.path("/dev/kmsg"), os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return found
    try:
        for _record in range(_KERNEL_LOG_LIMIT_RECORDS):
            try:
                # One record a read from the kernel; a file in a test gives all at once.
                record = os.read(log, 1 << 20)
            except BrokenPipeError:
                continue  # the record was overwritten while we read
            except OSError:
                break
            if not record:
                break
            for address, number in _XID.findall(record.decode("utf-8", "replace")):
                numbers = found.setdefault(_short_bus_id(address + ".0"), [])
                if int(number) not in numbers:
                    numbers.append(int(number))
    finally:
        os.close(log)
    return {address: sorted(numbers) for address, numbers in found.items()}


def meminfo_bytes(probe: ProbeRoot, key: str) -> Optional[int]:
    """Return a value of /proc/meminfo in bytes, or None where it is not there."""
    match = re.search(rf"^{key}:\s+(\d+) kB", probe.read("/proc/meminfo") or "", re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def _short_bus_id(bus_id: Optional[str]) -> str:
    """Return the kernel's ``0000:01:00.0`` for NVML's ``00000000:01:00.0``."""
    if not bus_id or ":" not in bus_id:
        return ""
    domain, rest = bus_id.split(":", 1)
    return f"{int(domain, 16):04x}:{rest.lower()}"


def long_bus_id(address: str) -> str:
    """Return NVML's ``00000000:01:00.0`` for the kernel's ``0000:01:00.0``."""
    domain, rest = address.split(":", 1)
    return f"{int(domain, 16):08X}:{rest.upper()}"
