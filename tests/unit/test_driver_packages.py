"""The driver's packages: names, holds, sources and offers, in the words of apt, dpkg, rpm and dnf."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import driver_packages
from ansible_collections.fleetfit.llm.plugins.module_utils.driver_packages import Offer, Package
from hypothesis import given
from hypothesis import strategies as st

from .driver_hosts import DEBIAN, NVIDIA, UBUNTU, Host

# As apt 2.6 (Debian 12) prints it.
GENERAL = """\
Package files:
 100 /var/lib/dpkg/status
     release a=now
 600 https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64  Packages
     release o=NVIDIA,l=NVIDIA CUDA,c=
     origin developer.download.nvidia.com
 500 http://mirror.example/nvidia  Packages
     release o=NVIDIA,l=NVIDIA CUDA,c=
     origin mirror.example
 500 http://deb.debian.org/debian-security bookworm-security/non-free amd64 Packages
     release v=12,o=Debian,a=oldstable-security,n=bookworm-security,l=Debian-Security,c=non-free,b=amd64
     origin deb.debian.org
1001 http://deb.debian.org/debian bookworm/non-free amd64 Packages
     release v=12.15,o=Debian,a=oldstable,n=bookworm,l=Debian,c=non-free,b=amd64
     origin deb.debian.org
  -1 https://ppa.launchpadcontent.net/graphics-drivers/ppa/ubuntu noble/main amd64 Packages
     release v=24.04,o=LP-PPA-graphics-drivers,a=noble,n=noble,l=Proprietary GPU Drivers,c=main,b=amd64
     origin ppa.launchpadcontent.net
Pinned packages:
     libnvidia-ml1 -> 580.95.05-1 with priority 1001
"""
POLICY = """\
libnvidia-compute:
  Installed: (none)
  Candidate: (none)
  Version table:
libnvidia-ml1:
  Installed: 580.95.05-1
  Candidate: 580.95.05-1
  Version table:
     595.71.05-1 -1
        600 https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64  Packages
     580.105.08-1 -1 (phased 20%)
        600 https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64  Packages
        500 http://mirror.example/nvidia  Packages
 *** 580.95.05-1 1001
        600 https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64  Packages
        100 /var/lib/dpkg/status
     535.309.01-0+deb12u1 500
        500 http://deb.debian.org/debian-security bookworm-security/non-free amd64 Packages
     535.261.03-1~deb12u1 500
       1001 http://deb.debian.org/debian bookworm/non-free amd64 Packages
"""


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("580.95.05-1", "580.95.05"),
        ("535.261.03-1~deb12u1", "535.261.03"),
        ("580.95.05-0ubuntu0.24.04.2", "580.95.05"),
        ("3:580.95.05-1.el9", "580.95.05"),
        ("515.43-1", "515.43"),
        ("12.4.1-2", None),
        ("20220217+3~deb12u1", None),
    ],
)
def test_the_drivers_version_in_a_packages(package: str, version: str | None) -> None:
    assert driver_packages.upstream_version(package) == version


@given(
    st.lists(st.integers(0, 999), min_size=2, max_size=3),
    st.lists(st.integers(0, 999), min_size=2, max_size=3),
)
def test_versions_are_ordered_by_number(a: list[int], b: list[int]) -> None:
    texts = [".".join(map(str, parts)) for parts in (a, b)]
    keys = [driver_packages.version_key(text) for text in texts]
    assert (keys[0] < keys[1]) == (tuple(a) < tuple(b))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "libnvidia-ml1",
            "libcuda1",
            "nvidia-kernel-dkms",
            "nvidia-open-kernel-dkms",
            "nvidia-kernel-open-dkms",
        ),
        *("nvidia-driver-cuda", "libnvidia-compute-580-server", "nvidia-dkms-580-open", "nvidia-utils-580"),
        *(
            "linux-modules-nvidia-580-server-open-6.8.0-60-generic",
            "kmod-nvidia-open-dkms",
            "nvidia-persistenced",
        ),
        *("nvidia-fabricmanager-580", "firmware-nvidia-gsp", "nvidia-modprobe", "cuda-drivers"),
    ],
)
def test_packages_of_the_driver(name: str) -> None:
    assert driver_packages.is_driver_package(name)


@pytest.mark.parametrize(
    "name",
    [
        *("nvidia-cuda-toolkit", "nvidia-container-toolkit", "libnvidia-container1", "cuda-toolkit-13-0"),
        *(
            "nvidia-cudnn",
            "libcudart12",
            "firmware-misc-nonfree",
            "nvidia-driver-pinning-580",
            "nvidia-fs-dkms",
        ),
    ],
)
def test_packages_of_others(name: str) -> None:
    assert not driver_packages.is_driver_package(name)


def test_dpkgs_database_tells_versions_and_holds(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.package("libnvidia-ml1", "580.95.05-1", maintainer=NVIDIA, status="hold ok installed")
    host.package("nvidia-kernel-open-dkms", "580.95.05-1", maintainer=NVIDIA)
    host.package("nvidia-smi", "535.261.03-1~deb12u1", status="deinstall ok config-files")
    host.package("nvidia-cuda-toolkit", "11.8.89~11.8.0-5", status="hold ok installed")
    host.package("nvidia-installer-cleanup", "20220217+3~deb12u1")
    host.package("bash", "5.2.15-2", status="hold ok installed")
    found = driver_packages.dpkg_packages((tmp_path / "var/lib/dpkg/status").read_text())
    assert found == {
        "libnvidia-ml1": Package("580.95.05-1", NVIDIA, True),
        "nvidia-kernel-open-dkms": Package("580.95.05-1", NVIDIA, False),
    }


def test_a_module_without_its_libraries_is_no_installed_driver(tmp_path: Path) -> None:
    """What is installed is the user space: whoever decides would otherwise leave half a driver as it is."""
    host = Host(tmp_path)
    host.package("nvidia-kernel-dkms", "535.309.01-0+deb12u1", status="install ok half-configured")
    installed = driver_packages.read_packages(host.probe, host.run).installed
    assert (installed["version"], installed["flavour"]) == (None, "proprietary")
    assert set(installed["packages"]) == {"nvidia-kernel-dkms"}


@pytest.mark.parametrize(
    ("names", "flavour"),
    [
        (["nvidia-kernel-open-dkms"], "open"),
        (["nvidia-open-kernel-dkms"], "open"),
        (["nvidia-dkms-580-server-open"], "open"),
        (["linux-modules-nvidia-580-server-open-generic", "nvidia-utils-580-server"], "open"),
        (["kmod-nvidia-open-dkms"], "open"),
        (["nvidia-kernel-dkms"], "proprietary"),
        (["nvidia-dkms-580"], "proprietary"),
        (["kmod-nvidia-latest-dkms"], "proprietary"),
        (["nvidia-kernel-dkms", "nvidia-open-kernel-dkms"], None),
        (["libnvidia-ml1"], None),
    ],
)
def test_the_flavour_is_that_of_the_modules_package(names: list[str], flavour: str | None) -> None:
    assert driver_packages.module_flavour(names) == flavour


@pytest.mark.parametrize(
    ("package", "source"),
    [
        (Package("535.261.03-1~deb12u1", DEBIAN, False), "distribution"),
        (Package("580.95.05-0ubuntu0.24.04.2", UBUNTU, False), "distribution"),
        (Package("580.95.05-0ubuntu0~gpu24.04.1", UBUNTU, False), "ppa"),
        (Package("580.95.05-1", NVIDIA, False), "nvidia"),
        (Package("580.95.05-1", "Somebody <me@example.org>", False), "unknown"),
    ],
)
def test_who_made_a_package(package: Package, source: str) -> None:
    assert driver_packages.source_of_package(package) == source


def test_apts_repositories_by_their_origin_not_their_address() -> None:
    origins = driver_packages.apt_origins(GENERAL)
    assert origins["http://mirror.example/nvidia  Packages"] == "nvidia"
    assert origins["http://deb.debian.org/debian bookworm/non-free amd64 Packages"] == "distribution"
    ppa = "https://ppa.launchpadcontent.net/graphics-drivers/ppa/ubuntu noble/main amd64 Packages"
    assert origins[ppa] == "ppa"


def test_a_newer_driver_in_the_repository_is_offered_even_where_it_is_pinned_away() -> None:
    origins = driver_packages.apt_origins(GENERAL)
    offers, taken = driver_packages.apt_offers(POLICY, origins)
    assert taken == Offer("580.95.05", "nvidia")
    assert offers == [
        Offer("595.71.05", "nvidia"),
        Offer("580.105.08", "nvidia"),
        Offer("580.95.05", "nvidia"),
        Offer("535.309.01", "distribution"),
        Offer("535.261.03", "distribution"),
    ]
    assert driver_packages.candidate("580.95.05", offers, taken) == {
        "version": "580.105.08",
        "source": "nvidia",
        "offered": [
            {"version": "595.71.05", "source": "nvidia"},
            {"version": "580.105.08", "source": "nvidia"},
            {"version": "535.309.01", "source": "distribution"},
        ],
    }
    # Where nothing is installed, the candidate is what apt would take.
    assert driver_packages.candidate(None, offers, taken)["version"] == "580.95.05"
    # Where no repository has the installed branch, nothing is a candidate: another branch is a decision.
    assert driver_packages.candidate("550.163.01", offers, taken)["version"] is None
    assert driver_packages.installed_origin(POLICY, origins) == "nvidia"


def test_a_version_that_only_the_host_has_is_not_offered() -> None:
    policy = (
        "libnvidia-ml1:\n  Installed: 580.95.05-1\n  Candidate: 580.95.05-1\n  Version table:\n"
        " *** 580.95.05-1 100\n        100 /var/lib/dpkg/status\n"
    )
    assert driver_packages.apt_offers(policy, {}) == ([], None)
    assert driver_packages.installed_origin(policy, {}) is None


SOURCES = {
    "etc/apt/sources.list.d/cuda.list": (
        "deb [signed-by=/usr/share/keyrings/cuda.gpg] "
        "https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/ /\n",
        "cuda_repo",
    ),
    "etc/apt/sources.list.d/nvidia.sources": (
        "Types: deb\nURIs: http://proxy.example/compute/cuda/repos/debian12/x86_64/\nSuites: ./\n",
        "cuda_repo",
    ),
    "etc/apt/sources.list.d/graphics.sources": (
        "Types: deb\nURIs: https://ppa.launchpadcontent.net/graphics-drivers/ppa/ubuntu/\nSuites: noble\n",
        "ppa",
    ),
    "etc/apt/sources.list.d/old.list": (
        "deb http://ppa.launchpad.net/graphics-drivers/ppa/ubuntu jammy main\n",
        "ppa",
    ),
    "etc/yum.repos.d/cuda-rhel9.repo": (
        "[cuda-rhel9-x86_64]\nname=cuda\n"
        "baseurl=https://developer.download.nvidia.com/compute/cuda/repos/rhel9/x86_64\nenabled=1\n",
        "cuda_repo",
    ),
}


@pytest.mark.parametrize("path", SOURCES)
def test_every_repository_of_a_driver_is_seen(tmp_path: Path, path: str) -> None:
    host = Host(tmp_path)
    text, kind = SOURCES[path]
    host.write(path, text)
    assert driver_packages.foreign_sources(host.probe, {}) == [{"kind": kind, "evidence": f"/{path}"}]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "etc/apt/sources.list.d/a.list",
            "# deb http://ppa.launchpad.net/graphics-drivers/ppa/ubuntu jammy main\n",
        ),
        (
            "etc/apt/sources.list.d/b.sources",
            "Enabled: no\nURIs: https://ppa.launchpadcontent.net/graphics-drivers/ppa/ubuntu\n",
        ),
        (
            "etc/apt/sources.list.d/c.list.save",
            "deb http://ppa.launchpad.net/graphics-drivers/ppa/ubuntu a main\n",
        ),
        ("etc/yum.repos.d/d.repo", "[c]\nbaseurl=https://x/compute/cuda/repos/rhel9/x86_64\nenabled=0\n"),
        ("etc/apt/sources.list", "deb http://deb.debian.org/debian bookworm main contrib non-free\n"),
    ],
)
def test_what_is_switched_off_is_no_source(tmp_path: Path, path: str, text: str) -> None:
    host = Host(tmp_path)
    host.write(path, text)
    assert driver_packages.foreign_sources(host.probe, {}) == []


def test_a_run_installer_is_seen_by_what_it_leaves(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.write("var/lib/dpkg/status", "Package: bash\nStatus: install ok installed\nVersion: 5\n")
    host.write("usr/bin/nvidia-uninstall", "")
    host.write("usr/lib/x86_64-linux-gnu/libnvidia-ml.so.570.86.15", "")
    host.write("usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1", "")
    found = driver_packages.read_packages(host.probe, host.run)
    assert found.foreign_sources == [{"kind": "runfile", "evidence": "/usr/bin/nvidia-uninstall"}]
    assert found.installed == {
        "version": "570.86.15",
        "flavour": None,
        "branch": "570",
        "source": "runfile",
        "packages": {},
        "held": [],
    }


# Recorded formats, not run: rpm 4.16 and dnf 4 of EL9.
RPM = (
    "nvidia-driver-cuda-libs\t3:580.95.05-1.el9\tx86_64\tNVIDIA\n"
    "kmod-nvidia-open-dkms\t3:580.95.05-1.el9\tnoarch\tNVIDIA\n"
    "bash\t5.1.8-9.el9\tx86_64\tRocky Enterprise Software Foundation\n"
)


def test_the_rhel_family_by_rpm_and_versionlock() -> None:
    lock = "# comment\nnvidia-driver-cuda-libs-3:580.95.05-1.el9.*\n!kmod-nvidia*\n"
    found = driver_packages.rpm_packages(RPM, lock)
    assert set(found) == {"nvidia-driver-cuda-libs", "kmod-nvidia-open-dkms"}
    assert [found[name].held for name in sorted(found)] == [False, True]
    for lock in ("kmod-nvidia-open-dkms-580.95.05-1.el9.noarch", "kmod-nvidia-open-dkms-3:580.95.05-1.el9"):
        assert driver_packages.rpm_packages(RPM, f"{lock}\n")["kmod-nvidia-open-dkms"].held
    # Neither keeps the package from moving within the branch.
    for lock in ("*nvidia*580*", "kmod-nvidia*-580.*", "kmod-nvidia-open-dkms"):
        assert not driver_packages.rpm_packages(RPM, f"{lock}\n")["kmod-nvidia-open-dkms"].held


def test_a_rhel_host_reads_rpm_and_dnfs_cache_only(tmp_path: Path) -> None:
    host = Host(tmp_path, "rocky", "9.6")
    host.write(*("etc/yum.repos.d/cuda-rhel9.repo", SOURCES["etc/yum.repos.d/cuda-rhel9.repo"][0]))
    host.tools["rpm"] = (0, RPM)

    def dnf(arguments: list[str]) -> tuple[int, str]:
        if "--installed" in arguments:
            return 0, "cuda-rhel9-x86_64\n"
        return (
            0,
            "nvidia-driver-cuda\t595.71.05\tcuda-rhel9-x86_64\nlibnvidia-ml\t580.105.08\tcuda-rhel9-x86_64\n",
        )

    host.tools["dnf"] = dnf  # type: ignore[assignment]
    found = driver_packages.read_packages(host.probe, host.run)
    assert (found.installed["version"], found.installed["source"], found.installed["flavour"]) == (
        "580.95.05",
        "nvidia",
        "open",
    )
    assert found.candidate["version"] == "580.105.08"
    assert all("-C" in call for call in host.calls if call[0] == "dnf"), (
        "facts never load a repository's index"
    )
