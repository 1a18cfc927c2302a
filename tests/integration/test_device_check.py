"""vLLM's own unit, as the role renders it for GPUs, on a systemd host: a card that is missing or taken stops it.

The cards are the simulated driver's, the engine is the tests' stand-in; unit, drop-in, helper and switch are real.
What only a GPU can show (device nodes, CUDA under this sandbox) is not covered.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleetfit.lab.gpu import apply_gpu, gpu_files, profile_path

from ..unit.test_vllm_unit import BASE, render
from .conftest import SystemdHost, start_host
from .test_release_switch import ENGINE, ROOT

HELPER = "/opt/fleetfit/libexec/current/fleetfit-host.pyz"
PROFILE = "2x-rtx-4090"
PROFILE_PATH = "/opt/fleetfit-lab/profile.ini"
CARDS = [f"GPU-4090f1ee-0000-4000-8000-00000000000{number}" for number in (1, 2)]
ABSENT = "GPU-gone0000-0000-4000-8000-000000000009"
PORT = 8101
KEY_FILE = "/etc/fleetfit/credentials/vllm.api-key"
GIB = 2**30
pytestmark = pytest.mark.slow
# The cards have 23.5 GiB; the engine starts with so much of each.
NEEDED = 20 * GIB
WAIT_S = 4
# Whoever this is holds 6 GiB of the first card: less than NEEDED is left.
HOLDER = "\n[process]\npid = {pid}\nused_mib = 6144\n"
DRIVER = f"""
from fleetfit_host import switch
from fleetfit_host.manifest import HostPaths
from fleetfit_host.release import ReleaseSpec, write_release
paths = HostPaths()
written = write_release(ReleaseSpec(**json.loads(sys.argv[1])), paths)
switch.request(paths, "vllm", written.digest)
switch.launch("vllm", helper={HELPER!r})
print(json.dumps(switch.wait_end(paths, "vllm", helper={HELPER!r})))
"""


class Vllm:
    """The host with vLLM's unit, as the tests see it."""

    def __init__(self, host: SystemdHost) -> None:
        self.host = host
        self.profile = profile_path(PROFILE).read_text()

    def cards(self, *, held_by: int | None = None, without: int | None = None) -> None:
        """Give the host its cards: the first one's memory taken by a process, or one of them gone."""
        driver, *cards = self.profile.split("[gpu]")
        if held_by is not None:
            cards[0] += HOLDER.format(pid=held_by)
        if without is not None:
            del cards[without]
        self.host.put(PROFILE_PATH, "[gpu]".join([driver, *cards]))

    def drive(self, name: str, devices: list[str]) -> dict[str, Any]:
        """Bring the service to a release that is planned on ``devices``; return the journal."""
        variables = {
            **BASE,
            "vllm_device_wait_s": WAIT_S,
            "__vllm_mapping": None,
            "__vllm_devices": devices,
            "__vllm_settings": {"startup_free_bytes": [NEEDED] * len(devices)},
            "__vllm_host_memory": {},
        }
        release = {
            "service": "vllm",
            "environment": "/opt/fleetfit/vllm/envs/one",
            "files": {"unit.conf": render("unit.conf.j2", variables)},
            "argv": [
                *["{release}/env/bin/engine", f"--port={PORT}", f"--name={name}"],
                *["--api-key-file", "{credentials}/api-key"],
            ],
            "gate": {
                "kind": "llama_cpp",
                "url": f"http://127.0.0.1:{PORT}",
                "credential": KEY_FILE,
                "model": name,
                "timeout_s": 60,
                "proof_s": 0,
            },
        }
        journal: dict[str, Any] = self.host.python(DRIVER, json.dumps(release))
        return journal

    def log(self) -> str:
        """Return the unit's journal."""
        return self.host.run("journalctl", "--namespace=*", "--unit=vllm.service", "-o", "cat", "--no-pager")

    def wait_for(self, state: str, seconds: float) -> None:
        """Wait until the unit is in a state."""
        end = time.monotonic() + seconds
        while (now := self.host.show("vllm.service", "ActiveState")) != state:
            assert time.monotonic() < end, f"still {now}: {self.log()[-2000:]}"
            time.sleep(0.2)

    def clear(self) -> None:
        """Take every release away, and give the host all its cards."""
        self.cards()
        script = (
            "systemctl stop vllm.service 2>/dev/null; systemctl reset-failed;"
            "rm -rf /opt/fleetfit/vllm/current /opt/fleetfit/vllm/releases /var/lib/fleetfit/switch;"
            "journalctl --namespace=vllm --rotate --vacuum-size=1 --quiet; true"
        )
        self.host.run("sh", "-c", script)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """Yield a host with simulated cards that has the unit, its user and its programs, as the role leaves them."""
    host = start_host(tmp_path_factory.mktemp("device-check"))
    try:
        apply_gpu(host.machine, host.name, gpu_files(host.machine, PROFILE)[0], PROFILE)
        host.run("groupadd", "--system", "fleetfit-models")
        host.run("useradd", "--system", "--no-create-home", "--groups=fleetfit-models", "fleetfit-vllm")
        host.put("/opt/fleetfit/vllm/envs/one/bin/engine", ENGINE.read_bytes(), "0755")
        host.put(KEY_FILE, "canary-key-8642\n", "0600")
        host.put("/etc/systemd/system/vllm.service", render("vllm.service.j2", BASE))
        recover = (ROOT / "roles/host_baseline/templates/fleetfit-recover.service.j2").read_text()
        host.put("/etc/systemd/system/fleetfit-recover.service", recover.partition("\n")[2])
        drop_in = Path(BASE["__vllm_drop_in_directory"])
        host.run("mkdir", "-p", str(drop_in.parent))
        host.run("ln", "-s", "/opt/fleetfit/vllm/current", str(drop_in))
        host.run("systemctl", "daemon-reload")
        yield Vllm(host)
    finally:
        host.podman("rm", "--force", "--time=0", host.name)


@pytest.fixture
def vllm(prepared: Vllm) -> Vllm:
    """Return the host without a release, with all its cards."""
    prepared.clear()
    return prepared


def test_with_its_cards_the_hardened_unit_serves(vllm: Vllm) -> None:
    journal = vllm.drive("one", CARDS)
    assert journal["state"] == "committed", (journal["cause"], vllm.log()[-3000:])
    host = vllm.host
    # No host of the tests has the driver's program that makes device nodes: that is no reason to fail.
    assert host.run_raw("test", "-e", "/usr/bin/nvidia-modprobe").returncode != 0
    assert "char-nvidia* rwm" in host.show("vllm.service", "DeviceAllow").splitlines()
    assert host.show("vllm.service", "PrivateDevices") == "no"
    last = host.run("systemd-analyze", "security", "--no-pager", "vllm.service").splitlines()[-1]
    found = re.search(r": ([0-9.]+) ", last)
    assert found is not None
    assert float(found[1]) <= 2.0


def test_a_release_for_a_card_that_is_not_there_is_taken_back_with_its_uuid(vllm: Vllm) -> None:
    good = vllm.drive("good", CARDS)
    bad = vllm.drive("bad", [CARDS[0], ABSENT])
    assert (bad["state"], bad["cause"]["state"]) == ("reverted", "crashed")
    assert f"The planned GPU {ABSENT} cannot be used" in bad["cause"]["message"]
    assert f"This host has: {CARDS[0]}, {CARDS[1]}" in bad["cause"]["message"]
    assert bad["revert_gate"]["ok"]
    assert vllm.host.run("readlink", "/opt/fleetfit/vllm/current").strip() == f"releases/{good['to']}"


def test_a_card_that_is_lost_fails_the_unit_with_its_uuid_and_never_skips_it(vllm: Vllm) -> None:
    assert vllm.drive("one", CARDS)["state"] == "committed"
    vllm.cards(without=1)
    vllm.host.run("systemctl", "kill", "--signal=KILL", "vllm.service")
    # It is started again as often as StartLimitBurst allows, 5 s apart.
    vllm.wait_for("failed", 90)
    assert vllm.host.show("vllm.service", "ConditionResult") == "yes"
    assert f"The planned GPU {CARDS[1]} cannot be used" in vllm.log()
    asked = vllm.host.run_raw(HELPER, "ready", "--service=vllm")
    assert asked.returncode == 1
    assert CARDS[1] in asked.stdout


def test_a_start_waits_until_the_memory_of_its_cards_is_back(vllm: Vllm) -> None:
    assert vllm.drive("one", CARDS)["state"] == "committed"
    vllm.host.run("systemctl", "stop", "vllm.service")
    vllm.cards(held_by=1)
    vllm.host.run("systemctl", "start", "--no-block", "vllm.service")
    vllm.wait_for("activating", 30)
    time.sleep(2)
    assert vllm.host.show("vllm.service", "SubState") == "start-pre"
    vllm.cards()
    vllm.wait_for("active", 30)
    assert vllm.host.show("vllm.service", "NRestarts") == "0"


def test_two_engines_that_claim_one_card_are_told_apart_from_a_crash(vllm: Vllm) -> None:
    """Somebody else's engine holds the memory: the release is taken back, and the cause has all the numbers."""
    good = vllm.drive("good", CARDS[1:])
    vllm.cards(held_by=1)
    bad = vllm.drive("bad", CARDS)
    assert (bad["state"], bad["cause"]["state"]) == ("reverted", "out_of_memory")
    for part in (CARDS[0], "17.5 GiB free", "(pid 1) holds 6.0 GiB", "20.0 GiB", "Stop what holds it"):
        assert part in bad["cause"]["message"], bad["cause"]["message"]
    assert CARDS[1] not in bad["cause"]["message"]
    # It waited for the memory first.
    at = {step["step"]: step["at"] for step in bad["steps"]}
    assert at["revert_stop"] - at["start"] >= WAIT_S
    assert vllm.host.run("readlink", "/opt/fleetfit/vllm/current").strip() == f"releases/{good['to']}"
