"""llama.cpp as an oracle: its own accounting of memory for models whose weights do not exist.

A GGUF file with a true header and a hole where the data would be (a sparse file) is enough for
``llama-fit-params`` to build the model without allocating it and to print model, context and compute per
device. Devices are RPC servers on loopback; the product never runs RPC. Used by tests/integration too.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import ModelShape
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import (
    GGML_TYPES,
    model_tensors,
    tensor_type,
)

MIB = 1024 * 1024
TOOLS = ("llama-fit-params", "ggml-rpc-server")
HOW_TO_BUILD = (
    "No llama.cpp oracle was found. Build one with `fleetfit lab up`, which leaves it in the cache, or build "
    "llama.cpp with `cmake -DGGML_RPC=ON` and the targets llama-fit-params and ggml-rpc-server, and name the "
    "directory in FLEETFIT_LLAMA_CPP_BIN."
)
RUN_TIMEOUT_S = 300


class OracleMissingError(RuntimeError):
    """No directory holds llama.cpp's tools; the message says how to get them."""


class OracleFailedError(RuntimeError):
    """llama.cpp refused a case; the message carries its last lines."""


@dataclass(frozen=True)
class Buffers:
    """What llama.cpp counts on one device, in MiB as it prints them (rounded up or down to whole MiB)."""

    model_mib: int
    context_mib: int
    compute_mib: int


@dataclass(frozen=True)
class Accounting:
    """One case: the devices in their order, and the host."""

    devices: tuple[Buffers, ...]
    host: Buffers


def find_bin() -> Path:
    """Return the directory of llama.cpp's tools; raises :class:`OracleMissingError`."""
    named = os.environ.get("FLEETFIT_LLAMA_CPP_BIN")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    candidates = (
        [Path(named)] if named else [Path(p) for p in sorted(glob.glob(f"{cache}/fleetfit/engine/*/bin"))]
    )
    for directory in candidates:
        if all(os.access(directory / tool, os.X_OK) for tool in TOOLS):
            return directory
    raise OracleMissingError(HOW_TO_BUILD)


def write_sparse_gguf(
    path: Path, shape: ModelShape, scheme: str, more: Mapping[str, str | int] | None = None
) -> None:
    """Write a GGUF with this shape's true header, ``more`` keys in it, and a hole of the data's size."""
    writer = gguf.GGUFWriter(path, shape.architecture, use_temp_file=False)
    _write_metadata(writer, shape)
    for key, value in (more or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    data_bytes = 0
    for tensor in model_tensors(shape):
        name = tensor_type(shape, scheme, tensor)
        elements, size = GGML_TYPES[name]
        count = tensor.cols * tensor.rows
        dimensions = _dimensions(shape, tensor.name, tensor.cols, tensor.rows)
        writer.add_tensor_info(
            tensor.name,
            dimensions,
            np.dtype(np.float32),
            count // elements * size,
            raw_dtype=gguf.GGMLQuantizationType[name],
        ) if name == "F32" else writer.add_tensor_info(
            tensor.name,
            # For a quantized type the writer takes the shape in bytes.
            (*dimensions[:-1], dimensions[-1] // elements * size) if elements > 1 else dimensions,
            np.dtype(np.uint8) if elements > 1 else np.dtype(np.float16),
            count // elements * size,
            raw_dtype=gguf.GGMLQuantizationType[name],
        )
        data_bytes += -(-count // elements * size // 32) * 32 + 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + data_bytes + 64)


def _dimensions(shape: ModelShape, name: str, cols: int, rows: int) -> tuple[int, ...]:
    """Return the dimensions as numpy has them, ne[0] last."""
    if "_exps." in name:
        return (shape.experts, rows // shape.experts, cols)
    return (cols,) if rows == 1 else (rows, cols)


def _write_metadata(writer: gguf.GGUFWriter, shape: ModelShape) -> None:
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.native_context_tokens)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size or shape.expert_intermediate_size)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.vocab_size)
    if shape.sliding_window:
        writer.add_sliding_window(shape.sliding_window)
    if shape.architecture == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        if shape.architecture != "llama":
            writer.add_expert_feed_forward_length(shape.expert_intermediate_size)
        if shape.shared_expert_intermediate_size:
            writer.add_expert_shared_feed_forward_length(shape.shared_expert_intermediate_size)
    writer.add_string("tokenizer.ggml.model", "no_vocab")


def build_digest(directory: Path) -> str:
    """Return the first 16 digits of the sha256 over the programs and libraries of a build."""
    digest = hashlib.sha256()
    libraries = directory.parent / "lib"
    for folder in (directory, libraries):
        for path in sorted(folder.glob("*")) if folder.is_dir() else ():
            if path.is_file() and (path.name in TOOLS or ".so" in path.name):
                digest.update(path.name.encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Oracle:
    """Runs ``llama-fit-params`` on sparse models and reads what it prints."""

    def __init__(self, directory: Path, bin_directory: Path | None = None) -> None:
        self.directory = directory
        self.bin = bin_directory or find_bin()
        self._lock = threading.Lock()

    def model(self, name: str, shape: ModelShape, scheme: str) -> Path:
        """Return the sparse file of a shape in a scheme, written once."""
        path = self.directory / f"{name}.{scheme}.gguf"
        with self._lock:
            if not path.exists():
                write_sparse_gguf(path, shape, scheme)
        return path

    def ask(
        self,
        model: Path,
        *,
        n_ctx: int,
        slots: int = 1,
        n_ubatch: int = 512,
        kv_type_k: str = "f16",
        kv_type_v: str = "f16",
        n_gpu_layers: int = 0,
        n_cpu_moe: int = 0,
        rpc: Sequence[int] = (),
        tensor_split: Sequence[float] | None = None,
    ) -> Accounting:
        """Return llama.cpp's accounting of one case; raises :class:`OracleFailedError`."""
        argv = ["-c", str(n_ctx), "-np", str(slots)]
        argv += [
            "-b",
            str(max(2048, n_ubatch)),
            "-ub",
            str(n_ubatch),
            "-fa",
            "on",
            "-ctk",
            kv_type_k,
            "-ctv",
            kv_type_v,
        ]
        argv += ["--no-repack", "--fit", "off", "--fit-print", "on", "-ngl", str(n_gpu_layers)]
        if n_cpu_moe:
            argv += ["--n-cpu-moe", str(n_cpu_moe)]
        if tensor_split is not None:
            argv += ["--tensor-split", ",".join(str(part) for part in tensor_split)]
        argv = [str(self.bin / "llama-fit-params"), "-m", str(model), *argv]
        if rpc:
            argv += ["--rpc", ",".join(f"127.0.0.1:{port}" for port in rpc)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
        devices: list[Buffers] = []
        host = None
        for line in done.stdout.splitlines():
            match = re.match(r"^(\S+)\s+(\d+)\s+(\d+)\s+(\d+)\s*$", line)
            if match is None:
                continue
            buffers = Buffers(int(match[2]), int(match[3]), int(match[4]))
            if match[1] == "Host":
                host = buffers
            else:
                devices.append(buffers)
        if host is None:
            raise OracleFailedError("\n".join([" ".join(argv), *done.stderr.splitlines()[-8:]]))
        return Accounting(tuple(devices), host)


@contextmanager
def rpc_devices(count: int, bin_directory: Path | None = None) -> Iterator[list[int]]:
    """Run ``count`` RPC servers on loopback and yield their ports."""
    directory = bin_directory or find_bin()
    processes, ports = [], []
    try:
        for _ in range(count):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            ports.append(port)
            processes.append(
                subprocess.Popen(
                    [str(directory / "ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        for port in ports:
            _wait_for(port)
        yield ports
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=10)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise OracleFailedError(f"The RPC server on port {port} did not answer within 10 s.")
