"""Shapes of published models (their config.json), all of the catalog's and others, for comparing with engines."""

from __future__ import annotations

from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import ModelShape

QWEN2: dict[str, Any] = {"attention_bias": True}
QWEN3: dict[str, Any] = {"qk_norm": True}
LLAMA3: dict[str, Any] = {"rope_factors": True}
GEMMA2: dict[str, Any] = {"sliding_window": 4096, "global_every": 2, "post_norms": True}
GEMMA3: dict[str, Any] = {"global_every": 6, "post_norms": True, "qk_norm": True}
PHI3: dict[str, Any] = {"fused_projections": True}

# name -> architecture, layers, hidden, heads, kv heads, head dim, intermediate, vocabulary, tied, native
# context.
SHAPES: dict[str, ModelShape] = {
    "qwen2.5-0.5b": ModelShape("qwen2", 24, 896, 14, 2, 64, 4864, 151936, True, 32768, **QWEN2),
    "qwen2.5-1.5b": ModelShape("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, True, 32768, **QWEN2),
    "qwen2.5-3b": ModelShape("qwen2", 36, 2048, 16, 2, 128, 11008, 151936, True, 32768, **QWEN2),
    "qwen2.5-7b": ModelShape("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, False, 32768, **QWEN2),
    "qwen2.5-14b": ModelShape("qwen2", 48, 5120, 40, 8, 128, 13824, 152064, False, 32768, **QWEN2),
    "qwen2.5-32b": ModelShape("qwen2", 64, 5120, 40, 8, 128, 27648, 152064, False, 32768, **QWEN2),
    "qwen2.5-72b": ModelShape("qwen2", 80, 8192, 64, 8, 128, 29568, 152064, False, 32768, **QWEN2),
    "qwen3-0.6b": ModelShape("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, True, 40960, **QWEN3),
    "qwen3-1.7b": ModelShape("qwen3", 28, 2048, 16, 8, 128, 6144, 151936, True, 32768, **QWEN3),
    "qwen3-4b": ModelShape("qwen3", 36, 2560, 32, 8, 128, 9728, 151936, True, 40960, **QWEN3),
    "qwen3-8b": ModelShape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, False, 40960, **QWEN3),
    "qwen3-14b": ModelShape("qwen3", 40, 5120, 40, 8, 128, 17408, 151936, False, 40960, **QWEN3),
    "qwen3-32b": ModelShape("qwen3", 64, 5120, 64, 8, 128, 25600, 151936, False, 40960, **QWEN3),
    "qwen3-30b-a3b": ModelShape(
        "qwen3moe",
        48,
        2048,
        32,
        4,
        128,
        0,
        151936,
        False,
        40960,
        experts=128,
        experts_used=8,
        expert_intermediate_size=768,
        **QWEN3,
    ),
    "qwen1.5-moe-a2.7b": ModelShape(
        "qwen2moe",
        24,
        2048,
        16,
        16,
        128,
        0,
        151936,
        False,
        8192,
        experts=60,
        experts_used=4,
        expert_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        **QWEN2,
    ),
    "llama-3.2-1b": ModelShape("llama", 16, 2048, 32, 8, 64, 8192, 128256, True, 131072, **LLAMA3),
    "llama-3.2-3b": ModelShape("llama", 28, 3072, 24, 8, 128, 8192, 128256, True, 131072, **LLAMA3),
    "llama-3.1-8b": ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, 131072, **LLAMA3),
    "llama-3.1-70b": ModelShape("llama", 80, 8192, 64, 8, 128, 28672, 128256, False, 131072, **LLAMA3),
    "llama-2-7b": ModelShape("llama", 32, 4096, 32, 32, 128, 11008, 32000, False, 4096),
    "llama-2-13b": ModelShape("llama", 40, 5120, 40, 40, 128, 13824, 32000, False, 4096),
    "tinyllama-1.1b": ModelShape("llama", 22, 2048, 32, 4, 64, 5632, 32000, False, 2048),
    "smollm2-135m": ModelShape("llama", 30, 576, 9, 3, 64, 1536, 49152, True, 8192),
    "mistral-7b": ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 32768, False, 32768),
    "mistral-nemo-12b": ModelShape("llama", 40, 5120, 32, 8, 128, 14336, 131072, False, 131072),
    "mixtral-8x7b": ModelShape(
        "llama",
        32,
        4096,
        32,
        8,
        128,
        0,
        32000,
        False,
        32768,
        experts=8,
        experts_used=2,
        expert_intermediate_size=14336,
    ),
    "gemma-2-2b": ModelShape("gemma2", 26, 2304, 8, 4, 256, 9216, 256000, True, 8192, **GEMMA2),
    "gemma-2-9b": ModelShape("gemma2", 42, 3584, 16, 8, 256, 14336, 256000, True, 8192, **GEMMA2),
    "gemma-2-27b": ModelShape("gemma2", 46, 4608, 32, 16, 128, 36864, 256000, True, 8192, **GEMMA2),
    "gemma-3-1b": ModelShape(
        "gemma3", 26, 1152, 4, 1, 256, 6912, 262144, True, 32768, sliding_window=512, **GEMMA3
    ),
    "gemma-3-4b": ModelShape(
        "gemma3", 34, 2560, 8, 4, 256, 10240, 262208, True, 131072, sliding_window=1024, **GEMMA3
    ),
    "gemma-3-12b": ModelShape(
        "gemma3", 48, 3840, 16, 8, 256, 15360, 262208, True, 131072, sliding_window=1024, **GEMMA3
    ),
    "gemma-3-27b": ModelShape(
        "gemma3", 62, 5376, 32, 16, 128, 21504, 262208, True, 131072, sliding_window=1024, **GEMMA3
    ),
    "phi-4-mini": ModelShape(
        "phi3", 32, 3072, 24, 8, 128, 8192, 200064, True, 131072, rope_factors=True, **PHI3
    ),
    "phi-4": ModelShape("phi3", 40, 5120, 40, 10, 128, 17920, 100352, False, 16384, **PHI3),
    "phi-3.5-mini": ModelShape(
        "phi3", 32, 3072, 32, 32, 96, 8192, 32064, False, 131072, rope_factors=True, **PHI3
    ),
}
