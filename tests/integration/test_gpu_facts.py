"""Facts about GPUs, from the simulated driver up to what the Ansible modules return."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import gpu_facts
from ansible_collections.fleetfit.llm.plugins.module_utils.host_facts import facts_digest, host_facts
from ansible_collections.fleetfit.llm.plugins.module_utils.host_view import (
    BLOCKING_PROBLEMS,
    view_of_facts,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import policy_from_variables
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_catalog

CHECKOUT = Path(__file__).resolve().parents[2]
LAB = CHECKOUT / "lab/nvml"
MIB = 1024 * 1024
CARD = "GPU-4090f1ee-0000-4000-8000-000000000001"
SECOND_CARD = "GPU-4090f1ee-0000-4000-8000-000000000002"
PROBLEM_KEYS = {"code", "message", "remedy", "device"}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the simulated driver library with the script that the lab uses."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is needed to build the simulated library")
    out = tmp_path_factory.mktemp("nvml")
    subprocess.run([str(LAB / "build"), str(out)], check=True)
    return out / "libnvidia-ml.so.1"


class SimulatedHost:
    """A probe root with the profile's cards, and what a running engine leaves in /proc."""

    def __init__(self, library: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.library = library
        self.root = root
        self.monkeypatch = monkeypatch

    def use(self, profile: str | Path, *options: str) -> None:
        """Put the profile's cards into the host."""
        path = profile if isinstance(profile, Path) else LAB / f"profiles/{profile}.ini"
        subprocess.run([str(LAB / "make_probe_root"), str(path), str(self.root), *options], check=True)
        for name in ("proc", "etc", "opt", "dev", "var"):
            (self.root / name).unlink()
            (self.root / name).mkdir()
        (self.root / "proc/meminfo").write_text("MemTotal: 32000000 kB\nMemAvailable: 20000000 kB\n")
        self.monkeypatch.setenv("FLEETFIT_LAB_NVML_PROFILE", str(path))
        self.monkeypatch.setenv("FLEETFIT_LAB_ROOT", str(self.root))

    def process(self, pid: int, cgroup: str, name: str = "engine") -> None:
        """Add a process."""
        folder = self.root / f"proc/{pid}"
        folder.mkdir(parents=True)
        (folder / "cgroup").write_text(f"0::{cgroup}\n")
        (folder / "cmdline").write_text(f"{name}\0")
        (folder / "comm").write_text(f"{name}\n")

    def engine(self, plan: dict[str, int], *, pid: int = 4242) -> None:
        """Run llama-server as our unit with so many planned bytes for each device."""
        release = self.root / "opt/fleetfit/llama-server/current"
        release.mkdir(parents=True)
        devices = [{"id": uuid, "weights": size, "margin": 512 * MIB} for uuid, size in plan.items()]
        (release / "plan.json").write_text(json.dumps({"deployments": [{"devices": devices}]}))
        units = self.root / "etc/systemd/system"
        units.mkdir(parents=True)
        (units / "llama-server.service").write_text("ExecStart=/opt/fleetfit/llama-server/current/run\n")
        self.process(pid, "/system.slice/llama-server.service", "llama-server")

    def gather(self, **options: Any) -> gpu_facts.GpuFacts:
        """Ask the host."""
        options.setdefault("library_path", str(self.library))
        return gpu_facts.gather(str(self.root), **options)

    def facts(self, **options: Any) -> dict[str, Any]:
        """Return the whole document, checked against its schema."""
        document = host_facts(str(self.root), self.gather(**options))
        schema = json.loads((CHECKOUT / "catalog/schemas/facts.json").read_text())
        jsonschema.validate(document, schema)
        return document


@pytest.fixture
def host(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimulatedHost:
    return SimulatedHost(library, tmp_path / "root", monkeypatch)


@pytest.mark.parametrize(
    "profile", ["rtx-3060-12gb", "t4", "rtx-4090", "2x-rtx-4090", "a100-80gb-mig", "gb10", "lab-small"]
)
def test_a_working_host_has_no_problem_and_valid_facts(host: SimulatedHost, profile: str) -> None:
    host.use(profile)
    facts = host.facts()
    assert facts["problems"] == []
    assert facts["stable"]["driver"] == {"version": "580.95.05", "cuda_version": "13.0"}
    assert set(facts["foreign_bytes"].values()) == {0}


@pytest.mark.parametrize(
    ("profile", "code", "says"),
    [
        ("fault-library-mismatch", "driver_library_mismatch", "580.95.05"),
        ("fault-no-permission", "nvml_no_permission", "/dev/nvidia"),
        ("fault-gpu-lost", "gpu_lost", "fallen off the bus"),
        ("fault-memory-not-supported", "memory_not_supported", "RTX 4090"),
        ("fault-unknown-error", "nvml_error", "Unknown Error"),
        ("fault-hang", "probe_failed", "no answer within 1 s"),
        ("fault-crash", "probe_failed", "signal 6 (Aborted)"),
    ],
)
def test_each_fault_is_one_problem_with_a_remedy(
    host: SimulatedHost, profile: str, code: str, says: str
) -> None:
    host.use(profile)
    started = time.monotonic()
    facts = host.facts(probe_timeout_s=1)
    assert time.monotonic() - started < 10
    assert [p["code"] for p in facts["problems"]] == [code]
    (problem,) = facts["problems"]
    assert says in problem["message"]
    assert set(problem) == PROBLEM_KEYS
    assert len(problem["remedy"]) > 20
    # A card with a fault is still there: "no GPU" would be planned around silently.
    assert facts["stable"]["accelerators"]
    assert facts["stable"]["driver"]["version"] == "580.95.05"


def test_cards_that_work_and_are_not_well_are_problems_that_stop_no_plan(host: SimulatedHost) -> None:
    host.use("fault-health")
    (host.root / "dev/kmsg").write_text(
        "6,1,1,-;NVRM: Xid (PCI:0000:02:00): 31, pid=77, name=python, MMU Fault\n"
        "6,2,2,-;NVRM: Xid (PCI:0000:04:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"
    )
    facts = host.facts()
    found = {problem["device"][-1] + " " + problem["code"] for problem in facts["problems"]}
    assert found == {
        "1 row_remap_pending",
        "2 row_remap_failed",
        "3 ecc_uncorrected",
        "4 xid",
        "4 thermal_slowdown",
    }
    assert all(accelerator["memory_total_bytes"] for accelerator in facts["stable"]["accelerators"])
    assert not {problem["code"] for problem in facts["problems"]} & BLOCKING_PROBLEMS


def test_a_lost_card_never_looks_unified_and_its_neighbour_goes_on(host: SimulatedHost) -> None:
    host.use("fault-gpu-lost")
    well, lost = host.gather().accelerators
    assert (well.uuid, well.memory_total_bytes) == (CARD, 24564 * MIB)
    assert (lost.uuid, lost.name, lost.memory_kind) == (
        "pci-0000:02:00.0",
        "NVIDIA GeForce RTX 4090",
        "unknown",
    )
    assert lost.memory_total_bytes is None
    assert host.gather().problems[0].device == lost.uuid


def test_a_card_without_a_driver_is_found_on_the_bus(host: SimulatedHost) -> None:
    host.use("2x-rtx-4090", "--without-driver")
    host.monkeypatch.setenv("FLEETFIT_LAB_NVML_PROFILE", str(host.root / "no-driver-no-profile"))
    facts = host.facts()
    assert facts["stable"]["driver"] is None
    assert [a["uuid"] for a in facts["stable"]["accelerators"]] == ["pci-0000:01:00.0", "pci-0000:02:00.0"]
    assert {p["code"] for p in facts["problems"]} == {"driver_missing"}


def test_a_host_without_cards_and_driver_has_no_problem(host: SimulatedHost, tmp_path: Path) -> None:
    profile = tmp_path / "none.ini"
    profile.write_text("# No GPU at all.\n")
    host.use(profile, "--without-driver")
    facts = host.facts(library_path=None)
    assert (facts["problems"], facts["stable"]["accelerators"], facts["stable"]["driver"]) == ([], [], None)


def test_a_loaded_driver_without_its_library_is_a_problem(host: SimulatedHost) -> None:
    host.use("rtx-4090")
    facts = host.facts(library_path=None)
    assert [p["code"] for p in facts["problems"]] == ["nvml_not_found"]
    assert "580.95.05" in facts["problems"][0]["message"]


def test_a_named_library_that_is_none_is_a_problem(host: SimulatedHost, tmp_path: Path) -> None:
    host.use("rtx-4090")
    broken = tmp_path / "libnvidia-ml.so.1"
    broken.write_text("not a library")
    facts = host.facts(library_path=str(broken))
    assert [p["code"] for p in facts["problems"]] == ["nvml_not_found"]
    assert "library_path" in facts["problems"][0]["remedy"]


def test_a_broken_profile_is_a_problem_that_names_the_line(host: SimulatedHost, tmp_path: Path) -> None:
    host.use("rtx-4090")
    profile = tmp_path / "broken.ini"
    profile.write_text("[gpu]\ncolour = red\n")
    host.monkeypatch.setenv("FLEETFIT_LAB_NVML_PROFILE", str(profile))
    (problem,) = host.gather().problems
    assert problem.code == "nvml_error"
    assert "line 2 of the simulated GPU profile" in problem.message


def test_mig_instances_are_accelerators_and_their_card_is_not_planned_on(host: SimulatedHost) -> None:
    host.use("a100-80gb-mig")
    card, *instances = host.gather().accelerators
    assert card.mig_enabled
    assert [i.mig_profile for i in instances] == ["3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb"]
    assert {i.mig_parent for i in instances} == {card.uuid}
    assert {(i.mig_enabled, i.compute_capability) for i in instances} == {(False, "8.0")}


def test_a_unified_device_has_the_machines_memory(host: SimulatedHost) -> None:
    host.use("gb10")
    facts = host.gather()
    (device,) = facts.accelerators
    assert (device.memory_kind, device.memory_total_bytes) == ("unified", 32000000 * 1024)
    assert facts.live_devices[device.uuid]["free_bytes"] == 20000000 * 1024


def test_foreign_memory_is_rounded_up_to_256_mib_and_named(host: SimulatedHost) -> None:
    host.use("foreign-process")
    host.process(1, "/init.scope", "systemd")
    facts = host.gather()
    assert facts.foreign_bytes == {CARD: 3072 * MIB}
    assert facts.live_devices[CARD]["processes"] == [
        {"pid": 1, "name": "systemd", "used_bytes": 3000 * MIB, "owner": "other"}
    ]


def test_memory_of_nobody_listed_is_foreign(host: SimulatedHost) -> None:
    host.use("foreign-hidden")
    # 1700 MiB less the driver's own 256, in steps of 256.
    assert host.gather().foreign_bytes == {CARD: 1536 * MIB}


@pytest.mark.parametrize(("profile", "foreign_mib"), [("rtx-4090", 0), ("foreign-hidden", 1792)])
def test_a_driver_that_does_not_tell_what_it_reserves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, foreign_mib: int
) -> None:
    """Version 1 of the call counts the reserved memory as used: it is no other program's, and nor is it usable."""
    subprocess.run([str(LAB / "build"), str(tmp_path), "-DNVML_MEMORY_V1_ONLY"], check=True)
    old = SimulatedHost(tmp_path / "libnvidia-ml.so.1", tmp_path / "root", monkeypatch)
    old.use(profile)
    facts = old.facts()
    (card,) = facts["stable"]["accelerators"]
    assert card["memory_total_bytes"] == 24564 * MIB
    assert card["memory_reserved_bytes"] is None
    # 1700 hidden and 484 reserved less 512 and 0.5 % that may be the driver's: 1549, in steps of 256.
    assert facts["foreign_bytes"] == {card["uuid"]: foreign_mib * MIB}
    policy = policy_from_variables({"fleetfit_model": "any"})
    (device,) = view_of_facts(facts, policy, load_catalog().gpus).devices
    assert device.reserved_bytes == 484 * MIB  # the catalog's
    assert device.budget == (24564 - 484 - foreign_mib) * MIB


def test_wsl_has_the_library_where_the_loader_does_not_look(
    host: SimulatedHost, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows puts it under /usr/lib/wsl/lib, holds memory there, and no process of it is listed."""
    monkeypatch.setattr(
        "ansible_collections.fleetfit.llm.plugins.module_utils.nvml._SONAME", "libabsent.so.1"
    )
    monkeypatch.setattr(
        "ansible_collections.fleetfit.llm.plugins.module_utils.nvml._WSL_LIBRARY", str(library)
    )
    host.use("foreign-hidden")
    facts = host.gather(library_path=None)
    assert [problem.code for problem in facts.problems] == []
    assert facts.foreign_bytes == {CARD: 1536 * MIB}


def test_planning_sees_the_same_beside_the_running_engine(host: SimulatedHost) -> None:
    host.use("2x-rtx-4090")
    before = host.facts()
    host.engine({SECOND_CARD: 9000 * MIB})
    after = host.facts()
    live = after["live"]["devices"][SECOND_CARD]
    assert live["used_bytes"] == 9000 * MIB
    assert live["processes"][0]["owner"] == "fleetfit"
    for key in ("stable", "foreign_bytes"):
        assert json.dumps(before[key]) == json.dumps(after[key])
    assert facts_digest(before) == facts_digest(after)


def test_an_engine_on_a_mig_instance_is_charged_there(host: SimulatedHost) -> None:
    host.use("a100-80gb-mig")
    card, first, second, *_ = (a.uuid for a in host.gather().accelerators)
    host.engine({first: 30000 * MIB})
    facts = host.gather()
    used = {uuid: device["used_bytes"] // MIB for uuid, device in facts.live_devices.items()}
    assert (used[card], used[first], used[second]) == (30000, 30000, 0)
    # The card lists no process of its own; that its memory is our engine's must not make it foreign.
    assert set(facts.foreign_bytes.values()) == {0}


def test_somebody_elses_unit_of_the_same_name_is_foreign(host: SimulatedHost) -> None:
    host.use("rtx-4090")
    host.engine({CARD: 1000 * MIB})
    (host.root / "etc/systemd/system/llama-server.service").write_text("ExecStart=/srv/mine/llama-server\n")
    assert host.gather().foreign_bytes == {CARD: 1024 * MIB}


def test_facts_stay_small(host: SimulatedHost, tmp_path: Path) -> None:
    """The limits of docs/contracts.md §1, for a host full of cards and of other people's processes."""
    text = "[driver]\nversion = 580.95.05\ncuda_version = 13.0\n"
    for number in range(8):
        text += (
            f"[gpu]\nname = NVIDIA GeForce RTX 4090\n"
            f"pci_bus_id = 00000000:{number + 1:02X}:00.0\n"
            f"uuid = GPU-4090f1ee-0000-4000-8000-{number:012d}\npci_device_id = 10de:2684\n"
            "compute_capability = 8.9\nmemory_total_mib = 97887\nmemory_reserved_mib = 638\n"
        )
        for pid in range(100, 110):
            text += f"[process]\npid = {pid}\nused_mib = {pid * 50}\n"
    profile = tmp_path / "eight.ini"
    profile.write_text(text)
    host.use(profile)
    for pid in range(100, 110):  # the names that the kernel keeps have 15 letters at most
        host.process(pid, "/user.slice/user-1000.slice/session-1.scope", "fifteen-letters")
    (host.root / "etc/machine-id").write_text("3d1219c7c4c5404aaa1f6d2a48adfda4\n")
    (host.root / "etc/os-release").write_text(
        'ID="almalinux"\nVERSION_ID="10.1"\nVERSION_CODENAME="Heliotrope Lion"\n'
    )
    flags = " ".join(["avx avx2 avx512_bf16 avx512_fp16 avx512_vnni avx512bw avx512f avx_vnni amx_bf16"] * 2)
    (host.root / "proc/cpuinfo").write_text(
        f"processor : 0\nmodel name : {'Intel(R) Xeon(R) Platinum 8592+ ' * 4}\n"
        f"flags : {flags} amx_int8 f16c fma\n"
    )
    facts = host.facts()
    planning = compact({"stable": facts["stable"], "foreign_bytes": facts["foreign_bytes"]})
    assert len(facts["stable"]["accelerators"]) == 8
    assert len(planning) <= 1024 + 8 * 350, len(planning)
    live = facts["live"]
    assert {d["process_count"] for d in live["devices"].values()} == {10}
    assert {len(d["processes"]) for d in live["devices"].values()} == {8}
    assert live["devices"][f"GPU-4090f1ee-0000-4000-8000-{0:012d}"]["processes"][0]["pid"] == 109
    assert len(compact(live)) <= 350 + 8 * 180 + 64 * 90, len(compact(live))


def test_facts_of_a_mig_host_stay_small(host: SimulatedHost) -> None:
    host.use("a100-80gb-mig")
    facts = host.facts()
    planning = compact({"stable": facts["stable"], "foreign_bytes": facts["foreign_bytes"]})
    assert len(planning) <= 1024 + 350 + 4 * 300, len(planning)


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def old_python() -> str:
    """Return a Python of the oldest version that hosts may have, or skip."""
    candidates = [
        shutil.which("python3.9"),
        *map(
            str,
            Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.9.*/bin/python3.9"),
        ),
    ]
    for candidate in candidates:
        if candidate and subprocess.run([candidate, "-c", ""], check=False).returncode == 0:
            return candidate
    pytest.skip("no Python 3.9 on this machine")


def ansible(
    module: str, *, python: str, variables: dict[str, str] | None = None, **arguments: Any
) -> dict[str, Any]:
    """Run a module of ours as Ansible does, on this machine, and return its result."""
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible")),
            *("-i", "localhost,", "-c", "local", "localhost"),
            *("-e", json.dumps({"ansible_python_interpreter": python, **(variables or {})})),
            *("-m", f"fleetfit.llm.{module}", "-a", json.dumps(arguments)),
        ],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # "localhost | SUCCESS => {…}"
    start = done.stdout.find("{")
    assert start >= 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout[start:])
    return result


def test_host_state_through_ansible_on_the_oldest_python(host: SimulatedHost) -> None:
    host.use("2x-rtx-4090")
    host.engine({CARD: 2000 * MIB})
    result = ansible("host_state", python=old_python(), root=str(host.root), library_path=str(host.library))
    assert result["changed"] is False
    facts = result["ansible_facts"]["fleetfit"]
    jsonschema.validate(facts, json.loads((CHECKOUT / "catalog/schemas/facts.json").read_text()))
    assert facts["problems"] == []
    assert facts["stable"]["os"]["python"].startswith("3.9.")
    assert facts["live"]["devices"][CARD]["used_bytes"] == 2000 * MIB
    assert facts["live"]["clock_offset_s"] == 0
    assert result["manifest"] is None
    assert result["helper_digest"] is None
    assert set(result["services"]) == {"llama-server", "vllm", "open-webui"}
    assert result["services"]["llama-server"]["unit_file"] is True
    # Neither the client's 70 KB nor its name come back.
    assert len(json.dumps(result)) < 8000
    assert "pynvml_archive" not in json.dumps(result)


def test_gpu_facts_through_ansible_with_a_broken_driver(host: SimulatedHost) -> None:
    host.use("fault-library-mismatch")
    result = ansible("gpu_facts", python=sys.executable, root=str(host.root), library_path=str(host.library))
    assert not result.get("failed")
    assert [p["code"] for p in result["problems"]] == ["driver_library_mismatch"]
    assert [a["uuid"] for a in result["accelerators"]] == ["pci-0000:01:00.0"]


def test_an_inventory_names_the_probe_root_once(host: SimulatedHost) -> None:
    host.use("t4")
    result = ansible(
        "gpu_facts",
        python=sys.executable,
        variables={"fleetfit_probe_root": "{{ lab }}/root", "lab": str(host.root.parent)},
        library_path=str(host.library),
    )
    assert [a["pci_device_id"] for a in result["accelerators"]] == ["10de:1eb8"]
    assert result["problems"] == []


def test_a_driver_that_hangs_does_not_hang_ansible(host: SimulatedHost) -> None:
    host.use("fault-hang")
    started = time.monotonic()
    result = ansible(
        "gpu_facts",
        python=sys.executable,
        root=str(host.root),
        library_path=str(host.library),
        probe_timeout_s=1,
    )
    assert [p["code"] for p in result["problems"]] == ["probe_failed"]
    assert time.monotonic() - started < 30


def test_the_pinned_client_is_the_one_that_hosts_get(host: SimulatedHost) -> None:
    """The text handed over does what the installed module does, with no pynvml importable."""
    spec = importlib.util.find_spec("pynvml")
    assert spec is not None
    assert spec.origin is not None
    host.use("rtx-4090")
    source = Path(spec.origin).read_text()
    assert host.gather(pynvml_source=source).to_dict() == host.gather().to_dict()
    assert host.gather(pynvml_source="raise ImportError('no such thing')").problems[0].code == "probe_failed"
