"""Hold the planner's decisions for vLLM against its written formula (docs/sizing.md), by brute force.

No vLLM was run on a GPU for this: the formula itself is the truth. The brute force is written from the
document and shares no code with the planner: it counts the model's matrices from the numbers of its shape,
and tries every order of every set of cards, as every product of tensor and pipeline parallelism that the
document allows. There is no previous plan.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import permutations
from typing import Any

import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.catalog_entry import entry_from_dict
from ansible_collections.fleetfit.llm.plugins.module_utils.plan import plan_host
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import policy_from_variables
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import NothingFitsError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import CATALOG_DIR

from .shapes import SHAPES

MIB, GIB = 1 << 20, 1 << 30
SEED = 20261128
CASES = 600
# docs/sizing.md, "vLLM": the formula's numbers.
UTILIZATION = 0.92
OUTSIDE, OUTSIDE_LEAST, OUTSIDE_SHARE = GIB // 2, GIB // 2, 0.05
GRAPHS = 0.4 * GIB
NON_TORCH, NON_TORCH_PARALLEL = 0.25 * GIB, 0.6 * GIB
SAMPLER, PER_INTERMEDIATE, PER_HIDDEN = 39, 6.0, 9.5
SEQUENCES, BATCHED_TOKENS, BLOCK, GROUP = 16, 2048, 16, 128
PROCESSES, SYSTEM_RAM, OPEN_WEBUI_RAM = 4 * GIB, 2 * GIB, GIB
# Best first, with the tier of each and the least compute capability of its kernels.
SCHEMES = {"BF16": 0, "FP8": 0, "GPTQ-Int8": 0, "AWQ": 3, "GPTQ-Int4": 3}
LEAST_CAPABILITY = (7, 5)
# vLLM refuses float16 for these, and bfloat16 needs more.
BFLOAT16_ONLY, BFLOAT16_CAPABILITY = ("gemma2", "gemma3"), (8, 0)
NATIVE_FP8 = (8, 9)
# And a KV cache in fp8, whatever the weights are in.
FP8_CACHE_CAPABILITY = (8, 9)
# Decode at batch 1 as a share of the roofline.
SHARE_16_BIT, SHARE_8_BIT, SHARE_4_BIT, SHARE_NATIVE_FP8 = 0.58, 0.47, 0.33, 0.50
DRIVERS = {"580.95.05": True, "550.163.01": True, "525.60.13": True, "470.82.01": False}
# A needless refusal may miss by this much at most.
MISS, MISS_SHARE = 256 * MIB, 0.02


@dataclass(frozen=True)
class Card:
    """One card; sizes in bytes."""

    name: str
    total: int
    reserved: int
    foreign: int
    capability: str
    bytes_per_s: float
    mig: bool = False

    @property
    def budget(self) -> int:
        return self.total - self.reserved - self.foreign

    @property
    def level(self) -> tuple[int, int]:
        major, minor = self.capability.split(".")
        return int(major), int(minor)


@dataclass(frozen=True)
class Case:
    """A model asked for on a host."""

    model: str
    context: int
    slots: int
    kv_type: str
    cards: tuple[Card, ...]
    ram: int
    driver: str
    open_webui: bool
    lowest_tier: str
    prefer: str
    schemes: tuple[str, ...] = tuple(SCHEMES)

    def __str__(self) -> str:
        cards = " + ".join(f"{card.name} {card.budget >> 20} MiB" for card in self.cards) or "no card"
        return (
            f"{self.model} {self.context} x {self.slots} {self.kv_type} on {cards}, {self.ram >> 30} GiB RAM, "
            f"driver {self.driver}, {self.prefer}, {' '.join(self.schemes)}"
        )


@dataclass(frozen=True)
class Matrix:
    """A linear layer's matrices: inputs, outputs, how many, and how many of them one token reads."""

    inputs: int
    outputs: int
    count: float = 1
    used: float = 1


@dataclass(frozen=True)
class Layers:
    """Bytes of a model in a scheme: a block, what a token reads of it, the embeddings, the head, the norm."""

    block: float
    block_read: float
    embeddings: float
    head: float
    head_stored: bool
    norm: float


def matrices(model: str) -> list[Matrix]:
    """Return the linear layers of one block that a scheme quantizes."""
    shape = SHAPES[model]
    h, q, kv = shape.hidden_size, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    found = [Matrix(q, h)]
    found += (
        [Matrix(h, q + 2 * kv)] if shape.fused_projections else [Matrix(h, q), Matrix(h, kv), Matrix(h, kv)]
    )
    if shape.experts:
        wide, count, used = shape.expert_intermediate_size, shape.experts, shape.experts_used
        found += [Matrix(h, wide, count, used), Matrix(h, wide, count, used), Matrix(wide, h, count, used)]
        shared = shape.shared_expert_intermediate_size
        if shared:
            found += [Matrix(h, shared), Matrix(h, shared), Matrix(shared, h)]
    else:
        wide = shape.intermediate_size
        found += [Matrix(h, 2 * wide)] if shape.fused_projections else [Matrix(h, wide), Matrix(h, wide)]
        found += [Matrix(wide, h)]
    return found


def plain_numbers(model: str) -> int:
    """Return how many numbers of one block stay at 16 bits: norms, biases, the router."""
    shape = SHAPES[model]
    h, q, kv = shape.hidden_size, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    count = 2 * h
    count += 2 * h if shape.post_norms else 0
    count += 2 * shape.head_dim if shape.qk_norm else 0
    count += q + 2 * kv if shape.attention_bias else 0
    count += h * shape.experts
    count += h if shape.shared_expert_intermediate_size else 0
    return count


def matrix_bytes(matrix: Matrix, scheme: str) -> float:
    """Return the bytes of one matrix as its release stores it."""
    weights = matrix.inputs * matrix.outputs
    if scheme == "BF16":
        return 2 * weights
    if scheme == "FP8":
        return weights + 4 * matrix.outputs
    bits = 8 if scheme == "GPTQ-Int8" else 4
    groups = math.ceil(matrix.inputs / GROUP) * matrix.outputs
    index = 4 * matrix.inputs if scheme.startswith("GPTQ") else 0
    return weights * bits / 8 + groups * 2 + groups * bits / 8 + index


@cache
def layers_of(model: str, scheme: str) -> Layers:
    """Return where the bytes of a model's release in ``scheme`` are."""
    shape = SHAPES[model]
    found = [(matrix, matrix_bytes(matrix, scheme)) for matrix in matrices(model)]
    plain = 2 * plain_numbers(model)
    embeddings = 2 * shape.hidden_size * shape.vocab_size
    return Layers(
        block=sum(size * matrix.count for matrix, size in found) + plain,
        block_read=sum(size * matrix.used for matrix, size in found) + plain,
        embeddings=embeddings,
        head=embeddings,
        head_stored=not shape.tied_embeddings,
        norm=2 * shape.hidden_size,
    )


@dataclass(frozen=True)
class Arrangement:
    """Cards in rank order, tensor ranks varying fastest."""

    cards: tuple[int, ...]
    tensor: int

    @property
    def stages(self) -> int:
        return len(self.cards) // self.tensor


def divides(model: str, scheme: str, tensor: int, stages: int) -> bool:
    """Return whether the document lets the model be cut so."""
    shape = SHAPES[model]
    if stages > shape.layers or shape.heads % tensor or shape.kv_heads % tensor:
        return False
    for width in (shape.intermediate_size, shape.expert_intermediate_size):
        if width % tensor:
            return False
        if tensor > 1 and scheme != "BF16" and width // tensor % GROUP:
            return False
    return True


def needs(case: Case, scheme: str, tried: Arrangement) -> list[float]:
    """Return the bytes that vLLM counts on each card of an arrangement."""
    shape, stored = SHAPES[case.model], layers_of(case.model, scheme)
    tensor, stages = tried.tensor, tried.stages
    per_stage = math.ceil(shape.layers / stages)
    row = 2 * shape.kv_heads * shape.head_dim * (1 if case.kv_type == "fp8" else 2) / tensor
    tokens = case.slots * math.ceil(case.context / BLOCK) * BLOCK + BLOCK
    if shape.sliding_window:
        sliding = sum(
            1 for layer in range(shape.layers) if layer % shape.global_every != shape.global_every - 1
        )
        window = min(shape.sliding_window - 1 + BATCHED_TOKENS, case.context)
        held = min(tokens, case.slots * (math.ceil(window / BLOCK) + 1) * BLOCK + BLOCK)
        here = sliding // stages
        cache_bytes = row * ((per_stage - here) * tokens + here * held)
    else:
        cache_bytes = row * per_stage * tokens
    width = shape.intermediate_size
    if shape.experts:
        width = shape.experts_used * shape.expert_intermediate_size + shape.shared_expert_intermediate_size
    sampler = SAMPLER * max(case.slots, SEQUENCES) * shape.vocab_size
    activations = BATCHED_TOKENS * (PER_INTERMEDIATE * width / tensor + PER_HIDDEN * shape.hidden_size)
    work = max(sampler, activations) + GRAPHS
    work += NON_TORCH_PARALLEL if len(tried.cards) > 1 else NON_TORCH
    found = []
    for rank in range(len(tried.cards)):
        stage = rank // tensor
        weights = stored.block * per_stage
        if stage == 0:
            weights += stored.embeddings
        if stage == stages - 1:
            weights += stored.norm
            # A tied head is the embeddings, which the first stage has already.
            weights += stored.head if stored.head_stored or stage > 0 else 0
        found.append(weights / tensor + cache_bytes + work)
    return found


def slack(case: Case, scheme: str, tried: Arrangement) -> float:
    """Return the bytes left in the tightest place; negative where the arrangement does not fit."""
    cards = [case.cards[index] for index in tried.cards]
    shares = [UTILIZATION]
    for card in cards:
        outside = OUTSIDE + max(OUTSIDE_LEAST, OUTSIDE_SHARE * card.total)
        shares.append((card.budget - outside) / (card.total - card.reserved))
    share = max(0.0, math.floor(min(shares) * 10_000) / 10_000)
    rooms = [share * (card.total - card.reserved) for card in cards]
    left = [room - need for room, need in zip(rooms, needs(case, scheme, tried), strict=True)]
    host = case.ram - PROCESSES - SYSTEM_RAM - (OPEN_WEBUI_RAM if case.open_webui else 0)
    return min([*left, host])


def tokens_per_s(case: Case, scheme: str, tried: Arrangement) -> float:
    """Return the expected speed of one stream: stages one after another, ranks of a stage at once."""
    shape, stored = SHAPES[case.model], layers_of(case.model, scheme)
    read = stored.block_read * shape.layers + stored.norm + stored.head
    share = {"BF16": SHARE_16_BIT, "GPTQ-Int8": SHARE_8_BIT, "FP8": SHARE_8_BIT}.get(scheme, SHARE_4_BIT)
    cards = [case.cards[index] for index in tried.cards]
    if scheme == "FP8" and all(card.level >= NATIVE_FP8 for card in cards):
        share = SHARE_NATIVE_FP8
    seconds = 0.0
    for stage in range(tried.stages):
        ranks = cards[stage * tried.tensor : (stage + 1) * tried.tensor]
        slowest = min(card.bytes_per_s for card in ranks)
        seconds += read / tried.stages / tried.tensor / (slowest * share)
    return 1 / seconds


def arrangements(case: Case, scheme: str) -> Iterator[Arrangement]:
    """Yield everything that the document allows: no MIG instance, cards that the kernels run on, tensors
    over like cards only."""
    if not DRIVERS[case.driver]:
        return
    wide = SHAPES[case.model].architecture in BFLOAT16_ONLY
    least = BFLOAT16_CAPABILITY if wide else LEAST_CAPABILITY
    if case.kv_type == "fp8":
        least = max(least, FP8_CACHE_CAPABILITY)
    able = [index for index, card in enumerate(case.cards) if card.level >= least and not card.mig]
    seen = set()
    for size in range(1, len(able) + 1):
        for order in permutations(able, size):
            kinds = tuple(case.cards[index] for index in order)
            for tensor in range(1, size + 1):
                if size % tensor or (kinds, tensor) in seen:
                    continue
                seen.add((kinds, tensor))
                stages = [kinds[start : start + tensor] for start in range(0, size, tensor)]
                if any(len({card.name for card in stage}) > 1 for stage in stages):
                    continue
                if divides(case.model, scheme, tensor, size // tensor):
                    yield Arrangement(order, tensor)


# The planner, asked as a play asks it.


@cache
def data() -> tuple[dict[str, Any], dict[str, Any]]:
    gpus = yaml.safe_load((CATALOG_DIR / "gpus.yml").read_text())
    return gpus, yaml.safe_load((CATALOG_DIR / "engines.yml").read_text())


@cache
def entry(model: str, schemes: tuple[str, ...]) -> Any:
    return entry_from_dict(
        {
            "schema_version": 1,
            "id": model,
            "licence": {"id": "none", "needs_acceptance": False},
            "shape": asdict(SHAPES[model]),
            "variants": [
                {"name": scheme, "format": "safetensors", "engines": ["vllm"], "scheme": scheme}
                for scheme in schemes
            ],
        },
        origin="benchmarks/sizing/vllm_decisions.py",
    )


def plan(case: Case) -> tuple[str | None, list[dict[str, Any]]]:
    """Return (the scheme served, the planner's candidates)."""
    accelerators = [
        {
            "uuid": f"{'MIG' if card.mig else 'GPU'}-{index}",
            "index": index,
            "name": card.name,
            "compute_capability": card.capability,
            "memory_total_bytes": card.total,
            "memory_reserved_bytes": card.reserved,
            "memory_kind": "dedicated",
            "memory_bandwidth_bytes_per_s": card.bytes_per_s,
            "mig_enabled": False,
            "mig_profile": "3g.40gb" if card.mig else None,
            "mig_parent": None,
            "display": False,
        }
        for index, card in enumerate(case.cards)
    ]
    facts = {
        "schema_version": 1,
        "stable": {
            "machine_id": "0" * 32,
            "ram_total_bytes": case.ram,
            "cgroup_limit_bytes": None,
            "cpu": {"threads": 8},
            "driver": {"version": case.driver} if case.cards else None,
            "accelerators": accelerators,
        },
        "foreign_bytes": {
            item["uuid"]: card.foreign for item, card in zip(accelerators, case.cards, strict=True)
        },
        "live": {},
        "problems": [],
    }
    policy = policy_from_variables(
        {
            "fleetfit_model": case.model,
            "fleetfit_engine": "vllm",
            "fleetfit_min_context_tokens": case.context,
            "fleetfit_slots": case.slots,
            "fleetfit_kv_type": case.kv_type,
            "fleetfit_min_quality_tier": case.lowest_tier,
            "fleetfit_open_webui": case.open_webui,
            "fleetfit_prefer": case.prefer,
        }
    )
    gpus, engines = data()
    try:
        made = plan_host(
            facts,
            policy,
            entry=entry(case.model, case.schemes),
            gpus=gpus,
            engines=engines,
            available_engines=frozenset({"vllm"}),
            require_pinned=False,
        )
    except NothingFitsError as error:
        return None, [item.as_dict() for item in error.candidates]
    return made["deployments"][0]["variant"], made["candidates"]


def arrangement_of(candidate: dict[str, Any]) -> Arrangement:
    """Return where a candidate goes, read back from its arguments as the engine would."""
    args = dict(zip(candidate["args"], [*candidate["args"][1:], ""], strict=True))
    cards = tuple(int(device["id"].rpartition("-")[2]) for device in candidate["devices"])
    tensor = int(args["--tensor-parallel-size"])
    if tensor * int(args["--pipeline-parallel-size"]) != len(cards):
        raise ValueError(f"{candidate['variant']} names {len(cards)} cards and other parallelism: {args}")
    return Arrangement(cards, tensor)


@dataclass
class Findings:
    """What a run found; sentences for what is wrong."""

    cases: int = 0
    candidates: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    false_fits: list[str] = field(default_factory=list)
    needless: list[str] = field(default_factory=list)
    needless_candidates: list[str] = field(default_factory=list)
    beyond_bound: list[str] = field(default_factory=list)
    other_choices: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Return what breaks issue 3's figures."""
        found = [f"FALSE FIT: {text}" for text in self.false_fits]
        found += [f"refused by more than allowed: {text}" for text in self.beyond_bound]
        found += [f"another choice: {text}" for text in self.other_choices]
        if len(self.needless) > 0.01 * self.cases:
            found += [f"needless: {text}" for text in self.needless]
        return found


def judge(case: Case, findings: Findings) -> None:
    """Compare the planner's decision in one case with the brute force's."""
    served, candidates = plan(case)
    findings.cases += 1
    findings.candidates += len(candidates)
    best: tuple[tuple[float, ...], str] | None = None
    refused_needlessly = False
    for candidate in candidates:
        scheme = candidate["variant"]
        if SCHEMES[scheme] > (3 if case.lowest_tier == "Q4_K_M" else 0):
            if candidate["rejected"]["code"] != "below_min_quality_tier":
                findings.other_choices.append(
                    f"{case}: {scheme} is below the tier, the planner says otherwise"
                )
            continue
        if candidate["fits"]:
            left = slack(case, scheme, arrangement_of(candidate))
            if left < 0 or arrangement_of(candidate) not in _alike(case, scheme):
                findings.false_fits.append(
                    f"{case}: {scheme} {arrangement_of(candidate)} misses {-left:.0f} B"
                )
        rooms = [(slack(case, scheme, tried), tried) for tried in arrangements(case, scheme)]
        fitting = [item for item in rooms if item[0] >= 0]
        if fitting and not candidate["fits"]:
            refused_needlessly = True
            left, tried = max(fitting, key=lambda item: item[0])
            text = f"{case}: {scheme} would fit with {left / MIB:.0f} MiB left as {tried}"
            findings.needless_candidates.append(f"{text}; the planner: {candidate['rejected']['reason']}")
            bound = min(max(MISS, MISS_SHARE * case.cards[index].total) for index in tried.cards)
            if max(left, candidate["rejected"]["short_by_bytes"] or 0) > bound:
                findings.beyond_bound.append(f"{text}; the planner: {candidate['rejected']['reason']}")
        if fitting:
            speed = max(tokens_per_s(case, scheme, tried) for _, tried in fitting)
            tier = -float(SCHEMES[scheme])
            score = (speed, tier) if case.prefer == "speed" else (tier, speed)
            if best is None or score > best[0]:
                best = (score, scheme)
    findings.kinds["nothing" if served is None else f"{served}"] += 1
    if refused_needlessly and served != (best and best[1]):
        findings.needless.append(f"{case}: the planner takes {served}, the brute force {best}")
    elif served != (best and best[1]):
        findings.other_choices.append(f"{case}: the planner takes {served}, the brute force {best}")


def _alike(case: Case, scheme: str) -> set[Arrangement]:
    """Return the allowed arrangements in every naming of equal cards."""
    found = set()
    able = range(len(case.cards))
    kinds = {
        (tuple(case.cards[i] for i in tried.cards), tried.tensor) for tried in arrangements(case, scheme)
    }
    for size in range(1, len(case.cards) + 1):
        for order in permutations(able, size):
            for tensor in range(1, size + 1):
                if (tuple(case.cards[i] for i in order), tensor) in kinds:
                    found.add(Arrangement(order, tensor))
    return found


def cards_of_catalog() -> list[Card]:
    """Return the catalog's cards with memory of their own."""
    return [
        Card(
            (item["nvml_names"] or [item["name"]])[0],
            item["total_mib"] * MIB,
            (int(item["total_mib"] * 0.035) if item["reserved_mib"] is None else item["reserved_mib"]) * MIB,
            0,
            item["compute_capability"],
            item["bandwidth_gb_per_s"] * 1e9,
        )
        for item in data()[0]["gpus"]
        if item.get("memory_kind", "dedicated") == "dedicated"
    ]


def draw_cases(count: int = CASES) -> list[Case]:
    """Return ``count`` cases, the same in every run: every shape in turn, one to four cards, some unlike."""
    dice = random.Random(SEED)  # noqa: S311 - the same cases every time
    cards = cards_of_catalog()
    names = list(SHAPES)
    found = []
    for number in range(count):
        model = names[number % len(names)]
        shape = SHAPES[model]
        whole = layers_of(model, "BF16")
        size = whole.block * shape.layers + 2 * whole.embeddings
        how_many = dice.choice((1, 1, 1, 2, 2, 3, 4))
        near = [card for card in cards if 0.35 * size < card.budget * how_many < 3 * size + 12 * GIB] or cards
        chosen = [dice.choice(near)] * how_many
        if how_many > 1 and dice.random() < 0.4:
            chosen = [dice.choice(near) for _ in range(how_many)]
        if dice.random() < 0.08:
            chosen[0] = replace(chosen[0], mig=True)
        taken = [replace(card, foreign=dice.choice((0, 0, 0, 256, 1024)) * MIB) for card in chosen]
        contexts = [
            item for item in (1000, 4096, 8193, 16384, 32768, 65536) if item <= shape.native_context_tokens
        ]
        found.append(
            Case(
                model,
                dice.choice(contexts),
                dice.choice((1, 2, 3, 4, 8, 24)),
                dice.choice(("f16", "f16", "fp8")),
                tuple(taken),
                dice.choice((4, 8, 16, 16, 32, 64, 64, 128)) * GIB,
                dice.choice(("580.95.05",) * 12 + ("550.163.01", "525.60.13", "470.82.01")),
                dice.random() < 0.5,
                dice.choice(("Q4_K_M", "Q4_K_M", "Q8_0")),
                dice.choice(("quality", "quality", "speed")),
                tuple(sorted(dice.sample(list(SCHEMES), dice.choice((1, 2, 3, 5))))),
            )
        )
    return found


def tight_cases(cases: Sequence[Case]) -> list[tuple[Case, str, bool]]:
    """Return (case, scheme, whether it must fit): one card made to measure, a MiB too small and by the
    bound too large."""
    found = []
    for case in {item.model: item for item in cases}.values():
        for scheme in ("BF16", "AWQ"):
            if not divides(case.model, scheme, 1, 1):
                continue
            least = _least_total(case, scheme)
            for total, fits in (
                (least - MIB, False),
                (least + max(MISS, int(MISS_SHARE * least)) + MIB, True),
            ):
                card = Card("made to measure", total, 0, 0, "8.9", 9e11)
                found.append((_alone(case, card), scheme, fits))
    return found


def _alone(case: Case, card: Card) -> Case:
    """Return the case on one card, with nothing else in its way."""
    return replace(
        case, cards=(card,), ram=64 * GIB, driver="580.95.05", lowest_tier="Q4_K_M", schemes=tuple(SCHEMES)
    )


def _least_total(case: Case, scheme: str) -> int:
    """Return the smallest card in bytes, by a MiB, that holds the scheme alone."""
    low, high = 0, 1 << 20
    while high - low > 1:
        middle = (low + high) // 2
        tried = _alone(case, Card("made to measure", middle * MIB, 0, 0, "8.9", 9e11))
        if slack(tried, scheme, Arrangement((0,), 1)) >= 0:
            high = middle
        else:
            low = middle
    return high * MIB


def run(cases: Sequence[Case], tight: Sequence[tuple[Case, str, bool]] = ()) -> Findings:
    """Judge the cases, and cards made to measure."""
    findings = Findings()
    for case in cases:
        judge(case, findings)
    for case, scheme, wanted in tight:
        found = next(item for item in plan(case)[1] if item["variant"] == scheme)
        findings.candidates += 1
        if found["fits"] and not wanted:
            findings.false_fits.append(f"{case}: {scheme} is held to fit, a MiB above the card")
        if wanted and not found["fits"]:
            findings.beyond_bound.append(f"{case}: {scheme} is refused with the bound's room to spare")
    return findings
