"""Facts from a real NVIDIA driver; runs only where there is one (last run: H100, driver 580.159.04)."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import gpu_facts

MIB = 1024 * 1024
HELD_MIB = 1000
# Holds memory on the first card through the driver's own interface, and tells what CUDA says the card has.
HOLD = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
device, context, pointer = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
free, total = ctypes.c_size_t(), ctypes.c_size_t()
assert cuda.cuInit(0) == 0
assert cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
assert cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device) == 0
assert cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(int(sys.argv[1]))) == 0
assert cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
print(total.value, flush=True)
sys.stdin.read()
"""


def has_driver() -> bool:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return os.path.exists("/dev/nvidiactl")


pytestmark = pytest.mark.skipif(not has_driver(), reason="no NVIDIA driver on this machine")


@pytest.fixture
def holder() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Yield a process that holds memory on the first card, and CUDA's total bytes."""
    # CUDA's order is by speed unless told otherwise; NVML's is by bus.
    environment = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(HELD_MIB * MIB)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


def first_card(facts: gpu_facts.GpuFacts) -> gpu_facts.Accelerator:
    return next(card for card in facts.accelerators if card.index == 0 and card.mig_parent is None)


def test_facts_have_no_problem_and_are_stable() -> None:
    facts = gpu_facts.gather()
    assert facts.problems == []
    assert facts.driver is not None
    assert facts.driver["version"] == Path("/sys/module/nvidia/version").read_text().strip()
    again = gpu_facts.gather()
    assert json.dumps(facts.to_dict()["accelerators"]) == json.dumps(again.to_dict()["accelerators"])


def test_a_foreign_process_is_seen_and_the_budget_is_cudas(holder: tuple[subprocess.Popen[str], int]) -> None:
    process, cuda_total_bytes = holder
    facts = gpu_facts.gather()
    card = first_card(facts)
    assert card.memory_total_bytes is not None
    assert card.memory_reserved_bytes is not None
    if card.memory_kind == "dedicated":
        # What a plan may use is what CUDA can give (docs: total less reserved).
        assert card.memory_total_bytes - card.memory_reserved_bytes == cuda_total_bytes
    held = [p for p in facts.live_devices[card.uuid]["processes"] if p["pid"] == process.pid]
    assert held, "the driver lists the process"
    assert held[0]["owner"] == "other"
    # The allocation and CUDA's context (518 MiB on an H100).
    assert HELD_MIB * MIB < held[0]["used_bytes"] < (HELD_MIB + 1024) * MIB
    assert facts.foreign_bytes[card.uuid] >= held[0]["used_bytes"]


def test_an_idle_card_has_nothing_foreign() -> None:
    facts = gpu_facts.gather()
    card = first_card(facts)
    if facts.live_devices[card.uuid]["process_count"]:
        pytest.skip("somebody uses the card")
    assert facts.foreign_bytes[card.uuid] == 0
