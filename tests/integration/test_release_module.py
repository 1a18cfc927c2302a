"""The modules release and manifest_section, called by Ansible over SSH on a real systemd host."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fleetfit.lab.machine import podman

from ..processes import kill_all

ROOT = Path(__file__).parents[2]
ANSIBLE = Path(sys.executable).with_name("ansible")
ENGINE = Path(__file__).parent / "data" / "engine.py"
PORT = 8090
KEY = "canary-key-5678"
KEY_FILE = "/etc/fleetfit/credentials/portal.api-key"
UNIT_FILE = "/etc/systemd/system/portal.service"
UNIT = """\
[Service]
Type=exec
User=nobody
ExecStart=/opt/fleetfit/portal/current/run
LoadCredential=api-key:/etc/fleetfit/credentials/portal.api-key
Restart=on-failure
"""


class Controller:
    """Ansible on this machine; SSH runs over ``podman exec``, so the host needs no network."""

    def __init__(self, host: Any, folder: Path) -> None:
        self.host = host
        self.folder = folder
        host.run("ssh-keygen", "-A")
        key = folder / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        host.run("sh", "-c", "mkdir -p /run/sshd && install -d -m 0700 /root/.ssh")
        host.put("/root/.ssh/authorized_keys", key.with_suffix(".pub").read_bytes(), "0600")
        known = folder / "known_hosts"
        known.write_text("host " + host.run("cat", "/etc/ssh/ssh_host_ed25519_key.pub"))
        proxy = shlex.join(podman(host.machine, "exec", "-i", host.name, "/usr/sbin/sshd", "-i"))
        options = {
            "ProxyCommand": proxy,
            "UserKnownHostsFile": str(known),
            "StrictHostKeyChecking": "yes",
            "HostKeyAlgorithms": "ssh-ed25519",
        }
        arguments = " ".join(f"-o {name}={shlex.quote(value)}" for name, value in options.items())
        host_variables = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(key),
            "ansible_ssh_common_args": arguments,
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        self.inventory = folder / "inventory.json"
        self.inventory.write_text(json.dumps({"all": {"hosts": {"host": host_variables}}}))

    def start(self, module: str, *options: str, **arguments: Any) -> subprocess.Popen[str]:
        """Start Ansible with one module in a session of its own."""
        return subprocess.Popen(
            [
                *[str(ANSIBLE), "host", f"--inventory={self.inventory}", *options],
                *["--module-name", f"fleetfit.llm.{module}", "--args", json.dumps(arguments)],
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_NOCOLOR": "1",
                "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
                "ANSIBLE_SSH_ARGS": "-o ControlMaster=no",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def call(self, module: str, *options: str, **arguments: Any) -> tuple[dict[str, Any], str]:
        """Run a module once; return its result and everything that Ansible printed."""
        text, _ = self.start(module, *options, **arguments).communicate(timeout=180)
        assert "=> {" in text, text
        result, _ = json.JSONDecoder().raw_decode(text[text.index("=> {") + 3 :])
        return {**result, "failed": "| FAILED!" in text}, text


def arguments(mode: str = "ok", **other: Any) -> dict[str, Any]:
    """Return the module's arguments for a release of the test engine."""
    options = {"name": mode, "load_s": 0, "timeout_s": 4, **other}
    return {
        "service": "portal",
        "environment": f"/opt/fleetfit/portal/envs/{options.get('env', 'one')}",
        "settings": {"n_ctx": 2048, "slots": 2},
        "argv": [
            *["{release}/env/bin/engine", f"--mode={mode}", f"--port={PORT}"],
            "--api-key-file",
            "{credentials}/api-key",
            f"--load-s={options['load_s']}",
            f"--name={options['name']}",
        ],
        "restart_on": [UNIT_FILE, KEY_FILE],
        "gate": {
            "kind": "llama_cpp",
            "url": f"http://127.0.0.1:{PORT}",
            "credential": KEY_FILE,
            "model": options["name"],
            "timeout_s": options["timeout_s"],
        },
        **other.get("release", {}),
    }


@pytest.fixture(scope="module")
def controller(systemd_host: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    """Return Ansible with a host that it reaches."""
    yield Controller(systemd_host, tmp_path_factory.mktemp("controller"))
    systemd_host.run("systemctl", "stop", "portal.service")


@pytest.fixture
def host(controller: Controller) -> Any:
    """Return the host with a release that serves."""
    host = controller.host
    host.put(KEY_FILE, KEY + "\n", "0600")
    host.put(UNIT_FILE, UNIT)
    host.put("/opt/fleetfit/portal/envs/one/bin/engine", ENGINE.read_bytes(), "0755")
    host.run("systemctl", "daemon-reload")
    result, _ = controller.call("release", **arguments(name="base"))
    assert not result["failed"], result
    return host


@pytest.fixture
def any_host(controller: Controller, request: pytest.FixtureRequest) -> Any:
    """Return the host with a release that serves, whichever an earlier test left."""
    host = controller.host
    if host.run_raw("systemctl", "is-active", "portal.service").returncode == 0:
        return host
    return request.getfixturevalue("host")


def main_pid(host: Any) -> str:
    """Return the engine's process."""
    return str(host.show("portal.service", "MainPID"))


def tree(host: Any) -> str:
    """Return every file of ours with its time of change."""
    command = (
        "find /opt/fleetfit/portal /var/lib/fleetfit/switch -printf '%p %C@ %l\\n' | grep -v '[.]lock' | sort"
    )
    return str(host.run("sh", "-c", command))


def test_a_second_call_changes_nothing_and_check_mode_writes_nothing(
    controller: Controller, host: Any
) -> None:
    before, pid = tree(host), main_pid(host)
    result, _ = controller.call("release", **arguments(name="base"))
    assert (result["changed"], result["switched"], result["restarted"]) == (False, False, False)
    assert result["gate"]["answer"].startswith("Paris")
    result, text = controller.call("release", "--check", "--diff", **arguments(name="other"))
    assert (result["changed"], result["switched"]) == (True, True)
    assert "--name=other" in text
    assert (tree(host), main_pid(host)) == (before, pid)


def test_a_new_plan_alone_restarts_nothing(controller: Controller, host: Any) -> None:
    pid = main_pid(host)
    again = {**arguments(name="base"), "plan": {"candidates": [1, 2]}}
    result, _ = controller.call("release", **again)
    assert (result["changed"], result["switched"], result["restarted"]) == (True, False, False)
    assert main_pid(host) == pid
    assert not controller.call("release", **again)[0]["changed"]


@pytest.mark.parametrize("what", ["credential", "unit file", "stopped", "edited by hand"])
def test_what_calls_for_a_restart_of_the_same_release(controller: Controller, host: Any, what: str) -> None:
    pid = main_pid(host)
    current = "/opt/fleetfit/portal/current/run"
    if what == "credential":
        host.put(KEY_FILE, "canary-key-next\n", "0600")
    elif what == "unit file":
        host.put(UNIT_FILE, UNIT + "LimitNOFILE=4000\n")
    elif what == "stopped":
        host.run("systemctl", "stop", "portal.service")
    else:
        host.run("sh", "-c", f"echo '# mine' >> {current}")
    result, text = controller.call("release", **arguments(name="base"))
    assert (result["changed"], result["switched"], result["restarted"]) == (True, False, True), result
    assert result["journal"]["kind"] == "restart"
    assert main_pid(host) not in (pid, "0")
    assert "canary" not in text
    if what == "unit file":
        assert host.show("portal.service", "LimitNOFILE") == "4000"
    if what == "edited by hand":
        assert "# mine" not in host.run("cat", current)
    result, _ = controller.call("release", **arguments(name="base"))
    assert not result["changed"]


def test_a_broken_release_fails_the_host_and_says_what_serves(controller: Controller, host: Any) -> None:
    base = host.run("readlink", "/opt/fleetfit/portal/current").strip()
    result, text = controller.call("release", "-vvv", **arguments("dies", name="broken"))
    assert (result["failed"], result["code"]) == (True, "gate_failed")
    assert result["gate"]["state"] == "crashed"
    assert f"{base.removeprefix('releases/')} serves again" in result["msg"]
    assert any("illegal memory access" in line for line in result["gate"]["log_tail"])
    assert KEY not in text  # though the engine logged it
    assert host.run("readlink", "/opt/fleetfit/portal/current").strip() == base
    assert not controller.call("release", **arguments(name="base"))[0]["restarted"]


def test_old_releases_and_what_only_they_need_are_deleted(controller: Controller, host: Any) -> None:
    for env in ("two", "three"):
        host.put(f"/opt/fleetfit/portal/envs/{env}/bin/engine", ENGINE.read_bytes(), "0755")
        last, _ = controller.call("release", **arguments(name="base", env=env))
    envs = host.run("ls", "/opt/fleetfit/portal/envs").split()
    assert (sorted(envs), len(host.run("ls", "/opt/fleetfit/portal/releases").split())) == (
        ["three", "two"],
        2,
    )
    assert "/opt/fleetfit/portal/envs/one" in last["removed"]
    assert last["referenced"] == ["/opt/fleetfit/portal/envs/three", "/opt/fleetfit/portal/envs/two"]


def test_two_calls_at_once_make_one_switch(controller: Controller, host: Any) -> None:
    wanted = arguments(name="together", load_s=4)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(controller.call, "release", **wanted)
        second = pool.submit(controller.call, "release", **wanted)
        results = [first.result()[0], second.result()[0]]
    assert not any(result["failed"] for result in results), results
    assert len({result["digest"] for result in results}) == 1
    identities = {result["journal"]["id"] for result in results if result["journal"]}
    assert len(identities) == 1
    started = host.run("journalctl", "-u", "portal.service", "-o", "cat").count("starting together, mode ok")
    assert started == 1


def test_a_call_that_is_lost_does_not_stop_the_switch(controller: Controller, host: Any) -> None:
    wanted = arguments(name="alone", load_s=6)
    lost = controller.start("release", **wanted)
    end = time.monotonic() + 60
    while host.show("fleetfit-switch-portal.service", "ActiveState") != "active":
        assert time.monotonic() < end
        time.sleep(0.2)
    kill_all(lost)  # Ansible, its SSH client and with it the connection
    result, _ = controller.call("release", **wanted)
    assert not result["failed"], result
    journal = json.loads(host.run("cat", "/var/lib/fleetfit/switch/portal.json"))
    assert (journal["state"], journal["to"]) == ("committed", result["digest"])
    started = host.run("journalctl", "-u", "portal.service", "-o", "cat").count("starting alone, mode ok")
    assert started == 1


BAD = [
    ({"release": {"argv": []}}, "bad_release"),
    ({"release": {"gate": {"kind": "nothing", "url": "http://127.0.0.1:1"}}}, "bad_gate"),
    ({"release": {"environment": "/opt/fleetfit/portal/envs/absent"}}, "release_incomplete"),
    ({"release": {"files": {"../x": "y"}}}, "bad_release"),
    ({"release": {"helper": "/opt/absent.pyz"}, "name": "unhelped"}, "helper_missing"),
    ({"release": {"keep": 0}}, "bad_release"),
]


@pytest.mark.parametrize(("other", "code"), BAD, ids=[row[1] for row in BAD])
def test_bad_input_is_refused_and_the_service_left_alone(
    controller: Controller, any_host: Any, other: dict[str, Any], code: str
) -> None:
    host = any_host
    pid = main_pid(host)
    result, _ = controller.call("release", **arguments(**other))
    assert (result["failed"], result["code"]) == (True, code)
    assert result["remedy"]
    assert main_pid(host) == pid


def test_a_manifest_section_is_replaced_whole(controller: Controller) -> None:
    content = {"paths": ["/opt/fleetfit/portal"], "units": ["portal.service"], "users": [], "port": PORT}
    host = controller.host
    checked, _ = controller.call("manifest_section", "--check", name="portal", content=content)
    assert checked["changed"]
    assert host.run_raw("test", "-e", "/etc/fleetfit/manifest.json").returncode == 1
    assert controller.call("manifest_section", name="portal", content=content)[0]["changed"]
    assert not controller.call("manifest_section", name="portal", content=content)[0]["changed"]
    assert host.run("stat", "-c", "%a %U", "/etc/fleetfit/manifest.json") == "600 root\n"
    controller.call("manifest_section", name="other", content={"units": ["x.service"]})
    fewer, _ = controller.call("manifest_section", name="portal", content={"units": []})
    assert fewer["previous"] == content
    document = json.loads(host.run("cat", "/etc/fleetfit/manifest.json"))
    assert document == {
        "schema_version": 1,
        "sections": {"other": {"units": ["x.service"]}, "portal": {"units": []}},
    }
    assert controller.call("manifest_section", name="portal", state="absent")[0]["changed"]
    bad, _ = controller.call(
        "manifest_section", name="portal", content={"paths": ["/opt/fleetfit/../../etc"]}
    )
    assert (bad["failed"], bad["code"]) == (True, "bad_section")
