"""host_state on a real systemd host whose GPUs are simulated: what runs is told, and who holds the memory."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LAB = Path(__file__).resolve().parents[2] / "lab/nvml"
CARD = "GPU-4090f1ee-0000-4000-8000-000000000001"
MIB = 1024 * 1024
UNIT = "[Service]\nExecStart={command}\n"
CODE = """
import subprocess
from fleetfit_host.host_state import host_state

def run(arguments):
    done = subprocess.run(arguments, capture_output=True, text=True)
    return done.returncode, done.stdout

print(json.dumps(host_state("/opt/fleetfit-lab/root", run=run, reference_time_s=float(sys.argv[1]))))
"""


class GpuHost:
    """The shared systemd host with a simulated RTX 4090."""

    def __init__(self, host: Any) -> None:
        self.host = host

    def state(self) -> dict[str, Any]:
        """Run host_state in the host."""
        now = self.host.run("date", "+%s").strip()
        found: dict[str, Any] = self.host.python(CODE, now)
        return found

    def unit(self, name: str, command: str) -> None:
        """Install and start a service."""
        self.host.put(f"/etc/systemd/system/{name}.service", UNIT.format(command=command))
        self.host.run("systemctl", "daemon-reload")
        self.host.run("systemctl", "start", name)


@pytest.fixture
def gpu_host(systemd_host: Any, tmp_path: Path) -> Iterator[GpuHost]:
    """Give the host a card as the lab does, and take it away again."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is needed to build the simulated library")
    subprocess.run([str(LAB / "build"), str(tmp_path)], check=True)
    systemd_host.put("/opt/fleetfit-lab/lib/libnvidia-ml.so.1", (tmp_path / "libnvidia-ml.so.1").read_bytes())
    systemd_host.put("/opt/fleetfit-lab/profile.ini", (LAB / "profiles/rtx-4090.ini").read_bytes())
    systemd_host.put("/opt/fleetfit-lab/make_probe_root", (LAB / "make_probe_root").read_bytes(), "0755")
    systemd_host.put("/etc/ld.so.conf.d/00-fleetfit-lab.conf", "/opt/fleetfit-lab/lib\n")
    systemd_host.run("ldconfig")
    lab = "/opt/fleetfit-lab"
    systemd_host.run("python3", f"{lab}/make_probe_root", f"{lab}/profile.ini", f"{lab}/root")
    yield GpuHost(systemd_host)
    systemd_host.run(
        "sh",
        "-c",
        "systemctl stop llama-server vllm; cd /etc/systemd/system; rm -f llama-server.service vllm.service; "
        "systemctl daemon-reload; rm -rf /opt/fleetfit-lab /opt/fleetfit/llama-server /srv/vllm "
        "/etc/ld.so.conf.d/00-fleetfit-lab.conf; ldconfig",
        check=False,
    )


def planning(state: dict[str, Any]) -> str:
    """Return what planning reads, as bytes to compare."""
    return json.dumps([state["facts"]["stable"], state["facts"]["foreign_bytes"]])


def test_a_bare_host_then_a_running_engine_then_somebody_elses(gpu_host: GpuHost) -> None:
    bare = gpu_host.state()
    assert bare["facts"]["problems"] == []
    assert bare["services"]["llama-server"] == {"active": "inactive", "release": None, "unit_file": False}
    # Other tests on this host may have installed another helper.
    installed = gpu_host.host.run("readlink", "/opt/fleetfit/libexec/current").strip()
    assert bare["helper_digest"] == installed
    assert bare["facts"]["stable"]["os"]["codename"] == "bookworm"
    assert bare["facts"]["stable"]["accelerators"][0]["uuid"] == CARD
    assert abs(bare["facts"]["live"]["clock_offset_s"]) < 30

    device = {"id": CARD, "weights": 5000 * MIB, "kv_cache": 300 * MIB, "margin": 1024 * MIB}
    folder = "/opt/fleetfit/llama-server/releases/3f0c9a"
    gpu_host.host.put(f"{folder}/plan.json", json.dumps({"deployments": [{"devices": [device]}]}))
    gpu_host.host.put(f"{folder}/run", "#!/bin/sh\nexec sleep 600\n", "0755")
    gpu_host.host.run("ln", "-sfn", folder, "/opt/fleetfit/llama-server/current")
    gpu_host.unit("llama-server", "/opt/fleetfit/llama-server/current/run")
    ours = gpu_host.state()
    assert ours["services"]["llama-server"] == {"active": "active", "release": "3f0c9a", "unit_file": True}
    live = ours["facts"]["live"]["devices"][CARD]
    assert live["used_bytes"] == 5300 * MIB
    assert [(p["name"], p["owner"]) for p in live["processes"]] == [("sleep", "fleetfit")]
    assert planning(ours) == planning(bare)

    # A vLLM of the user's own under the same unit name: real, but not ours.
    gpu_host.unit("vllm", "/bin/sleep 601")
    pid = gpu_host.host.show("vllm", "MainPID")
    profile = (LAB / "profiles/rtx-4090.ini").read_text()
    gpu_host.host.put("/opt/fleetfit-lab/profile.ini", f"{profile}\n[process]\npid = {pid}\nused_mib = 700\n")
    theirs = gpu_host.state()
    owners = {p["pid"]: p["owner"] for p in theirs["facts"]["live"]["devices"][CARD]["processes"]}
    assert owners[int(pid)] == "other"
    assert sorted(owners.values()) == ["fleetfit", "other"]
    assert theirs["facts"]["foreign_bytes"] == {CARD: 768 * MIB}
