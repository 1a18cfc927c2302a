"""LoRA adapters: mistakes in the inventory are named, and files of another model are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils import lora
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.lora import (
    adapters_from_variable,
    check_files,
    engine_problem,
    layout_with_adapters,
    plan_adapters,
    vllm_rank,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import layout_from_scheme

from .. import adapters
from ..adapters import RANK, listed, write_gguf, write_peft
from .planning import CATALOG

SHA = "a" * 64
SMOLLM = CATALOG.entry("smollm2-135m-instruct")
CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def entry(**changes: Any) -> dict[str, Any]:
    """Return an entry as an inventory has it; None takes a key out."""
    whole = {
        "name": "tone",
        "base_model": "smollm2-135m-instruct",
        "format": "gguf",
        "rank": 8,
        "files": [{"name": "tone.gguf", "size": 10, "sha256": SHA}],
        "url": "http://mirror/tone/",
        **changes,
    }
    return {key: value for key, value in whole.items() if value is not None}


def peft_files() -> list[dict[str, Any]]:
    return [
        {"name": name, "size": 5, "sha256": SHA}
        for name in ("adapter_model.safetensors", "adapter_config.json")
    ]


def test_every_kind_of_source_is_read() -> None:
    found = adapters_from_variable(
        [
            entry(),
            entry(format="safetensors", files=peft_files(), url=None, path="/srv/tone/", location="host"),
            entry(name="b", url=None, repository="org/b", revision="0" * 40),
        ]
    )
    assert [(item.name, item.format, dict(item.source)) for item in found] == [
        ("b", "gguf", {"type": "hub", "repository": "org/b", "revision": "0" * 40}),
        ("tone", "gguf", {"type": "http", "url": "http://mirror/tone"}),
        ("tone", "safetensors", {"type": "file", "path": "/srv/tone", "location": "host"}),
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("tone", "a list of adapters"),
        (["tone"], "entry 1"),
        ([entry(), entry()], "twice"),
        ([entry(name="a:b")], "'a:b'"),
        ([entry(name=None)], "name of entry 1"),
        ([entry(name="../x")], "'../x'"),
        ([entry(format="bin")], "safetensors, gguf"),
        ([entry(rank=0)], "rank of entry 1"),
        ([entry(rank="8")], "'8'"),
        ([entry(base_model=None)], "base_model"),
        ([entry(files=[])], "files of entry 1"),
        ([entry(files=[{"name": "../t.gguf", "size": 1, "sha256": SHA}])], "without a directory"),
        ([entry(files=[{"name": "t.gguf", "size": 1, "sha256": "z"}])], "64 hexadecimal"),
        ([entry(files=peft_files())], "one file that ends in .gguf"),
        ([entry(format="safetensors")], "pickled weights are not loaded"),
        ([entry(url=None)], "no source"),
        ([entry(path="/srv/x")], "url and path"),
        ([entry(url="ftp://x")], "ftp://x"),
        ([entry(url=None, repository="org/b", revision="main")], "a commit"),
        ([entry(url=None, path="here")], "absolute path"),
        ([entry(scale=2)], "'scale'"),
        ([entry(base_model_names="x")], "base_model_names"),
    ],
)
def test_a_mistake_names_the_entry_and_the_value(value: Any, said: str) -> None:
    with pytest.raises(FleetfitError) as caught:
        adapters_from_variable(value)
    assert caught.value.code == "bad_policy"
    assert said in str(caught.value)
    assert "fleetfit_lora_adapters" in str(caught.value)


@pytest.mark.parametrize("missing", ["size", "sha256"])
def test_a_file_that_cannot_be_verified_is_refused(missing: str) -> None:
    file = {"name": "tone.gguf", "size": 10, "sha256": SHA}
    del file[missing]
    with pytest.raises(FleetfitError) as caught:
        adapters_from_variable([entry(files=[file])])
    assert caught.value.code == "adapter_not_pinned"


@pytest.mark.parametrize(
    ("ranks", "slot_rank"),
    [((), 0), ((1,), 1), ((2,), 8), ((8, 4), 8), ((9,), 16), ((300,), 320), ((512,), 512)],
)
def test_the_smallest_rank_that_vllm_accepts(ranks: tuple[int, ...], slot_rank: int) -> None:
    found = adapters_from_variable([entry(name=f"a{rank}", rank=rank) for rank in ranks])
    assert vllm_rank(found) == slot_rank


def test_an_engine_reads_its_own_format_only() -> None:
    both = adapters_from_variable([entry(), entry(format="safetensors", files=peft_files())])
    assert engine_problem("llama_cpp", both) is None
    assert engine_problem("vllm", both) is None
    problem = engine_problem("vllm", adapters_from_variable([entry()]))
    assert problem is not None
    assert problem[0] == "adapter_format_not_readable"
    assert "tone" in problem[1]
    high = adapters_from_variable([entry(format="safetensors", files=peft_files(), rank=513)])
    assert (engine_problem("vllm", high) or ("",))[0] == "adapter_rank_too_high"


def test_other_files_are_another_directory() -> None:
    (first,) = adapters_from_variable([entry()])
    (second,) = adapters_from_variable([entry(files=[{"name": "tone.gguf", "size": 10, "sha256": "b" * 64}])])
    assert first.directory_name.startswith("adapter-tone-")
    assert first.directory_name != second.directory_name


def test_every_adapter_is_counted_on_the_blocks() -> None:
    layout = layout_from_scheme(SMOLLM.shape, "Q4_K_M")
    size = 3_000_000
    (adapter,) = adapters_from_variable([entry(files=[{"name": "t.gguf", "size": size, "sha256": SHA}])])
    more = layout_with_adapters(layout, [adapter.file_bytes, adapter.file_bytes])
    assert 0 <= more.tensor_bytes - layout.tensor_bytes - 2 * size < len(layout.blocks)
    assert layout_with_adapters(layout, ()) == layout


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's directory as vLLM serves it, as far as its shape goes."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def planned(directory: Path, adapter_format: str, **changes: Any) -> dict[str, Any]:
    """Return the plan's entry for the adapter in a directory."""
    found = adapters_from_variable([listed("tone", directory, adapter_format, **changes)])
    engine = "vllm" if adapter_format == "safetensors" else "llama_cpp"
    return plan_adapters(engine, found, SMOLLM)[0]


def check(directory: Path, adapter: dict[str, Any], model: Path) -> None:
    check_files(
        adapter, str(directory), model_directory=str(model), model_format="safetensors", model_file=None
    )


def test_a_sound_adapter_passes_in_both_formats(tmp_path: Path, model: Path) -> None:
    write_peft(tmp_path / "peft", 1)
    check(tmp_path / "peft", planned(tmp_path / "peft", "safetensors"), model)
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf/tone.gguf", 1, base="SmolLM2 135M Instruct".replace(" ", "-"))
    check(tmp_path / "gguf", planned(tmp_path / "gguf", "gguf"), model)


@pytest.mark.parametrize(
    ("base", "allowed", "passes"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", [], True),
        ("/home/me/models/SmolLM2-135M-Instruct/", [], True),
        ("unsloth/SmolLM2-135M-Instruct-bnb-4bit", [], True),
        ("HuggingFaceTB/SmolLM2-135M", [], False),
        ("Qwen/Qwen2.5-0.5B-Instruct", [], False),
        ("me/renamed", [], False),
        ("me/renamed", ["me/renamed"], True),
        ("", [], True),
    ],
)
def test_the_model_that_the_files_name(
    tmp_path: Path, model: Path, base: str, allowed: list[str], passes: bool
) -> None:
    write_peft(tmp_path / "peft", 1, base=base)
    adapter = planned(tmp_path / "peft", "safetensors", base_model_names=allowed)
    if passes:
        check(tmp_path / "peft", adapter, model)
        return
    with pytest.raises(FleetfitError) as caught:
        check(tmp_path / "peft", adapter, model)
    assert caught.value.code == "lora_for_another_model"
    assert base in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"hidden_size": 960, "num_attention_heads": 15}, {"num_hidden_layers": 24}]
)
def test_tensors_of_another_shape_are_refused_whatever_the_files_say(
    tmp_path: Path, model: Path, change: dict[str, int]
) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, **change}))
    write_peft(tmp_path / "peft", 1)
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "gguf/tone.gguf", 1)
    for adapter_format in ("safetensors", "gguf"):
        directory = tmp_path / ("peft" if adapter_format == "safetensors" else "gguf")
        with pytest.raises(FleetfitError) as caught:
            check(directory, planned(directory, adapter_format), model)
        assert caught.value.code == "lora_for_another_model"


def test_a_gguf_that_is_no_adapter_or_of_another_architecture(tmp_path: Path, model: Path) -> None:
    directory = tmp_path / "gguf"
    directory.mkdir()
    write_gguf(directory / "tone.gguf", 1, architecture="qwen2")
    with pytest.raises(FleetfitError, match="qwen2") as caught:
        check(directory, planned(directory, "gguf"), model)
    assert caught.value.code == "lora_for_another_model"
    write_gguf(directory / "tone.gguf", 1, kind="model")
    with pytest.raises(FleetfitError, match=r"general\.type 'model'") as caught:
        check(directory, planned(directory, "gguf"), model)
    assert caught.value.code == "bad_lora"


def test_a_gguf_that_llama_server_would_die_of_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "gguf"
    directory.mkdir()
    doubles = {key: (a.astype("f8"), b) for key, (a, b) in adapters.weights(1).items()}
    monkeypatch.setattr(adapters, "weights", lambda seed: doubles)
    write_gguf(directory / "tone.gguf", 1)
    with pytest.raises(FleetfitError, match="F64") as caught:
        check(directory, planned(directory, "gguf"), model)
    assert caught.value.code == "bad_lora"


def test_a_higher_rank_than_planned_is_refused(tmp_path: Path, model: Path) -> None:
    write_peft(tmp_path / "peft", 1)
    adapter = planned(tmp_path / "peft", "safetensors", rank=RANK - 1)
    with pytest.raises(FleetfitError, match=f"Write rank: {RANK}") as caught:
        check(tmp_path / "peft", adapter, model)
    assert caught.value.code == "lora_rank_mismatch"


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"r": None},
    ],
)
def test_what_vllm_would_refuse_at_start_is_refused_before(
    tmp_path: Path, model: Path, config: dict[str, Any]
) -> None:
    write_peft(tmp_path / "peft", 1, config=config)
    with pytest.raises(FleetfitError) as caught:
        check(tmp_path / "peft", planned(tmp_path / "peft", "safetensors"), model)
    assert caught.value.code == "bad_lora"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_config_is_one_clear_error(tmp_path: Path, model: Path, content: bytes) -> None:
    write_peft(tmp_path / "peft", 1)
    (tmp_path / "peft/adapter_config.json").write_bytes(content or b" ")
    with pytest.raises(FleetfitError, match=r"adapter_config\.json"):
        check(tmp_path / "peft", planned(tmp_path / "peft", "safetensors"), model)


def test_names_cannot_break_an_engines_command_line() -> None:
    """llama-server separates by ':' and ',', vLLM by '='; all adapters of a plan are arguments of one line."""
    for character in ":,= /\n'\"$":
        assert lora._NAME.fullmatch(f"a{character}b") is None
