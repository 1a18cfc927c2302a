"""Print how far the memory model is from llama.cpp's own accounting, beside what other planners would say.

    FLEETFIT_LLAMA_CPP_BIN=DIR python benchmarks/memory_oracle.py [--all] [--out FILE]

One RPC device on loopback holds the whole model, or a part of it; nothing runs on a GPU. The peers are
computed from their published formulas, not run. Below it, the official Qwen2.5 memory table, which belongs
to another engine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ansible_collections.fleetfit.llm.plugins.module_utils.memory import DeviceBudget
from ansible_collections.fleetfit.llm.plugins.module_utils.memory_llama_cpp import (
    all_layers,
    estimate,
    kv_bytes_per_token,
    n_ctx,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import ModelShape
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import (
    layout_from_scheme,
    model_tensors,
    safetensors_layout,
)
from llama_oracle import Oracle, rpc_devices
from model_shapes import SHAPES

MIB = 1 << 20
GIB = 1 << 30
CONTEXTS = (1000, 8193, 32768)
SAMPLE = (
    "qwen2.5-0.5b",
    "qwen2.5-7b",
    "llama-3.1-8b",
    "mistral-7b",
    "gemma-2-9b",
    "gemma-3-12b",
    "qwen3-30b-a3b",
    "phi-4",
)


@dataclass(frozen=True)
class Case:
    """Everything on one device."""

    name: str
    scheme: str
    context: int
    slots: int
    kv_type: str

    @property
    def shape(self) -> ModelShape:
        return SHAPES[self.name]


def parameters(shape: ModelShape) -> int:
    return sum(tensor.cols * tensor.rows for tensor in model_tensors(shape))


def plain_kv(case: Case, kv_type: str | None = None) -> int:
    """Return the cache without padding and without sliding windows, as simple formulas have it."""
    kind = kv_type or case.kv_type
    return kv_bytes_per_token(case.shape, kind, kind) * case.shape.layers * case.context * case.slots


def accelerate(case: Case) -> float:
    """Return accelerate's estimate: parameters times the nearest width it knows, and a fifth for
    inference."""
    width = {"Q4_K_M": 0.5, "Q8_0": 1.0, "F16": 2.0}[case.scheme]
    return parameters(case.shape) * width * 1.2


def llmfit(case: Case) -> float:
    """Return llmfit's: parameters times a factor per quantization, the cache, and half a gigabyte."""
    factor = {"Q4_K_M": 0.58, "Q8_0": 1.05, "F16": 2.0}[case.scheme]
    return parameters(case.shape) * factor + plain_kv(case) + 0.5e9


def gguf_parser(case: Case) -> float:
    """Return gguf-parser-go's: exact tensors and cache, logits of a micro-batch, and its footprint of 250
    MiB."""
    layout = layout_from_scheme(case.shape, case.scheme)
    on_device = layout.tensor_bytes - (0 if layout.tied else layout.token_embd)
    logits = 4 * 512 * (case.shape.vocab_size + case.shape.hidden_size)
    return on_device + plain_kv(case) + logits + 250 * MIB


def ollama(case: Case) -> float:
    """Return Ollama's coarse check: the file and an f16 cache."""
    return layout_from_scheme(case.shape, case.scheme).file_bytes + plain_kv(case, "f16")


PEERS: dict[str, Callable[[Case], float]] = {
    "accelerate": accelerate,
    "gguf-parser-go": gguf_parser,
    "llmfit": llmfit,
    "Ollama": ollama,
}


def compare(names: tuple[str, ...], directory: Path) -> list[str]:
    """Return the table's lines: errors of the total on the device, in percent of llama.cpp's."""
    device = DeviceBudget("RPC0", "RPC", 1 << 42)
    errors: dict[str, list[float]] = {"fleetfit": [], **{peer: [] for peer in PEERS}}
    terms: dict[str, list[float]] = {"weights": [], "kv_cache": [], "compute": []}
    lines = ["| case | llama.cpp MiB | fleetfit | " + " | ".join(PEERS) + " |"]
    lines.append("|---|---|" + "---|" * (len(PEERS) + 1))
    oracle = Oracle(directory)
    with rpc_devices(1, oracle.bin) as ports:
        for case in cases(names):
            shape = case.shape
            truth = oracle.ask(
                oracle.model(case.name, shape, case.scheme),
                n_ctx=n_ctx(case.context, case.slots),
                slots=case.slots,
                kv_type_k=case.kv_type,
                kv_type_v=case.kv_type,
                n_gpu_layers=all_layers(shape),
                rpc=ports,
            ).devices[0]
            mine = estimate(
                shape,
                layout_from_scheme(shape, case.scheme),
                context_tokens=case.context,
                slots=case.slots,
                kv_type_k=case.kv_type,
                kv_type_v=case.kv_type,
                devices=[device],
            ).devices[0]
            # llama.cpp cuts each figure to whole MiB; half a MiB is the middle of what it may be.
            total = truth.model_mib + truth.context_mib + truth.compute_mib + 1.5
            terms["weights"].append(mine.weights / MIB - truth.model_mib - 0.5)
            terms["kv_cache"].append(mine.kv_cache / MIB - truth.context_mib - 0.5)
            terms["compute"].append(mine.compute / MIB - truth.compute_mib - 0.5)
            values = {"fleetfit": (mine.weights + mine.kv_cache + mine.compute) / MIB}
            values |= {peer: formula(case) / MIB for peer, formula in PEERS.items()}
            row = {name: value / total - 1 for name, value in values.items()}
            for name, error in row.items():
                errors[name].append(error)
            label = f"{case.name} {case.scheme} {case.context}x{case.slots} {case.kv_type}"
            lines.append(
                f"| {label} | {total:.0f} | " + " | ".join(f"{error:+.1%}" for error in row.values()) + " |"
            )
    for what, function in (
        ("mean of absolute errors", lambda values: statistics.mean(abs(value) for value in values)),
        ("furthest under", min),
        ("furthest over", max),
    ):
        lines.append(
            f"| **{what}** | | "
            + " | ".join(f"**{function(values):+.1%}**" for values in errors.values())
            + " |"
        )
    lines += [
        "",
        "fleetfit by term, MiB (llama.cpp prints whole MiB, so half a MiB is its own rounding):",
        "",
    ]
    lines += ["| term | cells | least | most |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {len(found)} | {min(found):+.1f} | {max(found):+.1f} |" for name, found in terms.items()
    ]
    return lines


def cases(names: tuple[str, ...]) -> list[Case]:
    found = []
    for name in names:
        for context in CONTEXTS:
            for scheme, slots, kv_type in (("Q4_K_M", 1, "f16"), ("Q8_0", 1, "q8_0"), ("F16", 4, "f16")):
                found.append(Case(name, scheme, context, slots, kv_type))
    return found


# Official Qwen2.5 benchmark (2024-11): torch's peak in GiB on one A100 80 GB, transformers, batch 1,
# 2048 tokens generated, at these input lengths. Cells on several GPUs are left out.
INPUTS = (1, 6144, 14336, 30720)
OFFICIAL: dict[tuple[str, str], tuple[float, ...]] = {
    ("qwen2.5-0.5b", "BF16"): (0.97, 1.23, 1.60, 2.34),
    ("qwen2.5-0.5b", "GPTQ-Int8"): (0.64, 0.90, 1.26, 2.01),
    ("qwen2.5-0.5b", "GPTQ-Int4"): (0.48, 0.73, 1.10, 1.85),
    ("qwen2.5-0.5b", "AWQ"): (0.68, 0.72, 1.10, 1.84),
    ("qwen2.5-1.5b", "BF16"): (2.95, 3.43, 4.16, 5.62),
    ("qwen2.5-1.5b", "GPTQ-Int8"): (1.82, 2.30, 3.03, 4.49),
    ("qwen2.5-1.5b", "GPTQ-Int4"): (1.18, 1.66, 2.39, 3.85),
    ("qwen2.5-1.5b", "AWQ"): (1.51, 1.63, 2.36, 3.82),
    ("qwen2.5-3b", "BF16"): (5.95, 6.59, 7.47, 9.30),
    ("qwen2.5-3b", "GPTQ-Int8"): (3.38, 3.98, 4.89, 6.72),
    ("qwen2.5-3b", "GPTQ-Int4"): (2.06, 2.67, 3.58, 5.41),
    ("qwen2.5-3b", "AWQ"): (2.50, 2.62, 3.54, 5.37),
    ("qwen2.5-7b", "BF16"): (14.38, 15.38, 16.91, 19.97),
    ("qwen2.5-7b", "GPTQ-Int8"): (8.42, 9.43, 10.96, 14.01),
    ("qwen2.5-7b", "GPTQ-Int4"): (5.52, 6.52, 8.05, 11.11),
    ("qwen2.5-7b", "AWQ"): (5.39, 6.39, 7.92, 10.98),
    ("qwen2.5-14b", "BF16"): (28.08, 29.50, 31.95, 36.85),
    ("qwen2.5-14b", "GPTQ-Int8"): (16.11, 17.61, 19.98, 24.88),
    ("qwen2.5-14b", "GPTQ-Int4"): (9.94, 11.36, 13.81, 18.71),
    ("qwen2.5-14b", "AWQ"): (9.79, 11.22, 13.67, 18.57),
    ("qwen2.5-32b", "BF16"): (61.58, 63.72, 67.31, 74.47),
    ("qwen2.5-32b", "GPTQ-Int8"): (33.56, 35.86, 39.28, 46.45),
    ("qwen2.5-32b", "GPTQ-Int4"): (18.94, 21.09, 24.67, 31.84),
    ("qwen2.5-32b", "AWQ"): (18.67, 20.81, 24.39, 31.56),
}
# Activation elements per prompt token and hidden element; chosen on this same table, so it predicts nothing.
OFFICIAL_COEFFICIENT = 4.75
GENERATED_TOKENS = 2048


def official_gib(shape: ModelShape, scheme: str, input_tokens: int) -> float:
    """Return weights, cache and unchunked prompt activations, as transformers holds them."""
    weights = safetensors_layout(shape, scheme).tensor_bytes
    cache = kv_bytes_per_token(shape, "f16", "f16") * shape.layers
    activations = input_tokens * (6 * shape.intermediate_size + 2 * OFFICIAL_COEFFICIENT * shape.hidden_size)
    peak = max(cache * (input_tokens + GENERATED_TOKENS), cache * input_tokens + activations)
    return (weights + peak) / GIB


def official() -> list[str]:
    lines = [
        "Official Qwen2.5 memory table (transformers; not a gate; its one coefficient was fitted on it):",
        "",
        "| model | scheme | " + " | ".join(f"input {tokens}" for tokens in INPUTS) + " |",
        "|---|---|" + "---|" * len(INPUTS),
    ]
    errors = []
    for (name, scheme), row in OFFICIAL.items():
        cells = []
        for tokens, published in zip(INPUTS, row, strict=True):
            computed = official_gib(SHAPES[name], scheme, tokens)
            errors.append((tokens, computed / published - 1))
            cells.append(f"{computed:.2f} / {published:.2f} ({computed / published - 1:+.1%})")
        lines.append(f"| {name} | {scheme} | " + " | ".join(cells) + " |")
    for what, found in (
        ("all cells", [error for _, error in errors]),
        ("input 6144 and more", [error for tokens, error in errors if tokens >= 6144]),
    ):
        mean = statistics.mean(abs(error) for error in found)
        lines += [
            "",
            f"{what}: {len(found)}, mean of absolute errors {mean:.2%}, worst {max(found, key=abs):+.1%}.",
        ]
    return lines


def main() -> int:
    """Parse the command line and print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every shape, not a sample")
    parser.add_argument("--out", type=Path, help="also write the tables here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        lines = compare(tuple(SHAPES) if args.all else SAMPLE, Path(directory))
    text = "\n".join(["# Memory model against llama.cpp's own accounting", "", *lines, "", *official(), ""])
    print(text)
    if args.out:
        args.out.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
