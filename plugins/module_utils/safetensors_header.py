"""Read the headers of safetensors files: names, types and sizes, never the data."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from .errors import FleetfitError

# The reference implementation's own limit for the header (safetensors, MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
MAX_FILES = 1_000
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20


@dataclass(frozen=True)
class SafetensorsTensor:
    """One tensor: its name, type (BF16, I32, F8_E4M3, …), dimensions and bytes."""

    name: str
    dtype: str
    dimensions: tuple[int, ...]
    size_bytes: int


def read_safetensors(path: Union[str, Path]) -> tuple[SafetensorsTensor, ...]:
    """Return the tensors of one safetensors file, sorted by name.

    Raises :class:`FleetfitError`: ``file_not_found``, ``bad_safetensors``.
    """
    path = Path(path)
    try:
        status = path.stat()
        # Looked at before opening: opening a pipe that nobody writes to would wait forever.
        if not stat.S_ISREG(status.st_mode):
            raise _bad(path, "it is not a regular file")
        file_bytes = status.st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise _bad(path, f"it has {file_bytes} bytes")
            length = struct.unpack("<Q", start)[0]
            if length > MAX_HEADER_BYTES or length > file_bytes - 8:
                raise _bad(path, f"its header claims {length} bytes of a file of {file_bytes}")
            text = file.read(length)
    except OSError as error:
        raise FleetfitError(
            f"{path} cannot be read: {os.strerror(error.errno or 0)}.",
            code="file_not_found",
            remedy="Check the path and its permissions.",
        ) from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise _bad(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _bad(path, "its header is not a JSON object")
    data_bytes = file_bytes - 8 - length
    tensors = [
        _tensor(path, name, info, data_bytes) for name, info in header.items() if name != "__metadata__"
    ]
    return tuple(sorted(tensors, key=lambda tensor: tensor.name))


def read_directory(directory: Union[str, Path]) -> tuple[SafetensorsTensor, ...]:
    """Return the tensors of all safetensors files of a model's directory, sorted by name.

    With an index, the files it names must all be there. Raises :class:`FleetfitError`: ``file_not_found``,
    ``bad_safetensors``.
    """
    directory = Path(directory)
    index = directory / INDEX_NAME
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if index.is_file():
        names = _indexed_files(index)
    if not names:
        raise FleetfitError(
            f"{directory} holds no safetensors file.",
            code="file_not_found",
            remedy="Name the directory that the model was downloaded to.",
        )
    if len(names) > MAX_FILES:
        raise _bad(directory, f"it has {len(names)} files")
    tensors: dict[str, SafetensorsTensor] = {}
    for name in names:
        for tensor in read_safetensors(directory / name):
            if tensor.name in tensors:
                raise _bad(directory / name, f"the tensor {tensor.name!r} is in another file too")
            tensors[tensor.name] = tensor
    return tuple(tensors[name] for name in sorted(tensors))


def _indexed_files(index: Path) -> list[str]:
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise _bad(index, "it is larger than any index")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _bad(index, "it has no weight_map") from None
    for name in names:
        if os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise _bad(index, f"it names the file {name!r}")
    return names


def _tensor(path: Path, name: str, info: Any, data_bytes: int) -> SafetensorsTensor:
    if not isinstance(info, Mapping):
        raise _bad(path, f"the tensor {name!r} is not described")
    offsets, shape = _whole_numbers(info.get("data_offsets")), _whole_numbers(info.get("shape"))
    if offsets is None or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
        raise _bad(path, f"the tensor {name!r} lies outside the file")
    if shape is None:
        raise _bad(path, f"the tensor {name!r} has no shape")
    return SafetensorsTensor(name, str(info.get("dtype")), tuple(shape), offsets[1] - offsets[0])


def _whole_numbers(value: Any) -> Optional[list[int]]:
    """Return ``value`` where it is a list of whole numbers of zero or more."""
    if not isinstance(value, list):
        return None
    if any(not isinstance(item, int) or isinstance(item, bool) or item < 0 for item in value):
        return None
    return value


def _bad(path: Path, what: str) -> FleetfitError:
    return FleetfitError(
        f"{path} is not a sound safetensors file: {what}.",
        code="bad_safetensors",
        remedy="Fetch the file again; it is incomplete or damaged.",
    )
