"""The catalog entry that `fleetfit catalog add` writes of a described model, and what it could not know."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import parameter_count

from .described import Described, describe_config, describe_gguf, describe_repository
from .hub import REPOSITORY, Hub

DEFAULT_OVERLAY = "fleetfit-catalog"
# Ids of the SPDX list under which nothing has to be accepted before use (opensource.org's list of licences).
OPEN_LICENCES = frozenset(
    {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0", "mpl-2.0"}
)
WIDTH = 118


@dataclass(frozen=True)
class Wishes:
    """What the caller says of the model; it counts before what the source says."""

    model_id: str | None = None
    family: str | None = None
    licence: str | None = None
    tool_call_parser: str | None = None
    repository: str | None = None


def describe(model: str, endpoint: str | None, revision: str, *, report: Callable[[str], None]) -> Described:
    """Return what MODEL says of itself: a .gguf file, a config.json, a model's directory, or a hub id.

    Raises :class:`FleetfitError`: ``no_such_model`` for what is none of them, and what the readers raise.
    """
    path = Path(model)
    if model.endswith(".gguf"):
        return describe_gguf(path, report=report)
    try:
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError):  # Longer than a path can be, or none at all.
        is_directory = is_file = False
    if is_directory or (is_file and path.suffix == ".json"):
        return describe_config(path)
    if is_file:
        raise FleetfitError(
            f"{model} is neither a .gguf file nor a config.json.",
            code="no_such_model",
            remedy="Name the model's own GGUF file, or the directory with its config.json.",
        )
    if REPOSITORY.match(model):
        hub = Hub(endpoint)
        return describe_repository(hub, hub.repository(model, revision))
    raise FleetfitError(
        f"{model!r} is no file, no directory, and not the name of a hub repository (organisation/name).",
        code="no_such_model",
        remedy="Name a .gguf file, a config.json or its directory, or a hub id.",
    )


def entry_of(described: Described, wishes: Wishes) -> dict[str, Any]:
    """Return the entry's document; raises ``bad_model_id`` for an id that no entry can have."""
    model_id = wishes.model_id or slug_of(described.name)
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", model_id):
        raise FleetfitError(
            f"{model_id!r} cannot be the id of an entry.",
            code="bad_model_id",
            remedy="Give --id: lower-case letters, digits, dots, hyphens and underscores, a letter or digit first.",
        )
    licence = wishes.licence or described.licence or "unknown"
    shape = {name: value for name, value in described.shape.as_dict().items() if value or name in _ALWAYS}
    document: dict[str, Any] = {
        "schema_version": 1,
        "id": model_id,
        "name": described.name,
        "family": wishes.family or model_id,
        "parameters": parameter_count(described.shape),
        "source": described.origin,
        "licence": {
            "id": licence,
            "needs_acceptance": described.gated or licence not in OPEN_LICENCES,
        },
        "shape": shape,
    }
    if described.licence_url:
        document["licence"]["url"] = described.licence_url
    if described.extended_context_tokens > described.shape.native_context_tokens:
        document["extended_context_tokens"] = described.extended_context_tokens
        document["rope_scaling"] = "yarn"
    if described.rope_theta:
        document["rope_theta"] = described.rope_theta
    document["kv_types"] = _kv_types(described)
    if wishes.tool_call_parser:
        document["chat"] = {"tool_call_parser": wishes.tool_call_parser}
    document["quality_source"] = (
        "Llama-3-8B divergence table in llama.cpp's perplexity README for GGUF; ranks of other formats are assumed"
    )
    document["variants"] = [_with_repository(item, wishes.repository) for item in described.variants]
    return document


def unknown_facts(described: Described, document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (field of the entry, sentence) for what the source did not say, the most important first."""
    found = []
    licence = document["licence"]
    if licence["id"] == "unknown":
        found.append(
            ("licence.id", "the source names no licence; until then it must be accepted as `unknown`")
        )
    if "url" not in licence and licence["needs_acceptance"]:
        found.append(("licence.url", "the page that whoever accepts the licence should read"))
    if any("repository" not in item and "files" not in item for item in document["variants"]):
        found.append(
            ("variants[].repository", "where the files come from; `catalog pin` needs it (--repository)")
        )
    if described.has_template is False:
        found.append(("chat.template_file", "the files have no chat template: put one beside the entry"))
    elif described.has_template is None:
        found.append(("chat.template_file", "needed if the model's files have no chat template"))
    if "chat" not in document and any("vllm" in item["engines"] for item in document["variants"]):
        found.append(
            ("chat.tool_call_parser", "vLLM's parser, if the model calls tools (--tool-call-parser)")
        )
    if "extended_context_tokens" not in document:
        found.append(
            (
                "extended_context_tokens",
                "with rope_scaling: yarn, if the model card allows more than the native",
            )
        )
    if document["family"] == document["id"]:
        found.append(("family", "a name that smaller models share, which are then offered in its place"))
    return found


def text_of(document: Mapping[str, Any], described: Described, unknown: list[tuple[str, str]]) -> str:
    """Return the file: what is not known as a comment on top, then the entry as YAML."""
    lines = ["# Written by fleetfit catalog add; yours to edit. `fleetfit catalog check` looks it over."]
    if unknown:
        lines.append("# Not known from the source, to be filled in where it matters:")
        for field, sentence in unknown:
            lines += textwrap.wrap(
                f"{field}: {sentence}", WIDTH, initial_indent="# - ", subsequent_indent="#   "
            )
    body = yaml.safe_dump(dict(document), sort_keys=False, width=WIDTH, allow_unicode=True)
    return "\n".join(lines) + "\n---\n" + body


def slug_of(name: str) -> str:
    """Return an id made of a model's name: lower case, and hyphens for what an id cannot have."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")


_ALWAYS = ("intermediate_size", "tied_embeddings")


def _kv_types(described: Described) -> dict[str, Any]:
    source = "narrower ones were not measured for this model"
    if described.shape.architecture.startswith("qwen2"):
        source = "4- and 5-bit keys wreck Qwen2 models (llama.cpp issue 21385)"
    return {"keys": ["f16", "bf16", "q8_0"], "values": ["f16", "bf16", "q8_0", "q5_1"], "source": source}


def _with_repository(variant: Mapping[str, Any], repository: str | None) -> dict[str, Any]:
    """Return the variant with the hub's place for its files, to be pinned there; else unchanged."""
    found = dict(variant)
    if repository is None or "repository" in found:
        return found
    files = found.pop("files", None)
    found["repository"] = repository
    if files:
        found["files_match"] = [item["name"] for item in files]
    return found
