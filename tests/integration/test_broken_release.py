"""A new release that is broken, on hosts that serve the real llama-server: what users and the play see of it.

Two hosts get a new release in one play; on one of them it is broken. Measured are the times of the way back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.engine_args import llama_server_argv

from fleetfit.lab.engine import ensure_engine

from .conftest import SystemdHost, start_host
from .test_release_module import Controller
from .test_release_switch import ENGINE, lab_plan

pytestmark = pytest.mark.slow

PORT = 8080
KEY_FILE = "/etc/fleetfit/credentials/llama-server.api-key"
REQUESTS = "/var/tmp/requests"
START_AFTER_S = 5.0
READY_FACTOR = 1.5
UNIT = """\
[Service]
Type=exec
User=nobody
ExecStart=/opt/fleetfit/llama-server/current/run
LoadCredential=api-key:/etc/fleetfit/credentials/llama-server.api-key
Restart=on-failure
TimeoutStopSec=5
"""
# Asks all the time, and writes when each question was asked and answered, and whether it was.
CLIENT = """\
import json, sys, time, urllib.request
key = open(sys.argv[1]).read().strip()
body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
while True:
    begun = time.time()
    request = urllib.request.Request(
        "http://127.0.0.1:8080/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            ok = b"choices" in response.read()
    except OSError:
        ok = False
    with open(sys.argv[2], "a") as stream:
        stream.write(json.dumps([begun, time.time(), ok]) + "\\n")
    time.sleep(0.5)
"""
PLAY = """\
- hosts: all
  gather_facts: false
  tasks:
    - name: The host serves its release
      fleetfit.llm.release:
        service: llama-server
        environment: "{{ wanted.environment }}"
        links: {model: "{{ wanted.model }}"}
        settings: "{{ wanted.settings }}"
        argv: "{{ wanted.argv }}"
        environ: "{{ wanted.environ }}"
        plan: "{{ wanted.plan }}"
        gate: "{{ wanted.gate }}"
    - name: The play goes on with the host
      ansible.builtin.debug:
        msg: went on
"""


def release(name: str, **other: Any) -> dict[str, Any]:
    """Return a release of the real engine with the lab's model and the plan's own arguments."""
    deployment, _ = lab_plan()
    # One thread: two wait for each other, which takes minutes on a machine with more hosts than processors.
    settings = {**deployment["settings"], "n_ctx": 2048, "slots": 2, "threads": 1}
    argv = llama_server_argv(
        settings,
        binary="{release}/env/bin/llama-server",
        model_path="{release}/model/" + settings["model_file"],
        host="127.0.0.1",
        port=PORT,
        api_key_file="{credentials}/api-key",
        chat_template_file=None,
        alias="m",
    )
    return {
        "environment": "/opt/fleetfit/llama-server/envs/real",
        "model": "/var/lib/fleetfit/models/m/whole",
        "settings": {"n_ctx": 2048, "slots": 2},
        "argv": argv,
        "environ": {"TEST_RELEASE": name},
        # Variables of an inventory are templates, and so would the model's chat template be.
        "plan": {"deployments": [{**deployment, "chat_template": None}]},
        "gate": {
            "kind": "llama_cpp",
            "url": f"http://127.0.0.1:{PORT}",
            "credential": KEY_FILE,
            "model": "m",
            "timeout_s": 300,
            "proof_s": 5,
        },
        **other,
    }


# It hangs, and it does not end when systemd asks it to: of its unit's TimeoutStopSec nothing may be waited for.
STUCK = ["/bin/sh", "-c", "trap '' TERM; while true; do sleep 1; done"]
IMPATIENT = {**release("x")["gate"], "timeout_s": 5}
# What is wrong with the new release, and what the play says of it.
DYING = [
    *["{release}/env/bin/engine", "--mode=dies", f"--port={PORT}", "--n-ctx=1024"],
    *["--api-key-file", "{credentials}/api-key"],
]
BROKEN = {
    "its model is cut off": ({"model": "/var/lib/fleetfit/models/m/cut"}, "crashed", "error loading model"),
    "it dies at the first request": ({"argv": DYING}, "crashed", "status="),
    "its arguments are not accepted": (
        {"argv": [*release("x")["argv"], "--nonsense"]},
        "crashed",
        "nonsense",
    ),
    "it hangs and ignores the stop": ({"argv": STUCK, "gate": IMPATIENT}, "hung", "nothing new in its log"),
}


class Fleet:
    """Two hosts and the controller's inventory of them."""

    def __init__(self, hosts: dict[str, SystemdHost], folder: Path) -> None:
        self.hosts = hosts
        self.folder = folder
        self.inventory: dict[str, Any] = {}
        for name, host in hosts.items():
            (folder / name).mkdir()
            controller = Controller(host, folder / name)
            document = json.loads(controller.inventory.read_text())
            # Each host has its own file of known keys, in which it is called "host".
            self.inventory[name] = {**document["all"]["hosts"]["host"], "ansible_host": "host"}
        (folder / "play.yml").write_text(PLAY)

    def play(self, wanted: dict[str, dict[str, Any]]) -> tuple[int, str, dict[str, dict[str, int]]]:
        """Bring each host to its release in one play; return exit code, output and recap."""
        hosts = {name: {**self.inventory[name], "wanted": wanted[name]} for name in self.hosts}
        (self.folder / "inventory.json").write_text(json.dumps({"all": {"hosts": hosts}}))
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("ansible-playbook")),
                f"--inventory={self.folder / 'inventory.json'}",
                str(self.folder / "play.yml"),
            ],
            cwd=root,
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(root / "ansible.cfg"),
                "ANSIBLE_NOCOLOR": "1",
                "ANSIBLE_SSH_ARGS": "-o ControlMaster=no",
            },
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        recap = {}
        for line in done.stdout.split("PLAY RECAP")[-1].splitlines():
            match = re.match(r"(\S+)\s*:\s+(ok=.*)", line)
            if match:
                recap[match[1]] = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", match[2])}
        return done.returncode, done.stdout, recap

    def journal(self, name: str) -> dict[str, Any]:
        """Return the journal of a host's last switch."""
        document: dict[str, Any] = json.loads(
            self.hosts[name].run("cat", "/var/lib/fleetfit/switch/llama-server.json")
        )
        return document


def prepare(host: SystemdHost) -> None:
    """Put the real engine, its model, a damaged model and the unit on the host."""
    _, model = lab_plan()
    host.put("/opt/fleetfit/llama-server/envs/real/bin/engine", ENGINE.read_bytes(), "0755")
    for program in ensure_engine().bin_dir.iterdir():
        if program.name == "llama-server" or ".so" in program.name:
            host.put(f"/opt/fleetfit/llama-server/envs/real/bin/{program.name}", program.read_bytes(), "0755")
    name = lab_plan()[0]["settings"]["model_file"]
    data = model.read_bytes()
    host.put(f"/var/lib/fleetfit/models/m/whole/{name}", data)
    host.put(f"/var/lib/fleetfit/models/m/cut/{name}", data[: len(data) // 2])
    host.put("/etc/systemd/system/llama-server.service", UNIT)
    host.put(KEY_FILE, "canary-key-9012\n", "0600")
    host.put("/var/tmp/client.py", CLIENT)
    host.run("systemctl", "daemon-reload")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Yield two hosts that serve the same release."""
    if shutil.which("ssh") is None:
        pytest.fail("This test needs an SSH client.")
    folder = tmp_path_factory.mktemp("fleet")
    hosts = {}
    try:
        for name in ("sound", "broken"):
            hosts[name] = start_host(folder)
            prepare(hosts[name])
        yield Fleet(hosts, folder)
    finally:
        for host in hosts.values():
            host.podman("rm", "--force", "--time=0", host.name)


@pytest.mark.parametrize("what", list(BROKEN))
def test_only_the_host_with_the_broken_release_fails_and_it_serves_again(fleet: Fleet, what: str) -> None:
    change, state, says = BROKEN[what]
    name = re.sub(r"\W+", "-", what)
    host = fleet.hosts["broken"]
    # The same release twice: installed, and started again from nothing, are its cold starts in this run.
    cold = []
    for number in range(2):
        old = release(f"old-{name}-{number}")
        code, output, _ = fleet.play({"sound": old, "broken": old})
        assert code == 0, output
        cold.append(fleet.journal("broken")["gate"]["ready_s"])
    serving = host.run("readlink", "/opt/fleetfit/llama-server/current")

    host.run("rm", "-f", REQUESTS)
    client = ["python3", "/var/tmp/client.py", KEY_FILE, REQUESTS]
    host.run("systemd-run", "--quiet", "--unit=client", *client)
    try:
        host.run("sh", "-c", f"until [ $(wc -l < {REQUESTS} || echo 0) -ge 3 ]; do sleep 0.2; done")
        new = release(f"new-{name}")
        code, output, recap = fleet.play({"sound": new, "broken": {**new, **change}})
        host.run(
            "sh",
            "-c",
            f"n=$(wc -l < {REQUESTS}); until [ $(wc -l < {REQUESTS}) -ge $((n + 3)) ]; do sleep 0.2; done",
        )
    finally:
        host.run("systemctl", "stop", "client.service")

    # The play fails for that host alone, and says why.
    text = " ".join(output.split())
    assert code != 0
    assert (recap["broken"]["failed"], recap["sound"]["failed"], recap["sound"]["ok"]) == (1, 0, 2), output
    assert f"failed at 'gate' ({state})" in text
    assert says in text
    assert "serves again" in text

    # No request failed before the switch, and the old release answers again.
    journal = fleet.journal("broken")
    at = {step["step"]: step["at"] for step in journal["steps"]}
    asked = [json.loads(line) for line in host.run("cat", REQUESTS).splitlines()]
    early = [ok for _, ended, ok in asked if ended < at["stop"]]
    assert early
    assert all(early)
    assert asked[-1][2]
    assert host.run("readlink", "/opt/fleetfit/llama-server/current") == serving
    failing = [(begun, ended) for begun, ended, ok in asked if not ok]
    answered = min(ended for begun, ended, ok in asked if ok and begun > failing[-1][0])

    # Its cold start once more, as the machine is now: one with other work to do is slower at times.
    after = release(f"after-{name}")
    code, output, _ = fleet.play({"sound": after, "broken": after})
    assert code == 0, output
    cold.append(fleet.journal("broken")["gate"]["ready_s"])

    # From the gate's verdict, with which the way back begins, to the moment the old engine was told to start.
    start_s = journal["started_at"] - at["revert_stop"]
    ready_s = journal["revert_gate"]["ready_s"]
    print(
        f"\n{what}: gate failed {at['revert_stop'] - at['gate']:.1f} s after the start; old release started "
        f"{start_s:.1f} s after that (<= {START_AFTER_S:.0f} s) and ready in {ready_s:.1f} s; its cold starts in "
        f"this run: {', '.join(f'{seconds:.1f}' for seconds in cold)} s; {len(early)} requests before the switch, "
        f"none failed; "
        f"without answers for {answered - at['stop']:.1f} s"
    )
    assert start_s <= START_AFTER_S
    assert ready_s <= READY_FACTOR * max(cold)
