"""A service goes from release to release on a real systemd host, whatever happens on the way."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.llama_cpp import fit_precheck
from ansible_collections.fleetfit.llm.plugins.module_utils.plan import plan_host
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import policy_from_variables
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_catalog

from fleetfit.lab.engine import ensure_engine
from fleetfit.lab.model import MODEL, base_file

ROOT = Path(__file__).parents[2]
ENGINE = Path(__file__).parent / "data" / "engine.py"
HELPER = "/opt/fleetfit/libexec/current/fleetfit-host.pyz"
PORT = 8080
KEY = "canary-key-1234"
KEY_FILE = "/etc/fleetfit/credentials/engine.api-key"
JOURNAL = "/var/lib/fleetfit/switch/engine.json"
DATA = "/var/lib/fleetfit/engine/data"
HANGING = ("never_healthy", "stubborn", "hangs", "forever", "long_hang")
PROMPTS = "/var/lib/fleetfit/engine/prompts"
MIB = 2**20
PLANNED = {
    "weights": 100 * MIB,
    "kv_cache": 24 * MIB,
    "compute": 60 * MIB,
    "overhead": 50 * MIB,
    "margin": 512 * MIB,
    "total": 746 * MIB,
    "budget": 800 * MIB,
}
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
LogNamespace=engine
ProtectSystem=strict
ReadWritePaths=/var/lib/fleetfit/engine
NoNewPrivileges=yes
TimeoutStopSec=10
[Install]
WantedBy=multi-user.target
"""
# Runs in the host: writes the release that its argument describes, requests its transaction and, if it is to,
# runs it.
DRIVER = f"""
from fleetfit_host import switch
from fleetfit_host.manifest import HostPaths
from fleetfit_host.release import ReleaseSpec, write_release
paths = HostPaths()
journal = None
if sys.argv[1] != "null":
    written = write_release(ReleaseSpec(**json.loads(sys.argv[1])), paths)
    journal = switch.request(paths, "engine", written.digest)
if sys.argv[2] == "run":
    switch.launch("engine", helper={HELPER!r})
    journal = switch.wait_end(paths, "engine", helper={HELPER!r})
print(json.dumps(journal))
"""
AGAIN = f"""
from fleetfit_host import switch
from fleetfit_host.manifest import HostPaths
paths = HostPaths()
switch.request(paths, "engine", sys.argv[1], kind="restart")
switch.launch("engine", helper={HELPER!r})
print(json.dumps(switch.wait_end(paths, "engine", helper={HELPER!r})))
"""
FIT_PARAMS = '#!/bin/sh\necho "CUDA0 $1 200 100 "\necho "Host 10 20 30 "\n'


def spec(mode: str = "ok", **other: Any) -> dict[str, Any]:
    """Return a release of the test engine."""
    options = {"n_ctx": 1024, "slots": 2, "load_s": 0.0, "name": mode, "state": "", **other}
    # Short where the time is to pass; a machine under load takes its time over everything else.
    options = {"prefill_per_s": 1e6, "timeout_s": 3 if mode in HANGING else 30, **options}
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
            f"--state={options['state']}",
            f"--prefill-per-s={options['prefill_per_s']}",
            f"--prompts={PROMPTS}",
        ],
        "plan": {"deployments": [{"devices": [{"id": "GPU-a", "name": "Card A", **PLANNED}], "host": {}}]},
        "restart_on": ["/etc/systemd/system/engine.service", KEY_FILE],
        "gate": {**gate, **other.get("gate", {})},
        **other.get("release", {}),
    }


def precheck(model_mib: int, limit_mib: int = 1000) -> dict[str, Any]:
    """Return a check in which the engine's own accounting is ``model_mib`` and 300 MiB on top."""
    limits = {"CUDA0": limit_mib * 2**20, "Host": 2**30}
    argv = ["{release}/env/bin/fit-params", str(model_mib)]
    return {"kind": "llama_fit_params", "argv": argv, "limits": limits}


def thorough(mode: str, name: str, **other: Any) -> dict[str, Any]:
    """Return a release whose switch has every step, and that changes the service's data when it starts."""
    backup = {"kind": "directory", "path": DATA}
    # Not proven before: each one is another release.
    environ = {"TEST_RELEASE": uuid.uuid4().hex}
    steps = {"precheck": precheck(100), "backup": backup, "environ": environ}
    return spec(mode, name=name, state=f"{DATA}/version", release=steps, **other)


class Engine:
    """The engine's host as the tests see it."""

    def __init__(self, host: Any) -> None:
        self.host = host

    def drive(self, wanted: dict[str, Any] | None, act: str = "run") -> dict[str, Any]:
        """Write a release and request (or run) the transaction; return its journal."""
        result: dict[str, Any] = self.host.python(DRIVER, json.dumps(wanted), act)
        return result

    def answer(self) -> dict[str, Any] | None:
        """Return what the engine says about itself, None if nothing answers."""
        done = self.host.run_raw("curl", "-s", "-m", "3", f"http://127.0.0.1:{PORT}/mode")
        return json.loads(done.stdout) if done.stdout else None

    def serving(self) -> str | None:
        """Return the name of the release that answers now, None if nothing does."""
        answer = self.answer()
        return answer["name"] if answer else None

    def journal(self) -> dict[str, Any]:
        """Return the journal on disk."""
        document: dict[str, Any] = json.loads(self.host.run("cat", JOURNAL))
        return document

    def current(self) -> str:
        """Return what `current` points to, checking that it does not dangle; empty if there is no link."""
        script = "l=/opt/fleetfit/engine/current; [ ! -L $l ] || { readlink $l && test -x $l/run; }"
        return str(self.host.run("sh", "-c", script)).strip().removeprefix("releases/")

    def switch(self, fault: str) -> subprocess.CompletedProcess[str]:
        """Run the transaction in the foreground, to be killed at ``fault``."""
        done: subprocess.CompletedProcess[str] = self.host.run_raw(
            HELPER, "switch", "--service=engine", environ={"FLEETFIT_FAULT": fault}
        )
        return done

    def data(self) -> str:
        """Return the version that the service's data has."""
        return str(self.host.run("cat", f"{DATA}/version"))

    def wait_for(self, what: Callable[[], bool], seconds: float = 30) -> None:
        """Wait until ``what()`` is true."""
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.2)


def prepare(host: Any) -> Any:
    """Give the host the unit, its user and its programs, as the roles leave them; return the host."""
    host.run("useradd", "--system", "--no-create-home", "fleetfit-llama")
    host.put("/opt/fleetfit/engine/envs/one/bin/engine", ENGINE.read_bytes(), "0755")
    host.put("/opt/fleetfit/engine/envs/one/bin/fit-params", FIT_PARAMS, "0755")
    host.run("mkdir", "-p", "/var/lib/fleetfit/models/m/q")
    host.put("/etc/systemd/system/engine.service", UNIT)
    template = (ROOT / "roles/host_baseline/templates/fleetfit-recover.service.j2").read_text()
    host.put("/etc/systemd/system/fleetfit-recover.service", template.partition("\n")[2])
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "enable", "engine.service", "fleetfit-recover.service")
    return host


@pytest.fixture(scope="module")
def prepared(systemd_host: Any) -> Any:
    """Return a prepared host in a container."""
    return prepare(systemd_host)


def clear(host: Any) -> Engine:
    """Return the host without any release of the engine."""
    script = (
        "systemctl stop fleetfit-switch-engine.service engine.service 2>/dev/null; "
        "systemctl reset-failed; systemctl unset-environment FLEETFIT_FAULT; "
        "rm -rf /opt/fleetfit/engine/current /opt/fleetfit/engine/releases /var/lib/fleetfit/switch "
        f"/var/lib/fleetfit/backups; mkdir -p {DATA}; chown -R fleetfit-llama: {DATA}; "
        f"install -o fleetfit-llama /dev/null {PROMPTS}"
    )
    host.run("sh", "-c", script)
    host.put(KEY_FILE, KEY + "\n", "0600")
    return Engine(host)


@pytest.fixture
def engine(prepared: Any) -> Iterator[Engine]:
    """Return the host without any release of the engine."""
    yield clear(prepared)
    prepared.run("systemctl", "unset-environment", "FLEETFIT_FAULT")


@pytest.fixture
def serving_old(prepared: Any) -> Engine:
    """Return the host with a release that serves; one that an earlier test left serving will do."""
    engine = Engine(prepared)
    script = f"grep -qs . {DATA}/version && cat {DATA}/version; systemctl is-active engine.service"
    if prepared.run("sh", "-c", script, check=False).split() != ["old", "active"]:
        clear(prepared)
        assert engine.drive(thorough("ok", "old"))["state"] == "committed"
    return engine


def test_first_install_then_another_release(engine: Engine) -> None:
    first = engine.drive(spec(name="first"))
    assert (first["state"], first["from"]) == ("committed", None)
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
    assert (engine.serving(), engine.current()) == ("second", second["to"])


OTHER_ENGINE = """\
[Service]
Type=exec
ExecStart=/bin/sleep infinity
[Install]
WantedBy=multi-user.target
"""


@pytest.fixture
def other_engine(engine: Engine) -> Iterator[Engine]:
    """Return the host with another engine that runs, and starts at boot."""
    engine.host.put("/etc/systemd/system/other-engine.service", OTHER_ENGINE)
    engine.host.run("systemctl", "daemon-reload")
    engine.host.run("systemctl", "enable", "--now", "other-engine.service")
    yield engine
    engine.host.run("systemctl", "disable", "--now", "other-engine.service")
    engine.host.run("systemctl", "enable", "engine.service")


def states(host: Any, unit: str) -> tuple[str, str]:
    """Return whether a unit is active and whether it starts at boot."""
    active = host.run("systemctl", "is-active", unit, check=False).strip()
    return active, host.run("systemctl", "is-enabled", unit, check=False).strip()


def test_an_engine_that_cannot_run_beside_this_one_gives_way(other_engine: Engine) -> None:
    journal = other_engine.drive(spec(release={"conflicts": ["other-engine", "not-installed"]}))
    assert (journal["state"], journal["displaced"]) == ("committed", ["other-engine"])
    assert states(other_engine.host, "other-engine") == ("inactive", "disabled")
    assert states(other_engine.host, "engine") == ("active", "enabled")


@pytest.mark.parametrize("fault", [None, "after:stop", "before:revert_displaced", "after:revert_displaced"])
def test_an_engine_that_gave_way_in_vain_serves_again(other_engine: Engine, fault: str | None) -> None:
    wanted = spec("dies", release={"conflicts": ["other-engine"]})
    if fault is None:
        journal = other_engine.drive(wanted)
    else:
        other_engine.drive(wanted, "request")
        assert other_engine.switch(fault).returncode != 0
        # The boot unit may have begun with it already: the engine's start wants that unit.
        assert other_engine.host.run_raw(HELPER, "recover", "--wait").returncode == 0
        other_engine.wait_for(lambda: other_engine.journal()["state"] != "running")
        journal = other_engine.journal()
    assert journal["state"] == "reverted"
    other_engine.wait_for(lambda: states(other_engine.host, "other-engine") == ("active", "enabled"))
    assert states(other_engine.host, "engine")[1] == "disabled"


def test_ready_asks_a_service_that_runs(engine: Engine) -> None:
    engine.drive(spec(name="asked"))
    done = engine.host.run_raw(HELPER, "ready", "--service=engine", "--json")
    result = json.loads(done.stdout)
    assert (done.returncode, result["state"], result["release"]) == (0, "ready", engine.current())
    engine.host.run("systemctl", "stop", "engine.service")
    done = engine.host.run_raw(HELPER, "ready", "--service=engine")
    assert (done.returncode, done.stdout) == (1, "crashed: the unit is not running\n")


def test_the_memory_of_a_release_is_proven_once(engine: Engine) -> None:
    first = engine.drive(spec(name="first"))
    proof = first["gate"]["proof"]
    assert (proof["ok"], proof["shortened"], proof["of_tokens"]) == (True, False, 1024)
    assert (proof["slots"], proof["of_slots"]) == (2, 2)
    assert 980 < proof["prompt_tokens"] <= 1024
    assert "memory proven: 2 prompts of" in first["gate"]["message"]
    assert [step["step"] for step in first["steps"]][-3:] == ["gate", "prove", "record"]

    def longest() -> int:
        found = max(int(line) for line in engine.host.run("cat", PROMPTS).split())
        engine.host.run("truncate", "--size=0", PROMPTS)
        return found

    assert longest() > 980
    again = engine.host.python(AGAIN, first["to"])
    assert (again["kind"], again["state"], again["gate"]["proof"]) == ("restart", "committed", proof)
    assert "prove" not in [step["step"] for step in again["steps"]]
    assert longest() < 100
    # Nor does the way back to it: its outage is not made longer.
    assert engine.drive(spec("wrong", name="second"))["revert_gate"]["proof"] == proof
    assert longest() < 100
    done = engine.host.run_raw(HELPER, "ready", "--service=engine")
    assert "memory proven: 2 prompts of" in done.stdout
    assert longest() < 100
    assert engine.host.run_raw(HELPER, "ready", "--service=engine", "--prove").returncode == 0
    assert longest() > 980


def test_a_slow_engine_is_proven_in_part_and_it_is_called_so(engine: Engine) -> None:
    journal = engine.drive(spec(name="slow", prefill_per_s=200, gate={"proof_s": 3}))
    proof = journal["gate"]["proof"]
    assert (journal["state"], proof["shortened"], proof["slots"]) == ("committed", True, 1)
    assert 500 < proof["prompt_tokens"] <= 600
    assert "memory proven in part" in journal["gate"]["message"]


def test_what_a_start_takes_is_recorded(engine: Engine) -> None:
    engine.drive(spec(name="first"))
    engine.drive(spec(name="second", load_s=2))
    script = "from fleetfit_host import switch\nfrom fleetfit_host.manifest import HostPaths\n"
    good = engine.host.python(script + "print(json.dumps(switch.read_good(HostPaths(), 'engine')))")
    assert good["last_start"]["digest"] == engine.current()
    assert 2 <= good["last_start"]["ready_s"] < 6
    assert 0 <= good["last_start"]["stop_s"] < 5


def test_an_engine_that_loads_longer_than_its_timeout_but_moves_is_waited_for(engine: Engine) -> None:
    journal = engine.drive(spec(name="slow", load_s=5, timeout_s=2))
    assert (journal["state"], engine.serving()) == ("committed", "slow")


BROKEN = [
    ("dies", {}, "crashed", "status="),
    ("oom", {}, "out_of_memory", "allocating 6144.00 MiB on device 0: out of memory"),
    ("crash", {}, "crashed", "status=3"),
    ("never_healthy", {}, "hung", "nothing new in its log for 3 s"),
    # It does not end when it is asked to, and its unit would give it 10 s more.
    ("stubborn", {}, "hung", "nothing new in its log for 3 s"),
    ("hangs", {}, "hung", "did not finish a short completion in 3 s"),
    ("wrong", {}, "wrong_answer", "Berlin"),
    ("empty", {}, "wrong_answer", "empty"),
    ("forever", {"gate": {"max_timeout_s": 5}}, "loading", "still loading after 5 s"),
    ("long_oom", {}, "out_of_memory", "failed at a long one of"),
    ("long_hang", {}, "hung", "did not finish a long prompt in 3 s"),
    ("long_refused", {}, "wrong_settings", "its settings give each slot 1,024"),
    ("long_cut", {}, "wrong_settings", "it cuts prompts"),
    ("ok", {"slots": 1, "name": "one-slot"}, "wrong_settings", "1 slots, its settings say 2"),
    ("ok", {"n_ctx": 512, "name": "short"}, "wrong_settings", "512 tokens, its settings give 1024"),
]


@pytest.mark.parametrize(
    ("mode", "other", "state", "cause"),
    BROKEN,
    ids=[f"{row[2]}-{row[1].get('name', row[0])}" for row in BROKEN],
)
def test_a_broken_release_is_taken_back(
    engine: Engine, mode: str, other: dict[str, Any], state: str, cause: str
) -> None:
    good = engine.drive(spec(name="good"))
    bad = engine.drive(spec(mode, **other))
    assert bad["gate"]["state"] == state, bad["gate"]
    assert (bad["state"], bad["cause"]["state"]) == ("reverted", state)
    assert cause in bad["cause"]["message"]
    assert bad["cause"]["step"] == ("prove" if mode.startswith("long_") else "gate")
    if state == "out_of_memory":
        assert (
            "Planned for Card A: weights 100 MiB + kv_cache 24 MiB + compute 60 MiB"
            in bad["cause"]["message"]
        )
        assert "= 746 MiB of 800 MiB. The engine logged" in bad["cause"]["message"]
        assert bad["gate"]["planned"][0]["budget"] == 800 * MIB
    assert (engine.serving(), engine.current()) == ("good", good["to"])
    assert bad["gate"]["log_tail"]
    times = {step["step"]: step["at"] for step in bad["steps"]}
    # The old release starts soon after the verdict, which is when the way back begins.
    assert bad["started_at"] - times["revert_stop"] < 5
    assert bad["started_at"] > times["revert_start"]
    assert KEY not in engine.host.run("cat", JOURNAL)


def test_a_port_that_somebody_else_holds_is_named(engine: Engine) -> None:
    server = ["--unit=stranger", "python3", "-m", "http.server", "--bind", "127.0.0.1", str(PORT)]
    engine.host.run("systemd-run", "--quiet", *server)
    try:
        journal = engine.drive(spec(name="first"))
    finally:
        engine.host.run("systemctl", "stop", "stranger.service")
    assert (journal["state"], journal["gate"]["state"]) == ("reverted", "port_in_use")
    assert engine.current() == ""
    assert engine.host.show("engine.service", "ActiveState") == "inactive"


def test_what_does_not_fit_by_the_engines_own_accounting_is_not_tried(engine: Engine) -> None:
    engine.drive(spec(name="good"))
    pid = engine.host.show("engine.service", "MainPID")
    journal = engine.drive(spec(name="big", release={"precheck": precheck(701)}))
    assert journal["state"] == "refused"
    assert "1001 MiB on CUDA0" in journal["cause"]["message"]
    assert "allows 1000 MiB" in journal["cause"]["message"]
    assert journal["precheck"]["reported"]["CUDA0"] == 1001 * 2**20
    assert (engine.serving(), engine.host.show("engine.service", "MainPID")) == ("good", pid)
    assert engine.drive(spec(name="big", release={"precheck": precheck(700)}))["state"] == "committed"


def lab_plan() -> tuple[dict[str, Any], Path]:
    """Return the plan of the lab's model for a host without cards, and the model's file."""
    entry = load_catalog().entry(MODEL)
    facts = {
        "schema_version": 1,
        "stable": {"machine_id": "0" * 32, "ram_total_bytes": 8 * 2**30, "cpu": {"threads": 2}},
    }
    policy = policy_from_variables({"fleetfit_model": MODEL, "fleetfit_min_quality_tier": "rest"})
    catalog = load_catalog()
    plan = plan_host(
        facts,
        policy,
        entry=replace(entry, variants=(entry.variant("Q4_1"),)),
        gpus=catalog.gpus,
        engines=catalog.engines,
        available_engines=frozenset({"llama_cpp"}),
    )
    return plan["deployments"][0], base_file().path


def test_llama_cpp_itself_refuses_a_plan_that_is_too_small(engine: Engine) -> None:
    """The real llama-fit-params, with the plan's own arguments and limits, before the old engine stops."""
    deployment, model = lab_plan()
    host = engine.host
    tool = ensure_engine().bin_dir / "llama-fit-params"
    host.put("/opt/fleetfit/engine/envs/one/bin/llama-fit-params", tool.read_bytes(), "0755")
    # The header is all that the tool reads; the rest of the file is a hole.
    reader = gguf.GGUFReader(model)
    path = f"/var/lib/fleetfit/models/m/q/{deployment['settings']['model_file']}"
    with model.open("rb") as stream:
        host.put(path, stream.read(reader.data_offset))
    host.run("truncate", f"--size={model.stat().st_size}", path)

    def check(terms: dict[str, int]) -> dict[str, Any]:
        return fit_precheck(
            deployment["settings"],
            devices=[],
            host=terms,
            binary="{release}/env/bin/llama-fit-params",
            model_path="{release}/model/" + deployment["settings"]["model_file"],
        )

    fits = engine.drive(spec(name="planned", release={"precheck": check(deployment["host"])}))
    assert fits["state"] == "committed", fits["cause"]
    reported = fits["precheck"]["reported"]["Host"]
    assert abs(fits["precheck"]["limits"]["Host"] - reported) <= 64 * 2**20
    pid = host.show("engine.service", "MainPID")

    # As if the cache had been forgotten.
    smaller = {**deployment["host"], "total": deployment["host"]["total"] - deployment["host"]["kv_cache"]}
    wanted = check(smaller)
    journal = engine.drive(spec(name="too-small", release={"precheck": wanted}))
    assert journal["state"] == "refused"
    assert journal["cause"]["step"] == "precheck"
    assert f"needs {reported // 2**20} MiB on Host" in journal["cause"]["message"]
    assert f"allows {wanted['limits']['Host'] // 2**20} MiB" in journal["cause"]["message"]
    assert (engine.serving(), host.show("engine.service", "MainPID")) == ("planned", pid)
    assert engine.current() == fits["to"]


def test_data_goes_back_with_the_release(engine: Engine) -> None:
    engine.drive(thorough("ok", "one"))
    engine.host.run("sh", "-c", f"echo chat > {DATA}/chat && chmod 0640 {DATA}/chat")
    before = engine.host.run("sh", "-c", f"cd {DATA} && stat -c '%n %U %a %s' . * && cat *")
    failed = engine.drive(thorough("wrong", "two"))
    assert failed["state"] == "reverted"
    assert engine.host.run("sh", "-c", f"cd {DATA} && stat -c '%n %U %a %s' . * && cat *") == before
    assert engine.drive(thorough("ok", "three"))["state"] == "committed"
    assert engine.data() == "three"


# Each step of a switch that succeeds, and which release serves once it was cut short there and recovered.
FORWARD = [
    *[
        (f"{moment}:{step}", "old")
        # A release that has answered and is not proven yet is no good one.
        for step in ("precheck", "stop", "backup", "flip", "start", "gate")
        for moment in ("before", "after")
    ],
    ("before:prove", "old"),
    ("after:prove", "new"),
    ("before:record", "new"),
    ("after:record", "new"),
]
# Each step on the way back from a release that is broken.
BACKWARD = [
    (f"{moment}:{step}", "old")
    for step in ("revert_stop", "revert_flip", "revert_backup", "revert_start", "revert_gate")
    for moment in ("before", "after")
]
# Its own unit starts the transaction again by itself; the boot unit and the next call find it dead.
WAYS = ("boot unit", "next call", "unit restart")


def recover(engine: Engine, way: str) -> dict[str, Any]:
    """Let the boot unit, or the next call, end the transaction; return its journal."""
    if way == "next call":
        return engine.drive(None)
    engine.host.run("systemctl", "restart", "fleetfit-recover.service")
    engine.current()  # whole as soon as the boot unit is through
    engine.wait_for(lambda: engine.journal()["state"] != "running")
    return engine.journal()


# Every step is cut once in a usual run, by turns before and after it is done; the rest in test-all.
CUTS = [
    pytest.param(
        fault,
        expected,
        way,
        marks=() if (number % 4, turn) in ((0, 0), (3, 1), (2, 2)) else pytest.mark.slow,
    )
    for number, (fault, expected) in enumerate([*FORWARD, *BACKWARD])
    for turn, way in enumerate(WAYS)
]


@pytest.mark.parametrize(("fault", "expected", "way"), CUTS)
def test_a_switch_that_is_killed_ends_with_a_release_that_serves(
    serving_old: Engine, fault: str, expected: str, way: str
) -> None:
    engine = serving_old
    old = engine.current()
    wanted = thorough("crash" if "revert" in fault else "ok", "new")
    if way == "unit restart":
        engine.host.run("systemctl", "set-environment", f"FLEETFIT_FAULT={fault}")
        try:
            ended = engine.drive(wanted)
        finally:
            engine.host.run("systemctl", "unset-environment", "FLEETFIT_FAULT")
        new = ended
    else:
        new = engine.drive(wanted, "request")
        assert engine.switch(fault).returncode == 137
        assert engine.current() in (old, new["to"])
        ended = recover(engine, way)
    assert ended["state"] in ("committed", "reverted", "refused")
    assert ended["faults"] == [fault]
    assert (engine.serving(), engine.data()) == (expected, expected)
    assert engine.current() == {"old": old, "new": new["to"]}[expected]
    assert engine.host.show("engine.service", "ActiveState") == "active"


def test_after_an_interruption_the_next_run_converges(engine: Engine) -> None:
    engine.drive(spec(name="old"))
    engine.drive(spec(name="new"), "request")
    engine.switch("after:start")
    engine.drive(None)
    assert engine.serving() == "old"
    assert engine.drive(spec(name="new"))["state"] == "committed"
    assert engine.serving() == "new"


def test_a_killed_transaction_is_started_again_by_systemd(engine: Engine) -> None:
    old = engine.drive(spec(name="old"))
    engine.host.run("systemctl", "set-environment", "FLEETFIT_FAULT=after:flip")
    journal = engine.drive(spec(name="new"))
    assert (journal["state"], journal["faults"]) == ("reverted", ["after:flip"])
    assert journal["cause"]["state"] == "interrupted"
    assert (engine.serving(), engine.current()) == ("old", old["to"])


def test_a_first_install_that_is_cut_short_leaves_nothing_behind(engine: Engine) -> None:
    engine.drive(spec(name="first"), "request")
    engine.switch("after:start")
    assert engine.drive(None)["state"] == "reverted"
    assert engine.current() == ""
    assert engine.host.show("engine.service", "ActiveState") == "inactive"


@pytest.mark.parametrize("fault", ["after:start", "after:revert_flip"])
def test_power_loss_is_repaired_at_boot(engine: Engine, fault: str) -> None:
    old = engine.drive(spec(name="old"))
    engine.drive(spec("wrong" if "revert" in fault else "ok", name="new"), "request")
    engine.switch(fault)
    engine.host.run("sync")
    engine.host.lose_power()
    engine.wait_for(lambda: engine.journal()["state"] != "running")
    assert engine.journal()["state"] == "reverted"
    assert (engine.serving(), engine.current()) == ("old", old["to"])


def test_a_transaction_that_cannot_go_on_ends(engine: Engine) -> None:
    old = engine.drive(spec(name="old"))
    new = engine.drive(spec(name="new"), "request")
    engine.host.run("rm", "-r", f"/opt/fleetfit/engine/releases/{new['to']}")
    journal = engine.drive(None)
    assert journal["state"] == "refused"
    assert "cannot be read" in journal["cause"]["message"]
    assert (engine.serving(), engine.current()) == ("old", old["to"])


RESTORE = f"""
from fleetfit_host import switch
from fleetfit_host.manifest import HostPaths
from fleetfit_host.release import current_digest
paths = HostPaths()
put_back = {{"source": {DATA!r}, "copy": "/var/lib/fleetfit/backups/engine/manual-1/data", "name": "manual-1"}}
digest = current_digest(paths, "engine")
journal = switch.request(paths, "engine", digest, kind="restore", put_back=put_back)
print(json.dumps(journal))
"""


@pytest.mark.parametrize(
    ("fault", "note"),
    [
        ("before:backup", "new"),
        ("after:backup", "new"),
        ("before:put_back", "new"),
        ("after:put_back", "new"),
        ("before:gate", "new"),
        ("before:record", "old"),
    ],
)
def test_a_restore_that_is_killed_ends_with_the_old_or_the_new_data(
    engine: Engine, fault: str, note: str
) -> None:
    digest = engine.drive(thorough("ok", "one"))["to"]
    engine.host.run(
        "sh",
        "-c",
        "mkdir -p /var/lib/fleetfit/backups/engine/manual-1 && cd /var/lib/fleetfit/backups/engine/manual-1 &&"
        f" cp -a {DATA} data && echo old > data/note && echo new > {DATA}/note",
    )
    assert engine.host.python(RESTORE)["kind"] == "restore"
    assert engine.switch(fault).returncode == 137
    ended = recover(engine, "next call")
    assert ended["state"] == ("committed" if note == "old" else "reverted")
    assert engine.host.run("cat", f"{DATA}/note").strip() == note
    assert (engine.serving(), engine.current()) == ("one", digest)
    # What was replaced is kept either way, once it was copied.
    kept = engine.host.run(
        "sh", "-c", "cat /var/lib/fleetfit/backups/engine/*/note 2>/dev/null || true"
    ).strip()
    assert kept == ("" if fault == "before:backup" else "new")
