"""The lab's model in safetensors for vLLM: dequantized from the pinned GGUF, the same bytes each time.

vLLM and transformers read what a model hub has: config.json, tokenizer.json and weights under the names of
transformers' LlamaForCausalLM. All of it follows from the GGUF's own header and tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

# Part of the cache's key: raise it when the same GGUF would give other bytes.
FORMAT = 1
WEIGHTS = "model.safetensors"
# transformers' LlamaForCausalLM <- llama.cpp's names (gguf-py, tensor_mapping.py).
MODEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# A token that only the chat template writes (gguf-py, TokenType.CONTROL).
CONTROL_TOKEN = 3


def write_safetensors_model(source: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, tokenizer.json, tokenizer_config.json and the weights in BF16.

    ``source`` is a GGUF of architecture llama with tied embeddings and a byte-level BPE tokenizer of kind
    ``smollm``; raises FleetfitError ``model_not_supported`` for another.
    """
    from gguf import GGUFReader  # here: numpy takes longer to import than most commands run

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kind = tuple(fields.get(name) for name in ("general.architecture", "tokenizer.ggml.pre"))
    if kind != ("llama", "smollm") or "output.weight" in tensors:
        raise FleetfitError(
            f"{source.name} is not a llama with tied embeddings and a smollm tokenizer: {kind}.",
            code="model_not_supported",
            remedy="Use the lab's pinned model, or extend src/fleetfit/lab/safetensors.py.",
        )
    documents = {
        "config.json": model_config(fields),
        "generation_config.json": generation_config(fields),
        "tokenizer.json": tokenizer(fields),
        "tokenizer_config.json": tokenizer_config(fields),
    }
    for name, document in documents.items():
        (folder / name).write_text(
            json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    write_weights(folder / WEIGHTS, tensors, fields)


def model_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json: the GGUF's shape under transformers' names."""
    heads = fields["llama.attention.head_count"]
    # The GGUF has it in 32 bits: as the shortest decimal that is the same there.
    epsilon = float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": epsilon,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        **generation_config(fields),
    }


def generation_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation_config.json: the tokens that begin and end a turn."""
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def tokenizer(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer.json: byte-level BPE with every digit a token of its own, as llama.cpp's ``smollm``."""
    tokens = fields["tokenizer.ggml.tokens"]
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, kind in enumerate(fields["tokenizer.ggml.token_type"])
        if kind == CONTROL_TOKEN
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [pair.split(" ") for pair in fields["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json, with the GGUF's own chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        # Not GPT2Tokenizer: transformers would rebuild that one without the rule for digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "add_bos_token": fields["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": fields["tokenizer.ggml.add_space_prefix"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }


def transformers_names(tensors: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (transformers' name, llama.cpp's name) of every tensor; raises FleetfitError for an unknown one."""
    for name in tensors:
        stem = name.removesuffix(".weight")
        block, _, part = stem.removeprefix("blk.").partition(".")
        if stem in MODEL_TENSORS:
            yield f"{MODEL_TENSORS[stem]}.weight", name
        elif stem.startswith("blk.") and part in LAYER_TENSORS:
            yield f"model.layers.{block}.{LAYER_TENSORS[part]}.weight", name
        else:
            raise FleetfitError(
                f"It is not known what transformers calls the tensor {name}.",
                code="model_not_supported",
                remedy="Extend LAYER_TENSORS in src/fleetfit/lab/safetensors.py.",
            )


def write_weights(path: Path, tensors: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Write every tensor in BF16, sorted by name: a length, a JSON header, the data (safetensors' format)."""
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    names = sorted(transformers_names(tensors))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, source in names:
        # llama.cpp lists the fastest dimension first.
        shape = [int(size) for size in reversed(tensors[source].shape)]
        end = offset + 2 * int(tensors[source].n_elements)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (
        -len(text) % 8
    )  # the data begins at a multiple of eight, as the format's own writer has it
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, source in names:
            stream.write(bfloat16_rows(tensors[source], heads.get(source.split(".")[-2], 0)).tobytes())


def bfloat16_rows(tensor: Any, rotary_heads: int) -> Any:
    """Return a tensor's rows as the 16 bits of BF16, rounded to the nearest, ties to even.

    ``rotary_heads`` above 0 undoes the order in which llama.cpp keeps the rows of query and key: it pairs
    neighbouring rows for the rotation, transformers the halves of a head (convert_hf_to_gguf.py, permute).
    """
    import numpy
    from gguf.quants import dequantize

    rows = dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32, copy=False)
    if rotary_heads:
        count, width = rows.shape
        rows = rows.reshape(rotary_heads, count // rotary_heads // 2, 2, width)
        rows = rows.swapaxes(1, 2).reshape(count, width)
    bits = numpy.ascontiguousarray(rows).view(numpy.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
