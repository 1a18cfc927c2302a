"""Open WebUI with 1,000 chats: an upgrade that fails, one that works, going back, backups and restores.

The newer versions are made here: the environment of the installed one with another version in its metadata
and a migration of its own, as a real upgrade has. The one that fails deletes half of the chats first.
Exports are what the API gives a user who exports all chats, compared byte by byte. The engine behind the
page is a stand-in that always says Paris: what is looked at here is the page's own data.
"""

from __future__ import annotations

import json
import shlex
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.python_runtime import choose_environment

from .conftest import REPO, Fleet, Host

pytestmark = pytest.mark.slow

NAME = "e2e-upgrade"
CHATS = 1000
DATA = "/var/lib/fleetfit/open-webui/data"
BACKUPS = "/var/lib/fleetfit/backups/open-webui"
JOURNAL = "/var/lib/fleetfit/switch/open-webui.json"
OLD, FAILING, NEW = "0.12.4", "0.12.98", "0.12.99"

# Run on the host with the administrator's password from its file: what a page does, and nothing in any argv.
API = r"""
import hashlib, json, sys, time, urllib.request
URL = "http://127.0.0.1:3000"
def call(method, path, body=None, token=""):
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = "Bearer " + token
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(URL + path, data, headers, method=method), timeout=120) as r:
        return r.read()
password = open("/etc/fleetfit/credentials/open-webui.admin-password").read().strip()
account = {"email": "admin@fleetfit.internal", "password": password}
token = json.loads(call("POST", "/api/v1/auths/signin", account))["token"]
def chat(number):
    said = [
        {"id": "q%d" % number, "parentId": None, "childrenIds": ["a%d" % number], "role": "user",
         "content": "Question %d: what is the capital of France? äöü €" % number, "timestamp": number},
        {"id": "a%d" % number, "parentId": "q%d" % number, "childrenIds": [], "role": "assistant",
         "content": "Answer %d: Paris. " % number * 20, "timestamp": number, "done": True},
    ]
    history = {"currentId": "a%d" % number, "messages": {each["id"]: each for each in said}}
    return {"chat": {"title": "Chat %d" % number, "models": ["m"], "messages": said, "history": history}}
def add(first, count):
    for number in range(first, first + count):
        call("POST", "/api/v1/chats/new", chat(number), token)
def export():
    data = call("GET", "/api/v1/chats/all", None, token)
    lines = [json.loads(line) for line in data.splitlines() if line.strip()]
    return {"chats": len(lines), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
begun = time.time()
"""
ENGINE = """\
import http.server, json
class Handler(http.server.BaseHTTPRequestHandler):
    def send(self, kind, data):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.send("application/json", json.dumps({"object": "list", "data": [{"id": "stand-in"}]}).encode())
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": "Paris."}
        if not body.get("stream"):
            answer = {"model": "stand-in", "choices": [{"message": message, "finish_reason": "stop"}]}
            self.send("application/json", json.dumps(answer).encode())
            return
        events = [{"choices": [{"delta": message}]}, {"choices": [{"delta": {}, "finish_reason": "stop"}]}]
        lines = [json.dumps(event) for event in events] + ["[DONE]"]
        self.send("text/event-stream", "".join(f"data: {line}\\n\\n" for line in lines).encode())
http.server.ThreadingHTTPServer(("127.0.0.1", 8080), Handler).serve_forever()
"""
SETTINGS: dict[str, Any] = {
    "fleetfit_open_webui": True,
    "open_webui_engines": [
        {"name": "stand-in", "url": "http://127.0.0.1:8080/v1", "api_key": "e2e-key-of-the-stand-in"}
    ],
    "open_webui_model": "stand-in",
    # Environments that the tests make must outlive what the role deletes.
    "open_webui_keep_releases": 5,
}
WEBUI_PLAY: list[dict[str, Any]] = [
    {
        "name": "Serve the chat page",
        "hosts": "llm_hosts",
        "become": True,
        "gather_facts": False,
        "tasks": [
            {"name": "Read the host's state", "fleetfit.llm.host_state": {}},
            {"name": "Choose engine and quantization", "fleetfit.llm.select_quantization": {}},
            {"name": "Have the base", "ansible.builtin.include_role": {"name": "fleetfit.llm.host_baseline"}},
            {"name": "Have the page", "ansible.builtin.include_role": {"name": "fleetfit.llm.open_webui"}},
        ],
    }
]
MIGRATION = """\
import json
revision = "{revision}"
down_revision = {down!r}
branch_labels = None
depends_on = None
def upgrade():
    from alembic import op
    connection = op.get_bind()
    run = connection.exec_driver_sql
{body}
def downgrade():
    pass
"""
SCHEMA = """
import sqlite3

connection = sqlite3.connect("/var/lib/fleetfit/open-webui/data/webui.db")
print(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])
"""
GOOD = """\
    run("CREATE TABLE of_the_newer_version (id INTEGER)")
"""
# Its traces are outside the data directory, so that a restore does not hide that it ran.
DAMAGING = """\
    before = run("SELECT count(*) FROM chat").scalar()
    run("DELETE FROM chat WHERE rowid % 2 = 0")
    run("CREATE TABLE of_the_failed_version (id INTEGER)")
    connection.connection.commit()
    with open("/var/lib/fleetfit/open-webui/damage.json", "w") as stream:
        json.dump([before, run("SELECT count(*) FROM chat").scalar()], stream)
    raise SystemExit("this migration fails half way")
"""


@dataclass
class Site:
    """The host, and what the tests remember of it."""

    host: Host
    fleet: Fleet
    settings: dict[str, Any]
    before: dict[str, Any] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)

    def api(self, code: str) -> Any:
        """Run code against the service's API on the host; return what it leaves in ``result``."""
        script = API + code + "\nprint(json.dumps({'result': result, 'seconds': time.time() - begun}))"
        answer = json.loads(
            self.host.run(f"python3 -c {shlex.quote(script)}", timeout_s=600).splitlines()[-1]
        )
        return answer

    def export(self) -> dict[str, Any]:
        """Return count, size and checksum of the export of all chats."""
        return dict(self.api("result = export()")["result"])

    def version(self) -> str:
        """Return the version of Open WebUI that serves."""
        pattern = "/opt/fleetfit/open-webui/current/env/lib/python3.*/site-packages/open_webui-*.dist-info"
        return self.host.run(f"echo {pattern}").rsplit("open_webui-", 1)[1].removesuffix(".dist-info")

    def journal(self) -> dict[str, Any]:
        """Return the journal of the last transaction, and note how long its steps took."""
        return dict(json.loads(self.host.run(f"cat {JOURNAL}")))

    def pid(self) -> str:
        """Return the service's main process."""
        return self.host.run("systemctl show open-webui --property=MainPID --value")

    def deploy(self, **variables: Any) -> Any:
        """Run the chat page's part of the main job."""
        path = self.fleet.folder / "webui.yml"
        path.write_text(yaml.safe_dump(WEBUI_PLAY))
        return self.play(str(path), **variables)

    def play(self, playbook: str, *options: str, **variables: Any) -> Any:
        """Run a play with the host's settings."""
        begun = time.monotonic()
        played = self.fleet.play(playbook, *options, timeout_s=1800, **{**self.settings, **variables})
        print(f"{playbook} {variables}: rc {played.returncode}, {time.monotonic() - begun:.0f} s")
        return played

    def wheelhouses(self, version: str) -> list[dict[str, Any]]:
        """Return the entry of a version whose environment make_version() has made."""
        lab = yaml.safe_load((REPO / ".lab/artifacts.yml").read_text())["open_webui_wheelhouse"]
        digit = {FAILING: "8", NEW: "9"}.get(version)
        return [
            {
                "python": lab["python"],
                "arch": "x86_64",
                "glibc": "2.34",
                "url": lab["url"],
                "size": lab["size"],
                "sha256": digit * 64 if digit else lab["sha256"],
            }
        ]

    def environment(self, version: str) -> str:
        """Return the path of a version's environment, as the role names it."""
        choice = choose_environment(
            "open-webui", self.wheelhouses(version), [], system_python="3.11.2", arch="x86_64", glibc="2.36"
        )
        return str(choice["environment"])

    def make_version(self, version: str, revision: str, body: str) -> None:
        """Make the environment of a newer version: other metadata, and one more migration."""
        old, new = self.environment(OLD), self.environment(version)
        site = "lib/python3.11/site-packages"
        down = self.host.run(f"python3 -c {shlex.quote(SCHEMA)}")
        migration = MIGRATION.format(revision=revision, down=down, body=body)
        script = f"""
set -e
mkdir -p {new}/{site}
cp -a {old}/bin {old}/pyvenv.cfg {new}/
ln -s lib {new}/lib64
for each in {old}/{site}/*; do
    case $(basename $each) in open_webui*) ;; *) ln -s $each {new}/{site}/ ;; esac
done
cp -a {old}/{site}/open_webui {new}/{site}/open_webui
cp -a {old}/{site}/open_webui-{OLD}.dist-info {new}/{site}/open_webui-{version}.dist-info
sed -i 's/^Version: .*/Version: {version}/' {new}/{site}/open_webui-{version}.dist-info/METADATA
cat > {new}/{site}/open_webui/migrations/versions/{revision}_made_by_the_test.py <<'MIGRATION'
{migration}
MIGRATION
chown -R root:root {new}
"""
        self.host.run(script, timeout_s=300)


@pytest.fixture(scope="module")
def site(start_host: Callable[..., Host], fleet: Fleet) -> Site:
    """Return a host that serves Open WebUI with 1,000 chats."""
    fleet.hosts[:] = [NAME]
    host = start_host(NAME, layer="open-webui")
    host.run(f"printf %s {shlex.quote(ENGINE)} > /opt/engine.py")
    host.run("systemd-run --unit=stand-in --quiet python3 /opt/engine.py")
    made = Site(host, fleet, SETTINGS)
    played = made.deploy()
    assert played.returncode == 0, played.output[-4000:]
    answer = made.api(f"add(0, {CHATS}); result = None")
    print(f"{CHATS} chats made in {answer['seconds']:.1f} s")
    made.before = made.export()
    print(f"exported: {made.before}")
    assert made.before["chats"] == CHATS
    assert made.version() == OLD
    return made


def seconds(journal: dict[str, Any], first: str, last: str) -> float:
    """Return the seconds from the beginning of one step to that of another."""
    at = {step["step"]: step["at"] for step in journal["steps"]}
    return float(at[last] - at[first])


def test_failed_upgrade_brings_every_chat_back(site: Site) -> None:
    site.make_version(FAILING, "f1ee7f170098", DAMAGING)
    played = site.deploy(open_webui_wheelhouses=site.wheelhouses(FAILING))
    assert played.returncode != 0
    assert "failed at 'gate' (crashed)" in played.text
    assert json.loads(site.host.run("cat /var/lib/fleetfit/open-webui/damage.json")) == [CHATS, CHATS // 2]
    journal = site.journal()
    print(
        f"failed upgrade: backup {seconds(journal, 'backup', 'flip'):.2f} s, restored in"
        f" {seconds(journal, 'revert_backup', 'revert_start'):.2f} s, away"
        f" {journal['ended_at'] - journal['steps'][0]['at']:.0f} s in all"
    )
    assert journal["state"] == "reverted"
    assert site.version() == OLD
    assert site.export() == site.before


def test_upgrade_keeps_every_chat_and_a_backup_of_the_old_version(site: Site) -> None:
    site.make_version(NEW, "f1ee7f170099", GOOD)
    played = site.deploy(open_webui_wheelhouses=site.wheelhouses(NEW))
    assert played.returncode == 0, played.output[-4000:]
    journal = site.journal()
    print(
        f"upgrade: backup {seconds(journal, 'backup', 'flip'):.2f} s, from stop to the gate's verdict"
        f" {seconds(journal, 'stop', 'record'):.1f} s"
    )
    assert site.version() == NEW
    assert site.export() == site.before
    record = json.loads(site.host.run(f"cat {Path(journal['backup']['copy']).parent}/backup.json"))
    assert (record["version"], record["chats"], record["release"]) == (OLD, CHATS, journal["from"])
    assert site.host.run(f"find {BACKUPS} -perm /077 -prune -maxdepth 1") == ""


def test_older_code_is_not_put_in_front_of_migrated_data_unasked(site: Site) -> None:
    pid = site.pid()
    site.api("add(5000, 1); result = None")
    played = site.play("playbooks/rollback_release.yml", fleetfit_rollback_service="open-webui")
    assert played.returncode != 0
    for word in (f"{CHATS} chats", f"{CHATS + 1} chats", "fleetfit_rollback_data=restore", OLD, NEW):
        assert word in played.text, word
    assert (site.version(), site.pid()) == (NEW, pid)


def test_going_back_brings_code_and_data_of_then_and_stays(site: Site) -> None:
    asked = {"fleetfit_rollback_service": "open-webui", "fleetfit_rollback_data": "restore"}
    pid = site.pid()
    checked = site.play("playbooks/rollback_release.yml", "--check", **asked, fleetfit_rollback_to=OLD)
    assert checked.returncode == 0, checked.output[-4000:]
    assert "open-webui would go from" in checked.text
    assert site.pid() == pid
    played = site.play("playbooks/rollback_release.yml", **asked, fleetfit_rollback_to=OLD)
    assert played.returncode == 0, played.output[-4000:]
    assert site.version() == OLD
    assert site.export() == site.before
    # What was made since then is in the backup of the newer release.
    newest = json.loads(site.host.run(f"cat {Path(site.journal()['backup']['copy']).parent}/backup.json"))
    assert (newest["version"], newest["chats"]) == (NEW, CHATS + 1)


def test_a_run_says_that_it_is_held_and_changes_nothing(site: Site) -> None:
    site.deploy(open_webui_wheelhouses=site.wheelhouses(NEW))
    held = site.deploy(open_webui_wheelhouses=site.wheelhouses(NEW))
    assert held.returncode == 0, held.output[-4000:]
    assert "is held at the release" in held.text
    assert held.recap()[NAME]["changed"] == 0, held.output
    assert site.version() == OLD


def test_a_backup_of_a_newer_version_is_refused(site: Site) -> None:
    name = Path(site.journal()["backup"]["copy"]).parent.name
    pid = site.pid()
    played = site.play("playbooks/restore_webui.yml", fleetfit_restore_name=name)
    assert played.returncode != 0
    assert f"was made by open-webui {NEW}; {OLD} is installed" in played.text
    assert site.pid() == pid
    unknown = site.play("playbooks/restore_webui.yml", fleetfit_restore_name="yesterday")
    assert unknown.returncode != 0
    assert name in unknown.text


@pytest.fixture(scope="module")
def fetched(site: Site) -> Path:
    """Return a backup on the controller, made while the service ran."""
    folder = site.fleet.folder / "fetched"
    pid = site.pid()
    played = site.play("playbooks/backup_webui.yml", fleetfit_backup_fetch_dir=str(folder))
    assert played.returncode == 0, played.output[-4000:]
    assert site.pid() == pid
    (found,) = (folder / NAME).iterdir()
    assert stat.S_IMODE(found.stat().st_mode) == 0o600
    assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700
    assert site.host.run("find /tmp /root -name '*.fleetfit' -o -name 'open-webui-*.tar'") == ""
    return found


def test_restore_by_name_brings_every_chat_back(site: Site, fetched: Path) -> None:
    name = fetched.name.removeprefix("open-webui-").removesuffix(".tar")
    site.api("call('DELETE', '/api/v1/chats/', None, token); result = None")
    assert site.export()["chats"] == 0
    played = site.play("playbooks/restore_webui.yml", fleetfit_restore_name=name)
    assert played.returncode == 0, played.output[-4000:]
    assert site.export() == site.before


def test_restore_from_the_controller_brings_every_chat_back(site: Site, fetched: Path) -> None:
    site.api("call('DELETE', '/api/v1/chats/', None, token); result = None")
    site.host.run(f"rm -rf {BACKUPS}/manual-*")
    played = site.play("playbooks/restore_webui.yml", fleetfit_restore_file=str(fetched))
    assert played.returncode == 0, played.output[-4000:]
    assert site.export() == site.before
    assert site.host.run(f"find {DATA} ! -user fleetfit-webui") == ""
    assert site.host.run(f"ls -A {BACKUPS} | grep pushed || true") == ""


def test_restore_that_does_not_serve_leaves_the_data_as_it_was(site: Site, fetched: Path) -> None:
    """The backup is whole as a database, but its administrator has another password."""
    site.api("add(6000, 1); result = None")
    before = site.export()
    script = "import glob, sqlite3; c = sqlite3.connect(glob.glob('%s/manual-*/data/webui.db')[0]);"
    script += " c.execute(\"UPDATE auth SET password = 'x'\"); c.commit()"
    site.host.run(f"python3 -c {shlex.quote(script % BACKUPS)}")
    name = site.host.run(f"basename {BACKUPS}/manual-*")
    played = site.play("playbooks/restore_webui.yml", fleetfit_restore_name=name)
    assert played.returncode != 0
    assert "The data that it replaced is back" in played.text
    assert site.journal()["state"] == "reverted"
    assert site.export() == before


def test_it_goes_forward_again_when_the_hold_is_ended(site: Site) -> None:
    before = site.export()
    played = site.deploy(open_webui_wheelhouses=site.wheelhouses(NEW), fleetfit_release_hold=False)
    assert played.returncode == 0, played.output[-4000:]
    assert site.version() == NEW
    assert site.export() == before
    second = site.deploy(open_webui_wheelhouses=site.wheelhouses(NEW))
    assert second.recap()[NAME]["changed"] == 0, second.output
