"""Write full-size GGUF models of random but valid blocks, with a synthetic vocabulary; needs numpy alone."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from module_utils.model_shape import ModelShape
from module_utils.tensor_sizes import GGML_TYPES, model_tensors, tensor_type

ALIGNMENT_BYTES = 32
POOL_BYTES = 32 << 20
TYPE_NUMBERS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "BF16": 30,
}
# Where in a block the half-precision scales stand (ggml-common.h); everything else may be any byte.
SCALE_OFFSETS = {
    "Q4_0": (0,),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
# Small enough that 28 layers of random weights stay finite in half precision.
SCALE = 1e-4


def write_model(path: Path, shape: ModelShape, scheme: str, *, seed: int = 1) -> int:
    """Write the model and return its bytes; the name appears only once it is whole."""
    partial = path.with_suffix(".partial")
    rng = np.random.default_rng(seed)
    pools: dict[str, np.ndarray] = {}
    infos, plan, offset = [], [], 0
    for tensor in model_tensors(shape):
        kind = tensor_type(shape, scheme, tensor)
        elements, block_bytes = GGML_TYPES[kind]
        size = tensor.cols * tensor.rows // elements * block_bytes
        dimensions = _dimensions(shape, tensor.name, tensor.cols, tensor.rows)
        infos.append(
            _string(tensor.name)
            + struct.pack("<I", len(dimensions))
            + b"".join(struct.pack("<Q", item) for item in dimensions)
            + struct.pack("<IQ", TYPE_NUMBERS[kind], offset)
        )
        plan.append((kind, size))
        offset += _pad(size)
    pairs = list(_metadata(shape))
    header = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join(pairs) + b"".join(infos)
    with partial.open("wb") as file:
        file.write(header)
        file.write(b"\0" * (_pad(len(header)) - len(header)))
        for kind, size in plan:
            if kind not in pools:
                pools[kind] = _pool(kind, rng)
            _write_data(file.write, pools[kind], size)
            file.write(b"\0" * (_pad(size) - size))
    partial.rename(path)
    return path.stat().st_size


def _dimensions(shape: ModelShape, name: str, cols: int, rows: int) -> tuple[int, ...]:
    if "_exps." in name:
        return (cols, rows // shape.experts, shape.experts)
    return (cols,) if rows == 1 else (cols, rows)


def _pool(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return a stretch of valid random blocks that every tensor of this type is cut from."""
    block_bytes = GGML_TYPES[kind][1]
    if kind == "F32":
        return np.ones(POOL_BYTES // 4, dtype=np.float32).view(np.uint8)  # norms
    if kind == "F16":
        return (
            (rng.standard_normal(POOL_BYTES // 2, dtype=np.float32) * 0.02).astype(np.float16).view(np.uint8)
        )
    count = POOL_BYTES // block_bytes
    blocks = rng.integers(0, 256, size=(count, block_bytes), dtype=np.uint8)
    scale = (
        (rng.random(count, dtype=np.float32) * SCALE + SCALE)
        .astype(np.float16)
        .view(np.uint8)
        .reshape(count, 2)
    )
    for start in SCALE_OFFSETS[kind]:
        blocks[:, start : start + 2] = scale
    return blocks.reshape(-1)


def _write_data(write: Callable[[Any], Any], pool: np.ndarray, size: int) -> None:
    whole, rest = divmod(size, len(pool))
    for _ in range(whole):
        write(pool)
    write(pool[:rest])


def _metadata(shape: ModelShape) -> Iterator[bytes]:
    name = shape.architecture
    yield _pair("general.architecture", name)
    yield _pair("general.name", "fleetfit random weights")
    yield _pair(f"{name}.block_count", shape.layers)
    yield _pair(f"{name}.context_length", shape.native_context_tokens)
    yield _pair(f"{name}.embedding_length", shape.hidden_size)
    yield _pair(f"{name}.feed_forward_length", shape.intermediate_size)
    yield _pair(f"{name}.attention.head_count", shape.heads)
    yield _pair(f"{name}.attention.head_count_kv", shape.kv_heads)
    yield _pair(f"{name}.attention.key_length", shape.head_dim)
    yield _pair(f"{name}.attention.value_length", shape.head_dim)
    yield _pair(f"{name}.rope.dimension_count", shape.head_dim)
    yield _pair(f"{name}.rope.freq_base", 1_000_000.0)
    yield _pair(f"{name}.attention.layer_norm_rms_epsilon", 1e-6)
    tokens = _vocabulary(shape.vocab_size)
    yield _pair("tokenizer.ggml.model", "gpt2")
    yield _pair("tokenizer.ggml.pre", "qwen2")
    yield (
        _string("tokenizer.ggml.tokens")
        + struct.pack("<IIQ", 9, 8, len(tokens))
        + b"".join(map(_string, tokens))
    )
    types = [1] * (len(tokens) - 1) + [3]
    yield (
        _string("tokenizer.ggml.token_type")
        + struct.pack("<IIQ", 9, 5, len(types))
        + np.array(types, dtype="<i4").tobytes()
    )
    merges = [f"{tokens[0]} {tokens[1]}"]
    yield _string("tokenizer.ggml.merges") + struct.pack("<IIQ", 9, 8, 1) + _string(merges[0])
    yield _pair("tokenizer.ggml.eos_token_id", len(tokens) - 1)


def _vocabulary(size: int) -> list[str]:
    """Return the 256 byte symbols of byte-level BPE, then numbered filler, then one control token."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    symbols = [chr(byte) for byte in visible] + [chr(256 + index) for index in range(len(hidden))]
    return [*symbols, *(f"w{index}" for index in range(size - 257)), "<|end|>"]


def _pair(key: str, value: object) -> bytes:
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", 8) + _string(value)
    if isinstance(value, int):
        return _string(key) + struct.pack("<II", 4, value)
    return _string(key) + struct.pack("<If", 6, value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pad(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
