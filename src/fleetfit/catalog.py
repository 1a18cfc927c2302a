"""`fleetfit catalog`: look at the models of the catalog, pin their files, check what was written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.catalog_entry import (
    CatalogEntry,
    Variant,
    entry_from_dict,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.model_files import check_names
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import layout_of
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import GGUF_SCHEMES, parameter_count
from ansible_collections.fleetfit.llm.plugins.module_utils.units import format_size
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import (
    CATALOG_DIR,
    check_schema,
    load_catalog,
    near_names,
    read_yaml,
)
from rich.console import Console
from rich.table import Table

from .described import SIZE_TOLERANCE
from .entry_text import DEFAULT_OVERLAY, Wishes, describe, entry_of, text_of, unknown_facts
from .hub import Hub, Repository, check_repository

_directories = click.option(
    "--catalog-dir", "catalog_dirs", multiple=True, type=click.Path(), help="An overlay directory."
)


@click.group()
def catalog() -> None:
    """Look at catalog entries, pin their files, check them."""


@catalog.command(name="list")
@_directories
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def list_entries(catalog_dirs: tuple[str, ...], as_json: bool) -> None:
    """List the models, and how many of their variants are pinned."""
    found = load_catalog(list(catalog_dirs))
    if as_json:
        click.echo(json.dumps([_summary(entry) for entry in found.entries.values()], indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("id", "licence", "context", "variants", "pinned"):
        table.add_column(title, justify="right" if title in ("context", "variants", "pinned") else "left")
    for entry in sorted(found.entries.values(), key=lambda item: (item.family, item.parameters)):
        pinned = sum(variant.pinned for variant in entry.variants)
        table.add_row(
            entry.id, entry.licence, str(entry.max_context_tokens), str(len(entry.variants)), str(pinned)
        )
    Console(highlight=False).print(table)


@catalog.command()
@click.argument("model")
@_directories
@click.option("--json", "as_json", is_flag=True, help="Print for programs.")
def show(model: str, catalog_dirs: tuple[str, ...], as_json: bool) -> None:
    """Show one model: its shape, its variants with sizes, and where each number comes from."""
    entry = load_catalog(list(catalog_dirs)).entry(model)
    if as_json:
        click.echo(json.dumps(_summary(entry), indent=2))
        return
    click.echo(f"{entry.id} ({entry.name}), {entry.parameters:,} parameters, licence {entry.licence}")
    click.echo(f"from {entry.origin}")
    click.echo(
        f"shape: {', '.join(f'{name} {value}' for name, value in entry.shape.as_dict().items() if value)}"
    )
    click.echo(f"context: {entry.native_context_tokens}, with extension {entry.max_context_tokens}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("variant", "tier", "engines", "size", "files"):
        table.add_column(title, justify="right" if title == "size" else "left")
    for variant in entry.variants:
        table.add_row(
            variant.name,
            variant.quality_tier,
            ", ".join(variant.engines),
            format_size(_bytes_of(entry, variant)),
            f"{len(variant.files)} pinned" if variant.pinned else f"not pinned ({variant.repository})",
        )
    Console(highlight=False).print(table)


@catalog.command()
@click.argument("model")
@click.argument("variants", nargs=-1)
@_directories
@click.option("--endpoint", help="The hub or a mirror of it (default: HF_ENDPOINT, else the public hub).")
@click.option("--revision", default="main", show_default=True, help="A branch, a tag or a commit to pin.")
@click.option(
    "--output-dir",
    type=click.Path(file_okay=False),
    help="Where pins/<model>.yml is written (default: the last --catalog-dir, else the catalog itself).",
)
def pin(
    model: str,
    variants: tuple[str, ...],
    catalog_dirs: tuple[str, ...],
    endpoint: str | None,
    revision: str,
    output_dir: str | None,
) -> None:
    """Fill in revision, sizes and checksums of MODEL's files (all VARIANTS, or those named) from a hub.

    They are written to pins/MODEL.yml, beside the entries, and entries stay as they were written. What was
    pinned before and is not named now stays.
    """
    found = load_catalog(list(catalog_dirs))
    entry = found.entry(model)
    chosen = [entry.variant(name) for name in variants] or [
        item for item in entry.variants if item.files_match and item.repository
    ]
    if not chosen:
        raise FleetfitError(
            f"{entry.id} has no variant to pin: all list their files themselves ({entry.origin}).",
            code="nothing_to_pin",
            remedy="Change the entry, or name a variant.",
        )
    directory = Path(output_dir or (catalog_dirs[-1] if catalog_dirs else CATALOG_DIR))
    hub = Hub(endpoint)
    repositories: dict[str, Repository] = {}
    pins: dict[str, Any] = {}
    for variant in chosen:
        if not variant.repository:
            raise FleetfitError(
                f"{variant.name} of {entry.id} names no repository.",
                code="repository_missing",
                remedy=f"Add `repository` and `files_match` to it ({entry.origin}).",
            )
        if variant.repository not in repositories:
            repositories[variant.repository] = hub.repository(variant.repository, revision)
        pins[variant.name] = pin_of(entry, variant, hub, repositories[variant.repository])
        files = pins[variant.name]["files"]
        size = sum(item["size"] for item in files)
        click.echo(f"{variant.name}: {len(files)} file{'s' if len(files) > 1 else ''}, {format_size(size)}")
    path = directory / "pins" / f"{entry.id}.yml"
    write_pins(path, entry.id, pins)
    click.echo(f"written to {path}")


@catalog.command()
@click.argument("model")
@_directories
@click.option("--endpoint", help="The hub or a mirror of it (default: HF_ENDPOINT, else the public hub).")
@click.option(
    "--revision", default="main", show_default=True, help="A branch, a tag or a commit of a hub id."
)
@click.option(
    "--output-dir",
    type=click.Path(file_okay=False),
    help=f"The overlay that gets the entry (default: the last --catalog-dir, else ./{DEFAULT_OVERLAY}).",
)
@click.option("--id", "model_id", metavar="ID", help="The entry's id (default: from the model's name).")
@click.option("--family", help="Whose smaller siblings are offered where it does not fit (default: its id).")
@click.option("--licence", help="The licence's id, where the source does not say it or says it wrongly.")
@click.option("--tool-call-parser", help="vLLM's parser of tool calls: hermes, llama3_json, mistral …")
@click.option("--repository", metavar="ORG/NAME", help="Where the hub has the files of a local model.")
@click.option("--force", is_flag=True, help="Replace an entry of that id.")
def add(
    model: str,
    catalog_dirs: tuple[str, ...],
    endpoint: str | None,
    revision: str,
    output_dir: str | None,
    model_id: str | None,
    family: str | None,
    licence: str | None,
    tool_call_parser: str | None,
    repository: str | None,
    force: bool,
) -> None:
    """Describe MODEL in an overlay of the catalog: a .gguf file, a config.json or its directory, or a hub id.

    What MODEL does not say of itself is named at the end, with the place to fill it in.
    """
    if repository is not None:
        check_repository(repository)
    described = describe(model, endpoint, revision, report=lambda text: click.echo(text, err=True))
    directory = Path(output_dir or (catalog_dirs[-1] if catalog_dirs else DEFAULT_OVERLAY))
    wishes = Wishes(model_id, family, licence, tool_call_parser, repository)
    document = entry_of(described, wishes)
    name = document["id"]
    folder = directory / "models" if (directory / "models").is_dir() else directory
    path = folder / f"{name}.yml"
    overlays = [Path(item) for item in catalog_dirs]
    others = load_catalog([*overlays, directory] if directory.is_dir() else overlays)
    if not force and (path.exists() or name in others.entries):
        where = str(path) if path.exists() else others.entries[name].origin
        raise FleetfitError(
            f"The catalog has a model {name!r} already ({where}).",
            code="entry_exists",
            remedy="Give this one another name with --id, or replace it with --force.",
        )
    check_schema(document, "catalog_entry", path)
    entry = entry_from_dict(document, origin=str(path))
    for problem in problems_of(entry):
        raise FleetfitError(
            f"{problem}.", code="bad_catalog_entry", remedy="Name another source of the model."
        )
    unknown = unknown_facts(described, document)
    write_atomically(path, text_of(document, described, unknown))
    names = ", ".join(variant.name for variant in entry.variants)
    click.echo(f"{name}: {entry.parameters:,} parameters, variants: {names}; from {described.origin}")
    click.echo(f"written to {path}")
    for sentence in described.left_out:
        click.echo(f"left out: {sentence}", err=True)
    for field, sentence in unknown:
        click.echo(f"to fill in: {field}: {sentence}", err=True)
    if not all(variant.pinned for variant in entry.variants):
        click.echo(f"next: fleetfit catalog pin {name} --catalog-dir {directory}", err=True)
    click.echo(f"planning reads it with fleetfit_catalog_dirs: [{directory.resolve()}]", err=True)


@catalog.command()
@_directories
def check(catalog_dirs: tuple[str, ...]) -> None:
    """Check every entry against its schema and the arithmetic of its shape."""
    found = load_catalog(list(catalog_dirs))
    problems = [problem for entry in found.entries.values() for problem in problems_of(entry)]
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        raise FleetfitError(
            f"{len(problems)} problems in {len(found.entries)} entries.",
            code="catalog_problems",
            remedy="Correct the entries named above.",
        )
    click.echo(
        f"{len(found.entries)} models, {sum(len(item.variants) for item in found.entries.values())} variants: ok"
    )


def pin_of(entry: CatalogEntry, variant: Variant, hub: Hub, repository: Repository) -> dict[str, Any]:
    """Return the pins of one variant: repository, revision and files with size and sha256.

    Raises :class:`FleetfitError`: ``no_file_matches`` naming near files, ``unsafe_model_file`` for files
    that can run code, ``size_implausible`` for files that cannot be this variant.
    """
    wanted = {item.name for item in variant.files}
    files = [
        item
        for item in repository.files
        if (variant.matches(item.name) if variant.files_match else item.name in wanted)
    ]
    weights = [item for item in files if item.name.endswith((".gguf", ".safetensors"))]
    if not weights:
        patterns = ", ".join(variant.files_match) or ", ".join(sorted(wanted))
        stem = (variant.files_match or tuple(wanted) or ("",))[0]
        near = near_names(stem, [item.name for item in repository.files])
        raise FleetfitError(
            f"No weights in {repository.name} match {patterns} ({variant.name} of {entry.id}).",
            code="no_file_matches",
            remedy=(f"It has {', '.join(near)}; c" if near else "C")
            + f"orrect files_match in {entry.origin}.",
        )
    check_names([item.name for item in files], variant.waivers, model=entry.id, origin=repository.name)
    pinned = [hub.pinned(repository, item) for item in sorted(files, key=lambda item: item.name)]
    total = sum(item.size or 0 for item in pinned if item.name.endswith((".gguf", ".safetensors")))
    expected = _bytes_of(entry, variant, from_files=False)
    if abs(total - expected) > SIZE_TOLERANCE * expected:
        raise FleetfitError(
            f"{variant.name} of {entry.id} in {repository.name} has {format_size(total)}, its shape and scheme "
            f"give {format_size(expected)}: these are not its files.",
            code="size_implausible",
            remedy=f"Correct repository, files_match, scheme or shape in {entry.origin}.",
        )
    return {
        "repository": repository.name,
        "revision": repository.revision,
        "files": [{"name": item.name, "size": item.size, "sha256": item.sha256} for item in pinned],
    }


def write_pins(path: Path, model: str, pins: Mapping[str, Any]) -> None:
    """Write pins atomically; variants that are not in ``pins`` keep what the file had."""
    document: dict[str, Any] = {"schema_version": 1, "id": model, "variants": {}}
    if path.is_file():
        document = read_yaml(path)
        check_schema(document, "catalog_pins", path)
    document["variants"] = {**document["variants"], **pins}
    check_schema(document, "catalog_pins", path)
    text = "# Written by fleetfit catalog pin.\n---\n" + yaml.safe_dump(document, sort_keys=False, width=120)
    write_atomically(path, text)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, and an interruption leaves the old."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def problems_of(entry: CatalogEntry) -> list[str]:
    """Return what the arithmetic of an entry says against it, a sentence each."""
    problems = []
    parameters = parameter_count(entry.shape)
    if parameters != entry.parameters:
        problems.append(f"{entry.origin}: parameters is {entry.parameters}, the shape has {parameters}")
    for scheme in entry.low_quality_order:
        if scheme not in GGUF_SCHEMES:
            problems.append(f"{entry.origin}: low_quality_order names the unknown scheme {scheme!r}")
    for variant in entry.variants:
        try:
            expected = _bytes_of(entry, variant, from_files=False)
        except FleetfitError as error:
            problems.append(f"{entry.origin}: {variant.name}: {error}")
            continue
        if variant.pinned:
            found = _bytes_of(entry, variant)
            if abs(found - expected) > SIZE_TOLERANCE * expected:
                problems.append(
                    f"{entry.origin}: {variant.name} has {found} bytes, its shape and scheme give {expected}"
                )
        elif not variant.files_match:
            problems.append(f"{entry.origin}: {variant.name} has neither pinned files nor files_match")
    return problems


def _bytes_of(entry: CatalogEntry, variant: Variant, *, from_files: bool = True) -> int:
    """Return the bytes of a variant's weights: of its pinned files, else by its shape and scheme."""
    if from_files and variant.pinned:
        return sum(item.size or 0 for item in variant.files if item.name.endswith((".gguf", ".safetensors")))
    return layout_of(entry, variant).file_bytes


def _summary(entry: CatalogEntry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "name": entry.name,
        "family": entry.family,
        "parameters": entry.parameters,
        "licence": entry.licence,
        "licence_needs_acceptance": entry.licence_needs_acceptance,
        "native_context_tokens": entry.native_context_tokens,
        "max_context_tokens": entry.max_context_tokens,
        "shape": entry.shape.as_dict(),
        "variants": [
            {
                "name": variant.name,
                "format": variant.format,
                "engines": list(variant.engines),
                "quality_tier": variant.quality_tier,
                "pinned": variant.pinned,
                "size_bytes": _bytes_of(entry, variant),
                "repository": variant.repository,
                "revision": variant.revision,
                "files": [item.as_dict() for item in variant.files],
                "label": variant.label,
            }
            for variant in entry.variants
        ],
        "origin": entry.origin,
        "sources": dict(entry.sources),
    }
