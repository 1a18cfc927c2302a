"""`fleetfit what-fits`: which quantizations fit a card, planned before anything is bought or installed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from ansible_collections.fleetfit.llm.plugins.module_utils.catalog_entry import (
    ENGINES,
    QUALITY_TIERS,
    CatalogEntry,
    Variant,
    tier_of_scheme,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.gguf_reader import read_gguf
from ansible_collections.fleetfit.llm.plugins.module_utils.host_view import (
    Card,
    HostView,
    cards_of,
    unseen_reserved_bytes,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.lora import VLLM_RANKS, assumed_adapters
from ansible_collections.fleetfit.llm.plugins.module_utils.memory import DeviceBudget, HostBudget
from ansible_collections.fleetfit.llm.plugins.module_utils.memory_llama_cpp import KV_TYPES as LLAMA_KV_TYPES
from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import (
    ModelShape,
    from_config_json,
    from_gguf,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import KV_TYPES as POLICY_KV_TYPES
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import (
    MAX_CONTEXT_TOKENS,
    MAX_SLOTS,
    Policy,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import (
    Candidate,
    Request,
    choose,
    evaluate,
    nothing_fits,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.speed import (
    DEFAULT_RAM_BANDWIDTH_BYTES_PER_S,
    decode_efficiency,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import (
    GGUF_SCHEMES,
    TensorLayout,
    check_header,
    check_layers,
    layout_from_gguf,
    layout_from_safetensors,
    scheme_of_config,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.units import GIB, MIB, format_gib, format_size
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import (
    CATALOG_DIR,
    Catalog,
    available_engines,
    load_catalog,
    near_names,
)
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .described import describe_repository, read_config
from .hub import REPOSITORY, Hub, Repository

EXIT_FITS, EXIT_NOTHING_FITS, EXIT_BAD_INPUT = 0, 1, 2
SPEC_FORM = "a card of the catalog, NAME:TOTAL_MIB[:FREE_MIB[:COMPUTE_CAPABILITY]], or cpu"
DEFAULT_CONTEXT_TOKENS = 8192
# What a host without --ram is taken to have; a note says so.
ASSUMED_RAM_GIB = 32.0
# Planning takes a driver that every engine build accepts.
ASSUMED_DRIVER = "580"
# Of a card that only its memory is told of: the least that every scheme but native FP8 runs on.
ASSUMED_COMPUTE_CAPABILITY = "8.0"
MAX_TOTAL_MIB = 1 << 24
# Quantized from a 16-bit release with llama-quantize: what a directory or hub id is worth in llama.cpp.
LADDER = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
BAR_WIDTH = 12
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_CAPABILITY = re.compile(r"[0-9]{1,3}\.[0-9]{1,2}")
_COLOURS = {
    "weights": "blue",
    "kv_cache": "cyan",
    "compute": "magenta",
    "overhead": "yellow",
    "margin": "white",
}
# What reasons and remedies call by the inventory's variable, and this command by its option.
_OPTIONS = {
    "fleetfit_min_quality_tier": "--min-tier",
    "fleetfit_min_context_tokens": "--context",
    "fleetfit_slots": "--slots",
    "fleetfit_kv_type": "--kv-type",
    "fleetfit_engine": "--engine",
}
_LETTERS = {"weights": "W", "kv_cache": "K", "compute": "C", "overhead": "o", "margin": "m"}


@dataclass(frozen=True)
class Subject:
    """The model that is asked about, with layouts read from its own files where there are any."""

    entry: CatalogEntry
    layouts: dict[str, TensorLayout]
    from_catalog: bool
    siblings: tuple[CatalogEntry, ...] = ()


@click.command(name="what-fits")
@click.argument("model")
@click.option("--gpu", "gpus", multiple=True, metavar="SPEC", help=f"One card each: {SPEC_FORM}.")
@click.option(
    "--ram", "ram_gib", type=float, metavar="GIB", help=f"The host's RAM (default {ASSUMED_RAM_GIB:g})."
)
@click.option("--context", "context_tokens", type=int, metavar="N", help="Tokens per slot (default 8192).")
@click.option("--slots", type=int, default=2, show_default=True, help="Requests served at once.")
@click.option("--engine", type=click.Choice(["auto", *ENGINES]), default="auto", show_default=True)
@click.option("--kv-type", type=click.Choice(POLICY_KV_TYPES), default="f16", show_default=True)
@click.option(
    "--prefer", type=click.Choice(["quality", "speed", "context"]), default="quality", show_default=True
)
@click.option("--min-tier", type=click.Choice(QUALITY_TIERS), help="Lowest quality tier (default Q4_K_M).")
@click.option(
    "--lora", "lora_ranks", type=int, multiple=True, metavar="RANK", help="A LoRA adapter; repeat for more."
)
@click.option("--catalog-dir", "catalog_dirs", multiple=True, type=click.Path(), help="An overlay directory.")
@click.option(
    "--endpoint", help="The hub or mirror for a hub id (default: HF_ENDPOINT, else the public hub)."
)
@click.option("--json", "as_json", is_flag=True, help="Print the candidates for programs.")
def what_fits(
    model: str,
    gpus: tuple[str, ...],
    ram_gib: float | None,
    context_tokens: int | None,
    slots: int,
    engine: str,
    kv_type: str,
    prefer: str,
    min_tier: str | None,
    lora_ranks: tuple[int, ...],
    catalog_dirs: tuple[str, ...],
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Show which quantizations of MODEL fit the given cards, and why the others do not.

    MODEL is a catalog id, a .gguf file (any part of a split one), a directory with a config.json, or a hub
    id. Exit status: 0 something fits, 1 nothing does, 2 bad input.
    """
    _check_positive("--slots", slots, MAX_SLOTS)
    if context_tokens is not None:
        _check_positive("--context", context_tokens, MAX_CONTEXT_TOKENS)
    for rank in lora_ranks:
        _check_positive("--lora", rank, VLLM_RANKS[-1])
    catalog = load_catalog(list(catalog_dirs))
    subject = subject_of(model, catalog, endpoint)
    if not gpus:
        raise FleetfitError(
            "No card is named.",
            code="no_gpu_named",
            remedy=f"Give --gpu once per card: {SPEC_FORM}.",
        )
    notes: list[str] = []
    view = view_of_specs(gpus, ram_gib, catalog, notes)
    entry = subject.entry
    if entry.licence_needs_acceptance and subject.from_catalog:
        notes.append(
            f"the licence {entry.licence} must be accepted before deployment (fleetfit_accepted_licences)"
        )
    policy = Policy(
        model=entry.id,
        min_context_tokens=context_tokens or min(DEFAULT_CONTEXT_TOKENS, entry.max_context_tokens),
        slots=slots,
        prefer=prefer,
        min_quality_tier=min_tier or ("Q4_K_M" if subject.from_catalog else "rest"),
        engine=engine,
        kv_type=kv_type,
        lora_adapters=assumed_adapters(entry.shape, lora_ranks, entry.id),
        accepted_licences=tuple(sorted({entry.licence, *(sibling.licence for sibling in subject.siblings)})),
    )
    roles = available_engines(CATALOG_DIR.parent / "roles")
    if engine != "auto" and engine not in roles:
        notes.append(f"fleetfit has no role for {engine} yet: this is a plan by formula only")
    request = Request(
        entry=entry,
        policy=policy,
        view=view,
        engines=catalog.engines,
        available_engines=roles if engine == "auto" else frozenset(ENGINES),
        require_pinned=False,
        siblings=subject.siblings,
        layouts=subject.layouts,
        calibration=calibration_by_card(catalog),
    )
    candidates = evaluate(request)
    best = choose(candidates, prefer)
    if as_json:
        document = {
            "selected": None if best is None else best.as_dict(),
            "candidates": [item.as_dict() for item in candidates],
        }
        click.echo(json.dumps(document, indent=2))
    else:
        _print_table(request, candidates, best)
        for note in notes:
            click.echo(f"note: {note}", err=True)
    if best is None:
        if not as_json:
            error = nothing_fits(request, candidates)
            click.echo(f"Nothing fits. {_with_options(error.remedy or '')}", err=True)
        sys.exit(EXIT_NOTHING_FITS)
    sys.exit(EXIT_FITS)


def subject_of(model: str, catalog: Catalog, endpoint: str | None = None) -> Subject:
    """Return the model that MODEL names: a catalog id, a GGUF file, a model's directory or a hub id."""
    if not model.strip():
        raise FleetfitError(
            "No model is named.",
            code="model_not_named",
            remedy="Name a catalog id (`fleetfit catalog list`), a .gguf file, a model's directory or a hub id.",
        )
    if model in catalog.entries:
        return _catalog_subject(catalog.entries[model], catalog)
    path = Path(model)
    if model.endswith(".gguf"):
        return _gguf_subject(path)
    try:
        is_directory = path.is_dir()
    except OSError:  # Longer than a path can be, and so no directory.
        is_directory = False
    if is_directory:
        return _directory_subject(path)
    for entry in catalog.entries.values():
        if REPOSITORY.match(model) and any(item.repository == model for item in entry.variants):
            return _catalog_subject(entry, catalog)
    if REPOSITORY.match(model):
        try:
            return _hub_subject(model, endpoint)
        except FleetfitError as error:
            near = near_names(model, catalog.entries)
            if not near or error.code not in ("hub_unreachable", "hub_not_found", "hub_refused"):
                raise
            raise FleetfitError(
                error.message,
                code=error.code,
                remedy=f"{error.remedy} The catalog has {' and '.join(near)}.",
            ) from None
    return _catalog_subject(catalog.entry(model), catalog)


def _catalog_subject(entry: CatalogEntry, catalog: Catalog) -> Subject:
    return Subject(entry, {}, True, catalog.siblings(entry))


def _gguf_subject(path: Path) -> Subject:
    header = read_gguf(path)
    layout = layout_from_gguf(header)
    shape = from_gguf(header.metadata, header.tensor_names, origin=str(path))
    check_header(shape, header)
    variant = Variant(
        name=layout.scheme,
        format="gguf",
        engines=("llama_cpp",),
        scheme=layout.scheme,
        quality_tier=tier_of_scheme(layout.scheme),
    )
    entry = _entry(path.name, shape, (variant,), str(path))
    return Subject(entry, {variant.name: layout}, False)


def _directory_subject(path: Path) -> Subject:
    config_path = path / "config.json"
    if not config_path.is_file():
        raise FleetfitError(
            f"{path} has no config.json.",
            code="config_json_missing",
            remedy="Name a model's directory, or a .gguf file.",
        )
    subject = _config_subject(read_config(config_path), path.resolve().name, str(config_path))
    if any(path.glob("*.safetensors")):
        scheme = subject.entry.variants[0].scheme
        layout = layout_from_safetensors(path, scheme)
        check_layers(subject.entry.shape, layout, str(path))
        subject.layouts[subject.entry.variants[0].name] = layout
    return subject


def _hub_subject(name: str, endpoint: str | None) -> Subject:
    hub = Hub(endpoint)
    repository = hub.repository(name)
    if repository.file("config.json") is None:
        return _gguf_repository_subject(hub, repository)
    try:
        config = json.loads(hub.small_file(repository, "config.json"))
    except (ValueError, RecursionError):
        raise FleetfitError(
            f"config.json of {name} is not JSON.", code="bad_config_json", remedy="Name another repository."
        ) from None
    return _config_subject(config, name, f"config.json of {name} at {repository.revision[:12]}")


def _gguf_repository_subject(hub: Hub, repository: Repository) -> Subject:
    """Return the model of a repository that has GGUF files alone, with the quantizations that it has."""
    described = describe_repository(hub, repository)
    variants = tuple(
        Variant(
            name=item["name"],
            format=item["format"],
            engines=tuple(item["engines"]),
            scheme=item["scheme"],
            quality_tier=tier_of_scheme(item["scheme"]),
        )
        for item in described.variants
    )
    return Subject(_entry(repository.name, described.shape, variants, described.origin), {}, False)


def _config_subject(config: Any, name: str, origin: str) -> Subject:
    shape = from_config_json(config, origin=origin)
    scheme = scheme_of_config(config)
    variants = [
        Variant(
            name=scheme,
            format="safetensors",
            engines=("vllm",),
            scheme=scheme,
            quality_tier=tier_of_scheme(scheme),
        )
    ]
    if scheme in ("BF16", "FP16", "F32"):
        variants += [
            Variant(
                name=item,
                format="gguf",
                engines=("llama_cpp",),
                scheme=item,
                quality_tier=tier_of_scheme(item),
                label="if converted and quantized with llama.cpp's own tools",
            )
            for item in LADDER
            if item in GGUF_SCHEMES
        ]
    return Subject(_entry(name, shape, tuple(variants), origin), {}, False)


def _entry(name: str, shape: ModelShape, variants: tuple[Variant, ...], origin: str) -> CatalogEntry:
    kv_types: tuple[str, ...] = tuple(LLAMA_KV_TYPES)
    source = ""
    if shape.architecture == "qwen2":
        # As in the catalog's own Qwen2.5 entries.
        kv_types = ("f32", "f16", "bf16", "q8_0")
        source = "4- and 5-bit keys wreck Qwen2 models (llama.cpp issue 21385)"
    return CatalogEntry(
        id=name,
        name=name,
        family=name,
        shape=shape,
        variants=variants,
        licence_needs_acceptance=False,
        kv_keys=kv_types,
        kv_values=kv_types,
        kv_source=source,
        origin=origin,
    )


def view_of_specs(
    specs: Sequence[str], ram_gib: float | None, catalog: Catalog, notes: list[str]
) -> HostView:
    """Return the host that the --gpu and --ram options describe; appends what was assumed to ``notes``.

    Raises :class:`FleetfitError`: ``unknown_gpu``, ``bad_gpu_spec``, ``bad_ram``.
    """
    assumed_ram = ram_gib is None
    if ram_gib is None:
        ram_gib = ASSUMED_RAM_GIB
    if not 0 < ram_gib <= 1 << 20:
        raise FleetfitError(
            f"--ram is {ram_gib:g}; it must be a positive number of GiB.",
            code="bad_ram",
            remedy="Correct --ram.",
        )
    ram_bytes = int(ram_gib * GIB)
    cards = cards_of(catalog.gpus)
    devices: list[DeviceBudget] = []
    for spec in specs:
        if spec.strip().casefold() == "cpu":
            if len(specs) > 1:
                raise FleetfitError(
                    "cpu stands for a host without GPUs and cannot be combined with cards.",
                    code="bad_gpu_spec",
                    remedy="Leave out cpu: RAM counts on every host.",
                )
            continue
        device = device_of_spec(spec, len(devices), cards, catalog, notes)
        if device.memory_kind == "unified":
            # Such a device has no memory of its own: the host's RAM is the device's.
            ram_bytes = max(ram_bytes, device.total_bytes)
        devices.append(device)
    unified = [device for device in devices if device.memory_kind == "unified"]
    if unified:
        notes.append(
            f"{unified[0].name} has no memory of its own: {format_gib(ram_bytes)} are the host's RAM and its own"
        )
    elif assumed_ram:
        notes.insert(0, f"{ASSUMED_RAM_GIB:g} GiB of RAM assumed (--ram)")
    return HostView(
        devices=tuple(devices),
        host=HostBudget(ram_total_bytes=ram_bytes),
        threads=1,
        driver_version=ASSUMED_DRIVER,
        ram_bandwidth_bytes_per_s=DEFAULT_RAM_BANDWIDTH_BYTES_PER_S,
        ram_bandwidth_source="assumed: two channels of DDR4-3200",
    )


def calibration_by_card(catalog: Catalog) -> tuple[Mapping[str, Any], ...]:
    """Return the calibration's records under the names that the catalog gives cards, not NVML's."""
    names = {folded.casefold(): card.name for card in cards_of(catalog.gpus) for folded in card.nvml_names}
    return tuple(
        {**record, "gpu": names.get(str(record["gpu"]).casefold(), record["gpu"])}
        for record in catalog.calibration
    )


def device_of_spec(
    spec: str, index: int, cards: Sequence[Card], catalog: Catalog, notes: list[str]
) -> DeviceBudget:
    """Return the device of one SPEC; its id is gpu0, gpu1 …"""
    if not spec.isprintable():
        raise _bad_spec(spec, "it has characters that cannot be printed")
    name, *numbers = [part.strip() for part in spec.split(":")]
    by_name = {folded.casefold(): card for card in cards for folded in (card.name, *card.nvml_names)}
    card = by_name.get(name.casefold())
    if not numbers and card is None:
        # "H100 80GB" is nearer to "H100 SXM" than to "A100 80GB", for its first word is a model's.
        first = name.casefold().partition(" ")[0]
        near = [card.name for card in cards if card.name.casefold().partition(" ")[0] == first][:3]
        if not any(character.isdigit() for character in first) or not near:
            near = near_names(name, [card.name for card in cards])
        raise FleetfitError(
            f"The catalog has no card {name!r}.",
            code="unknown_gpu",
            remedy=(f"Did you mean {' or '.join(near)}? " if near else "")
            + f"A SPEC is {SPEC_FORM}; catalog/gpus.yml lists the cards.",
        )
    if len(numbers) > 3 or not name:
        raise _bad_spec(spec, "it has too many parts" if name else "it has no name")
    total_mib = _mib(spec, "TOTAL_MIB", numbers[0]) if numbers else (card.total_mib if card else 0)
    if total_mib < 1:
        raise _bad_spec(spec, f"TOTAL_MIB is {total_mib}")
    total = total_mib * MIB
    capability = card.compute_capability if card else None
    if len(numbers) > 2:
        capability = numbers[2]
        if not _CAPABILITY.fullmatch(capability):
            raise _bad_spec(spec, f"COMPUTE_CAPABILITY is {capability!r}, not like 8.9")
    if capability is None:
        capability = ASSUMED_COMPUTE_CAPABILITY
        notes.append(
            f"compute capability {capability} assumed for {name} (NAME:TOTAL:FREE:CAPABILITY tells it)"
        )
    if card is not None and card.reserved_mib is not None and (not numbers or total_mib == card.total_mib):
        reserved = card.reserved_mib * MIB
    elif card is not None and card.memory_kind == "unified":
        reserved = 0
    else:
        reserved = unseen_reserved_bytes(catalog.gpus, total)
        if len(numbers) < 2:
            notes.append(
                f"{format_size(reserved)} of {name} taken as the driver's own: not known for this card"
            )
    foreign = 0
    if len(numbers) > 1:
        free = _mib(spec, "FREE_MIB", numbers[1]) * MIB
        if free > total:
            raise _bad_spec(spec, f"FREE_MIB {numbers[1]} is more than TOTAL_MIB {total_mib}")
        reserved = min(reserved, total - free)
        foreign = total - reserved - free
    return DeviceBudget(
        id=f"gpu{index}",
        name=card.name if card else name,
        total_bytes=total,
        reserved_bytes=reserved,
        foreign_bytes=foreign,
        memory_kind=card.memory_kind if card else "dedicated",
        compute_capability=capability,
        bandwidth_bytes_per_s=card.bandwidth_bytes_per_s if card else None,
        decode=decode_efficiency(catalog.gpus, "llama_cpp", capability),
    )


def _mib(spec: str, what: str, text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise _bad_spec(spec, f"{what} is {text!r}, not a whole number of MiB")
    value = int(text)
    if not 0 <= value <= MAX_TOTAL_MIB:
        raise _bad_spec(spec, f"{what} is {value}, not from 0 to {MAX_TOTAL_MIB}")
    return value


def _bad_spec(spec: str, problem: str) -> FleetfitError:
    return FleetfitError(
        f"--gpu {spec!r} cannot be read: {problem}.", code="bad_gpu_spec", remedy=f"A SPEC is {SPEC_FORM}."
    )


def _check_positive(option: str, value: int, maximum: int) -> None:
    if not 1 <= value <= maximum:
        raise FleetfitError(
            f"{option} is {value}; it must be a whole number from 1 to {maximum}.",
            code="bad_option",
            remedy=f"Correct {option}.",
        )


def memory_bar(item: Candidate) -> Text:
    """Return a bar of the place with the least room: one letter a share, dots for what stays free."""
    places = item.device_terms() or [item.estimate.host.as_dict()]
    terms = max(places, key=lambda place: int(place["total"]) - int(place["budget"]))
    budget = max(int(terms["budget"]), 1)
    bar = Text()
    drawn = 0
    cumulated = 0
    for name in _LETTERS:
        cumulated += int(terms[name])
        end = min(BAR_WIDTH, round(BAR_WIDTH * cumulated / budget))
        bar.append(_LETTERS[name] * (end - drawn), style=_COLOURS[name])
        drawn = max(drawn, end)
    bar.append("." * (BAR_WIDTH - drawn), style="dim")
    if int(terms["total"]) > budget:
        bar.append(">", style="bold red")
    return bar


def _print_table(request: Request, candidates: Sequence[Candidate], best: Candidate | None) -> None:
    # Into a file or a pipe, wide enough for whole lines.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    policy = request.policy
    devices = ", ".join(f"{item.name} ({format_gib(item.budget)})" for item in request.view.devices)
    console.print(
        f"{request.entry.id} on {devices or 'the CPU'}, {policy.slots} x {policy.min_context_tokens} tokens, "
        f"KV {policy.kv_type}, host RAM {format_gib(request.view.host.budget)}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("  engine", "variant", "memory", "GiB", "context", "tok/s", ""):
        right = title in ("GiB", "context", "tok/s")
        table.add_column(title, justify="right" if right else "left", no_wrap=bool(title), overflow="fold")
    reasons: dict[str, list[str]] = {}
    for item in candidates:
        speed = item.expected_tokens_per_s
        verdict = "fits"
        if item.rejected is not None:
            verdict = item.rejected.code
            reasons.setdefault(item.rejected.reason, []).append(f"{item.engine} {item.variant.name}")
        elif item.engine == "llama_cpp" and request.view.devices and not item.devices:
            verdict = "on the CPU alone"
        elif item.devices and not item.resident:
            verdict = f"{item.gpu_layers} of {request.entry.shape.layers + 1} layers on GPU"
        table.add_row(
            f"{'*' if item is best else ' '} {item.engine}",
            item.variant.name,
            memory_bar(item),
            f"{item.estimate.total.total / GIB:.1f}",
            str(item.max_context_tokens or "-"),
            "-" if speed is None else f"{speed:.{0 if speed >= 10 else 1}f}",
            verdict,
            style="bold green" if item is best else "dim" if item.rejected else "",
        )
    console.print(table)
    console.print(
        "W weights, K KV cache, C compute, o overhead, m margin: of the fullest place; GiB: of all places; "
        "context: the most tokens per slot that fit; tok/s: expected, one request",
        style="dim",
    )
    for reason, names in reasons.items():
        console.print(Text(f"{', '.join(names)}: {_with_options(reason)}"))


def _with_options(text: str) -> str:
    """Return the sentence with this command's options in place of the inventory's variables."""
    for variable, option in _OPTIONS.items():
        text = text.replace(f"{variable}=", f"{option} ").replace(variable, option)
    return text
