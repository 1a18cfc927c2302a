"""Hold the planner's decisions for llama.cpp against a brute force over llama.cpp's own accounting.

A case is a model's shape, one or two cards, RAM, context, slots and KV type. The truth is what
``llama-fit-params`` prints for a file of that shape, plus the documented terms that it cannot know: CUDA's
context and libraries, its f16 copies of a quantized cache layer, the largest tensor that stays in RAM, and
the margins. The brute force is written from the documents (docs/sizing.md, docs/contracts.md) and shares no
code with the planner. There is no previous plan.

A placement that the planner takes is asked about as it is; where it refuses, the search looks for any
that fits. What a card needs is monotone in its layers, so the search bisects; where two cards hold a part
of a model, the last one is filled first.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from itertools import permutations
from pathlib import Path
from typing import Any

import gguf
import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.catalog_entry import entry_from_dict
from ansible_collections.fleetfit.llm.plugins.module_utils.plan import plan_host
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import policy_from_variables
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import NothingFitsError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import CATALOG_DIR

from . import peers
from .oracle import Accounting, Oracle, rpc_devices
from .shapes import SHAPES

MIB = 1 << 20
# Best first; the policy's lowest tier is Q4_K_M.
SCHEMES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
# docs/sizing.md, in MiB: CUDA's context, the margins of a card, the RAM that is not the engine's.
CUDA_CONTEXT = 512
MARGIN_LEAST, MARGIN_MOST, MARGIN_SHARE, MARGIN_DISPLAY = 512, 1024, 0.05, 512
SYSTEM_RAM, OPEN_WEBUI_RAM = 2048, 1024
# A needless refusal may miss by this much at most.
MISS_MIB, MISS_SHARE = 256, 0.02
SEED = 20260101
SLOTS = (1, 2, 3, 4)
CONTEXTS = (1000, 2048, 4096, 8192, 8193, 16384, 32768, 65536, 131072)
RAM_GIB = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Card:
    """One card of a case; sizes in MiB."""

    name: str
    total: int
    reserved: int = 0
    foreign: int = 0
    display: bool = False
    compute_capability: str = "8.6"
    gb_per_s: float = 900

    @property
    def budget(self) -> int:
        return self.total - self.reserved - self.foreign

    @property
    def margin(self) -> float:
        share = min(max(self.total * MARGIN_SHARE, MARGIN_LEAST), MARGIN_MOST)
        return share + (MARGIN_DISPLAY if self.display else 0)

    @property
    def room(self) -> float:
        """Return the MiB that the engine's own buffers and CUDA's other terms may have."""
        return self.budget - CUDA_CONTEXT - self.margin

    @property
    def bound(self) -> float:
        return max(MISS_MIB, MISS_SHARE * self.total)


@dataclass(frozen=True)
class Load:
    """What a model is asked to do; one oracle question per scheme and placement."""

    model: str
    context: int
    slots: int
    kv_type: str

    @property
    def padded(self) -> int:
        return (self.context + 255) // 256 * 256

    @property
    def layers(self) -> int:
        """Return the value of -ngl that means everything."""
        return SHAPES[self.model].layers + 1


@dataclass(frozen=True)
class Case:
    """A load on a host; RAM in MiB."""

    load: Load
    cards: tuple[Card, ...]
    ram: int
    open_webui: bool = False

    @property
    def ram_room(self) -> int:
        """Return the MiB of RAM that the engine may have."""
        return self.ram - SYSTEM_RAM - (OPEN_WEBUI_RAM if self.open_webui else 0)

    def __str__(self) -> str:
        cards = " + ".join(f"{card.name} {card.budget} MiB" for card in self.cards) or "no card"
        load = self.load
        return f"{load.model} {load.context} x {load.slots} {load.kv_type} on {cards}, {self.ram // 1024} GiB RAM"


@dataclass(frozen=True)
class Place:
    """A placement as llama.cpp is told it: cards by index in their order, layers on each, --n-cpu-moe."""

    cards: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    cpu_moe: int = 0


@dataclass
class Tensors:
    """The sizes of a file's tensors in bytes, read by the gguf package."""

    path: Path

    @cached_property
    def by_block(self) -> dict[int, list[tuple[str, int]]]:
        found: dict[int, list[tuple[str, int]]] = {}
        for tensor in gguf.GGUFReader(self.path).tensors:
            parts = tensor.name.split(".")
            if parts[0] == "blk":
                found.setdefault(int(parts[1]), []).append((tensor.name, int(tensor.n_bytes)))
        return found

    def largest(self, blocks: int, expert_blocks: int) -> float:
        """Return the largest tensor in MiB of the first ``blocks`` whole and ``expert_blocks`` experts."""
        sizes = [size for block in range(blocks) for _, size in self.by_block[block]]
        sizes += [
            size for block in range(expert_blocks) for name, size in self.by_block[block] if "_exps" in name
        ]
        return max(sizes, default=0) / MIB


@dataclass
class Truth:
    """llama.cpp's figures and the documented terms; every question is asked once."""

    oracle: Oracle
    ports: Sequence[int]
    answers: dict[tuple[Any, ...], Accounting] = field(default_factory=dict)
    tensors: dict[Path, Tensors] = field(default_factory=dict)

    def ask(self, load: Load, scheme: str, counts: tuple[int, ...], cpu_moe: int) -> Accounting:
        key = (load, scheme, counts, cpu_moe)
        if key not in self.answers:
            self.answers[key] = self.oracle.ask(
                self.oracle.model(load.model, SHAPES[load.model], scheme),
                n_ctx=load.padded * load.slots,
                slots=load.slots,
                kv_type_k=load.kv_type,
                kv_type_v=load.kv_type,
                n_gpu_layers=sum(counts),
                n_cpu_moe=cpu_moe,
                rpc=self.ports[: len(counts)],
                tensor_split=counts if len(counts) > 1 else None,
            )
        return self.answers[key]

    def needs(self, load: Load, scheme: str, place: Place) -> tuple[tuple[float, ...], float]:
        """Return (MiB on every card beside CUDA's context, MiB of RAM); figures as llama.cpp cuts them."""
        answer = self.ask(load, scheme, place.counts, place.cpu_moe)
        shape = SHAPES[load.model]
        path = self.oracle.model(load.model, shape, scheme)
        tensors = self.tensors.setdefault(path, Tensors(path))
        in_ram = load.layers - sum(place.counts)
        devices = []
        for index, buffers in enumerate(answer.devices):
            need: float = buffers.model_mib + buffers.context_mib + buffers.compute_mib
            only_output = index == len(place.counts) - 1 and place.counts[index] == 1
            if load.kv_type not in ("f16", "bf16", "f32") and not only_output:
                # Keys and values of one layer, two bytes each.
                need += 2 * 2 * load.padded * shape.kv_heads * shape.head_dim / MIB
            if index == 0:
                need += tensors.largest(min(in_ram, shape.layers), place.cpu_moe if shape.experts else 0)
            devices.append(need)
        host = answer.host
        return tuple(devices), host.model_mib + host.context_mib + host.compute_mib

    def slack(self, case: Case, scheme: str, place: Place) -> float:
        """Return the MiB left in the tightest place; negative where the placement does not fit."""
        devices, host = self.needs(case.load, scheme, place)
        rooms = [case.cards[index].room for index in place.cards]
        left = [room - need for room, need in zip(rooms, devices, strict=True)]
        return min([*left, case.ram_room - host])

    def card_slack(self, case: Case, scheme: str, place: Place, index: int) -> float:
        """Return the MiB left on one card of a placement."""
        return case.cards[place.cards[index]].room - self.needs(case.load, scheme, place)[0][index]

    # The brute force.

    def resident(self, case: Case, scheme: str) -> tuple[float, Place] | None:
        """Return the roomiest placement wholly on cards, with its slack; None where none fits."""
        layers = case.load.layers
        found = []
        for size in range(1, len(case.cards) + 1):
            for order in permutations(range(len(case.cards)), size):
                if self._bare(case.load, scheme) > sum(case.cards[index].room for index in order):
                    continue  # not even weights and cache would go there
                if size == 1:
                    found.append(Place(order, (layers,)))
                    continue
                # The first card's share as large as it can be, and smaller ones near it.
                most = self._most(case, scheme, order, 0, layers - 1, lambda count: (count, layers - count))
                found += [
                    Place(order, (count, layers - count)) for count in range(max(1, most - 2), most + 1)
                ]
        return self._roomiest(case, scheme, found)

    def anyhow(self, case: Case, scheme: str) -> tuple[float, Place] | None:
        """Return a placement that fits with a part, or all, in RAM; None where none does."""
        cpu = self._roomiest(case, scheme, [Place()])
        if cpu is not None:
            return cpu
        layers, shape = case.load.layers, SHAPES[case.load.model]
        found = []
        for size in range(1, len(case.cards) + 1):
            for order in permutations(range(len(case.cards)), size):
                rooms = sum(case.cards[index].room for index in order)
                if self._bare(case.load, scheme) > rooms + case.ram_room:
                    continue
                for cpu_moe in (0, shape.layers) if shape.experts else (0,):
                    found += self._partial(case, scheme, order, cpu_moe)
                if shape.experts and size == 1:
                    found += [Place(order, (layers,), moe) for moe in range(1, shape.layers + 1)]
        return self._roomiest(case, scheme, found)

    def most_layers(self, case: Case, scheme: str, card: int) -> int:
        """Return the most layers, fewer than all, that one card holds."""
        return self._most(case, scheme, (card,), 0, case.load.layers - 1, lambda count: (count,))

    def _partial(self, case: Case, scheme: str, order: tuple[int, ...], cpu_moe: int) -> list[Place]:
        """Return placements with as many layers on the cards as they hold."""
        most = case.load.layers if cpu_moe else case.load.layers - 1
        if len(order) == 1:
            count = self._most(case, scheme, order, 0, most, lambda count: (count,), cpu_moe)
            return [Place(order, (count,), cpu_moe)] if count else []
        last = self._most(case, scheme, order, 1, most - 1, lambda count: (1, count), cpu_moe)
        found = []
        for count in range(max(1, last - 2), last + 1):

            def with_first(first: int, count: int = count) -> tuple[int, ...]:
                return (first, count)

            first = self._most(case, scheme, order, 0, most - count, with_first, cpu_moe)
            if first:
                found.append(Place(order, (first, count), cpu_moe))
        return found

    def _most(
        self,
        case: Case,
        scheme: str,
        order: tuple[int, ...],
        index: int,
        most: int,
        counts: Callable[[int], tuple[int, ...]],
        cpu_moe: int = 0,
    ) -> int:
        """Return the largest count up to ``most`` with which the card at ``index`` of ``order`` holds its
        share."""

        def fits(count: int) -> bool:
            return self.card_slack(case, scheme, Place(order, counts(count), cpu_moe), index) >= 0

        share = case.cards[order[index]].room / max(self._bare(case.load, scheme), 1)
        count = largest(fits, most, guess=int(share * case.load.layers * 0.95))
        # Buffers are not quite monotone at the first layer.
        while count < most and fits(count + 1):
            count += 1
        return count

    def _bare(self, load: Load, scheme: str) -> float:
        """Return the MiB of weights and cache of everything on one device."""
        whole = self.ask(load, scheme, (load.layers,), 0).devices[0]
        return whole.model_mib + whole.context_mib

    def _roomiest(self, case: Case, scheme: str, places: list[Place]) -> tuple[float, Place] | None:
        slacks = [(self.slack(case, scheme, place), place) for place in places]
        best = max(slacks, key=lambda item: item[0], default=None)
        return best if best is not None and best[0] >= 0 else None


def largest(fits: Callable[[int], bool], most: int, *, guess: int) -> int:
    """Return the largest number from 1 to ``most`` that fits, by bisection around a guess; 0 where none
    does."""
    low, high = 0, most + 1
    step = 1
    middle = min(max(guess, 1), most)
    while high - low > 1:
        if fits(middle):
            low, middle = middle, middle + step
        else:
            high, middle = middle, middle - step
        step *= 2
        if not low < middle < high:
            middle = (low + high) // 2
    return low


# The planner, asked as a play asks it.


@dataclass(frozen=True)
class Choice:
    """One candidate of the planner: where it would go, or that memory speaks against it."""

    scheme: str
    fits: bool
    place: Place
    resident: bool
    short_mib: float


@cache
def catalog() -> tuple[dict[str, Any], dict[str, Any]]:
    gpus = yaml.safe_load((CATALOG_DIR / "gpus.yml").read_text())
    return gpus, yaml.safe_load((CATALOG_DIR / "engines.yml").read_text())


@cache
def entry(model: str) -> Any:
    return entry_from_dict(
        {
            "schema_version": 1,
            "id": model,
            "licence": {"id": "none", "needs_acceptance": False},
            "shape": asdict(SHAPES[model]),
            "kv_types": {"keys": ["f16", "q8_0"], "values": ["f16", "q8_0"]},
            "variants": [
                {"name": scheme, "format": "gguf", "engines": ["llama_cpp"], "scheme": scheme}
                for scheme in SCHEMES
            ],
        },
        origin="benchmarks/sizing/decisions.py",
    )


def plan(case: Case) -> tuple[Choice | None, list[Choice]]:
    """Return (what the planner serves, all its candidates)."""
    cards = [
        {
            "uuid": f"GPU-{index}",
            "index": index,
            "name": card.name,
            "compute_capability": card.compute_capability,
            "memory_total_bytes": card.total * MIB,
            "memory_reserved_bytes": card.reserved * MIB,
            "memory_kind": "dedicated",
            "memory_bandwidth_bytes_per_s": card.gb_per_s * 1e9,
            "mig_enabled": False,
            "mig_profile": None,
            "mig_parent": None,
            "display": card.display,
        }
        for index, card in enumerate(case.cards)
    ]
    facts = {
        "schema_version": 1,
        "stable": {
            "machine_id": "0" * 32,
            "ram_total_bytes": case.ram * MIB,
            "cgroup_limit_bytes": None,
            "cpu": {"threads": 8},
            "driver": {"version": "580.95.05"} if cards else None,
            "accelerators": cards,
        },
        "foreign_bytes": {f"GPU-{i}": card.foreign * MIB for i, card in enumerate(case.cards)},
        "live": {},
        "problems": [],
    }
    load = case.load
    policy = policy_from_variables(
        {
            "fleetfit_model": load.model,
            "fleetfit_min_context_tokens": load.context,
            "fleetfit_slots": load.slots,
            "fleetfit_kv_type": load.kv_type,
            "fleetfit_open_webui": case.open_webui,
        }
    )
    gpus, engines = catalog()
    try:
        made = plan_host(
            facts,
            policy,
            entry=entry(load.model),
            gpus=gpus,
            engines=engines,
            available_engines=frozenset({"llama_cpp"}),
            require_pinned=False,
        )
        candidates = made["candidates"]
        served = made["deployments"][0]["variant"]
    except NothingFitsError as error:
        candidates = [item.as_dict() for item in error.candidates]
        served = None
    choices = [_choice(item, load) for item in candidates]
    return next((item for item in choices if item.scheme == served), None), choices


def _choice(candidate: dict[str, Any], load: Load) -> Choice:
    rejected = candidate["rejected"]
    if rejected and rejected["code"] != "does_not_fit":
        raise ValueError(f"{candidate['variant']} is rejected for {rejected}, which is not about memory")
    # Read back from the very arguments, as the engine would.
    args = dict(zip(candidate["args"], [*candidate["args"][1:], ""], strict=True))
    layers = int(args["-ngl"])
    split = tuple(int(part) for part in args["--tensor-split"].split(",")) if "--tensor-split" in args else ()
    cpu_moe = int(args.get("--n-cpu-moe", 0))
    cards = tuple(int(device["id"].removeprefix("GPU-")) for device in candidate["devices"])
    counts = split or ((layers,) if cards else ())
    return Choice(
        scheme=candidate["variant"],
        fits=candidate["fits"],
        place=Place(cards, counts, cpu_moe),
        resident=bool(cards) and layers == load.layers and not cpu_moe,
        short_mib=(rejected["short_by_bytes"] / MIB) if rejected else 0.0,
    )


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate is wholly on the one card of its case: the truth, and what each planner says."""

    truth: bool
    says: dict[str, bool]


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
    fewer_layers: list[str] = field(default_factory=list)
    partial: int = 0
    # Of every candidate on a single card: whether llama.cpp holds it whole there, and who says so.
    verdicts: list[Verdict] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Take in what another part of the run found."""
        self.cases += other.cases
        self.candidates += other.candidates
        self.kinds += other.kinds
        self.partial += other.partial
        for name in (
            "false_fits",
            "needless",
            "needless_candidates",
            "beyond_bound",
            "fewer_layers",
            "verdicts",
        ):
            getattr(self, name).extend(getattr(other, name))

    def problems(self) -> list[str]:
        """Return what breaks issue 3's figures."""
        found = [f"FALSE FIT: {text}" for text in self.false_fits]
        found += [f"refused by more than allowed: {text}" for text in self.beyond_bound]
        if len(self.needless) > 0.01 * self.cases:
            found += [f"needless: {text}" for text in self.needless]
        return found


def judge(truth: Truth, case: Case, findings: Findings) -> None:
    """Compare the planner's decision in one case with the brute force's."""
    chosen, choices = plan(case)
    findings.cases += 1
    findings.candidates += len(choices)
    kind = "nothing" if chosen is None else "resident" if chosen.resident else "partial"
    if chosen is not None and not chosen.place.cards:
        kind = "cpu"
    findings.kinds[kind] += 1
    wrong = set()
    for choice in choices:
        if choice.fits:
            slack = truth.slack(case, choice.scheme, choice.place)
            if slack < 0:
                wrong.add(choice.scheme)
                findings.false_fits.append(f"{case}: {choice.scheme} {choice.place} misses {-slack:.0f} MiB")
    best = None
    for choice in choices:
        # What the planner holds to fit is shown to fit above, so only its refusals need a search.
        resident = choice.fits and choice.resident
        if not resident:
            room = truth.resident(case, choice.scheme)
            if room is not None:
                resident = True
                _needless(findings, case, choice, room, "resident")
        if len(case.cards) == 1:
            findings.verdicts.append(_verdict(case, choice, resident and choice.scheme not in wrong))
        fits = resident or choice.fits
        if not fits:
            room = truth.anyhow(case, choice.scheme)
            if room is not None:
                fits = True
                _needless(findings, case, choice, room, "at all")
        # The better tiers come first, and what is resident beats them.
        if fits and (best is None or (resident and not best[1])):
            best = (choice.scheme, resident)
    mine = None if chosen is None else (chosen.scheme, chosen.resident)
    if mine != best:
        findings.needless.append(f"{case}: the planner takes {mine}, the brute force {best}")
    dense = not SHAPES[case.load.model].experts
    if kind == "partial" and chosen is not None and len(chosen.place.cards) == 1 and dense:
        findings.partial += 1
        most = truth.most_layers(case, chosen.scheme, chosen.place.cards[0])
        if most > chosen.place.counts[0]:
            findings.fewer_layers.append(f"{case}: {chosen.place.counts[0]} layers of {most}")


def _needless(findings: Findings, case: Case, choice: Choice, room: tuple[float, Place], what: str) -> None:
    slack, place = room
    text = f"{case}: {choice.scheme} would fit {what} with {slack:.0f} MiB left as {place}"
    findings.needless_candidates.append(text)
    bounds = [case.cards[index].bound for index in place.cards] or [max(MISS_MIB, MISS_SHARE * case.ram)]
    if max(slack, choice.short_mib) > min(bounds):
        findings.beyond_bound.append(f"{text}; the planner says short by {choice.short_mib:.0f} MiB")


def _verdict(case: Case, choice: Choice, resident: bool) -> Verdict:
    load = case.load
    asked = peers.Load(load.model, choice.scheme, load.context, load.slots, load.kv_type)
    budget = case.cards[0].budget * MIB
    says = {name: formula(asked) <= budget for name, formula in peers.PEERS.items()}
    return Verdict(resident, {"fleetfit": choice.fits and choice.resident, **says})


def tight(truth: Truth, load: Load, scheme: str, findings: Findings) -> None:
    """Judge cards made for one variant: a MiB too small, and just large enough by the bound."""
    layers = load.layers
    devices, _ = truth.needs(load, scheme, Place((0,), (layers,)))
    total = next(size for size in range(int(devices[0]), 1 << 30) if Card("", size).room >= devices[0])
    for size, wanted in ((total - 1, False), (total + int(Card("", total).bound) + 1, True)):
        case = Case(load, (Card("made to measure", size),), 1 << 18)
        choice = next(item for item in plan(case)[1] if item.scheme == scheme)
        findings.candidates += 1
        if choice.resident and choice.fits and not wanted:
            findings.false_fits.append(f"{case}: {scheme} is held to fit, a MiB above the card")
        if wanted and not (choice.resident and choice.fits):
            findings.beyond_bound.append(f"{case}: {scheme} is refused with the bound's room to spare")


# The cases.


def cards_of_catalog() -> list[Card]:
    found = []
    for item in catalog()[0]["gpus"]:
        if item.get("memory_kind", "dedicated") != "dedicated":
            continue
        reserved = item["reserved_mib"]
        found.append(
            Card(
                (item["nvml_names"] or [item["name"]])[0],
                item["total_mib"],
                int(item["total_mib"] * 0.035) if reserved is None else reserved,
                compute_capability=item["compute_capability"],
                gb_per_s=item["bandwidth_gb_per_s"],
            )
        )
    return found


def loads(count: int, generator: random.Random) -> list[Load]:
    """Return ``count`` loads, every shape in turn."""
    names = list(SHAPES)
    found: list[Load] = []
    while len(found) < count:
        name = names[len(found) % len(names)]
        native = SHAPES[name].native_context_tokens
        context = generator.choice([item for item in CONTEXTS if item <= native])
        slots = generator.choice(SLOTS)
        # llama.cpp aborts with a quantized cache in several slots here, and the planner refuses it.
        kv_type = "f16" if SHAPES[name].fused_projections and slots > 1 else generator.choice(("f16", "q8_0"))
        if SHAPES[name].head_dim * SHAPES[name].kv_heads % 32:
            kv_type = "f16"
        found.append(Load(name, context, slots, kv_type))
    return found


def draw_cases(count: int, per_load: int = 7) -> list[Case]:
    """Return ``count`` cases, the same in every run; cards of about the model's size, alone and in pairs."""
    generator = random.Random(SEED)  # noqa: S311 - the same cases every time
    cards = cards_of_catalog()
    found: list[Case] = []
    for load in loads(-(-count // per_load), generator):
        shape = SHAPES[load.model]
        weights = 0.55e-6 * parameters(load.model)  # MiB at about 4.6 bits
        cache_mib = 4 * shape.kv_heads * shape.head_dim * shape.layers * load.padded * load.slots / MIB
        fitting = [
            card for card in cards if 0.3 * weights < card.budget < 1.6 * weights + 2 * cache_mib + 3072
        ]
        for index in range(per_load):
            pool = fitting if fitting and index else cards
            chosen = [generator.choice(pool)]
            if index == 5:
                chosen = chosen * 2
            elif index == 6:
                chosen.append(generator.choice(pool))
            changed = [
                Card(
                    card.name,
                    card.total,
                    card.reserved,
                    generator.choice((0, 0, 0, 256, 1024)),
                    generator.random() < 0.15,
                    card.compute_capability,
                    card.gb_per_s,
                )
                for card in chosen
            ]
            ram = generator.choice(RAM_GIB) * 1024
            if index == 0 and generator.random() < 0.3:
                changed = []
            found.append(Case(load, tuple(changed), ram, generator.random() < 0.5))
    return found[:count]


def parameters(model: str) -> int:
    shape = SHAPES[model]
    width = shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    inner = shape.intermediate_size or shape.experts * shape.expert_intermediate_size
    inner = shape.experts * shape.expert_intermediate_size if shape.experts else inner
    return shape.layers * shape.hidden_size * (width + 3 * inner) + 2 * shape.hidden_size * shape.vocab_size


@contextmanager
def open_truth(oracle: Oracle) -> Iterator[Truth]:
    """Yield the truth with two devices on loopback."""
    with rpc_devices(2, oracle.bin) as ports:
        yield Truth(oracle, ports)


def run(truth: Truth, cases: Sequence[Case], tight_loads: Sequence[Load] = ()) -> Findings:
    """Judge the cases, and cards made to measure for some loads."""
    findings = Findings()
    for case in cases:
        judge(truth, case, findings)
    for load in tight_loads:
        for scheme in ("Q8_0", "Q4_K_M"):
            tight(truth, load, scheme, findings)
    return findings


def tight_loads(cases: Sequence[Case]) -> list[Load]:
    return list(dict.fromkeys(case.load for case in cases))
