"""Promises of lab.ssh and lab.containers: host keys are known before the first contact, and always checked."""

from __future__ import annotations

import io
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest

from fleetfit.lab.containers import choose_port, port_is_free, seed_files
from fleetfit.lab.paths import LabPaths
from fleetfit.lab.ssh import config_path, host_key, ssh_argv, write_config
from fleetfit.lab.state import HostRecord, LabState


@pytest.fixture
def paths(tmp_path: Path) -> LabPaths:
    # A space, as in a checkout below "My Projects".
    lab = LabPaths(tmp_path / "check out")
    state = LabState(hosts={"edge": HostRecord("c", 21000, "ops", "lab", "s")})
    write_config(lab, state)
    return lab


def effective(paths: LabPaths, host: str) -> dict[str, str]:
    """Return what ssh itself makes of the configuration."""
    done = subprocess.run(
        ["ssh", "-G", "-F", str(config_path(paths)), host], capture_output=True, text=True, check=True
    )
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())


def test_ssh_reads_the_configuration_as_meant(paths: LabPaths) -> None:
    found = effective(paths, "edge")
    assert (found["hostname"], found["port"], found["user"]) == ("127.0.0.1", "21000", "ops")
    assert found["stricthostkeychecking"] in ("true", "yes")
    assert found["hostkeyalias"] == "edge"
    assert found["userknownhostsfile"].strip('"') == str(paths.folder / "known_hosts")
    assert found["identityfile"].strip('"') == str(paths.folder / "keys/id_ed25519")
    assert found["passwordauthentication"] == "no"


def test_the_known_key_is_the_one_that_the_host_gets(paths: LabPaths) -> None:
    public = host_key(paths, "edge").with_name("ssh_host_ed25519_key.pub").read_text().split()
    assert (paths.folder / "known_hosts").read_text() == f"edge {public[0]} {public[1]}\n"
    with tarfile.open(fileobj=io.BytesIO(seed_files(paths, "edge"))) as seed:
        private = seed.getmember("etc/ssh/ssh_host_ed25519_key")
        assert private.mode == 0o600
        stream = seed.extractfile(private)
        assert stream is not None
        assert stream.read() == host_key(paths, "edge").read_bytes()


def test_keys_stay_the_same_and_private(paths: LabPaths) -> None:
    key = host_key(paths, "edge")
    content = key.read_bytes()
    assert host_key(paths, "edge").read_bytes() == content
    assert key.stat().st_mode & 0o777 == 0o600


def test_commands_never_ask(paths: LabPaths) -> None:
    assert "BatchMode=yes" in ssh_argv(paths, "edge", "true")


def test_a_taken_port_is_passed_over(paths: LabPaths) -> None:
    candidates = paths.port_candidates("ssh x")
    first = next(port for port in candidates if port_is_free(port))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", first))
        listener.listen()
        assert not port_is_free(first)
        assert choose_port(paths, "ssh x", ()) != first
    assert choose_port(paths, "ssh x", ()) == first
    assert choose_port(paths, "ssh x", (first,)) != first
