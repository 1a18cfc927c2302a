"""llama.cpp from a package of a site's own repository, and from a build that the controller has already."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import REPO, SSH_CONFIG, Fleet, Host

pytestmark = pytest.mark.slow

NAME = "e2e-install"
REPOSITORY = "/srv/llama-cpp"
VERSION = "11434.0.0-1"
CONTROL = f"""Package: llama.cpp
Version: {VERSION}
Architecture: amd64
Maintainer: The example site <site@example.com>
Description: llama.cpp as the lab builds it
"""


def engine_archive() -> Path:
    """Return the lab's build of llama.cpp in the cache, which `fleetfit lab up` has made."""
    entry = yaml.safe_load((REPO / ".lab/artifacts.yml").read_text())["llama_cpp"]
    for path in sorted((Path.home() / ".cache/fleetfit/engine").glob("*/llama-cpp-*.tar.gz")):
        if hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]:
            return path
    raise AssertionError("the lab's build of llama.cpp is not in the cache; run `make lab` first")


def gpg(home: Path, *arguments: str) -> None:
    argv = [
        "gpg",
        "--homedir",
        str(home),
        "--batch",
        "--quiet",
        "--pinentry-mode",
        "loopback",
        "--passphrase",
        "",
    ]
    subprocess.run([*argv, *arguments], check=True, capture_output=True)


def make_repository(folder: Path) -> Path:
    """Write a flat, signed Debian repository with our own build as a package; return its key."""
    root, repository, home = folder / "root", folder / "repository", folder / "gpg"
    for directory in (root / "DEBIAN", root / "usr/bin", repository, home):
        directory.mkdir(parents=True)
    home.chmod(0o700)
    (root / "DEBIAN/control").write_text(CONTROL)
    with tarfile.open(engine_archive()) as tar:
        tar.extractall(folder / "archive", filter="data")
    for name in ("llama-server", "llama-fit-params"):
        (folder / "archive/bin" / name).rename(root / "usr/bin" / name)
    package = repository / f"llama.cpp_{VERSION}_amd64.deb"
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", "-Zgzip", "-z1", str(root), str(package)],
        check=True,
        capture_output=True,
    )
    content = package.read_bytes()
    packages = (
        f"{CONTROL}Filename: ./{package.name}\nSize: {len(content)}\n"
        f"SHA256: {hashlib.sha256(content).hexdigest()}\n\n"
    ).encode()
    (repository / "Packages").write_bytes(packages)
    digest = hashlib.sha256(packages).hexdigest()
    (repository / "Release").write_text(
        "Origin: example\nSuite: ./\nDate: Mon, 01 Jan 2024 00:00:00 UTC\n"
        f"SHA256:\n {digest} {len(packages)} Packages\n"
    )
    gpg(home, "--quick-generate-key", "site@example.com", "rsa3072", "sign", "never")
    gpg(home, "--armor", "--output", str(folder / "key.asc"), "--export", "site@example.com")
    gpg(home, "--clearsign", "--output", str(repository / "InRelease"), str(repository / "Release"))
    return folder / "key.asc"


@pytest.fixture(scope="module")
def host(start_host: Callable[..., Host], fleet: Fleet) -> Host:
    fleet.hosts[:] = [NAME]
    return start_host(NAME)


@pytest.fixture(scope="module")
def package(host: Host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Put the repository on the host and return the variables that use it."""
    folder = tmp_path_factory.mktemp("site")
    key = make_repository(folder)
    host.run(f"mkdir -p {REPOSITORY}")
    pack = subprocess.Popen(
        ["tar", "-C", str(folder / "repository"), "-cf", "-", "."], stdout=subprocess.PIPE
    )
    unpack = ["ssh", "-F", str(SSH_CONFIG), NAME, f"tar -C {REPOSITORY} --no-same-owner -xf -"]
    subprocess.run(unpack, stdin=pack.stdout, check=True)
    assert pack.wait() == 0
    repository = {"uri": f"file:{REPOSITORY}", "suite": "./", "signed_by": str(key)}
    return {"llama_cpp_install_method": "package", "llama_cpp_package_repository": repository}


def engine_of(host: Host) -> str:
    pid = host.run("systemctl show llama-server --property=MainPID --value")
    return host.run(f"readlink -f $(tr '\\0' '\\n' < /proc/{pid}/cmdline | head -1)")


def test_package_from_a_signed_repository(host: Host, fleet: Fleet, package: dict[str, Any]) -> None:
    checked = fleet.play("site.yml", "--check", **package)
    assert checked.returncode == 0, checked.output
    played = fleet.play(**package)
    assert played.returncode == 0, played.output
    assert engine_of(host) == "/usr/bin/llama-server"
    assert host.run("dpkg-query -W -f '${Version}' llama.cpp") == VERSION
    again = fleet.play(**package)
    assert again.recap()[NAME]["changed"] == 0, again.output
    assert host.ready()["ok"]


def test_build_made_once_on_the_controller(host: Host, fleet: Fleet) -> None:
    played = fleet.play(llama_cpp_install_method="build", llama_cpp_archives=[])
    assert played.returncode == 0, played.output
    digest = hashlib.sha256(engine_archive().read_bytes()).hexdigest()
    assert engine_of(host) == f"/opt/fleetfit/llama-server/envs/{digest[:16]}/bin/llama-server"
    again = fleet.play(llama_cpp_install_method="build", llama_cpp_archives=[])
    assert again.recap()[NAME]["changed"] == 0, again.output
    assert json.loads(host.run("cat /etc/fleetfit/manifest.json"))["sections"]["llama_cpp"]
