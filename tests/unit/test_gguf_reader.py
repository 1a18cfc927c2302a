"""GGUF headers, sound and unsound: a bad file is one clear error, never a crash, hang or huge allocation."""

from __future__ import annotations

import contextlib
import os
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.gguf_reader import (
    TENSOR_TYPES,
    read_gguf,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import ModelShape, from_gguf
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import (
    GGML_TYPES,
    layout_from_gguf,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

U32, STRING, ARRAY, U64 = 4, 8, 9, 10
CODES = {"not_gguf", "bad_gguf", "gguf_truncated", "file_not_found", "gguf_split_incomplete"}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def u32(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", U32, value)


def string(key: str, value: str) -> bytes:
    return text(key) + struct.pack("<I", STRING) + text(value)


def strings(key: str, values: list[str]) -> bytes:
    return text(key) + struct.pack("<IIQ", ARRAY, STRING, len(values)) + b"".join(text(v) for v in values)


def tensor(name: str, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    head = text(name) + struct.pack("<I", len(dimensions))
    return head + b"".join(struct.pack("<Q", d) for d in dimensions) + struct.pack("<IQ", kind, offset)


def gguf(
    pairs: list[bytes],
    tensors: list[bytes],
    data: int = 0,
    *,
    version: int = 3,
    pair_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack("<Q", len(tensors) if tensor_count is None else tensor_count)
    head += struct.pack("<Q", len(pairs) if pair_count is None else pair_count)
    body = head + b"".join(pairs) + b"".join(tensors)
    return body + b"\0" * (-len(body) % 32) + b"\0" * data


def llama_pairs() -> list[bytes]:
    numbers = {
        "block_count": 1,
        "context_length": 2048,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }
    return [
        string("general.architecture", "llama"),
        u32("general.file_type", 7),
        *(u32(f"llama.{key}", value) for key, value in numbers.items()),
        strings("tokenizer.ggml.tokens", ["a", "b", "c", "d"]),
    ]


def llama_tensors() -> tuple[list[bytes], int]:
    shapes = {
        "token_embd.weight": [32, 4],
        "output.weight": [32, 4],
        "blk.0.attn_q.weight": [32, 32],
        "blk.0.ffn_up.weight": [32, 64],
    }
    infos, offset = [], 0
    for name, dimensions in shapes.items():
        infos.append(tensor(name, dimensions, 8, offset))
        offset += dimensions[0] * dimensions[1] // 32 * 34
        offset += -offset % 32
    return infos, offset


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    infos, size = llama_tensors()
    return write(tmp_path / "sound.gguf", gguf(llama_pairs(), infos, size))


def refused(path: Path, code: str) -> str:
    with pytest.raises(FleetfitError) as caught:
        read_gguf(path)
    assert caught.value.code == code
    assert path.name in str(caught.value)
    assert caught.value.remedy
    return str(caught.value)


def test_a_sound_file_gives_its_metadata_and_tensors(sound: Path) -> None:
    header = read_gguf(sound)
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["tokenizer.ggml.tokens.length"] == 4
    assert "tokenizer.ggml.tokens" not in header.metadata
    assert [t.size_bytes for t in header.tensors] == [4 * 34, 4 * 34, 32 * 34, 64 * 34]
    assert header.file_bytes == sound.stat().st_size


def test_shape_and_layout_come_from_the_header(sound: Path) -> None:
    header = read_gguf(sound)
    shape = from_gguf(header.metadata, header.tensor_names)
    assert shape == ModelShape("llama", 1, 32, 4, 2, 8, 64, 4, False, 2048)
    layout = layout_from_gguf(sound)
    assert (layout.scheme, layout.blocks, layout.tied) == ("Q8_0", (96 * 34,), False)


def test_short_arrays_are_kept_and_long_ones_passed_over(tmp_path: Path) -> None:
    short = text("x.short") + struct.pack("<IIQ", ARRAY, U32, 3) + struct.pack("<3I", 7, 8, 9)
    long = text("x.long") + struct.pack("<IIQ", ARRAY, U32, 100_000) + b"\0" * 400_000
    nested = text("x.nested") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + struct.pack("<IQ", U32, 1) + b"\0" * 4
    header = read_gguf(write(tmp_path / "arrays.gguf", gguf([short, long, nested], [])))
    assert header.metadata["x.short"] == (7, 8, 9)
    assert header.metadata["x.long.length"] == 100_000
    assert "x.long" not in header.metadata
    assert header.metadata["x.nested.length"] == 1


def test_a_big_endian_file_is_read(tmp_path: Path) -> None:
    data = b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + struct.pack(">Q", 1) + b"k" + struct.pack(">II", U32, 5)
    assert read_gguf(write(tmp_path / "big.gguf", data)).metadata == {"k": 5}


def test_a_split_model_is_read_whole_from_any_part(tmp_path: Path) -> None:
    infos, size = llama_tensors()
    split = [text("split.count") + struct.pack("<IH", 2, 2)]
    first = tmp_path / "m-00001-of-00002.gguf"
    second = tmp_path / "m-00002-of-00002.gguf"
    write(first, gguf(llama_pairs() + split, infos[:1], size))
    write(second, gguf([], [tensor("output.weight", [32, 4], 8)], size))
    assert (
        read_gguf(first).tensor_names
        == read_gguf(second).tensor_names
        == {"token_embd.weight", "output.weight"}
    )
    assert read_gguf(second).file_bytes == first.stat().st_size + second.stat().st_size
    second.unlink()
    assert "m-00002-of-00002.gguf" in refused(first, "gguf_split_incomplete")


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"PK\x03\x04" + b"\0" * 100, b"<html>no</html>", b"GGML" * 20]
)
def test_other_files_are_named_as_such(tmp_path: Path, content: bytes) -> None:
    refused(write(tmp_path / "other.gguf", content), "not_gguf")


def test_missing_files_directories_and_pipes_are_refused_at_once(tmp_path: Path) -> None:
    refused(tmp_path / "missing.gguf", "file_not_found")
    refused(tmp_path, "not_gguf")
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    refused(pipe, "not_gguf")


def test_every_truncation_is_found(sound: Path, tmp_path: Path) -> None:
    data = sound.read_bytes()
    for length in range(8, len(data), 7):
        path = write(tmp_path / "cut.gguf", data[:length])
        with pytest.raises(FleetfitError) as caught:
            read_gguf(path)
        assert caught.value.code == "gguf_truncated"


HUGE = 2**63
MALICIOUS: dict[str, bytes] = {
    "tensor count": gguf([], [], tensor_count=HUGE),
    "tensor count within a long": gguf([], [], tensor_count=999_999),
    "pair count": gguf([], [], pair_count=2**64 - 1),
    "key length": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**64 - 1) + b"x" * 64,
    "string length": gguf([text("k") + struct.pack("<IQ", STRING, 2**62)], [], 64),
    "string length that wraps": gguf([text("k") + struct.pack("<IQ", STRING, 2**64 - 8)], [], 64),
    "array length": gguf([text("k") + struct.pack("<IIQ", ARRAY, U64, 2**61)], [], 64),
    "array of strings": gguf([text("k") + struct.pack("<IIQ", ARRAY, STRING, 2**40)], [], 64),
    "array of arrays": gguf([text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 2**40)], [], 64),
    "arrays nested deeply": gguf(
        [text("k") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 2000], []
    ),
    "unknown value type": gguf([text("k") + struct.pack("<I", 77)], [], 64),
    "unknown array type": gguf([text("k") + struct.pack("<IIQ", ARRAY, 77, 1)], [], 64),
    "version": gguf([], [], version=99),
    "version 1": gguf([], [], version=1),
    "alignment zero": gguf([u32("general.alignment", 0)], []),
    "alignment odd": gguf([u32("general.alignment", 24)], []),
    "alignment a string": gguf([string("general.alignment", "x")], []),
    "key twice": gguf([u32("k", 1), u32("k", 2)], []),
    "dimensions overflow": gguf([], [tensor("t", [2**32, 2**32, 2**32, 2**32])], 64),
    "dimensions that wrap to zero": gguf([], [tensor("t", [2**32, 2**32])], 64),
    "dimension zero": gguf([], [tensor("t", [0, 32])], 64),
    "too many dimensions": gguf([], [tensor("t", [1] * 9)], 64),
    "no dimensions": gguf([], [tensor("t", [])], 64),
    "unknown tensor type": gguf([], [tensor("t", [32], 4)], 256),
    "row not a block": gguf([], [tensor("t", [33], 8)], 256),
    "offset beyond the file": gguf([], [tensor("t", [32], 0, 2**62)], 256),
    "offset not aligned": gguf([], [tensor("t", [32], 0, 7)], 512),
    "tensor twice": gguf([], [tensor("t", [1]), tensor("t", [1])], 64),
    "tensor name length": gguf([], [struct.pack("<Q", 2**40)], 64),
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_malicious_headers_are_refused_quickly_and_cheaply(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "bad.gguf", MALICIOUS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with pytest.raises(FleetfitError) as caught:
        read_gguf(path)
    assert caught.value.code in CODES
    assert time.monotonic() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_a_huge_sparse_header_is_refused_within_seconds(tmp_path: Path) -> None:
    """A terabyte of zeros after an honest count: strings of length zero, as many as the file could hold."""
    path = write(tmp_path / "sparse.gguf", gguf([text("k") + struct.pack("<IIQ", ARRAY, STRING, 2**36)], []))
    os.truncate(path, 2**40)
    started = time.monotonic()
    refused(path, "bad_gguf")
    assert time.monotonic() - started < 10


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=12))
def test_fuzzed_headers_are_read_or_refused(
    sound: Path, tmp_path: Path, edits: list[tuple[int, int]]
) -> None:
    data = bytearray(sound.read_bytes())
    for position, value in edits:
        data[position % 1200] = value
    path = write(tmp_path / "fuzzed.gguf", bytes(data))
    _read_all(path)


@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=400), counts=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)))
def test_random_bytes_are_read_or_refused(tmp_path: Path, tail: bytes, counts: tuple[int, int]) -> None:
    _read_all(write(tmp_path / "random.gguf", b"GGUF" + struct.pack("<IQQ", 3, *counts) + tail))


def _read_all(path: Path) -> None:
    """Read header, shape and layout; only FleetfitError may come out."""
    with contextlib.suppress(FleetfitError):
        header = read_gguf(path)
        from_gguf(header.metadata, header.tensor_names)
        layout_from_gguf(header)


def test_both_tables_of_types_agree() -> None:
    for name, elements, size in TENSOR_TYPES.values():
        assert GGML_TYPES[name] == (elements, size)


def test_type_numbers_are_those_of_the_gguf_package() -> None:
    gguf_package: Any = pytest.importorskip("gguf")
    for number, (name, _, _) in TENSOR_TYPES.items():
        assert gguf_package.GGMLQuantizationType(number).name == name
