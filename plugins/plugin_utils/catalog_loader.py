"""Read the catalog on the controller: YAML, checked against schemas, extended by overlays and pins."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from ..module_utils.catalog_entry import ENGINES, CatalogEntry, entry_from_dict, merge_overlay, merge_pins
from ..module_utils.errors import FleetfitError

CATALOG_DIR = Path(__file__).resolve().parents[2] / "catalog"
SCHEMA_DIR = CATALOG_DIR / "schemas"


@dataclass(frozen=True)
class Catalog:
    """All entries by id, and what is known of cards and engines."""

    entries: Mapping[str, CatalogEntry]
    gpus: Mapping[str, Any]
    engines: Mapping[str, Any]
    calibration: tuple[Mapping[str, Any], ...] = ()

    def entry(self, model: str) -> CatalogEntry:
        """Return the entry of that id; raises ``unknown_model`` offering near names."""
        if model in self.entries:
            return self.entries[model]
        near = near_names(model, self.entries)
        raise FleetfitError(
            f"The catalog has no model {model!r}.",
            code="unknown_model",
            remedy=(f"Did you mean {' or '.join(near)}? " if near else "")
            + "`fleetfit catalog list` shows all; fleetfit_catalog_dirs adds your own.",
        )

    def siblings(self, entry: CatalogEntry) -> tuple[CatalogEntry, ...]:
        """Return the other entries of the same family, largest first."""
        others = [
            item for item in self.entries.values() if item.family == entry.family and item.id != entry.id
        ]
        return tuple(sorted(others, key=lambda item: (-item.parameters, item.id)))


def near_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` known names that are written like ``name``: those that begin with it first."""
    by_folded = {item.casefold(): item for item in known}
    folded = name.casefold().rsplit("/", 1)[-1]
    near = []
    if len(folded) >= 3:
        near = sorted(item for item in by_folded if item.startswith(folded))
    near += difflib.get_close_matches(folded, sorted(by_folded), n=count, cutoff=0.6)
    if not near and len(folded) >= 3:
        near = sorted(item for item in by_folded if folded in item)
    return [by_folded[item] for item in list(dict.fromkeys(near))[:count]]


def load_catalog(
    overlay_dirs: Sequence[str | Path] = (), *, catalog_dir: str | Path | None = None
) -> Catalog:
    """Return the catalog with overlays (``fleetfit_catalog_dirs``, later ones win) and pins applied.

    A directory holds entries (``*.yml``, or ``models/*.yml``), ``templates/`` and ``pins/<id>.yml``. The
    result is cached as long as no file's size or time changes. Raises :class:`FleetfitError` with the
    file's name.
    """
    base = Path(catalog_dir) if catalog_dir is not None else CATALOG_DIR
    directories = [base, *(Path(item).expanduser() for item in overlay_dirs)]
    for directory in directories:
        if not directory.is_dir():
            raise FleetfitError(
                f"The catalog directory {directory} does not exist.",
                code="catalog_dir_missing",
                remedy="Correct fleetfit_catalog_dirs.",
            )
    stamp = tuple(
        (str(path), path.stat().st_mtime_ns, path.stat().st_size)
        for directory in directories
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    )
    return _load(tuple(directories), stamp)


@lru_cache(maxsize=8)
def _load(directories: tuple[Path, ...], stamp: tuple[tuple[str, int, int], ...]) -> Catalog:
    merged: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    waiting: list[tuple[Path, dict[str, Any]]] = []
    for directory in directories:
        for path in _entry_files(directory):
            data = read_yaml(path)
            check_schema(data, "catalog_entry", path)
            _resolve_template(data, path)
            if "extends" in data:
                waiting.append((path, data))
                continue
            name = data["id"]
            if name in merged and Path(origins[name]).parent == path.parent:
                raise FleetfitError(
                    f"{path} and {origins[name]} both describe the model {name!r}.",
                    code="bad_catalog_entry",
                    remedy="Give one of them another id.",
                )
            merged[name] = data
            origins[name] = str(path)
    for path, overlay in waiting:
        base_id = overlay["extends"]
        if base_id not in merged:
            near = near_names(base_id, merged)
            raise FleetfitError(
                f"{path} extends the model {base_id!r}, which the catalog does not have.",
                code="unknown_model",
                remedy=f"Did you mean {' or '.join(near)}?" if near else "Correct `extends`.",
            )
        merged[base_id] = merge_overlay(merged[base_id], overlay, origin=str(path))
        origins[base_id] = f"{origins[base_id]}, extended by {path}"
    for directory in directories:
        for path in sorted((directory / "pins").glob("*.yml")):
            pins = read_yaml(path)
            check_schema(pins, "catalog_pins", path)
            if pins["id"] in merged:
                merged[pins["id"]] = merge_pins(merged[pins["id"]], pins, origin=str(path))
    entries = {name: entry_from_dict(data, origin=origins[name]) for name, data in sorted(merged.items())}
    gpus = read_yaml(CATALOG_DIR / "gpus.yml")
    check_schema(gpus, "gpus", CATALOG_DIR / "gpus.yml")
    engines = read_yaml(CATALOG_DIR / "engines.yml")
    check_schema(engines, "engines", CATALOG_DIR / "engines.yml")
    calibration: list[Mapping[str, Any]] = []
    for directory in directories:
        path = directory / "calibration.yml"
        if path.is_file():
            data = read_yaml(path)
            check_schema(data, "calibration", path)
            calibration += data["records"]
    return Catalog(
        entries=entries,
        gpus=gpus,
        engines=engines,
        calibration=tuple(calibration),
    )


def load_drivers(catalog_dir: str | Path | None = None) -> dict[str, Any]:
    """Return what is known of NVIDIA drivers (drivers.yml), checked against its schema."""
    path = (Path(catalog_dir) if catalog_dir is not None else CATALOG_DIR) / "drivers.yml"
    data = read_yaml(path)
    check_schema(data, "drivers", path)
    return data


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raises ``bad_yaml`` with the file's name and line."""
    try:
        with path.open(encoding="utf-8") as stream:
            data = yaml.load(stream, Loader=_safe_loader())  # noqa: S506 - it is the safe loader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FleetfitError(
            f"{path} is not valid YAML: {' '.join(str(error).split())}.",
            code="bad_yaml",
            remedy="Correct the file; it has to be text in UTF-8.",
        ) from None
    except OSError as error:
        raise FleetfitError(
            f"{path} cannot be read: {error.strerror}.",
            code="file_unreadable",
            remedy="Look at what is there, and at its permissions.",
        ) from None
    if not isinstance(data, dict):
        raise FleetfitError(f"{path} holds no mapping.", code="bad_yaml", remedy="Correct the file.")
    return data


def check_schema(data: Mapping[str, Any], schema: str, origin: str | Path) -> None:
    """Raise ``schema_mismatch`` naming the file, the place in it and what is wrong there."""
    if data.get("schema_version") != 1:
        raise FleetfitError(
            f"{origin} has schema_version {data.get('schema_version')!r}; this fleetfit reads version 1.",
            code="catalog_schema_version",
            remedy="Use the file that belongs to this version, or update fleetfit.",
        )
    errors = sorted(
        _validator(schema).iter_errors(data), key=lambda error: list(map(str, error.absolute_path))
    )
    if not errors:
        return
    # A mistake in a value says more than the form that the whole does not have because of it.
    error = max(errors, key=lambda item: len(item.absolute_path))
    while error.context:
        candidates = error.context
        if schema == "catalog_entry" and not error.absolute_path:
            # The forms at the top level, in the schema's order: a whole entry, and an overlay.
            form = 1 if "extends" in data else 0
            candidates = [item for item in candidates if item.schema_path[0] == form] or candidates
        error = min(candidates, key=lambda item: (-len(item.absolute_path), item.message))
    place = ".".join(str(part) for part in error.absolute_path) or "the top level"
    raise FleetfitError(
        f"{origin}: at {place}: {error.message}.",
        code="schema_mismatch",
        remedy=f"Correct the file; catalog/schemas/{schema}.json describes it.",
    )


@lru_cache(maxsize=16)
def _validator(schema: str) -> Any:
    with (SCHEMA_DIR / f"{schema}.json").open(encoding="utf-8") as stream:
        return Draft202012Validator(json.load(stream))


def _safe_loader() -> Any:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _entry_files(directory: Path) -> list[Path]:
    models = directory / "models"
    where = models if models.is_dir() else directory
    return [path for path in sorted(where.glob("*.yml")) if path.name not in ("calibration.yml",)]


def _resolve_template(data: dict[str, Any], path: Path) -> None:
    """Replace ``chat.template_file`` by the template's text."""
    chat = data.get("chat")
    if not chat or "template_file" not in chat:
        return
    chat = dict(chat)
    name = chat.pop("template_file")
    for candidate in (
        path.parent / name,
        path.parent / "templates" / name,
        path.parent.parent / "templates" / name,
    ):
        if candidate.is_file():
            chat["template"] = candidate.read_text(encoding="utf-8")
            data["chat"] = chat
            return
    raise FleetfitError(
        f"{path} names the chat template {name!r}, which is neither beside it nor in a templates directory.",
        code="chat_template_missing",
        remedy=f"Put the template at {os.path.join(path.parent, 'templates', name)}.",
    )


def available_engines(roles_dir: Path) -> frozenset[str]:
    """Return the engines that fleetfit can deploy: those with a role of their name."""
    return frozenset(name for name in ENGINES if (roles_dir / name).is_dir())


def check_schema_of_plan(plan: Mapping[str, Any]) -> None:
    """Raise ``schema_mismatch`` where a plan is not what catalog/schemas/plan.json says: a mistake of
    ours."""
    check_schema(plan, "plan", "the plan")
