"""Hosts in a few words, for the tests of the driver's decision: `driver_state` as docs/contracts.md has it."""

from __future__ import annotations

from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.driver_decision import Wanted
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_drivers

DATA = load_drivers()
TODAY = "2026-11-24"
KERNEL = "6.1.0-42-amd64"
NEWER_KERNEL = "6.1.0-43-amd64"

# Word: PCI id, name, compute capability, generation, NVSwitches.
CARDS: dict[str, tuple[str, str, str | None, str | None, int]] = {
    "980": ("10de:13c0", "GeForce GTX 980", "5.2", "maxwell", 0),
    "p40": ("10de:1b38", "Tesla P40", "6.1", "pascal", 0),
    "v100": ("10de:1db1", "Tesla V100", "7.0", "volta", 0),
    "t4": ("10de:1eb8", "Tesla T4", "7.5", "turing", 0),
    "a100": ("10de:20b0", "A100", "8.0", "ampere", 0),
    "hgx-a100": ("10de:20b0", "A100", "8.0", "ampere", 6),
    "4090": ("10de:2684", "GeForce RTX 4090", "8.9", "ada", 0),
    "h100": ("10de:2330", "H100", "9.0", "hopper", 0),
    "gh200": ("10de:2342", "GH200", "9.0", "hopper", 0),
    "hgx-b200": ("10de:2901", "B200", "10.0", "blackwell", 2),
    "b200": ("10de:2901", "B200", "10.0", "blackwell", 0),
    "5090": ("10de:2b85", "GeForce RTX 5090", "12.0", "blackwell", 0),
    "k80": ("10de:102d", "Tesla K80", "3.7", "kepler", 0),
    "new": ("10de:3999", "10de:3999", None, None, 0),
}
SECURE_BOOT = {
    "off": ("disabled", None, False),
    "on": ("enabled", False, False),
    "on,enrolled": ("enabled", True, False),
    "on,pending": ("enabled", False, True),
    "none": ("unsupported", None, False),
}
PACKAGES = {
    ("nvidia", "open"): ["nvidia-driver-cuda", "nvidia-kernel-open-dkms"],
    ("nvidia", "proprietary"): ["nvidia-driver-cuda", "nvidia-kernel-dkms"],
    ("distribution", "open"): ["libcuda1", "nvidia-open-kernel-dkms"],
    ("distribution", "proprietary"): ["libcuda1", "nvidia-kernel-dkms"],
}


def gpu(word: str) -> dict[str, Any]:
    device, name, capability, generation, switches = CARDS[word]
    return {
        "pci_bus_id": "0000:01:00.0",
        "pci_device_id": device,
        "name": name,
        "compute_capability": capability,
        "generation": generation,
        "nvswitch": switches > 0,
    }


def kernel(release: str = KERNEL, *, dkms: str | None = None, newest: bool = True) -> dict[str, Any]:
    return {
        "release": release,
        "running": release == KERNEL,
        "newest": newest,
        "headers": True,
        "dkms": dkms,
        "dkms_error": None,
        "module_version": None,
    }


def bare_state(system: str = "debian-12", cards: str = "4090", secure_boot: str = "off") -> dict[str, Any]:
    """Return a host without a driver. ``system`` is name-version, ``cards`` words joined by +, or none."""
    distribution, version = system.split("-")
    words = [] if cards == "none" else cards.split("+")
    status, enrolled, pending = SECURE_BOOT[secure_boot]
    return {
        "schema_version": 1,
        "os": {
            "distribution": distribution,
            "version": version,
            "codename": "",
            "arch": "aarch64" if "gh200" in words else "x86_64",
        },
        "gpus": [gpu(word) for word in words],
        "nvswitch_count": sum(CARDS[word][4] for word in words),
        "loaded": {"version": None, "flavour": None},
        "installed": {
            "version": None,
            "flavour": None,
            "branch": None,
            "source": None,
            "packages": {},
            "held": [],
        },
        "candidate": {"version": None, "source": None},
        "kernels": [kernel()],
        "secure_boot": status,
        "mok": {"enrolled": enrolled, "pending": pending},
        "nouveau": {"loaded": False, "blacklisted": False, "in_initramfs": False},
        "boot_free_bytes": 512 << 20,
        "boot_id": "b1",
        "root_needs_passphrase": False,
        "dpkg_audit": [],
        "foreign_sources": [],
        "persistenced": {"installed": False, "active": False},
        "fabricmanager": {"installed_version": None, "active": False},
        "uvm_loaded": False,
        "is_controller": False,
        "reboot_reasons": [],
    }


def install(state: dict[str, Any], source: str, version: str, flavour: str) -> None:
    """Make the driver installed, held, built and loaded, with everything that belongs to it."""
    names = PACKAGES[(source, flavour)]
    state["installed"] = {
        "version": version,
        "flavour": flavour,
        "branch": version.split(".")[0],
        "source": source,
        "packages": dict.fromkeys(names, version),
        "held": list(names),
    }
    state["loaded"] = {"version": version, "flavour": flavour}
    for item in state["kernels"]:
        item.update(dkms="installed", module_version=version)
    state["nouveau"] = {"loaded": False, "blacklisted": True, "in_initramfs": False}
    state["persistenced"] = {"installed": True, "active": True}
    if state["nvswitch_count"]:
        state["fabricmanager"] = {"installed_version": version, "active": True}
    state["uvm_loaded"] = True


def apply_word(state: dict[str, Any], word: str) -> None:
    """Change a host by one word of the table's column `host`."""
    key, _, value = word.partition("=")
    if ":" in key:
        install(state, *key.split(":"))
    elif key == "audit":
        state["dpkg_audit"] = ["The following packages are only half configured:", " nvidia-kernel-dkms"]
    elif key == "boot":
        state["boot_free_bytes"] = int(value) << 20
    elif key == "luks":
        state["root_needs_passphrase"] = True
    elif key == "unheld":
        state["installed"]["held"] = []
    elif key == "loaded":
        state["loaded"]["version"] = value if value != "none" else None
    elif key == "nouveau":
        state["nouveau"] = {"loaded": True, "blacklisted": False, "in_initramfs": True}
    elif key == "controller":
        state["is_controller"] = True
    elif key == "candidate":
        source = state["installed"]["source"] or "distribution"
        offered = [{"version": value, "source": source}]
        state["candidate"] = {"version": value, "source": source, "offered": offered}
    elif key == "newkernel":  # a kernel came after the driver: value is its DKMS status
        for item in state["kernels"]:
            item["newest"] = False
        state["kernels"].append(kernel(NEWER_KERNEL, dkms=None if value == "missing" else value))
        if value == "installed":
            state["kernels"][-1]["module_version"] = state["installed"]["version"]
        if value == "failed":
            state["kernels"][-1]["dkms_error"] = "nv-mmap.c:42: error: too few arguments"
    elif key == "noheaders":
        state["kernels"][-1]["headers"] = False
    elif key == "libraries-only":
        state["installed"].update(flavour=None)
    elif key == "persistenced":
        state["persistenced"] = {"installed": value != "none", "active": False}
    elif key == "fabric":
        state["fabricmanager"] = {"installed_version": None if value == "none" else value, "active": False}
    elif key in ("runfile", "ppa", "cuda_repo"):
        evidence = {"runfile": "/usr/bin/nvidia-uninstall", "ppa": "/etc/apt/sources.list.d/graphics.list"}
        path = evidence.get(key, "/etc/apt/sources.list.d/cuda.list")
        state["foreign_sources"].append({"kind": key, "evidence": path})
    elif key == "own_repo":
        path = "/etc/apt/sources.list.d/fleetfit-nvidia.sources"
        state["foreign_sources"].append({"kind": "cuda_repo", "evidence": path})
    else:
        raise ValueError(word)


def state_of(system: str, cards: str, secure_boot: str, host: str) -> dict[str, Any]:
    """Return the state of a row's first four columns."""
    state = bare_state(system, cards, secure_boot)
    for word in [] if host == "-" else host.split():
        apply_word(state, word)
    return state


def wanted_of(words: str) -> Wanted:
    """Return the settings of a row's column `wanted`, such as ``branch=595 reboot=if_needed``."""
    values: dict[str, Any] = {"today": TODAY}
    for word in [] if words == "-" else words.split():
        key, _, value = word.partition("=")
        if key == "fingerprint":
            values["key_fingerprint"] = "0123456789ABCDEF0123456789ABCDEF01234567"
        elif key in ("cuda_toolkit", "require_gpu"):
            values[key] = value == "yes"
        elif key == "kernels":
            values[key] = [item for item in value.split(",") if item]
        else:
            values[key] = value
    return Wanted.from_dict(values)
