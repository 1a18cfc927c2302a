"""fleetfit.llm.artifact through ansible-playbook: on this machine, and over SSH on a host with systemd."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fleetfit.lab.machine import podman

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).parent / "data"
CONTENT = random.Random(11).randbytes(4_000_000)  # noqa: S311
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HOST_PYTHON = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable
# Starts a tool of this environment also where the tests run without it on PATH.
PLAYBOOK = str(Path(sys.executable).parent / "ansible-playbook")


@dataclass
class Runner:
    """Runs the module in a play of its own and returns its result."""

    folder: Path
    variables: dict[str, Any]
    host: str = "localhost"

    def start(self, options: dict[str, Any], *extra: str) -> tuple[subprocess.Popen[str], Path]:
        result = self.folder / "result.json"
        result.unlink(missing_ok=True)
        play = {
            "hosts": self.host,
            "gather_facts": False,
            "tasks": [
                {
                    "name": "The artifacts are present",
                    "fleetfit.llm.artifact": options,
                    "register": "outcome",
                    "ignore_errors": True,
                },
                {
                    "name": "The result is kept for the test",
                    "ansible.builtin.copy": {
                        "content": "{{ outcome | to_json }}",
                        "dest": str(result),
                        "mode": "0600",
                    },
                    "delegate_to": "controller",
                    "check_mode": False,
                },
            ],
        }
        (self.folder / "play.json").write_text(json.dumps([play]))
        local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        hosts = {self.host: self.variables, "controller": local}
        (self.folder / "hosts.json").write_text(json.dumps({"all": {"hosts": hosts}}))
        command = [PLAYBOOK, "-i", str(self.folder / "hosts.json"), str(self.folder / "play.json"), *extra]
        environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return process, result

    def finish(self, started: tuple[subprocess.Popen[str], Path]) -> tuple[dict[str, Any], str]:
        process, result = started
        output, _ = process.communicate(timeout=180)
        assert result.exists(), output
        return json.loads(result.read_text()), output

    def run(self, options: dict[str, Any], *extra: str) -> dict[str, Any]:
        return self.finish(self.start(options, *extra))[0]


def entry(
    dest: Path | str, *sources: dict[str, Any], content: bytes = CONTENT, **changes: Any
) -> dict[str, Any]:
    return {
        "name": Path(dest).name,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "dest": str(dest),
        "sources": list(sources),
        **changes,
    }


def pushed(path: Path | str) -> dict[str, Any]:
    return {"type": "file", "path": str(path), "location": "controller"}


def http(port: int, name: str = "x.gguf", user: str = "") -> dict[str, Any]:
    return {"type": "http", "url": f"http://{user}127.0.0.1:{port}/{name}"}


# --- without systemd: the same steps in the module itself


@pytest.fixture
def local(tmp_path: Path) -> Runner:
    return Runner(tmp_path, {"ansible_connection": "local", "ansible_python_interpreter": HOST_PYTHON})


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Serve CONTENT on a loopback port; yields the port and the log of requests."""
    folder = tmp_path / "www"
    folder.mkdir()
    (folder / "x.gguf").write_bytes(CONTENT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "requests"
    log.touch()
    command = [sys.executable, str(DATA / "origin.py"), str(port), str(folder), str(log)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    yield port, log
    process.kill()
    process.wait()


def options(folder: Path, *artifacts: dict[str, Any], **more: Any) -> dict[str, Any]:
    paths = {"state_dir": str(folder / "state"), "run_dir": str(folder / "run"), "background": "never"}
    return {"artifacts": list(artifacts), "reserve_bytes": 0, **paths, **more}


def states(result: dict[str, Any]) -> list[str]:
    return [report["state"] for report in result["artifacts"]]


def archive(tmp_path: Path) -> Path:
    path = tmp_path / "tool.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("tool-1/bin/tool")
        member.size, member.mode = 4, 0o755
        tar.addfile(member, io.BytesIO(b"tool"))
    return path


def test_check_run_and_second_run_of_a_pull_a_push_and_an_archive(
    local: Runner, origin: tuple[int, Path], tmp_path: Path
) -> None:
    port, log = origin
    packed = archive(tmp_path)
    (tmp_path / "small").write_bytes(b"pushed")
    wanted = options(
        tmp_path,
        entry(tmp_path / "d/x.gguf", pushed(tmp_path / "missing"), http(port), mode="0640"),
        entry(tmp_path / "d/small", pushed(tmp_path / "small"), content=b"pushed"),
        entry(
            tmp_path / "d/tool.tar.gz",
            pushed(packed),
            content=packed.read_bytes(),
            unpack={"dest": str(tmp_path / "d/tool"), "strip": 1, "creates": "bin/tool"},
        ),
    )
    before = sorted(path.name for path in tmp_path.iterdir())
    would = local.run(wanted, "--check")
    assert would["changed"]
    assert states(would) == ["downloaded", "pushed", "unpacked"]
    assert [report["bytes_to_fetch"] for report in would["artifacts"]][:2] == [len(CONTENT), 6]
    assert log.read_text() == ""
    assert not (tmp_path / "d").exists()
    assert not (tmp_path / "state").exists()
    assert set(before) <= {path.name for path in tmp_path.iterdir()}

    first = local.run(wanted)
    assert first["changed"]
    assert states(first) == ["downloaded", "pushed", "unpacked"]
    assert first["artifacts"][0]["bytes_fetched"] == len(CONTENT)
    assert (tmp_path / "d/x.gguf").read_bytes() == CONTENT
    assert (tmp_path / "d/x.gguf").stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path / "d")) == ["small", "tool", "x.gguf"]  # nothing partial, no archive
    assert os.access(tmp_path / "d/tool/bin/tool", os.X_OK)

    second = local.run(wanted)
    assert not second["changed"]
    assert states(second) == ["present"] * 3

    os.chmod(tmp_path / "d/x.gguf", 0o600)
    assert local.run(wanted)["changed"]
    assert not local.run({**wanted, "verify": True})["changed"]
    assert log.read_text().count("x.gguf") == 1


def test_a_failure_names_every_source_and_spares_the_other_artifacts(
    local: Runner, origin: tuple[int, Path], tmp_path: Path
) -> None:
    port, _ = origin
    (tmp_path / "other").write_bytes(bytes(len(CONTENT)))
    result = local.run(
        options(
            tmp_path,
            entry(tmp_path / "d/bad", pushed(tmp_path / "other"), http(port), sha256="0" * 64),
            entry(tmp_path / "d/x.gguf", http(port)),
        )
    )
    assert result["failed"]
    assert result["code"] == "wrong_checksum"
    assert str(tmp_path / "other") in result["msg"]
    assert f"http://127.0.0.1:{port}/x.gguf" in result["msg"]
    assert result["artifacts"][1]["state"] == "downloaded"
    assert os.listdir(tmp_path / "d") == ["x.gguf"]


def test_a_file_above_the_push_limit_is_not_pushed_and_the_remedy_is_named(
    local: Runner, tmp_path: Path
) -> None:
    (tmp_path / "large").write_bytes(CONTENT)
    wanted = options(
        tmp_path, entry(tmp_path / "d/x", pushed(tmp_path / "large")), push_limit_bytes=1_000_000
    )
    result = local.run(wanted)
    assert result["code"] == "push_too_large"
    assert "location: host" in result["msg"]
    assert local.run({**wanted, "push_limit_bytes": 4_000_000})["changed"]


@pytest.mark.parametrize("mode", ["--check", "--diff"])
def test_a_disk_that_is_too_small_is_found_before_the_download(
    local: Runner, origin: tuple[int, Path], tmp_path: Path, mode: str
) -> None:
    port, log = origin
    wanted = options(tmp_path, entry(tmp_path / "d/x.gguf", http(port)), reserve_bytes=10**18)
    result = local.run(wanted, mode)
    assert result["code"] == "disk_too_small"
    assert log.read_text() == ""
    assert not (tmp_path / "d").exists()


def test_on_is_understood_as_yaml_reads_it(local: Runner, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"pushed")
    source = {"type": "file", "path": str(tmp_path / "small"), "on": "controller"}
    assert states(local.run(options(tmp_path, entry(tmp_path / "d/small", source, content=b"pushed")))) == [
        "pushed"
    ]


def test_no_output_shows_a_password(local: Runner, origin: tuple[int, Path], tmp_path: Path) -> None:
    port, _ = origin
    wanted = options(
        tmp_path,
        entry(tmp_path / "d/x.gguf", http(port, user="user:canary@")),
        entry(tmp_path / "d/y.gguf", {"type": "http", "url": f"http://127.0.0.1:{port}/no?sig=canary"}),
        proxy={"https": "http://user:canary@proxy.invalid:1"},
    )
    result, output = local.finish(local.start(wanted, "-vvv"))
    assert states(result)[0] == "downloaded"
    assert result["failed"]
    assert "canary" not in output
    assert "canary" not in json.dumps(result)


# --- with systemd: over SSH, which may break


@pytest.fixture(scope="module")
def remote(systemd_host: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, Any]:
    """Return a runner that reaches the systemd host through a real sshd, without a network."""
    folder = tmp_path_factory.mktemp("remote")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    systemd_host.put("/root/.ssh/authorized_keys", (folder / "key.pub").read_text(), "0600")
    systemd_host.run("chmod", "0700", "/root/.ssh")
    systemd_host.run("ssh-keygen", "-A")
    systemd_host.run("mkdir", "-p", "/run/sshd", "/srv/www")
    kind, key = systemd_host.run("cat", "/etc/ssh/ssh_host_ed25519_key.pub").split()[:2]
    (folder / "known_hosts").write_text(f"remote {kind} {key}\n")
    systemd_host.put("/srv/www/x.gguf", CONTENT)
    systemd_host.put("/srv/origin.py", (DATA / "origin.py").read_text())
    systemd_host.run(
        "systemd-run", "--unit=origin", "python3", "/srv/origin.py", "8999", "/srv/www", "/srv/log"
    )
    tunnel = " ".join(podman(systemd_host.machine, "exec", "-i", systemd_host.name, "/usr/sbin/sshd", "-i"))
    arguments = (
        f"-o ProxyCommand='{tunnel}' -o UserKnownHostsFile={folder}/known_hosts -i {folder}/key -F /dev/null"
    )
    variables = {
        "ansible_host": "remote",
        "ansible_user": "root",
        "ansible_ssh_common_args": arguments,
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    return Runner(folder, variables, host="remote"), systemd_host


def remote_options(name: str, **more: Any) -> dict[str, Any]:
    return {
        "artifacts": [entry(f"/var/lib/fleetfit/models/{name}", http(8999), mode="0640")],
        "background": "always",
        "bandwidth_limit_bytes_per_s": 800_000,  # five seconds for CONTENT
        "reserve_bytes": 0,
        **more,
    }


def units(host: Any) -> list[str]:
    listed = host.run(
        "systemctl", "list-units", "--plain", "--no-legend", "--all", "fleetfit-download-*.service"
    )
    return [line.split()[0] for line in listed.splitlines()]


def wait_for_partial(host: Any, name: str, at_least: int) -> int:
    deadline = time.monotonic() + 60
    while True:
        size = host.run_raw("stat", "-c", "%s", f"/var/lib/fleetfit/models/{name}.partial").stdout.strip()
        if size and int(size) >= at_least:
            return int(size)
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_kill_9_of_ansible_leaves_the_download_running_and_the_next_run_finds_it(
    remote: tuple[Runner, Any],
) -> None:
    runner, host = remote
    wanted = remote_options("killed.gguf")
    process, _ = runner.start(wanted)
    wait_for_partial(host, "killed.gguf", 400_000)
    running = units(host)
    assert len(running) == 1
    process.send_signal(signal.SIGKILL)
    process.communicate()

    result, output = runner.finish(runner.start(wanted, "-v"))
    assert states(result) == ["downloaded"], result
    assert result["artifacts"][0]["bytes_fetched"] == len(CONTENT)
    assert " % of " in output  # progress is shown
    log = host.run("cat", "/srv/log").splitlines()
    assert log == ["/x.gguf None"]  # one download, begun once, by one unit
    assert units(host) == []
    assert host.run("sha256sum", "/var/lib/fleetfit/models/killed.gguf").split()[0] == SHA256
    assert not runner.run(wanted)["changed"]


def test_a_lost_connection_is_not_a_failed_download(remote: tuple[Runner, Any]) -> None:
    runner, host = remote
    started = runner.start(remote_options("lost.gguf"), "-v")
    wait_for_partial(host, "lost.gguf", 400_000)
    # All of this host's SSH sessions end, as when a link drops.
    host.run_raw("sh", "-c", "kill -9 $(pgrep -f '^sshd: root|sshd -i')")
    result, output = runner.finish(started)
    assert "connection lost" in output
    assert states(result) == ["downloaded"], output
    assert result["artifacts"][0]["bytes_fetched"] == len(CONTENT)


def test_kill_9_of_the_unit_goes_on_by_itself(remote: tuple[Runner, Any]) -> None:
    runner, host = remote
    started = runner.start(remote_options("unit.gguf"))
    had = wait_for_partial(host, "unit.gguf", 400_000)
    host.run("systemctl", "kill", "--signal=KILL", units(host)[0])
    result, _ = runner.finish(started)
    report = result["artifacts"][0]
    assert report["state"] == "downloaded", result
    assert report["resumed_from"] >= had
    assert report["bytes_fetched"] + report["resumed_from"] == len(CONTENT)


def test_other_settings_replace_the_running_unit_and_keep_its_bytes(remote: tuple[Runner, Any]) -> None:
    runner, host = remote
    slow = remote_options("slow.gguf", bandwidth_limit_bytes_per_s=100_000)
    process, _ = runner.start(slow)
    wait_for_partial(host, "slow.gguf", 100_000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    started = time.monotonic()
    result = runner.run({**slow, "bandwidth_limit_bytes_per_s": 0})
    assert time.monotonic() - started < 25  # the slow unit would have taken 40 s
    assert states(result) == ["downloaded"]
    assert result["artifacts"][0]["resumed_from"] >= 100_000
    assert units(host) == []


def test_a_failed_unit_reports_its_reason_and_is_gone(remote: tuple[Runner, Any]) -> None:
    runner, host = remote
    wanted = remote_options("bad.gguf", bandwidth_limit_bytes_per_s=0)
    wanted["artifacts"][0]["sha256"] = "0" * 64
    result = runner.run(wanted)
    assert result["code"] == "wrong_checksum"
    assert units(host) == []
    left = host.run("sh", "-c", "ls /var/lib/fleetfit/models /run/fleetfit/downloads")
    assert "bad.gguf" not in left


def test_the_host_has_the_helper_and_no_secret_in_its_journal(remote: tuple[Runner, Any]) -> None:
    runner, host = remote
    secret = remote_options("secret.gguf", bandwidth_limit_bytes_per_s=0)
    secret["artifacts"][0]["sources"] = [http(8999, user="user:canary@")]
    process, result = runner.start(secret)
    seen = ""
    while process.poll() is None:
        seen += host.run_raw("sh", "-c", "cat /proc/[0-9]*/cmdline /run/systemd/transient/*").stdout
    assert states(json.loads(result.read_text())) == ["downloaded"]
    assert "fleetfit-host.pyz" in seen
    assert "canary" not in seen
    assert "canary" not in host.run("journalctl", "--no-pager", "--output=cat")
    digest = host.run("readlink", "/opt/fleetfit/libexec/current").strip()
    assert len(digest) == 16
