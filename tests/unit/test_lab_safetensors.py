"""Promises of lab.safetensors: what vLLM reads is what the GGUF holds, under transformers' names."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.safetensors_header import read_safetensors
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from fleetfit.lab.safetensors import WEIGHTS, write_safetensors_model

HEADS, KV_HEADS, HIDDEN, WIDTH, VOCAB = 4, 2, 64, 96, 20
HEAD_DIM = HIDDEN // HEADS
TOKENS = ["<|end|>", "<|start|>", *[chr(ord("a") + number) for number in range(VOCAB - 3)], "ab"]


def permuted(rows: Any, heads: int) -> Any:
    """Return rows in llama.cpp's order, written out from its rule: row 2i is i, row 2i+1 is half a head further."""
    half = rows.shape[0] // heads // 2
    order = [
        head * 2 * half + part * half + index
        for head in range(heads)
        for index in range(half)
        for part in (0, 1)
    ]
    return rows[order]


def weights(seed: int = 1) -> dict[str, Any]:
    """Return one layer's weights as transformers has them."""
    random = numpy.random.default_rng(seed)
    shapes = {
        "model.embed_tokens": (VOCAB, HIDDEN),
        "model.norm": (HIDDEN,),
        "model.layers.0.input_layernorm": (HIDDEN,),
        "model.layers.0.post_attention_layernorm": (HIDDEN,),
        "model.layers.0.self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "model.layers.0.self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "model.layers.0.self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "model.layers.0.self_attn.o_proj": (HIDDEN, HIDDEN),
        "model.layers.0.mlp.gate_proj": (WIDTH, HIDDEN),
        "model.layers.0.mlp.up_proj": (WIDTH, HIDDEN),
        "model.layers.0.mlp.down_proj": (HIDDEN, WIDTH),
    }
    return {name: random.standard_normal(shape).astype(numpy.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, model: dict[str, Any], *, pre: str = "smollm") -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(VOCAB)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (VOCAB - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{{ messages }}")
    layer = "model.layers.0"
    q4 = GGMLQuantizationType.Q4_1
    for name, rows in {
        "blk.0.attn_q.weight": permuted(model[f"{layer}.self_attn.q_proj"], HEADS),
        "blk.0.attn_k.weight": permuted(model[f"{layer}.self_attn.k_proj"], KV_HEADS),
    }.items():
        writer.add_tensor(name, rows)
    writer.add_tensor("blk.0.ffn_down.weight", quantize(model[f"{layer}.mlp.down_proj"], q4), raw_dtype=q4)
    for name, source in {
        "token_embd.weight": "model.embed_tokens",
        "output_norm.weight": "model.norm",
        "blk.0.attn_norm.weight": f"{layer}.input_layernorm",
        "blk.0.ffn_norm.weight": f"{layer}.post_attention_layernorm",
        "blk.0.attn_v.weight": f"{layer}.self_attn.v_proj",
        "blk.0.attn_output.weight": f"{layer}.self_attn.o_proj",
        "blk.0.ffn_gate.weight": f"{layer}.mlp.gate_proj",
        "blk.0.ffn_up.weight": f"{layer}.mlp.up_proj",
    }.items():
        writer.add_tensor(name, model[source])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_bf16(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    found = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        bits = numpy.frombuffer(data[begin:end], "<u2").astype(numpy.uint32) << 16
        found[name] = bits.view(numpy.float32).reshape(entry["shape"])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_gguf(path / "model.gguf", weights())
    (path / "out").mkdir()
    write_safetensors_model(path / "model.gguf", path / "out")
    return path


def test_the_weights_are_the_ggufs_under_transformers_names_and_in_its_order(folder: Path) -> None:
    expected = weights()
    found = read_bf16(folder / "out" / WEIGHTS)
    assert set(found) == {f"{name}.weight" for name in expected}
    for name, rows in expected.items():
        got = found[f"{name}.weight"]
        assert got.shape == rows.shape
        # BF16 keeps eight bits; Q4_1 a sixteenth of a block's range.
        tolerance = {"atol": 0.5} if name.endswith("down_proj") else {"rtol": 2**-8}
        numpy.testing.assert_allclose(got, rows, **tolerance)


def test_values_are_rounded_to_the_nearest_and_ties_to_even(tmp_path: Path) -> None:
    model = weights()
    exact = numpy.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8)], numpy.float32)
    model["model.norm"][:5] = exact
    write_gguf(tmp_path / "model.gguf", model)
    write_safetensors_model(tmp_path / "model.gguf", tmp_path)
    rounded = read_bf16(tmp_path / WEIGHTS)["model.norm.weight"][:5]
    assert rounded.tolist() == [1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -1.0]


def test_a_second_run_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_safetensors_model(folder / "model.gguf", tmp_path)

    def sums(of: Path) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in of.iterdir()}

    assert sums(tmp_path) == sums(folder / "out")


def test_our_own_reader_and_the_formats_rules_accept_the_file(folder: Path) -> None:
    path = folder / "out" / WEIGHTS
    tensors = read_safetensors(path)
    assert {tensor.dtype for tensor in tensors} == {"BF16"}
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert length % 8 == 0
    assert path.stat().st_size == 8 + length + sum(tensor.size_bytes for tensor in tensors)


def test_the_configuration_is_the_models(folder: Path) -> None:
    config = json.loads((folder / "out/config.json").read_text())
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "head_dim": HEAD_DIM,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    assert {name: config[name] for name in wanted} == wanted
    tokens = json.loads((folder / "out/tokenizer.json").read_text())
    assert [(item["id"], item["content"]) for item in tokens["added_tokens"]] == [
        (0, "<|end|>"),
        (1, "<|start|>"),
    ]
    assert tokens["model"]["vocab"]["ab"] == VOCAB - 1
    assert tokens["model"]["merges"] == [["a", "b"]]
    about = json.loads((folder / "out/tokenizer_config.json").read_text())
    assert (about["bos_token"], about["eos_token"]) == ("<|start|>", "<|end|>")


def test_a_model_that_it_cannot_name_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", weights(), pre="llama-bpe")
    with pytest.raises(FleetfitError, match="llama-bpe"):
        write_safetensors_model(tmp_path / "model.gguf", tmp_path)
