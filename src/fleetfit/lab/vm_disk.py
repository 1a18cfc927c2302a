"""Disks of virtual machines: Debian with its own kernel, initramfs and boot loader, made without any mount."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.units import MIB

from .console import step
from .images import build_archive
from .paths import cache_root, checkout_root, locked
from .process import run

# Raised when the way disks are made changes in a way that the recipe does not show.
BUILDER_VERSION = 1
SECTOR_BYTES = 512
# The usual start of the first partition (1 MiB); the boot loader lies before it.
PARTITION_SECTOR = 2048
# Layout of an MBR: code, then four entries of 16 bytes at 446, then 55 AA.
BOOT_CODE_BYTES = 446
LINUX_PARTITION = 0x83


def load_vm_recipes() -> dict[str, dict[str, Any]]:
    """Return the recipes of lab/vm_images.yml by name, their lists flattened."""
    recipes: dict[str, dict[str, Any]] = yaml.safe_load((checkout_root() / "lab/vm_images.yml").read_text())
    return {
        name: {**recipe, "packages": flat(recipe["packages"]), "hooks": flat(recipe["hooks"])}
        for name, recipe in recipes.items()
    }


def flat(items: list[Any]) -> list[str]:
    """Return the strings of nested lists in their order."""
    return [part for item in items for part in (flat(item) if isinstance(item, list) else [item])]


def disk_path(name: str) -> Path:
    """Return where the disk of a recipe is kept, named by the recipe's content; raises for an unknown name."""
    recipes = load_vm_recipes()
    if name not in recipes:
        raise FleetfitError(
            f"There is no virtual machine {name!r}.",
            code="unknown_image",
            remedy=f"lab/vm_images.yml has {', '.join(recipes)}.",
        )
    canonical = json.dumps([BUILDER_VERSION, recipes[name]], sort_keys=True)
    key = hashlib.sha256(canonical.encode()).hexdigest()[:12]
    return cache_root() / "images" / f"vm-{name}-{key}.raw"


def ensure_disk(name: str) -> Path:
    """Return the disk of a recipe, building it where it is missing; machines only ever read it.

    Two processes may ask at once: one builds, the other waits. Raises FleetfitError, ``vm_needs_root``
    where the files could not get their owners.
    """
    disk = disk_path(name)
    if disk.exists():
        return disk
    if os.geteuid() != 0:
        raise FleetfitError(
            f"Making the disk {disk.name} needs root: its files belong to the guest's own users.",
            code="vm_needs_root",
            remedy="Run this as root.",
        )
    with locked(disk.parent / f"vm-{name}.lock"):
        if not disk.exists():
            build_disk(load_vm_recipes()[name], f"vm-{name}", disk)
    return disk


def build_disk(recipe: dict[str, Any], name: str, disk: Path) -> None:
    """Make a bootable disk; it appears under its name only when it is whole."""
    archive = disk.with_suffix(".tar")
    build_archive(recipe, name, archive)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=disk.parent) as scratch:
        tree, partial = Path(scratch) / "tree", Path(scratch) / "disk"
        tree.mkdir(0o755)
        run(
            ["tar", "--extract", "--numeric-owner", "--xattrs", "--file", str(archive), "-C", str(tree)],
            what=f"unpack {name}",
        )
        with partial.open("wb") as stream:
            stream.truncate(recipe["size_mib"] * MIB)
        format_disk(tree, partial, recipe["size_mib"] * MIB)
        os.replace(partial, disk)
    archive.unlink()
    step(f"Made the disk of {name} in {time.monotonic() - started:.0f} s")


def format_disk(tree: Path, disk: Path, size_bytes: int) -> None:
    """Write boot loader, partition table and file system of ``tree`` to the file ``disk``."""
    start_bytes = PARTITION_SECTOR * SECTOR_BYTES
    options = f"offset={start_bytes},root_owner=0:0,lazy_itable_init=1"
    # GRUB 2.06 cannot read the feature; newer mkfs has it on.
    argv = ["mkfs.ext4", "-q", "-F", "-E", options, "-O", "^metadata_csum_seed", "-d", str(tree), str(disk)]
    run([*argv, f"{(size_bytes - start_bytes) // 1024}k"], what=f"format {disk.name}")
    boot, core = (tree / "boot/grub" / name for name in ("boot.img", "core.img"))
    with disk.open("r+b") as stream:
        stream.write(boot_sector(boot.read_bytes(), size_bytes // SECTOR_BYTES))
        # boot.img looks for the rest of GRUB in the sector after itself, unless an installer says otherwise.
        content = core.read_bytes()
        if len(content) > start_bytes - SECTOR_BYTES:
            raise ValueError(f"{core} is larger than the room before the partition")
        stream.write(content)


def boot_sector(code: bytes, disk_sectors: int) -> bytes:
    """Return an MBR with GRUB's ``code`` and one bootable Linux partition to the end of the disk."""
    no_cylinders = b"\xfe\xff\xff"
    count = disk_sectors - PARTITION_SECTOR
    entry = struct.pack(
        "<B3sB3sII", 0x80, no_cylinders, LINUX_PARTITION, no_cylinders, PARTITION_SECTOR, count
    )
    return code[:BOOT_CODE_BYTES].ljust(BOOT_CODE_BYTES, b"\0") + entry.ljust(64, b"\0") + b"\x55\xaa"
