"""The shipped models: shapes whose parameters and file sizes are the published ones, and what follows from them."""

from __future__ import annotations

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.catalog_entry import CatalogEntry
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.memory_vllm import check_parallelism
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import (
    Candidate,
    NothingFitsError,
    evaluate,
    layout_of,
    select,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import (
    layout_from_scheme,
    parameter_count,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.units import GIB
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import CATALOG_DIR

from fleetfit.catalog import problems_of

from .planning import CATALOG, cards, facts, request

HUB = "the hub's safetensors total (public code quotes it)"
KERAS = "keras-team/keras-hub, keras_hub/src/models/{}_presets.py"
PUBLISHED_PARAMETERS = {
    "smollm2-135m-instruct": (134_515_008, HUB),
    "qwen2.5-0.5b-instruct": (494_032_768, HUB),
    "qwen2.5-1.5b-instruct": (1_543_714_304, HUB),
    "qwen2.5-3b-instruct": (3_085_938_688, HUB),
    "qwen2.5-7b-instruct": (7_615_616_512, HUB),
    "qwen2.5-14b-instruct": (14_770_033_664, HUB),
    "qwen2.5-32b-instruct": (32_763_876_352, HUB),
    "qwen2.5-72b-instruct": (72_706_203_648, HUB),
    "qwen3-0.6b": (596_049_920, KERAS.format("qwen3/qwen3")),
    "qwen3-1.7b": (1_720_574_976, KERAS.format("qwen3/qwen3")),
    "qwen3-4b": (4_022_468_096, KERAS.format("qwen3/qwen3")),
    "qwen3-8b": (8_190_735_360, KERAS.format("qwen3/qwen3")),
    "qwen3-14b": (14_768_307_200, KERAS.format("qwen3/qwen3")),
    "qwen3-32b": (32_762_123_264, KERAS.format("qwen3/qwen3")),
    "qwen3-30b-a3b": (30_532_122_624, KERAS.format("qwen3_moe/qwen3_moe")),
    "qwen3-30b-a3b-instruct-2507": (30_532_122_624, "the same architecture as qwen3-30b-a3b"),
    "qwen3-4b-instruct-2507": (4_022_468_096, HUB),
    "llama-3.1-8b-instruct": (8_030_261_248, KERAS.format("llama3/llama3")),
    "llama-3.1-70b-instruct": (70_553_706_496, HUB),
    "llama-3.2-1b-instruct": (1_235_814_400, HUB),
    "llama-3.2-3b-instruct": (3_212_749_824, HUB),
    "mistral-7b-instruct-v0.3": (7_248_023_552, KERAS.format("mistral/mistral")),
    "mistral-nemo-instruct-2407": (12_247_782_400, HUB),
    "gemma-2-2b-it": (2_614_341_888, KERAS.format("gemma/gemma")),
    "gemma-2-9b-it": (9_241_705_984, KERAS.format("gemma/gemma")),
    "gemma-2-27b-it": (27_227_128_320, KERAS.format("gemma/gemma")),
    "gemma-3-1b-it": (999_885_952, KERAS.format("gemma3/gemma3")),
    # keras-hub has the text models with 262,144 rows of embeddings; the files have 64 more.
    "gemma-3-4b-it": (3_880_099_328 + 64 * 2560, KERAS.format("gemma3/gemma3")),
    "gemma-3-12b-it": (11_765_788_416 + 64 * 3840, KERAS.format("gemma3/gemma3")),
    "gemma-3-27b-it": (27_009_002_240 + 64 * 5376, KERAS.format("gemma3/gemma3")),
    "phi-4": (14_659_507_200, HUB),
    "phi-4-mini-instruct": (3_836_021_760, HUB),
}

# Bytes of the repositories' files, as ShelbyJenkins/llm_client (local_presets.json at e6eab60e) and other public
# code list them.
PUBLISHED_SIZES = {
    ("qwen3-0.6b", "Q4_K_M"): 396_705_472,
    ("qwen3-0.6b", "Q5_K_M"): 444_415_680,
    ("qwen3-0.6b", "Q6_K"): 495_107_776,
    ("qwen3-0.6b", "BF16"): 1_198_182_848,
    ("qwen3-0.6b", "BF16-safetensors"): 1_503_300_328,
    ("qwen3-1.7b", "Q4_K_M"): 1_107_409_472,
    ("qwen3-1.7b", "Q8_0"): 1_834_426_016,
    ("qwen3-4b", "Q4_K_M"): 2_497_280_256,
    ("qwen3-4b", "Q8_0"): 4_280_404_704,
    ("qwen3-8b", "Q8_0"): 8_709_518_112,
    ("qwen3-14b", "Q4_K_M"): 9_001_752_960,
    ("qwen3-14b", "Q8_0"): 15_698_533_728,
    ("qwen3-4b-instruct-2507", "Q5_K_M"): 2_889_514_080,
    ("qwen3-4b-instruct-2507", "F16"): 8_051_285_344,
    ("qwen3-30b-a3b-instruct-2507", "Q6_K"): 25_092_532_640,
    ("llama-3.1-8b-instruct", "Q2_K"): 3_179_136_416,
    ("llama-3.1-8b-instruct", "Q3_K_M"): 4_018_922_912,
    ("llama-3.1-8b-instruct", "Q4_K_M"): 4_920_739_232,
    ("llama-3.1-8b-instruct", "Q5_K_M"): 5_732_992_416,
    ("llama-3.1-8b-instruct", "Q6_K"): 6_596_011_424,
    ("llama-3.1-8b-instruct", "Q8_0"): 8_540_775_840,
    ("llama-3.1-70b-instruct", "Q4_K_M"): 42_520_398_752,
    ("llama-3.2-1b-instruct", "Q4_K_M"): 807_694_464,
    ("llama-3.2-1b-instruct", "Q8_0"): 1_321_083_008,
    ("llama-3.2-3b-instruct", "Q4_K_M"): 2_019_377_696,
    ("llama-3.2-3b-instruct", "Q8_0"): 3_421_899_296,
    ("mistral-7b-instruct-v0.3", "Q2_K"): 2_722_877_600,
    ("mistral-7b-instruct-v0.3", "Q4_K_M"): 4_372_811_936,
    ("mistral-7b-instruct-v0.3", "Q8_0"): 7_702_565_024,
    ("mistral-nemo-instruct-2407", "Q3_K_M"): 6_083_093_632,
    ("mistral-nemo-instruct-2407", "Q4_K_M"): 7_477_208_192,
    ("mistral-nemo-instruct-2407", "Q8_0"): 13_022_372_992,
    ("gemma-2-2b-it", "Q6_K"): 2_151_393_120,
    ("gemma-2-9b-it", "Q5_K_M"): 6_647_366_592,
    ("gemma-2-27b-it", "Q4_K_M"): 16_645_381_632,
    ("gemma-3-1b-it", "Q4_K_M"): 806_058_496,
    ("gemma-3-1b-it", "Q8_0"): 1_069_306_624,
    ("gemma-3-4b-it", "Q4_K_M"): 2_489_757_856,
    ("gemma-3-4b-it", "Q8_0"): 4_130_226_592,
    ("gemma-3-27b-it", "Q6_K"): 22_166_690_432,
    # Queries, keys and values are one tensor here, with types of its own.
    ("phi-4", "Q2_K"): 5_547_348_416,
    ("phi-4", "Q3_K_M"): 7_363_269_056,
    ("phi-4", "Q4_K_M"): 9_053_114_816,
    ("phi-4", "Q5_K_M"): 10_604_188_096,
    ("phi-4", "Q6_K"): 12_030_251_456,
    ("phi-4", "Q8_0"): 15_580_500_416,
    ("phi-4-mini-instruct", "Q4_K_M"): 2_491_874_688,
    ("phi-4-mini-instruct", "Q5_K_M"): 2_848_128_384,
}
FAMILIES = sorted({entry.family for entry in CATALOG.entries.values()})


def test_the_documentation_lists_every_model() -> None:
    text = (CATALOG_DIR.parent / "docs" / "catalog.md").read_text()
    assert [name for name in CATALOG.entries if f"`{name}`" not in text] == []
    for family in FAMILIES:
        assert f"| {family} |" in text
    for entry in CATALOG.entries.values():
        assert not entry.licence_needs_acceptance or f"**{entry.licence}**" in text


def test_every_model_has_a_published_parameter_count() -> None:
    assert set(PUBLISHED_PARAMETERS) == set(CATALOG.entries)


@pytest.mark.parametrize("model", sorted(PUBLISHED_PARAMETERS))
def test_the_shape_has_the_published_number_of_parameters(model: str) -> None:
    entry = CATALOG.entry(model)
    published, source = PUBLISHED_PARAMETERS[model]
    assert parameter_count(entry.shape) == published, source
    assert entry.parameters == published


@pytest.mark.parametrize(("model", "variant"), sorted(PUBLISHED_SIZES))
def test_the_files_have_the_published_sizes(model: str, variant: str) -> None:
    entry = CATALOG.entry(model)
    computed = layout_of(entry, entry.variant(variant)).file_bytes
    # What is left is the vocabulary in the header, known per token only (Llama 3's is 60 % larger than assumed).
    assert computed == pytest.approx(PUBLISHED_SIZES[model, variant], rel=0.004)


@pytest.mark.parametrize("entry", CATALOG.entries.values(), ids=lambda entry: entry.id)
def test_every_entry_is_sound(entry: CatalogEntry) -> None:
    assert problems_of(entry) == []
    assert entry.sources["shape"]
    assert entry.licence_url
    for variant in entry.variants:
        assert variant.quality_source
        assert variant.repository
    if entry.id != "smollm2-135m-instruct":
        assert not any(variant.pinned for variant in entry.variants)
        assert not any(file.sha256 for variant in entry.variants for file in variant.files)


def test_an_output_matrix_that_only_the_file_holds_takes_no_memory() -> None:
    entry = CATALOG.entry("qwen3-0.6b")
    stored = layout_of(entry, entry.variant("BF16-safetensors"))
    plain = layout_from_scheme(entry.shape, "BF16", "safetensors")
    assert stored.file_bytes - plain.file_bytes == 2 * entry.shape.vocab_size * entry.shape.hidden_size
    assert stored.tensor_bytes == plain.tensor_bytes
    assert stored.tied


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_sibling_is_offered_where_the_largest_does_not_fit(family: str) -> None:
    members = sorted(
        (entry for entry in CATALOG.entries.values() if entry.family == family),
        key=lambda entry: entry.parameters,
    )
    largest = members[-1]
    if len(members) == 1:
        assert CATALOG.siblings(largest) == ()
        return
    licences = [entry.licence for entry in members]
    # As much RAM as the largest one's weights and the system take, and nothing for its cache.
    weights = layout_of(largest, largest.variant("Q4_K_M")).tensor_bytes
    host = facts(ram_gib=weights / GIB + 2)
    arguments = {"min_context_tokens": 2048, "slots": 1, "min_quality_tier": "Q4_K_M"}
    with pytest.raises(NothingFitsError) as caught:
        select(request(largest.id, host, accepted_licences=licences, **arguments))
    offered = str(caught.value.remedy)
    assert any(f"the smaller model {entry.id} " in offered for entry in members[:-1]), offered


def test_a_sibling_under_a_licence_that_nobody_accepted_is_not_offered() -> None:
    host = facts(ram_gib=6)
    arguments = {"min_context_tokens": 2048, "slots": 1}
    with pytest.raises(NothingFitsError) as caught:
        select(request("llama-3.1-8b-instruct", host, accepted_licences=["llama3.1"], **arguments))
    assert "the smaller model" not in str(caught.value.remedy)
    with pytest.raises(NothingFitsError) as caught:
        select(
            request("llama-3.1-8b-instruct", host, accepted_licences=["llama3.1", "llama3.2"], **arguments)
        )
    assert "the smaller model llama-3.2-" in str(caught.value.remedy)


@pytest.mark.parametrize("model", ["gemma-2-9b-it", "gemma-3-1b-it"])
def test_gemma_is_served_by_vllm_in_bfloat16_or_not_at_all(model: str) -> None:
    policy = {"accepted_licences": ["gemma"], "engine": "vllm", "min_context_tokens": 4096}

    def found_on(*names: str) -> tuple[Candidate, ...]:
        return evaluate(request(model, facts(cards(*names)), engines=("vllm",), **policy))

    for item in found_on("T4"):
        assert item.rejected is not None
        assert item.rejected.code == "compute_capability_too_low"
        assert "needs 8.0 for" in item.rejected.reason
        assert "bfloat16" in item.rejected.reason
    found = found_on("RTX 4090")
    assert found
    assert all(item.settings["dtype"] == "bfloat16" for item in found)
    # Beside a card that can, one that cannot is left alone.
    found = found_on("T4", "RTX 4090")
    assert {device.compute_capability for item in found for device in item.devices} == {"8.9"}


def test_fp8_blocks_are_not_cut_across_cards() -> None:
    """768 wide experts on 4 cards are 192 a card: one and a half blocks of 128 (QwenLM/Qwen3, vllm.md)."""
    entry = CATALOG.entry("qwen3-30b-a3b")
    layout = layout_of(entry, entry.variant("FP8"))
    check_parallelism(entry.shape, layout, tensor_parallel=2, pipeline_parallel=1)
    with pytest.raises(FleetfitError, match="group size 128"):
        check_parallelism(entry.shape, layout, tensor_parallel=4, pipeline_parallel=1)


@pytest.mark.parametrize(
    ("model", "context_tokens", "rope"),
    [
        ("qwen3-8b", 32768, None),
        ("qwen3-8b", 32769, {"scaling": "yarn", "scale": 4.0, "original_context_tokens": 32768}),
        ("llama-3.1-8b-instruct", 131072, None),
        ("qwen3-4b-instruct-2507", 262144, None),
    ],
)
def test_contexts_above_the_native_one_are_extended(
    model: str, context_tokens: int, rope: dict[str, object] | None
) -> None:
    host = facts(cards("H100 PCIe"), ram_gib=128)
    policy = {"min_context_tokens": context_tokens, "slots": 1, "accepted_licences": ["llama3.1"]}
    chosen, _ = select(request(model, host, engine="llama_cpp", **policy))
    assert chosen.settings["rope"] == rope
