"""Shapes from config.json and GGUF metadata, and errors that name the field that misses."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import (
    ModelShape,
    from_config_json,
    from_gguf,
)

QWEN2_5_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
GEMMA_3_12B_TEXT: dict[str, Any] = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "max_position_embeddings": 131072,
    "num_attention_heads": 16,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "vocab_size": 262208,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LLAMA_3_2_1B: dict[str, Any] = {
    "model_type": "llama",
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0},
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}


def test_dense_config() -> None:
    shape = from_config_json(QWEN2_5_7B)
    assert shape == ModelShape(
        "qwen2", 28, 3584, 28, 4, 128, 18944, 152064, False, 32768, attention_bias=True
    )
    assert (shape.gqa, shape.q_dim, shape.kv_dim) == (7, 3584, 512)


def test_sliding_windows_of_gemma_3() -> None:
    shape = from_config_json(GEMMA_3_12B_TEXT)
    assert (shape.sliding_window, shape.global_every, shape.tied_embeddings) == (1024, 6, True)
    assert [shape.is_sliding(layer) for layer in range(7)] == [True] * 5 + [False, True]


def test_experts_of_qwen3_and_mixtral() -> None:
    qwen = from_config_json(QWEN3_30B_A3B)
    assert (qwen.experts, qwen.experts_used, qwen.expert_intermediate_size) == (128, 8, 768)
    assert qwen.intermediate_size == 0
    mixtral = from_config_json(MIXTRAL)
    assert (mixtral.architecture, mixtral.experts, mixtral.expert_intermediate_size) == ("llama", 8, 14336)


def test_llama_3_keeps_its_rope_factors_and_mistral_loses_its_window() -> None:
    assert from_config_json(LLAMA_3_2_1B).rope_factors
    mistral = {**LLAMA_3_2_1B, "model_type": "mistral", "sliding_window": 4096, "rope_scaling": None}
    assert from_config_json(mistral).sliding_window == 0


@pytest.mark.parametrize(
    "field",
    [
        "model_type",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
    ],
)
def test_a_missing_field_is_named(field: str) -> None:
    config = {name: value for name, value in QWEN2_5_7B.items() if name != field}
    with pytest.raises(FleetfitError, match=field) as caught:
        from_config_json(config, origin="/m/config.json")
    assert caught.value.code == "config_field_missing"
    assert "/m/config.json" in str(caught.value)


@pytest.mark.parametrize("field", ["num_experts_per_tok"])
def test_a_missing_field_of_experts_is_named(field: str) -> None:
    config = {name: value for name, value in QWEN3_30B_A3B.items() if name != field}
    with pytest.raises(FleetfitError, match=field):
        from_config_json(config)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model_type": "mamba"}, "architecture_not_supported"),
        ({"vision_config": {}}, "multimodal_not_supported"),
        ({"hidden_size": -1}, "bad_model_shape"),
        ({"num_hidden_layers": 0}, "bad_model_shape"),
        ({"num_attention_heads": 0}, "bad_model_shape"),
        ({"num_hidden_layers": 10**9}, "bad_model_shape"),
        ({"vocab_size": 2**70}, "bad_model_shape"),
        ({"num_key_value_heads": 3}, "bad_model_shape"),
        ({"hidden_size": "big"}, "bad_config_json"),
        ({"hidden_size": True}, "bad_config_json"),
        ({"hidden_size": 3584.5}, "bad_config_json"),
    ],
)
def test_wrong_values_are_refused(change: dict[str, Any], code: str) -> None:
    with pytest.raises(FleetfitError) as caught:
        from_config_json({**QWEN2_5_7B, **change})
    assert caught.value.code == code


def test_a_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(FleetfitError) as caught:
        from_config_json([])  # type: ignore[arg-type]
    assert caught.value.code == "bad_config_json"


GGUF_METADATA: dict[str, Any] = {
    "general.architecture": "qwen2",
    "qwen2.block_count": 28,
    "qwen2.context_length": 32768,
    "qwen2.embedding_length": 3584,
    "qwen2.feed_forward_length": 18944,
    "qwen2.attention.head_count": 28,
    "qwen2.attention.head_count_kv": 4,
    "tokenizer.ggml.tokens.length": 152064,
}
GGUF_TENSORS = frozenset({"token_embd.weight", "output.weight", "blk.0.attn_q.bias"})


def test_gguf_metadata_give_the_same_shape_as_config_json() -> None:
    assert from_gguf(GGUF_METADATA, GGUF_TENSORS) == from_config_json(QWEN2_5_7B)
    assert from_gguf(GGUF_METADATA, GGUF_TENSORS - {"output.weight"}).tied_embeddings


@pytest.mark.parametrize("key", [key for key in GGUF_METADATA if not key.endswith("head_count_kv")])
def test_a_missing_key_is_named(key: str) -> None:
    metadata = {name: value for name, value in GGUF_METADATA.items() if name != key}
    wanted = "vocab_size" if key.startswith("tokenizer") else key
    with pytest.raises(FleetfitError, match=wanted) as caught:
        from_gguf(metadata, GGUF_TENSORS)
    assert caught.value.code == "config_field_missing"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"general.architecture": "clip"}, "multimodal_not_supported"),
        ({"general.type": "mmproj"}, "multimodal_not_supported"),
        ({"general.architecture": "eagle3"}, "draft_not_supported"),
        ({"qwen2.nextn_predict_layers": 1}, "draft_not_supported"),
        ({"general.architecture": "rwkv7"}, "architecture_not_supported"),
        (
            {"qwen2.attention.key_length": 192, "qwen2.attention.value_length": 128},
            "architecture_not_supported",
        ),
        ({"qwen2.attention.head_count": (28, 20)}, "bad_gguf"),
        ({"qwen2.block_count": 0}, "bad_model_shape"),
    ],
)
def test_models_that_are_not_covered_are_refused_with_a_code(change: dict[str, Any], code: str) -> None:
    with pytest.raises(FleetfitError) as caught:
        from_gguf({**GGUF_METADATA, **change}, GGUF_TENSORS)
    assert caught.value.code == code


def test_plain_data_go_back_and_forth() -> None:
    shape = from_config_json(GEMMA_3_12B_TEXT)
    assert ModelShape.from_dict(shape.as_dict()) == shape


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"architecture": "llama", "layers": 2}, "hidden_size"),
        ({"architecture": "llama", "colour": 1}, "colour"),
    ],
)
def test_catalog_shapes_name_what_is_wrong(data: dict[str, Any], word: str) -> None:
    with pytest.raises(FleetfitError, match=word) as caught:
        ModelShape.from_dict(data)
    assert caught.value.code == "bad_model_shape"
