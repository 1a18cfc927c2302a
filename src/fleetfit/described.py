"""What a GGUF file, a config.json, a model's directory or a hub repository says of a model.

``fleetfit catalog add`` writes it down as a catalog entry. Nothing is guessed: what the source does not say is
left out, and :class:`Described` tells what that was.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.gguf_reader import (
    MAX_HEADER_BYTES,
    GgufHeader,
    read_gguf,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import (
    ModelShape,
    from_config_json,
    from_gguf,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import (
    GGUF_SCHEMES,
    TensorLayout,
    check_header,
    check_layers,
    layout_from_gguf,
    layout_from_safetensors,
    layout_from_scheme,
    safetensors_layout,
    scheme_of_config,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.units import format_size

from .hub import Hub, HubFile, Repository

# How far files may be from the bytes that the shape and the scheme give: an importance matrix moves a few
# tensors of small models to another type.
SIZE_TOLERANCE = 0.02
# What a deployment needs of a safetensors repository: weights, configuration, tokenizer.
SAFETENSORS_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Headers are mostly vocabulary: 5.9 MB for Qwen2.5, 13 MB for Gemma 3. More is asked for where it is not enough.
FIRST_HEADER_BYTES = 16 * 1024 * 1024
READ_BYTES = 1024 * 1024

_PART = re.compile(r"-\d{5}-of-\d{5}$")
_SCHEME = re.compile(
    r"(?i)(?:^|[-._])(fp16|" + "|".join(sorted(GGUF_SCHEMES, key=len, reverse=True)) + r")(?=[-.]|$)"
)


@dataclass(frozen=True)
class Described:
    """A model as its source describes it; ``variants`` are as a catalog entry has them.

    ``layouts`` are those read from files' own headers, by the variant's name. ``has_template`` is None where
    the source says nothing of chat templates. ``left_out`` has a sentence per file that is no variant.
    """

    name: str
    origin: str
    shape: ModelShape
    variants: tuple[Mapping[str, Any], ...]
    layouts: Mapping[str, TensorLayout] = field(default_factory=dict)
    licence: str | None = None
    licence_url: str | None = None
    gated: bool = False
    rope_theta: float | None = None
    extended_context_tokens: int = 0
    has_template: bool | None = None
    left_out: tuple[str, ...] = ()


def describe_gguf(path: Path, *, report: Callable[[str], None]) -> Described:
    """Return what a GGUF file (any part of a split one) says; its files are pinned by hashing them here.

    Raises :class:`FleetfitError` as :func:`read_gguf` and :func:`from_gguf` do, ``unknown_scheme`` and
    ``size_implausible`` where the catalog could not compute the file's size.
    """
    header = read_gguf(path)
    shape, theta, extended = _shape_of_gguf(header, str(path))
    layout = layout_from_gguf(header)
    if layout.scheme not in GGUF_SCHEMES:
        raise _no_scheme(path.name, layout.scheme)
    expected = layout_from_scheme(shape, layout.scheme).file_bytes
    if abs(layout.file_bytes - expected) > SIZE_TOLERANCE * expected:
        raise FleetfitError(
            f"{path} declares {layout.scheme} and has {format_size(layout.file_bytes)}, where that scheme gives "
            f"{format_size(expected)}: its tensors are quantized in a way of their own.",
            code="size_implausible",
            remedy=f"Choose a plain quantization; `fleetfit what-fits {path}` plans with this file's own sizes.",
        )
    files = []
    for part in map(Path, header.paths):
        report(f"reading {part.name} ({format_size(part.stat().st_size)}) for its checksum")
        files.append({"name": part.name, "size": part.stat().st_size, "sha256": sha256_of(part)})
    metadata = header.metadata
    licence, url = metadata.get("general.license"), metadata.get("general.license.link")
    return Described(
        # Not general.name, which training runs write: "Smollm2 135M 8k Lc100K Mix1 Ep2".
        name=_without_scheme(_PART.sub("", path.stem)),
        origin=f"the GGUF header of {path.name}",
        shape=shape,
        variants=(_variant(layout.scheme, "gguf", files=files),),
        layouts={layout.scheme: layout},
        licence=licence if isinstance(licence, str) and licence else None,
        licence_url=url if isinstance(url, str) and url.startswith("https://") else None,
        rope_theta=theta,
        extended_context_tokens=extended,
        has_template="tokenizer.chat_template" in metadata,
    )


def read_config(config_path: Path) -> Any:
    """Return what a config.json holds; raises :class:`FleetfitError` (``bad_config_json``) where it cannot."""
    try:
        return json.loads(config_path.read_bytes())
    except (ValueError, RecursionError):
        raise FleetfitError(
            f"{config_path} is not JSON.", code="bad_config_json", remedy="Fetch the file again."
        ) from None
    except OSError as error:
        raise FleetfitError(
            f"{config_path} cannot be read: {error.strerror}.",
            code="bad_config_json",
            remedy="Check its permissions.",
        ) from None


def describe_config(path: Path) -> Described:
    """Return what a config.json, or the directory that holds one, says of a model.

    Raises :class:`FleetfitError`: ``config_json_missing``, ``bad_config_json``, ``size_implausible`` for
    weights beside it that are another model's, and what :func:`from_config_json` and :func:`scheme_of_config`
    raise.
    """
    is_file = path.is_file()
    config_path = path if is_file else path / "config.json"
    if not config_path.is_file():
        raise FleetfitError(
            f"{path} has no config.json.",
            code="config_json_missing",
            remedy="Name a model's directory, its config.json, or a .gguf file.",
        )
    config = read_config(config_path)
    folder = config_path.resolve().parent
    shape, theta, extended = _shape_of_config(config, str(config_path))
    scheme = scheme_of_config(config)
    variant = _variant(scheme, "safetensors", match=SAFETENSORS_FILES)
    if not is_file and any(folder.glob("*.safetensors")):
        layout = layout_from_safetensors(folder, scheme)
        check_layers(shape, layout, str(folder))
        variant |= _stored_output(shape, scheme, layout.tensor_bytes, str(folder))
    return Described(
        name=folder.name,
        origin=str(config_path),
        shape=shape,
        variants=(variant,),
        rope_theta=theta,
        extended_context_tokens=extended,
        has_template=None if is_file else _template_in(folder),
    )


def describe_repository(hub: Hub, repository: Repository) -> Described:
    """Return what a hub's repository holds: safetensors by its config.json, GGUF files by one's header.

    Weights are not fetched. Raises :class:`FleetfitError`: those of :class:`Hub`, ``no_model_files``, and
    what the shape's readers raise.
    """
    name = repository.name
    origin = f"{name} at {repository.revision[:12]}"
    groups = _gguf_groups(repository.files)
    config_file = repository.file("config.json")
    if config_file is not None:
        config = _small_json(hub, repository, "config.json")
        shape, theta, extended = _shape_of_config(config, f"config.json of {origin}")
        described = Described(
            name=name.rpartition("/")[2],
            origin=f"config.json of {origin}",
            shape=shape,
            variants=(),
            rope_theta=theta,
            extended_context_tokens=extended,
        )
    elif groups:
        described = _from_remote_gguf(hub, repository, groups, origin)
    else:
        raise FleetfitError(
            f"{name} has neither a config.json nor a GGUF file that can be read.",
            code="no_model_files",
            remedy="Name the model's own repository, or one with GGUF files.",
        )
    variants, left_out = _gguf_variants(described.shape, repository, groups)
    if config_file is not None and any(item.name.endswith(".safetensors") for item in repository.files):
        found, sentence = _safetensors_variant(described.shape, repository, scheme_of_config(config))
        variants += found
        left_out += sentence
    if not variants:
        raise FleetfitError(
            f"{name} has no weights that the catalog can describe. {' '.join(left_out)}".rstrip(),
            code="no_model_files",
            remedy="Name a repository with plain GGUF quantizations, or 16-bit, FP8, GPTQ or AWQ safetensors.",
        )
    return Described(
        name=described.name,
        origin=described.origin,
        shape=described.shape,
        variants=tuple(_unique_names(variants)),
        licence=repository.licence or described.licence,
        licence_url=f"{hub.endpoint}/{name}",
        gated=repository.gated,
        rope_theta=described.rope_theta,
        extended_context_tokens=described.extended_context_tokens,
        has_template=described.has_template
        if config_file is None
        else _template_of_repository(hub, repository),
        left_out=tuple(left_out),
    )


def sha256_of(path: Path) -> str:
    """Return the sha256 (hex) of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _shape_of_gguf(header: GgufHeader, origin: str) -> tuple[ModelShape, float | None, int]:
    """Return (shape, rope_theta, extended context or 0); a YaRN that the file declares is undone in the shape."""
    metadata = header.metadata
    shape = from_gguf(metadata, header.tensor_names, origin=origin)
    check_header(shape, header)
    arch = shape.architecture
    original = metadata.get(f"{arch}.rope.scaling.original_context_length")
    factor = metadata.get(f"{arch}.rope.scaling.factor")
    yarn = metadata.get(f"{arch}.rope.scaling.type") == "yarn"
    return _extended(shape, _number(metadata.get(f"{arch}.rope.freq_base")), yarn, factor, original)


def _shape_of_config(config: Any, origin: str) -> tuple[ModelShape, float | None, int]:
    """Return (shape, rope_theta, extended context or 0), as :func:`_shape_of_gguf`."""
    shape = from_config_json(config, origin=origin)
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = scaling if isinstance(scaling, Mapping) else {}
    theta = _number(config.get("rope_theta", scaling.get("rope_theta")))
    yarn = scaling.get("rope_type", scaling.get("type")) == "yarn"
    original = scaling.get("original_max_position_embeddings")
    return _extended(shape, theta, yarn, scaling.get("factor"), original)


def _extended(
    shape: ModelShape, theta: float | None, yarn: bool, factor: Any, original: Any
) -> tuple[ModelShape, float | None, int]:
    factor = _number(factor)
    if (
        not yarn
        or factor is None
        or isinstance(original, bool)
        or not isinstance(original, int)
        or original < 1
    ):
        return shape, theta, 0
    native = ModelShape.from_dict({**shape.as_dict(), "native_context_tokens": original})
    return native, theta, int(original * factor)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        return None
    return int(value) if float(value).is_integer() else float(value)


def _variant(
    scheme: str,
    file_format: str,
    *,
    repository: str | None = None,
    match: Sequence[str] = (),
    files: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return a variant as a catalog entry has it; its quality tier follows from the scheme."""
    found: dict[str, Any] = {
        "name": scheme,
        "format": file_format,
        "engines": ["llama_cpp" if file_format == "gguf" else "vllm"],
        "scheme": scheme,
    }
    if repository:
        found["repository"] = repository
    if match:
        found["files_match"] = list(match)
    if files:
        found["files"] = [dict(item) for item in files]
    return found


def _stored_output(shape: ModelShape, scheme: str, found_bytes: int, origin: str) -> dict[str, bool]:
    """Return ``stored_output`` where weights hold a tied matrix twice; raises ``size_implausible``."""
    layout = safetensors_layout(shape, scheme)
    expected = layout.tensor_bytes
    if abs(found_bytes - expected) <= SIZE_TOLERANCE * expected:
        return {}
    stored = expected + layout.token_embd
    if layout.tied and abs(found_bytes - stored) <= SIZE_TOLERANCE * stored:
        return {"stored_output": True}
    raise FleetfitError(
        f"{origin} holds {format_size(found_bytes)} of weights, its config.json gives {format_size(expected)} in "
        f"{scheme}.",
        code="size_implausible",
        remedy="Fetch the model whole; one quantized in a way of its own cannot be an entry.",
    )


def _template_in(folder: Path) -> bool:
    """Return whether a model's directory has a chat template."""
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        content = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and bool(content.get("chat_template"))


def _template_of_repository(hub: Hub, repository: Repository) -> bool:
    if repository.file("chat_template.jinja") is not None:
        return True
    if repository.file("tokenizer_config.json") is None:
        return False
    content = _small_json(hub, repository, "tokenizer_config.json")
    return isinstance(content, dict) and bool(content.get("chat_template"))


def _small_json(hub: Hub, repository: Repository, name: str) -> Any:
    try:
        return json.loads(hub.small_file(repository, name))
    except (ValueError, RecursionError):
        raise FleetfitError(
            f"{name} of {repository.name} is not JSON.",
            code="bad_config_json",
            remedy="Name another repository; a proxy's page may stand in the file's place.",
        ) from None


def _gguf_groups(files: Iterable[HubFile]) -> dict[str, list[HubFile]]:
    """Return the GGUF files by name without part number; all parts of one model are a group."""
    groups: dict[str, list[HubFile]] = {}
    for item in files:
        if item.name.lower().endswith(".gguf"):
            groups.setdefault(_PART.sub("", item.name[: -len(".gguf")]), []).append(item)
    return groups


def _scheme_in_name(stem: str) -> str | None:
    """Return the scheme that a file's name ends on, in the catalog's spelling."""
    found = _SCHEME.findall(stem.rpartition("/")[2])
    if not found or "mmproj" in stem.lower():
        return None
    scheme = str(found[-1]).upper()
    return "F16" if scheme == "FP16" else scheme


def _without_scheme(stem: str) -> str:
    """Return a file's name without the scheme that it ends on."""
    found = list(_SCHEME.finditer(stem))
    return stem[: found[-1].start()] if found and found[-1].start() > 0 else stem


def _gguf_variants(
    shape: ModelShape, repository: Repository, groups: Mapping[str, list[HubFile]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return (variants, best first; sentences on what was left out)."""
    found: dict[str, dict[str, Any]] = {}
    left_out = []
    for stem, files in sorted(groups.items(), key=lambda item: (len(item[0]), item[0])):
        short = stem.rpartition("/")[2]
        scheme = _scheme_in_name(stem)
        if scheme is None:
            why = "a projector for images" if "mmproj" in stem.lower() else "not a scheme of the catalog"
            left_out.append(f"{short}: {why}.")
            continue
        if scheme in found:
            left_out.append(f"{short}: a second {scheme}.")
            continue
        size = sum(item.size or 0 for item in files)
        expected = layout_from_scheme(shape, scheme).file_bytes
        if abs(size - expected) > SIZE_TOLERANCE * expected:
            left_out.append(f"{short}: it has {format_size(size)}, {scheme} gives {format_size(expected)}.")
            continue
        match = [files[0].name] if len(files) == 1 else [f"{stem}-*-of-*.gguf"]
        found[scheme] = _variant(scheme, "gguf", repository=repository.name, match=match)
    order = list(GGUF_SCHEMES)
    return [found[scheme] for scheme in sorted(found, key=order.index)], left_out


def _safetensors_variant(
    shape: ModelShape, repository: Repository, scheme: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return ([the repository's own variant] or [], sentences on what was left out)."""
    sizes = {item.name: item.size or 0 for item in repository.files if item.name.endswith(".safetensors")}
    # Some repositories hold the weights twice: in Hugging Face's layout, and consolidated.
    named = {name: size for name, size in sizes.items() if re.fullmatch(r"model[^/]*\.safetensors", name)}
    match: tuple[str, ...] = SAFETENSORS_FILES
    if not named:
        named = sizes
        match = ("*.safetensors", *SAFETENSORS_FILES[1:])
    found = _variant(scheme, "safetensors", repository=repository.name, match=match)
    try:
        return [found | _stored_output(shape, scheme, sum(named.values()), repository.name)], []
    except FleetfitError as error:
        return [], [error.message]


def _from_remote_gguf(
    hub: Hub, repository: Repository, groups: Mapping[str, list[HubFile]], origin: str
) -> Described:
    """Return the model that the smallest GGUF with a known scheme describes, from the first bytes of its parts."""
    known = [
        files for stem, files in groups.items() if _scheme_in_name(stem) and all(item.size for item in files)
    ]
    if not known:
        raise FleetfitError(
            f"No GGUF file of {repository.name} has the name of a scheme that the catalog knows.",
            code="no_model_files",
            remedy=f"Known schemes: {', '.join(GGUF_SCHEMES)}.",
        )
    parts = min(known, key=lambda files: (len(files), sum(item.size or 0 for item in files)))
    header = _remote_header(hub, repository, parts)
    shape, theta, extended = _shape_of_gguf(header, f"{parts[0].name} of {origin}")
    licence = header.metadata.get("general.license")
    return Described(
        name=re.sub(r"(?i)[-_.]gguf$", "", repository.name.rpartition("/")[2]),
        origin=f"the GGUF header of {parts[0].name}, {origin}",
        shape=shape,
        variants=(),
        licence=licence if isinstance(licence, str) and licence else None,
        rope_theta=theta,
        extended_context_tokens=extended,
        has_template="tokenizer.chat_template" in header.metadata,
    )


def _remote_header(hub: Hub, repository: Repository, parts: Sequence[HubFile]) -> GgufHeader:
    """Return the header of a GGUF in a hub, read from its first bytes in a sparse file of the same size."""
    count = FIRST_HEADER_BYTES
    while True:
        with tempfile.TemporaryDirectory(prefix="fleetfit-") as folder:
            paths = []
            for item in parts:
                path = Path(folder, item.name.rpartition("/")[2])
                path.write_bytes(hub.first_bytes(repository, item.name, count))
                with path.open("r+b") as stream:
                    stream.truncate(item.size)
                paths.append(path)
            try:
                return read_gguf(paths[0])
            except FleetfitError as error:
                largest = max(item.size or 0 for item in parts)
                if count >= min(MAX_HEADER_BYTES, largest):
                    raise FleetfitError(
                        error.message.replace(f"{folder}/", f"{repository.name}: "),
                        code=error.code,
                        remedy="Name another repository, or fetch the file and name it.",
                    ) from None
        count *= 4


def _unique_names(variants: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the variants with names of their own: a BF16 in both formats is told apart."""
    names = [item["name"] for item in variants]
    return [
        {**item, "name": f"{item['name']}-safetensors"}
        if names.count(item["name"]) > 1 and item["format"] == "safetensors"
        else item
        for item in variants
    ]


def _no_scheme(name: str, scheme: str) -> FleetfitError:
    return FleetfitError(
        f"{name} is quantized as {scheme}, which is not a scheme of the catalog.",
        code="unknown_scheme",
        remedy=f"Known schemes: {', '.join(GGUF_SCHEMES)}.",
    )
