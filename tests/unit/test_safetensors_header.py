"""Headers of safetensors files, sound and unsound."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.safetensors_header import (
    read_directory,
    read_safetensors,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def pack(header: Any, data: int) -> bytes:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body)) + body + b"\0" * data


def entry(start: int, end: int, shape: Any = (2, 2), dtype: str = "BF16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    header = {"b": entry(8, 16), "a": entry(0, 8), "__metadata__": {"format": "pt"}}
    (tmp_path / "model.safetensors").write_bytes(pack(header, 16))
    return tmp_path / "model.safetensors"


def test_tensors_come_sorted_with_type_and_size(model: Path) -> None:
    assert [(t.name, t.dtype, t.dimensions, t.size_bytes) for t in read_safetensors(model)] == [
        ("a", "BF16", (2, 2), 8),
        ("b", "BF16", (2, 2), 8),
    ]


def test_a_directory_needs_every_file_that_its_index_names(model: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "c": "model-2.safetensors"}}
    (model.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FleetfitError, match="model-2") as caught:
        read_directory(model.parent)
    assert caught.value.code == "file_not_found"
    (model.parent / "model-2.safetensors").write_bytes(pack({"c": entry(0, 8)}, 8))
    assert [t.name for t in read_directory(model.parent)] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "x.bin"])
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FleetfitError) as caught:
        read_directory(tmp_path)
    assert caught.value.code == "bad_safetensors"


def test_a_tensor_in_two_files_is_refused(model: Path) -> None:
    (model.parent / "other.safetensors").write_bytes(model.read_bytes())
    with pytest.raises(FleetfitError) as caught:
        read_directory(model.parent)
    assert caught.value.code == "bad_safetensors"


BAD: dict[str, bytes] = {
    "empty": b"",
    "short": b"\1\2\3",
    "header beyond the file": struct.pack("<Q", 2**62) + b"{}",
    "header above the limit": struct.pack("<Q", 200_000_000) + b"{}",
    "not JSON": pack(b"GGUF", 0),
    "not an object": pack([1], 0),
    "nested deeply": pack(b"[" * 50_000, 0),
    "no offsets": pack({"a": {"dtype": "F16", "shape": [1]}}, 8),
    "offsets beyond the file": pack({"a": entry(0, 2**60)}, 8),
    "offsets backwards": pack({"a": entry(8, 0)}, 8),
    "offsets negative": pack({"a": entry(-8, 0)}, 8),
    "offsets text": pack({"a": {"dtype": "F16", "shape": [1], "data_offsets": ["0", "8"]}}, 8),
    "shape negative": pack({"a": entry(0, 8, [-1])}, 8),
    "entry not an object": pack({"a": 5}, 8),
}


@pytest.mark.parametrize("name", BAD)
def test_unsound_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD[name])
    with pytest.raises(FleetfitError) as caught:
        read_safetensors(path)
    assert caught.value.code == "bad_safetensors"


def test_missing_files_empty_directories_and_pipes_are_refused(tmp_path: Path) -> None:
    for call in (lambda: read_safetensors(tmp_path / "x.safetensors"), lambda: read_directory(tmp_path)):
        with pytest.raises(FleetfitError) as caught:
            call()
        assert caught.value.code == "file_not_found"
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(FleetfitError) as caught:
        read_safetensors(tmp_path / "pipe.safetensors")
    assert caught.value.code == "bad_safetensors"


@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=8))
def test_fuzzed_headers_are_read_or_refused(model: Path, edits: list[tuple[int, int]]) -> None:
    data = bytearray(model.read_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    path = model.parent / "fuzzed.safetensors"
    path.write_bytes(bytes(data))
    with contextlib.suppress(FleetfitError):
        assert all(tensor.size_bytes >= 0 for tensor in read_safetensors(path))
