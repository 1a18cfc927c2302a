"""File sizes against published ones, and the official memory table of Qwen2.5 (which is another engine's)."""

from __future__ import annotations

from dataclasses import dataclass

from ansible_collections.fleetfit.llm.plugins.module_utils.memory_llama_cpp import kv_bytes_per_token
from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import ModelShape
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import (
    layout_from_scheme,
    safetensors_layout,
)

from .shapes import SHAPES

GIB = 1 << 30
# A GGUF file passes within its published figure's rounding or this share; a GPTQ or AWQ one within this share.
GGUF_SHARE, SAFETENSORS_SHARE = 0.005, 0.003
# Sizes on model cards, in GB with half of the last digit that they print (by mradermacher, legraphista,
# RichardErkhov and the Qwen team).
PUBLISHED_GGUF: tuple[tuple[str, str, float, float], ...] = (
    ("qwen2.5-7b", "Q2_K", 3.02, 0.005),
    ("qwen2.5-7b", "Q3_K_S", 3.49, 0.005),
    ("qwen2.5-7b", "Q3_K_M", 3.81, 0.005),
    ("qwen2.5-7b", "Q3_K_L", 4.09, 0.005),
    ("qwen2.5-7b", "Q4_0", 4.43, 0.005),
    ("qwen2.5-7b", "Q4_K_S", 4.46, 0.005),
    ("qwen2.5-7b", "Q4_K_M", 4.68, 0.005),
    ("qwen2.5-7b", "IQ4_XS", 4.25, 0.005),
    ("qwen2.5-7b", "Q5_K_S", 5.32, 0.005),
    ("qwen2.5-7b", "Q5_K_M", 5.44, 0.005),
    ("qwen2.5-7b", "Q6_K", 6.25, 0.005),
    ("qwen2.5-7b", "Q8_0", 8.10, 0.005),
    ("qwen2.5-7b", "F16", 15.24, 0.005),
    ("qwen2.5-7b", "Q3_K_M", 3.55 * 1.073741824, 0.005 * 1.073741824),
    ("qwen2.5-1.5b", "Q4_K_M", 0.98605, 0.000005),
    ("qwen2.5-72b", "Q4_K_M", 47.42, 0.005),
    ("qwen2.5-72b", "Q8_0", 77.26, 0.005),
)
# AWQ 7B: shards of 4.48 and 1.09 GB; GPTQ-Int4 7B: 3.69 and 1.50 GiB; GPTQ-Int8 0.5B: 610.06 MiB.
PUBLISHED_SAFETENSORS: tuple[tuple[str, str, float], ...] = (
    ("qwen2.5-7b", "AWQ", 4.48e9 + 1.09e9),
    ("qwen2.5-7b", "GPTQ-Int4", (3.69 + 1.50) * 2**30),
    ("qwen2.5-0.5b", "GPTQ-Int8", 610.06 * 2**20),
)


@dataclass(frozen=True)
class FileSize:
    """One file: computed and published size in GB, and by how much they may differ."""

    model: str
    scheme: str
    computed_gb: float
    published_gb: float
    allowed_gb: float

    @property
    def share(self) -> float:
        """Return the difference as a share of the published size."""
        return self.computed_gb / self.published_gb - 1

    @property
    def ok(self) -> bool:
        """Return whether the difference is within what is allowed."""
        return abs(self.computed_gb - self.published_gb) <= self.allowed_gb


def gguf_sizes() -> list[FileSize]:
    """Return every published GGUF file beside the size that the mixture rules give."""
    return [
        FileSize(
            name,
            scheme,
            layout_from_scheme(SHAPES[name], scheme).file_bytes / 1e9,
            published,
            max(rounding, GGUF_SHARE * published),
        )
        for name, scheme, published, rounding in PUBLISHED_GGUF
    ]


def safetensors_sizes() -> list[FileSize]:
    """Return every published GPTQ and AWQ release beside the size that its arithmetic gives."""
    return [
        FileSize(
            name,
            scheme,
            layout_from_scheme(SHAPES[name], scheme).file_bytes / 1e9,
            published / 1e9,
            SAFETENSORS_SHARE * published / 1e9,
        )
        for name, scheme, published in PUBLISHED_SAFETENSORS
    ]


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


def official() -> list[tuple[str, str, int, float, float]]:
    """Return (model, scheme, input tokens, computed GiB, published GiB) of every cell on one GPU."""
    return [
        (name, scheme, tokens, official_gib(SHAPES[name], scheme, tokens), published)
        for (name, scheme), row in OFFICIAL.items()
        for tokens, published in zip(INPUTS, row, strict=True)
    ]
