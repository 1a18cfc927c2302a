"""llama.cpp's memory: rules that hold for every model, and figures that were measured elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.memory import DeviceBudget, Estimate
from ansible_collections.fleetfit.llm.plugins.module_utils.memory_llama_cpp import (
    GraphMode,
    Placement,
    all_layers,
    compute_bytes,
    device_compute_bytes,
    estimate,
    kv_bytes_per_token,
    layer_devices,
    n_ctx,
    padded_context_tokens,
    sliding_cache_tokens,
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
QWEN_3B = ModelShape("qwen2", 36, 2048, 16, 2, 128, 11008, 151936, True, 32768, attention_bias=True)
GEMMA_12B = ModelShape(
    "gemma3",
    48,
    3840,
    16,
    8,
    256,
    15360,
    262208,
    True,
    131072,
    sliding_window=1024,
    global_every=6,
    post_norms=True,
    qk_norm=True,
)
A3B = ModelShape(
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
    qk_norm=True,
    experts=128,
    experts_used=8,
    expert_intermediate_size=768,
)
PHI_4 = ModelShape("phi3", 40, 5120, 40, 10, 128, 17920, 100352, False, 16384, fused_projections=True)
SHAPES = [QWEN_7B, QWEN_3B, GEMMA_12B, A3B, PHI_4]
CARD = DeviceBudget("GPU-1", "RTX 4090", 24 * GIB, 484 * MIB)
OTHER = DeviceBudget("GPU-2", "RTX 3060", 12 * GIB, 382 * MIB)


def ask(shape: ModelShape, scheme: str = "Q4_K_M", **more: Any) -> Estimate:
    return estimate(
        shape, layout_from_scheme(shape, scheme), **{"context_tokens": 8192, "devices": [CARD], **more}
    )


def test_kv_bytes_per_token_are_the_published_ones() -> None:
    per_layer = kv_bytes_per_token(QWEN_7B, "f16", "f16")
    assert per_layer * 28 == 57_344
    assert kv_bytes_per_token(QWEN_7B, "q8_0", "q8_0") * 28 == 30_464
    assert kv_bytes_per_token(QWEN_7B, "q4_0", "q4_0") * 28 == 16_128


def test_contexts_are_padded_per_slot() -> None:
    assert n_ctx(8192, 4) == 32768
    assert n_ctx(8193, 1) == 8448
    assert n_ctx(2731, 3) == 8448
    assert padded_context_tokens(1) == 256


def test_the_128k_context_of_7b_takes_seven_gib() -> None:
    assert ask(QWEN_7B, context_tokens=131072).devices[0].kv_cache == 7 * GIB


def test_sliding_layers_hold_window_and_microbatch() -> None:
    """Gemma-3-12B at 8k with f16: 992 MiB, of which growing layers 512."""
    assert sliding_cache_tokens(GEMMA_12B, 8192, 512) == 1536
    assert ask(GEMMA_12B).devices[0].kv_cache == 992 * MIB


def test_tied_embeddings_are_on_the_card_and_in_ram() -> None:
    """Gemma-3-12B Q8_0: llama.cpp counts 11,924 MiB on the card and 1,020 on the host."""
    found = ask(GEMMA_12B, "Q8_0")
    assert found.devices[0].weights / MIB == pytest.approx(11_924, abs=1.5)
    assert found.host.weights / MIB == pytest.approx(1_020, abs=1.5)


def test_ngl_one_is_the_output_layer_alone() -> None:
    """7B Q8_0: 552 MiB and no cache; with 20, the cache of 19 layers."""
    one = ask(QWEN_7B, "Q8_0", n_gpu_layers=1).devices[0]
    assert (one.weights // MIB, one.kv_cache) == (552, 0)
    twenty = ask(QWEN_7B, "Q8_0", n_gpu_layers=20).devices[0]
    assert twenty.kv_cache == 19 * 8192 * 2048


def test_experts_in_ram_leave_a_small_part_on_the_card() -> None:
    """30B-A3B Q8_0 with all experts in RAM: 1,282 MiB on the card."""
    found = ask(A3B, "Q8_0", n_cpu_moe=48)
    assert found.devices[0].weights / MIB == pytest.approx(1_282, abs=1.5)


def test_nothing_offloaded_leaves_all_on_the_host() -> None:
    found = ask(QWEN_7B, devices=[], n_gpu_layers=0)
    assert found.devices == ()
    assert found.host.weights == layout_from_scheme(QWEN_7B, "Q4_K_M").tensor_bytes


def test_layers_of_unlike_cards_follow_the_split() -> None:
    places = layer_devices(QWEN_7B, 29, (3, 1))
    assert places.count(0) == 22
    assert places.count(1) == 7
    assert places[-1] == 1
    assert layer_devices(QWEN_7B, 5, (1,))[:24] == (None,) * 24
    assert set(layer_devices(QWEN_7B, 29, (0, 1))) == {1}
    assert set(layer_devices(QWEN_7B, 0, (1,))) == {None}


def test_several_devices_keep_copies_of_the_inputs() -> None:
    alone = ask(QWEN_7B, context_tokens=32768).devices[0].compute
    both = ask(QWEN_7B, context_tokens=32768, devices=[CARD, OTHER]).devices
    assert both[1].compute > alone
    assert sum(terms.weights for terms in both) == ask(QWEN_7B).devices[0].weights


def test_a_quantized_cache_costs_cuda_copies_beside_the_buffers() -> None:
    plain, quantized = ask(QWEN_7B).devices[0], ask(QWEN_7B, kv_type_k="q8_0", kv_type_v="q8_0").devices[0]
    assert quantized.overhead - plain.overhead == 8192 * 512 * 4


def test_weights_left_in_ram_need_room_on_the_card_for_the_largest() -> None:
    layout = layout_from_scheme(QWEN_7B, "Q4_K_M")
    assert ask(QWEN_7B, n_gpu_layers=15).devices[0].overhead - CARD.overhead == max(layout.block_largest[:14])
    assert ask(QWEN_7B).devices[0].overhead == CARD.overhead


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.architecture))
def test_the_upper_bound_covers_every_placement(shape: ModelShape) -> None:
    for devices in ([CARD], [CARD, OTHER]):
        for layers in (1, 2, shape.layers // 2, shape.layers, all_layers(shape)):
            found = ask(shape, context_tokens=8193, devices=devices, n_gpu_layers=layers)
            places = layer_devices(shape, layers, [float(device.budget) for device in devices])
            for index, terms in enumerate(found.devices):
                bound = compute_bytes(
                    shape,
                    context_tokens=8193,
                    n_ubatch=512,
                    with_output=index == places[-1],
                    device_count=len(devices),
                )
                assert terms.compute <= bound


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    scheme=st.sampled_from(["Q2_K", "Q4_K_M", "Q8_0", "F16"]),
    context=st.integers(1, 131072),
    more=st.integers(0, 65536),
    slots=st.integers(1, 8),
    fraction=st.floats(0, 1),
    count=st.integers(1, 3),
)
def test_more_context_or_slots_never_take_less(
    shape: ModelShape, scheme: str, context: int, more: int, slots: int, fraction: float, count: int
) -> None:
    layers = round(fraction * all_layers(shape))
    devices = [CARD, OTHER, CARD][:count]
    base: dict[str, Any] = {"devices": devices, "n_gpu_layers": layers}
    small = ask(shape, scheme, context_tokens=context, slots=slots, **base)
    long = ask(shape, scheme, context_tokens=context + more, slots=slots, **base)
    wide = ask(shape, scheme, context_tokens=context, slots=slots + 1, **base)
    for place in (*range(count), None):
        terms = [item.host if place is None else item.devices[place] for item in (small, long, wide)]
        assert terms[0].kv_cache <= terms[1].kv_cache
        assert terms[0].kv_cache <= terms[2].kv_cache
        assert terms[0].weights == terms[1].weights == terms[2].weights
        assert terms[0].total <= terms[1].total


@settings(max_examples=100, deadline=None)
@given(shape=st.sampled_from(SHAPES), layers=st.integers(0, 49), count=st.integers(1, 3))
def test_every_byte_is_somewhere_once(shape: ModelShape, layers: int, count: int) -> None:
    layout = layout_from_scheme(shape, "Q4_K_M")
    found = ask(shape, devices=[CARD, OTHER, CARD][:count], n_gpu_layers=layers)
    twice = layout.token_embd if layout.tied and layers > 0 else 0
    assert found.total.weights == layout.tensor_bytes + twice


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"context_tokens": 0}, "bad_setting"),
        ({"context_tokens": -5}, "bad_setting"),
        ({"slots": 0}, "bad_setting"),
        ({"slots": 1.5}, "bad_setting"),
        ({"kv_type_k": "q3_0"}, "unknown_kv_type"),
        ({"tensor_split": (1, 1)}, "bad_tensor_split"),
        ({"tensor_split": (0,)}, "bad_tensor_split"),
        ({"tensor_split": (-1,)}, "bad_tensor_split"),
    ],
)
def test_settings_that_llama_server_would_refuse(change: dict[str, Any], code: str) -> None:
    with pytest.raises(FleetfitError) as caught:
        ask(QWEN_7B, **change)
    assert caught.value.code == code


def test_safetensors_are_refused() -> None:
    with pytest.raises(FleetfitError) as caught:
        estimate(QWEN_7B, safetensors_layout(QWEN_7B, "AWQ"), context_tokens=8192, devices=[CARD])
    assert caught.value.code == "format_not_supported"


def test_a_quantized_cache_with_slots_on_fused_models_is_refused() -> None:
    with pytest.raises(FleetfitError) as caught:
        ask(PHI_4, slots=2, kv_type_k="q8_0", kv_type_v="q8_0")
    assert caught.value.code == "kv_type_not_supported"
    assert ask(PHI_4, slots=1, kv_type_k="q8_0", kv_type_v="q8_0").fits


def test_the_compute_buffer_of_7b_on_one_card_is_llama_cpp_s() -> None:
    """357 MiB by its own accounting at 32,768 tokens; with pipeline copies the last card takes 488."""
    inputs = 2 * 512 * 32768
    last = Placement(has_output=True, blocks=28, has_experts=True, is_first=True)
    alone = device_compute_bytes(
        QWEN_7B, last, GraphMode(True, False), tokens=512, context_tokens=32768, attention_inputs=inputs
    )
    assert alone // MIB == 357
    second = last._replace(is_first=False)
    pipelined = device_compute_bytes(
        QWEN_7B, second, GraphMode(True, True), tokens=512, context_tokens=32768, attention_inputs=inputs
    )
    assert pipelined // MIB == 488
