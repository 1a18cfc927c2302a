"""Simulated GPUs of lab hosts: the driver library, a profile and the probe root, in /opt/fleetfit-lab."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
from pathlib import Path

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

from .console import step
from .images import ensure_image
from .machine import Machine, podman
from .oneoff import run_in_container
from .paths import cache_root, checkout_root, locked
from .process import run

LIBRARY = "libnvidia-ml.so.1"
FOLDER = "opt/fleetfit-lab"
# A host without any GPU: its probe root hides the cards that this machine may have.
NO_GPU_PROFILE = b"# No GPU at all.\n"


def nvml_folder() -> Path:
    """Return the folder of the simulated library's source."""
    return checkout_root() / "lab/nvml"


def profile_path(profile: str) -> Path:
    """Return a profile's file; raises FleetfitError ``unknown_profile`` with the known names."""
    path = nvml_folder() / "profiles" / f"{profile}.ini"
    if not path.exists():
        known = sorted(item.stem for item in path.parent.glob("*.ini"))
        raise FleetfitError(
            f"There is no GPU profile {profile!r}.",
            code="unknown_profile",
            remedy=f"lab/nvml/profiles has {', '.join(known)}.",
        )
    return path


def ensure_library(machine: Machine) -> Path:
    """Return the simulated libnvidia-ml.so.1, compiled with the oldest glibc among the hosts and cached."""
    source = nvml_folder()
    content = (source / "nvml.c").read_bytes() + (source / "build").read_bytes()
    folder = cache_root() / "nvml" / hashlib.sha256(content).hexdigest()[:16]
    library = folder / LIBRARY
    with locked(folder / "lock"):
        if library.exists():
            return library
        step("Compiling the simulated NVML library")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            run_in_container(
                machine,
                ensure_image("builder"),
                ["sh", "/source/build", "/out"],
                what="compile the simulated NVML library",
                volumes={source: "/source:ro", Path(scratch): "/out"},
            )
            os.replace(Path(scratch, LIBRARY), library)
    return library


def gpu_files(machine: Machine, profile: str | None) -> tuple[bytes, str]:
    """Return a tar of the host's simulated GPU files and the digest of its content."""
    files = [(f"{FOLDER}/make_probe_root", (nvml_folder() / "make_probe_root").read_bytes(), 0o755)]
    if profile is None:
        files.append((f"{FOLDER}/profile.ini", NO_GPU_PROFILE, 0o644))
    else:
        files.append((f"{FOLDER}/profile.ini", profile_path(profile).read_bytes(), 0o644))
        files.append((f"{FOLDER}/lib/{LIBRARY}", ensure_library(machine).read_bytes(), 0o644))
        files.append(("etc/ld.so.conf.d/00-fleetfit-lab.conf", f"/{FOLDER}/lib\n".encode(), 0o644))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content, mode in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest()


def apply_gpu(machine: Machine, container: str, files: bytes, profile: str | None) -> None:
    """Put the simulated GPU into a running host, replacing another one."""
    options = "" if profile else " --without-driver"
    script = f"""set -e
rm -rf /{FOLDER} /etc/ld.so.conf.d/00-fleetfit-lab.conf
tar --extract --no-same-owner --directory /
python3 /{FOLDER}/make_probe_root /{FOLDER}/profile.ini /{FOLDER}/root{options}
ldconfig
"""
    argv = podman(machine, "exec", "--interactive", container, "sh", "-c", script)
    run(argv, what=f"put the simulated GPU into {container}", stdin=files)
