"""Choose engine, quantization and engine settings for one host: a pure function of facts, policy and catalog.

The order of the decision, in full:

1. Hard constraints, in the order of :data:`REJECTION_CODES`; the first that a candidate breaks is its reason.
2. A candidate that is wholly resident in GPU memory beats one that is not.
3. ``prefer: quality``: the better quality tier, then (below Q4_K_M) the model's own order, then the expected
   speed. ``prefer: speed`` puts the speed before the tier; ``prefer: context`` puts the longest context that
   would fit before both.
4. Where all of that is equal: the smaller total memory, then the catalog's order.

The context served is exactly the one asked for; what more would fit is reported and not taken. A KV type
other than the policy's is never chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any, Optional

from . import memory_llama_cpp as llama
from . import memory_vllm as vllm
from .calibration import calibrated, find_record
from .catalog_entry import QUALITY_TIERS, CatalogEntry, Variant
from .engine_args import llama_server_args, vllm_args
from .errors import FleetfitError
from .host_view import HostView, compute_capability_number, leading_number
from .lora import adapters_for, check_base_model, engine_problem, layout_with_adapters, vllm_rank
from .memory import DeviceBudget, Estimate, MemoryTerms
from .model_shape import ModelShape
from .placement import LlamaPlacer, Placement, longest_context
from .policy import Policy, check_min_context
from .speed import expected_tokens_per_s, roofline_tokens_per_s, vllm_efficiency
from .tensor_sizes import TensorLayout, layout_from_scheme, safetensors_layout
from .units import format_gib, format_size
from .vllm_wheels import Wheel, able_devices, gpu_problem, wheels_of

# Stable words for programs, in the order in which the constraints are checked.
REJECTION_CODES = (
    "engine_not_available",
    "format_not_supported",
    "licence_not_accepted",
    "below_min_quality_tier",
    "kv_type_not_supported",
    "kv_type_not_allowed",
    "adapter_format_not_readable",
    "adapter_rank_too_high",
    "rope_theta_unknown",
    "no_gpu",
    "mig_not_supported",
    "compute_capability_too_low",
    "driver_too_old",
    "parallelism_not_divisible",
    "does_not_fit",
    "too_slow",
    "speed_unknown",
    "not_pinned",
)
# vLLM refuses float16 for these (vllm/config/model.py: _FLOAT16_NOT_SUPPORTED_MODELS, numerical instability).
BFLOAT16_ONLY_ARCHITECTURES = frozenset({"gemma2", "gemma3"})
# vLLM serves more sequences than the policy asks for from the same pool; each costs 39 B x vocabulary.
VLLM_MIN_SEQUENCES = 16
# With more cards than this only the largest are tried, in one order.
VLLM_EXHAUSTIVE_DEVICES = 4
HOST = "host"


@dataclass(frozen=True)
class Rejection:
    """Why a candidate is not chosen; ``device`` is a device's id or ``host`` where memory was missing."""

    code: str
    reason: str
    device: Optional[str] = None
    short_by_bytes: Optional[int] = None

    def as_dict(self) -> dict[str, Any]:
        """Return the plan's form."""
        return {
            "code": self.code,
            "reason": self.reason,
            "device": self.device,
            "short_by_bytes": self.short_by_bytes,
        }


@dataclass(frozen=True)
class Candidate:
    """One engine with one variant on one host: placed, measured against every constraint, explained."""

    engine: str
    variant: Variant
    context_tokens: int
    slots: int
    kv_type_k: str
    kv_type_v: str
    max_context_tokens: int = 0
    devices: tuple[DeviceBudget, ...] = ()
    estimate: Estimate = field(default_factory=lambda: Estimate((), MemoryTerms()))
    gpu_layers: Optional[int] = None
    resident: bool = False
    roofline_tokens_per_s: Optional[float] = None
    expected_tokens_per_s: Optional[float] = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    rejected: Optional[Rejection] = None
    low_quality_rank: int = 0

    @property
    def fits(self) -> bool:
        """Return whether nothing speaks against this candidate."""
        return self.rejected is None

    def score(self, prefer: str) -> tuple[float, ...]:
        """Return the policy's ranking of this candidate; larger is better (see the module's text)."""
        tier = (-float(self.variant.tier_rank), -float(self.low_quality_rank))
        speed = self.expected_tokens_per_s or 0.0
        resident = float(self.resident)
        if prefer == "speed":
            return (resident, speed, *tier)
        if prefer == "context":
            return (resident, float(self.max_context_tokens), *tier, speed)
        return (resident, *tier, speed)

    def args(self) -> list[str]:
        """Return the engine's arguments; empty where the candidate was never placed."""
        if not self.settings:
            return []
        return llama_server_args(self.settings) if self.engine == "llama_cpp" else vllm_args(self.settings)

    def device_terms(self) -> list[dict[str, Any]]:
        """Return the memory of every device under the plan's names."""
        return [
            {"id": device.id, "name": device.name, **terms.as_dict()}
            for device, terms in zip(self.devices, self.estimate.devices)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the candidate as the plan and ``fleetfit what-fits --json`` show it."""
        return {
            "engine": self.engine,
            "variant": self.variant.name,
            "fits": self.fits,
            "context_tokens": self.context_tokens,
            "max_context_tokens": self.max_context_tokens,
            "slots": self.slots,
            "kv_type_k": self.kv_type_k,
            "kv_type_v": self.kv_type_v,
            "gpu_layers": self.gpu_layers,
            "memory_bytes": self.estimate.total.as_dict(),
            "devices": self.device_terms(),
            "host": self.estimate.host.as_dict(),
            "expected_tokens_per_s": self.expected_tokens_per_s,
            "roofline_tokens_per_s": self.roofline_tokens_per_s,
            "args": self.args(),
            "rejected": None if self.rejected is None else self.rejected.as_dict(),
        }


class NothingFitsError(FleetfitError):
    """No candidate passed; carries the candidates, each with its reason."""

    def __init__(
        self, message: str, *, code: str, remedy: Optional[str], candidates: tuple[Candidate, ...]
    ) -> None:
        super().__init__(message, code=code, remedy=remedy)
        self.candidates = candidates


@dataclass(frozen=True)
class Request:
    """Everything that one decision depends on.

    ``available_engines`` are those fleetfit can deploy; ``require_pinned`` is false where nothing will be
    downloaded (planning before buying). ``layouts`` replaces the catalog's arithmetic where a file's own
    header was read. ``find_longest`` is false where nobody looks at the longest context that would fit.
    """

    entry: CatalogEntry
    policy: Policy
    view: HostView
    engines: Mapping[str, Any]
    available_engines: frozenset[str]
    require_pinned: bool = True
    siblings: tuple[CatalogEntry, ...] = ()
    layouts: Mapping[str, TensorLayout] = field(default_factory=dict)
    calibration: tuple[Mapping[str, Any], ...] = ()
    find_longest: bool = True

    def calibrated_view(self, engine: str, variant: str) -> HostView:
        """Return the host with measured overheads and margins where records of these circumstances exist."""
        if not self.calibration or not self.view.devices:
            return self.view
        return replace(self.view, devices=tuple(item for item, _ in self._calibrated(engine, variant)))

    def calibration_notes(self, engine: str, variant: str) -> list[str]:
        """Return the sentences that say which devices are calibrated and how."""
        notes = [note for _, note in self._calibrated(engine, variant) if note] if self.calibration else []
        return list(dict.fromkeys(notes))

    def _calibrated(self, engine: str, variant: str) -> list[tuple[DeviceBudget, Optional[str]]]:
        version = str(self.engines["engines"][engine]["version"])
        return [
            calibrated(
                device,
                find_record(
                    self.calibration,
                    engine=engine,
                    engine_version=version,
                    gpu=device.name,
                    model=self.entry.id,
                    variant=variant,
                ),
            )
            for device in self.view.devices
        ]


def evaluate(request: Request) -> tuple[Candidate, ...]:
    """Return every candidate of the model on this host in the catalog's order, each fitting or rejected.

    Raises ``context_above_limit`` where the policy asks for more context than the model has at all, and
    ``lora_for_another_model`` for an adapter of another one.
    """
    entry, policy = request.entry, request.policy
    check_base_model(policy.lora_adapters, entry)
    check_min_context(policy, entry.native_context_tokens, entry.max_context_tokens, entry.id)
    found = []
    for variant in entry.variants:
        for engine in variant.engines:
            if policy.engine not in ("auto", engine):
                continue
            evaluator = _llama_candidate if engine == "llama_cpp" else _vllm_candidate
            found.append(evaluator(request, variant))
    return tuple(found)


def choose(candidates: Sequence[Candidate], prefer: str) -> Optional[Candidate]:
    """Return the best candidate that fits, or None."""
    best: Optional[Candidate] = None
    for item in candidates:
        if item.fits and (best is None or _key(item, prefer) > _key(best, prefer)):
            best = item
    return best


def select(request: Request) -> tuple[Candidate, tuple[Candidate, ...]]:
    """Return (the chosen candidate, all candidates).

    Raises :class:`NothingFitsError` saying by how much each candidate missed and the least changes that
    would fit.
    """
    candidates = evaluate(request)
    best = choose(candidates, request.policy.prefer)
    if best is None:
        raise nothing_fits(request, candidates)
    return best, candidates


def nothing_fits(request: Request, candidates: tuple[Candidate, ...]) -> NothingFitsError:
    """Return the error for a host on which no candidate passed."""
    entry, policy = request.entry, request.policy
    unpinned = [item for item in candidates if item.rejected and item.rejected.code == "not_pinned"]
    if unpinned:
        names = ", ".join(item.variant.name for item in unpinned)
        return NothingFitsError(
            f"The files of {entry.id} that would fit ({names}) have no checksum in the catalog "
            f"({entry.origin}), so a download could not be verified.",
            code="model_not_pinned",
            remedy=f"Run `fleetfit catalog pin {entry.id}` where the hub or a mirror of it can be reached.",
            candidates=candidates,
        )
    if not candidates:
        others = [item for item in entry.variants if item.format == "gguf"]
        why = f" {_wrong_format('vllm', others[0])}." if policy.engine == "vllm" and others else ""
        return NothingFitsError(
            f"{entry.id} has no variant for the engine {policy.engine} ({entry.origin}).{why}",
            code="no_variant_for_engine",
            remedy="Choose another engine (fleetfit_engine), or add a variant in an overlay.",
            candidates=candidates,
        )
    codes = {item.rejected.code for item in candidates if item.rejected}
    code = codes.pop() if len(codes) == 1 else "nothing_fits"
    by_reason: dict[str, list[str]] = {}
    for item in candidates:
        if item.rejected:
            by_reason.setdefault(item.rejected.reason, []).append(f"{item.engine} {item.variant.name}")
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
    changes = least_changes(request, candidates)
    if changes:
        remedy = "Any one of these would do: " + "; ".join(changes) + "."
    elif "licence_not_accepted" in codes | {code}:
        remedy = _beside_the_licence(request)
    else:
        remedy = "No smaller context, lower tier or smaller sibling would do: the host needs more memory."
    return NothingFitsError(
        f"No variant of {entry.id} meets the policy on this host ({policy.min_context_tokens} tokens x "
        f"{policy.slots} slots). {reasons}.",
        code=code,
        remedy=remedy,
        candidates=candidates,
    )


def _beside_the_licence(request: Request) -> str:
    """Return what is needed where the licence must be accepted and that alone does not help."""
    accepted = _with_licence(request)
    changes = least_changes(accepted, evaluate(accepted))
    if not changes:
        return "Even with its licence accepted nothing of it fits: the host needs more memory."
    return f"{_licence_change(request)}, and any one of these: " + "; ".join(changes) + "."


def _with_licence(request: Request) -> Request:
    licences = tuple(sorted({*request.policy.accepted_licences, request.entry.licence}))
    return replace(request, policy=replace(request.policy, accepted_licences=licences))


def _licence_change(request: Request) -> str:
    return (
        f"accept the licence {request.entry.licence} (fleetfit_accepted_licences), after reading it at "
        f"{request.entry.licence_url}"
    )


def least_changes(request: Request, candidates: Sequence[Candidate]) -> list[str]:
    """Return the smallest single changes of the policy under which something would fit, the mildest first.

    Each was tried: with it alone, the variant that it names fits.
    """
    policy = request.policy
    changes = []
    if any(item.rejected and item.rejected.code == "licence_not_accepted" for item in candidates):
        changes += _as_change(request, _with_licence(request).policy, _licence_change(request))
    slow = [item for item in candidates if item.rejected and item.rejected.code == "too_slow"]
    if slow:
        fastest = int(max(item.expected_tokens_per_s or 0.0 for item in slow))
        changes += _as_change(
            request,
            replace(policy, min_tokens_per_s=float(fastest)),
            f"fleetfit_min_tokens_per_s={fastest}",
        )
    if policy.engine != "auto":
        changes += _as_change(request, replace(policy, engine="auto"), "fleetfit_engine=auto")
    if policy.slots > 1:
        for slots in range(policy.slots - 1, 0, -1):
            change = _as_change(request, replace(policy, slots=slots), f"fleetfit_slots={slots}")
            if change:
                changes += change
                break
    shorter = max(
        (
            item.max_context_tokens
            for item in candidates
            if item.rejected and item.rejected.code == "does_not_fit"
        ),
        default=0,
    )
    if 0 < shorter < policy.min_context_tokens:
        changes += _as_change(
            request,
            replace(policy, min_context_tokens=shorter),
            f"fleetfit_min_context_tokens={shorter}",
        )
    if policy.kv_type != "f16":
        changes += _as_change(request, replace(policy, kv_type="f16"), "fleetfit_kv_type=f16")
    else:
        changes += _as_change(request, replace(policy, kv_type="q8_0"), "fleetfit_kv_type=q8_0")
    for tier in QUALITY_TIERS[policy.min_tier_rank + 1 :]:
        change = _as_change(
            request, replace(policy, min_quality_tier=tier), f"fleetfit_min_quality_tier={tier}"
        )
        if change:
            changes += change
            break
    changes += _smaller_siblings(request)
    return changes


def _smaller_siblings(request: Request) -> list[str]:
    """Return the largest smaller sibling that fits, and where that has layers in RAM the largest that has none."""
    policy = request.policy
    found: list[str] = []
    for sibling in request.siblings:
        if sibling.parameters >= request.entry.parameters:
            continue
        if policy.min_context_tokens > sibling.max_context_tokens:
            continue
        smaller = replace(
            request,
            entry=sibling,
            # Adapters belong to one model; a smaller one is looked at without them.
            policy=replace(policy, model=sibling.id, lora_adapters=()),
            siblings=(),
            require_pinned=False,
            find_longest=policy.prefer == "context",
        )
        best = choose(evaluate(smaller), policy.prefer)
        if best is None or (found and not best.resident):
            continue
        found.append(f"the smaller model {sibling.id} ({_would_fit(best, request)})")
        if best.resident or not request.view.devices:
            break
    return found


def _as_change(request: Request, policy: Policy, text: str) -> list[str]:
    """Return the change's text with the variant it leads to, or nothing where it does not help."""
    changed = replace(
        request,
        policy=policy,
        siblings=(),
        require_pinned=False,
        find_longest=policy.prefer == "context",
    )
    best = choose(evaluate(changed), policy.prefer)
    return [] if best is None else [f"{text} ({_would_fit(best, request)})"]


def _would_fit(best: Candidate, request: Request) -> str:
    """Return what a change leads to; a model that is partly in RAM, or all of it, is said to be."""
    text = f"{best.variant.name} would fit"
    if best.resident or not request.view.devices:
        return text
    text += ", with layers in RAM" if best.devices else ", on the CPU alone"
    speed = best.expected_tokens_per_s
    return text if speed is None else f"{text}: about {speed:.{0 if speed >= 10 else 1}f} tokens/s"


def _key(item: Candidate, prefer: str) -> tuple[float, ...]:
    return (*item.score(prefer), -float(item.estimate.total.total))


def layout_of(entry: CatalogEntry, variant: Variant) -> TensorLayout:
    """Return where the bytes of a variant's files are, from the model's shape and the scheme's rules."""
    shape = entry.shape_of(variant)
    if variant.format == "safetensors":
        layout = safetensors_layout(shape, variant.scheme)
    else:
        layout = layout_from_scheme(shape, variant.scheme)
    if variant.stored_output and layout.tied:
        return replace(layout, file_bytes=layout.file_bytes + layout.token_embd)
    return layout


def rope_settings(entry: CatalogEntry, context_tokens: int) -> Optional[dict[str, Any]]:
    """Return the context-extension settings that a context needs, or None within the native context.

    Without them engines cap the context silently while the memory for all of it is taken.
    """
    native = entry.native_context_tokens
    if context_tokens <= native or not entry.rope_scaling:
        return None
    return {
        "scaling": entry.rope_scaling,
        "scale": entry.extended_context_tokens / native,
        "original_context_tokens": native,
    }


def _common_rejection(request: Request, variant: Variant, engine: str) -> Optional[Rejection]:
    entry, policy = request.entry, request.policy
    if engine not in request.available_engines:
        return Rejection(
            "engine_not_available", f"fleetfit has no role that installs {engine} (roles/{engine} is missing)"
        )
    formats = request.engines["engines"][engine]["formats"]
    if variant.format not in formats:
        return Rejection("format_not_supported", _wrong_format(engine, variant))
    if entry.licence_needs_acceptance and entry.licence not in policy.accepted_licences:
        return Rejection(
            "licence_not_accepted",
            f"the licence {entry.licence} is not in fleetfit_accepted_licences ({entry.licence_url})",
        )
    if variant.tier_rank > policy.min_tier_rank:
        return Rejection(
            "below_min_quality_tier",
            f"its quality tier {variant.quality_tier} is below fleetfit_min_quality_tier "
            f"{policy.min_quality_tier}",
        )
    kv_type = policy.kv_type
    supported = llama.KV_TYPES if engine == "llama_cpp" else ("f16", "fp8")
    if kv_type not in supported:
        return Rejection(
            "kv_type_not_supported", f"{engine} has no KV type {kv_type} (it has {', '.join(supported)})"
        )
    if engine == "llama_cpp" and kv_type not in entry.kv_keys:
        return Rejection(
            "kv_type_not_allowed",
            f"keys in {kv_type} are not allowed for {entry.id} (only {', '.join(entry.kv_keys)})"
            + (f": {entry.kv_source}" if entry.kv_source else ""),
        )
    if engine == "llama_cpp" and kv_type not in entry.kv_values:
        return Rejection(
            "kv_type_not_allowed",
            f"values in {kv_type} are not allowed for {entry.id} (only {', '.join(entry.kv_values)})",
        )
    problem = engine_problem(engine, policy.lora_adapters)
    return None if problem is None else Rejection(*problem)


def _wrong_format(engine: str, variant: Variant) -> str:
    """Return why an engine does not serve a variant's files, and what does.

    GGUF left vLLM's core with 0.24 (its own release notes); the plugin reads it several times slower.
    """
    if (engine, variant.format) == ("vllm", "gguf"):
        return (
            "vLLM does not serve GGUF (it left its core with version 0.24): use fleetfit_engine=llama_cpp, or a "
            "GPTQ, AWQ, FP8 or 16-bit variant"
        )
    return f"{engine} does not serve files in {variant.format}: use fleetfit_engine=vllm, or a GGUF variant"


def _speed_rejection(request: Request, expected: Optional[float]) -> Optional[Rejection]:
    wanted = request.policy.min_tokens_per_s
    if wanted <= 0:
        return None
    if expected is None:
        return Rejection(
            "speed_unknown",
            "the memory bandwidth of a device is unknown, so fleetfit_min_tokens_per_s cannot be checked",
        )
    if expected < wanted:
        return Rejection(
            "too_slow", f"about {expected:.1f} tokens/s expected, fleetfit_min_tokens_per_s is {wanted:g}"
        )
    return None


def _pin_rejection(request: Request, variant: Variant) -> Optional[Rejection]:
    if request.require_pinned and not variant.pinned:
        return Rejection(
            "not_pinned",
            f"its files have no checksum; run `fleetfit catalog pin {request.entry.id}`",
        )
    return None


def _memory_rejection(estimate: Estimate, devices: Sequence[DeviceBudget]) -> Rejection:
    """Return the sentence naming the place that is most short, and by how much."""
    places = [(device.id, device.name, terms) for device, terms in zip(devices, estimate.devices)]
    places.append((HOST, "the host's RAM", estimate.host))
    identity, name, terms = max(places, key=lambda place: place[2].short_by)
    short = max(terms.short_by, 0)
    return Rejection(
        "does_not_fit",
        f"{name} is short by {format_size(short)}: it needs {format_gib(terms.total)} of "
        f"{format_gib(terms.budget)}",
        device=identity,
        short_by_bytes=short,
    )


def _llama_device_rejection(request: Request) -> Optional[Rejection]:
    """Return why no CUDA build of llama.cpp can use this host's devices, if so."""
    view = request.view
    if not view.devices:
        return None
    builds = request.engines["engines"]["llama_cpp"]["builds"]
    lowest = min(
        (compute_capability_number(device.compute_capability or "0.0"), device.name)
        for device in view.devices
    )
    able = [item for item in builds if lowest[0] >= compute_capability_number(item["min_compute_capability"])]
    if not able:
        return Rejection(
            "compute_capability_too_low",
            f"{lowest[1]} has compute capability {lowest[0][0]}.{lowest[0][1]}, below every CUDA build's",
        )
    needed = min(leading_number(item["min_driver"]) for item in able)
    if view.driver_major is None or view.driver_major < needed:
        return Rejection(
            "driver_too_old",
            f"driver {view.driver_version or 'none'} is older than {needed}, which CUDA needs",
        )
    return None


def _llama_candidate(request: Request, variant: Variant) -> Candidate:
    entry, policy = request.entry, request.policy
    view = request.calibrated_view("llama_cpp", variant.name)
    shape = entry.shape_of(variant)
    layout = layout_with_adapters(
        request.layouts.get(variant.name) or layout_of(entry, variant),
        [item.file_bytes for item in adapters_for("llama_cpp", policy.lora_adapters)],
    )
    kv_type = policy.kv_type
    candidate = Candidate(
        engine="llama_cpp",
        variant=variant,
        context_tokens=policy.min_context_tokens,
        slots=policy.slots,
        kv_type_k=kv_type,
        kv_type_v=kv_type,
        low_quality_rank=entry.low_quality_rank(variant),
    )
    rejected = _common_rejection(request, variant, "llama_cpp")
    if rejected is not None and rejected.code == "format_not_supported":
        return replace(candidate, rejected=rejected)
    if kv_type not in llama.KV_TYPES:
        return replace(candidate, rejected=rejected)
    try:
        llama.check_graph(shape, slots=policy.slots, kv_type_k=kv_type, kv_type_v=kv_type)
        llama.kv_bytes_per_token(shape, kv_type, kv_type)
    except FleetfitError as error:
        return replace(candidate, rejected=rejected or Rejection("kv_type_not_supported", error.message))
    placer = LlamaPlacer(
        shape, layout, view, slots=policy.slots, kv_type_k=kv_type, kv_type_v=kv_type, cache_ram_bytes=0
    )
    rejected = rejected or _llama_device_rejection(request)
    placement = placer.best(policy.min_context_tokens)
    if placement is None:
        placement = placer.nearest(policy.min_context_tokens)
        rejected = rejected or _memory_rejection(placement.estimate, placement.devices)
        longest = placer.max_context_anyhow(entry.max_context_tokens) if request.find_longest else 0
    else:
        longest = (
            placer.max_context_tokens(placement, entry.max_context_tokens) if request.find_longest else 0
        )
        # The policy's own context fits although its multiple of 256 may not divide the limit.
        longest = max(longest, policy.min_context_tokens)
        rejected = rejected or _speed_rejection(request, placement.expected_tokens_per_s)
        rejected = rejected or _pin_rejection(request, variant)
    return replace(
        candidate,
        max_context_tokens=longest,
        devices=placement.devices,
        estimate=placement.estimate,
        gpu_layers=placement.n_gpu_layers,
        resident=placement.resident,
        roofline_tokens_per_s=placement.roofline_tokens_per_s,
        expected_tokens_per_s=placement.expected_tokens_per_s,
        settings=_llama_settings(entry, variant, policy, view, placement),
        rejected=rejected,
    )


def _llama_settings(
    entry: CatalogEntry, variant: Variant, policy: Policy, view: HostView, placement: Placement
) -> dict[str, Any]:
    many = len(placement.devices) > 1
    return {
        "model_file": variant.model_file,
        "n_ctx": llama.n_ctx(policy.min_context_tokens, policy.slots),
        "slots": policy.slots,
        "n_batch": llama.DEFAULT_BATCH_TOKENS,
        "n_ubatch": llama.DEFAULT_UBATCH_TOKENS,
        "n_gpu_layers": placement.n_gpu_layers,
        "flash_attention": "on",
        "kv_type_k": policy.kv_type,
        "kv_type_v": policy.kv_type,
        "split_mode": "layer" if many else "none",
        "tensor_split": list(placement.tensor_split) if many else None,
        "cache_ram_mib": 0,
        "load_mode": "mmap",
        "repack": False,
        "n_cpu_moe": placement.n_cpu_moe,
        "rope": rope_settings(entry, policy.min_context_tokens),
        "threads": view.threads,
        "served_model_name": entry.id,
        "device_uuids": [device.id for device in placement.devices],
        "jinja": True,
        "lora": [
            {"name": item.name, "file": item.gguf_file}
            for item in adapters_for("llama_cpp", policy.lora_adapters)
        ],
    }


def _vllm_candidate(request: Request, variant: Variant) -> Candidate:
    entry, policy = request.entry, request.policy
    view = request.calibrated_view("vllm", variant.name)
    engine = request.engines["engines"]["vllm"]
    shape = entry.shape_of(variant)
    layout = request.layouts.get(variant.name) or layout_of(entry, variant)
    kv_dtype = "fp8" if policy.kv_type == "fp8" else "auto"
    candidate = Candidate(
        engine="vllm",
        variant=variant,
        context_tokens=policy.min_context_tokens,
        slots=policy.slots,
        kv_type_k=policy.kv_type,
        kv_type_v=policy.kv_type,
        low_quality_rank=entry.low_quality_rank(variant),
    )
    wheels = wheels_of(request.engines)
    rejected = _common_rejection(request, variant, "vllm")
    rejected = rejected or _vllm_device_rejection(engine, wheels, variant, shape, view, policy.kv_type)
    if rejected is not None and rejected.code in (
        "format_not_supported",
        "kv_type_not_supported",
        "no_gpu",
        "mig_not_supported",
    ):
        return replace(candidate, rejected=rejected)
    if not view.devices:
        return replace(candidate, rejected=rejected)
    rope = rope_settings(entry, policy.min_context_tokens)
    if rope is not None and entry.rope_theta is None:
        # vLLM replaces the model's whole description of positions by the one it is given.
        rejected = rejected or Rejection(
            "rope_theta_unknown",
            f"vLLM extends a context only with the model's rope_theta, which {entry.origin} does not name",
        )
    sequences = max(policy.slots, VLLM_MIN_SEQUENCES)
    adapters = adapters_for("vllm", policy.lora_adapters)

    def placed(group: tuple[DeviceBudget, ...], tensor: int, context_tokens: int) -> vllm.VllmEstimate:
        return vllm.estimate(
            shape,
            layout,
            context_tokens=context_tokens,
            slots=policy.slots,
            devices=group,
            max_num_seqs=sequences,
            kv_cache_dtype=kv_dtype,
            tensor_parallel=tensor,
            pipeline_parallel=len(group) // tensor,
            max_loras=len(adapters),
            max_lora_rank=vllm_rank(adapters),
            host=view.host,
        )

    best: Optional[tuple[tuple[float, float, int], tuple[DeviceBudget, ...], int, vllm.VllmEstimate]] = None
    refusal: Optional[FleetfitError] = None
    able_groups: list[tuple[tuple[DeviceBudget, ...], int]] = []
    devices = _vllm_devices(engine, view)
    capabilities = [device.compute_capability for device in devices]
    able = able_devices(wheels, capabilities, _least_capability(engine, variant, shape, policy.kv_type))
    # A host on which no build runs is placed all the same, so that the answer says what else would be missing.
    for group, tensor in _vllm_groups([devices[index] for index in able] or devices):
        try:
            estimate = placed(group, tensor, policy.min_context_tokens)
        except FleetfitError as error:
            refusal = refusal or error
            continue
        missing = sum(max(0, terms.short_by) for terms in (*estimate.devices, estimate.host))
        native = computes_natively(request.engines, variant, group)
        speed = _vllm_speed(layout, group, tensor, shape, native)[1]
        rank = (-float(missing), speed or 0.0, -len(group))
        able_groups.append((group, tensor))
        if best is None or rank > best[0]:
            best = (rank, group, tensor, estimate)
    if best is None:
        reason = refusal.message if refusal else "no group of its GPUs can serve it"
        return replace(candidate, rejected=rejected or Rejection("parallelism_not_divisible", reason))
    _, group, tensor, estimate = best
    native = computes_natively(request.engines, variant, group)
    roofline, expected = _vllm_speed(layout, group, tensor, shape, native)
    if not estimate.fits:
        rejected = rejected or _memory_rejection(estimate, group)
    rejected = rejected or _speed_rejection(request, expected) or _pin_rejection(request, variant)
    longest = 0
    for item in able_groups if request.find_longest else ():
        # On whatever cards, as with llama.cpp: what is asked for may be fastest on fewer than hold the most.
        if placed(*item, min(longest + 1, entry.max_context_tokens)).fits:
            longest = max(
                longest,
                longest_context(lambda tokens: placed(*item, tokens).fits, entry.max_context_tokens),  # noqa: B023
            )
    if estimate.fits:
        longest = max(longest, policy.min_context_tokens)
    lowest = min(compute_capability_number(device.compute_capability or "0.0") for device in group)
    bfloat16 = lowest >= compute_capability_number(engine["bfloat16_min_compute_capability"])
    return replace(
        candidate,
        max_context_tokens=longest,
        devices=group,
        estimate=estimate,
        resident=True,
        roofline_tokens_per_s=roofline,
        expected_tokens_per_s=expected,
        settings={
            "max_model_len": policy.min_context_tokens,
            "max_num_seqs": sequences,
            "max_num_batched_tokens": vllm.DEFAULT_BATCHED_TOKENS,
            "gpu_memory_utilization": estimate.gpu_memory_utilization,
            "kv_cache_memory_bytes": None,
            "startup_free_bytes": list(vllm.startup_free_bytes(estimate)),
            "tensor_parallel": tensor,
            "pipeline_parallel": len(group) // tensor,
            "kv_cache_dtype": kv_dtype,
            "enable_prefix_caching": True,
            "dtype": _vllm_dtype(shape, variant.scheme, bfloat16),
            "quantization": None,
            "enforce_eager": False,
            "rope": None if rope is None else {**rope, "theta": entry.rope_theta},
            "tool_call_parser": entry.tool_call_parser,
            "max_loras": len(adapters),
            "max_lora_rank": vllm_rank(adapters),
            "lora_modules": [item.name for item in adapters],
            "served_model_name": entry.id,
            "device_uuids": [device.id for device in group],
        },
        rejected=rejected,
    )


def _vllm_device_rejection(
    engine: Mapping[str, Any],
    wheels: Sequence[Wheel],
    variant: Variant,
    shape: ModelShape,
    view: HostView,
    kv_type: str,
) -> Optional[Rejection]:
    if not view.devices:
        return Rejection("no_gpu", "vLLM needs an NVIDIA GPU, and this host has none to use")
    devices = _vllm_devices(engine, view)
    if not devices:
        return Rejection("mig_not_supported", "vLLM on an instance of a partitioned card was never run")
    problem = gpu_problem(
        wheels,
        [(device.name, device.compute_capability) for device in devices],
        view.driver_version,
        scheme=_demanding_scheme(engine, variant, shape, kv_type),
        least=_least_capability(engine, variant, shape, kv_type),
    )
    if problem is None:
        return None
    device = None if problem.device is None else devices[problem.device].id
    return Rejection(problem.code, problem.reason, device=device)


def _vllm_devices(engine: Mapping[str, Any], view: HostView) -> tuple[DeviceBudget, ...]:
    """Return the devices that vLLM may be planned on: no instance of a partitioned card until that was run."""
    return tuple(device for device in view.devices if not device.mig or engine["supports_mig"])


def computes_natively(engines: Mapping[str, Any], variant: Variant, devices: Sequence[DeviceBudget]) -> bool:
    """Return whether every device computes in the variant's own format, where vLLM has such kernels for it.

    Elsewhere the weights alone are in that format and are widened for each product (FP8 below 8.9).
    """
    native = engines["engines"]["vllm"]["schemes"].get(variant.scheme, {}).get("native_compute_capability")
    return native is not None and all(
        compute_capability_number(device.compute_capability or "0.0") >= compute_capability_number(native)
        for device in devices
    )


def _vllm_dtype(shape: ModelShape, scheme: str, bfloat16: bool) -> str:
    """Return vLLM's dtype on devices with or without bfloat16.

    GPTQ and AWQ kernels were made for float16 (Marlin's take both); the other formats have bfloat16's range.
    """
    if _bfloat16_only(shape):
        return "bfloat16"
    return "bfloat16" if bfloat16 and scheme in ("BF16", "FP8") else "float16"


def _kv_type_capability(engine: Mapping[str, Any], kv_type: str) -> str:
    return str(engine.get("kv_types", {}).get(kv_type, {}).get("min_compute_capability", "0.0"))


def _demanding_scheme(engine: Mapping[str, Any], variant: Variant, shape: ModelShape, kv_type: str) -> str:
    """Return the format with what else of the plan asks for a newer card, as messages name it."""
    scheme = variant.scheme + (" in bfloat16" if _bfloat16_only(shape) else "")
    needs_more = compute_capability_number(_kv_type_capability(engine, kv_type)) > (0, 0)
    return scheme + (f" with a KV cache in {kv_type}" if needs_more else "")


def _least_capability(engine: Mapping[str, Any], variant: Variant, shape: ModelShape, kv_type: str) -> str:
    """Return the compute capability that vLLM needs for this format of this model, with such a KV cache."""
    needs = [
        str(engine["schemes"].get(variant.scheme, {}).get("min_compute_capability", "0.0")),
        _kv_type_capability(engine, kv_type),
    ]
    if _bfloat16_only(shape):
        needs.append(str(engine["bfloat16_min_compute_capability"]))
    return max(needs, key=compute_capability_number)


def _bfloat16_only(shape: ModelShape) -> bool:
    return shape.architecture in BFLOAT16_ONLY_ARCHITECTURES


def _vllm_groups(devices: Sequence[DeviceBudget]) -> list[tuple[tuple[DeviceBudget, ...], int]]:
    """Return (devices in rank order, tensor parallelism) worth trying: each alone, then groups of several.

    The tensor ranks of one stage are cards of one name (the slowest and smallest would bound the others); what
    is left of the group is a pipeline. Up to :data:`VLLM_EXHAUSTIVE_DEVICES` every set and order is tried,
    since the first and the last stage hold more than the others; beyond, the largest cards in their order.
    """
    groups: list[tuple[tuple[DeviceBudget, ...], int]] = [((device,), 1) for device in devices]
    ranked = sorted((item for item in devices if not item.mig), key=lambda item: -item.budget)
    orders: list[tuple[DeviceBudget, ...]] = []
    for size in range(2, len(ranked) + 1):
        if len(ranked) <= VLLM_EXHAUSTIVE_DEVICES:
            orders += permutations(ranked, size)
        else:
            orders.append(tuple(ranked[:size]))
    seen: set[tuple[object, ...]] = set()
    for group in orders:
        kind = tuple(replace(device, id="") for device in group)
        if kind in seen:
            continue
        seen.add(kind)
        for tensor in range(len(group), 0, -1):
            stages = [group[start : start + tensor] for start in range(0, len(group), tensor)]
            if len(group) % tensor == 0 and all(len({card.name for card in stage}) == 1 for stage in stages):
                groups.append((group, tensor))
    return groups


def _vllm_speed(
    layout: TensorLayout, group: Sequence[DeviceBudget], tensor: int, shape: ModelShape, native: bool
) -> tuple[Optional[float], Optional[float]]:
    """Return (roofline, expected) tokens/s of one stream: stages one after another, ranks of a stage at
    once; ``native``: every card computes in the scheme's own format."""
    if any(not device.bandwidth_bytes_per_s for device in group):
        return None, None
    experts = sum(layout.block_experts)
    active = sum(layout.blocks) - experts
    if experts:
        active += experts * shape.experts_used // shape.experts
    read = active + layout.output_norm + layout.output_head
    stages = len(group) // tensor
    efficiency = vllm_efficiency(layout.scheme, native=native)
    parts = []
    for stage in range(stages):
        ranks = group[stage * tensor : (stage + 1) * tensor]
        slowest = min(device.bandwidth_bytes_per_s or 0.0 for device in ranks)
        parts.append((read // stages // tensor, slowest, efficiency))
    roofline = roofline_tokens_per_s([(size, bandwidth) for size, bandwidth, _ in parts])
    return round(roofline, 2), round(expected_tokens_per_s(parts), 2)
