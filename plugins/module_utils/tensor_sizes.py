"""Exact tensor bytes of a model in a quantization scheme: per block, with the output and the embeddings
apart.

Never parameters times bits per weight: a scheme mixes tensor types, keeps embeddings at another width, and
falls back where a row does not divide, so that Q4_K_M is 4.91 bits per weight on Qwen2.5-7B and 6.35 on
its 0.5B sibling.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from .errors import FleetfitError
from .gguf_reader import GgufHeader, read_gguf
from .model_shape import ModelShape
from .safetensors_header import read_directory

# Elements per block and bytes per block of ggml's types (ggml/src/ggml-common.h: the block_* structs).
GGML_TYPES: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "F64": (1, 8),
    "I8": (1, 1),
    "I16": (1, 2),
    "I32": (1, 4),
    "I64": (1, 8),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q8_1": (32, 36),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "Q8_K": (256, 292),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
}

# GGUF scheme -> the type most of its tensors have (llama_ftype_get_default_type).
GGUF_SCHEMES: Mapping[str, str] = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q5_1": "Q5_1",
    "Q5_0": "Q5_0",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q4_1": "Q4_1",
    "Q4_0": "Q4_0",
    "IQ4_XS": "IQ4_XS",
    "IQ4_NL": "IQ4_NL",
    "IQ3_M": "IQ3_S",
    "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
    "Q2_K": "Q2_K",
}
# Where a row does not divide by 256 (tensor_type_fallback). Builds up to early 2026 wrote IQ4_NL where
# newer ones write Q4_0: both hold 32 weights in 18 bytes, so the size is the same.
FALLBACK_TYPES: Mapping[str, str] = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
}
# Of queries, keys and values in one tensor (Phi-3 and Phi-4), in every layer alike.
FUSED_TYPES: Mapping[str, str] = {
    "IQ3_M": "Q4_K",
    "Q3_K_M": "Q4_K",
    "Q3_K_L": "Q4_K",
    "Q4_K_M": "Q5_K",
    "Q5_K_M": "Q6_K",
}
GGUF_ALIGNMENT_BYTES = 32

SAFETENSORS_SCHEMES = ("BF16", "FP16", "F32", "FP8", "GPTQ-Int4", "GPTQ-Int8", "AWQ")
GROUP_SIZE = 128  # the group size of the official GPTQ and AWQ releases, and Marlin's usual one

# Key-values of a GGUF file are nearly all vocabulary. Qwen2.5's (byte-pair encoding with merges) take 5.95
# MB for 151,936 tokens; SentencePiece vocabularies have no merges and take about 23 bytes a token (Llama
# 2: 0.73 MB for 32,000).
BPE_METADATA_BYTES_PER_TOKEN = 39.2
SPM_METADATA_BYTES_PER_TOKEN = 23.0
SPM_VOCABULARY_TOKENS = 33_000
# A safetensors header holds about 100 bytes of JSON per tensor.
SAFETENSORS_HEADER_BYTES_PER_TENSOR = 100


class Tensor(NamedTuple):
    """One tensor of a model: ``category`` follows llama.cpp's, ``cols`` is the length of a row (ne[0])."""

    name: str
    category: str
    cols: int
    rows: int
    layer: int


@dataclass(frozen=True)
class TensorLayout:
    """Where the bytes of a model file are.

    ``blocks`` are bytes per block with everything in it, ``block_experts`` the part of it that is expert
    tensors, ``block_largest`` its largest tensor. ``output`` is zero where the file ties it to
    ``token_embd`` (``tied``).
    """

    scheme: str
    format: str
    blocks: tuple[int, ...]
    block_experts: tuple[int, ...]
    block_largest: tuple[int, ...]
    token_embd: int
    output: int
    output_norm: int
    tied: bool
    file_bytes: int
    source: str

    @property
    def tensor_bytes(self) -> int:
        """Return the bytes of all tensors in the file, each once."""
        return sum(self.blocks) + self.token_embd + self.output + self.output_norm

    @property
    def output_head(self) -> int:
        """Return the bytes of the matrix that makes logits: the output, or the embeddings where tied."""
        return self.token_embd if self.tied else self.output


def row_bytes(type_name: str, cols: int) -> int:
    """Return the bytes of one row of ``cols`` elements; raises :class:`FleetfitError` for an unknown type."""
    try:
        elements, size = GGML_TYPES[type_name]
    except KeyError:
        raise FleetfitError(
            f"The tensor type {type_name!r} is not known.",
            code="unknown_tensor_type",
            remedy=f"Known types: {', '.join(sorted(GGML_TYPES))}.",
        ) from None
    return -(-cols // elements) * size


def model_tensors(shape: ModelShape) -> Iterator[Tensor]:
    """Yield every tensor that llama.cpp's converter writes for this shape (conversion of each
    architecture)."""
    h, q, kv = shape.hidden_size, shape.q_dim, shape.kv_dim
    yield Tensor("token_embd.weight", "token_embd", h, shape.vocab_size, -1)
    if not shape.tied_embeddings:
        yield Tensor("output.weight", "output", h, shape.vocab_size, -1)
    yield Tensor("output_norm.weight", "norm", h, 1, -1)
    if shape.rope_factors:
        if shape.fused_projections:
            yield Tensor("rope_factors_long.weight", "norm", shape.head_dim // 2, 1, -1)
            yield Tensor("rope_factors_short.weight", "norm", shape.head_dim // 2, 1, -1)
        else:
            yield Tensor("rope_freqs.weight", "norm", shape.head_dim // 2, 1, -1)
    for layer in range(shape.layers):
        for name, category, cols, rows in _block_tensors(shape, h, q, kv):
            yield Tensor(f"blk.{layer}.{name}", category, cols, rows, layer)


def parameter_count(shape: ModelShape) -> int:
    """Return the model's parameters; factors of the rotary embedding, which files may carry, are constants."""
    return sum(
        tensor.cols * tensor.rows for tensor in model_tensors(shape) if not tensor.name.startswith("rope_")
    )


def _block_tensors(shape: ModelShape, h: int, q: int, kv: int) -> Iterator[tuple[str, str, int, int]]:
    yield "attn_norm.weight", "norm", h, 1
    if shape.fused_projections:
        yield "attn_qkv.weight", "attn_qkv", h, q + 2 * kv
    else:
        yield "attn_q.weight", "attn_q", h, q
        yield "attn_k.weight", "attn_k", h, kv
        yield "attn_v.weight", "attn_v", h, kv
    if shape.attention_bias:
        yield "attn_q.bias", "norm", q, 1
        yield "attn_k.bias", "norm", kv, 1
        yield "attn_v.bias", "norm", kv, 1
    if shape.qk_norm:
        yield "attn_q_norm.weight", "norm", shape.head_dim, 1
        yield "attn_k_norm.weight", "norm", shape.head_dim, 1
    yield "attn_output.weight", "attn_output", q, h
    if shape.post_norms:
        yield "post_attention_norm.weight", "norm", h, 1
        yield "post_ffw_norm.weight", "norm", h, 1
    yield "ffn_norm.weight", "norm", h, 1
    if shape.experts:
        width, count = shape.expert_intermediate_size, shape.experts
        yield "ffn_gate_inp.weight", "norm", h, count  # the router stays F32
        yield "ffn_gate_exps.weight", "ffn_gate", h, width * count
        yield "ffn_up_exps.weight", "ffn_up", h, width * count
        yield "ffn_down_exps.weight", "ffn_down", width, h * count
        shared = shape.shared_expert_intermediate_size
        if shared:
            yield "ffn_gate_inp_shexp.weight", "norm", h, 1
            yield "ffn_gate_shexp.weight", "ffn_gate", h, shared
            yield "ffn_up_shexp.weight", "ffn_up", h, shared
            yield "ffn_down_shexp.weight", "ffn_down", shared, h
    elif shape.fused_projections:
        yield "ffn_up.weight", "ffn_up", h, 2 * shape.intermediate_size
        yield "ffn_down.weight", "ffn_down", shape.intermediate_size, h
    else:
        yield "ffn_gate.weight", "ffn_gate", h, shape.intermediate_size
        yield "ffn_up.weight", "ffn_up", h, shape.intermediate_size
        yield "ffn_down.weight", "ffn_down", shape.intermediate_size, h


def tensor_type(shape: ModelShape, scheme: str, tensor: Tensor) -> str:
    """Return the ggml type that ``llama-quantize`` gives this tensor (src/llama-quant.cpp, without an
    imatrix).

    Raises :class:`FleetfitError` (``unknown_scheme``).
    """
    base = _base_type(scheme)
    if tensor.category == "norm":
        return "F32"
    if base in ("F32", "F16", "BF16"):
        return base
    chosen = _mixture_type(shape, scheme, base, tensor)
    elements = GGML_TYPES[chosen][0]
    if tensor.cols % elements == 0:
        return chosen
    chosen = FALLBACK_TYPES.get(chosen, chosen)
    return chosen if tensor.cols % GGML_TYPES[chosen][0] == 0 else "F16"


def _base_type(scheme: str) -> str:
    try:
        return GGUF_SCHEMES[scheme]
    except KeyError:
        raise FleetfitError(
            f"The GGUF scheme {scheme!r} is not known.",
            code="unknown_scheme",
            remedy=f"Known schemes: {', '.join(GGUF_SCHEMES)}.",
        ) from None


def use_more_bits(layer: int, layers: int) -> bool:
    """Return whether the ``_M`` mixtures give this layer a wider type: the first and last eighth, and
    every third."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _mixture_type(shape: ModelShape, scheme: str, base: str, tensor: Tensor) -> str:
    category = tensor.category
    if category == "output" or (category == "token_embd" and shape.tied_embeddings):
        if tensor.cols % GGML_TYPES[base][0] or base == "Q8_0":
            return "Q8_0"
        return "Q6_K"
    if category == "attn_qkv":
        return FUSED_TYPES.get(scheme, base)
    if category == "attn_v":
        return _value_type(shape, scheme, base, tensor.layer)
    if category == "attn_k" and shape.experts == 8:
        return "Q8_0"
    if category == "ffn_down":
        return _down_type(shape, scheme, base, tensor.layer)
    if category == "attn_output":
        return _attention_output_type(shape, scheme, base)
    return base


def _value_type(shape: ModelShape, scheme: str, base: str, layer: int) -> str:
    grouped = shape.gqa >= 4
    chosen = base
    if scheme == "Q2_K":
        chosen = "Q4_K" if grouped else "Q3_K"
    elif scheme == "IQ3_M":
        chosen = "Q4_K"
    elif scheme == "Q3_K_M":
        chosen = "Q5_K" if layer < 2 else "Q4_K"
    elif scheme == "Q3_K_L" or (scheme in ("IQ4_XS", "IQ4_NL") and grouped):
        chosen = "Q5_K"
    elif scheme in ("Q4_K_M", "Q5_K_M") and use_more_bits(layer, shape.layers):
        chosen = "Q6_K"
    elif scheme == "Q4_K_S" and layer < 4:
        chosen = "Q5_K"
    # llama.cpp calls 80-layer models with grouped heads "70B" and lifts their small value matrices.
    if (
        shape.layers == 80
        and shape.gqa > 1
        and shape.architecture in ("llama", "qwen2")
        and chosen in ("Q3_K", "Q4_K")
    ):
        chosen = "Q5_K"
    return "Q8_0" if shape.experts == 8 else chosen


def _down_type(shape: ModelShape, scheme: str, base: str, layer: int) -> str:
    layers = shape.layers
    if scheme == "Q2_K":
        return "Q3_K"
    if scheme == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if scheme == "Q3_K_L":
        return "Q5_K"
    if scheme == "IQ3_M":
        lifted = layer < layers // 8 or (shape.experts == 8 and use_more_bits(layer, layers))
        return "Q4_K" if lifted else base
    if scheme in ("Q4_K_M", "Q5_K_M") and use_more_bits(layer, layers):
        return "Q6_K"
    if scheme in ("Q4_K_S", "IQ4_XS", "IQ4_NL") and layer < layers // 8:
        return "Q5_K"
    return base


def _attention_output_type(shape: ModelShape, scheme: str, base: str) -> str:
    if shape.experts == 8:
        lifted = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_M", "IQ4_XS")
        return "Q5_K" if scheme in lifted else base
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(scheme, base)


@lru_cache(maxsize=4096)
def layout_from_scheme(shape: ModelShape, scheme: str, file_format: Optional[str] = None) -> TensorLayout:
    """Return where the bytes are when ``shape`` is stored in ``scheme``.

    ``F32`` and ``BF16`` exist in both formats: they mean GGUF unless ``file_format`` is ``safetensors``.
    Raises :class:`FleetfitError` (``unknown_scheme``).
    """
    if file_format == "safetensors" or (scheme in SAFETENSORS_SCHEMES and scheme not in GGUF_SCHEMES):
        return safetensors_layout(shape, scheme)
    tensors = [
        (tensor, row_bytes(tensor_type(shape, scheme, tensor), tensor.cols) * tensor.rows)
        for tensor in model_tensors(shape)
    ]
    data_bytes = sum(_pad(size, GGUF_ALIGNMENT_BYTES) for _, size in tensors)
    return _layout(
        shape.layers,
        ((tensor.name, tensor.layer, size) for tensor, size in tensors),
        scheme=scheme,
        file_format="gguf",
        tied=shape.tied_embeddings,
        file_bytes=data_bytes + gguf_metadata_bytes(shape),
        source=f"mixture rules of {scheme} on the model's shape",
    )


def gguf_metadata_bytes(shape: ModelShape) -> int:
    """Return about how many bytes a GGUF header takes; nearly all of it is the vocabulary."""
    spm = shape.vocab_size <= SPM_VOCABULARY_TOKENS or shape.architecture.startswith("gemma")
    return int(shape.vocab_size * (SPM_METADATA_BYTES_PER_TOKEN if spm else BPE_METADATA_BYTES_PER_TOKEN))


@lru_cache(maxsize=4096)
def safetensors_layout(shape: ModelShape, scheme: str, group_size: int = GROUP_SIZE) -> TensorLayout:
    """Return the layout of a safetensors release: ``BF16``, ``FP16``, ``F32``, ``FP8``, ``GPTQ-Int4/8`` or
    ``AWQ``.

    Linear layers carry the quantized weights; embeddings, head, norms and biases stay at 2 bytes: that is
    why AWQ of a model with a 152k vocabulary is 37 % of FP16, not a quarter. Raises :class:`FleetfitError`
    (``unknown_scheme``).
    """
    if scheme not in SAFETENSORS_SCHEMES:
        raise FleetfitError(
            f"The safetensors scheme {scheme!r} is not known.",
            code="unknown_scheme",
            remedy=f"Known schemes: {', '.join(SAFETENSORS_SCHEMES)}.",
        )
    wide = 4 if scheme == "F32" else 2
    sizes: list[tuple[str, int, int]] = []
    for tensor in model_tensors(shape):
        if tensor.name.startswith("rope_"):
            continue  # computed by the engine, not stored
        linear = tensor.category not in ("norm", "token_embd", "output")
        if linear and scheme not in ("BF16", "FP16", "F32"):
            size = _linear_bytes(tensor, scheme, group_size, shape.experts)
        else:
            size = wide * tensor.cols * tensor.rows
        sizes.append((tensor.name, tensor.layer, size))
    header = SAFETENSORS_HEADER_BYTES_PER_TENSOR * len(sizes)
    return _layout(
        shape.layers,
        iter(sizes),
        scheme=scheme,
        file_format="safetensors",
        tied=shape.tied_embeddings,
        file_bytes=sum(size for _, _, size in sizes) + header,
        source=f"{scheme} arithmetic on the model's shape",
    )


def _linear_bytes(tensor: Tensor, scheme: str, group_size: int, experts: int) -> int:
    """Return the bytes of one quantized linear layer (or of all experts' in one).

    GPTQ: qweight, qzeros at the same width, FP16 scales per group, and an int32 group index per input; AWQ
    without the index; FP8: one byte a weight and an FP32 scale per output row.
    """
    weights = tensor.cols * tensor.rows
    if scheme == "FP8":
        return weights + 4 * tensor.rows
    bits = 8 if scheme.endswith("Int8") else 4
    groups = -(-tensor.cols // group_size) * tensor.rows
    size = weights * bits // 8 + groups * 2 + groups * bits // 8
    if scheme.startswith("GPTQ"):
        copies = experts if "_exps" in tensor.name else 1
        size += 4 * tensor.cols * copies
    return size


def layout_from_gguf(source: Union[str, Path, GgufHeader]) -> TensorLayout:
    """Return where the bytes of a GGUF model are, from its header (split files: any part).

    Raises :class:`FleetfitError` as :func:`gguf_reader.read_gguf` does, or ``bad_gguf`` where blocks are
    missing.
    """
    header = source if isinstance(source, GgufHeader) else read_gguf(source)
    origin = header.paths[0]
    names = header.tensor_names
    sizes = [
        (tensor.name, _block_number(_GGUF_BLOCK, tensor.name), tensor.size_bytes) for tensor in header.tensors
    ]
    if "token_embd.weight" not in names:
        raise FleetfitError(
            f"{origin} has no tensor token_embd.weight.",
            code="bad_gguf",
            remedy="Name a whole language model, not an adapter or a part of one.",
        )
    return _layout(
        _block_count(sizes, origin, "bad_gguf"),
        sizes,
        scheme=_scheme_of_gguf(header),
        file_format="gguf",
        tied="output.weight" not in names,
        file_bytes=header.file_bytes,
        source=f"tensor sizes in the header of {os.path.basename(origin)}",
    )


def check_header(shape: ModelShape, header: GgufHeader) -> None:
    """Raise :class:`FleetfitError` (``bad_gguf``) where a file's tensors are not those of the shape it declares.

    llama.cpp refuses such a file when it loads it (create_tensor); planning it would give numbers of no model.
    """
    origin = header.paths[0]
    blocks = {_block_number(_GGUF_BLOCK, name) for name in header.tensor_names} - {-1}
    if len(blocks) != shape.layers:
        raise _contradiction(origin, f"it declares {shape.layers} blocks and holds {len(blocks)}", "bad_gguf")
    wanted = {
        tensor.name: tensor.cols * tensor.rows
        for tensor in model_tensors(shape)
        # Their length depends on how much of a head is rotated.
        if not tensor.name.startswith("rope_")
    }
    for tensor in header.tensors:
        elements = 1
        for dimension in tensor.dimensions:
            elements *= dimension
        if wanted.get(tensor.name, elements) != elements:
            raise _contradiction(
                origin,
                f"{tensor.name} has {elements} elements where its own header says {wanted[tensor.name]}",
                "bad_gguf",
            )


def check_layers(shape: ModelShape, layout: TensorLayout, origin: str) -> None:
    """Raise :class:`FleetfitError` (``bad_safetensors``) where a directory's tensors are not all of the shape's
    layers."""
    if len(layout.blocks) != shape.layers:
        raise _contradiction(
            origin,
            f"its config.json has {shape.layers} layers and its tensors {len(layout.blocks)}",
            "bad_safetensors",
        )


def _contradiction(origin: str, what: str, code: str) -> FleetfitError:
    return FleetfitError(
        f"{origin} contradicts itself: {what}.",
        code=code,
        remedy="Fetch the whole model again from a source that you trust.",
    )


def layout_from_safetensors(directory: Union[str, Path], scheme: str) -> TensorLayout:
    """Return where the bytes of a model's directory are, from its safetensors headers.

    ``scheme`` names the quantization (:func:`scheme_of_config` reads it from config.json). Raises
    :class:`FleetfitError` as :func:`safetensors_header.read_directory` does.
    """
    renamed = {"embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    sizes = []
    for tensor in read_directory(directory):
        name = next((new for old, new in renamed.items() if tensor.name.endswith(old)), tensor.name)
        if ".experts." in name:
            name = f"{name}_exps."
        sizes.append((name, _block_number(_SAFETENSORS_BLOCK, tensor.name), tensor.size_bytes))
    names = {name for name, _, _ in sizes}
    return _layout(
        _block_count(sizes, str(directory), "bad_safetensors"),
        sizes,
        scheme=scheme,
        file_format="safetensors",
        tied="output.weight" not in names,
        file_bytes=sum(path.stat().st_size for path in Path(directory).glob("*.safetensors")),
        source="tensor sizes in the safetensors headers",
    )


def scheme_of_config(config: Mapping[str, Any]) -> str:
    """Return the safetensors scheme that a ``config.json`` declares: ``BF16``, ``FP16``, ``GPTQ-Int4``,
    ``AWQ`` …

    Raises :class:`FleetfitError` (``unknown_scheme``).
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        dtype = str(config.get("torch_dtype", config.get("dtype", "bfloat16")))
        known = {"bfloat16": "BF16", "float16": "FP16", "float32": "F32"}
        if dtype in known:
            return known[dtype]
        raise _unknown_safetensors_scheme(dtype)
    if isinstance(quantization, Mapping):
        method, bits = quantization.get("quant_method"), quantization.get("bits")
        if method == "gptq" and bits in (4, 8):
            return f"GPTQ-Int{bits}"
        if method == "awq" and bits == 4:
            return "AWQ"
        if method == "fp8" or (method == "compressed-tensors" and _is_compressed_fp8(quantization)):
            return "FP8"
    raise _unknown_safetensors_scheme(str(quantization))


def _is_compressed_fp8(quantization: Mapping[str, Any]) -> bool:
    """Return whether llm-compressor's groups all hold 8-bit floating-point weights."""
    groups = quantization.get("config_groups")
    found = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [group.get("weights") for group in found if isinstance(group, Mapping)]
    return bool(weights) and all(
        isinstance(item, Mapping) and (item.get("num_bits"), item.get("type")) == (8, "float")
        for item in weights
    )


_GGUF_BLOCK = re.compile(r"^blk\.(\d{1,4})\.")
_SAFETENSORS_BLOCK = re.compile(r"(?:^|\.)layers\.(\d{1,4})\.")
# general.file_type -> scheme (llama_ftype in include/llama.h).
_FILE_TYPES: Mapping[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    25: "IQ4_NL",
    27: "IQ3_M",
    30: "IQ4_XS",
    32: "BF16",
}


def _scheme_of_gguf(header: GgufHeader) -> str:
    """Return the scheme that the file declares, else the type that holds most of its bytes."""
    declared = header.metadata.get("general.file_type")
    if isinstance(declared, int) and declared in _FILE_TYPES:
        return _FILE_TYPES[declared]
    by_type: dict[str, int] = {}
    for tensor in header.tensors:
        by_type[tensor.type_name] = by_type.get(tensor.type_name, 0) + tensor.size_bytes
    return max(by_type, key=lambda name: (by_type[name], name))


def _block_number(pattern: re.Pattern[str], name: str) -> int:
    match = pattern.search(name)
    return -1 if match is None else int(match[1])


def _block_count(sizes: Sequence[tuple[str, int, int]], origin: str, code: str) -> int:
    """Return the number of blocks; refuse a model in which one is missing."""
    blocks = {layer for _, layer, _ in sizes if layer >= 0}
    if not blocks or blocks != set(range(len(blocks))):
        raise FleetfitError(
            f"{origin} does not hold every block of a model.",
            code=code,
            remedy="Put all parts of the model into one directory, or fetch it again.",
        )
    return len(blocks)


def _unknown_safetensors_scheme(what: str) -> FleetfitError:
    return FleetfitError(
        f"The quantization {what!r} is not known.",
        code="unknown_scheme",
        remedy=f"Known safetensors schemes: {', '.join(SAFETENSORS_SCHEMES)}.",
    )


def _layout(
    layers: int,
    tensors: Iterable[tuple[str, int, int]],
    *,
    scheme: str,
    file_format: str,
    tied: bool,
    file_bytes: int,
    source: str,
) -> TensorLayout:
    blocks = [0] * layers
    experts = [0] * layers
    largest = [0] * layers
    token_embd = output = other = 0
    for name, layer, size in tensors:
        if layer >= 0:
            blocks[layer] += size
            largest[layer] = max(largest[layer], size)
            if "_exps." in name:
                experts[layer] += size
        elif name == "token_embd.weight":
            token_embd += size
        elif name == "output.weight":
            output += size
        else:
            other += size
    return TensorLayout(
        scheme=scheme,
        format=file_format,
        blocks=tuple(blocks),
        block_experts=tuple(experts),
        block_largest=tuple(largest),
        token_embd=token_embd,
        output=output,
        output_norm=other,
        tied=tied,
        file_bytes=file_bytes,
        source=source,
    )


def _pad(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
