"""What a host is like after the role open_webui."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from testinfra.host import Host

UNIT = "open-webui.service"
ADMIN_CANARY = "molecule-canary-5e9d2c"
SIGNING_CANARY = "molecule-canary-8b1f40-signs-sessions"
ADMIN = "admin@fleetfit.internal"
URL = "http://127.0.0.1:3000"
DATA = "/var/lib/fleetfit/open-webui/data"


@pytest.fixture(autouse=True)
def _journal_of_a_failure(machine: Host, request: pytest.FixtureRequest) -> Iterator[None]:
    """Print the service's journal beside a failed test."""
    failures = request.session.testsfailed
    yield
    if request.session.testsfailed > failures:
        print(machine.run(f"journalctl --namespace=* -u {UNIT} -n 30 --no-pager").stdout)


def ask(machine: Host, path: str, body: dict[str, Any] | None = None, *, token: str = "") -> tuple[int, Any]:
    """Return status and JSON of a request; secrets go through standard input."""
    lines = [
        "silent",
        "show-error",
        "max-time = 120",
        'write-out = "\\n%{http_code}"',
        f'url = "{URL}{path}"',
    ]
    if token:
        lines.append(f'header = "Authorization: Bearer {token}"')
    if body is not None:
        lines += ['header = "Content-Type: application/json"', f"data = {json.dumps(json.dumps(body))}"]
    answer = machine.check_output(f"printf %s {shlex.quote(chr(10).join(lines))} | curl --config -")
    text, _, status = answer.rpartition("\n")
    return int(status), json.loads(text)


def sign_in(machine: Host) -> str:
    """Return a token of the administrator."""
    status, answer = ask(machine, "/api/v1/auths/signin", {"email": ADMIN, "password": ADMIN_CANARY})
    assert status == 200
    assert answer["role"] == "admin"
    return str(answer["token"])


def wait_until_ready(machine: Host) -> None:
    machine.check_output(f"curl --silent --fail --retry 90 --retry-delay 1 --retry-all-errors {URL}/ready")


def main_pid(machine: Host) -> str:
    return machine.check_output(f"systemctl show {UNIT} --property=MainPID --value")


def test_the_administrator_signs_in_and_gets_an_answer_from_the_hosts_engine(machine: Host) -> None:
    token = sign_in(machine)
    status, models = ask(machine, "/api/models", token=token)
    names = [model["id"] for model in models["data"]]
    assert (status, len(names)) == (200, 1)
    question = {"role": "user", "content": "What is the capital of France? Answer with its name."}
    body = {"model": names[0], "messages": [question], "temperature": 0, "max_tokens": 32, "stream": False}
    status, answer = ask(machine, "/api/chat/completions", body, token=token)
    assert status == 200
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_nobody_else_gets_in(machine: Host) -> None:
    stranger = {"name": "x", "email": "x@example.org", "password": "0123456789"}
    assert ask(machine, "/api/v1/auths/signup", stranger)[0] in (401, 403)
    wrong = {"email": ADMIN, "password": "wrong-password"}
    assert ask(machine, "/api/v1/auths/signin", wrong)[0] in (400, 401, 403)
    assert ask(machine, "/api/models")[0] in (401, 403)


def test_what_runs_code_or_calls_out_is_off(machine: Host) -> None:
    features = ask(machine, "/api/config", token=sign_in(machine))[1]["features"]
    for name in (
        "enable_signup",
        "enable_plugins",
        "enable_code_execution",
        "enable_code_interpreter",
        "enable_direct_connections",
        "enable_web_search",
        "enable_community_sharing",
        "enable_version_update_check",
    ):
        assert features.get(name) is False, name
    log = machine.check_output(f"journalctl --namespace=* --unit={UNIT} --no-pager --output=cat")
    assert "huggingface.co" not in log


def test_a_restart_keeps_sessions_and_takes_the_environments_settings_again(machine: Host) -> None:
    token = sign_in(machine)
    config = ask(machine, "/api/v1/auths/admin/config", token=token)[1]
    status, edited = ask(
        machine, "/api/v1/auths/admin/config", {**config, "ENABLE_SIGNUP": True}, token=token
    )
    assert (status, edited["ENABLE_SIGNUP"]) == (200, True)
    machine.check_output(f"systemctl restart {UNIT}")
    wait_until_ready(machine)
    status, after = ask(machine, "/api/v1/auths/admin/config", token=token)
    assert status == 200, "the key that signs sessions is not stable"
    assert after["ENABLE_SIGNUP"] is False


def test_it_listens_on_loopback_alone(machine: Host) -> None:
    listeners = machine.check_output("ss -H -ltn").splitlines()
    addresses = {line.split()[3] for line in listeners}
    outside = {a for a in addresses if not a.startswith(("127.0.0.1:", "[::1]:")) and not a.endswith(":22")}
    assert outside == set()
    assert "127.0.0.1:3000" in addresses


def test_exposure(machine: Host) -> None:
    last = machine.check_output(f"systemd-analyze security {UNIT} --no-pager").splitlines()[-1]
    found = re.search(r": ([0-9.]+) ", last)
    assert found is not None
    assert float(found[1]) <= 2.0


@pytest.mark.parametrize("secret", [ADMIN_CANARY, SIGNING_CANARY])
def test_secrets_are_in_their_files_and_in_the_process_alone(machine: Host, secret: str) -> None:
    pid = main_pid(machine)
    assert secret not in machine.file(f"/proc/{pid}/cmdline").content_string
    assert secret not in machine.check_output(f"systemctl show {UNIT}")
    assert secret not in machine.check_output("journalctl --namespace=* --no-pager --output=cat")
    found = machine.run(
        f"grep -rlF {secret} /etc /opt/fleetfit/open-webui/releases /var/lib/fleetfit /run/systemd"
    )
    assert {line.split("open-webui.")[0] for line in found.stdout.split()} == {"/etc/fleetfit/credentials/"}
    modes = machine.check_output("stat -c '%a %U' /etc/fleetfit/credentials/*").splitlines()
    assert set(modes) == {"600 root"}
    refused = machine.run(f"runuser -u nobody -- cat /proc/{pid}/environ")
    assert refused.rc != 0


def test_its_files_are_its_own_and_prompts_are_not_in_the_journal(machine: Host) -> None:
    directory = machine.file(DATA)
    assert (directory.user, directory.mode) == ("fleetfit-webui", 0o700)
    assert machine.file(f"{DATA}/webui.db").mode == 0o600
    environ = machine.file(f"/proc/{main_pid(machine)}/environ").content_string.split("\0")
    static = next(line.partition("=")[2] for line in environ if line.startswith("STATIC_DIR="))
    assert static != DATA
    log = machine.check_output(f"journalctl --namespace=* --unit={UNIT} --no-pager --output=cat")
    assert "capital of France" not in log


def test_it_starts_at_boot_and_its_journal_is_its_own(machine: Host) -> None:
    service = machine.service("open-webui")
    assert service.is_enabled
    assert service.is_running
    assert machine.check_output(f"systemctl show {UNIT} --property=LogNamespace --value") == "open-webui"
    assert "SystemMaxUse=67108864" in machine.file("/etc/systemd/journald@open-webui.conf").content_string


def test_the_manifest_names_what_it_made(machine: Host) -> None:
    section = json.loads(machine.file("/etc/fleetfit/manifest.json").content_string)["sections"]["open_webui"]
    assert section["units"] == [UNIT]
    assert section["port"] == 3000
    for path in section["paths"]:
        assert machine.file(path).exists, path
    assert ADMIN_CANARY not in json.dumps(section)
