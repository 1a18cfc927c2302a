"""The plan of one host: what is deployed and why, as data (contract 4); sticky from one run to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from .catalog_entry import digest_of
from .cpu_mapping import map_to_cpu
from .errors import FleetfitError
from .host_facts import facts_digest
from .host_view import view_of_facts
from .lora import adapters_for, layout_with_adapters, plan_adapters, vllm_rank
from .policy import Policy
from .selection import (
    Candidate,
    NothingFitsError,
    Request,
    choose,
    computes_natively,
    evaluate,
    layout_of,
    nothing_fits,
)
from .speed import LLAMA_CPP_CPU, LLAMA_CPP_GPU, vllm_efficiency
from .units import format_gib

SCHEMA_VERSION = 1
# A choice with layers in RAM that another variant beats by this factor says so.
MUCH_FASTER = 1.5


def previous_of(plan: Optional[Mapping[str, Any]]) -> Optional[dict[str, Any]]:
    """Return what a next plan needs of the last one: its policy, and what it deployed.

    Raises ``plan_schema_version`` for a plan of an unknown version; None where there is no plan.
    """
    if not plan:
        return None
    if plan.get("schema_version") != SCHEMA_VERSION:
        raise FleetfitError(
            f"The host's last plan has schema_version {plan.get('schema_version')!r}; this fleetfit reads "
            f"version {SCHEMA_VERSION}.",
            code="plan_schema_version",
            remedy="Use the fleetfit that wrote it, or plan anew with fleetfit_replan=true.",
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "policy": dict(plan.get("policy") or {}),
        "deployments": [
            {key: item.get(key) for key in ("engine", "model", "variant")}
            for item in plan.get("deployments") or ()
        ],
    }


def make_plan(
    request: Request,
    facts: Mapping[str, Any],
    *,
    catalog_digest: str,
    previous: Optional[Mapping[str, Any]] = None,
) -> dict[str, Any]:
    """Return the plan of one host; same inputs, same bytes.

    ``previous`` is the last plan (or :func:`previous_of` it). A host keeps its engine and variant while
    they fit and its policy is unchanged, unless ``policy.replan``. Raises
    :class:`.selection.NothingFitsError`.
    """
    policy = request.policy
    candidates = evaluate(request)
    best = choose(candidates, policy.prefer)
    if best is None:
        raise nothing_fits(request, candidates)
    kept = None if policy.replan else _kept(candidates, policy, previous)
    if kept is not None and best.resident and not kept.resident:
        # It would fit only with layers in RAM: kept on these terms, the host would silently be slow.
        kept = None
    chosen = kept or best
    sticky = kept is not None and kept is not best
    return {
        "schema_version": SCHEMA_VERSION,
        "model": request.entry.id,
        "policy": policy.as_dict(),
        "facts_digest": facts_digest(dict(facts)),
        "catalog_digest": catalog_digest,
        "deployments": [deployment_of(request, chosen, facts)],
        "candidates": [item.as_dict() for item in candidates],
        "available": _available(best, policy) if sticky else None,
        "sticky": sticky,
        "reason": reason_of(chosen, candidates, policy, sticky=sticky, gpus=bool(request.view.devices)),
    }


def plan_host(
    facts: Mapping[str, Any],
    policy: Policy,
    *,
    entry: Any,
    gpus: Mapping[str, Any],
    engines: Mapping[str, Any],
    available_engines: frozenset[str],
    siblings: Sequence[Any] = (),
    calibration: Sequence[Mapping[str, Any]] = (),
    previous: Optional[Mapping[str, Any]] = None,
    require_pinned: bool = True,
) -> dict[str, Any]:
    """Return the plan of a host from its facts; see :func:`make_plan` and
    :func:`.host_view.view_of_facts`."""
    request = Request(
        entry=entry,
        policy=policy,
        view=view_of_facts(facts, policy, gpus),
        engines=engines,
        available_engines=available_engines,
        require_pinned=require_pinned,
        siblings=tuple(siblings),
        calibration=tuple(calibration),
    )
    return make_plan(
        request,
        facts,
        catalog_digest=catalog_digest(entry.digest, gpus, engines, calibration),
        previous=None if policy.replan else previous_of(previous),
    )


def catalog_digest(
    entry_digest: str,
    gpus: Mapping[str, Any],
    engines: Mapping[str, Any],
    calibration: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the sha256 over everything of the catalog that a plan depends on."""
    return digest_of([entry_digest, gpus, engines, list(calibration)])


def deployment_of(request: Request, chosen: Candidate, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan's deployment of a candidate."""
    entry, variant, policy = request.entry, chosen.variant, request.policy
    deployment: dict[str, Any] = {
        "engine": chosen.engine,
        "engine_version": str(request.engines["engines"][chosen.engine]["version"]),
        "model": entry.id,
        "variant": variant.name,
        "format": variant.format,
        "scheme": variant.scheme,
        "label": variant.label,
        "served_model_name": entry.id,
        "repository": variant.repository,
        "revision": variant.revision,
        "quality_tier": variant.quality_tier,
        "files": [item.as_dict() for item in variant.files],
        "waivers": list(variant.waivers),
        "adapters": plan_adapters(chosen.engine, policy.lora_adapters, entry),
        "device_uuids": [device.id for device in chosen.devices],
        "settings": dict(chosen.settings),
        "chat_template": entry.chat_template,
        "context_tokens": chosen.context_tokens,
        "slots": chosen.slots,
        "max_context_tokens": chosen.max_context_tokens,
        "memory_bytes": chosen.estimate.total.as_dict(),
        "devices": chosen.device_terms(),
        "host": chosen.estimate.host.as_dict(),
        "sources": sources_of(request, chosen),
        "roofline_tokens_per_s": chosen.roofline_tokens_per_s,
        "expected_tokens_per_s": chosen.expected_tokens_per_s,
        "cpu_mapping": None,
    }
    if policy.simulated_gpus:
        deployment["cpu_mapping"] = map_to_cpu(deployment, facts, entry.shape_of(variant))
    return deployment


def sources_of(request: Request, chosen: Candidate) -> dict[str, str]:
    """Return where every number of the plan comes from, in words."""
    entry, variant = request.entry, chosen.variant
    layout = request.layouts.get(variant.name) or layout_of(entry, variant)
    adapters = adapters_for(chosen.engine, request.policy.lora_adapters)
    weights = layout.source
    if adapters and chosen.engine == "llama_cpp":
        weights = layout_with_adapters(layout, [item.file_bytes for item in adapters]).source
    elif adapters:
        weights += f"; {len(adapters)} LoRA slots of rank {vllm_rank(adapters)}"
    ours = "compared with llama.cpp's own accounting (llama-fit-params)"
    from_vllm = "formula from vLLM's source and logged figures, not run"
    llama_cpp = chosen.engine == "llama_cpp"
    unknown = [device.name for device in chosen.devices if not device.bandwidth_bytes_per_s]
    sources = {
        "weights": weights,
        "kv_cache": f"shape of {entry.name}, {chosen.slots} slots of {chosen.context_tokens} tokens; "
        + (ours if llama_cpp else from_vllm),
        "compute": f"upper bound {ours}" if llama_cpp else from_vllm,
        "overhead": "constant: CUDA context and libraries, above every figure seen",
        "margin": "5 % of the device within 512 to 1024 MiB, 512 more with a display; host: OS, chat page",
        "budget": "total - reserved - other programs' - the policy's reserve; host: RAM, or its limit",
        "quality_tier": variant.quality_source,
        "roofline_tokens_per_s": (
            f"unknown: no bandwidth is known of {', '.join(unknown)}"
            if unknown
            else "bytes read per token over memory bandwidth, short context"
        ),
        "expected_tokens_per_s": expected_source(request, chosen),
    }
    if not chosen.resident and llama_cpp:
        sources["ram_bandwidth"] = request.view.ram_bandwidth_source
    calibrated = request.calibration_notes(chosen.engine, variant.name)
    if calibrated:
        sources["overhead"] = sources["margin"] = "; ".join(calibrated)
    for number, note in enumerate(request.view.notes, 1):
        sources[f"note_{number}"] = note
    return sources


def expected_source(request: Request, chosen: Candidate) -> str:
    """Return what the expected speed rests on: measurements of such cards, or the engine's constant."""
    if chosen.engine == "llama_cpp":
        known = [device.decode or LLAMA_CPP_GPU for device in chosen.devices] or [LLAMA_CPP_CPU]
        if chosen.devices and not chosen.resident:
            known.append(LLAMA_CPP_CPU)
    else:
        native = computes_natively(request.engines, chosen.variant, chosen.devices)
        known = [vllm_efficiency(chosen.variant.scheme, native=native)]
    return "one stream, short context; " + "; ".join(dict.fromkeys(item.source for item in known))


def reason_of(
    chosen: Candidate,
    candidates: Sequence[Candidate],
    policy: Policy,
    *,
    sticky: bool = False,
    gpus: bool = False,
) -> str:
    """Return one sentence: what is served and why this and nothing better; ``gpus``: the host has some."""
    where = _place(chosen)
    what = f"{chosen.variant.name} with {chosen.engine} on {where}"
    if sticky:
        return f"{what}: kept from the last plan, since it still fits and the policy is unchanged."
    better = [
        item
        for item in candidates
        if item is not chosen
        and (item.variant.tier_rank, item.low_quality_rank)
        < (chosen.variant.tier_rank, chosen.low_quality_rank)
    ]
    wanted = {
        "quality": "the best quality",
        "speed": "the fastest",
        "context": "the longest context",
    }[policy.prefer]
    on_gpus = sum(terms.total for terms in chosen.estimate.devices)
    need = (
        f"{format_gib(on_gpus)} of GPU memory"
        if on_gpus
        else f"{format_gib(chosen.estimate.host.total)} of RAM"
    )
    first = f"{what}: {wanted} that fits {policy.slots} x {policy.min_context_tokens} tokens, needing {need}"
    hurdles = []
    if gpus and not chosen.devices:
        hurdles.append("the GPU budget has no room for any layer of it")
    for item in better:
        if item.rejected is not None:
            if item.rejected.code in ("engine_not_available", "no_gpu"):
                continue
            hurdles.append(f"{item.variant.name} is out, {item.rejected.reason}")
        elif chosen.resident and not item.resident:
            hurdles.append(f"{item.variant.name} would leave layers in RAM")
    if gpus and not chosen.resident:
        hurdles += _faster_than(chosen, candidates)
    if not hurdles:
        return f"{first}."
    return f"{first}; {'; '.join(dict.fromkeys(hurdles))}."


def _faster_than(chosen: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """Return what would be much faster than a choice that has layers in RAM, and how to ask for it."""
    speed = chosen.expected_tokens_per_s
    fitting = [item for item in candidates if item.fits and item.expected_tokens_per_s]
    if not speed or not fitting:
        return []
    fastest = max(fitting, key=lambda item: item.expected_tokens_per_s or 0.0)
    factor = (fastest.expected_tokens_per_s or 0.0) / speed
    if factor < MUCH_FASTER:
        return []
    return [
        f"about {speed:.1f} tokens/s, {fastest.variant.name} would be {factor:.1f} times as fast "
        "(fleetfit_min_tokens_per_s, fleetfit_prefer)"
    ]


def _place(chosen: Candidate) -> str:
    if not chosen.devices:
        return "the CPU"
    names = " + ".join(device.name for device in chosen.devices)
    return names if chosen.resident else f"{names} with layers in RAM"


def _kept(
    candidates: Sequence[Candidate], policy: Policy, previous: Optional[Mapping[str, Any]]
) -> Optional[Candidate]:
    """Return the candidate of the last plan, where it still fits and the policy says the same."""
    if not previous or not previous.get("deployments"):
        return None
    now = policy.as_dict()
    before = previous.get("policy") or {}
    if any(key in now and now[key] != value for key, value in before.items()):
        return None
    last = previous["deployments"][0]
    for item in candidates:
        if item.fits and (item.engine, item.variant.name) == (last.get("engine"), last.get("variant")):
            return item
    return None


def _available(best: Candidate, policy: Policy) -> dict[str, Any]:
    return {
        "engine": best.engine,
        "variant": best.variant.name,
        "reason": f"{best.variant.name} on {best.engine}, better by fleetfit_prefer={policy.prefer}",
    }


__all__ = ["NothingFitsError", "make_plan", "plan_host", "previous_of"]
