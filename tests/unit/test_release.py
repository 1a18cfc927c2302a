"""Releases: their digest, their files, the script that they run, and what may be deleted."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.manifest import HostPaths
from ansible_collections.fleetfit.llm.plugins.module_utils.release import (
    ReleaseSpec,
    collect_garbage,
    current_digest,
    point_current,
    referenced_paths,
    release_digest,
    render_run,
    write_release,
)
from hypothesis import given, settings
from hypothesis import strategies as st

BASE = ReleaseSpec(
    service="engine",
    argv=["{release}/env/bin/engine", "--port", "8080"],
    environment="/opt/fleetfit/engine/envs/one",
    links={"model": "/var/lib/fleetfit/models/m/q"},
    model_sha256=["b" * 64, "a" * 64],
    settings={"n_ctx": 4096, "slots": 2},
    files={"chat_template.jinja": "{{ messages }}\n"},
    environ={"CUDA_VISIBLE_DEVICES": "GPU-1"},
    plan={"candidates": []},
    gate={"kind": "llama_cpp", "url": "http://127.0.0.1:8080"},
)

IN_DIGEST: list[dict[str, Any]] = [
    {"argv": ["{release}/env/bin/engine", "--port", "8081"]},
    {"environment": "/opt/fleetfit/engine/envs/two"},
    {"links": {"model": "/var/lib/fleetfit/models/m/other"}},
    {"model_sha256": ["a" * 64]},
    {"settings": {"n_ctx": 8192, "slots": 2}},
    {"files": {"chat_template.jinja": "{{ other }}\n"}},
    {"environ": {"CUDA_VISIBLE_DEVICES": "GPU-2"}},
    {"environ_credentials": {"KEY": "api-key"}},
]
BESIDE_DIGEST: list[dict[str, Any]] = [
    {"plan": {"candidates": [1]}},
    {"gate": {"kind": "vllm", "url": "http://127.0.0.1:8101"}},
    {"restart_on": ["/etc/x"]},
    {"precheck": {"kind": "llama_fit_params", "argv": ["x"], "limits": {}}},
    {"model_sha256": ["a" * 64, "b" * 64]},
    {"settings": {"slots": 2, "n_ctx": 4096}},
]


@pytest.mark.parametrize("change", IN_DIGEST, ids=lambda change: next(iter(change)))
def test_what_decides_how_the_service_runs_makes_another_release(change: dict[str, Any]) -> None:
    assert release_digest(replace(BASE, **change)) != release_digest(BASE)


@pytest.mark.parametrize("change", BESIDE_DIGEST, ids=lambda change: next(iter(change)))
def test_what_does_not_decide_it_keeps_the_release(change: dict[str, Any]) -> None:
    assert release_digest(replace(BASE, **change)) == release_digest(BASE)


def run_script(spec: ReleaseSpec, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a release's script with the shell that a host has."""
    script = folder / "run"
    script.write_text(render_run(spec, "/opt/x y/release"))
    return subprocess.run(
        ["/bin/sh", str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], **environ},
    )


PRINT = [
    "/usr/bin/env",
    "python3",
    "-c",
    "import sys, json, os; print(json.dumps([sys.argv[1:], dict(os.environ)]))",
]
ARGUMENT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=30)


@settings(deadline=None)  # it starts programs, which takes as long as the machine is busy
@given(arguments=st.lists(ARGUMENT, max_size=4))
def test_every_argument_arrives_as_it_was_given(
    arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    # printf ends each argument with NUL, so that nothing in it can be mistaken.
    spec = replace(
        BASE, argv=["printf", r"%s\0", "first", *[text.replace("{", "(") for text in arguments]], environ={}
    )
    script = tmp_path_factory.getbasetemp() / "arguments"
    script.write_text(render_run(spec, "/r"), encoding="utf-8")
    done = subprocess.run(["/bin/sh", str(script)], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[1:-1] == [text.replace("{", "(") for text in arguments]


def test_placeholders_and_environment_reach_the_program(tmp_path: Path) -> None:
    (tmp_path / "api-key").write_text("s3cr3t\n")
    (tmp_path / "second").write_text("other\n")
    awkward = "a'b\"c $HOME `id` {unknown} \\"
    spec = replace(
        BASE,
        argv=[*PRINT, "{release}/model", "--file={credentials}/api-key", awkward, "", "line\nbreak"],
        environ={"AWKWARD": awkward, "WHERE": "{release}/lib"},
        environ_credentials={"ONE": "api-key", "LIST": ["api-key", "second"]},
    )
    done = run_script(spec, tmp_path, CREDENTIALS_DIRECTORY=str(tmp_path))
    arguments, environ = json.loads(done.stdout)
    assert arguments == ["/opt/x y/release/model", f"--file={tmp_path}/api-key", awkward, "", "line\nbreak"]
    assert (environ["AWKWARD"], environ["WHERE"]) == (awkward, "/opt/x y/release/lib")
    assert (environ["ONE"], environ["LIST"]) == ("s3cr3t", "s3cr3t;other")
    assert "s3cr3t" not in (tmp_path / "run").read_text()


def test_a_missing_credential_stops_the_start(tmp_path: Path) -> None:
    spec = replace(BASE, argv=["echo", "started"], environ_credentials={"ONE": "absent"})
    done = run_script(spec, tmp_path, CREDENTIALS_DIRECTORY=str(tmp_path))
    assert (done.returncode, done.stdout) == (78, "")
    done = run_script(spec, tmp_path)
    assert done.returncode != 0
    assert "LoadCredential" in done.stderr


@pytest.fixture
def paths(tmp_path: Path) -> HostPaths:
    for folder in (
        "opt/fleetfit/engine/envs/one",
        "opt/fleetfit/engine/envs/two",
        "var/lib/fleetfit/models/m/q",
    ):
        (tmp_path / folder).mkdir(parents=True)
    return HostPaths(str(tmp_path))


def test_a_release_is_written_once_and_put_right_when_edited(paths: HostPaths) -> None:
    written = write_release(BASE, paths)
    release = Path(paths.releases("engine"), written.digest)
    assert written.created
    assert sorted(os.listdir(release)) == [
        "chat_template.jinja", "env", "model", "plan.json", "release.json", "run", "settings.json",
    ]  # fmt: skip
    assert os.readlink(release / "env") == BASE.environment
    assert stat.S_IMODE((release / "run").stat().st_mode) == 0o755
    assert not write_release(BASE, paths).changed
    (release / "run").write_text("#!/bin/sh\n")
    (release / "model").unlink()
    assert write_release(BASE, paths).repaired == ("model", "run")
    assert (release / "run").read_text() == render_run(
        BASE, f"/opt/fleetfit/engine/releases/{written.digest}"
    )
    refreshed = write_release(replace(BASE, plan={"candidates": [1]}), paths)
    assert (refreshed.created, refreshed.repaired, refreshed.refreshed) == (False, (), ("plan.json",))


def test_a_release_can_be_read_whatever_the_umask(paths: HostPaths) -> None:
    before = os.umask(0o077)
    try:
        digest = write_release(BASE, paths).digest
    finally:
        os.umask(before)
    for path in (paths.releases("engine"), f"{paths.releases('engine')}/{digest}"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o755


def test_what_is_missing_is_named_and_nothing_is_left(paths: HostPaths) -> None:
    with pytest.raises(FleetfitError, match="models/absent") as caught:
        write_release(replace(BASE, links={"model": "/var/lib/fleetfit/models/absent"}), paths)
    assert caught.value.code == "release_incomplete"
    assert not os.path.exists(paths.releases("engine"))


def test_check_mode_writes_nothing(paths: HostPaths) -> None:
    assert write_release(BASE, paths, check_mode=True).created
    assert not os.path.exists(paths.releases("engine"))


def test_current_never_dangles(paths: HostPaths) -> None:
    digest = write_release(BASE, paths).digest
    with pytest.raises(FleetfitError):
        point_current(paths, "engine", "0123456789abcdef")
    assert current_digest(paths, "engine") is None
    point_current(paths, "engine", digest)
    with pytest.raises(FleetfitError):
        point_current(paths, "engine", "0123456789abcdef")
    assert os.readlink(paths.current("engine")) == f"releases/{digest}"
    point_current(paths, "engine", None)
    point_current(paths, "engine", None)
    assert not os.path.lexists(paths.current("engine"))


def test_garbage_is_what_no_kept_release_needs(paths: HostPaths, tmp_path: Path) -> None:
    kept = write_release(BASE, paths).digest
    other = write_release(replace(BASE, environment="/opt/fleetfit/engine/envs/two"), paths).digest
    envs = Path(paths.envs("engine"))
    for name in (".three", "three.partial", "four"):
        (envs / name).mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    (envs / "five").symlink_to(outside)
    releases = paths.releases("engine")
    assert collect_garbage(paths, "engine", [kept]) == [
        os.path.join(releases, other), str(envs / "five"), str(envs / "four"), str(envs / "two"),
    ]  # fmt: skip
    assert sorted(os.listdir(envs)) == [".three", "one", "three.partial"]
    assert os.listdir(releases) == [kept]
    assert (outside / "file").exists()  # the link went, not what it led to
    assert referenced_paths(paths, "engine", [kept]) == [BASE.environment, BASE.links["model"]]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"service": "../x"}, "not a service name"),
    ({"argv": []}, "no command"),
    ({"argv": ["a\0b"]}, "NUL"),
    ({"files": {"../x": ""}}, "cannot be a file"),
    ({"files": {"run": ""}}, "cannot be a file"),
    ({"links": {"chat_template.jinja": "/x"}}, "both a file and a link"),
    ({"links": {"model": "relative"}}, "not absolute"),
    ({"environ": {"A B": "x"}}, "environment variable"),
    ({"environ_credentials": {"A": "x/../y"}}, "credential's name"),
    ({"environ": {"A": 1}}, "not text"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[row[1] for row in BAD])
def test_what_could_not_run_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FleetfitError, match=message) as caught:
        replace(BASE, **change)
    assert caught.value.remedy
