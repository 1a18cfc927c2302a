"""Kernels of a host: which have the driver's module, what DKMS made of it, and whether nouveau comes first."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import driver_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from .driver_hosts import Host, modinfo, set_age

OLD, NEW = "6.1.0-9-amd64", "6.1.0-42-amd64"
LOG = """\
DKMS make.log for nvidia-current-535.261.03 for kernel {release} (x86_64)
Tue Nov 24 10:00:00 UTC 2026
make[1]: Entering directory '/usr/src/linux-headers-{release}'
  CC [M]  /var/lib/dkms/nvidia-current/535.261.03/build/nvidia-drm/nvidia-drm-drv.o
/var/lib/dkms/nvidia-current/535.261.03/build/nvidia-drm/drv.c:199:10: fatal error: drm/drm_x.h: No such file
compilation terminated.
make[3]: *** [scripts/Makefile.build:250: nvidia-drm-drv.o] Error 1
"""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    found = Host(tmp_path)
    found.kernel(OLD, running=True)
    found.kernel(NEW)
    return found


@settings(deadline=None)  # a machine under load is slow, not wrong
@given(st.lists(st.integers(0, 500), min_size=2, max_size=2, unique=True))
def test_releases_are_ordered_by_number(numbers: list[int]) -> None:
    low, high = sorted(numbers)
    releases = [f"6.1.0-{high}-amd64", f"6.1.0-{low}-amd64"]
    assert sorted(releases, key=driver_kernels.release_key) == releases[::-1]


def test_kernels_are_those_that_can_be_booted(host: Host) -> None:
    host.write("usr/src/linux-headers-6.1.0-50-amd64/Makefile", "")
    host.write("lib/modules/6.1.0-50-amd64/build", "")  # of the headers' package
    host.write("boot/vmlinuz-0-rescue-3d1219c7c4c5404aaa1f6d2a48adfda4", "")
    found = driver_kernels.kernels(host.probe, host.run)
    assert [(k["release"], k["running"], k["newest"]) for k in found] == [
        (OLD, True, False),
        (NEW, False, True),
    ]


def test_a_running_kernel_that_is_not_installed_any_more_is_still_told(host: Host) -> None:
    host.write("proc/sys/kernel/osrelease", "6.1.0-1-amd64\n")
    found = driver_kernels.kernels(host.probe, host.run)
    assert [k["release"] for k in found if k["running"]] == ["6.1.0-1-amd64"]
    assert len(found) == 3


def test_the_list_of_kernels_can_be_replaced(host: Host) -> None:
    found = driver_kernels.kernels(host.probe, host.run, ["6.12.1-1-amd64", "6.12.9-1-amd64"])
    assert [(k["release"], k["running"], k["newest"]) for k in found] == [
        ("6.12.1-1-amd64", True, False),
        ("6.12.9-1-amd64", False, True),
    ]


@pytest.mark.parametrize(
    "path",
    [
        f"usr/src/linux-headers-{NEW}/Makefile",
        f"usr/src/kernels/{NEW}/Makefile",
        f"lib/modules/{NEW}/build/Makefile",
    ],
)
def test_headers_of_each_family(tmp_path: Path, path: str) -> None:
    host = Host(tmp_path)
    assert not driver_kernels.has_headers(host.probe, NEW)
    host.write(path, "all:\n")
    assert driver_kernels.has_headers(host.probe, NEW)


def test_a_link_to_headers_that_are_gone_is_no_headers(tmp_path: Path) -> None:
    host = Host(tmp_path)
    (tmp_path / f"lib/modules/{NEW}").mkdir(parents=True)
    (tmp_path / f"lib/modules/{NEW}/build").symlink_to(f"/usr/src/linux-headers-{NEW}")
    assert not driver_kernels.has_headers(host.probe, NEW)


def states(host: Host) -> list[str | None]:
    return [kernel["dkms"] for kernel in driver_kernels.kernels(host.probe, host.run)]


def test_without_dkms_there_is_no_state(host: Host) -> None:
    host.write(f"var/lib/dkms/nvidia-fs/2.17/{OLD}/x86_64/module/nvidia-fs.ko", "")
    assert states(host) == [None, None]


@pytest.mark.parametrize(
    ("module", "ending"),
    [("nvidia-current", ".ko"), ("nvidia", ".ko.zst"), ("nvidia-current-open", ".ko.xz")],
)
def test_dkms_installed_for_one_kernel_and_missing_for_the_newer(
    host: Host, module: str, ending: str
) -> None:
    host.dkms("580.95.05", OLD, module=module, ending=ending)
    old, new = driver_kernels.kernels(host.probe, host.run)
    assert (old["dkms"], new["dkms"]) == ("installed", "missing")
    # Without modinfo the version is DKMS's.
    assert (old["module_version"], new["module_version"]) == ("580.95.05", None)


def test_dkms_built_and_not_installed(host: Host) -> None:
    host.dkms("580.95.05", OLD)
    host.dkms("580.95.05", NEW, installed=False)
    assert states(host) == ["installed", "built"]


@pytest.mark.parametrize(
    "head",
    [
        "DKMS make.log for nvidia-current-535.261.03 for kernel",  # dkms 3.0.10, Debian 12
        "DKMS (dkms-3.2.2) make.log for nvidia-current/535.261.03 for kernel",  # Debian 13
    ],
)
def test_a_failed_build_gives_the_logs_error_line(host: Host, head: str) -> None:
    host.dkms("535.261.03", OLD)
    log = LOG.format(release=NEW).replace("DKMS make.log for nvidia-current-535.261.03 for kernel", head)
    assert head in log
    host.write("var/lib/dkms/nvidia-current/535.261.03/build/make.log", log)
    old, new = driver_kernels.kernels(host.probe, host.run)
    assert (old["dkms"], new["dkms"]) == ("installed", "failed")
    assert new["dkms_error"].endswith("fatal error: drm/drm_x.h: No such file")
    assert old["dkms_error"] is None


def test_a_log_of_another_kernel_is_none_of_this_one(host: Host) -> None:
    host.dkms("535.261.03", OLD)
    host.write("var/lib/dkms/nvidia-current/535.261.03/build/make.log", LOG.format(release="5.10.0-1-amd64"))
    assert states(host) == ["installed", "missing"]


def test_a_build_that_still_runs_has_not_failed(host: Host) -> None:
    """Seen in a real one (dkms 3.0.10, nvidia-current 535.309.01): compiler options name errors, and are none."""
    host.write(
        "var/lib/dkms/nvidia-current/535.309.01/build/make.log",
        f"DKMS make.log for nvidia-current-535.309.01 for kernel {NEW} (x86_64)\nmake \\\n"
        "NV_CONFTEST_CFLAGS=-Wall -Werror=undef -Werror=strict-prototypes\n  CC [M]  nvidia/nv-frontend.o\n",
    )
    assert states(host) == ["missing", "missing"]


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("x\nmake: *** [Makefile:10: modules] Error 2\n", "make: *** [Makefile:10: modules] Error 2"),
        ("make: *** waiting\na.c:1: error: no\nb.c:2: error: two\n", "a.c:1: error: no"),
    ],
)
def test_the_first_line_that_tells_why(host: Host, log: str, line: str) -> None:
    host.write("var/lib/dkms/nvidia/580.95.05/build/make.log", log)
    assert line in (
        driver_kernels.build_error(host.probe, "/var/lib/dkms/nvidia/580.95.05/build/make.log", NEW) or ""
    )


@pytest.mark.parametrize(
    "path",
    [
        f"lib/modules/{OLD}/updates/dkms/nvidia-current.ko",
        f"lib/modules/{OLD}/extra/nvidia.ko.xz",
        f"lib/modules/{OLD}/extra/nvidia/nvidia.ko",
        f"lib/modules/{OLD}/weak-updates/nvidia/nvidia.ko",
        f"lib/modules/{OLD}/kernel/nvidia-580srv-open/nvidia.ko.zst",
        f"lib/modules/{OLD}/kernel/drivers/video/nvidia.ko",
    ],
)
def test_the_modules_file_wherever_each_packager_puts_it(host: Host, path: str) -> None:
    host.write(path, "ELF")
    host.write(f"lib/modules/{NEW}/kernel/drivers/net/nvidia-eth.ko", "ELF")
    host.tools["modinfo"] = modinfo({OLD: "580.95.05"})
    old, new = driver_kernels.kernels(host.probe, host.run)
    assert (old["module_version"], old["module_flavour"], old["dkms"]) == ("580.95.05", "open", None)
    assert new["module_version"] is None


def test_the_flavour_by_the_modules_licence() -> None:
    assert driver_kernels.flavour_of_license("Dual MIT/GPL") == "open"
    assert driver_kernels.flavour_of_license("NVIDIA") == "proprietary"
    assert driver_kernels.flavour_of_license(None) is None


# ---- nouveau ----


def nouveau(host: Host, *, look: bool = True) -> dict[str, bool | None]:
    found = driver_kernels.kernels(host.probe, host.run)
    return driver_kernels.nouveau(host.probe, host.run, found, look=look)


@pytest.mark.parametrize(
    ("path", "text", "blacklisted"),
    [
        ("etc/modprobe.d/fleetfit-nvidia.conf", "blacklist nouveau\noptions nouveau modeset=0\n", True),
        ("usr/lib/modprobe.d/nvidia.conf", "install nouveau /bin/false\n", True),
        ("proc/cmdline", "quiet modprobe.blacklist=floppy,nouveau\n", True),
        ("proc/cmdline", "quiet rd.driver.blacklist=nouveau\n", True),
        ("etc/modprobe.d/a.conf", "# blacklist nouveau\nblacklist nouveau_other\n", False),
        ("etc/modprobe.d/a.conf.dpkg-old", "blacklist nouveau\n", False),
    ],
)
def test_what_keeps_nouveau_away(host: Host, path: str, text: str, blacklisted: bool) -> None:
    host.write(path, text)
    assert nouveau(host)["blacklisted"] is blacklisted


def test_an_initramfs_without_the_blacklist_loads_nouveau(host: Host) -> None:
    image = host.write(f"boot/initrd.img-{NEW}", "cpio")
    inside = f"usr/lib/modules/{NEW}/kernel/drivers/gpu/drm/nouveau/nouveau.ko\n"
    host.tools["lsinitramfs"] = (0, inside)
    blacklist = host.write("etc/modprobe.d/fleetfit-nvidia.conf", "blacklist nouveau\n")
    set_age(blacklist, 60)
    assert nouveau(host)["in_initramfs"] is True
    host.tools["lsinitramfs"] = (0, inside + "etc/modprobe.d/fleetfit-nvidia.conf\n")
    assert nouveau(host)["in_initramfs"] is False
    # The file in the image is of another time: what it says is not known to be today's.
    set_age(image, 120)
    assert nouveau(host)["in_initramfs"] is True
    host.tools["lsinitramfs"] = (0, "usr/bin/busybox\n")
    assert nouveau(host)["in_initramfs"] is False


def test_an_initramfs_that_nobody_can_list_is_unknown(host: Host) -> None:
    assert nouveau(host)["in_initramfs"] is None
    host.write(f"boot/initramfs-{NEW}.img", "cpio")
    assert nouveau(host)["in_initramfs"] is None
    host.tools["lsinitrd"] = (0, "-rw-r--r-- 1 root root 9 usr/lib/modules/x/nouveau.ko.xz\n")
    assert nouveau(host)["in_initramfs"] is True
    assert nouveau(host, look=False)["in_initramfs"] is None


def test_a_blacklist_on_the_command_line_holds_for_the_initramfs_too(host: Host) -> None:
    host.write(f"boot/initrd.img-{NEW}", "cpio")
    host.tools["lsinitramfs"] = (0, "usr/lib/modules/x/nouveau.ko\n")
    host.write("proc/cmdline", "modprobe.blacklist=nouveau\n")
    assert nouveau(host) == {"loaded": False, "blacklisted": True, "in_initramfs": None}
