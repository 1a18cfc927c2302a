"""The driver facts of whole hosts, written as small root trees: Debian and Ubuntu as they are, EL9 as recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import driver_facts

from .driver_hosts import ATTRIBUTES, NVIDIA, SECURE_BOOT, SHIM, UBUNTU, Host, codes, modinfo
from .test_driver_packages import GENERAL

RELEASE, NEXT = "6.1.0-41-amd64", "6.1.0-42-amd64"
BRANCHES = {
    "535": {"end_of_life": "2026-06-30", "supported": True},
    "550": {"end_of_life": None, "supported": False},
    "580": {"end_of_life": "2028-06-30", "supported": True},
}
LIBRARY_POLICY = """\
libnvidia-ml1:
  Installed: {installed}
  Candidate: {candidate}
  Version table:
     {candidate} 500
        500 http://mirror.example/nvidia  Packages
 *** {installed} 100
        100 /var/lib/dkms/status
"""


@pytest.fixture
def debian(tmp_path: Path) -> Host:
    """Return a Debian 12 host that is as it should be: NVIDIA's packages, held, DKMS, an RTX 4090."""
    host = Host(tmp_path, "debian", "12", "bookworm")
    host.card()
    for name in ("libnvidia-ml1", "libcuda1", "nvidia-driver-cuda", "nvidia-kernel-open-dkms"):
        host.package(name, "580.95.05-1", maintainer=NVIDIA, status="hold ok installed")
    host.kernel(RELEASE, running=True)
    host.dkms("580.95.05", RELEASE, module="nvidia")
    host.loaded("580.95.05")
    host.tools["modinfo"] = modinfo({RELEASE: "580.95.05", NEXT: "580.95.05"})
    host.tools["dpkg"] = (0, "")
    host.tools["systemctl"] = (0, "Id=nvidia-persistenced.service\nActiveState=active\n")
    host.write("usr/bin/nvidia-persistenced", "")
    host.write("sys/module/nvidia_uvm/refcnt", "0\n")
    host.write("etc/modprobe.d/fleetfit-nvidia.conf", "blacklist nouveau\n")
    host.write(
        "etc/apt/sources.list.d/cuda.list",
        "deb https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/ /\n",
    )
    return host


def test_a_host_that_is_as_it_should_be(debian: Host) -> None:
    state = debian.state(branches=BRANCHES)
    assert state["os"] == {
        "distribution": "debian",
        "version": "12",
        "codename": "bookworm",
        "arch": state["os"]["arch"],
    }
    assert state["gpus"] == [
        {
            "pci_bus_id": "00000000:01:00.0",
            "pci_device_id": "10de:2684",
            "name": "NVIDIA GeForce RTX 4090",
            "compute_capability": "8.9",
            "generation": "ada",
            "nvswitch": False,
        }
    ]
    assert state["loaded"] == {"version": "580.95.05", "flavour": "open"}
    installed = state["installed"]
    assert (installed["version"], installed["flavour"], installed["branch"]) == ("580.95.05", "open", "580")
    assert installed["source"] == "nvidia"
    assert installed["held"] == sorted(installed["packages"])
    assert len(installed["packages"]) == 4
    assert state["kernels"] == [
        {
            "release": RELEASE,
            "running": True,
            "newest": True,
            "headers": True,
            "dkms": "installed",
            "dkms_error": None,
            "module_version": "580.95.05",
        }
    ]
    assert state["nouveau"] == {"loaded": False, "blacklisted": True, "in_initramfs": None}
    assert (state["persistenced"], state["uvm_loaded"]) == ({"installed": True, "active": True}, True)
    assert (state["reboot_reasons"], state["problems"]) == ([], [])
    assert state["branch_end_of_life"] == "2028-06-30"
    assert state["boot_id"].startswith("5f12ea3d")


def test_a_host_that_nobody_touched(tmp_path: Path) -> None:
    """No card, no driver, no tool, hardly a file: facts all the same, and nothing wrong."""
    state = driver_facts.driver_state(str(tmp_path / "empty"), run=lambda _: (127, ""))
    assert state["installed"] == {
        "version": None,
        "flavour": None,
        "branch": None,
        "source": None,
        "packages": {},
        "held": [],
    }
    assert state["candidate"] == {"version": None, "source": None, "offered": []}
    assert (state["problems"], state["reboot_reasons"], state["gpus"]) == ([], [], [])
    assert (state["secure_boot"], state["mok"]) == ("unsupported", {"enrolled": None, "pending": False})
    assert state["boot_free_bytes"] is None


def test_a_bare_host_with_a_card_says_what_it_could_have(tmp_path: Path) -> None:
    host = Host(tmp_path, "debian", "13", "trixie")
    host.card("10de:2204")
    host.write("var/lib/dpkg/status", "Package: bash\nStatus: install ok installed\nVersion: 5\n")
    host.kernel("6.12.1-amd64", running=True, headers=False)
    host.policy(
        "libnvidia-ml1:\n  Installed: (none)\n  Candidate: 550.163.01-2\n  Version table:\n"
        "     550.163.01-2 500\n        500 http://deb.debian.org/debian bookworm/non-free amd64 Packages\n",
        GENERAL.replace("1001 http", " 500 http"),
    )
    state = host.state(branches=BRANCHES)
    assert state["candidate"]["version"] == "550.163.01"
    assert state["candidate"]["source"] == "distribution"
    assert state["kernels"][0]["headers"] is False
    assert (state["problems"], state["reboot_reasons"]) == ([], [])


def test_ubuntu_with_canonicals_signed_modules(tmp_path: Path) -> None:
    host = Host(tmp_path, "ubuntu", "24.04", "noble")
    host.card("10de:2330")
    release = "6.8.0-60-generic"
    version = "580.95.05-0ubuntu0.24.04.2"
    host.package("libnvidia-compute-580-server", version, maintainer=UBUNTU)
    host.package("nvidia-utils-580-server", version, maintainer=UBUNTU)
    host.package(f"linux-modules-nvidia-580-server-open-{release}", "6.8.0-60.63", maintainer=UBUNTU)
    host.kernel(release, running=True)
    host.write(f"lib/modules/{release}/kernel/nvidia-580srv-open/nvidia.ko.zst", "ELF")
    host.tools["modinfo"] = modinfo({release: "580.95.05"})
    host.loaded("580.95.05")
    host.write(SECURE_BOOT, ATTRIBUTES + b"\1")
    state = host.state(branches=BRANCHES)
    installed = state["installed"]
    assert (installed["source"], installed["flavour"], installed["version"]) == (
        "distribution",
        "open",
        "580.95.05",
    )
    kernel = state["kernels"][0]
    assert (kernel["dkms"], kernel["module_version"]) == (None, "580.95.05")
    # Secure Boot is on, and modules that Canonical signed need no key of ours.
    assert (state["secure_boot"], state["problems"]) == ("enabled", [])
    # A kernel came by automatic upgrade and its prebuilt modules did not.
    host.kernel("6.8.0-64-generic")
    assert codes(host.state()["problems"]) == ["dkms_missing"]
    assert "prebuilt" in host.state()["problems"][0]["remedy"]


def test_el9_as_recorded_not_run(tmp_path: Path) -> None:
    host = Host(tmp_path, "rocky", "9.6", "")
    host.card("10de:1db6")
    release = "5.14.0-570.12.1.el9_6.x86_64"
    host.kernel(release, running=True, headers=False)
    host.write(f"usr/src/kernels/{release}/Makefile", "")
    host.dkms("580.95.05", release, module="nvidia", installed=False, ending=".ko.xz")
    host.write(f"lib/modules/{release}/extra/nvidia.ko.xz", "ELF")
    host.tools["rpm"] = (
        0,
        "nvidia-driver-cuda-libs\t3:580.95.05-1.el9\tx86_64\tNVIDIA\n"
        "kmod-nvidia-latest-dkms\t3:580.95.05-1.el9\tx86_64\tNVIDIA\n",
    )
    host.tools["modinfo"] = modinfo({release: "580.95.05"}, license_text="NVIDIA")
    host.loaded("580.95.05", flavour="proprietary")
    state = host.state(branches=BRANCHES)
    assert state["gpus"][0]["generation"] == "volta"
    assert (state["installed"]["version"], state["installed"]["flavour"]) == ("580.95.05", "proprietary")
    assert state["kernels"][0]["dkms"] == "installed"
    assert state["kernels"][0]["headers"] is True
    assert (state["dpkg_audit"], state["problems"], state["reboot_reasons"]) == ([], [], [])


# ---- loaded is not installed ----


def test_loaded_is_not_installed(debian: Host) -> None:
    """What an automatic upgrade leaves: new libraries and a new module on disk, the old module in the kernel."""
    debian.status.clear()
    debian.package("libnvidia-ml1", "580.105.08-1", maintainer=NVIDIA)
    debian.package("nvidia-kernel-open-dkms", "580.105.08-1", maintainer=NVIDIA)
    debian.tools["modinfo"] = modinfo({RELEASE: "580.105.08"})
    state = debian.state(branches=BRANCHES)
    assert codes(state["reboot_reasons"]) == ["driver_mismatch", "module_mismatch"]
    for reason in state["reboot_reasons"]:
        assert "580.95.05" in reason["message"]
        assert "580.105.08" in reason["message"]
    (problem,) = state["problems"]
    assert problem["code"] == "driver_library_mismatch"
    assert "not held" in problem["message"]
    assert "nvidia_driver_reboot" in problem["remedy"]


def test_what_nvml_found_too_is_told_once_with_its_versions(debian: Host) -> None:
    debian.loaded("580.82.07")
    seen = [
        {"code": "driver_library_mismatch", "message": "NVML's", "remedy": "r", "device": None},
        {"code": "xid", "message": "Xid 79", "remedy": "r", "device": "GPU-1"},
    ]
    problems = debian.state(problems=seen)["problems"]
    assert codes(problems) == ["xid", "driver_library_mismatch"]
    assert "580.82.07" in problems[1]["message"]


def test_the_loaded_flavour_is_not_the_installed_one(debian: Host) -> None:
    debian.loaded("580.95.05", flavour="proprietary")
    assert codes(debian.state()["reboot_reasons"]) == ["flavour_mismatch"]


@pytest.mark.parametrize(
    ("text", "flavour"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build", "open"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 16", "proprietary"),
        ("", None),
    ],
)
def test_the_loaded_flavour_by_how_the_module_introduces_itself(
    tmp_path: Path, text: str, flavour: str | None
) -> None:
    host = Host(tmp_path)
    host.write("proc/driver/nvidia/version", text)
    assert driver_facts.loaded_flavour(host.probe) == flavour


# ---- kernels, nouveau, a newer driver ----


def test_a_kernel_upgrade_without_a_module_is_seen_before_the_reboot(debian: Host) -> None:
    debian.kernel(NEXT, headers=False)
    state = debian.state()
    (problem,) = state["problems"]
    assert problem["code"] == "dkms_missing"
    assert NEXT in problem["message"]
    assert "After the next reboot this host would have no GPU" in problem["message"]
    assert f"linux-headers-{NEXT}" in problem["remedy"]
    assert f"dkms autoinstall -k {NEXT}" in problem["remedy"]
    assert codes(state["reboot_reasons"]) == ["kernel_outdated"]


def test_a_build_that_failed_names_its_error_line(debian: Host) -> None:
    debian.kernel(NEXT)
    debian.write(
        "var/lib/dkms/nvidia/580.95.05/build/make.log",
        f"DKMS make.log for nvidia-580.95.05 for kernel {NEXT} (x86_64)\nnv.c:5:1: error: too few arguments\n",
    )
    (problem,) = debian.state()["problems"]
    assert problem["code"] == "dkms_failed"
    assert "nv.c:5:1: error: too few arguments" in problem["message"]


def test_the_running_kernel_has_no_module_and_another_has(debian: Host) -> None:
    debian.kernel(NEXT)
    debian.dkms("580.95.05", NEXT, module="nvidia")
    for path in (
        "sys/module/nvidia/version",
        "proc/driver/nvidia/version",
        f"lib/modules/{RELEASE}/updates/dkms/nvidia.ko",
    ):
        (debian.root / path).unlink()
    reasons = debian.state()["reboot_reasons"]
    assert codes(reasons) == ["kernel_without_module", "kernel_outdated"]
    assert NEXT in reasons[0]["message"]


def test_nouveau_holds_the_card(debian: Host) -> None:
    debian.write("sys/module/nouveau/refcnt", "1\n")
    state = debian.state()
    assert state["nouveau"]["loaded"]
    assert codes(state["reboot_reasons"]) == ["nouveau_loaded"]


def test_a_newer_driver_is_a_candidate_and_no_reason_to_do_anything(debian: Host) -> None:
    debian.policy(LIBRARY_POLICY.format(installed="580.95.05-1", candidate="580.105.08-1"), GENERAL)
    state = debian.state(branches=BRANCHES)
    assert state["candidate"]["version"] == "580.105.08"
    assert state["candidate"]["source"] == "nvidia"
    assert (state["installed"]["version"], state["problems"], state["reboot_reasons"]) == (
        "580.95.05",
        [],
        [],
    )


@pytest.mark.parametrize(
    ("version", "today", "problems"),
    [
        ("535.261.03", "2026-06-30", []),
        ("535.261.03", "2026-07-01", ["driver_branch_end_of_life"]),
        ("550.163.01", "2026-01-01", ["driver_branch_end_of_life"]),
        ("580.95.05", "2028-06-30", []),
        ("580.95.05", "2028-07-01", ["driver_branch_end_of_life"]),
        ("999.1.1", "2028-07-01", []),
    ],
)
def test_a_branch_at_its_end(tmp_path: Path, version: str, today: str, problems: list[str]) -> None:
    host = Host(tmp_path)
    host.package("libnvidia-ml1", f"{version}-1")
    state = host.state(branches=BRANCHES, today=today)
    assert codes(state["problems"]) == problems
    for problem in state["problems"]:
        assert version.partition(".")[0] in problem["message"]


def test_sources_that_are_mixed(debian: Host) -> None:
    debian.write("usr/bin/nvidia-uninstall", "")
    (problem,) = debian.state()["problems"]
    assert problem["code"] == "driver_sources_mixed"
    assert "runfile (/usr/bin/nvidia-uninstall)" in problem["message"]
    assert "cuda_repo (/etc/apt/sources.list.d/cuda.list)" in problem["message"]


# ---- Secure Boot ----


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({}, "unsupported"),
        ({"sys/firmware/efi/config_table": b""}, "unknown"),
        ({SECURE_BOOT: ATTRIBUTES + b"\1"}, "enabled"),
        ({SECURE_BOOT: ATTRIBUTES + b"\0"}, "disabled"),
        (
            {
                SECURE_BOOT: ATTRIBUTES + b"\1",
                f"sys/firmware/efi/efivars/MokSBStateRT-{SHIM}": ATTRIBUTES + b"\1",
            },
            "disabled",
        ),
    ],
)
def test_secure_boot_as_the_kernel_decides_it(tmp_path: Path, files: dict[str, bytes], state: str) -> None:
    host = Host(tmp_path)
    for path, content in files.items():
        host.write(path, content)
    assert host.state()["secure_boot"] == state


def test_mok_from_no_key_to_enrolled(debian: Host) -> None:
    debian.write(SECURE_BOOT, ATTRIBUTES + b"\1")
    for path in ("sys/module/nvidia/version", "proc/driver/nvidia/version"):
        (debian.root / path).unlink()
    assert debian.state()["mok"] == {"enrolled": None, "pending": False}
    key = b"\x30\x82DER of the certificate"
    debian.write("var/lib/dkms/mok.pub", key)
    debian.write(f"sys/firmware/efi/efivars/MokListRT-{SHIM}", ATTRIBUTES + b"the vendor's")
    state = debian.state()
    assert state["mok"] == {"enrolled": False, "pending": False}
    (problem,) = state["problems"]
    assert problem["code"] == "mok_enrolment_pending"
    assert "mokutil --import" in problem["remedy"]
    debian.write(f"sys/firmware/efi/efivars/MokNew-{SHIM}", ATTRIBUTES + key)
    state = debian.state()
    assert state["mok"]["pending"]
    assert "mok_pending" in codes(state["reboot_reasons"])
    assert "Enroll MOK" in state["problems"][0]["remedy"]
    (debian.root / f"sys/firmware/efi/efivars/MokNew-{SHIM}").unlink()
    # What does not fit into the variable is in the kernel's own copy.
    debian.write("sys/firmware/efi/mok-variables/MokListRT", b"header" + key)
    state = debian.state()
    assert (state["mok"]["enrolled"], state["problems"]) == (True, [])


# ---- NVSwitch ----


def test_nvswitches_want_a_fabric_manager_of_the_same_version(debian: Host) -> None:
    debian.card("10de:22a3", "0000:05:00.0", "0x068000")
    debian.card("10de:22a3", "0000:06:00.0", "0x068000")
    state = debian.state()
    assert (state["nvswitch_count"], len(state["gpus"]), state["gpus"][0]["nvswitch"]) == (2, 1, True)
    assert codes(state["problems"]) == ["fabric_manager_mismatch"]
    assert "not installed" in state["problems"][0]["message"]
    debian.package("nvidia-fabricmanager", "580.82.07-1", maintainer=NVIDIA)
    assert "is 580.82.07" in debian.state()["problems"][0]["message"]
    debian.package("nvidia-fabricmanager", "580.95.05-1", maintainer=NVIDIA)
    assert "not active" in debian.state()["problems"][0]["message"]
    debian.tools["systemctl"] = (0, "Id=nvidia-fabricmanager.service\nActiveState=active\n")
    state = debian.state()
    assert state["fabricmanager"] == {"installed_version": "580.95.05", "active": True}
    assert state["problems"] == []


def test_switches_behind_bridges_are_told_from_network_cards(debian: Host) -> None:
    debian.write("sys/class/infiniband/mlx5_0/device/vpd", b"\x82\0NVIDIA ConnectX-7\0V0\x08SMDL=SW_MNG\0")
    debian.write("sys/class/infiniband/mlx5_1/device/vpd", b"\x82\0NVIDIA ConnectX-7\0")
    assert debian.state()["nvswitch_count"] == 1


# ---- disks, controller ----


def block(
    host: Host, name: str, number: str, *, mapper: str = "", uuid: str = "", slaves: tuple[str, ...] = ()
) -> None:
    host.write(f"sys/class/block/{name}/dev", f"{number}\n")
    if mapper:
        host.write(f"sys/class/block/{name}/dm/name", f"{mapper}\n")
        host.write(f"sys/class/block/{name}/dm/uuid", f"{uuid}\n")
    for slave in slaves:
        host.write(f"sys/class/block/{name}/slaves/{slave}/dev", "")


@pytest.mark.parametrize(
    ("crypttab", "asks"),
    [
        ("cryptroot UUID=1 none luks,discard\n", True),
        ("cryptroot UUID=1 - luks\n", True),
        ("cryptroot UUID=1\n", True),
        ("", True),
        ("other UUID=2 none luks\ncryptroot UUID=1 /etc/key luks\n", False),
        ("cryptroot UUID=1 none luks,tpm2-device=auto\n", False),
        ("cryptroot UUID=1 none luks,keyscript=/lib/x\n", False),
    ],
)
def test_a_root_that_asks_for_a_passphrase(tmp_path: Path, crypttab: str, asks: bool) -> None:
    """LVM on LUKS, as Debian's installer makes it."""
    host = Host(tmp_path)
    host.write("proc/1/mountinfo", "25 1 253:1 / / rw,relatime shared:1 - ext4 /dev/mapper/vg-root rw\n")
    block(host, "sda3", "8:3")
    block(host, "dm-0", "253:0", mapper="cryptroot", uuid="CRYPT-LUKS2-1-cryptroot", slaves=("sda3",))
    block(host, "dm-1", "253:1", mapper="vg-root", uuid="LVM-x", slaves=("dm-0",))
    host.write("etc/crypttab", crypttab)
    assert host.state()["root_needs_passphrase"] is asks


def test_an_encrypted_data_disk_asks_for_nothing_at_boot(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.write(
        "proc/1/mountinfo",
        "25 1 8:1 / / rw - ext4 /dev/sda1 rw\n26 25 253:0 / /srv rw - ext4 /dev/mapper/data rw\n",
    )
    block(host, "sda1", "8:1")
    block(host, "dm-0", "253:0", mapper="data", uuid="CRYPT-LUKS2-1-data", slaves=("sdb",))
    assert host.state()["root_needs_passphrase"] is False


def test_btrfs_is_told_by_its_device(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.write("proc/1/mountinfo", "25 1 0:33 /@ / rw - btrfs /dev/mapper/cryptroot rw\n")
    block(host, "dm-0", "253:0", mapper="cryptroot", uuid="CRYPT-LUKS2-1-cryptroot")
    assert host.state()["root_needs_passphrase"] is True


def test_the_controller_knows_itself(tmp_path: Path) -> None:
    host = Host(tmp_path)
    own = host.state()["boot_id"]
    assert not host.state(controller_boot_id="another")["is_controller"]
    assert host.state(controller_boot_id=own)["is_controller"]
    assert host.state(controller_boot_id="another", local_connection=True)["is_controller"]


def test_dpkgs_complaints_are_passed_on(debian: Host) -> None:
    debian.tools["dpkg"] = (
        0,
        "The following packages are only half configured\n nvidia-kernel-dkms  NVIDIA\n\n",
    )
    assert len(debian.state()["dpkg_audit"]) == 2


def test_facts_stay_small(debian: Host) -> None:
    """The limit of docs/contracts.md §14, for a host with everything: 8 cards, 3 kernels, 30 packages."""
    for number in range(2, 9):
        debian.card("10de:2bb5", f"0000:{number:02x}:00.0")
    for number in range(30):
        debian.package(
            f"libnvidia-some-long-library-name-{number}", "580.95.05-1", status="hold ok installed"
        )
    for release in (NEXT, "6.1.0-43-amd64"):
        debian.kernel(release)
    state = debian.state(branches=BRANCHES)
    assert len(json.dumps(state, separators=(",", ":"))) <= 4096 + 8 * 250 + 3 * 250
