"""What the role verify and `fleetfit verify` say of a host that serves, and of one that does not."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from testinfra.host import Host

HOST = "molecule-bookworm"
ENGINE = "/opt/fleetfit/llama-server"


@pytest.fixture
def _mended(machine: Host) -> Iterator[None]:
    """Put the engine right again after a test that broke it."""
    yield
    machine.check_output("rm -rf /run/systemd/system/llama-server.service.d && systemctl daemon-reload")
    machine.check_output("systemctl reset-failed llama-server && systemctl restart llama-server")
    machine.check_output(
        "curl --silent --fail --retry 60 --retry-delay 1 --retry-all-errors http://127.0.0.1:8080/health"
    )


def fleetfit_verify(*options: str) -> tuple[int, dict[str, Any], str]:
    """Run the command on the scenario's inventory; return exit code, JSON and what people read."""
    command = [
        str(Path(sys.executable).with_name("fleetfit")),
        "verify",
        "-i",
        os.environ["INVENTORY"],
        *options,
    ]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, timeout=300)
    document = json.loads(done.stdout)
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert said.returncode == done.returncode
    return done.returncode, document, said.stdout


def test_the_role_wrote_a_report_that_its_owner_alone_can_read() -> None:
    path = Path(os.environ["REPORTS"], f"{HOST}.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    report = json.loads(path.read_text())
    assert (report["host"], report["state"]) == (HOST, "ok")
    assert "Paris" in report["answer"]
    assert report["tokens_per_s"] > 0
    assert report["services"]["llama-server"]["says"]["quantization"]
    (row,) = report["memory"]
    assert row["measured"]["weights"] > 0
    assert row["measured_bytes"] <= row["set_aside_bytes"]


def test_the_command_says_ok() -> None:
    code, document, said = fleetfit_verify()
    assert (code, document["ok"]) == (0, True)
    assert "Paris" in said


def test_an_answer_that_is_not_the_expected_one_fails() -> None:
    code, document, said = fleetfit_verify("--expected", "(?i)berlin")
    assert code == 1
    assert document["hosts"][HOST]["checks"][0]["code"] == "wrong_answer"
    assert "Paris" in said


@pytest.mark.usefixtures("_mended")
def test_a_stopped_engine_fails_with_its_journal_and_what_to_do(machine: Host) -> None:
    machine.check_output("systemctl stop llama-server")
    code, document, said = fleetfit_verify()
    assert code == 1
    check = document["hosts"][HOST]["checks"][0]
    assert check["code"] == "crashed"
    assert check["log_tail"]
    assert "Stopped llama-server.service" in said
    assert "What to do:" in said


@pytest.mark.usefixtures("_mended")
def test_an_engine_that_runs_another_model_than_its_release_fails(machine: Host) -> None:
    model = machine.check_output(f"readlink -f {ENGINE}/current/model/*.gguf")
    other = "/opt/fleetfit/other"
    machine.check_output(
        f"cp {model} {other}.gguf && chmod 644 {other}.gguf &&"
        f" sed 's# -m [^ ]*# -m {other}.gguf#' {ENGINE}/current/run > {other}.run && chmod 755 {other}.run &&"
        " mkdir -p /run/systemd/system/llama-server.service.d &&"
        f" printf '[Service]\\nExecStart=\\nExecStart={other}.run\\n'"
        " > /run/systemd/system/llama-server.service.d/99-other.conf &&"
        " systemctl daemon-reload && systemctl restart llama-server"
    )
    code, document, _ = fleetfit_verify()
    machine.check_output(f"rm {other}.gguf {other}.run")
    assert code == 1
    assert "wrong_model" in {check["code"] for check in document["hosts"][HOST]["checks"]}
