"""What a host is like after the role vllm took the place of llama_cpp."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from testinfra.host import Host

UNIT = "vllm.service"
KEY = "molecule-canary-7c42e9"
CURL = "curl --silent --show-error --max-time 120"
CACHES = "/var/cache/fleetfit/vllm"


@pytest.fixture(autouse=True)
def _journal_of_a_failure(machine: Host, request: pytest.FixtureRequest) -> Iterator[None]:
    """Print the service's journal beside a failed test."""
    failures = request.session.testsfailed
    yield
    if request.session.testsfailed > failures:
        print(machine.run(f"journalctl --namespace=* -u {UNIT} -n 40 --no-pager").stdout)


def ask(machine: Host, path: str, *, key: str = KEY, body: dict[str, Any] | None = None) -> tuple[int, str]:
    data = "" if body is None else f"--json '{json.dumps(body)}'"
    # The key goes through standard input, as a careful administrator would give it.
    answer = machine.check_output(
        f"printf 'header = \"Authorization: Bearer {key}\"' |"
        f" {CURL} --config - --write-out '\\n%{{http_code}}' {data} http://127.0.0.1:8101{path}"
    )
    text, _, status = answer.rpartition("\n")
    return int(status), text


def sections(machine: Host) -> dict[str, Any]:
    return dict(json.loads(machine.file("/etc/fleetfit/manifest.json").content_string)["sections"])


def plan(machine: Host) -> dict[str, Any]:
    return dict(sections(machine)["plan"]["deployments"][0])


def show(machine: Host, name: str, unit: str = UNIT) -> str:
    return str(machine.check_output(f"systemctl show {unit} --property={name} --value"))


def test_it_answers_with_the_planned_model(machine: Host) -> None:
    deployment = plan(machine)
    assert deployment["engine"] == "vllm"
    question = {"role": "user", "content": "What is the capital of France? Answer with its name."}
    body = {
        "model": deployment["served_model_name"],
        "messages": [question],
        "max_tokens": 32,
        "temperature": 0,
    }
    status, text = ask(machine, "/v1/chat/completions", body=body)
    assert status == 200
    assert "Paris" in json.loads(text)["choices"][0]["message"]["content"]
    model = json.loads(ask(machine, "/v1/models")[1])["data"][0]
    assert (model["id"], model["max_model_len"]) == (deployment["served_model_name"], 4096)


def test_without_the_key_it_answers_nothing(machine: Host) -> None:
    assert ask(machine, "/v1/models", key="wrong")[0] == 401
    assert ask(machine, "/v1/chat/completions", key="wrong", body={"messages": []})[0] == 401
    assert ask(machine, "/docs")[0] == 404


def test_it_listens_on_loopback_alone(machine: Host) -> None:
    listeners = machine.check_output("ss -H -ltn").splitlines()
    addresses = {line.split()[3] for line in listeners}
    outside = {a for a in addresses if not a.startswith(("127.0.0.1:", "[::1]:")) and not a.endswith(":22")}
    assert outside == set()
    assert "127.0.0.1:8101" in addresses


def test_exposure(machine: Host) -> None:
    last = machine.check_output(f"systemd-analyze security {UNIT} --no-pager").splitlines()[-1]
    found = re.search(r": ([0-9.]+) ", last)
    assert found is not None
    assert float(found[1]) <= 2.0


def test_the_key_is_nowhere_but_in_its_file_and_its_processes(machine: Host) -> None:
    pids = machine.check_output("pgrep --uid fleetfit-vllm").split()
    assert len(pids) >= 3  # the server, the engine's core and its worker
    for pid in pids:
        assert KEY not in machine.file(f"/proc/{pid}/cmdline").content_string
        assert machine.run(f"runuser -u nobody -- cat /proc/{pid}/environ").rc != 0
    assert KEY not in machine.check_output(f"systemctl show {UNIT}")
    assert KEY not in machine.check_output("journalctl --namespace=* --no-pager --output=cat")
    found = machine.run(
        f"grep -rlF {KEY} /etc /opt/fleetfit/vllm/releases /var/lib/fleetfit /var/cache/fleetfit /run/systemd"
    ).stdout.split()
    assert found == ["/etc/fleetfit/credentials/vllm.api-key"]
    credential = machine.file(found[0])
    assert (credential.mode, credential.user) == (0o600, "root")


def test_prompts_are_not_in_its_journal(machine: Host) -> None:
    log = machine.check_output("journalctl --namespace=vllm --no-pager --output=cat")
    assert "Application startup complete" in log
    assert "capital of France" not in log
    assert "SystemMaxUse=67108864" in machine.file("/etc/systemd/journald@vllm.conf").content_string


def test_llama_server_gave_way(machine: Host) -> None:
    assert not machine.service("llama-server").is_running
    assert not machine.service("llama-server").is_enabled
    assert machine.service("vllm").is_enabled
    assert show(machine, "Conflicts").find("llama-server.service") >= 0
    # It stays installed, so that the way back is a switch too.
    assert machine.file("/opt/fleetfit/llama-server/current/run").exists


def test_its_caches_belong_to_its_environment(machine: Host) -> None:
    environment = sections(machine)["vllm"]["environment"].rpartition("/")[2]
    environ = machine.file(f"/proc/{show(machine, 'MainPID')}/environ").content_string.split("\0")
    values = dict(line.split("=", 1) for line in environ if "=" in line)
    names = ("HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
    for name in (*names, "FLASHINFER_WORKSPACE_BASE"):
        assert values[name].startswith(f"{CACHES}/{environment}")
    directory = machine.file(f"{CACHES}/{environment}")
    assert (directory.user, directory.is_directory) == ("fleetfit-vllm", True)
    assert values["HF_HUB_OFFLINE"] == values["VLLM_NO_USAGE_STATS"] == values["DO_NOT_TRACK"] == "1"


def test_memory_is_limited_to_the_need_and_a_tenth(machine: Host) -> None:
    mapping = plan(machine)["cpu_mapping"]
    need = mapping["host"]["total"] - mapping["host"]["margin"]
    assert need <= int(show(machine, "MemoryMax")) <= need * 1.1 + 4096
    log = machine.check_output("journalctl --namespace=vllm --no-pager --output=cat")
    assert "Explicitly set" in log, "the KV cache's size is not the plan's"
    resident = sum(
        int(line.split()[1]) * 1024
        for pid in machine.check_output("pgrep --uid fleetfit-vllm").split()
        for line in machine.file(f"/proc/{pid}/smaps_rollup").content_string.splitlines()
        if line.startswith("Pss:")
    )
    assert resident <= need


def test_the_manifest_names_what_it_made(machine: Host) -> None:
    section = sections(machine)["vllm"]
    assert (section["units"], section["port"], section["variant"]) == ([UNIT], 8101, "cpu")
    for path in section["paths"]:
        assert machine.file(path).exists, path
    assert KEY not in json.dumps(section)


def test_the_unit_comes_back_after_a_crash(machine: Host) -> None:
    machine.check_output(f"systemctl kill --signal=SEGV --kill-whom=main {UNIT}")
    machine.check_output(
        "for i in $(seq 150); do sleep 2;"
        f" {CURL} --fail --output /dev/null http://127.0.0.1:8101/health && exit; done; exit 1"
    )
    assert machine.service(UNIT).is_running
