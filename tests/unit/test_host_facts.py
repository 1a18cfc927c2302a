"""Facts about a host's system, from files as the kernel and the distributions write them."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import host_facts
from ansible_collections.fleetfit.llm.plugins.module_utils.gpu_facts import GpuFacts
from ansible_collections.fleetfit.llm.plugins.module_utils.probe_root import ProbeRoot
from hypothesis import given
from hypothesis import strategies as st

GIB = 1024**3


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ('ID=debian\nVERSION_ID="12"\nVERSION_CODENAME=bookworm\n', ("debian", "12", "bookworm")),
        ('NAME="Rocky Linux"\nID="rocky"\nVERSION_ID="9.6"\n', ("rocky", "9.6", None)),
        ("", (None, None, None)),
    ],
)
def test_os_release(tmp_path: Path, release: str, expected: tuple[str | None, ...]) -> None:
    write(tmp_path, "etc/os-release", release)
    facts = host_facts.os_facts(ProbeRoot(str(tmp_path)))
    assert (facts["distribution"], facts["version"], facts["codename"]) == expected
    assert facts["glibc"] == os.confstr("CS_GNU_LIBC_VERSION").split()[1]  # type: ignore[union-attr]


X86 = """processor\t: 0
model name\t: AMD EPYC 7B13   64-Core Processor
flags\t\t: fpu sse4_2 avx avx2 f16c fma bmi2 vaes

processor\t: 1
model name\t: AMD EPYC 7B13   64-Core Processor
flags\t\t: fpu sse4_2 avx avx2 f16c fma bmi2 vaes
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp sve i8mm bf16\nCPU part\t: 0xd4f\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            X86,
            {
                "model": "AMD EPYC 7B13 64-Core Processor",
                "threads": 2,
                "isa": ["avx", "avx2", "bmi2", "f16c", "fma", "sse4_2"],
            },
        ),
        (ARM, {"model": None, "threads": 1, "isa": ["asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve"]}),
    ],
)
def test_cpu(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    write(tmp_path, "proc/cpuinfo", text)
    assert host_facts.cpu_facts(ProbeRoot(str(tmp_path))) == expected


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"sys/fs/cgroup/memory.max": "max\n"}, None),
        ({"sys/fs/cgroup/memory.max": f"{4 * GIB}\n"}, 4 * GIB),
        (
            {
                "sys/fs/cgroup/memory.max": f"{4 * GIB}",
                "sys/fs/cgroup/system.slice/memory.max": f"{3 * GIB}",
            },
            3 * GIB,
        ),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n"}, 2 * GIB),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{16 * GIB}\n"}, None),
    ],
)
def test_cgroup_limit_of_both_versions(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    for name, text in files.items():
        write(tmp_path, name, text)
    assert host_facts.cgroup_limit_bytes(ProbeRoot(str(tmp_path)), 8 * GIB) == limit


def test_disk_free_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = host_facts.disk_free_bytes(ProbeRoot(str(tmp_path)), "/var/lib/fleetfit")
    assert free is not None
    assert abs(free - status.f_bavail * status.f_frsize) < GIB


def test_held_bytes_count_what_is_stored_and_follow_no_link(tmp_path: Path) -> None:
    models = tmp_path / "var/lib/fleetfit/models/m/Q4"
    models.mkdir(parents=True)
    (models / "a.gguf").write_bytes(b"x" * (1 << 20))
    with open(models / "hole", "wb") as file:
        file.truncate(1 << 30)
    (models / "outside").symlink_to("/usr")
    held = host_facts.held_bytes(ProbeRoot(str(tmp_path)), "/var/lib/fleetfit")
    assert 1 << 20 <= held < 2 << 20
    assert host_facts.held_bytes(ProbeRoot(str(tmp_path)), "/nowhere") == 0


@pytest.mark.parametrize(
    ("reference", "now", "offset", "says"),
    [
        (None, 1e9, None, None),
        (1e9, 1e9 + 1.26, 1.3, None),
        (1e9, 1e9 + 60, 60.0, None),
        (1e9, 1e9 + 61, 61.0, "61 s ahead of"),
        (1e9, 1e9 - 7200, -7200.0, "7200 s behind"),
    ],
)
def test_clock(
    tmp_path: Path, reference: float | None, now: float, offset: float | None, says: str | None
) -> None:
    facts = host_facts.host_facts(str(tmp_path), GpuFacts(), reference_time_s=reference, now_s=now)
    assert facts["live"]["clock_offset_s"] == offset
    if says is None:
        assert facts["problems"] == []
    else:
        (problem,) = facts["problems"]
        assert problem["code"] == "clock_offset"
        assert says in problem["message"]
        assert "timedatectl set-ntp true" in problem["remedy"]


@pytest.mark.parametrize(
    ("offset", "elapsed", "settled", "problem"),
    [
        (1.5, 2.0, 0.0, False),
        (90.0, 95.0, 0.0, False),  # a slow link, not a wrong clock
        (90.0, 2.0, 88.0, True),
        (61.0, 2.0, 59.0, False),
        (-61.0, 2.0, -61.0, True),
        (None, 2.0, None, False),
    ],
)
def test_the_questions_way_is_no_offset(
    tmp_path: Path, offset: float | None, elapsed: float, settled: float | None, problem: bool
) -> None:
    reference = None if offset is None else 1e9
    facts = host_facts.host_facts(
        str(tmp_path), GpuFacts(), reference_time_s=reference, now_s=1e9 + (offset or 0)
    )
    facts["problems"].append({"code": "other"})
    host_facts.settle_clock(facts, elapsed)
    assert facts["live"]["clock_offset_s"] == settled
    assert ("clock_offset" in [p["code"] for p in facts["problems"]]) == problem
    assert "other" in [p["code"] for p in facts["problems"]]


def test_digest_has_what_is_stable_only(tmp_path: Path) -> None:
    facts = host_facts.host_facts(str(tmp_path), GpuFacts())
    digest = host_facts.facts_digest(facts)
    moved = copy.deepcopy(facts)
    moved["live"]["memory_available_bytes"] = 1
    moved["foreign_bytes"]["GPU-1"] = 1
    moved["problems"].append({"code": "x"})
    assert host_facts.facts_digest(moved) == digest
    moved["stable"]["ram_total_bytes"] = 1
    assert host_facts.facts_digest(moved) != digest
    reordered = {**facts, "stable": dict(reversed(facts["stable"].items()))}
    assert host_facts.facts_digest(reordered) == digest


@given(st.text(max_size=200))
def test_garbage_in_proc_is_no_traceback(text: str) -> None:
    class Garbage(ProbeRoot):
        def read(self, absolute: str, limit_bytes: int = 1 << 20) -> str | None:
            return text

    probe = Garbage("/nonexistent")
    host_facts.os_facts(probe)
    assert host_facts.cpu_facts(probe)["threads"] >= 1
    host_facts.cgroup_limit_bytes(probe, None)
    host_facts.meminfo_bytes(probe, "MemTotal")
