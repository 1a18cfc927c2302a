"""Power is cut in a virtual machine: what was not on its disk is gone, and the next boot puts things right.

A container that is killed loses no file content, since the kernel that holds it lives on. Here QEMU is killed, so
that only what was synced survives for certain. The engine is the tests' stand-in: a real one takes minutes for an
answer under software emulation.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleetfit.lab.paths import LabPaths
from fleetfit.lab.vm import GATEWAY, VirtualMachine

from .helper_host import HELPER, HelperHost
from .test_release_switch import FORWARD, Engine, clear, prepare, spec, thorough

pytestmark = pytest.mark.slow

ORIGIN = Path(__file__).parent / "data" / "origin.py"
# Looks at `current` before anything of ours has run after a power loss.
WITNESS = """\
[Unit]
After=local-fs.target
RequiresMountsFor=/opt/fleetfit
Before=fleetfit-recover.service engine.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'cd /opt/fleetfit/engine && grep -q . current/run && readlink current > /run/current-at-boot'
[Install]
WantedBy=multi-user.target
"""
REQUEST_AND_LAUNCH = f"""
from fleetfit_host import switch
from fleetfit_host.manifest import HostPaths
from fleetfit_host.release import ReleaseSpec, write_release
paths = HostPaths()
written = write_release(ReleaseSpec(**json.loads(sys.argv[1])), paths)
switch.request(paths, "engine", written.digest)
switch.launch("engine", helper={HELPER!r})
print(json.dumps(written.digest))
"""
# Runs in the host: starts a download job, or goes on with it to its end.
DOWNLOAD = """
import subprocess
from fleetfit_host.artifact import Settings, parse_artifacts
from fleetfit_host.download_job import Jobs
def run(argv):
    done = subprocess.run(argv, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr
jobs = Jobs("/run/fleetfit-downloads", "/opt/fleetfit/libexec", run)
job = jobs.start(parse_artifacts(json.loads(sys.argv[1])), Settings(bandwidth_limit_bytes_per_s=int(sys.argv[2])))
if sys.argv[3] == "wait":
    while jobs.state(job).running:
        jobs.wait(job, 60)
print(json.dumps({"outcomes": jobs.state(job).outcomes, "error": jobs.state(job).error}))
"""
# In the host: path -> sha256 of each file below a directory.
HASHES = """
import hashlib, os
found = {}
for place, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = os.path.join(place, name)
        found[os.path.relpath(path, sys.argv[1])] = hashlib.sha256(open(path, "rb").read()).hexdigest()
print(json.dumps(found))
"""
# Emulated programs are slow: what counts as "nothing new in its log" has to be longer than in a container.
PATIENT = {"timeout_s": 60}


class Guest(VirtualMachine, HelperHost):
    """A virtual machine with the host helper."""


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """Yield a machine that is prepared as the roles leave one."""
    with Guest("power", LabPaths(tmp_path_factory.mktemp("vm"))) as machine:
        machine.install_helper()
        prepare(machine)
        machine.put("/etc/systemd/system/witness.service", WITNESS)
        machine.run("systemctl", "enable", "witness.service")
        yield machine


@pytest.fixture
def serving_old(guest: Guest) -> Engine:
    """Return the machine with a release `old` serving, all of it on disk: as one that has run for a while."""
    engine = Engine(guest)
    if not engine.current():
        clear(guest)
    if engine.serving() == "old" and engine.data() == "old":
        guest.run("sync")
        return engine
    journal = engine.drive(thorough("ok", "old", **PATIENT))
    assert journal["state"] == "committed", journal["cause"]
    guest.run("sync")
    return engine


def after_the_boot(engine: Engine, old: str, new: str) -> dict[str, Any]:
    """Check what must hold after each power loss; return the journal of the transaction that was cut short."""
    host = engine.host
    assert host.run("cat", "/run/current-at-boot").strip() in (f"releases/{old}", f"releases/{new}")
    # A transaction that never reached the disk leaves the journal of the one before.
    engine.wait_for(lambda: engine.journal()["state"] != "running", 180)
    journal = engine.journal()
    assert journal["state"] in ("committed", "reverted", "refused"), journal
    engine.wait_for(lambda: engine.serving() is not None, 60)
    name = {old: "old", new: "new"}[engine.current()]
    # Code and data belong together, whichever it is.
    assert (engine.serving(), engine.data()) == (name, name)
    return journal


def converge(engine: Engine, wanted: dict[str, Any], new: str) -> None:
    """Check that the next run reaches the release that was wanted."""
    if engine.current() != new:
        journal = engine.drive(wanted)
        assert (journal["state"], journal["to"]) == ("committed", new), journal["cause"]
    assert (engine.serving(), engine.data(), engine.current()) == ("new", "new", new)


# The steps between which most can go wrong: data copied, link renamed, migrated data, verdict, record.
STEPS = ("after:backup", "after:flip", "after:start", "after:prove", "after:record", "after:revert_backup")


@pytest.mark.parametrize("fault", STEPS)
def test_power_lost_at_a_step_of_a_switch(serving_old: Engine, fault: str) -> None:
    engine = serving_old
    old = engine.current()
    wanted = thorough("crash" if "revert" in fault else "ok", "new", **PATIENT)
    new = engine.drive(wanted, "request")["to"]
    assert engine.switch(fault).returncode == 137
    engine.host.lose_power()
    journal = after_the_boot(engine, old, new)
    assert journal["faults"] == [fault]
    assert engine.serving() == dict(FORWARD).get(fault, "old")
    if "revert" not in fault:
        converge(engine, wanted, new)


@pytest.mark.parametrize("seconds", [1, 4, 9])
def test_power_lost_at_any_time_of_a_switch(serving_old: Engine, seconds: float) -> None:
    engine = serving_old
    old = engine.current()
    wanted = thorough("ok", "new", load_s=3, **PATIENT)
    new = engine.host.python(REQUEST_AND_LAUNCH, json.dumps(wanted))
    time.sleep(seconds)
    engine.host.lose_power()
    journal = after_the_boot(engine, old, new)
    print(f"cut {seconds} s after the start, at the step {journal['step']}: {engine.serving()} serves")
    converge(engine, wanted, new)


def test_power_lost_twice(serving_old: Engine) -> None:
    """The recovery itself loses power."""
    engine = serving_old
    old = engine.current()
    wanted = thorough("ok", "new", **PATIENT)
    new = engine.drive(wanted, "request")["to"]
    assert engine.switch("after:start").returncode == 137
    engine.host.lose_power()
    engine.host.lose_power()
    after_the_boot(engine, old, new)
    assert engine.serving() == "old"
    converge(engine, wanted, new)


def test_power_lost_while_a_first_release_starts(guest: Guest) -> None:
    engine = clear(guest)
    guest.run("sync")
    engine.drive(spec(name="first", **PATIENT), "request")
    assert engine.switch("after:start").returncode == 137
    guest.lose_power()
    engine.wait_for(lambda: engine.journal()["state"] != "running", 180)
    assert (engine.journal()["state"], engine.current(), engine.serving()) == ("reverted", "", None)
    assert engine.drive(spec(name="first", **PATIENT))["state"] == "committed"


# --- artifacts


def make_tree() -> dict[str, bytes]:
    """Return the files of an archive: enough of them that unpacking takes a while."""
    source = random.Random(11)  # noqa: S311
    return {f"tree/part{n % 7}/file{n}": source.randbytes(30_000) for n in range(400)}


class Origin:
    """A file server on this machine that the guest reaches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = make_tree()
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, content in self.tree.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        self.files = {"model.gguf": random.Random(12).randbytes(12_000_000), "tree.tar": buffer.getvalue()}  # noqa: S311
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        argv = [sys.executable, str(ORIGIN), str(self.port), str(folder), str(folder / "log")]
        self.process = subprocess.Popen(argv)

    def entry(self, name: str, unpack: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return an artifact's description, its place below /var/lib/fleetfit/test."""
        return {
            "name": name,
            "size": len(self.files[name]),
            "sha256": hashlib.sha256(self.files[name]).hexdigest(),
            "dest": f"/var/lib/fleetfit/test/{name}",
            "unpack": unpack,
            "sources": [{"type": "http", "url": f"http://{GATEWAY}:{self.port}/{name}"}],
        }


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    """Yield the file server."""
    server = Origin(tmp_path_factory.mktemp("origin"))
    yield server
    server.process.kill()
    server.process.wait()


def fetch(guest: Guest, entry: dict[str, Any], act: str, limit_bytes_per_s: int = 0) -> dict[str, Any]:
    """Start a download job, or run it to its end; return the artifact's outcome."""
    result = guest.python(DOWNLOAD, json.dumps([entry]), str(limit_bytes_per_s), act, timeout_s=600)
    assert result["error"] is None
    return dict(result["outcomes"].get(entry["dest"], {}))


@pytest.mark.parametrize("seconds", [3, 8])
def test_power_lost_in_the_middle_of_a_download(guest: Guest, origin: Origin, seconds: float) -> None:
    entry = origin.entry("model.gguf")
    guest.run("rm", "-rf", "/var/lib/fleetfit/test", "/var/lib/fleetfit/artifacts")
    guest.run("sync")
    fetch(guest, entry, "start", 1_000_000)
    time.sleep(seconds)
    guest.lose_power()
    # Whoever opens the file sees the whole one or none.
    there = guest.python(HASHES, "/var/lib/fleetfit/test") or {}
    assert there.get("model.gguf") in (None, entry["sha256"]), "a half-written artifact is under its name"
    outcome = fetch(guest, entry, "wait")
    assert outcome.get("state") in ("downloaded", None), outcome  # None: it was there already
    print(f"cut after {seconds} s: {sorted(there)}, resumed from {outcome.get('resumed_from')}")
    assert guest.python(HASHES, "/var/lib/fleetfit/test") == {"model.gguf": entry["sha256"]}


def test_power_lost_right_after_a_download(guest: Guest, origin: Origin) -> None:
    """What is said to be there is there."""
    entry = origin.entry("model.gguf")
    guest.run("rm", "-rf", "/var/lib/fleetfit/test", "/var/lib/fleetfit/artifacts")
    guest.run("sync")
    assert fetch(guest, entry, "wait")["state"] == "downloaded"
    guest.lose_power()
    assert guest.python(HASHES, "/var/lib/fleetfit/test") == {"model.gguf": entry["sha256"]}


@pytest.mark.parametrize("when", ["early", "late"])
def test_power_lost_while_an_archive_is_unpacked(guest: Guest, origin: Origin, when: str) -> None:
    dest = "/opt/fleetfit/test/envs/one"
    last = list(origin.tree)[-1].removeprefix("tree/")
    entry = origin.entry("tree.tar", {"dest": dest, "strip": 1, "creates": last})
    guest.run("rm", "-rf", dest, "/var/lib/fleetfit/test", "/var/lib/fleetfit/artifacts")
    guest.run("sync")
    fetch(guest, entry, "start")
    awaited = {"early": f"{dest}.partial", "late": f"{dest}.partial/{last}"}[when]
    guest.run("sh", "-c", f"until test -e {awaited} || test -e {dest}; do :; done")
    guest.lose_power()
    wanted = {
        name.removeprefix("tree/"): hashlib.sha256(data).hexdigest() for name, data in origin.tree.items()
    }
    for _ in range(2):  # as the power loss left it, and after the next run
        found = guest.python(HASHES, dest) or {}
        found.pop(".fleetfit-artifact.json", None)
        print(f"{when}: {len(found)} of {len(wanted)} files")
        assert found in ({}, wanted), "a half-unpacked tree is under its name"
        fetch(guest, entry, "wait")
    assert found == wanted
