"""A service goes from release to release on a real systemd host, whatever happens on the way."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

ENGINE = Path(__file__).parent / "data" / "engine.py"
PORT = 8080
KEY_FILE = "/etc/fleetfit/credentials/engine.api-key"
JOURNAL = "/var/lib/fleetfit/switch/engine.json"
UNIT = """\
[Unit]
Description=Engine of the tests
Wants=fleetfit-recover.service
After=fleetfit-recover.service
StartLimitIntervalSec=0
[Service]
Type=exec
User=fleetfit-llama
ExecStart=/opt/fleetfit/engine/current/run
LoadCredential=api-key:/etc/fleetfit/credentials/engine.api-key
Restart=on-failure
RestartSec=1
ProtectSystem=strict
NoNewPrivileges=yes
TimeoutStopSec=10
[Install]
WantedBy=multi-user.target
"""
# Runs in the host: writes the release that its argument describes and does what `act` says with it.
DRIVER = """
from fleetfit_host import switch
from fleetfit_host.manifest import HostPaths
from fleetfit_host.release import ReleaseSpec, write_release, current_digest
paths = HostPaths()
wanted = json.loads(sys.argv[1])
act = sys.argv[2]
written = write_release(ReleaseSpec(**wanted), paths)
journal = switch.request(paths, "engine", written.digest, kind=sys.argv[3])
if act == "run":
    switch.launch("engine", helper=%r)
    journal = switch.wait_end(paths, "engine", helper=%r)
print(json.dumps(journal))
"""


def spec(mode: str = "ok", **other: Any) -> dict[str, Any]:
    """Return a release of the test engine."""
    options = {"n_ctx": 1024, "slots": 2, "load_s": 0.0, "name": mode, "timeout_s": 4, **other}
    gate = {
        "kind": "llama_cpp",
        "url": f"http://127.0.0.1:{PORT}",
        "credential": KEY_FILE,
        "model": options["name"],
        "timeout_s": options["timeout_s"],
    }
    return {
        "service": "engine",
        "environment": "/opt/fleetfit/engine/envs/one",
        "links": {"model": "/var/lib/fleetfit/models/m/q"},
        "settings": {"n_ctx": 2048, "slots": 2},
        "argv": [
            "{release}/env/bin/engine",
            f"--mode={mode}",
            f"--port={PORT}",
            "--api-key-file",
            "{credentials}/api-key",
            f"--n-ctx={options['n_ctx']}",
            f"--slots={options['slots']}",
            f"--load-s={options['load_s']}",
            f"--name={options['name']}",
            f"--echo={options.get('echo', '')}",
        ],
        "restart_on": ["/etc/systemd/system/engine.service", KEY_FILE],
        "gate": {**gate, **other.get("gate", {})},
        **other.get("release", {}),
    }


class Engine:
    """The engine's host as the tests see it."""

    def __init__(self, host: Any) -> None:
        self.host = host

    def drive(self, wanted: dict[str, Any], act: str = "run", kind: str = "switch") -> dict[str, Any]:
        """Write a release and request (or run) the transaction; return its journal."""
        helper = "/opt/fleetfit/libexec/current/fleetfit-host.pyz"
        return self.host.python(DRIVER % (helper, helper), json.dumps(wanted), act, kind)

    def serving(self) -> str | None:
        """Return the name of the release that answers now, None if nothing does."""
        done = self.host.run_raw("curl", "-s", "-m", "3", f"http://127.0.0.1:{PORT}/mode")
        return json.loads(done.stdout)["name"] if done.stdout else None

    def journal(self) -> dict[str, Any]:
        """Return the journal on disk."""
        return json.loads(self.host.run("cat", JOURNAL))

    def current(self) -> str:
        """Return what the link `current` points to, checking that it does not dangle; empty if there is none."""
        script = "l=/opt/fleetfit/engine/current; [ ! -L $l ] || { readlink $l && test -x $l/run; }"
        return self.host.run("sh", "-c", script).strip().removeprefix("releases/")

    def helper(self, *arguments: str, fault: str = "") -> subprocess.CompletedProcess[str]:
        """Run the helper in the host, in the foreground."""
        return self.host.run_raw(
            "/opt/fleetfit/libexec/current/fleetfit-host.pyz",
            *arguments,
            environ={"FLEETFIT_FAULT": fault} if fault else None,
        )

    def wait_for(self, what: Any, seconds: float = 20) -> None:
        """Wait until ``what()`` is true."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def prepared(systemd_host: Any) -> Any:
    host = systemd_host
    host.run("useradd", "--system", "--no-create-home", "fleetfit-llama")
    host.put("/opt/fleetfit/engine/envs/one/bin/engine", ENGINE.read_bytes(), "0755")
    host.put("/opt/fleetfit/engine/envs/unused/bin/engine", "x", "0755")
    host.run("mkdir", "-p", "/var/lib/fleetfit/models/m/q")
    host.put("/etc/systemd/system/engine.service", UNIT)
    host.run(
        "python3",
        "-c",
        (
            "import sys; sys.path.insert(0, '/opt/fleetfit/libexec/current/fleetfit-host.pyz');"
            "from fleetfit_host.switch import RECOVER_UNIT_TEXT as t;"
            "open('/etc/systemd/system/fleetfit-recover.service','w').write(t)"
        ),
    )
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "enable", "engine.service", "fleetfit-recover.service")
    return host


@pytest.fixture
def engine(prepared: Any) -> Engine:
    """Return the host without any release of the engine."""
    script = (
        "systemctl stop fleetfit-switch-engine.service engine.service 2>/dev/null; "
        "systemctl reset-failed; systemctl unset-environment FLEETFIT_FAULT; "
        "rm -rf /opt/fleetfit/engine/current /opt/fleetfit/engine/releases /var/lib/fleetfit/switch"
    )
    prepared.run("sh", "-c", script)
    prepared.put(KEY_FILE, "canary-key-1234\n", "0600")
    return Engine(prepared)


def test_first_install_then_another_release(engine: Engine) -> None:
    first = engine.drive(spec(name="first"))
    assert (first["state"], first["from"]) == ("committed", None), first["gate"]
    assert first["gate"]["ok"]
    assert first["gate"]["answer"].startswith("Paris")
    assert first["gate"]["first_token_s"] >= 0
    assert first["gate"]["measured"]["CUDA0"] == {
        "model": round(100.5 * 2**20),
        "kv": 24 * 2**20,
        "compute": round(50.25 * 2**20),
    }
    assert engine.serving() == "first"
    second = engine.drive(spec(name="second"))
    assert (second["state"], second["from"]) == ("committed", first["to"])
    assert engine.serving() == "second"
    assert engine.current() == second["to"]


BROKEN = [
    ("dies", {}, "crashed"),
    ("oom", {}, "out_of_memory"),
    ("crash", {}, "crashed"),
    ("never_healthy", {}, "hung"),
    ("hangs", {}, "hung"),
    ("wrong", {}, "wrong_answer"),
    ("empty", {}, "wrong_answer"),
    ("forever", {"gate": {"max_timeout_s": 6}}, "loading"),
    ("ok", {"slots": 1, "name": "one-slot"}, "wrong_settings"),
    ("ok", {"n_ctx": 512, "name": "short"}, "wrong_settings"),
]


@pytest.mark.parametrize(("mode", "other", "state"), BROKEN, ids=lambda value: str(value))
def test_broken_release_is_taken_back(engine: Engine, mode: str, other: dict[str, Any], state: str) -> None:
    good = engine.drive(spec(name="good"))
    bad = engine.drive(spec(mode, **other))
    assert bad["gate"]["state"] == state, bad["gate"]
    assert (bad["state"], bad["cause"]["state"]) == ("reverted", state)
    assert engine.serving() == "good"
    assert engine.current() == good["to"]
    assert bad["gate"]["log_tail"]
    assert "canary-key" not in engine.host.run("cat", JOURNAL)
