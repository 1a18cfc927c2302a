"""The decision: hard constraints with stable codes, then residency, tier and speed, never a silent degradation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.plan import make_plan
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import (
    REJECTION_CODES,
    Candidate,
    NothingFitsError,
    choose,
    evaluate,
    layout_of,
    select,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.units import GIB, MIB
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .planning import CATALOG, accelerator, cards, facts, request

BOTH = ("llama_cpp", "vllm")


def by_name(candidates: tuple[Candidate, ...], variant: str) -> Candidate:
    return next(item for item in candidates if item.variant.name == variant)


def rejection(model: str, host: dict[str, Any], variant: str, **variables: Any) -> str | None:
    found = by_name(evaluate(request(model, host, **variables)), variant)
    return None if found.rejected is None else found.rejected.code


@pytest.mark.parametrize(
    ("model", "names", "variables", "variant", "resident"),
    [
        ("qwen2.5-7b-instruct", ["RTX 3060 12GB"], {}, "Q8_0", True),
        ("qwen2.5-7b-instruct", ["RTX 3060 12GB"], {"min_context_tokens": 32768, "slots": 2}, "Q6_K", True),
        ("qwen2.5-7b-instruct", ["RTX 3060 12GB"], {"prefer": "speed"}, "Q4_K_M", True),
        # Q8_0 and F16 are one tier: of the two that fit, the faster.
        ("qwen2.5-7b-instruct", ["RTX 4090"], {}, "Q8_0", True),
        # All reach the model's limit there, so the better tier; on the small card the longest context.
        ("qwen2.5-7b-instruct", ["RTX 4090"], {"prefer": "context"}, "Q8_0", True),
        ("qwen2.5-7b-instruct", ["RTX 3060 12GB"], {"prefer": "context"}, "Q4_K_M", True),
        ("qwen2.5-14b-instruct", ["RTX 4090"], {}, "Q8_0", True),
        ("qwen2.5-32b-instruct", ["RTX 4090", "RTX 4090"], {}, "Q8_0", True),
        ("qwen2.5-32b-instruct", ["RTX 4090", "RTX 3060 12GB"], {}, "Q6_K", True),
        # Nothing at or above the minimum tier is resident: the best tier, partly in RAM, and it says so.
        ("qwen2.5-14b-instruct", ["RTX 3060 8GB"], {}, "Q8_0", False),
        ("qwen2.5-7b-instruct", [], {}, "Q8_0", False),
    ],
)
def test_what_is_chosen(
    model: str, names: list[str], variables: dict[str, Any], variant: str, resident: bool
) -> None:
    best, _ = select(request(model, facts(cards(*names)), **variables))
    assert (best.variant.name, best.resident) == (variant, resident)


def test_resident_beats_a_better_tier_that_is_not() -> None:
    best, candidates = select(request("qwen2.5-14b-instruct", facts(cards("RTX 3060 12GB")), slots=1))
    better = by_name(candidates, "Q8_0")
    assert better.fits
    assert not better.resident
    assert best.resident
    assert best.variant.tier_rank > better.variant.tier_rank


def test_every_device_and_the_host_hold_their_share_and_terms_add_up() -> None:
    host = facts(cards("RTX 4090", "RTX 3060 12GB", "T4"), ram_gib=64)
    for item in evaluate(request("qwen2.5-72b-instruct", host, engines=BOTH, accepted_licences=["qwen"])):
        data = item.as_dict()
        places = [*data["devices"], data["host"]]
        for term in ("weights", "kv_cache", "compute", "overhead", "margin", "total", "budget"):
            assert data["memory_bytes"][term] == sum(place[term] for place in places)
        for place in places:
            parts = ("weights", "kv_cache", "compute", "overhead", "margin")
            assert place["total"] == sum(place[term] for term in parts)
            if item.fits:
                assert place["total"] <= place["budget"]


@pytest.mark.parametrize(
    ("code", "model", "host", "variant", "variables"),
    [
        ("engine_not_available", "qwen2.5-7b-instruct", facts(cards("RTX 4090")), "AWQ", {}),
        ("licence_not_accepted", "qwen2.5-3b-instruct", facts(cards("RTX 4090")), "Q8_0", {}),
        ("below_min_quality_tier", "qwen2.5-7b-instruct", facts(cards("RTX 4090")), "Q2_K", {}),
        ("kv_type_not_allowed", "qwen2.5-7b-instruct", facts(cards("RTX 4090")), "Q8_0", {"kv_type": "q4_0"}),
        (
            "kv_type_not_supported",
            "qwen2.5-7b-instruct",
            facts(cards("RTX 4090")),
            "Q8_0",
            {"kv_type": "fp8"},
        ),
        (
            "kv_type_not_supported",
            "qwen2.5-7b-instruct",
            facts(cards("RTX 4090")),
            "AWQ",
            {"kv_type": "q8_0", "engines": BOTH},
        ),
        ("no_gpu", "qwen2.5-7b-instruct", facts(), "AWQ", {"engines": BOTH}),
        (
            "mig_not_supported",
            "qwen2.5-7b-instruct",
            facts([accelerator("A100 80GB", mig_profile="3g.40gb")]),
            "AWQ",
            {"engines": BOTH},
        ),
        # Volta and Pascal are out of vLLM's wheel, and in llama.cpp's CUDA 12 build.
        (
            "compute_capability_too_low",
            "qwen2.5-7b-instruct",
            facts(cards("GTX 1080 Ti")),
            "AWQ",
            {"engines": BOTH},
        ),
        ("driver_too_old", "qwen2.5-7b-instruct", facts(cards("RTX 4090"), driver="470.82.01"), "Q8_0", {}),
        (
            "driver_too_old",
            "qwen2.5-7b-instruct",
            facts(cards("RTX 4090"), driver="470.82.01"),
            "AWQ",
            {"engines": BOTH},
        ),
        ("too_slow", "qwen2.5-7b-instruct", facts(cards("RTX 3060 12GB")), "Q8_0", {"min_tokens_per_s": 50}),
        (
            "speed_unknown",
            "qwen2.5-7b-instruct",
            facts([accelerator("RTX 4090", name="A card of tomorrow")]),
            "Q8_0",
            {"min_tokens_per_s": 1},
        ),
        ("not_pinned", "qwen2.5-7b-instruct", facts(cards("RTX 4090")), "Q8_0", {"require_pinned": True}),
        ("does_not_fit", "qwen2.5-72b-instruct", facts(cards("T4")), "Q8_0", {"accepted_licences": ["qwen"]}),
    ],
)
def test_each_hard_constraint_has_its_code(
    code: str, model: str, host: dict[str, Any], variant: str, variables: dict[str, Any]
) -> None:
    assert code in REJECTION_CODES
    assert rejection(model, host, variant, **variables) == code


def test_vllm_is_judged_by_the_builds_that_the_role_installs() -> None:
    host = facts(cards("RTX 4090"), driver="550.163.01")
    asked = request("qwen2.5-7b-instruct", host, engines=BOTH)
    assert by_name(evaluate(asked), "AWQ").fits  # on the build for CUDA 12
    vllm = asked.engines["engines"]["vllm"]
    wheels = [row for row in vllm["wheels"] if row["variant"] != "cuda12"]
    engines = {**asked.engines, "engines": {**asked.engines["engines"], "vllm": {**vllm, "wheels": wheels}}}
    found = by_name(evaluate(replace(asked, engines=engines)), "AWQ").rejected
    assert found is not None
    assert found.code == "driver_too_old"
    assert "550.163.01" in found.reason
    assert "580" in found.reason


def test_vllm_leaves_out_a_card_that_no_build_has_code_for() -> None:
    host = facts(cards("GTX 1080 Ti", "RTX 4090"))
    found = by_name(evaluate(request("qwen2.5-7b-instruct", host, engines=BOTH)), "AWQ")
    assert found.fits
    assert [device.name for device in found.devices] == ["NVIDIA GeForce RTX 4090"]


@pytest.mark.parametrize(("card", "capability"), [("RTX 3090", "8.6"), ("T4", "7.5"), ("A100 80GB", "8.0")])
def test_an_fp8_cache_needs_a_card_that_vllm_reads_it_on(card: str, capability: str) -> None:
    """vLLM would refuse to start: what needs no compiler on the host reads such a cache from 8.9 on."""
    host = facts(cards(card))
    asked = {"engines": BOTH, "slots": 1, "min_quality_tier": "rest"}
    found = by_name(evaluate(request("qwen2.5-1.5b-instruct", host, kv_type="fp8", **asked)), "AWQ").rejected
    assert found is not None
    assert found.code == "compute_capability_too_low"
    for part in (capability, "8.9", "AWQ with a KV cache in fp8"):
        assert part in found.reason
    assert by_name(evaluate(request("qwen2.5-1.5b-instruct", host, **asked)), "AWQ").fits


def test_an_fp8_cache_goes_to_the_card_that_reads_it() -> None:
    host = facts(cards("RTX 3090", "RTX 4090"))
    asked = request("qwen2.5-7b-instruct", host, engines=BOTH, kv_type="fp8", min_quality_tier="rest")
    found = by_name(evaluate(asked), "AWQ")
    assert found.fits
    assert [device.name for device in found.devices] == ["NVIDIA GeForce RTX 4090"]


def test_gguf_through_vllm_is_refused_with_the_alternative() -> None:
    """An overlay may say that vLLM serves it; it does not."""
    entry = CATALOG.entry("smollm2-135m-instruct")
    gguf = replace(entry.variant("Q4_1"), engines=("vllm",))
    wanted = {"engines": BOTH, "engine": "vllm", "min_quality_tier": "rest"}
    asked = request(replace(entry, variants=(gguf,)), facts(cards("RTX 4090")), **wanted)
    (found,) = evaluate(asked)
    assert found.rejected is not None
    assert found.rejected.code == "format_not_supported"
    assert "fleetfit_engine=llama_cpp" in found.rejected.reason
    with pytest.raises(NothingFitsError, match="vLLM does not serve GGUF") as caught:
        select(asked)
    assert caught.value.code == "format_not_supported"
    # And where it says the truth, that vLLM has no variant of the model.
    only = replace(entry, variants=(replace(gguf, engines=("llama_cpp",)),))
    with pytest.raises(
        NothingFitsError, match=r"vLLM does not serve GGUF.*fleetfit_engine=llama_cpp"
    ) as caught:
        select(request(only, facts(cards("RTX 4090")), **wanted))
    assert caught.value.code == "no_variant_for_engine"


def test_safetensors_through_llama_cpp_is_refused_with_the_alternative() -> None:
    entry = CATALOG.entry("qwen2.5-1.5b-instruct")
    wrong = replace(entry.variant("BF16"), engines=("llama_cpp",))
    (found,) = evaluate(request(replace(entry, variants=(wrong,)), facts(cards("RTX 4090"))))
    assert found.rejected is not None
    assert (found.rejected.code, "fleetfit_engine=vllm" in found.rejected.reason) == (
        "format_not_supported",
        True,
    )


def test_pascal_serves_with_llama_cpp() -> None:
    assert rejection("qwen2.5-7b-instruct", facts(cards("GTX 1080 Ti")), "Q4_K_M") is None


def test_a_missing_byte_count_names_the_place_and_the_number() -> None:
    item = by_name(
        evaluate(request("qwen2.5-72b-instruct", facts(cards("T4")), accepted_licences=["qwen"])), "Q8_0"
    )
    assert item.rejected is not None
    assert item.rejected.device == "host"
    host = item.as_dict()["host"]
    assert item.rejected.short_by_bytes == host["total"] - host["budget"] > 0


def test_vllm_on_turing_runs_in_half_precision() -> None:
    item = by_name(
        evaluate(request("qwen2.5-1.5b-instruct", facts(cards("T4")), engines=BOTH, slots=1)), "BF16"
    )
    assert item.fits
    assert item.settings["dtype"] == "float16"
    ampere = by_name(
        evaluate(request("qwen2.5-1.5b-instruct", facts(cards("RTX 3090")), engines=BOTH, slots=1)), "BF16"
    )
    assert ampere.settings["dtype"] == "bfloat16"


def test_context_above_native_is_extended_and_above_the_limit_refused() -> None:
    best, _ = select(
        request("qwen2.5-7b-instruct", facts(cards("RTX 4090")), min_context_tokens=65536, slots=1)
    )
    assert best.settings["rope"] == {"scaling": "yarn", "scale": 4.0, "original_context_tokens": 32768}
    assert best.settings["n_ctx"] == 65536
    within, _ = select(
        request("qwen2.5-7b-instruct", facts(cards("RTX 4090")), min_context_tokens=32768, slots=1)
    )
    assert within.settings["rope"] is None
    with pytest.raises(FleetfitError, match="131072 with YaRN") as caught:
        evaluate(request("qwen2.5-7b-instruct", facts(cards("RTX 4090")), min_context_tokens=131073))
    assert caught.value.code == "context_above_limit"
    with pytest.raises(FleetfitError, match="supports 32768 tokens"):
        evaluate(request("qwen2.5-0.5b-instruct", facts(cards("RTX 4090")), min_context_tokens=32769))


def test_the_context_served_is_the_one_asked_for() -> None:
    best, _ = select(
        request("qwen2.5-0.5b-instruct", facts(cards("RTX 4090")), min_context_tokens=1000, slots=3)
    )
    assert best.context_tokens == 1000
    assert best.settings["n_ctx"] == 3 * 1024
    assert best.max_context_tokens == 32768


def test_the_longest_context_fits_and_the_next_step_does_not() -> None:
    host = facts(cards("RTX 3060 12GB"))
    best, _ = select(request("qwen2.5-7b-instruct", host, slots=1))
    longest = best.max_context_tokens
    at_limit = by_name(
        evaluate(request("qwen2.5-7b-instruct", host, slots=1, min_context_tokens=longest)), best.variant.name
    )
    beyond = by_name(
        evaluate(request("qwen2.5-7b-instruct", host, slots=1, min_context_tokens=longest + 256)),
        best.variant.name,
    )
    assert at_limit.fits
    assert at_limit.resident
    assert not beyond.resident


def test_fp8_is_ranked_by_whether_the_card_computes_in_it() -> None:
    """From 8.9 on natively, on 7.5 to 8.6 the weights alone: slower, by a factor of its own with its source."""
    entry = entry_with("FP8", "GPTQ-Int8", "BF16")
    expected, sources = {}, {}
    for name in ("RTX 3090", "T4", "RTX 4090", "H100 SXM"):
        host = facts(cards(name))
        asked = request(entry, host, engines=BOTH, engine="vllm", slots=1, min_context_tokens=2048)
        found = {item.variant.name: item for item in evaluate(asked)}
        speeds = {name: item.expected_tokens_per_s for name, item in found.items()}
        assert speeds["FP8"] is not None
        assert speeds["BF16"] is not None
        expected[name] = speeds["FP8"] / (found["FP8"].roofline_tokens_per_s or 1)
        plan = make_plan(asked, host, catalog_digest="")
        sources[name] = plan["deployments"][0]["sources"]["expected_tokens_per_s"]
        assert plan["deployments"][0]["variant"] == "FP8"
        # Its bytes are about half: faster than 16 bits on every card, and ranked so within the tier.
        assert speeds["FP8"] > speeds["BF16"]
    assert expected == {
        "RTX 3090": pytest.approx(0.47, abs=0.001),
        "T4": pytest.approx(0.47, abs=0.001),
        "RTX 4090": pytest.approx(0.50, abs=0.001),
        "H100 SXM": pytest.approx(0.50, abs=0.001),
    }
    assert "weight-only" in sources["RTX 3090"]
    assert "native" in sources["RTX 4090"]


def entry_with(*schemes: str) -> Any:
    """Return an entry of Qwen2.5-1.5B's shape with these safetensors variants."""
    base = CATALOG.entry("qwen2.5-1.5b-instruct")
    kept = base.variants[0]
    return replace(
        base,
        variants=tuple(
            replace(
                kept,
                name=scheme,
                format="safetensors",
                engines=("vllm",),
                scheme=scheme,
                quality_tier="Q8_0",
                shape_overrides=(),
            )
            for scheme in schemes
        ),
    )


def test_four_like_cards_may_be_two_stages_of_two() -> None:
    """Two KV heads do not divide by four: two stages of two tensor ranks are faster than four stages."""
    small = [
        accelerator("RTX 4090", index=index, memory_total_bytes=4096 * MIB, memory_reserved_bytes=0)
        for index in range(4)
    ]
    asked = request(
        "qwen2.5-3b-instruct",
        facts(small, ram_gib=64),
        engines=BOTH,
        engine="vllm",
        slots=1,
        min_context_tokens=2048,
        accepted_licences=["qwen-research"],
    )
    found = by_name(evaluate(asked), "BF16")
    assert found.fits
    assert (found.settings["tensor_parallel"], found.settings["pipeline_parallel"]) == (2, 2)
    three = by_name(
        evaluate(replace(asked, view=replace(asked.view, devices=asked.view.devices[:3]))), "BF16"
    )
    assert not three.fits


def test_mig_instances_are_never_combined() -> None:
    parent = accelerator("A100 80GB", mig_enabled=True)
    instances = [
        accelerator(
            "A100 80GB",
            index=index,
            uuid=f"MIG-{index}",
            mig_profile="1g.10gb",
            mig_parent="GPU-0",
            memory_total_bytes=9728 * MIB,
            memory_reserved_bytes=0,
        )
        for index in range(4)
    ]
    candidates = evaluate(request("qwen2.5-14b-instruct", facts([parent, *instances], ram_gib=128)))
    assert all(len(item.devices) <= 1 for item in candidates)
    assert all(device.id.startswith("MIG-") for item in candidates for device in item.devices)
    whole = evaluate(request("qwen2.5-14b-instruct", facts(cards(*["RTX 3060 8GB"] * 4), ram_gib=128)))
    assert any(len(item.devices) > 1 for item in whole)


def test_unlike_cards_the_faster_holds_the_output_and_more_layers() -> None:
    best, _ = select(request("qwen2.5-32b-instruct", facts(cards("RTX 3060 12GB", "RTX 4090"))))
    assert [device.name for device in best.devices] == ["NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 4090"]
    slow, fast = best.settings["tensor_split"]
    assert fast > slow
    assert slow + fast == 65 == best.gpu_layers


def test_equal_cards_share_evenly_where_it_fits() -> None:
    best, _ = select(request("qwen2.5-32b-instruct", facts(cards("RTX 4090", "RTX 4090")), slots=1))
    first, second = best.settings["tensor_split"]
    assert abs(first - second) <= 1


def test_foreign_memory_and_display_and_reserve_cost_what_they_are() -> None:
    def total_budget(host: dict[str, Any], **variables: Any) -> int:
        best, _ = select(request("qwen2.5-0.5b-instruct", host, **variables))
        return best.estimate.devices[0].budget

    plain = total_budget(facts(cards("RTX 4090")))
    assert plain - total_budget(facts(cards("RTX 4090"), foreign={"GPU-0": GIB})) == GIB
    assert plain - total_budget(facts(cards("RTX 4090")), vram_reserve_bytes=GIB) == GIB
    best, _ = select(request("qwen2.5-0.5b-instruct", facts([accelerator("RTX 4090", display=True)])))
    without, _ = select(request("qwen2.5-0.5b-instruct", facts(cards("RTX 4090"))))
    assert best.estimate.devices[0].margin - without.estimate.devices[0].margin == 512 * MIB


def test_nothing_fits_says_by_how_much_and_the_least_changes() -> None:
    host = facts(cards("RTX 3060 8GB"), ram_gib=6)
    with pytest.raises(NothingFitsError) as caught:
        select(request("qwen2.5-14b-instruct", host))
    error = caught.value
    assert error.code in ("does_not_fit", "nothing_fits")
    assert "short by" in str(error)
    assert "qwen2.5-7b-instruct" in str(error.remedy)
    assert all(item.rejected for item in error.candidates)
    # What the error proposes really fits.
    assert "fleetfit_min_quality_tier=rest" in str(error.remedy)
    best, _ = select(request("qwen2.5-14b-instruct", host, min_quality_tier="rest"))
    assert best.variant.quality_tier == "rest"


def test_a_shorter_context_is_offered_and_fits() -> None:
    host = facts(cards("RTX 3060 8GB"), ram_gib=3)
    asked = {"min_context_tokens": 131072, "slots": 1}
    with pytest.raises(NothingFitsError) as caught:
        select(request("qwen2.5-7b-instruct", host, **asked))
    offers = [part for part in str(caught.value.remedy).split() if part.startswith("fleetfit_min_context")]
    tokens = int(offers[0].partition("=")[2])
    best, _ = select(request("qwen2.5-7b-instruct", host, min_context_tokens=tokens, slots=1))
    assert best.fits


def remedy_of(model: str, host: dict[str, Any], **variables: Any) -> str:
    with pytest.raises(NothingFitsError) as caught:
        select(request(model, host, **variables))
    return str(caught.value.remedy)


def test_the_next_lower_tier_that_helps_is_offered_and_not_the_lowest() -> None:
    host = facts(cards("RTX 3060 12GB"), ram_gib=3)
    asked = {"min_context_tokens": 65536, "slots": 1}
    remedy = remedy_of("qwen2.5-7b-instruct", host, min_quality_tier="Q8_0", **asked)
    assert "fleetfit_min_quality_tier=Q6_K (Q6_K would fit)" in remedy
    best, _ = select(request("qwen2.5-7b-instruct", host, min_quality_tier="Q6_K", **asked))
    assert best.variant.name == "Q6_K"


def test_a_speed_is_offered_that_something_reaches_which_fits() -> None:
    """What does not fit may be faster: its speed is no offer."""
    host = facts(cards("RTX 3060 12GB"), ram_gib=3)
    asked = {"min_context_tokens": 65536, "slots": 1, "min_tokens_per_s": 500}
    remedy = remedy_of("qwen2.5-7b-instruct", host, **asked)
    offered = int(remedy.partition("fleetfit_min_tokens_per_s=")[2].split()[0])
    best, _ = select(request("qwen2.5-7b-instruct", host, **{**asked, "min_tokens_per_s": offered}))
    assert offered <= (best.expected_tokens_per_s or 0) < offered + 1


def test_a_licence_that_would_not_help_alone_is_not_called_enough() -> None:
    host = facts(cards("RTX 3060 8GB"), ram_gib=3)
    remedy = remedy_of("qwen2.5-72b-instruct", host)
    assert not remedy.startswith("Any one of these would do: accept")
    smaller = remedy_of("qwen2.5-3b-instruct", host, min_context_tokens=32768, slots=8)
    assert smaller.startswith(("accept the licence qwen-research", "Any one of these"))
    if smaller.startswith("accept"):
        assert "and any one of these: " in smaller


def test_unpinned_models_are_refused_with_the_command_that_pins_them() -> None:
    with pytest.raises(NothingFitsError, match=r"fleetfit catalog pin qwen2\.5-7b-instruct") as caught:
        select(request("qwen2.5-7b-instruct", facts(cards("RTX 4090")), require_pinned=True))
    assert caught.value.code == "model_not_pinned"


def test_a_licence_is_named_with_its_page() -> None:
    with pytest.raises(NothingFitsError, match="accept the licence qwen-research") as caught:
        select(request("qwen2.5-3b-instruct", facts(cards("RTX 4090"))))
    assert caught.value.code == "licence_not_accepted" or "licence" in str(caught.value)
    best, _ = select(
        request("qwen2.5-3b-instruct", facts(cards("RTX 4090")), accepted_licences=["qwen-research"])
    )
    assert best.fits


def test_an_engine_that_is_asked_for_and_not_there() -> None:
    with pytest.raises(NothingFitsError, match="no role that installs vllm") as caught:
        select(request("qwen2.5-7b-instruct", facts(cards("RTX 4090")), engine="vllm"))
    assert caught.value.code == "engine_not_available"
    assert "fleetfit_engine=auto" in str(caught.value.remedy)


def test_below_the_tiers_the_models_own_order_decides() -> None:
    # 3B's perplexity is worse as Q3_K_M than as Q2_K, although it is larger.
    accepted = {"accepted_licences": ["qwen-research"], "min_quality_tier": "rest"}
    candidates = evaluate(request("qwen2.5-3b-instruct", facts(cards("RTX 4090")), **accepted))
    low = [item for item in candidates if item.variant.name in ("Q2_K", "Q3_K_M")]
    best = choose(low, "quality")
    assert best is not None
    assert best.variant.name == "Q2_K"


MODELS = ["qwen2.5-1.5b-instruct", "qwen2.5-7b-instruct", "qwen2.5-14b-instruct"]


def score(model: str, host: dict[str, Any], prefer: str, **variables: Any) -> tuple[float, ...] | None:
    best = choose(evaluate(request(model, host, prefer=prefer, **variables)), prefer)
    if best is None:
        return None
    # A shorter context is asked for in one of the properties: what more would fit is then compared elsewhere.
    return best.score(prefer)


def worse(first: tuple[float, ...] | None, second: tuple[float, ...] | None) -> bool:
    """Return whether ``second`` is worse than ``first``; speeds are rounded to 0.01 tokens/s."""
    if first is None or second is None:
        return first is not None and second is None
    return second < first


@settings(max_examples=30, deadline=None)
@given(
    model=st.sampled_from(MODELS),
    sizes_mib=st.lists(st.integers(1024, 40960), min_size=1, max_size=2),
    more_mib=st.integers(1, 16384),
    ram_gib=st.integers(4, 64),
    prefer=st.sampled_from(["quality", "speed", "context"]),
    context=st.sampled_from([512, 4096, 8192, 20000]),
)
# The slow card can then take the whole model, and the fast one must keep its part.
@example(
    model="qwen2.5-14b-instruct",
    sizes_mib=[2875, 8147],
    more_mib=6879,
    ram_gib=4,
    prefer="speed",
    context=512,
)
def test_more_memory_is_never_worse(
    model: str, sizes_mib: list[int], more_mib: int, ram_gib: int, prefer: str, context: int
) -> None:
    names = ["RTX 3060 12GB", "RTX 4090"]

    def host(sizes: list[int], ram: int) -> dict[str, Any]:
        devices = [
            accelerator(names[index], index=index, memory_total_bytes=size * MIB, memory_reserved_bytes=0)
            for index, size in enumerate(sizes)
        ]
        return facts(devices, ram_gib=ram)

    before = score(model, host(sizes_mib, ram_gib), prefer, min_context_tokens=context)
    larger = [sizes_mib[0] + more_mib, *sizes_mib[1:]]
    assert not worse(before, score(model, host(larger, ram_gib), prefer, min_context_tokens=context))
    assert not worse(before, score(model, host(sizes_mib, ram_gib + 8), prefer, min_context_tokens=context))


def test_more_memory_on_the_slow_card_takes_no_layers_from_the_fast_one() -> None:
    def speed(slow_mib: int) -> float:
        cards = zip(["RTX 3060 12GB", "RTX 4090"], [slow_mib, 1789], strict=True)
        devices = [
            accelerator(name, index=index, memory_total_bytes=size * MIB, memory_reserved_bytes=0)
            for index, (name, size) in enumerate(cards)
        ]
        found = score("qwen2.5-1.5b-instruct", facts(devices, ram_gib=4), "quality", min_context_tokens=512)
        assert found is not None
        return found[-1]

    assert speed(1681) >= speed(1651)


@settings(max_examples=30, deadline=None)
@given(
    model=st.sampled_from(MODELS),
    size_mib=st.integers(1024, 40960),
    context=st.integers(512, 32768),
    shorter=st.integers(1, 32768),
    prefer=st.sampled_from(["quality", "speed"]),
)
def test_a_shorter_context_is_never_worse(
    model: str, size_mib: int, context: int, shorter: int, prefer: str
) -> None:
    host = facts([accelerator("RTX 4090", memory_total_bytes=size_mib * MIB, memory_reserved_bytes=0)])
    before = score(model, host, prefer, min_context_tokens=context)
    after = score(model, host, prefer, min_context_tokens=min(shorter, context))
    assert not worse(before, after)


@pytest.mark.parametrize("variant", ["GPTQ-Int8", "GPTQ-Int4", "AWQ"])
def test_the_72b_is_padded_in_gptq_and_awq_so_that_cards_can_share_it(variant: str) -> None:
    entry = CATALOG.entry("qwen2.5-72b-instruct")
    chosen = entry.variant(variant)
    assert entry.shape.intermediate_size == 29568
    assert entry.shape_of(chosen).intermediate_size == 29696
    plain = replace(chosen, shape_overrides=())
    assert 1.002 < layout_of(entry, chosen).file_bytes / layout_of(entry, plain).file_bytes < 1.004
    # Without the padding 29568 / 8 is no multiple of the group size.
    host = facts(cards(*["A100 80GB"] * 8), ram_gib=512)
    wanted = {"engines": ("vllm",), "accepted_licences": ["qwen"], "engine": "vllm"}
    found = {item.variant.name: item for item in evaluate(request(entry, host, **wanted))}[variant]
    assert found.rejected is None
    assert found.settings["tensor_parallel"] > 1


def adapter(
    adapter_format: str, *, size: int = 40_000_000, base: str = "qwen2.5-7b-instruct"
) -> dict[str, Any]:
    names = ["a.gguf"] if adapter_format == "gguf" else ["adapter_config.json", "adapter_model.safetensors"]
    files = [{"name": name, "size": size, "sha256": "a" * 64} for name in names]
    return {
        "name": "tone",
        "base_model": base,
        "format": adapter_format,
        "rank": 12,
        "files": files,
        "url": "http://mirror/tone",
    }


def best_of(adapters: list[dict[str, Any]], engine: str) -> Candidate:
    host = facts(cards("RTX 3090"))
    wanted = request("qwen2.5-7b-instruct", host, engines=("llama_cpp", "vllm"), lora_adapters=adapters)
    found = [item for item in evaluate(wanted) if item.engine == engine]
    return choose(found, "quality") or found[0]


def test_adapters_take_memory_and_are_in_the_settings() -> None:
    for engine, adapter_format in (("llama_cpp", "gguf"), ("vllm", "safetensors")):
        without, with_one = best_of([], engine), best_of([adapter(adapter_format)], engine)
        assert with_one.fits
        assert with_one.variant == without.variant
        more = with_one.estimate.devices[0].weights - without.estimate.devices[0].weights
        assert more > 30_000_000
        assert without.settings["lora" if engine == "llama_cpp" else "lora_modules"] == []
    assert best_of([adapter("gguf")], "llama_cpp").settings["lora"] == [{"name": "tone", "file": "a.gguf"}]
    settings = best_of([adapter("safetensors")], "vllm").settings
    assert (settings["max_loras"], settings["max_lora_rank"], settings["lora_modules"]) == (1, 16, ["tone"])


def test_an_adapter_in_another_format_rules_the_engine_out() -> None:
    for engine, adapter_format in (("llama_cpp", "safetensors"), ("vllm", "gguf")):
        rejected = best_of([adapter(adapter_format)], engine).rejected
        assert rejected is not None
        assert rejected.code == "adapter_format_not_readable"
        assert best_of([adapter("gguf"), adapter("safetensors")], engine).fits


def test_an_adapter_for_another_model_stops_the_plan() -> None:
    with pytest.raises(FleetfitError, match=r"qwen2\.5-7b-instruct") as caught:
        best_of([adapter("gguf", base="smollm2-135m-instruct")], "llama_cpp")
    assert caught.value.code == "lora_for_another_model"
