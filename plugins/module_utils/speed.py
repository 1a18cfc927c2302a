"""How fast a model can answer: the bandwidth roofline, and what to expect of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

from .errors import FleetfitError


class Efficiency(NamedTuple):
    """How far decoding stays behind the roofline: a factor, seconds for each layer, and where that was seen.

    The seconds are what a layer's kernels take beside reading memory; they tell on fast cards only.
    """

    factor: float
    source: str
    layer_seconds: float = 0.0


# Measured tokens/s divided by the roofline (public llama-bench logs and engine benchmarks).
LLAMA_CPP_GPU = Efficiency(
    0.75, "llama-bench on RTX 2080, 3060, 3080, 4090 and GB10: 0.70 to 0.81 of the roofline at short context"
)
LLAMA_CPP_CPU = Efficiency(0.5, "assumed for CPU hosts: no published series; verify measures it")
VLLM_16_BIT = Efficiency(0.58, "vLLM 0.6.3 on A100, BF16, batch 1: 0.58 of the roofline")
VLLM_8_BIT = Efficiency(0.47, "vLLM 0.6.3 on A100, GPTQ-Int8, batch 1: 0.47 of the roofline")
# nm-vllm pull request 331: FP8 through Marlin is up to 1.5 times 16-bit on an A100; of Qwen2.5-7B it reads 0.54 of
# the bytes: 0.58 x 1.5 x 0.54. The same kernels as GPTQ-Int8's, and the same share.
VLLM_FP8_WEIGHT_ONLY = Efficiency(
    0.47, "vLLM's FP8 Marlin on A100, weight-only: up to 1.5 times 16-bit, which is 0.47 of the roofline"
)
# vLLM's documentation of FP8: up to 1.6 times 16-bit where the card computes in it: 0.58 x 1.6 x 0.54.
VLLM_FP8_NATIVE = Efficiency(
    0.5, "vLLM's documentation of native FP8: up to 1.6 times 16-bit, which is 0.50 of the roofline; not run"
)
VLLM_4_BIT = Efficiency(
    0.33, "vLLM 0.6.3 on A100, AWQ and GPTQ-Int4, batch 1: 0.33 of the roofline (launch-bound)"
)
# Two channels of DDR4-3200: what an ordinary host has where nothing was measured.
DEFAULT_RAM_BANDWIDTH_BYTES_PER_S = 40e9
# A measurement this far above the roofline is a mistake in the measurement, not a fast card.
IMPOSSIBLE_FACTOR = 1.05


def roofline_tokens_per_s(parts: Sequence[tuple[int, float]]) -> float:
    """Return the most tokens/s that memory bandwidth allows for one stream.

    ``parts`` are (bytes read per token, bandwidth in bytes/s) of every place that holds a part of the
    model; the layers run one after another, so their times add up.
    """
    seconds = 0.0
    for read_bytes, bandwidth in parts:
        if bandwidth <= 0:
            raise FleetfitError(
                f"A bandwidth of {bandwidth} bytes/s is not possible.",
                code="bad_bandwidth",
                remedy="Give a positive number.",
            )
        seconds += read_bytes / bandwidth
    return 1.0 / seconds if seconds > 0 else 0.0


def expected_tokens_per_s(
    parts: Sequence[tuple[int, float, Efficiency]], layer_seconds: float = 0.0
) -> float:
    """Return the expected tokens/s: as the roofline, each place slowed by its efficiency factor.

    ``layer_seconds`` is the time that all layers' kernels add to a token (:attr:`Efficiency.layer_seconds`
    of each layer's place). With factors up to 1 the result never exceeds the roofline.
    """
    speed = roofline_tokens_per_s(
        [(read, bandwidth * min(efficiency.factor, 1.0)) for read, bandwidth, efficiency in parts]
    )
    return 1.0 / (1.0 / speed + max(layer_seconds, 0.0)) if speed > 0 else 0.0


def decode_efficiency(
    gpus: Mapping[str, Any], engine: str, compute_capability: Optional[str]
) -> Optional[Efficiency]:
    """Return what catalog/gpus.yml has measured of cards of this compute capability; None where nothing."""
    for item in gpus.get("decode_speed") or ():
        if item["engine"] == engine and item["compute_capability"] == compute_capability:
            return Efficiency(
                factor=float(item["factor"]),
                source=str(item["source"]),
                layer_seconds=float(item["layer_us"]) * 1e-6,
            )
    return None


def vllm_efficiency(scheme: str, *, native: bool = False) -> Efficiency:
    """Return the factor for a safetensors scheme in vLLM at batch 1.

    ``native``: the cards compute in the scheme's format (FP8 from compute capability 8.9 on).
    """
    if scheme in ("GPTQ-Int4", "AWQ"):
        return VLLM_4_BIT
    if scheme == "FP8":
        return VLLM_FP8_NATIVE if native else VLLM_FP8_WEIGHT_ONLY
    if scheme == "GPTQ-Int8":
        return VLLM_8_BIT
    return VLLM_16_BIT


def is_impossible(measured_tokens_per_s: float, roofline: Optional[float]) -> bool:
    """Return whether a measured single-stream speed lies above what the memory can deliver."""
    return roofline is not None and roofline > 0 and measured_tokens_per_s > roofline * IMPOSSIBLE_FACTOR
