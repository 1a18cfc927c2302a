"""File sizes against published ones, and the mixture rules behind them."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import ModelShape
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import (
    GGML_TYPES,
    GGUF_SCHEMES,
    SAFETENSORS_SCHEMES,
    Tensor,
    layout_from_safetensors,
    layout_from_scheme,
    model_tensors,
    row_bytes,
    safetensors_layout,
    scheme_of_config,
    tensor_type,
)

from benchmarks.sizing import files

QWEN2_5 = {
    "0.5B": ModelShape("qwen2", 24, 896, 14, 2, 64, 4864, 151936, True, 32768, attention_bias=True),
    "1.5B": ModelShape("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, True, 32768, attention_bias=True),
    "3B": ModelShape("qwen2", 36, 2048, 16, 2, 128, 11008, 151936, True, 32768, attention_bias=True),
    "7B": ModelShape("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, False, 32768, attention_bias=True),
    "14B": ModelShape("qwen2", 48, 5120, 40, 8, 128, 13824, 152064, False, 32768, attention_bias=True),
    "32B": ModelShape("qwen2", 64, 5120, 40, 8, 128, 27648, 152064, False, 32768, attention_bias=True),
    "72B": ModelShape("qwen2", 80, 8192, 64, 8, 128, 29568, 152064, False, 32768, attention_bias=True),
}
PARAMETERS = {
    "0.5B": 494_032_768,
    "1.5B": 1_543_714_304,
    "3B": 3_085_938_688,
    "7B": 7_615_616_512,
    "14B": 14_770_033_664,
    "32B": 32_763_876_352,
    "72B": 72_706_203_648,
}


@pytest.mark.parametrize("size", files.gguf_sizes(), ids=lambda size: f"{size.model}-{size.scheme}")
def test_gguf_sizes_match_published_files(size: files.FileSize) -> None:
    """Within the last digit that a model card prints, or 0.5 %."""
    assert size.ok, size


@pytest.mark.parametrize("size", files.safetensors_sizes(), ids=lambda size: f"{size.model}-{size.scheme}")
def test_gptq_and_awq_sizes_match_published_files(size: files.FileSize) -> None:
    assert size.ok, size
    assert abs(size.share) <= 0.003


@pytest.mark.parametrize("size", QWEN2_5)
def test_parameters_are_those_of_the_model_card(size: str) -> None:
    count = sum(tensor.cols * tensor.rows for tensor in model_tensors(QWEN2_5[size]))
    assert count == PARAMETERS[size]


def test_gpu_resident_weights_of_7b_q4_k_m_are_those_llama_cpp_logs() -> None:
    """4.07 GiB on the card: token_embd stays in RAM."""
    layout = layout_from_scheme(QWEN2_5["7B"], "Q4_K_M")
    resident = layout.tensor_bytes - layout.token_embd
    assert resident / 2**30 == pytest.approx(4.07, abs=0.005)


def test_vllm_weights_of_7b_are_those_it_logs() -> None:
    """vLLM logs 5.2032 GiB for GPTQ-Int4 and 14.19 GiB for BF16."""
    assert safetensors_layout(QWEN2_5["7B"], "GPTQ-Int4").tensor_bytes / 2**30 == pytest.approx(
        5.20, abs=0.015
    )
    assert safetensors_layout(QWEN2_5["7B"], "BF16").tensor_bytes / 2**30 == pytest.approx(14.19, abs=0.005)


def test_rows_that_do_not_divide_fall_back_to_wider_types() -> None:
    """0.5B has h = 896: Q4_K becomes Q5_0, Q6_K becomes Q8_0."""
    shape = QWEN2_5["0.5B"]
    assert tensor_type(shape, "Q4_K_M", Tensor("x", "attn_q", 896, 896, 3)) == "Q5_0"
    assert tensor_type(shape, "Q6_K", Tensor("x", "attn_q", 896, 896, 3)) == "Q8_0"
    assert tensor_type(shape, "Q2_K", Tensor("x", "attn_q", 896, 896, 3)) == "Q4_0"
    assert tensor_type(shape, "Q8_0", Tensor("x", "attn_q", 900, 896, 3)) == "F16"


def test_eighty_grouped_layers_get_wider_value_matrices() -> None:
    value = Tensor("x", "attn_v", 8192, 1024, 30)
    assert tensor_type(QWEN2_5["72B"], "Q4_K_S", value) == "Q5_K"
    assert tensor_type(QWEN2_5["32B"], "Q4_K_S", value) == "Q4_K"


def test_eight_experts_keep_keys_and_values_at_eight_bits() -> None:
    mixtral = ModelShape(
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
    )
    assert tensor_type(mixtral, "Q4_K_M", Tensor("x", "attn_k", 4096, 1024, 5)) == "Q8_0"
    assert tensor_type(mixtral, "Q4_K_M", Tensor("x", "attn_v", 4096, 1024, 5)) == "Q8_0"
    assert tensor_type(mixtral, "Q4_K_M", Tensor("x", "attn_output", 4096, 4096, 5)) == "Q5_K"
    layout = layout_from_scheme(mixtral, "Q4_K_M")
    assert 0.9 < sum(layout.block_experts) / sum(layout.blocks) < 1.0


def test_tied_models_have_no_output_matrix_but_a_head() -> None:
    layout = layout_from_scheme(QWEN2_5["3B"], "Q4_K_M")
    assert layout.tied
    assert layout.output == 0
    assert layout.output_head == layout.token_embd == 151936 * row_bytes("Q6_K", 2048)


@pytest.mark.parametrize("scheme", GGUF_SCHEMES)
def test_every_scheme_adds_up(scheme: str) -> None:
    layout = layout_from_scheme(QWEN2_5["7B"], scheme)
    assert layout.format == "gguf"
    assert len(layout.blocks) == 28
    # The rest of the file is its header: the vocabulary.
    assert 5_000_000 < layout.file_bytes - layout.tensor_bytes < 7_000_000
    assert all(
        0 < largest < block for largest, block in zip(layout.block_largest, layout.blocks, strict=True)
    )


def test_wider_schemes_are_larger() -> None:
    ladder = ["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16", "F32"]
    for shape in QWEN2_5.values():
        sizes = [layout_from_scheme(shape, scheme).file_bytes for scheme in ladder]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize("scheme", ["Q4_K_XXL", "", "AWQ2"])
def test_an_unknown_scheme_is_refused_with_the_known_ones(scheme: str) -> None:
    with pytest.raises(FleetfitError, match="Q4_K_M") as caught:
        layout_from_scheme(QWEN2_5["7B"], scheme)
    assert caught.value.code == "unknown_scheme"


def test_an_unknown_tensor_type_is_refused() -> None:
    with pytest.raises(FleetfitError) as caught:
        row_bytes("Q9_Z", 256)
    assert caught.value.code == "unknown_tensor_type"


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    for name, sizes in gguf.GGML_QUANT_SIZES.items():
        if name.name in GGML_TYPES and name.name != "Q8_1":
            assert GGML_TYPES[name.name] == sizes, name


def _write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> None:
    header, offset = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * offset)


def test_a_directory_of_safetensors_is_read_by_its_headers(tmp_path: Path) -> None:
    block = "model.layers.{}.self_attn.q_proj.weight"
    first = {block.format(0): ("BF16", [4, 4], 32), "model.embed_tokens.weight": ("BF16", [8, 4], 64)}
    second = {block.format(1): ("BF16", [4, 4], 32), "model.norm.weight": ("BF16", [4], 8)}
    second["lm_head.weight"] = ("BF16", [8, 4], 64)
    _write_safetensors(tmp_path / "model-00001-of-00002.safetensors", first)
    _write_safetensors(tmp_path / "model-00002-of-00002.safetensors", second)
    layout = layout_from_safetensors(tmp_path, "BF16")
    assert layout.blocks == (32, 32)
    assert (layout.token_embd, layout.output, layout.output_norm, layout.tied) == (64, 64, 8, False)


def test_a_directory_with_a_missing_block_is_refused(tmp_path: Path) -> None:
    _write_safetensors(tmp_path / "model.safetensors", {"model.layers.1.w": ("BF16", [4], 8)})
    with pytest.raises(FleetfitError) as caught:
        layout_from_safetensors(tmp_path, "BF16")
    assert caught.value.code == "bad_safetensors"


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({"torch_dtype": "bfloat16"}, "BF16"),
        ({"dtype": "float16"}, "FP16"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ-Int4"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "GPTQ-Int8"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ"),
        ({"quantization_config": {"quant_method": "fp8"}}, "FP8"),
    ],
)
def test_the_scheme_is_read_from_config_json(config: dict[str, object], scheme: str) -> None:
    assert scheme_of_config(config) == scheme
    assert scheme in SAFETENSORS_SCHEMES


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(FleetfitError) as caught:
        scheme_of_config({"quantization_config": {"quant_method": "hqq"}})
    assert caught.value.code == "unknown_scheme"
