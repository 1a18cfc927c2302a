"""LoRA adapters: what the inventory says of them, what an engine needs for them, and whether their files are
for the model that is served."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

from .catalog_entry import CatalogEntry, ModelFile, digest_of
from .errors import FleetfitError
from .gguf_reader import read_gguf
from .model_shape import ModelShape, from_config_json, from_gguf
from .safetensors_header import read_safetensors
from .tensor_sizes import TensorLayout

VARIABLE = "fleetfit_lora_adapters"
FORMATS = ("safetensors", "gguf")
# Which format each engine reads: vLLM PEFT's files (vllm/lora/lora_model.py), llama.cpp what its
# convert_lora_to_gguf.py writes (src/llama-adapter.cpp).
FORMAT_OF_ENGINE: Mapping[str, str] = {"vllm": "safetensors", "llama_cpp": "gguf"}
# The values of --max-lora-rank (MaxLoRARanks in vllm/config/lora.py, 0.32).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# PEFT's own names for the two files.
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
# Above any adapter's; the largest rank that vLLM takes is 512.
MAX_RANK = 1 << 16
MAX_CONFIG_BYTES = 1 << 20
# A link in the release, a directory on the host and a model's name in requests; neither ":" nor ",", which separate
# llama-server's values, nor "=", which separates vLLM's.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_KEYS = (
    "name",
    "base_model",
    "format",
    "rank",
    "files",
    "url",
    "path",
    "location",
    "repository",
    "revision",
    "base_model_names",
)
# The parts of a tensor's name (PEFT's, and llama.cpp's below) -> the model's matrix.
_PEFT_TENSOR = re.compile(r"(?:.*?\blayers\.(\d+)\.)?(?:.*\.)?(\w+)\.lora_([AB])(?:\.\w+)?\.weight")
_GGUF_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.weight\.lora_([ab])")
# Types without a product: llama-server 11434 loads them and dies at the first request that asks for the adapter.
_UNUSABLE_GGUF_TYPES = frozenset({"F64", "I8", "I16", "I32", "I64"})
_GGUF_NAMES: Mapping[str, str] = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
    "output": "lm_head",
}


@dataclass(frozen=True)
class Adapter:
    """One adapter as the inventory names it; ``source`` is where its files are, as an artifact's source.

    ``base_model_names`` are further names that the adapter's own files may give for the model.
    """

    name: str
    base_model: str
    format: str
    rank: int
    files: tuple[ModelFile, ...]
    source: tuple[tuple[str, str], ...]
    base_model_names: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Return what names these files: the first 16 digits of a sha256 over their names and checksums."""
        return digest_of([[item.name, item.sha256] for item in self.files])[:16]

    @property
    def directory_name(self) -> str:
        """Return the adapter's directory beside the model's variants."""
        return f"adapter-{self.name}-{self.digest}"

    @property
    def file_bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(item.size or 0 for item in self.files)

    @property
    def gguf_file(self) -> Optional[str]:
        """Return the file that llama.cpp reads, or None."""
        return next((item.name for item in self.files if item.name.endswith(".gguf")), None)

    def as_dict(self, base_names: Iterable[str]) -> dict[str, Any]:
        """Return the plan's form; ``base_names`` are all names that its files may give for the model."""
        return {
            "name": self.name,
            "base_model": self.base_model,
            "base_model_names": sorted(base_names),
            "format": self.format,
            "rank": self.rank,
            "directory": self.directory_name,
            "files": [item.as_dict() for item in self.files],
            "source": dict(self.source),
        }


def link_name(name: str) -> str:
    """Return the name under which a release links to an adapter's directory."""
    return f"adapter-{name}"


def adapters_from_variable(value: Any) -> tuple[Adapter, ...]:
    """Return the adapters that ``fleetfit_lora_adapters`` lists, sorted by name and format.

    Raises :class:`FleetfitError` (``bad_policy``, ``adapter_not_pinned``) naming the entry and the field.
    """
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise _bad(f"{VARIABLE} is {value!r}", "a list of adapters")
    adapters = [_adapter(item, number) for number, item in enumerate(value, 1)]
    seen: set[tuple[str, str]] = set()
    for item in adapters:
        if (item.name, item.format) in seen:
            raise _bad(f"{VARIABLE} names {item.name!r} twice in the format {item.format}", "listed once")
        seen.add((item.name, item.format))
    return tuple(sorted(adapters, key=lambda item: (item.name, item.format)))


def adapters_for(engine: str, adapters: Sequence[Adapter]) -> tuple[Adapter, ...]:
    """Return the adapters in the format that an engine reads."""
    return tuple(item for item in adapters if item.format == FORMAT_OF_ENGINE[engine])


def engine_problem(engine: str, adapters: Sequence[Adapter]) -> Optional[tuple[str, str]]:
    """Return (code, sentence) where an engine cannot serve every adapter by its name, or None."""
    ours = adapters_for(engine, adapters)
    missing = sorted({item.name for item in adapters} - {item.name for item in ours})
    if missing:
        return (
            "adapter_format_not_readable",
            f"{engine} reads adapters in {FORMAT_OF_ENGINE[engine]}, and {', '.join(missing)} in {VARIABLE} "
            "has no entry in that format",
        )
    too_high = [f"{item.name} ({item.rank})" for item in ours if item.rank > VLLM_RANKS[-1]]
    if engine == "vllm" and too_high:
        return (
            "adapter_rank_too_high",
            f"vLLM takes adapters up to rank {VLLM_RANKS[-1]}, and {', '.join(too_high)} is above it",
        )
    return None


def vllm_rank(adapters: Sequence[Adapter]) -> int:
    """Return the smallest rank that vLLM accepts and that holds every adapter; 0 without adapters."""
    highest = max((item.rank for item in adapters), default=0)
    if not highest:
        return 0
    return next((rank for rank in VLLM_RANKS if rank >= highest), VLLM_RANKS[-1])


def base_names(entry: CatalogEntry) -> tuple[str, ...]:
    """Return the names that stand for a model: the catalog's, its own, and its repositories'."""
    names = [entry.id, entry.name, *(item.repository for item in entry.variants if item.repository)]
    return tuple(dict.fromkeys(_plain(name) for name in names))


def check_base_model(adapters: Sequence[Adapter], entry: CatalogEntry) -> None:
    """Raise ``lora_for_another_model`` for an adapter that the inventory says is for another model."""
    known = base_names(entry)
    for item in adapters:
        if _plain(item.base_model) not in known:
            raise _other_model(
                f"The LoRA adapter {item.name} is for {item.base_model} (base_model in {VARIABLE}), and this "
                f"host serves {entry.id}."
            )


def plan_adapters(engine: str, adapters: Sequence[Adapter], entry: CatalogEntry) -> list[dict[str, Any]]:
    """Return the plan's ``adapters`` for an engine."""
    known = base_names(entry)
    return [
        item.as_dict({*known, *(_plain(name) for name in item.base_model_names)})
        for item in adapters_for(engine, adapters)
    ]


def assumed_adapters(shape: ModelShape, ranks: Sequence[int], base_model: str) -> tuple[Adapter, ...]:
    """Return adapters of these ranks in every matrix of every block, in both formats: planning before buying.

    In 4 bytes an element, as llama.cpp's convert_lora_to_gguf.py writes them unless told otherwise.
    """
    adapters = []
    for number, rank in enumerate(ranks, 1):
        elements = shape.layers * sum(
            inputs + outputs for name, (inputs, outputs) in _matrices(shape).items() if name != "lm_head"
        )
        size = 4 * rank * elements
        for chosen, file in (("gguf", "adapter.gguf"), ("safetensors", WEIGHTS_FILE)):
            files = (ModelFile(file, size, "0" * 64),)
            adapters.append(Adapter(f"adapter-{number}", base_model, chosen, rank, files, ()))
    return tuple(adapters)


def layout_with_adapters(layout: TensorLayout, adapter_bytes: Sequence[int]) -> TensorLayout:
    """Return a GGUF layout whose blocks hold the adapters' tensors too.

    llama.cpp loads every adapter whole, each tensor where the matrix is that it belongs to ("LoRA buffer
    size" in src/llama-adapter.cpp). A file's size (``adapter_bytes``) bounds its tensors; it is spread evenly
    over the blocks.
    """
    size = sum(adapter_bytes)
    if not size:
        return layout
    share = -(-size // len(layout.blocks))
    return replace(
        layout,
        blocks=tuple(block + share for block in layout.blocks),
        source=f"{layout.source}; {len(adapter_bytes)} LoRA adapters by the size of their files",
    )


def check_files(
    adapter: Mapping[str, Any],
    directory: str,
    *,
    model_directory: str,
    model_format: str,
    model_file: Optional[str],
) -> None:
    """Raise :class:`FleetfitError` unless an adapter's files are for the model whose files are given.

    ``adapter`` is an entry of the plan's ``adapters``. The model's shape comes from its own files
    (config.json, or the GGUF header), not from the catalog. Codes: ``lora_for_another_model``,
    ``lora_rank_mismatch``, ``bad_lora``, and those of the readers.
    """
    shape = _shape_of_model(model_directory, model_format, model_file)
    if adapter["format"] == "gguf":
        name = next(file["name"] for file in adapter["files"] if file["name"].endswith(".gguf"))
        _check_gguf(adapter, os.path.join(directory, name), shape)
    else:
        _check_peft(adapter, directory, shape)


def _check_gguf(adapter: Mapping[str, Any], path: str, shape: ModelShape) -> None:
    header = read_gguf(path)
    metadata = header.metadata
    kind = (metadata.get("general.type"), metadata.get("adapter.type"))
    if kind != ("adapter", "lora"):
        raise _bad_lora(
            adapter,
            f"{path} has general.type {kind[0]!r} and adapter.type {kind[1]!r}, not 'adapter' and 'lora'",
        )
    architecture = metadata.get("general.architecture")
    if architecture != shape.architecture:
        raise _other_model(
            f"The LoRA adapter {adapter['name']} is for the architecture {architecture!r} "
            f"(general.architecture in {path}), and the model is {shape.architecture!r}."
        )
    for key in ("general.base_model.0.name", "general.base_model.0.repo_url"):
        if isinstance(metadata.get(key), str):
            _check_name(adapter, str(metadata[key]), f"{key} in {path}")
    found = 0
    for tensor in header.tensors:
        if tensor.type_name in _UNUSABLE_GGUF_TYPES:
            raise _bad_lora(
                adapter,
                f"{tensor.name} in {path} is {tensor.type_name}, which llama.cpp loads and cannot multiply",
            )
        match = _GGUF_TENSOR.fullmatch(tensor.name)
        if match is None or match[2] not in _GGUF_NAMES:
            continue
        # ne[0] first: A is (in, rank), B is (rank, out).
        rows = list(reversed(tensor.dimensions))
        _check_tensor(adapter, tensor.name, match, _GGUF_NAMES[match[2]], rows, shape)
        found += 1
    if not found:
        raise _bad_lora(adapter, f"{path} has no LoRA tensor of a decoder layer")


def _check_peft(adapter: Mapping[str, Any], directory: str, shape: ModelShape) -> None:
    path = os.path.join(directory, CONFIG_FILE)
    config = _read_config(adapter, path)
    if config.get("peft_type") != "LORA":
        raise _bad_lora(adapter, f"peft_type in {path} is {config.get('peft_type')!r}, not 'LORA'")
    # What vLLM's PEFTHelper refuses (vllm/lora/peft_helper.py): found here before the old engine is stopped.
    for key, allowed in (
        ("use_dora", (None, False)),
        ("modules_to_save", (None, [])),
        ("bias", (None, "none")),
        ("lora_bias", (None, False)),
    ):
        if config.get(key) not in allowed:
            raise _bad_lora(adapter, f"vLLM does not serve adapters with {key} {config[key]!r} ({path})")
    if isinstance(config.get("base_model_name_or_path"), str) and config["base_model_name_or_path"]:
        _check_name(adapter, config["base_model_name_or_path"], f"base_model_name_or_path in {path}")
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
        raise _bad_lora(adapter, f"r in {path} is {config.get('r')!r}, not a whole number")
    if max(ranks) > adapter["rank"]:
        raise _rank_mismatch(adapter, max(ranks), path)
    weights = os.path.join(directory, WEIGHTS_FILE)
    found = 0
    for tensor in read_safetensors(weights):
        match = _PEFT_TENSOR.fullmatch(tensor.name)
        if match is None:
            continue
        _check_tensor(adapter, tensor.name, match, match[2], list(tensor.dimensions), shape)
        found += 1
    if not found:
        raise _bad_lora(adapter, f"{weights} has no LoRA tensor")


def _check_tensor(
    adapter: Mapping[str, Any],
    tensor: str,
    match: re.Match[str],
    matrix: str,
    rows: Sequence[int],
    shape: ModelShape,
) -> None:
    """Compare one tensor (rows first: A is rank x in, B is out x rank) with the model's matrix."""
    if match[1] is not None and int(match[1]) >= shape.layers:
        raise _other_model(
            f"The LoRA adapter {adapter['name']} has {tensor}, and the model has {shape.layers} layers."
        )
    sizes = _matrices(shape).get(matrix)
    if sizes is None:
        return
    is_a = match[3] in "Aa"
    wanted = sizes[0] if is_a else sizes[1]
    if len(rows) != 2 or rows[1 if is_a else 0] != wanted:
        raise _other_model(
            f"The LoRA adapter {adapter['name']} has {tensor} with {' x '.join(map(str, rows))}, and the "
            f"model's {matrix} is {sizes[0]} wide to {sizes[1]}."
        )
    rank = rows[0] if is_a else rows[1]
    if rank > adapter["rank"]:
        raise _rank_mismatch(adapter, rank, tensor)


def _matrices(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of the matrices that every supported model has, by PEFT's names."""
    hidden, width = shape.hidden_size, shape.intermediate_size
    found = {"lm_head": (hidden, shape.vocab_size), "o_proj": (shape.q_dim, hidden)}
    if not shape.fused_projections:
        found.update(
            q_proj=(hidden, shape.q_dim), k_proj=(hidden, shape.kv_dim), v_proj=(hidden, shape.kv_dim)
        )
        if width:
            found.update(gate_proj=(hidden, width), up_proj=(hidden, width))
    if width:
        found["down_proj"] = (width, hidden)
    return found


def _shape_of_model(directory: str, file_format: str, model_file: Optional[str]) -> ModelShape:
    if file_format == "gguf":
        path = os.path.join(directory, model_file or "")
        header = read_gguf(path)
        return from_gguf(header.metadata, header.tensor_names, origin=path)
    path = os.path.join(directory, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            return from_config_json(json.load(file), origin=path)
    except (OSError, ValueError) as error:
        raise FleetfitError(
            f"{path} cannot be read: {error}.",
            code="file_not_found",
            remedy="Run the role model_store first.",
        ) from None


def _read_config(adapter: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    try:
        if os.path.getsize(path) > MAX_CONFIG_BYTES:
            raise _bad_lora(adapter, f"{path} is larger than any {CONFIG_FILE}")
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except OSError as error:
        raise _bad_lora(adapter, f"{path} cannot be read: {os.strerror(error.errno or 0)}") from None
    except (ValueError, RecursionError):
        raise _bad_lora(adapter, f"{path} is not JSON") from None
    if not isinstance(config, dict):
        raise _bad_lora(adapter, f"{path} is not a JSON object")
    return config


def _check_name(adapter: Mapping[str, Any], said: str, where: str) -> None:
    """Compare the last part of what the files call their model, which may be a path or carry a suffix."""
    plain = _plain(said)
    known = adapter["base_model_names"]
    if not any(plain == name or re.match(re.escape(name) + r"[-_.]", plain) for name in known):
        raise _other_model(
            f"The LoRA adapter {adapter['name']} was made for {said} ({where}), and the model is "
            f"{adapter['base_model']}.",
            f"If that is the same model under another name, list {said} under base_model_names of the adapter.",
        )


def _plain(name: str) -> str:
    """Return the last part of a repository or path, in small letters and without a format's ending."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return last[: -len("-gguf")] if last.endswith("-gguf") else last


def _adapter(item: Any, number: int) -> Adapter:
    where = f"entry {number} of {VARIABLE}"
    if not isinstance(item, Mapping):
        raise _bad(
            f"{where} is {item!r}", "a mapping with name, base_model, format, rank, files and a source"
        )
    unknown = sorted(set(item) - set(_KEYS))
    if unknown:
        raise _bad(f"{where} has the unknown key {unknown[0]!r}", f"one of {', '.join(_KEYS)}")
    name = _text(item, "name", where, _NAME, "letters, digits, '.', '_' and '-', at most 64")
    where = f"{where} ({name})"
    chosen = item.get("format")
    if chosen not in FORMATS:
        raise _bad(f"format of {where} is {chosen!r}", f"one of {', '.join(FORMATS)}")
    rank = item.get("rank")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise _bad(f"rank of {where} is {rank!r}", f"a whole number from 1 to {MAX_RANK}")
    names = item.get("base_model_names") or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(one, str) and one for one in names):
        raise _bad(f"base_model_names of {where} is {names!r}", "a list of names")
    return Adapter(
        name=name,
        base_model=_text(item, "base_model", where, re.compile(r"\S+"), "the id of a catalog entry"),
        format=str(chosen),
        rank=rank,
        files=_files(item, str(chosen), where),
        source=_source(item, where),
        base_model_names=tuple(sorted(str(one) for one in names)),
    )


def _files(item: Mapping[str, Any], chosen: str, where: str) -> tuple[ModelFile, ...]:
    listed = item.get("files")
    if (
        not isinstance(listed, (list, tuple))
        or not listed
        or not all(isinstance(one, Mapping) for one in listed)
    ):
        raise _bad(f"files of {where} is {listed!r}", "a list of mappings with name, size and sha256")
    files = []
    for one in listed:
        name = _text(one, "name", f"a file of {where}", _FILE_NAME, "a file's name without a directory")
        size, sha256 = one.get("size"), one.get("sha256")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1 or not isinstance(sha256, str):
            raise FleetfitError(
                f"The file {name} of {where} has no size or no sha256, so a download could not be verified.",
                code="adapter_not_pinned",
                remedy="Write both beside its name (stat -c %s, sha256sum).",
            )
        if not _SHA256.fullmatch(sha256):
            raise _bad(f"sha256 of {name} in {where} is {sha256!r}", "64 hexadecimal digits")
        files.append(ModelFile(name=name, size=size, sha256=sha256))
    names = sorted(one.name for one in files)
    if len(set(names)) != len(names):
        raise _bad(f"files of {where} are {', '.join(names)}", "of different names")
    if chosen == "gguf" and (len(names) != 1 or not names[0].endswith(".gguf")):
        raise _bad(f"files of {where} are {', '.join(names)}", "one file that ends in .gguf")
    if chosen == "safetensors" and names != sorted((CONFIG_FILE, WEIGHTS_FILE)):
        raise _bad(
            f"files of {where} are {', '.join(names)}",
            f"{WEIGHTS_FILE} and {CONFIG_FILE} (pickled weights are not loaded)",
        )
    return tuple(sorted(files, key=lambda one: one.name))


def _source(item: Mapping[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    """Return where the files are: below a web address, in a directory, or in a hub's repository."""
    given = [key for key in ("url", "path", "repository") if item.get(key)]
    if len(given) != 1:
        raise _bad(
            f"{where} has {' and '.join(given) or 'no source'}", "url, path or repository, one of them"
        )
    if given[0] == "url":
        text = _text(item, "url", where, re.compile(r"https?://\S+"), "a web address that holds the files")
        return (("type", "http"), ("url", text.rstrip("/")))
    if given[0] == "path":
        location = item.get("location", "controller")
        if location not in ("controller", "host"):
            raise _bad(f"location of {where} is {location!r}", "controller or host")
        path = _text(
            item, "path", where, re.compile(r"/.*"), "the absolute path of the directory with the files"
        )
        return (("type", "file"), ("path", path.rstrip("/")), ("location", str(location)))
    repository = _text(
        item, "repository", where, re.compile(r"[^/\s]+/[^/\s]+"), "of the form organisation/name"
    )
    revision = _text(item, "revision", where, _COMMIT, "a commit of 40 hexadecimal digits")
    return (("type", "hub"), ("repository", repository), ("revision", revision))


def _text(item: Mapping[str, Any], key: str, where: str, pattern: re.Pattern[str], wanted: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _bad(f"{key} of {where} is {value!r}", wanted)
    return str(value)


def _bad(what: str, wanted: str) -> FleetfitError:
    return FleetfitError(
        f"{what}; it must be {wanted}.",
        code="bad_policy",
        remedy=f"Correct {VARIABLE} in the inventory; docs/lora.md shows an entry of each kind.",
    )


def _bad_lora(adapter: Mapping[str, Any], what: str) -> FleetfitError:
    return FleetfitError(
        f"The LoRA adapter {adapter['name']} is not usable: {what}.",
        code="bad_lora",
        remedy=f"Correct the adapter, or take it out of {VARIABLE}.",
    )


def _rank_mismatch(adapter: Mapping[str, Any], rank: int, where: str) -> FleetfitError:
    return FleetfitError(
        f"The LoRA adapter {adapter['name']} has rank {rank} ({where}), and {VARIABLE} says {adapter['rank']}.",
        code="lora_rank_mismatch",
        remedy=f"Write rank: {rank}; memory is planned for it.",
    )


def _other_model(message: str, remedy: str = "") -> FleetfitError:
    return FleetfitError(
        message,
        code="lora_for_another_model",
        remedy=remedy
        or f"Take the adapter out of {VARIABLE} for this host, or serve the model it was made for.",
    )
