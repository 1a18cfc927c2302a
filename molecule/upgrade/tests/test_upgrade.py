"""An engine that was taken back: what serves, what holds it there, and what else can be asked of it.

The tests run in their order: each begins where the one before it ended.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

ROOT = "/opt/fleetfit/llama-server"
HELPER = "python3 -I /opt/fleetfit/libexec/current/fleetfit-host.pyz"
# It starts, fits by its own accounting, and ends.
PROGRAMS = {"bin/llama-server": "#!/bin/sh\nexit 3\n", "bin/llama-fit-params": "#!/bin/sh\necho Host 1 1 1\n"}


def play(playbook: str, *options: str, **variables: Any) -> tuple[int, str]:
    """Run a playbook on the scenario's inventory; return exit code and output in one line."""
    scenario = Path(os.environ["SCENARIO"])
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible-playbook")),
            *[str(scenario / playbook), "-i", os.environ["INVENTORY"], "-e", json.dumps(variables), *options],
        ],
        cwd=scenario.parents[1],
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(scenario.parents[1] / "ansible.cfg"),
            "ANSIBLE_FORCE_COLOR": "0",
            "ANSIBLE_NOCOLOR": "1",
            # Connections of their own: another checkout's scenario may have a host of the same name.
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(Path(os.environ["INVENTORY"]).parent / "cp"),
        },
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, " ".join(done.stdout.split())


def go_back(*options: str, **variables: Any) -> tuple[int, str]:
    return play(
        "../../playbooks/rollback_release.yml",
        *options,
        fleetfit_rollback_service="llama-server",
        **variables,
    )


def slots(machine: Host) -> int:
    """Return the slots that the running engine was started with."""
    pid = machine.check_output("systemctl show llama-server --property=MainPID --value")
    words = machine.file(f"/proc/{pid}/cmdline").content_string.split("\0")
    return int(words[words.index("-np") + 1])


def current(machine: Host) -> str:
    return machine.check_output(f"basename $(readlink {ROOT}/current)")


def good(machine: Host) -> dict[str, Any]:
    record = machine.file("/var/lib/fleetfit/switch/llama-server.good").content_string
    return dict(json.loads(record))


def ready(machine: Host) -> bool:
    return bool(json.loads(machine.check_output(f"{HELPER} ready --service llama-server --json"))["ok"])


def test_the_older_release_serves_and_is_held(machine: Host) -> None:
    assert slots(machine) == 2
    assert ready(machine)
    record = good(machine)
    newer, older = record["sequence"][:2]
    assert current(machine) == older
    assert (record["hold"]["release"], record["hold"]["instead_of"]) == (older, newer)
    assert machine.file(f"{ROOT}/releases/{newer}/run").exists


def test_the_manifest_has_the_plan_that_is_served(machine: Host) -> None:
    sections = json.loads(machine.file("/etc/fleetfit/manifest.json").content_string)["sections"]
    assert sections["plan"]["deployments"][0]["slots"] == 2
    assert sections["llama_cpp"]["units"] == ["llama-server.service"]


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("ffffffff", "neither the beginning of a release's name nor a version"),
        ("11434.0.0", "means 2 releases"),
        ("", "There is no release of llama-server before the current one"),
    ],
)
def test_what_cannot_be_gone_back_to_is_refused_with_the_list(machine: Host, wanted: str, says: str) -> None:
    pid = machine.check_output("systemctl show llama-server --property=MainPID --value")
    code, output = go_back(fleetfit_rollback_to=wanted)
    assert code != 0
    assert says in output
    for digest in good(machine)["sequence"][:2]:
        assert digest in output
    assert machine.check_output("systemctl show llama-server --property=MainPID --value") == pid


def test_another_service_is_refused_with_the_names(machine: Host) -> None:
    code, output = play("../../playbooks/rollback_release.yml", fleetfit_rollback_service="ollama")
    assert code != 0
    assert "llama-server, vllm, open-webui" in output


def test_the_main_job_goes_forward_when_the_hold_is_ended(machine: Host) -> None:
    code, output = play("serve.yml", fleetfit_slots=3, fleetfit_release_hold=False)
    assert code == 0, output[-2000:]
    assert slots(machine) == 3
    assert good(machine)["hold"] is None


def test_check_mode_says_what_going_back_by_one_would_do(machine: Host) -> None:
    code, output = go_back("--check")
    assert code == 0, output[-2000:]
    assert f"llama-server would go from {current(machine)}" in output
    assert slots(machine) == 3


def test_it_goes_back_by_one(machine: Host) -> None:
    code, output = go_back()
    assert code == 0, output[-2000:]
    assert slots(machine) == 2


def test_a_broken_release_goes_back_to_the_one_that_serves(machine: Host, tmp_path: Path) -> None:
    path = tmp_path / "engine.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in PROGRAMS.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text), 0o755
            tar.addfile(entry, io.BytesIO(text.encode()))
    content = path.read_bytes()
    archive = {
        **{"version": "11434.0.0", "backend": "cpu", "arch": "x86_64", "glibc": "2.34", "path": str(path)},
        **{"size": len(content), "sha256": sha256(content).hexdigest()},
    }
    before = current(machine)
    code, output = play(
        "serve.yml", fleetfit_slots=3, fleetfit_release_hold=False, llama_cpp_archives=[archive]
    )
    assert code != 0
    assert "failed at 'gate' (crashed)" in output
    assert f"{before} serves again" in output
    assert current(machine) == before
    assert ready(machine)
    # It was not a decision of the operator: what held the host holds it still.
    assert good(machine)["hold"]["release"] == before


def test_wanting_what_serves_ends_the_hold(machine: Host) -> None:
    code, output = play("serve.yml", fleetfit_slots=2)
    assert code == 0, output[-2000:]
    assert good(machine)["hold"] is None
    code, output = play("serve.yml", fleetfit_slots=2)
    assert "changed=0" in output
