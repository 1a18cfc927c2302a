"""Rooflines against published caps, and measurements that cannot be."""

from __future__ import annotations

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import evaluate
from ansible_collections.fleetfit.llm.plugins.module_utils.speed import (
    LLAMA_CPP_GPU,
    VLLM_4_BIT,
    VLLM_8_BIT,
    VLLM_16_BIT,
    VLLM_FP8_NATIVE,
    VLLM_FP8_WEIGHT_ONLY,
    Efficiency,
    decode_efficiency,
    expected_tokens_per_s,
    is_impossible,
    roofline_tokens_per_s,
    vllm_efficiency,
)

from .planning import CATALOG, cards, facts, request


@pytest.mark.parametrize(
    ("read_gb", "bandwidth_gb_s", "cap"),
    [(4.37, 360, 82), (7.51, 360, 48), (4.37, 1008, 231), (14.14, 2039, 144)],
)
def test_caps_of_7b_are_the_published_ones(read_gb: float, bandwidth_gb_s: float, cap: int) -> None:
    assert round(roofline_tokens_per_s([(int(read_gb * 1e9), bandwidth_gb_s * 1e9)])) == cap


def test_parts_run_one_after_another() -> None:
    both = roofline_tokens_per_s([(10**9, 1e9), (10**9, 1e9)])
    assert both == pytest.approx(roofline_tokens_per_s([(2 * 10**9, 1e9)]))
    assert roofline_tokens_per_s([]) == 0.0


def test_the_expected_speed_of_q4_k_m_on_an_rtx_3060() -> None:
    """Logs of 8B and 14B on that card give about 65 tokens/s for 7B: 0.79 of the cap."""
    expected = expected_tokens_per_s([(int(4.37e9), 360e9, LLAMA_CPP_GPU)])
    assert expected == pytest.approx(65, rel=0.08)
    assert "llama-bench" in LLAMA_CPP_GPU.source


def test_a_public_claim_above_the_cap_is_impossible() -> None:
    """ "RTX 3060, Qwen2.5-Coder-7B Q4_K_M, 119 tok/s" is 1.44 times what the memory can deliver."""
    assert is_impossible(119, 82.4)
    assert not is_impossible(65, 82.4)
    assert not is_impossible(65, None)


def test_vllm_factors_by_scheme() -> None:
    assert vllm_efficiency("AWQ") == VLLM_4_BIT
    assert vllm_efficiency("GPTQ-Int8") == VLLM_8_BIT
    assert vllm_efficiency("FP8") == VLLM_FP8_WEIGHT_ONLY
    assert vllm_efficiency("FP8", native=True) == VLLM_FP8_NATIVE
    assert vllm_efficiency("BF16") == VLLM_16_BIT


def test_no_bandwidth_is_an_error() -> None:
    with pytest.raises(FleetfitError):
        roofline_tokens_per_s([(1, 0.0)])


# benchmarks/gpu_memory/results/h100-80gb-580.159.04.md, short context, mean of the cases of each variant.
H100_7B_TOKENS_PER_S = {
    "F16": 143.7,
    "Q8_0": 180.0,
    "Q6_K": 171.4,
    "Q5_K_M": 209.8,
    "Q4_K_M": 200.8,
    "Q3_K_M": 161.7,
}


@pytest.mark.parametrize(("variant", "measured"), H100_7B_TOKENS_PER_S.items())
def test_what_is_expected_of_an_h100_is_what_it_reached(variant: str, measured: float) -> None:
    host = facts(cards("H100 SXM"), ram_gib=128)
    candidates = evaluate(request("qwen2.5-7b-instruct", host, slots=1, min_quality_tier="rest"))
    found = {item.variant.name: item for item in candidates}[variant]
    assert found.expected_tokens_per_s is not None
    assert found.roofline_tokens_per_s is not None
    # Q3_K_M's kernels compute more; nothing else is off by more than a fifth.
    assert found.expected_tokens_per_s == pytest.approx(measured, rel=0.45 if variant == "Q3_K_M" else 0.2)
    assert found.expected_tokens_per_s < found.roofline_tokens_per_s


def test_measured_cards_have_their_own_figures_and_others_the_constant() -> None:
    measured = decode_efficiency(CATALOG.gpus, "llama_cpp", "9.0")
    assert measured is not None
    assert "H100" in measured.source
    assert 0 < measured.layer_seconds < 1e-3
    assert decode_efficiency(CATALOG.gpus, "llama_cpp", "8.9") is None
    assert decode_efficiency(CATALOG.gpus, "vllm", "9.0") is None
    assert decode_efficiency(CATALOG.gpus, "llama_cpp", None) is None


def test_never_above_the_roofline() -> None:
    boast = Efficiency(1.4, "a mistake in the data")
    parts = [(10**9, 1e12, boast)]
    assert expected_tokens_per_s(parts) <= roofline_tokens_per_s([(10**9, 1e12)])
    assert expected_tokens_per_s(parts, -1.0) <= roofline_tokens_per_s([(10**9, 1e12)])
    assert expected_tokens_per_s(parts, 0.001) == pytest.approx(500)
    assert expected_tokens_per_s([], 0.001) == 0.0
