"""LoRA adapters made for tests: low-rank weights drawn from a seed, written as PEFT and as llama.cpp files."""

from __future__ import annotations

import json
import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# SmolLM2-135M-Instruct (catalog/models/smollm2-135m-instruct.yml): matrix -> (inputs, outputs).
LAYERS = 30
MATRICES = {"o_proj": (576, 576), "down_proj": (1536, 576)}
RANK = 4
_GGUF_NAMES = {"o_proj": "attn_output", "down_proj": "ffn_down"}
_PEFT_NAMES = {"o_proj": "self_attn.o_proj", "down_proj": "mlp.down_proj"}


def weights(seed: int, *, layers: int = LAYERS, rank: int = RANK, strength: float = 1.0) -> Any:
    """Return {(layer, matrix): (A, B)}; with strength 1 an answer is visibly another one."""
    generator = np.random.default_rng(seed)
    found = {}
    for layer in range(layers):
        for matrix, (inputs, outputs) in MATRICES.items():
            a = generator.standard_normal((rank, inputs)) / np.sqrt(inputs)
            b = generator.standard_normal((outputs, rank)) * strength
            found[layer, matrix] = (a.astype(np.float32), b.astype(np.float32))
    return found


def write_peft(
    directory: Path, seed: int, *, base: str = "HuggingFaceTB/SmolLM2-135M-Instruct", **options: Any
) -> None:
    """Write an adapter as PEFT saves it: adapter_model.safetensors and adapter_config.json."""
    config = options.pop("config", {})
    made = weights(seed, **options)
    tensors = {}
    for (layer, matrix), (a, b) in made.items():
        prefix = f"base_model.model.model.layers.{layer}.{_PEFT_NAMES[matrix]}"
        tensors[f"{prefix}.lora_A.weight"] = a
        tensors[f"{prefix}.lora_B.weight"] = b
    rank = options.get("rank", RANK)
    whole = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(MATRICES),
        "inference_mode": True,
        **config,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(whole))
    write_safetensors(directory / "adapter_model.safetensors", tensors)


def write_safetensors(path: Path, tensors: dict[str, Any]) -> None:
    """Write arrays of 32-bit floats as a safetensors file."""
    header: dict[str, Any] = {}
    data = b""
    for name, array in sorted(tensors.items()):
        raw = np.ascontiguousarray(array, dtype="<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_gguf(
    path: Path, seed: int, *, architecture: str = "llama", kind: str = "adapter", **options: Any
) -> None:
    """Write an adapter as llama.cpp's convert_lora_to_gguf.py does."""
    base = options.pop("base", None)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(options.get("rank", RANK)))
    if base:
        writer.add_string("general.base_model.0.name", base)
    for (layer, matrix), (a, b) in weights(seed, **options).items():
        name = f"blk.{layer}.{_GGUF_NAMES[matrix]}.weight"
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def listed(name: str, directory: Path, adapter_format: str, **changes: Any) -> dict[str, Any]:
    """Return the entry of fleetfit_lora_adapters for the files in a directory on the controller."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return {
        "name": name,
        "base_model": "smollm2-135m-instruct",
        "format": adapter_format,
        "rank": RANK,
        "path": str(directory),
        "files": [
            {"name": path.name, "size": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}
            for path in files
        ],
        **changes,
    }
