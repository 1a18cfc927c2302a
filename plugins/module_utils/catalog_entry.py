"""A catalog entry: one model, its shape and licence, and the variants (quantizations) that it comes in."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Optional

from .errors import FleetfitError
from .model_files import check_names
from .model_shape import ModelShape

SCHEMA_VERSION = 1

# Best first. Groups: Llama-3-8B divergences in llama.cpp's perplexity README; where AWQ and GPTQ stand
# among the GGUF types has no published source and is assumed. "rest" is ordered per model by
# ``low_quality_order``.
QUALITY_TIERS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "rest")
TIER_OF_SCHEME = {
    "F32": "Q8_0",
    "F16": "Q8_0",
    "BF16": "Q8_0",
    "FP16": "Q8_0",
    "FP8": "Q8_0",
    "Q8_0": "Q8_0",
    "GPTQ-Int8": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K_M",
    "Q4_K_M": "Q4_K_M",
    "AWQ": "Q4_K_M",
    "GPTQ-Int4": "Q4_K_M",
}
FORMATS = ("gguf", "safetensors")
ENGINES = ("llama_cpp", "vllm")


@dataclass(frozen=True)
class ModelFile:
    """One file of a variant; ``size`` in bytes. Either both size and sha256 are known, or the file is
    unpinned."""

    name: str
    size: Optional[int] = None
    sha256: Optional[str] = None

    @property
    def pinned(self) -> bool:
        """Return whether a download of this file can be verified."""
        return self.size is not None and self.sha256 is not None

    def as_dict(self) -> dict[str, Any]:
        """Return the plan's form of the file."""
        return {"name": self.name, "size": self.size, "sha256": self.sha256}


@dataclass(frozen=True)
class Variant:
    """One quantization of a model: what a host downloads and an engine loads.

    ``stored_output``: the files also hold the output matrix of a model that ties it to the embeddings; engines
    leave it out, so it counts on disk and not in memory.
    """

    name: str
    format: str
    engines: tuple[str, ...]
    scheme: str
    quality_tier: str
    repository: Optional[str] = None
    revision: Optional[str] = None
    files: tuple[ModelFile, ...] = ()
    files_match: tuple[str, ...] = ()
    quality_source: str = ""
    label: str = ""
    shape_overrides: tuple[tuple[str, Any], ...] = ()
    waivers: tuple[str, ...] = ()
    stored_output: bool = False

    @property
    def pinned(self) -> bool:
        """Return whether every file has a size and a checksum; what is not pinned is never deployed."""
        return bool(self.files) and all(item.pinned for item in self.files)

    @property
    def tier_rank(self) -> int:
        """Return the position of the quality tier; 0 is best."""
        return QUALITY_TIERS.index(self.quality_tier)

    @property
    def model_file(self) -> Optional[str]:
        """Return the file an engine is pointed at: the only GGUF, or the first part of a split one."""
        names = sorted(item.name for item in self.files if item.name.endswith(".gguf"))
        return names[0] if names else None

    def matches(self, file_name: str) -> bool:
        """Return whether a repository's file belongs to this variant (``files_match``, shell patterns)."""
        return any(fnmatch.fnmatchcase(file_name, pattern) for pattern in self.files_match)


@dataclass(frozen=True)
class CatalogEntry:
    """One model as the planner knows it; ``origin`` is the file it came from, for errors."""

    id: str
    name: str
    family: str
    shape: ModelShape
    variants: tuple[Variant, ...]
    licence: str = "unknown"
    licence_needs_acceptance: bool = True
    licence_url: Optional[str] = None
    parameters: int = 0
    extended_context_tokens: int = 0
    rope_scaling: Optional[str] = None
    rope_theta: Optional[float] = None
    kv_keys: tuple[str, ...] = ("f16",)
    kv_values: tuple[str, ...] = ("f16",)
    kv_source: str = ""
    chat_template: Optional[str] = None
    tool_call_parser: Optional[str] = None
    low_quality_order: tuple[str, ...] = ()
    origin: str = ""
    digest: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def native_context_tokens(self) -> int:
        """Return the context the model was trained for, in tokens."""
        return self.shape.native_context_tokens

    @property
    def max_context_tokens(self) -> int:
        """Return the longest context the model supports, with context extension where it is documented."""
        return max(self.shape.native_context_tokens, self.extended_context_tokens)

    def variant(self, name: str) -> Variant:
        """Return the variant of that name; raises ``unknown_variant`` naming those that exist."""
        for item in self.variants:
            if item.name == name:
                return item
        raise FleetfitError(
            f"{self.id} has no variant {name!r} ({self.origin}).",
            code="unknown_variant",
            remedy=f"It has: {', '.join(item.name for item in self.variants)}.",
        )

    def shape_of(self, variant: Variant) -> ModelShape:
        """Return the shape with what differs in this variant (padded layers of some GPTQ and AWQ
        repositories)."""
        return replace(self.shape, **dict(variant.shape_overrides)) if variant.shape_overrides else self.shape

    def low_quality_rank(self, variant: Variant) -> int:
        """Return the position within the tier ``rest``; in the other tiers all variants are equal (0)."""
        if variant.quality_tier != "rest":
            return 0
        if variant.scheme in self.low_quality_order:
            return self.low_quality_order.index(variant.scheme)
        return len(self.low_quality_order)


def canonical_json(data: Any) -> str:
    """Return the one JSON text of ``data``: sorted keys, no spaces, ASCII; equal data gives equal bytes."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(data: Any) -> str:
    """Return the sha256 (hex) over the canonical JSON of ``data``."""
    return hashlib.sha256(canonical_json(data).encode("ascii")).hexdigest()


def tier_of_scheme(scheme: str) -> str:
    """Return the quality tier of a scheme's name; unknown ones rank with the rest."""
    return TIER_OF_SCHEME.get(scheme, "rest")


def entry_from_dict(data: Mapping[str, Any], *, origin: str) -> CatalogEntry:
    """Return the entry that one catalog file (merged with its overlays and pins) describes.

    Raises :class:`FleetfitError` with the file's name: ``catalog_schema_version`` for an unknown version,
    ``bad_catalog_entry`` for data that contradicts itself.
    """
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise FleetfitError(
            f"{origin} has schema_version {version!r}; this fleetfit reads version {SCHEMA_VERSION}.",
            code="catalog_schema_version",
            remedy="Use the catalog that belongs to this version, or update fleetfit.",
        )
    try:
        shape = ModelShape.from_dict(data["shape"])
        licence = data.get("licence", {})
        kv_types = data.get("kv_types", {})
        chat = data.get("chat", {})
        variants = tuple(
            _variant_from_dict(item, data.get("quality_source", ""), origin) for item in data["variants"]
        )
    except FleetfitError as error:
        if error.code == "unsafe_model_file":
            raise
        raise FleetfitError(
            f"{origin}: {error.message}", code="bad_catalog_entry", remedy=error.remedy
        ) from error
    except KeyError as error:
        raise _bad(origin, f"the field {error.args[0]!r} is missing") from None
    names = [item.name for item in variants]
    for name in names:
        if names.count(name) > 1:
            raise _bad(origin, f"the variant {name!r} is given twice")
    extended = data.get("extended_context_tokens", 0)
    if extended and extended < shape.native_context_tokens:
        raise _bad(
            origin, f"extended_context_tokens {extended} is below the native {shape.native_context_tokens}"
        )
    if extended and not data.get("rope_scaling"):
        raise _bad(origin, "extended_context_tokens needs rope_scaling to say how the context is extended")
    return CatalogEntry(
        id=data["id"],
        name=data.get("name", data["id"]),
        family=data.get("family", data["id"]),
        shape=shape,
        variants=variants,
        licence=licence.get("id", "unknown"),
        licence_needs_acceptance=licence.get("needs_acceptance", True),
        licence_url=licence.get("url"),
        parameters=data.get("parameters", 0),
        extended_context_tokens=extended,
        rope_scaling=data.get("rope_scaling"),
        rope_theta=data.get("rope_theta"),
        kv_keys=tuple(kv_types.get("keys", ("f16",))),
        kv_values=tuple(kv_types.get("values", ("f16",))),
        kv_source=kv_types.get("source", ""),
        chat_template=chat.get("template"),
        tool_call_parser=chat.get("tool_call_parser"),
        low_quality_order=tuple(data.get("low_quality_order", ())),
        origin=origin,
        digest=digest_of({key: value for key, value in data.items() if key != "origin"}),
        sources={"shape": data.get("source", origin), "quality": data.get("quality_source", "")},
    )


def merge_overlay(base: Mapping[str, Any], overlay: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """Return ``base`` extended by an overlay (a file with ``extends``): variants are added, or replaced by
    name.

    Other fields of the overlay replace the base's, except ``extends``, ``id`` and ``schema_version``. Raises
    ``bad_catalog_entry`` where the overlay extends another entry.
    """
    if overlay.get("extends") != base.get("id"):
        raise _bad(origin, f"it extends {overlay.get('extends')!r}, not {base.get('id')!r}")
    merged = dict(base)
    for key, value in overlay.items():
        if key not in ("extends", "id", "schema_version", "variants"):
            merged[key] = value
    added = {item["name"]: item for item in overlay.get("variants", ())}
    variants = [added.pop(item["name"], item) for item in base.get("variants", ())]
    merged["variants"] = variants + list(added.values())
    return merged


def merge_pins(entry: Mapping[str, Any], pins: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """Return ``entry`` with revision, sizes and checksums from a pins file (written by ``fleetfit catalog
    pin``).

    Raises ``bad_catalog_pins`` where the pins are of another repository than the variant's, or of no variant.
    """
    merged = dict(entry)
    variants = [dict(item) for item in entry.get("variants", ())]
    by_name = {item["name"]: item for item in variants}
    for name, pin in pins.get("variants", {}).items():
        variant = by_name.get(name)
        if variant is None:
            raise FleetfitError(
                f"{origin} pins the variant {name!r}, which {entry.get('id')} does not have.",
                code="bad_catalog_pins",
                remedy="Remove it from the file, or run `fleetfit catalog pin` again.",
            )
        if pin.get("repository") != variant.get("repository"):
            raise FleetfitError(
                f"{origin} pins {name} in {pin.get('repository')!r}, but the catalog now names "
                f"{variant.get('repository')!r}.",
                code="bad_catalog_pins",
                remedy=f"Run `fleetfit catalog pin {entry.get('id')}` again.",
            )
        variant["revision"] = pin["revision"]
        variant["files"] = pin["files"]
    merged["variants"] = variants
    return merged


def not_pinned_error(entry: CatalogEntry, variants: Sequence[Variant]) -> FleetfitError:
    """Return the refusal to deploy files that nothing could verify."""
    names = ", ".join(item.name for item in variants)
    return FleetfitError(
        f"The files of {entry.id} ({names}) have no checksum in the catalog ({entry.origin}), "
        "so a download could not be verified.",
        code="model_not_pinned",
        remedy=f"Run `fleetfit catalog pin {entry.id}` where the hub or a mirror can be reached.",
    )


def _variant_from_dict(data: Mapping[str, Any], default_quality_source: str, origin: str) -> Variant:
    name = data["name"]
    tier = data.get("quality_tier", tier_of_scheme(data["scheme"]))
    if tier not in QUALITY_TIERS:
        raise _bad(origin, f"the variant {name} has the unknown quality_tier {tier!r}")
    files = tuple(
        ModelFile(name=item["name"], size=item.get("size"), sha256=item.get("sha256"))
        for item in data.get("files", ())
    )
    for item in files:
        if (item.size is None) != (item.sha256 is None):
            raise _bad(origin, f"the file {item.name} of {name} has a size or a sha256 without the other")
        if item.size is not None and item.size <= 0:
            raise _bad(origin, f"the file {item.name} of {name} has the size {item.size}")
        if item.name.startswith(("/", "../")) or "/../" in item.name or "\\" in item.name:
            raise _bad(origin, f"the file name {item.name!r} of {name} leaves the model's directory")
    if data["format"] not in FORMATS:
        raise _bad(origin, f"the variant {name} has the unknown format {data['format']!r}")
    for engine in data["engines"]:
        if engine not in ENGINES:
            raise _bad(origin, f"the variant {name} names the unknown engine {engine!r}")
    waivers = tuple(sorted(data.get("waivers", {})))
    check_names(
        [item.name for item in files], waivers, model=f"The variant {name} of the model", origin=origin
    )
    return Variant(
        name=name,
        format=data["format"],
        engines=tuple(data["engines"]),
        scheme=data["scheme"],
        quality_tier=tier,
        repository=data.get("repository"),
        revision=data.get("revision"),
        files=files,
        files_match=tuple(data.get("files_match", ())),
        quality_source=data.get("quality_source", default_quality_source),
        label=data.get("label", ""),
        shape_overrides=tuple(sorted(data.get("shape_overrides", {}).items())),
        waivers=waivers,
        stored_output=data.get("stored_output", False),
    )


def _bad(origin: str, problem: str) -> FleetfitError:
    return FleetfitError(
        f"{origin}: {problem}.",
        code="bad_catalog_entry",
        remedy="Correct the file; catalog/schemas/catalog_entry.json describes it.",
    )
