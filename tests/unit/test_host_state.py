"""One look at a host: manifest, services, releases, helper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.host_state import host_state

SHOW = """Id=llama-server.service
ActiveState=active

Id=vllm.service
ActiveState=inactive

Id=open-webui.service
ActiveState=failed
"""


class Systemctl:
    """Answers as systemctl 252 does, and counts the calls."""

    def __init__(self, output: str = SHOW, status: int = 0) -> None:
        self.output = output
        self.status = status
        self.calls: list[list[str]] = []

    def __call__(self, arguments: Sequence[str]) -> tuple[int, str]:
        self.calls.append(list(arguments))
        return self.status, self.output


def state(root: Path, run: Any) -> dict[str, Any]:
    return host_state(str(root), run=run, pynvml_source="raise ImportError('none in this test')")


def release(root: Path, service: str, digest: str) -> None:
    folder = root / f"opt/fleetfit/{service}"
    (folder / f"releases/{digest}").mkdir(parents=True)
    (folder / "current").symlink_to(f"/opt/fleetfit/{service}/releases/{digest}")
    unit = root / f"etc/systemd/system/{service}.service"
    unit.parent.mkdir(parents=True, exist_ok=True)
    unit.write_text("[Service]\n")


def test_what_the_last_good_start_took_is_told_where_it_is_recorded(tmp_path: Path) -> None:
    release(tmp_path, "llama-server", "3f0c9a")
    record = tmp_path / "var/lib/fleetfit/switch/llama-server.good"
    record.parent.mkdir(parents=True)
    for content, expected in (
        ('{"last_start": {"ready_s": 7.5, "stop_s": 1.0}}', {"ready_s": 7.5, "stop_s": 1.0}),
        ('{"last_start": null}', None),
        ("{", None),
    ):
        record.write_text(content)
        assert state(tmp_path, Systemctl())["services"]["llama-server"].get("last_start") == expected


def test_services_take_one_call(tmp_path: Path) -> None:
    release(tmp_path, "llama-server", "3f0c9a")
    systemctl = Systemctl()
    assert state(tmp_path, systemctl)["services"] == {
        "llama-server": {"active": "active", "release": "3f0c9a", "unit_file": True},
        "vllm": {"active": "inactive", "release": None, "unit_file": False},
        "open-webui": {"active": "failed", "release": None, "unit_file": False},
    }
    assert len(systemctl.calls) == 1


def missing(_arguments: Sequence[str]) -> tuple[int, str]:
    raise FileNotFoundError("systemctl")


@pytest.mark.parametrize("run", [Systemctl("", 1), Systemctl("nonsense"), missing])
def test_without_systemd_nothing_is_known_to_run(tmp_path: Path, run: Any) -> None:
    assert {s["active"] for s in state(tmp_path, run)["services"].values()} == {"unknown"}


def test_a_link_that_is_no_release_is_none(tmp_path: Path) -> None:
    (tmp_path / "opt/fleetfit/vllm").mkdir(parents=True)
    (tmp_path / "opt/fleetfit/vllm/current").symlink_to("/tmp/elsewhere")
    assert state(tmp_path, Systemctl())["services"]["vllm"]["release"] is None


def test_manifest_and_helper(tmp_path: Path) -> None:
    assert state(tmp_path, Systemctl())["manifest"] is None
    manifest = {"schema_version": 1, "sections": {"llama_cpp": {"paths": []}}}
    (tmp_path / "etc/fleetfit").mkdir(parents=True)
    (tmp_path / "etc/fleetfit/manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "opt/fleetfit/libexec/0123456789abcdef").mkdir(parents=True)
    (tmp_path / "opt/fleetfit/libexec/current").symlink_to("0123456789abcdef")
    found = state(tmp_path, Systemctl())
    assert found["manifest"] == manifest
    assert found["helper_digest"] == "0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "manifest_unreadable"),
        ("\xff\xfe", "manifest_unreadable"),
        ("[]", "manifest_version"),
        ('{"schema_version": 7, "sections": {}}', "manifest_version"),
        ('{"schema_version": 1}', "manifest_unreadable"),
    ],
)
def test_a_broken_manifest_is_a_problem(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "etc/fleetfit").mkdir(parents=True)
    (tmp_path / "etc/fleetfit/manifest.json").write_bytes(text.encode("latin-1"))
    found = state(tmp_path, Systemctl())
    assert found["manifest"] is None
    problem = found["facts"]["problems"][-1]
    assert problem["code"] == code
    assert problem["remedy"]


def test_looking_changes_nothing(tmp_path: Path) -> None:
    release(tmp_path, "llama-server", "3f0c9a")
    before = sorted((str(p), p.lstat().st_mtime_ns) for p in tmp_path.rglob("*"))
    state(tmp_path, Systemctl())
    assert sorted((str(p), p.lstat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
