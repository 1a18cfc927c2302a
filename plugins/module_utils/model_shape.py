"""The shape of a transformer: the few numbers from which its memory and its speed follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Optional

from .errors import FleetfitError

# model_type of a config.json -> the name llama.cpp gives the architecture (general.architecture).
ARCHITECTURE_OF_MODEL_TYPE = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
# Architectures whose arithmetic was compared with llama.cpp's own accounting (tests/integration).
SUPPORTED_ARCHITECTURES = frozenset(ARCHITECTURE_OF_MODEL_TYPE.values())

# Layers per global-attention layer; llama.cpp fixes them per architecture (src/models/gemma2.cpp,
# gemma3.cpp).
GLOBAL_EVERY = {"gemma2": 2, "gemma3": 6}
# A window larger than this is a mistake in the file, not a model.
MAX_LAYERS = 4096
MAX_DIMENSION = 1 << 32

_DRAFT_ARCHITECTURES = frozenset({"eagle3", "dflash", "gemma4-assistant"})
_PROJECTOR_PREFIXES = ("clip", "mmproj")


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer; lengths in tokens, widths in elements.

    ``sliding_window`` is zero where every layer attends to everything; otherwise every ``global_every``-th
    layer is global and the others keep ``sliding_window`` tokens. ``experts`` is zero for a dense model.
    """

    architecture: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool
    native_context_tokens: int
    sliding_window: int = 0
    global_every: int = 0
    experts: int = 0
    experts_used: int = 0
    expert_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    attention_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    fused_projections: bool = False
    rope_factors: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that no model has."""
        for name in (
            "layers",
            "hidden_size",
            "heads",
            "kv_heads",
            "head_dim",
            "vocab_size",
            "native_context_tokens",
        ):
            _check_range(self.architecture, name, getattr(self, name), 1)
        for name in (
            "intermediate_size",
            "sliding_window",
            "global_every",
            "experts",
            "experts_used",
            "expert_intermediate_size",
            "shared_expert_intermediate_size",
        ):
            _check_range(self.architecture, name, getattr(self, name), 0)
        if self.layers > MAX_LAYERS:
            raise _bad_shape(self.architecture, "layers", self.layers, f"at most {MAX_LAYERS}")
        if self.heads % self.kv_heads:
            raise _bad_shape(
                self.architecture, "kv_heads", self.kv_heads, f"a divisor of heads ({self.heads})"
            )
        if self.experts and not (0 < self.experts_used <= self.experts and self.expert_intermediate_size):
            raise _bad_shape(
                self.architecture,
                "experts_used",
                self.experts_used,
                "between 1 and experts, with expert_intermediate_size",
            )
        if not self.experts and not self.intermediate_size:
            raise _bad_shape(self.architecture, "intermediate_size", 0, "at least 1 in a dense model")
        if self.sliding_window and self.global_every < 1:
            raise _bad_shape(
                self.architecture, "global_every", self.global_every, "at least 1 where sliding_window is set"
            )

    @property
    def gqa(self) -> int:
        """Return query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def q_dim(self) -> int:
        """Return the width of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Return the width of the key (and of the value) projection."""
        return self.kv_heads * self.head_dim

    def is_sliding(self, layer: int) -> bool:
        """Return whether this layer keeps only ``sliding_window`` tokens (llama.cpp's set_swa_pattern)."""
        if not self.sliding_window:
            return False
        return layer % self.global_every < self.global_every - 1

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelShape:
        """Return the shape from a catalog entry's mapping.

        Raises :class:`FleetfitError` (code ``bad_model_shape``) naming fields that miss or are unknown.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise FleetfitError(
                f"A model shape has the unknown field {unknown[0]!r}.",
                code="bad_model_shape",
                remedy=f"Known fields: {', '.join(sorted(known))}.",
            )
        try:
            return cls(**data)
        except TypeError:
            needed = [name for name in _REQUIRED if name not in data]
            raise FleetfitError(
                f"A model shape lacks {', '.join(needed)}.",
                code="bad_model_shape",
                remedy="Fill it from the model's config.json.",
            ) from None


_REQUIRED = (
    "architecture",
    "layers",
    "hidden_size",
    "heads",
    "kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tied_embeddings",
    "native_context_tokens",
)


def from_config_json(config: Mapping[str, Any], *, origin: str = "config.json") -> ModelShape:
    """Return the shape that a Hugging Face ``config.json`` describes.

    Raises :class:`FleetfitError`: ``config_field_missing`` names the field, ``architecture_not_supported``
    the architecture, ``multimodal_not_supported`` a model with a vision part.
    """
    if not isinstance(config, Mapping):
        raise FleetfitError(
            f"{origin} is not a JSON object.",
            code="bad_config_json",
            remedy="Give the model's own config.json.",
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise _missing("model_type", origin)
    if "vision_config" in config or "audio_config" in config:
        raise FleetfitError(
            f"{origin} describes a multimodal model ({model_type}); projectors are not covered.",
            code="multimodal_not_supported",
            remedy="Choose the text-only variant of the model.",
        )
    if model_type not in ARCHITECTURE_OF_MODEL_TYPE:
        raise FleetfitError(
            f"{origin} names the architecture {model_type!r}, which was never compared with an engine.",
            code="architecture_not_supported",
            remedy=f"Supported: {', '.join(sorted(ARCHITECTURE_OF_MODEL_TYPE))}.",
        )
    architecture = ARCHITECTURE_OF_MODEL_TYPE[model_type]

    def number(name: str, default: Optional[int] = None) -> int:
        value = config.get(name, default)
        if value is None:
            if default is not None:
                return default
            raise _missing(name, origin)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FleetfitError(
                f"{name} in {origin} is {value!r}, not a whole number.",
                code="bad_config_json",
                remedy="Fetch the file again; it may be damaged.",
            )
        # Refused here under the name that the file has for it.
        _check_range(architecture, name, value, 0 if default == 0 else 1)
        return value

    heads = number("num_attention_heads")
    hidden_size = number("hidden_size")
    experts = number("num_local_experts", 0) or number("num_experts", 0)
    window, global_every = _window_of_config(architecture, config, number)
    rope_scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = (
        rope_scaling.get("rope_type", rope_scaling.get("type")) if isinstance(rope_scaling, Mapping) else None
    )
    return ModelShape(
        architecture=architecture,
        layers=number("num_hidden_layers"),
        hidden_size=hidden_size,
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", 256 if architecture.startswith("gemma") else hidden_size // heads),
        intermediate_size=0 if experts else number("intermediate_size"),
        vocab_size=number("vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", architecture.startswith("gemma"))),
        native_context_tokens=number("max_position_embeddings"),
        sliding_window=window,
        global_every=global_every,
        experts=experts,
        experts_used=number("num_experts_per_tok") if experts else 0,
        expert_intermediate_size=(
            number("moe_intermediate_size", number("intermediate_size", 0)) if experts else 0
        ),
        shared_expert_intermediate_size=number("shared_expert_intermediate_size", 0),
        attention_bias=architecture in ("qwen2", "qwen2moe") or bool(config.get("attention_bias", False)),
        qk_norm=architecture in ("qwen3", "qwen3moe", "gemma3"),
        post_norms=architecture in ("gemma2", "gemma3"),
        fused_projections=architecture == "phi3",
        rope_factors=rope_type in ("llama3", "longrope"),
    )


def _window_of_config(architecture: str, config: Mapping[str, Any], number: Any) -> tuple[int, int]:
    """Return (sliding window, layers per global layer) as llama.cpp treats the architecture.

    llama.cpp honours windows in Gemma 2 and 3 only; Mistral 7B v0.1's, Qwen2's (``use_sliding_window``
    false) and Phi-3's are read and left unused, so those models keep every token in every layer.
    """
    if architecture not in GLOBAL_EVERY:
        return 0, 0
    return number("sliding_window", 4096), number("sliding_window_pattern", GLOBAL_EVERY[architecture])


def from_gguf(
    metadata: Mapping[str, Any], tensor_names: frozenset[str], *, origin: str = "the GGUF file"
) -> ModelShape:
    """Return the shape that a GGUF header describes.

    ``metadata`` maps keys to scalar values (arrays may be given as their length under ``<key>.length``),
    ``tensor_names`` tells what optional tensors exist. Raises :class:`FleetfitError` naming the key that
    misses.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise _missing("general.architecture", origin)
    if architecture.startswith(_PROJECTOR_PREFIXES) or metadata.get("general.type") == "mmproj":
        raise FleetfitError(
            f"{origin} is a multimodal projector, not a language model.",
            code="multimodal_not_supported",
            remedy="Name the language model's own GGUF file.",
        )
    if architecture in _DRAFT_ARCHITECTURES or metadata.get(f"{architecture}.nextn_predict_layers"):
        raise FleetfitError(
            f"{origin} is or carries a draft model ({architecture}), which the memory model does not cover.",
            code="draft_not_supported",
            remedy="Choose a file without draft (MTP) layers.",
        )
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise FleetfitError(
            f"{origin} has the architecture {architecture!r}, which was never compared with an engine.",
            code="architecture_not_supported",
            remedy=f"Supported: {', '.join(sorted(SUPPORTED_ARCHITECTURES))}.",
        )

    def number(suffix: str, default: Optional[int] = None) -> int:
        key = f"{architecture}.{suffix}"
        value = metadata.get(key, default)
        if value is None:
            raise _missing(key, origin)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FleetfitError(
                f"{key} in {origin} is {value!r}, not a whole number.",
                code="bad_gguf",
                remedy="Models whose layers differ in shape are not supported; else fetch the file again.",
            )
        return value

    heads = number("attention.head_count")
    hidden_size = number("embedding_length")
    if heads <= 0:
        raise _bad_shape(architecture, "attention.head_count", heads, "at least 1")
    # The list of tokens decides where there is one; the key counts only without a tokenizer (llama_vocab::load).
    vocab_size = metadata.get("tokenizer.ggml.tokens.length", metadata.get(f"{architecture}.vocab_size"))
    if not isinstance(vocab_size, int):
        raise _missing(f"{architecture}.vocab_size", origin)
    head_dim = number("attention.key_length", hidden_size // heads)
    if number("attention.value_length", head_dim) != head_dim:
        raise FleetfitError(
            f"{origin} has keys and values of different width, which the memory model does not cover.",
            code="architecture_not_supported",
            remedy="Choose a model with plain (grouped-query) attention.",
        )
    experts = number("expert_count", 0)
    windowed = architecture in GLOBAL_EVERY
    return ModelShape(
        architecture=architecture,
        layers=number("block_count"),
        hidden_size=hidden_size,
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=0 if experts else number("feed_forward_length"),
        vocab_size=vocab_size,
        tied_embeddings="output.weight" not in tensor_names,
        native_context_tokens=number("context_length"),
        sliding_window=number("attention.sliding_window", 4096 if architecture == "gemma2" else 0)
        if windowed
        else 0,
        global_every=GLOBAL_EVERY.get(architecture, 0),
        experts=experts,
        experts_used=number("expert_used_count") if experts else 0,
        expert_intermediate_size=(
            number("expert_feed_forward_length", number("feed_forward_length", 0)) if experts else 0
        ),
        shared_expert_intermediate_size=number("expert_shared_feed_forward_length", 0),
        attention_bias="blk.0.attn_q.bias" in tensor_names or "blk.0.attn_qkv.bias" in tensor_names,
        qk_norm="blk.0.attn_q_norm.weight" in tensor_names,
        post_norms="blk.0.post_attention_norm.weight" in tensor_names,
        fused_projections="blk.0.attn_qkv.weight" in tensor_names,
        rope_factors=bool({"rope_freqs.weight", "rope_factors_long.weight"} & tensor_names),
    )


def _check_range(architecture: str, name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= MAX_DIMENSION:
        raise _bad_shape(architecture, name, value, f"a whole number from {minimum} to {MAX_DIMENSION}")


def _bad_shape(architecture: str, name: str, value: Any, wanted: str) -> FleetfitError:
    return FleetfitError(
        f"{name} of a {architecture!r} model is {value!r}; it must be {wanted}.",
        code="bad_model_shape",
        remedy="Compare it with the model's config.json.",
    )


def _missing(name: str, origin: str) -> FleetfitError:
    return FleetfitError(
        f"{origin} has no field {name!r}, which the memory model needs.",
        code="config_field_missing",
        remedy="Fetch the file again from the model's repository, or name one that is complete.",
    )
