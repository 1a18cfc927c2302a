"""Open WebUI's three secrets on a host that serves, and in the output of the run that brought them: nowhere else.

The key that signs sessions, the administrator's password and the engine's key are canaries that begin alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .conftest import Fleet, Host

pytestmark = pytest.mark.slow

NAME = "e2e-webui"
CANARY = "e2e-canary-"
SECRETS = {
    "open-webui.secret-key": f"{CANARY}b71c-signs-sessions",
    "open-webui.admin-password": f"{CANARY}40ad-administrator",
    "open-webui.engine-own": f"{CANARY}d95e-engine",
}
SETTINGS: dict[str, Any] = {
    "fleetfit_open_webui": True,
    "llama_cpp_api_key": SECRETS["open-webui.engine-own"],
    "open_webui_secret_key": SECRETS["open-webui.secret-key"],
    "open_webui_admin_password": SECRETS["open-webui.admin-password"],
    # Given with its key, as an engine on another host would be.
    "open_webui_engines": [
        {
            "name": "own",
            "url": "http://127.0.0.1:8080/v1",
            "api_key": SECRETS["open-webui.engine-own"],
        }
    ],
}


@pytest.fixture(scope="module")
def host(start_host: Callable[..., Host], fleet: Fleet) -> Host:
    """Return a host on which the main job has run once; its output was as talkative as it gets."""
    fleet.hosts[:] = [NAME]
    started = start_host(NAME, layer="open-webui")
    played = fleet.play("site.yml", "-vvv", "--diff", timeout_s=1800, **SETTINGS)
    (fleet.folder / "first.log").write_text(played.output)
    assert played.returncode == 0, played.text.replace(CANARY, "CANARY ")[-4000:]
    return started


def test_the_secrets_are_there_for_the_service(host: Host) -> None:
    """The tests below look for something that is really there, and that the service runs with."""
    pid = host.run("systemctl show open-webui --property=MainPID --value")
    environ = host.run(f"tr '\\0' '\\n' < /proc/{pid}/environ")
    for name, secret in SECRETS.items():
        path = f"/etc/fleetfit/credentials/{name}"
        assert host.run(f"cat {path}") == secret
        assert host.run(f"stat -c '%a %U' {path}") == "600 root"
        assert secret in environ
    assert host.raw(f"runuser -u nobody -- cat /proc/{pid}/environ").returncode != 0


def test_no_output_of_the_run_has_one(host: Host, fleet: Fleet) -> None:
    """Neither with -vvv nor with --diff; facts are part of that output."""
    output = (fleet.folder / "first.log").read_text()
    assert '"machine_id"' in output, "the facts were not shown"
    assert CANARY not in output


@pytest.mark.parametrize(
    ("command", "shows"),
    [
        ("cat /proc/[0-9]*/cmdline | tr '\\0' ' '", "open-webui"),
        ("systemctl cat '*.service'; systemctl show '*'", "LoadCredential"),
        (
            "busctl --no-pager introspect org.freedesktop.systemd1"
            " /org/freedesktop/systemd1/unit/open_2dwebui_2eservice",
            ".Environment",
        ),
        ("journalctl --namespace='*' --no-pager --output=export", "open-webui"),
        ("cat /etc/fleetfit/manifest.json", "open_webui"),
        ("cat /var/lib/fleetfit/switch/*.json", "open-webui"),
        (
            "find / -xdev -type f -perm -o+r -not -path '/proc/*' -size -20M -exec grep -lF e2e-canary {} +"
            " ; echo searched",
            "searched",
        ),
    ],
    ids=["argv", "units", "dbus", "journals", "manifest", "switch journals", "world-readable files"],
)
def test_no_place_on_the_host_has_one(host: Host, command: str, shows: str) -> None:
    found = host.raw(command, timeout_s=600).stdout
    assert shows in found, "the search itself does not work"
    # The search's own command line aside.
    left = found.replace("grep -lF e2e-canary", "")
    assert CANARY not in left
    assert shows != "searched" or left.strip() == "searched"
