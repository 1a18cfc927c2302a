"""Facts about cards from data: what becomes an accelerator, foreign memory, a problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import gpu_facts
from ansible_collections.fleetfit.llm.plugins.module_utils.pci_ids import card_name
from ansible_collections.fleetfit.llm.plugins.module_utils.probe_root import ProbeRoot
from hypothesis import given
from hypothesis import strategies as st

MIB = 1024 * 1024
STEP = 256 * MIB


def process(used_mib: int | None, owner: str = "other") -> dict[str, Any]:
    return {"pid": 5, "used_bytes": None if used_mib is None else used_mib * MIB, "owner": owner}


@pytest.mark.parametrize(
    ("used_mib", "processes", "engine_runs", "steps"),
    [
        (0, [], False, 0),
        # A real H100 (580.159.04) idles at 0 and holds 9 MiB beside a process: no step for the driver's own.
        (9, [], False, 0),
        (256, [], False, 0),
        (257, [], False, 1),
        (1700, [], False, 6),
        (1700, [], True, 0),  # the driver lists nobody, our engine runs: it may all be ours
        (1, [process(1)], False, 1),
        (256, [process(256)], False, 1),
        (257, [process(257)], False, 2),
        (9000, [process(9000, "fleetfit")], True, 0),
        (9100, [process(9000, "fleetfit"), process(100)], True, 1),
        (
            9900,
            [process(9000, "fleetfit")],
            True,
            3,
        ),  # somebody whom the driver does not list, beside our engine
        (9000, [process(None, "fleetfit")], True, 0),
        (9300, [process(None, "fleetfit"), process(300)], True, 2),
        (3000, [process(None)], False, 11),
    ],
)
def test_foreign_memory(
    used_mib: int, processes: list[dict[str, Any]], engine_runs: bool, steps: int
) -> None:
    found = gpu_facts.foreign_bytes(used_mib * MIB, processes, engine_runs=lambda: engine_runs)
    assert found == steps * STEP


@given(st.integers(0, 80_000), st.integers(0, 40_000), st.integers(0, 200))
def test_our_own_engine_never_counts_as_foreign(ours_mib: int, others_mib: int, driver_mib: int) -> None:
    others = [process(others_mib)] if others_mib else []
    without = gpu_facts.foreign_bytes((others_mib + driver_mib) * MIB, others, engine_runs=lambda: False)
    beside = gpu_facts.foreign_bytes(
        (ours_mib + others_mib + driver_mib) * MIB,
        [*others, process(ours_mib, "fleetfit")],
        engine_runs=lambda: True,
    )
    assert without == beside
    assert without % STEP == 0
    assert others_mib * MIB <= without < others_mib * MIB + STEP


NOT_SUPPORTED = {"code": 3, "text": "Not Supported"}
LOST = {"code": 15, "text": "GPU is lost"}


@pytest.mark.parametrize(
    ("name", "error", "addressing", "kind"),
    [
        ("NVIDIA GeForce RTX 4090", None, None, "dedicated"),
        ("NVIDIA GH200 480GB", None, 2, "dedicated"),  # shares addresses with the CPU, has memory of its own
        ("NVIDIA GB10", NOT_SUPPORTED, None, "unified"),
        ("NVIDIA GB10", None, 2, "unified"),
        ("Orin (nvgpu)", NOT_SUPPORTED, None, "unified"),
        ("NVIDIA Thing", NOT_SUPPORTED, 2, "unified"),
        ("NVIDIA GeForce RTX 5090", NOT_SUPPORTED, 1, "unknown"),
        ("NVIDIA GeForce RTX 5090", NOT_SUPPORTED, None, "unknown"),
        ("NVIDIA GB10", LOST, 2, "unknown"),
        ("NVIDIA Thorough", NOT_SUPPORTED, None, "unknown"),
    ],
)
def test_only_recognised_devices_are_unified(
    name: str, error: dict[str, Any] | None, addressing: int | None, kind: str
) -> None:
    assert gpu_facts.memory_kind(name, error, addressing) == kind


@pytest.mark.parametrize(
    ("text", "version"),
    [
        # Read on an H100 host, driver 580.159.04.
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (build@)  \n"
            "GCC version:  gcc version 15.3.0 (GCC) \n",
            "580.159.04",
        ),
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.216.01  Tue Sep 17 16:54:04 UTC 2024\n"
            "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14) \n",
            "535.216.01",
        ),
        ("", None),
        ("nonsense", None),
    ],
)
def test_loaded_driver_version_from_proc(tmp_path: Path, text: str, version: str | None) -> None:
    write(tmp_path, "proc/driver/nvidia/version", text)
    assert gpu_facts.loaded_driver_version(ProbeRoot(str(tmp_path))) == version


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def card(root: Path, address: str, *, vendor: str, device: str, pci_class: str, driver: str | None) -> None:
    folder = f"sys/bus/pci/devices/{address}"
    write(root, f"{folder}/vendor", f"{vendor}\n")
    write(root, f"{folder}/device", f"{device}\n")
    write(root, f"{folder}/class", f"{pci_class}\n")
    if driver:
        (root / folder / "driver").symlink_to(f"../../../../bus/pci/drivers/{driver}")


def test_only_nvidia_display_functions_are_cards(tmp_path: Path) -> None:
    card(tmp_path, "0000:01:00.0", vendor="0x10de", device="0x2684", pci_class="0x030000", driver="nouveau")
    card(
        tmp_path,
        "0000:01:00.1",
        vendor="0x10de",
        device="0x22ba",
        pci_class="0x040300",
        driver="snd_hda_intel",
    )
    card(tmp_path, "0000:02:00.0", vendor="0x10de", device="0x20b5", pci_class="0x030200", driver=None)
    card(tmp_path, "0000:03:00.0", vendor="0x1002", device="0x744c", pci_class="0x030000", driver="amdgpu")
    card(tmp_path, "0000:04:00.0", vendor="0x10de", device="0x1af1", pci_class="0x068000", driver=None)
    assert gpu_facts.pci_cards(ProbeRoot(str(tmp_path))) == [
        gpu_facts.PciCard("0000:01:00.0", "10de:2684", "nouveau"),
        gpu_facts.PciCard("0000:02:00.0", "10de:20b5", None),
    ]


@pytest.mark.parametrize(
    ("driver", "says", "do"),
    [
        (None, "has no driver", "Install the NVIDIA driver"),
        ("nouveau", "driven by nouveau", "keep nouveau from loading"),
        ("vfio-pci", "set aside for virtual machines", "release it from vfio-pci"),
    ],
)
def test_a_card_without_the_nvidia_driver_says_what_to_do(
    tmp_path: Path, driver: str | None, says: str, do: str
) -> None:
    card(tmp_path, "0000:01:00.0", vendor="0x10de", device="0x2684", pci_class="0x030000", driver=driver)
    facts = gpu_facts.gather(str(tmp_path), pynvml_source="raise SystemExit")
    missing = [p for p in facts.problems if p.code == "driver_missing"]
    assert len(missing) == 1
    assert says in missing[0].message
    assert "NVIDIA GeForce RTX 4090 at 0000:01:00.0" in missing[0].message
    assert do in missing[0].remedy
    assert missing[0].device == "pci-0000:01:00.0"


def test_a_card_that_nobody_knows_keeps_its_raw_id() -> None:
    assert card_name("10de:ffff") == "10de:ffff"
    assert card_name("1002:2684") == "1002:2684"
    assert card_name("10DE:1EB8") == "NVIDIA Tesla T4"


def nvml_device(bus: str, *peers: str) -> dict[str, Any]:
    return {"error": None, "uuid": f"GPU-{bus[9:11]}", "pci_bus_id": bus, "nvlink_peers": list(peers)}


A, B, C, SWITCH = (f"00000000:{n}:00.0" for n in ("01", "02", "03", "F0"))


@pytest.mark.parametrize(
    ("devices", "links"),
    [
        ([nvml_device(A), nvml_device(B)], []),
        ([nvml_device(A, B), nvml_device(B, A)], [("GPU-01", "GPU-02")]),
        (
            [nvml_device(A, SWITCH), nvml_device(B, SWITCH), nvml_device(C, SWITCH)],
            [("GPU-01", "GPU-02"), ("GPU-02", "GPU-03")],
        ),
        ([nvml_device(A, B), {"error": LOST, "index": 1}], []),
    ],
)
def test_nvlink_links(devices: list[dict[str, Any]], links: list[tuple[str, str]]) -> None:
    assert [(link["a"], link["b"]) for link in gpu_facts.nvlink_links(devices)] == links


def test_xids_are_read_from_the_kernel_log(tmp_path: Path) -> None:
    write(
        tmp_path,
        "dev/kmsg",
        "4,1,2,-;NVRM: Xid (PCI:0000:01:00): 79, pid=1, GPU has fallen off the bus.\n"
        "4,2,3,-;NVRM: Xid (PCI:0000:01:00): 31, pid=7, name=vllm\n"
        "4,3,4,-;NVRM: Xid (PCI:0000:01:00): 79, again\n6,4,5,-;usb 1-1: new device\n",
    )
    assert gpu_facts.xid_errors(ProbeRoot(str(tmp_path))) == {"0000:01:00.0": [31, 79]}


def test_throttling_has_names_and_idling_is_none() -> None:
    assert gpu_facts.throttle_reasons(0x1 | 0x2) == []
    assert gpu_facts.throttle_reasons(0x8 | 0x40) == ["hw_slowdown", "hw_thermal_slowdown"]
    assert gpu_facts.throttle_reasons(None) == []


@given(st.integers(0, 1000), st.text(max_size=40), st.booleans())
def test_every_error_code_becomes_a_problem_with_a_remedy(code: int, text: str, memory: bool) -> None:
    problem = gpu_facts.device_problem({"code": code, "text": text}, "GPU-1", "a card", memory=memory)
    assert problem.remedy
    assert problem.message.startswith(("a card", "The NVIDIA driver"))


def accelerator() -> gpu_facts.Accelerator:
    return gpu_facts.Accelerator(
        uuid="GPU-1",
        index=0,
        name="NVIDIA A100",
        compute_capability="8.0",
        memory_total_bytes=1,
        memory_reserved_bytes=0,
        memory_kind="dedicated",
        mig_enabled=False,
        mig_profile=None,
        mig_parent=None,
        display=False,
        pci_bus_id="00000000:01:00.0",
        pci_device_id="10de:20b2",
    )


@pytest.mark.parametrize(
    ("device", "xids", "found", "says"),
    [
        ({}, [], [], ""),
        ({}, [13, 31, 43, 45], [], ""),
        ({}, [31, 79], ["xid"], "79 (fallen off the bus)"),
        ({}, [144], ["xid"], "Xid 144"),
        ({"remapped_rows": {"pending": True, "failed": False}}, [], ["row_remap_pending"], "reset"),
        ({"remapped_rows": {"pending": True, "failed": True}}, [], ["row_remap_failed"], "could not replace"),
        ({"remapped_rows": None, "ecc_uncorrected": 0, "throttle": 1}, [], [], ""),
        ({"ecc_uncorrected": 2}, [], ["ecc_uncorrected"], "2 uncorrectable"),
        ({"throttle": 0x4}, [], [], ""),
        ({"throttle": 0x60}, [], ["thermal_slowdown"], "sw_thermal_slowdown, hw_thermal_slowdown"),
    ],
)
def test_health_of_a_card(device: dict[str, Any], xids: list[int], found: list[str], says: str) -> None:
    problems = gpu_facts.health_problems(accelerator(), device, xids)
    assert [p.code for p in problems] == found
    for problem in problems:
        assert says in problem.message
        assert (problem.device, len(problem.remedy) > 20) == ("GPU-1", True)
