"""Facts, cards and requests that the planning tests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.catalog_entry import (
    CatalogEntry,
    entry_from_dict,
    merge_overlay,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.host_view import cards_of, view_of_facts
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import policy_from_variables
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import Request
from ansible_collections.fleetfit.llm.plugins.module_utils.units import GIB, MIB
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import (
    CATALOG_DIR,
    load_catalog,
    read_yaml,
)

CATALOG = load_catalog()
CARDS = {card.name: card for card in cards_of(CATALOG.gpus)}


def accelerator(card_name: str, *, index: int = 0, **changes: Any) -> dict[str, Any]:
    """Return a catalog's card as a host's facts show it."""
    card = CARDS[card_name]
    reserved = None if card.reserved_mib is None else card.reserved_mib * MIB
    return {
        "uuid": f"GPU-{index}",
        "index": index,
        "name": (card.nvml_names or (card.name,))[0],
        "compute_capability": card.compute_capability,
        "memory_total_bytes": card.total_mib * MIB,
        "memory_reserved_bytes": reserved,
        "memory_kind": card.memory_kind,
        "mig_enabled": False,
        "mig_profile": None,
        "mig_parent": None,
        "display": False,
        **changes,
    }


def facts(
    accelerators: Sequence[Mapping[str, Any]] = (),
    *,
    ram_gib: float = 32,
    driver: str = "580.95.05",
    foreign: Mapping[str, int] | None = None,
    problems: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the facts of a host with these accelerators."""
    return {
        "schema_version": 1,
        "stable": {
            "machine_id": "0" * 32,
            "ram_total_bytes": int(ram_gib * GIB),
            "cgroup_limit_bytes": None,
            "cpu": {"threads": 8},
            "driver": {"version": driver} if accelerators else None,
            "accelerators": [dict(item) for item in accelerators],
        },
        "foreign_bytes": dict(foreign or {}),
        "live": {},
        "problems": [dict(item) for item in problems],
    }


def cards(*names: str) -> list[dict[str, Any]]:
    """Return catalog cards as accelerators, in order."""
    return [accelerator(name, index=index) for index, name in enumerate(names)]


def pinned_variant(scheme: str) -> dict[str, Any]:
    """Return a GGUF variant whose file is pinned (to nothing that exists)."""
    return {
        "name": scheme,
        "format": "gguf",
        "engines": ["llama_cpp"],
        "scheme": scheme,
        "repository": "lab/lab",
        "revision": "0" * 40,
        "files": [{"name": f"model-{scheme}.gguf", "size": 1, "sha256": "0" * 64}],
    }


def lab_entry() -> CatalogEntry:
    """Return the lab's model with the quantizations that the lab makes."""
    base = read_yaml(CATALOG_DIR / "models" / "smollm2-135m-instruct.yml")
    overlay = {
        "schema_version": 1,
        "extends": base["id"],
        "variants": [pinned_variant("Q4_K_M"), pinned_variant("Q8_0")],
    }
    return entry_from_dict(merge_overlay(base, overlay, origin="test"), origin="test")


def request(
    model: str | CatalogEntry,
    host: Mapping[str, Any],
    *,
    engines: Sequence[str] = ("llama_cpp",),
    require_pinned: bool = False,
    **variables: Any,
) -> Request:
    """Return a request to plan ``model`` on ``host``; keywords are policy variables without ``fleetfit_``."""
    entry = CATALOG.entry(model) if isinstance(model, str) else model
    policy = policy_from_variables(
        {"fleetfit_model": entry.id, **{f"fleetfit_{name}": value for name, value in variables.items()}}
    )
    return Request(
        entry=entry,
        policy=policy,
        view=view_of_facts(host, policy, CATALOG.gpus),
        engines=CATALOG.engines,
        available_engines=frozenset(engines),
        require_pinned=require_pinned,
        siblings=CATALOG.siblings(entry),
    )
