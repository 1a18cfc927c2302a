"""A host that serves: what it exposes, and what interrupted runs and bad releases do to it (nothing)."""

from __future__ import annotations

import io
import random
import re
import subprocess
import tarfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from ..processes import kill_all
from .conftest import REPO, Fleet, Host

pytestmark = pytest.mark.slow

NAME = "e2e-core"
KEY = "e2e-canary-9f27c1"
SETTINGS: dict[str, Any] = {"llama_cpp_api_key": KEY, "fleetfit_slots": 2}
# A server that is healthy, and dies of the first question.
DYING_ENGINE = """#!/usr/bin/python3
import http.server, json, os, sys
flag = dict(zip(sys.argv, sys.argv[1:]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = {"status": "ok", "total_slots": int(flag["-np"]),
                "default_generation_settings": {"n_ctx": int(flag["-c"]) // int(flag["-np"])}}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_POST(self):
        os._exit(11)
http.server.HTTPServer(("127.0.0.1", int(flag["--port"])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def host(start_host: Callable[..., Host], fleet: Fleet) -> Host:
    """Return a host on which the main job has run once; its output was as talkative as it gets."""
    fleet.hosts[:] = [NAME]
    started = start_host(NAME)
    played = fleet.play("site.yml", "-vvv", **SETTINGS)
    (fleet.folder / "first.log").write_text(played.output)
    assert played.returncode == 0, played.output[-4000:]
    return started


def current(host: Host) -> str:
    return host.run("readlink /opt/fleetfit/llama-server/current")


def test_second_run_changes_nothing(host: Host, fleet: Fleet) -> None:
    played = fleet.play(**SETTINGS)
    assert played.returncode == 0, played.output
    assert played.recap()[NAME]["changed"] == 0, played.output


def test_plan_is_the_same_beside_the_running_engine(host: Host, fleet: Fleet) -> None:
    before = host.manifest()["plan"]
    assert fleet.play(**SETTINGS).returncode == 0
    assert host.manifest()["plan"] == before


def test_only_ssh_listens_outside(host: Host) -> None:
    addresses = [line.split()[4] for line in host.run("ss -H -ltun").splitlines()]
    outside = [a for a in addresses if not a.startswith(("127.", "[::1]")) and not a.endswith(":22")]
    assert outside == []
    assert "127.0.0.1:8080" in addresses


def test_exposure_of_the_unit(host: Host) -> None:
    last = host.run("systemd-analyze security --no-pager llama-server.service").splitlines()[-1]
    figure = re.search(r": ([0-9.]+)", last)
    assert figure
    assert float(figure[1]) <= 2.0


def test_the_key_is_in_no_output_of_the_run(host: Host, fleet: Fleet) -> None:
    assert KEY not in (fleet.folder / "first.log").read_text()


@pytest.mark.parametrize(
    "command",
    [
        "cat /proc/[0-9]*/cmdline | tr '\\0' ' '",
        "systemctl show '*'",
        "busctl --no-pager introspect org.freedesktop.systemd1"
        " /org/freedesktop/systemd1/unit/llama_2dserver_2eservice",
        "journalctl --namespace='*' --no-pager --output=export",
        "cat /etc/fleetfit/manifest.json",
        "find / -xdev -type f -perm -o+r -not -path '/proc/*' -size -20M -exec grep -lF e2e-canary {} +",
    ],
    ids=["argv", "units", "dbus", "journal", "manifest", "world-readable files"],
)
def test_the_key_is_nowhere_on_the_host(host: Host, command: str) -> None:
    found = host.raw(command, timeout_s=300).stdout
    assert "e2e-canary" not in found.replace("grep -lF e2e-canary", "")
    assert command.startswith("find") or found


def test_the_key_is_there_for_the_service(host: Host) -> None:
    """The tests above look for something that is really there."""
    assert host.run("cat /etc/fleetfit/credentials/llama-server.api-key") == KEY
    assert host.run("stat -c '%a %U' /etc/fleetfit/credentials/llama-server.api-key") == "600 root"


def test_wrong_checksum_never_becomes_visible(
    host: Host, fleet: Fleet, engine_archive: dict[str, Any]
) -> None:
    before = current(host)
    wrong = {**engine_archive, "sha256": "0" * 64}
    played = fleet.play(**SETTINGS, llama_cpp_archives=[wrong])
    assert played.returncode != 0
    # The wrong sum, the file, and the sum that it has.
    assert "0" * 64 in played.text
    assert engine_archive["path"] in played.text
    assert engine_archive["sha256"] in played.text
    assert host.raw("test -e /opt/fleetfit/llama-server/envs/0000000000000000").returncode != 0
    assert current(host) == before
    assert host.ready()["ok"]


@pytest.fixture(scope="module")
def engine_archive(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return an archive of the engine that dies at its first request."""
    return write_engine(tmp_path_factory.mktemp("engine") / "engine.tar.gz")


def write_engine(path: Path) -> dict[str, Any]:
    programs = {
        "bin/llama-server": DYING_ENGINE,
        "bin/llama-fit-params": "#!/bin/sh\necho Host 1 1 1\n",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, text in programs.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text), 0o755
            tar.addfile(entry, io.BytesIO(text.encode()))
    content = path.read_bytes()
    return {
        "version": "11434.0.0",
        "backend": "cpu",
        "arch": "x86_64",
        "glibc": "2.34",
        "path": str(path),
        "size": len(content),
        "sha256": sha256(content).hexdigest(),
    }


def test_engine_that_dies_at_its_first_request_is_taken_back(
    host: Host, fleet: Fleet, engine_archive: dict[str, Any]
) -> None:
    before = current(host)
    played = fleet.play(**SETTINGS, llama_cpp_archives=[engine_archive])
    assert played.returncode != 0
    assert "failed at 'gate' (crashed)" in played.text
    assert current(host) == before
    assert host.ready()["ok"]


def test_kill_9_at_five_random_tasks(host: Host, fleet: Fleet) -> None:
    seed = time.time_ns()
    chosen = random.Random(seed)  # noqa: S311 - the tasks only have to differ
    tasks = len(re.findall(r"^TASK \[", (fleet.folder / "first.log").read_text(), re.MULTILINE))
    for number in range(5):
        # Each run has something to do: another number of slots is another release.
        variables = {**SETTINGS, "fleetfit_slots": 3 if number % 2 else 4}
        at_task = chosen.randint(tasks // 3, tasks)
        name = fleet.play_and_kill(at_task, **variables)
        state = host.ready()
        assert state.get("ok"), f"seed {seed}, task {at_task} {name}: {state}"
        assert host.run("find /opt/fleetfit/llama-server -name '*.partial' -not -name '.*'") == ""
    assert fleet.play(**SETTINGS).returncode == 0
    last = fleet.play(**SETTINGS)
    assert last.returncode == 0
    assert last.recap()[NAME]["changed"] == 0, last.output
    assert host.ready()["ok"]


def test_kill_9_of_the_download(host: Host, fleet: Fleet) -> None:
    files = host.manifest()["model_store"]
    path = f"/var/lib/fleetfit/models/{files['model']}/{files['variant']}/{files['files'][0]['name']}"
    host.run(f"rm {path}")  # the running engine keeps its mapping
    # Slow enough to be killed in the middle: 98 MB take about 25 s.
    slow = {**SETTINGS, "model_store_bandwidth_limit_bytes_per_s": 4_000_000}
    process = subprocess.Popen(
        fleet.argv("site.yml", slow),
        cwd=REPO,
        env=fleet.environ(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    begun = f'test -n "$(find {path}.partial -size +4M 2>/dev/null)"'
    deadline = time.monotonic() + 400
    while host.raw(begun).returncode != 0:
        assert process.poll() is None, "the play ended before the download was under way"
        assert time.monotonic() < deadline
        time.sleep(0.5)
    kill_all(process)
    host.run(
        "systemctl list-units --plain --no-legend 'fleetfit-download-*' | cut -d' ' -f1"
        " | xargs -r systemctl kill -s KILL"
    )
    # Half of it is there, and not visible under its name.
    assert host.raw(f"test -e {path}").returncode == 1
    assert host.ready()["ok"]
    played = fleet.play(**SETTINGS)
    assert played.returncode == 0, played.output
    assert host.run(f"sha256sum {path}").split()[0] == files["files"][0]["sha256"]
    assert host.raw(f"test -e {path}.partial").returncode == 1
