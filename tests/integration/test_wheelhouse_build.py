"""The wheelhouse builder against a real package index (a folder) with the real pip."""

from __future__ import annotations

import base64
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.python_environment import EnvironmentSpec, build
from ansible_collections.fleetfit.llm.plugins.plugin_utils.wheelhouse import build_first, build_wheelhouse
from uv import find_uv_bin


def write_wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any") -> str:
    """Write a minimal wheel into the index; return its sha256."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    target = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return hashlib.sha256(target.read_bytes()).hexdigest()


BACKEND = """
import pathlib, zipfile
def _info():
    return {"built-1.0.dist-info/METADATA": "Metadata-Version: 2.1\\nName: built\\nVersion: 1.0\\n",
            "built-1.0.dist-info/WHEEL":
                "Wheel-Version: 1.0\\nGenerator: t\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
            "built-1.0.dist-info/RECORD": ""}
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    target = pathlib.Path(directory, "built-1.0.dist-info"); target.mkdir()
    for name, text in _info().items(): pathlib.Path(directory, name).write_text(text)
    return "built-1.0.dist-info"
def build_wheel(directory, config_settings=None, metadata_directory=None):
    name = "built-1.0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(directory, name), "w") as wheel:
        wheel.writestr("built.py", "")
        for path, text in _info().items(): wheel.writestr(path, text)
    return name
"""


def write_sdist(folder: Path) -> str:
    """Write a source release that builds offline with a backend of its own; return its sha256."""
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: built\nVersion: 1.0\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND,
    }
    target = folder / "built-1.0.tar.gz"
    with tarfile.open(target, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"built-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return hashlib.sha256(target.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is the only package index that pip sees."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
    }.items():
        monkeypatch.setenv(name, value)
    return folder


def write_lock(path: Path, *pins: str) -> Path:
    path.write_text("".join(f"{pin}\n" for pin in pins))
    return path


def test_a_build_is_reproducible_cached_and_lists_what_is_in_it(tmp_path: Path, index: Path) -> None:
    one = write_wheel(index, "one", "1.0")
    two = write_wheel(index, "two", "2.0+cpu", "cp311-cp311-manylinux_2_28_x86_64")
    source = write_sdist(index)
    lock = write_lock(
        tmp_path / "lock.txt",
        f"two==2.0+cpu --hash=sha256:{two}",
        f"one==1.0 --hash=sha256:{'0' * 64} --hash=sha256:{one}",
        f"built==1.0 --hash=sha256:{source}",
        f"never==9.9 ; python_version < '3.11' --hash=sha256:{'0' * 64}",
    )
    first = build_wheelhouse(lock, "3.11", tmp_path / "cache")
    again = build_wheelhouse(lock, "3.11", tmp_path / "cache")
    elsewhere = build_wheelhouse(lock, "3.11", tmp_path / "other")

    assert (first.reused, again.reused) == (False, True)
    assert again.sha256 == first.sha256 == hashlib.sha256(first.tar.read_bytes()).hexdigest()
    assert first.size == first.tar.stat().st_size
    assert first.requirements == ("built==1.0", "one==1.0", "two==2.0+cpu")
    with tarfile.open(first.tar) as archive:
        requirements = archive.extractfile("requirements.txt")
        assert requirements is not None
        lines = dict(line.split(" --hash=sha256:") for line in requirements.read().decode().splitlines())
        wheels = [m for m in archive.getmembers() if m.name.startswith("wheels/")]
        assert len(wheels) == 3
        for member in wheels:
            content = archive.extractfile(member)
            assert content is not None
            assert hashlib.sha256(content.read()).hexdigest() in lines.values()
    assert (lines["one==1.0"], lines["two==2.0+cpu"]) == (one, two)
    # A wheel that is built here may differ between builds; downloaded ones may not.
    only_wheels = write_lock(tmp_path / "wheels.txt", f"one==1.0 --hash=sha256:{one}")
    here = build_wheelhouse(only_wheels, "3.11", tmp_path / "cache")
    there = build_wheelhouse(only_wheels, "3.11", tmp_path / "other")
    assert here.tar.read_bytes() == there.tar.read_bytes()
    assert elsewhere.requirements == first.requirements
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_replaced_file_on_the_index_is_refused(tmp_path: Path, index: Path) -> None:
    write_wheel(index, "one", "1.0")
    lock = write_lock(tmp_path / "lock.txt", f"one==1.0 --hash=sha256:{'0' * 64}")
    with pytest.raises(FleetfitError) as caught:
        build_wheelhouse(lock, "3.11", tmp_path / "cache")
    assert caught.value.code == "hash_mismatch"
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_a_release_that_no_index_offers_is_named_and_the_next_lock_is_taken(
    tmp_path: Path, index: Path
) -> None:
    one = write_wheel(index, "one", "1.0")
    write_wheel(index, "newer", "1.0", "cp311-cp311-manylinux_2_39_x86_64")
    small = write_lock(
        tmp_path / "small.txt",
        f"one==1.0 --hash=sha256:{one}",
        f"absent==2.13.0+cpu --hash=sha256:{'0' * 64}",
        f"newer==1.0 --hash=sha256:{'0' * 64}",
    )
    with pytest.raises(FleetfitError) as caught:
        build_wheelhouse(small, "3.11", tmp_path / "cache")
    assert caught.value.code == "not_offered"
    assert "absent==2.13.0+cpu, newer==1.0" in caught.value.message

    said: list[str] = []
    default = write_lock(tmp_path / "default.txt", f"one==1.0 --hash=sha256:{one}")
    built = build_first([small, default], "3.11", tmp_path / "cache", report=said.append)
    assert built.requirements == ("one==1.0",)
    assert any("absent==2.13.0+cpu" in line and "default.txt" in line for line in said)


def test_what_an_interrupted_build_fetched_is_kept_if_it_is_sound(tmp_path: Path, index: Path) -> None:
    one = write_wheel(index, "one", "1.0")
    lock = write_lock(
        tmp_path / "lock.txt", f"one==1.0 --hash=sha256:{one}", f"two==1.0 --hash=sha256:{'0' * 64}"
    )
    with pytest.raises(FleetfitError):
        build_wheelhouse(lock, "3.11", tmp_path / "cache")
    (kept,) = (tmp_path / "cache").glob("*.partial/wheels/one-*.whl")
    stamp = kept.stat().st_mtime_ns
    with pytest.raises(FleetfitError):
        build_wheelhouse(lock, "3.11", tmp_path / "cache")
    assert kept.stat().st_mtime_ns == stamp
    kept.write_bytes(b"cut short")
    with pytest.raises(FleetfitError):
        build_wheelhouse(lock, "3.11", tmp_path / "cache")
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == one


def unpacked_environment(tmp_path: Path, index: Path) -> EnvironmentSpec:
    """Return what a host would build, from a wheelhouse of two packages that it has unpacked."""
    one, two = write_wheel(index, "one", "1.0"), write_wheel(index, "two", "2.0")
    lock = write_lock(tmp_path / "lock.txt", f"one==1.0 --hash=sha256:{one}", f"two==2.0 --hash=sha256:{two}")
    built = build_wheelhouse(lock, "3.12", tmp_path / "cache")
    unpacked = tmp_path / "unpacked"
    with tarfile.open(built.tar) as archive:
        archive.extractall(unpacked, filter="data")
    return EnvironmentSpec(
        path=str(tmp_path / "envs/0123"),
        uv=find_uv_bin(),
        python=sys.executable,
        requirements=str(unpacked / "requirements.txt"),
        find_links=str(unpacked / "wheels"),
        compile_bytecode=False,
    )


def call(argv: Sequence[str], environ: dict[str, str]) -> tuple[int, str, str]:
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_whole_wheelhouse_becomes_an_environment(tmp_path: Path, index: Path) -> None:
    spec = unpacked_environment(tmp_path, index)
    assert build(spec, call) is True
    asked = [f"{spec.path}/bin/python", "-c", "import one, two; print(one.VERSION, two.VERSION)"]
    assert subprocess.check_output(asked, text=True) == "1.0 2.0\n"


@pytest.mark.parametrize("damage", ["missing", "replaced"])
def test_a_missing_or_replaced_wheel_is_named_and_leaves_no_environment(
    tmp_path: Path, index: Path, damage: str
) -> None:
    spec = unpacked_environment(tmp_path, index)
    (wheel,) = Path(spec.find_links).glob("two-*.whl")
    wheel.unlink()
    if damage == "replaced":
        other = tmp_path / "other"
        other.mkdir()
        write_wheel(other, "two", "2.0", "py3-none-manylinux_2_5_x86_64")
        (other / "two-2.0-py3-none-manylinux_2_5_x86_64.whl").rename(wheel)
    with pytest.raises(FleetfitError, match="two") as caught:
        build(spec, call)
    assert caught.value.code == "environment_failed"
    if damage == "replaced":
        assert "mismatch" in caught.value.message
    assert not Path(spec.path).exists()
