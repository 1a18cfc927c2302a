"""Read the header of a GGUF file that may be truncated, malicious or not GGUF at all.

Only the header is read: key-values (arrays as their length alone, unless short) and tensor infos. Every
count and length is checked against the file's size before anything is allocated, so that a bad file costs
one error, never memory or time.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Union

from .errors import FleetfitError

MAGIC = b"GGUF"
# Version 1 had 32-bit counts and was gone by late 2023; 3 only adds big-endian files.
SUPPORTED_VERSIONS = (2, 3)
# Limits far above any real file: the largest vocabularies have 262,144 entries, the largest models a few
# thousand tensors.
MAX_KEY_VALUES = 65_536
MAX_TENSORS = 1_000_000
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 1_024
MAX_STRING_BYTES = 16 << 20
MAX_HEADER_BYTES = 256 << 20
MAX_ARRAY_NESTING = 2
MAX_NESTED_ARRAYS = 65_536
# Strings in all arrays together; passing over one takes about a microsecond, so this bounds the time too.
MAX_ARRAY_STRINGS = 4_000_000
MAX_DIMENSIONS = 4
# Arrays up to this length are returned whole (per-layer settings); longer ones (vocabularies) as their
# length only.
MAX_KEPT_ARRAY_ITEMS = 4_096
MAX_ALIGNMENT_BYTES = 1 << 20
DEFAULT_ALIGNMENT_BYTES = 32
MAX_SPLIT_FILES = 1_000
READ_BUFFER_BYTES = 1 << 20

# gguf_type -> struct format of the scalar (ggml/include/gguf.h).
_SCALARS: Mapping[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING = 8
_ARRAY = 9

# ggml_type -> (name, elements per block, bytes per block); the numbers are those of ggml/include/ggml.h.
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}

# llama.cpp names parts NAME-00001-of-00003.gguf (llama_split_path).
_SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its name, ggml type name, dimensions (ne[0] first) and bytes."""

    name: str
    type_name: str
    dimensions: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What one GGUF model says about itself; ``file_bytes`` and ``tensors`` cover all parts of a split file.

    ``metadata`` holds scalars and strings under their keys, short arrays as tuples, and every array's
    length under ``<key>.length``.
    """

    paths: tuple[str, ...]
    version: int
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    file_bytes: int

    @property
    def tensor_names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(tensor.name for tensor in self.tensors)


def read_gguf(path: Union[str, Path]) -> GgufHeader:
    """Return the header of a GGUF model; of a split one, name any part.

    Raises :class:`FleetfitError`: ``file_not_found``, ``not_gguf``, ``gguf_truncated``, ``bad_gguf``,
    ``gguf_split_incomplete``.
    """
    path = Path(path)
    parts = _split_parts(path)
    headers = [_read_one(part) for part in parts]
    first = headers[0]
    if len(parts) > 1:
        expected = first.metadata.get("split.count")
        if expected != len(parts):
            raise _bad(path, f"its split.count is {expected!r}, its name says {len(parts)} parts")
        total = first.metadata.get("split.tensors.count")
        found = sum(len(header.tensors) for header in headers)
        if isinstance(total, int) and total != found:
            raise _bad(path, f"its parts hold {found} tensors where {total} are declared")
    names: set[str] = set()
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in names:
                raise _bad(path, f"the tensor {tensor.name!r} is there twice")
            names.add(tensor.name)
    return GgufHeader(
        paths=tuple(str(part) for part in parts),
        version=first.version,
        metadata=first.metadata,
        tensors=tuple(tensor for header in headers for tensor in header.tensors),
        file_bytes=sum(header.file_bytes for header in headers),
    )


def _split_parts(path: Path) -> list[Path]:
    match = _SPLIT_NAME.match(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= count <= MAX_SPLIT_FILES:
        raise _bad(path, f"its name says {count} parts")
    parts = [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise FleetfitError(
            f"{path} is one of {count} parts, and {len(missing)} of them are missing, {missing[0]} first.",
            code="gguf_split_incomplete",
            remedy="Put all parts into one directory.",
        )
    return parts


def _read_one(path: Path) -> GgufHeader:
    try:
        status = path.stat()
        # Looked at before opening: opening a pipe that nobody writes to would wait forever.
        if not stat.S_ISREG(status.st_mode):
            raise _not_gguf(path, "it is not a regular file")
        file_bytes = status.st_size
        with path.open("rb", buffering=READ_BUFFER_BYTES) as file:
            return _Reader(file, path, file_bytes).header()
    except OSError as error:
        raise FleetfitError(
            f"{path} cannot be read: {os.strerror(error.errno or 0)}.",
            code="file_not_found",
            remedy="Check the path and its permissions.",
        ) from None


class _Reader:
    """A cursor over one file that refuses to go beyond its end or its limits."""

    def __init__(self, file: BinaryIO, path: Path, file_bytes: int) -> None:
        self.file = file
        self.path = path
        self.file_bytes = file_bytes
        self.limit = min(file_bytes, MAX_HEADER_BYTES)
        self.position = 0
        self.strings_left = MAX_ARRAY_STRINGS
        self.arrays_left = MAX_NESTED_ARRAYS
        self.order = "<"

    def take(self, size: int, what: str) -> bytes:
        self.advance(size, what)
        data = self.file.read(size)
        if len(data) != size:
            raise self.truncated(what)
        return data

    def skip(self, size: int, what: str) -> None:
        self.advance(size, what)
        self.file.seek(size, os.SEEK_CUR)

    def advance(self, size: int, what: str) -> None:
        if size > self.limit - self.position:
            if self.position + size > self.file_bytes:
                raise self.truncated(what)
            raise _bad(self.path, f"its header is larger than {MAX_HEADER_BYTES >> 20} MiB")
        self.position += size

    def truncated(self, what: str) -> FleetfitError:
        return FleetfitError(
            f"{self.path} ends within {what}: it has {self.file_bytes} bytes.",
            code="gguf_truncated",
            remedy="Fetch the file again; it is incomplete or damaged.",
        )

    def scalar(self, code: str, what: str) -> Any:
        # A boolean is one byte; any value but 0 counts as true, as in C.
        layout = self.order + code
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def count(self, limit: int, what: str) -> int:
        value: int = self.scalar("Q", what)
        if value > limit:
            raise _bad(self.path, f"{what} is {value}, more than {limit}")
        return value

    def text(self, limit: int, what: str) -> str:
        return self.take(self.count(limit, f"the length of {what}"), what).decode("utf-8", "replace")

    def header(self) -> GgufHeader:
        if self.file_bytes < 4 or self.take(4, "the magic") != MAGIC:
            raise _not_gguf(self.path, "it does not begin with GGUF")
        version = self.scalar("I", "the version")
        if version & 0xFFFF == 0 and version:
            self.order = ">"
            version = struct.unpack(">I", struct.pack("<I", version))[0]
        if version not in SUPPORTED_VERSIONS:
            raise _bad(self.path, f"its version is {version}; 2 and 3 are known")
        tensor_count = self.count(MAX_TENSORS, "the number of tensors")
        pair_count = self.count(MAX_KEY_VALUES, "the number of key-values")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self.text(MAX_KEY_BYTES, "a key")
            if key in metadata:
                raise _bad(self.path, f"the key {key!r} is there twice")
            self.value(key, metadata)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT_BYTES)
        if (
            not isinstance(alignment, int)
            or not 0 < alignment <= MAX_ALIGNMENT_BYTES
            or alignment & (alignment - 1)
        ):
            raise _bad(self.path, f"its alignment is {alignment!r}, not a power of two")
        tensors = []
        end_of_data = 0
        for _ in range(tensor_count):
            tensor, offset = self.tensor()
            if offset % alignment:
                raise _bad(self.path, f"the tensor {tensor.name!r} is not aligned")
            end_of_data = max(end_of_data, offset + tensor.size_bytes)
            tensors.append(tensor)
        data_start = -(-self.position // alignment) * alignment
        if tensors and data_start + end_of_data > self.file_bytes:
            raise self.truncated("its tensor data")
        return GgufHeader((str(self.path),), version, metadata, tuple(tensors), self.file_bytes)

    def value(self, key: str, metadata: dict[str, Any]) -> None:
        kind = self.scalar("I", f"the type of {key!r}")
        if kind == _STRING:
            metadata[key] = self.text(MAX_STRING_BYTES, f"the value of {key!r}")
        elif kind == _ARRAY:
            length, items = self.array(key, 1)
            metadata[f"{key}.length"] = length
            if items is not None:
                metadata[key] = items
        elif kind in _SCALARS:
            metadata[key] = self.scalar(_SCALARS[kind], f"the value of {key!r}")
        else:
            raise _bad(self.path, f"the key {key!r} has the unknown type {kind}")

    def array(self, key: str, depth: int) -> tuple[int, Any]:
        """Return (length, items or None): a long array is passed over without keeping it."""
        what = f"the array {key!r}"
        kind = self.scalar("I", f"the item type of {key!r}")
        # An item takes at least a byte, so no honest length exceeds the file's size.
        length = self.count(self.file_bytes, f"the length of {what}")
        if kind in _SCALARS:
            layout = f"{self.order}{length}{_SCALARS[kind]}"
            size = length * struct.calcsize(self.order + _SCALARS[kind])
            if length > MAX_KEPT_ARRAY_ITEMS:
                self.skip(size, what)
                return length, None
            return length, struct.unpack(layout, self.take(size, what))
        if kind == _STRING:
            self.strings(length, what)
            return length, None
        if kind == _ARRAY and depth < MAX_ARRAY_NESTING:
            self.arrays_left -= length
            if self.arrays_left < 0:
                raise _bad(self.path, f"{what} holds more than {MAX_NESTED_ARRAYS} arrays")
            for _ in range(length):
                self.array(key, depth + 1)
            return length, None
        raise _bad(self.path, f"{what} has the unknown item type {kind}")

    def strings(self, length: int, what: str) -> None:
        """Pass over ``length`` strings; each costs 8 bytes of length at least, which bounds the loop by
        the file."""
        self.strings_left -= length
        if self.strings_left < 0:
            raise _bad(self.path, f"its arrays hold more than {MAX_ARRAY_STRINGS} strings")
        if length * 8 > self.limit - self.position:
            raise self.truncated(what)
        item = f"the length of an item of {what}"
        for _ in range(length):
            size = self.count(MAX_STRING_BYTES, item)
            if size:
                self.skip(size, what) if size > READ_BUFFER_BYTES else self.take(size, what)

    def tensor(self) -> tuple[TensorInfo, int]:
        name = self.text(MAX_NAME_BYTES, "a tensor's name")
        dimension_count = self.scalar("I", f"the dimensions of {name!r}")
        if not 1 <= dimension_count <= MAX_DIMENSIONS:
            raise _bad(self.path, f"the tensor {name!r} has {dimension_count} dimensions")
        dimensions = tuple(self.scalar("Q", f"the dimensions of {name!r}") for _ in range(dimension_count))
        kind = self.scalar("I", f"the type of {name!r}")
        if kind not in TENSOR_TYPES:
            raise _bad(self.path, f"the tensor {name!r} has the unknown type {kind}")
        offset: int = self.scalar("Q", f"the offset of {name!r}")
        type_name, elements, block_bytes = TENSOR_TYPES[kind]
        # Python's integers do not overflow: a product beyond the file is caught by comparing it with the
        # file.
        count = 1
        for dimension in dimensions:
            if dimension < 1:
                raise _bad(self.path, f"the tensor {name!r} has a dimension of {dimension}")
            count *= dimension
        if dimensions[0] % elements:
            raise _bad(
                self.path,
                f"rows of {dimensions[0]} in {name!r} do not divide into {type_name} blocks",
            )
        size = count // elements * block_bytes
        if offset + size > self.file_bytes:
            raise self.truncated(f"the data of {name!r}")
        return TensorInfo(name, type_name, dimensions, size), offset


def _bad(path: Path, what: str) -> FleetfitError:
    return FleetfitError(
        f"{path} is not a sound GGUF file: {what}.",
        code="bad_gguf",
        remedy="Fetch the file again from a source that you trust.",
    )


def _not_gguf(path: Path, what: str) -> FleetfitError:
    return FleetfitError(
        f"{path} is not a GGUF file: {what}.",
        code="not_gguf",
        remedy="Name a .gguf file, or a directory with a config.json.",
    )
