"""What a clumsy user hears: a sentence with what was wrong and what to do, an exit code, and never a traceback.

The host is this machine, over a local connection, and only looked at.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
GOOD: dict[str, Any] = {
    "fleetfit_model": "smollm2-135m-instruct",
    "fleetfit_min_quality_tier": "rest",
    "fleetfit_use_gpus": False,
    "nvidia_driver_source": "none",
    "host_baseline_disk_reserve_bytes": 0,
    "llama_cpp_port": 18937,
    "llama_cpp_archives": [
        {
            "version": "11434.0.0",
            "backend": "cpu",
            "arch": os.uname().machine,
            "glibc": "2.17",
            "url": "http://mirror.example/llama-cpp.tar.gz",
            "size": 1,
            "sha256": "0" * 64,
        }
    ],
}


def inventory(folder: Path, **variables: Any) -> Path:
    """Write an inventory whose only host is this machine."""
    python = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable
    host = {"ansible_connection": "local", "ansible_python_interpreter": python}
    path = folder / "hosts.yml"
    groups = {"llm_hosts": {"hosts": {"here": host}, "vars": {**GOOD, **variables}}}
    path.write_text(json.dumps({"all": {"children": groups}}))  # JSON is YAML
    return path


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    return subprocess.run(
        [str(BIN / argv[0]), *argv[1:]],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def said_by(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a failed run said, as one line; a traceback fails the test."""
    output = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0, output
    assert "Traceback" not in output
    return output


# A host's mistake, and what its user reads.
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "slots": ({"fleetfit_slots": "two"}, "fleetfit_slots is 'two'; it must be a whole number"),
    "model": ({"fleetfit_modle": "x"}, "Write fleetfit_model,"),
    "role": ({"llama_cpp_prot": 9000}, "Write llama_cpp_port,"),
    "type": ({"llama_cpp_port": "eighty"}, "'llama_cpp_port' is of type str"),
    "checksum": (
        {"llama_cpp_archives": [{**GOOD["llama_cpp_archives"][0], "sha256": "aa"}]},
        "llama_cpp_archives has the sha256 aa; it must be 64 hexadecimal digits",
    ),
    "proxy": ({"fleetfit_proxy": "http://who:secret@proxy:3128"}, "fleetfit_proxy is a text; it must be a"),
    "catalog": (
        {"fleetfit_catalog_dirs": ["/nonexistent"]},
        "The catalog directory /nonexistent does not exist",
    ),
    "ca": (
        {"host_baseline_ca_certificates": ["/nonexistent.crt"]},
        "ca: a file of host_baseline_ca_certificates",
    ),
    "no_ca": (
        {"host_baseline_ca_certificates": ["/etc/passwd"]},
        "(/etc/passwd) cannot be read on the controller",
    ),
}


def test_wrong_variables_are_refused_by_name_and_the_other_host_goes_on(tmp_path: Path) -> None:
    path = inventory(tmp_path)
    document = json.loads(path.read_text())
    hosts = document["all"]["children"]["llm_hosts"]["hosts"]
    hosts |= {name: {**hosts["here"], **variables} for name, (variables, _) in MISTAKES.items()}
    path.write_text(json.dumps(document))
    done = run("ansible-playbook", "playbooks/check_hosts.yml", "-i", str(path))
    output = said_by(done)
    for name, (_, said) in MISTAKES.items():
        assert said in output, name
        assert re.search(rf"^{name} .* failed=1 ", done.stdout, re.MULTILINE), name
    assert re.search(r"^here .* unreachable=0 +failed=0 ", done.stdout, re.MULTILINE)
    assert "here: Q4_1 with llama_cpp on the CPU" in output
    assert "secret@" not in output


@pytest.mark.parametrize("batch", ["abc", "10%%"])
def test_a_wrong_batch_is_a_sentence(tmp_path: Path, batch: str) -> None:
    hosts = str(inventory(tmp_path))
    done = run(
        "ansible-playbook",
        "playbooks/deploy_hosts.yml",
        "--check",
        "-i",
        hosts,
        "-e",
        f"fleetfit_batch={batch}",
    )
    assert f"fleetfit_batch is {batch}; it must be a number of hosts" in said_by(done)


@pytest.mark.parametrize("batch", ["1", "50%", '{"fleetfit_batch": [1, "50%"]}'])
def test_batches_that_are_right(tmp_path: Path, batch: str) -> None:
    argument = batch if batch.startswith("{") else f"fleetfit_batch={batch}"
    hosts = str(inventory(tmp_path))
    done = run("ansible-playbook", "playbooks/deploy_hosts.yml", "--list-hosts", "-i", hosts, "-e", argument)
    assert done.returncode == 0, done.stderr
    assert "here" in done.stdout


# An inventory that is empty by mistake: every play on it would succeed, and nothing would be served.
@pytest.fixture(params=["missing", "broken", "no group"])
def no_inventory(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    path = tmp_path / "hosts.yml"
    if request.param == "broken":
        path.write_text("llm_hosts: [broken\n")
    elif request.param == "no group":
        path.write_text("all: {hosts: {a: {}}}\n")
    said = {"broken": "did not find expected ',' or ']'", "no group": "has no host in the group llm_hosts"}
    return str(path), said.get(request.param, str(path))


def test_an_empty_inventory_is_no_success(no_inventory: tuple[str, str]) -> None:
    path, said = no_inventory
    assert said in said_by(run("ansible-playbook", "site.yml", "-i", path))


def test_verify_could_not_check_an_empty_inventory(no_inventory: tuple[str, str]) -> None:
    path, said = no_inventory
    done = run("fleetfit", "verify", "-i", path, "--json")
    assert done.returncode == 2
    assert said in said_by(done)
    assert len(done.stderr.splitlines()) <= 1
    if done.stdout:
        document = json.loads(done.stdout)
        assert document["exit_code"] == 2
        assert document["ok"] is False
        assert said in document["problem"]
        assert len(document["problem"].splitlines()) == 1


def test_verify_of_a_host_without_anything_deployed_and_of_one_that_is_away(tmp_path: Path) -> None:
    hosts = inventory(tmp_path)
    document = json.loads(hosts.read_text())
    away = {"ansible_host": "127.0.0.1", "ansible_port": 1}
    document["all"]["children"]["llm_hosts"]["hosts"]["away"] = away
    hosts.write_text(json.dumps(document))
    done = run("fleetfit", "verify", "-i", str(hosts), "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == answer["exit_code"] == 2
    assert answer["hosts"]["away"]["state"] == "unreachable"
    assert "Connection refused" in answer["hosts"]["away"]["message"]
    assert answer["hosts"]["here"]["state"] == "not_deployed"
