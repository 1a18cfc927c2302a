"""The files that keep a driver where it was put, compared with tests/golden/drivers per distribution and source."""

from __future__ import annotations

import configparser
import fnmatch
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils import driver_files
from ansible_collections.fleetfit.llm.plugins.module_utils.driver_decision import decide
from ansible_collections.fleetfit.llm.plugins.module_utils.driver_packages import rpm_packages

from . import drivers

REPO = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parents[1] / "golden/drivers"
# Name of the golden file: system, settings, and whether a real host of that distribution ran it in our tests.
CASES = {
    "debian-12-nvidia": ("debian-12", "-", False),
    "debian-12-distribution": ("debian-12", "source=distribution", True),
    "debian-12-nvidia-one-version": ("debian-12", "version=580.95.05", False),
    "debian-13-nvidia": ("debian-13", "-", False),
    "debian-13-distribution": ("debian-13", "source=distribution", True),
    "debian-13-nvidia-mirror": ("debian-13", "repository_url=https://mirror.example.com/cuda/", False),
    "ubuntu-22.04-distribution": ("ubuntu-22.04", "kernels=5.15.0-140-generic", False),
    "ubuntu-22.04-nvidia": ("ubuntu-22.04", "source=nvidia", False),
    "ubuntu-24.04-distribution": ("ubuntu-24.04", "kernels=6.8.0-45-generic", False),
    "ubuntu-24.04-nvidia": ("ubuntu-24.04", "source=nvidia", False),
    "rhel-9-nvidia": ("rhel-9", "fingerprint", False),
    "rhel-9-nvidia-proprietary": ("rhel-9", "fingerprint flavour=proprietary", False),
    "rocky-9-nvidia": ("rocky-9", "fingerprint", False),
    "almalinux-9-nvidia": ("almalinux-9", "fingerprint", False),
    "rhel-10-nvidia": ("rhel-10", "fingerprint", False),
    "rocky-10-nvidia": ("rocky-10", "fingerprint", False),
    "almalinux-10-nvidia": ("almalinux-10", "fingerprint", False),
}


def decision_of(name: str) -> dict[str, Any]:
    system, wanted, _ = CASES[name]
    return decide(drivers.wanted_of(wanted), drivers.state_of(system, "4090", "off", "-"), drivers.DATA)


def text_of(name: str) -> str:
    decision = decision_of(name)
    _, wanted, ran = CASES[name]
    repository = decision["repository"]
    lines = [
        f"# {name}: settings {wanted if wanted != '-' else 'by default'}",
        "# run in the Molecule scenario nvidia_driver" if ran else "# rendered, not run",
        f"packages: {' '.join(decision['packages'])}",
        f"headers: {' '.join(decision['headers']) or 'none'}",
        *([f"locks need: {' '.join(decision['lock']['packages'])}"] if decision["lock"]["packages"] else []),
        f"key: {repository['fingerprint'] or 'the system has it'} in {repository['signed_by']}"
        if repository
        else "key: the system has it",
    ]
    for item in decision["files"]:
        where = f", put in {item['block']!r}" if item["block"] else ""
        lines += ["", f"==> {item['path']} ({item['part']}, {item['mode']}{where})", item["content"].rstrip()]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_golden_file(name: str) -> None:
    """Rewrite them with FLEETFIT_UPDATE_GOLDEN=1, and read the difference."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("FLEETFIT_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text_of(name))
    assert path.read_text() == text_of(name)


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


def test_every_supported_distribution_has_a_golden_file() -> None:
    systems = {
        f"{name}-{entry['version']}"
        for entry in drivers.DATA["distributions"]
        for name in entry["distributions"]
    }
    assert systems == {system for system, _, _ in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_nothing_trusts_what_is_not_signed(name: str) -> None:
    text = text_of(name)
    assert not re.search(r"trusted|allow-insecure|gpgcheck=0|apt-key", text, re.IGNORECASE)
    repository = decision_of(name)["repository"]
    if repository:
        assert repository["signed_by"] in text


def paths(name: str) -> dict[str, str]:
    return {item["path"]: item["content"] for item in decision_of(name)["files"]}


def test_nouveau_is_kept_out_and_uvm_is_loaded_everywhere() -> None:
    for name in CASES:
        files = paths(name)
        assert "blacklist nouveau\noptions nouveau modeset=0\n" in files[driver_files.MODPROBE]
        assert files[driver_files.MODULES_LOAD].splitlines()[-1] == "nvidia-uvm"


@pytest.mark.parametrize(
    ("package", "kept"),
    [
        ("nvidia-kernel-dkms", True),
        ("libnvidia-ml1", True),
        ("libcuda1", True),
        ("linux-modules-nvidia-580-server-open-generic", True),
        ("firmware-nvidia-gsp", True),
        ("linux-image-amd64", False),
        ("libcuda1-extra", False),
    ],
)
def test_unattended_upgrades_leaves_the_driver_alone(package: str, kept: bool) -> None:
    """unattended-upgrades matches its entries from a name's start (pando85/homelab#4110)."""
    expressions = re.findall(
        r'^    "(.*)";$', paths("debian-12-nvidia")[driver_files.APT_UNATTENDED], re.MULTILINE
    )
    assert any(re.match(expression, package) for expression in expressions) is kept


def test_dnfs_files_are_what_dnf_reads() -> None:
    files = paths("rhel-9-nvidia")
    repository = configparser.ConfigParser()
    repository.read_string(files[driver_files.DNF_REPOSITORY])
    assert repository[driver_files.OWN_MARK]["gpgcheck"] == "1"
    module = configparser.ConfigParser()
    module.read_string(files[driver_files.DNF_MODULE])
    assert module["nvidia-driver"]["stream"] == "580-open"
    assert driver_files.DNF_MODULE not in paths("rhel-10-nvidia")
    for name in ("rhel-9-nvidia", "rhel-10-nvidia"):
        lines = paths(name)[driver_files.DNF_VERSIONLOCK].splitlines()
        assert "nvidia-driver*-580.*" in lines
        assert "kmod-nvidia*-580.*" in lines
        # A name and a version each, and no name that the container toolkit has too.
        assert all(line.endswith("-580.*") for line in lines)
        assert not any(fnmatch.fnmatch("libnvidia-container1-580.1", line) for line in lines)


def test_what_is_locked_for_dnf_is_seen_as_held() -> None:
    """What the role writes into versionlock.list is what the facts read there, with an epoch and without one."""
    packages = {"nvidia-driver-cuda": "3:580.95.05-1.el10", "kmod-nvidia-open-dkms": "580.95.05-1.el10"}
    lock = "\n".join(["# BEGIN", *driver_files.versionlock_entries(packages)])
    listed = "".join(f"{name}\t{version}\tx86_64\tNVIDIA\n" for name, version in packages.items())
    assert {name for name, package in rpm_packages(listed, lock).items() if package.held} == set(packages)
    newer = listed.replace("580.95.05", "580.105.08")
    assert not any(package.held for package in rpm_packages(newer, lock).values())


def test_uninstall_takes_back_every_file_of_ours_and_every_block() -> None:
    variables = yaml.safe_load((REPO / "roles/nvidia_driver/vars/main.yml").read_text())
    own, blocks = set(), set()
    for name in CASES:
        for item in decision_of(name)["files"]:
            (blocks if item["block"] else own).add(item["path"])
    own |= {driver_files.key_path(kind) for kind in ("apt", "dnf")}
    assert set(variables["__nvidia_driver_own_files"]) == own
    assert set(variables["__nvidia_driver_blocks"]) == blocks


def test_files_of_others_get_a_block_and_no_header() -> None:
    for item in decision_of("rhel-10-nvidia")["files"]:
        assert item["content"].startswith("#") is (item["block"] is None)
