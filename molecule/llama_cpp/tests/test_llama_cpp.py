"""What a host is like after the role llama_cpp."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from testinfra.host import Host

UNIT = "llama-server.service"
KEY = "molecule-canary-3d1f7a"
CURL = "curl --silent --show-error --max-time 60"


@pytest.fixture(autouse=True)
def _journal_of_a_failure(machine: Host, request: pytest.FixtureRequest) -> Iterator[None]:
    """Print the service's journal beside a failed test."""
    failures = request.session.testsfailed
    yield
    if request.session.testsfailed > failures:
        print(machine.run(f"journalctl --namespace=* -u {UNIT} -n 30 --no-pager").stdout)


def ask(machine: Host, path: str, *, key: str = KEY, body: dict[str, Any] | None = None) -> tuple[int, str]:
    data = "" if body is None else f"--json '{json.dumps(body)}'"
    # The key goes through standard input, as a careful administrator would give it.
    answer = machine.check_output(
        f"printf 'header = \"Authorization: Bearer {key}\"' |"
        f" {CURL} --config - --write-out '\\n%{{http_code}}' {data} http://127.0.0.1:8080{path}"
    )
    text, _, status = answer.rpartition("\n")
    return int(status), text


def plan(machine: Host) -> dict[str, Any]:
    manifest = json.loads(machine.file("/etc/fleetfit/manifest.json").content_string)
    return dict(manifest["sections"]["plan"]["deployments"][0])


def test_it_answers_with_the_planned_model(machine: Host) -> None:
    question = {"role": "user", "content": "What is the capital of France? Answer with its name."}
    body = {"model": "any", "messages": [question], "max_tokens": 32, "temperature": 0}
    status, text = ask(machine, "/v1/chat/completions", body=body)
    assert status == 200
    assert "Paris" in json.loads(text)["choices"][0]["message"]["content"]
    models = json.loads(ask(machine, "/v1/models")[1])
    assert models["data"][0]["id"] == plan(machine)["served_model_name"]


def test_without_the_key_it_answers_nothing(machine: Host) -> None:
    assert ask(machine, "/v1/models", key="wrong")[0] in (401, 200)  # names of models are public upstream
    assert ask(machine, "/props", key="wrong")[0] == 401
    assert ask(machine, "/v1/chat/completions", key="wrong", body={"messages": []})[0] == 401


def test_context_and_slots_are_the_planned_ones(machine: Host) -> None:
    props = json.loads(ask(machine, "/props")[1])
    deployment = plan(machine)
    assert props["total_slots"] == deployment["slots"]
    assert props["default_generation_settings"]["n_ctx"] == deployment["context_tokens"]


def test_metrics_are_there_and_slots_are_not(machine: Host) -> None:
    assert "llamacpp:" in ask(machine, "/metrics")[1]
    assert ask(machine, "/slots")[0] != 200


def test_it_listens_on_loopback_alone(machine: Host) -> None:
    listeners = machine.check_output("ss -H -ltn").splitlines()
    addresses = {line.split()[3] for line in listeners}
    outside = {a for a in addresses if not a.startswith(("127.0.0.1:", "[::1]:")) and not a.endswith(":22")}
    assert outside == set()
    assert "127.0.0.1:8080" in addresses


def test_exposure(machine: Host) -> None:
    last = machine.check_output(f"systemd-analyze security {UNIT} --no-pager").splitlines()[-1]
    assert float(re.search(r"([0-9.]+) ", last.split(": ")[1])[1]) <= 2.0


def test_the_key_is_nowhere_but_in_its_file(machine: Host) -> None:
    pid = machine.check_output(f"systemctl show {UNIT} --property=MainPID --value")
    assert KEY not in machine.file(f"/proc/{pid}/cmdline").content_string
    assert KEY not in machine.check_output(f"systemctl show {UNIT}")
    assert KEY not in machine.check_output("journalctl --namespace=* --no-pager --output=cat")
    found = machine.run(
        f"grep -rlF {KEY} /etc /opt /var/lib/fleetfit /run/systemd 2>/dev/null"
    ).stdout.split()
    assert found == ["/etc/fleetfit/credentials/llama-server.api-key"]
    credential = machine.file(found[0])
    assert (credential.mode, credential.user) == (0o600, "root")


def test_memory_is_limited_to_the_need_and_a_tenth(machine: Host) -> None:
    deployment = plan(machine)
    host = (deployment["cpu_mapping"] or deployment)["host"]
    limit = int(machine.check_output(f"systemctl show {UNIT} --property=MemoryMax --value"))
    need = host["total"] - host["margin"]
    assert need <= limit <= need * 1.1 + 4096


def test_the_unit_comes_back_after_a_crash(machine: Host) -> None:
    machine.check_output(f"systemctl kill --signal=SEGV --kill-whom=main {UNIT}")
    machine.check_output("sleep 7")
    machine.check_output(
        "for i in $(seq 30); do"
        f" {CURL} --fail --output /dev/null http://127.0.0.1:8080/health && exit; sleep 1; done; exit 1"
    )
    assert machine.service(UNIT).is_running


def test_its_journal_has_a_limit_of_its_own(machine: Host) -> None:
    assert machine.check_output("journalctl --namespace=llama-server --no-pager --lines=1 --output=cat")
    assert "SystemMaxUse=67108864" in machine.file("/etc/systemd/journald@llama-server.conf").content_string
