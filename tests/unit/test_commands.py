"""Promises of `fleetfit what-fits`, `catalog` and `calibrate`: JSON, exit codes, bad input in a sentence."""

from __future__ import annotations

import json
import random
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.gguf_reader import read_gguf
from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import ModelShape, from_gguf
from ansible_collections.fleetfit.llm.plugins.module_utils.policy import policy_from_variables
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import NothingFitsError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import SCHEMA_DIR, load_catalog
from click.testing import CliRunner, Result
from jsonschema import Draft202012Validator

from fleetfit import cli

from .planning import CATALOG, cards, facts, request
from .test_gguf_reader import gguf, llama_pairs, string, strings, tensor, u32

MODEL = "qwen2.5-7b-instruct"
CARD = "RTX 3060 12GB"
TERMS = {"weights", "kv_cache", "compute", "overhead", "margin", "total", "budget"}
CANDIDATE = {
    "engine",
    "variant",
    "fits",
    "context_tokens",
    "max_context_tokens",
    "slots",
    "kv_type_k",
    "kv_type_v",
    "gpu_layers",
    "memory_bytes",
    "devices",
    "host",
    "expected_tokens_per_s",
    "roofline_tokens_per_s",
    "args",
    "rejected",
}
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command as the shell does, with what main() makes of errors."""
    monkeypatch.delenv("HF_ENDPOINT", raising=False)

    def invoke(*arguments: str) -> Result:
        @click.command()
        def program() -> None:
            monkeypatch.setattr(sys, "argv", ["fleetfit", *arguments])
            cli.main()

        result = CliRunner().invoke(program, [])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        assert "Traceback" not in result.output
        return result

    return invoke


def candidates_of(result: Result) -> list[dict[str, Any]]:
    """Return the candidates after checking the document against the schema and the issue's list of names."""
    document = json.loads(result.stdout)
    assert set(document) == {"selected", "candidates"}
    plan = json.loads((SCHEMA_DIR / "plan.json").read_text())
    validator = Draft202012Validator({"$defs": plan["$defs"], "$ref": "#/$defs/candidate"})
    found: list[dict[str, Any]] = document["candidates"]
    for item in found:
        validator.validate(item)
        assert set(item) == CANDIDATE
        assert set(item["memory_bytes"]) == set(item["host"]) == TERMS
        for device in item["devices"]:
            assert set(device) == TERMS | {"id", "name"}
        for name in TERMS:
            parts = [*item["devices"], item["host"]]
            assert item["memory_bytes"][name] == sum(part[name] for part in parts)
        assert item["fits"] == (item["rejected"] is None)
        if item["rejected"] is not None:
            assert set(item["rejected"]) == {"code", "reason", "device", "short_by_bytes"}
        if item["engine"] == "vllm":
            assert item["gpu_layers"] is None
        assert (item["expected_tokens_per_s"] or 0) <= (item["roofline_tokens_per_s"] or 0)
    assert document["selected"] is None or document["selected"] in found
    return found


def refused(result: Result, *says: str) -> None:
    """Check exit code 2 and one sentence that has these words."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    for text in says:
        assert text in result.stderr


@pytest.mark.parametrize(
    "specs",
    [
        (CARD,),
        ("RTX 4090", "RTX 4090"),
        ("RTX 3060 12GB", "RTX 4090"),
        ("T4",),
        ("GTX 1080 Ti",),
        ("GB10",),
        ("cpu",),
        ("Some Card:16000",),
        ("Some Card:16000:15000:8.9",),
    ],
)
def test_the_json_is_what_the_contract_says(run: Callable[..., Result], specs: tuple[str, ...]) -> None:
    options = [part for spec in specs for part in ("--gpu", spec)]
    result = run("what-fits", MODEL, *options, "--ram", "64", "--json")
    assert result.exit_code == 0
    found = candidates_of(result)
    assert {item["engine"] for item in found} == {"llama_cpp", "vllm"}
    assert all(item["context_tokens"] == 8192 and item["slots"] == 2 for item in found)
    if specs == ("cpu",):
        assert all(item["devices"] == [] for item in found)
        assert all(item["gpu_layers"] == 0 for item in found if item["engine"] == "llama_cpp")
    selected = json.loads(result.stdout)["selected"]
    assert selected["fits"]
    assert ("--max-model-len" if selected["engine"] == "vllm" else "-c") in selected["args"]


def test_options_reach_the_candidates(run: Callable[..., Result]) -> None:
    options = ("--context", "4096", "--slots", "3", "--kv-type", "q8_0", "--engine", "llama_cpp", "--json")
    found = candidates_of(run("what-fits", MODEL, "--gpu", CARD, *options))
    assert {item["engine"] for item in found} == {"llama_cpp"}
    assert {(item["context_tokens"], item["slots"]) for item in found} == {(4096, 3)}
    assert {(item["kv_type_k"], item["kv_type_v"]) for item in found} == {("q8_0", "q8_0")}
    fastest = json.loads(run("what-fits", MODEL, "--gpu", "RTX 4090", "--prefer", "speed", "--json").stdout)[
        "selected"
    ]
    best = json.loads(run("what-fits", MODEL, "--gpu", "RTX 4090", "--json").stdout)["selected"]
    assert fastest["expected_tokens_per_s"] > best["expected_tokens_per_s"]


@pytest.mark.parametrize("engine", ["llama_cpp", "vllm"])
def test_adapters_are_counted(run: Callable[..., Result], engine: str) -> None:
    arguments = ("what-fits", MODEL, "--gpu", "RTX 3090", "--context", "4096", "--engine", engine, "--json")
    without = candidates_of(run(*arguments))
    with_two = candidates_of(run(*arguments, "--lora", "16", "--lora", "8"))
    for before, after in zip(without, with_two, strict=True):
        if before["fits"] and after["fits"] and before["gpu_layers"] == after["gpu_layers"]:
            assert after["memory_bytes"]["weights"] > before["memory_bytes"]["weights"] + 50_000_000
    assert any(item["fits"] for item in with_two)


def test_the_table_marks_the_winner_and_gives_reasons(run: Callable[..., Result]) -> None:
    result = run("what-fits", MODEL, "--gpu", CARD, "--engine", "llama_cpp")
    assert result.exit_code == 0
    rows = [line for line in result.stdout.splitlines() if line.startswith("*")]
    assert len(rows) == 1
    assert "Q8_0" in rows[0]
    assert "llama_cpp Q2_K: its quality tier rest is below --min-tier Q4_K_M" in result.stdout
    assert "note: 32 GiB of RAM assumed" in result.stderr


def test_a_card_without_room_leaves_the_cpu(run: Callable[..., Result]) -> None:
    result = run("what-fits", MODEL, "--gpu", "tiny [bold]card:1")
    assert result.exit_code == 0
    assert "on tiny [bold]card (0.0 GiB)" in result.stdout
    assert [line for line in result.stdout.splitlines() if line[:1] == "*" and "on the CPU alone" in line]


def test_memory_that_is_shared_is_said_to_be(run: Callable[..., Result]) -> None:
    result = run("what-fits", MODEL, "--gpu", "GB10")
    assert result.exit_code == 0
    assert "GB10 has no memory of its own" in result.stderr
    assert "assumed (--ram)" not in result.stderr


def test_a_smaller_model_that_fits_only_with_layers_in_ram_is_not_the_only_offer(
    run: Callable[..., Result],
) -> None:
    result = run("what-fits", "qwen2.5-72b-instruct", "--gpu", "T4", "--ram", "16")
    assert result.exit_code == 1
    assert re.search(
        r"qwen2\.5-32b-instruct \(\S+ would fit, with layers in RAM: about 0?\S+ tokens/s\)", result.stderr
    )
    assert re.search(r"the smaller model qwen2\.5-(14|7)b-instruct \(\S+ would fit\)", result.stderr)


def test_nothing_fits_is_exit_code_1_and_says_what_would(run: Callable[..., Result]) -> None:
    arguments = ("what-fits", "qwen2.5-72b-instruct", "--gpu", CARD, "--ram", "8")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "Nothing fits" in result.stderr
    assert "would fit" in result.stderr
    assert "short by" in result.stdout
    machine = run(*arguments, "--json")
    assert machine.exit_code == 1
    assert json.loads(machine.stdout)["selected"] is None
    memory = [
        item["rejected"] for item in candidates_of(machine) if item["rejected"]["code"] == "does_not_fit"
    ]
    assert memory
    assert all(item["short_by_bytes"] > 0 and item["device"] for item in memory)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((MODEL,), ["No card is named", "NAME:TOTAL_MIB"]),
        ((MODEL, "--gpu", "RTX 3060 12"), ["no card 'RTX 3060 12'", "RTX 3060 12GB", "NAME:TOTAL_MIB"]),
        ((MODEL, "--gpu", "H100 80GB"), ["Did you mean H100 SXM or H100 PCIe?", "catalog/gpus.yml"]),
        ((MODEL, "--gpu", "Voodoo 2"), ["no card 'Voodoo 2'", "NAME:TOTAL_MIB[:FREE_MIB"]),
        ((MODEL, "--gpu", "card:0"), ["TOTAL_MIB is 0"]),
        ((MODEL, "--gpu", "card:-5"), ["TOTAL_MIB is -5"]),
        ((MODEL, "--gpu", "card:many"), ["'many', not a whole number"]),
        ((MODEL, "--gpu", "card:99999999999999"), ["not from 0 to"]),
        ((MODEL, "--gpu", "card:8000:9000"), ["FREE_MIB 9000 is more than"]),
        ((MODEL, "--gpu", "card:8000:-1"), ["FREE_MIB is -1"]),
        ((MODEL, "--gpu", "card:8000:7000:new"), ["COMPUTE_CAPABILITY is 'new'"]),
        ((MODEL, "--gpu", "card:1_0_0"), ["'1_0_0', not a whole number"]),
        ((MODEL, "--gpu", "card:²"), ["not a whole number"]),
        ((MODEL, "--gpu", "card:8000:7000:.5"), ["COMPUTE_CAPABILITY is '.5'"]),
        ((MODEL, "--gpu", "card:8000:7000:٨.٩"), ["not like 8.9"]),
        ((MODEL, "--gpu", "card\x1b[31m\n:8000"), ["cannot be printed"]),
        ((MODEL, "--gpu", "card:1:1:8.9:x"), ["too many parts"]),
        ((MODEL, "--gpu", ":8000"), ["no name"]),
        ((MODEL, "--gpu", ""), ["A SPEC is"]),
        ((MODEL, "--gpu", "cpu", "--gpu", CARD), ["cpu stands for a host without GPUs"]),
        ((MODEL, "--gpu", CARD, "--ram", "0"), ["--ram is 0"]),
        ((MODEL, "--gpu", CARD, "--ram", "-4"), ["--ram is -4"]),
        ((MODEL, "--gpu", CARD, "--ram", "nan"), ["--ram is nan"]),
        ((MODEL, "--gpu", CARD, "--ram", "inf"), ["--ram is inf"]),
        ((MODEL, "--gpu", CARD, "--context", "0"), ["--context is 0"]),
        ((MODEL, "--gpu", CARD, "--context", "-8192"), ["--context is -8192"]),
        ((MODEL, "--gpu", CARD, "--lora", "0"), ["--lora is 0"]),
        ((MODEL, "--gpu", CARD, "--slots", "0"), ["--slots is 0"]),
        ((MODEL, "--gpu", CARD, "--slots", "-1"), ["--slots is -1"]),
        ((MODEL, "--gpu", CARD, "--context", "many"), ["--context"]),
        ((MODEL, "--gpu", CARD, "--engine", "tgi"), ["--engine"]),
        ((MODEL, "--gpu", CARD, "--kv-type", "q1"), ["--kv-type"]),
        (
            (MODEL, "--gpu", "RTX 4090", "--context", "200000"),
            ["supports 32768 tokens, 131072 with YaRN", "at most 131072"],
        ),
        (("smollm2-135m-instruct", "--gpu", CARD, "--context", "8193"), ["supports 8192 tokens"]),
        (("qwen2.5-7b-instrukt", "--gpu", CARD), ["Did you mean qwen2.5-7b-instruct"]),
        (("nothing like it", "--gpu", CARD), ["no model 'nothing like it'", "catalog list"]),
        (("x" * 5000, "--gpu", CARD), ["no model 'xxx"]),
        (("", "--gpu", CARD), ["No model is named"]),
        (("/nowhere/model.gguf", "--gpu", CARD), ["/nowhere/model.gguf"]),
        ((MODEL, "--gpu", CARD, "--catalog-dir", "/nowhere"), ["/nowhere does not exist"]),
    ],
)
def test_bad_input_is_exit_code_2_and_says_what_to_do(
    run: Callable[..., Result], arguments: tuple[str, ...], says: list[str]
) -> None:
    refused(run("what-fits", *arguments), *says)


# --- files


def model_bytes(tokens: int = 64, **changes: int) -> bytes:
    """Return a whole small llama GGUF with its tensors."""
    names = [
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_norm",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ]
    widths: dict[str, list[int]] = {
        "attn_norm": [32],
        "ffn_norm": [32],
        "attn_q": [32, 32],
        "attn_k": [32, 16],
        "attn_v": [32, 16],
        "attn_output": [32, 32],
        "ffn_gate": [32, 64],
        "ffn_up": [32, 64],
        "ffn_down": [64, 32],
    }
    tensors, offset = [], 0
    for name, dimensions in [
        ("token_embd.weight", [32, 64]),
        *((f"blk.0.{item}.weight", widths[item]) for item in names),
        ("output_norm.weight", [32]),
        ("output.weight", [32, 64]),
    ]:
        tensors.append(tensor(name, dimensions, 0, offset))
        size = 4
        for count in dimensions:
            size *= count
        offset += size
    pairs = [
        *(pair for pair in llama_pairs() if b"context_length" not in pair),
        u32("llama.context_length", 2048),
        u32("llama.vocab_size", 64),
        strings("tokenizer.ggml.tokens", [f"t{number}" for number in range(tokens)]),
        *(u32(key.replace("__", "."), value) for key, value in changes.items()),
    ]
    return gguf(pairs, tensors, offset)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(model_bytes())
    return path


def test_a_gguf_file_on_a_cpu(run: Callable[..., Result], model_file: Path) -> None:
    options = ("--gpu", "cpu", "--engine", "llama_cpp", "--context", "1000", "--slots", "3", "--json")
    result = run("what-fits", str(model_file), *options)
    assert result.exit_code == 0, result.output
    (found,) = candidates_of(result)
    header = read_gguf(model_file)
    assert found["memory_bytes"]["weights"] == sum(item.size_bytes for item in header.tensors)
    shape = from_gguf(header.metadata, header.tensor_names, origin="test")
    # Keys and values in f16, three slots padded to 1024 tokens each.
    assert (
        found["memory_bytes"]["kv_cache"] == 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim * 3 * 1024
    )
    assert found["args"][found["args"].index("-c") + 1] == str(3 * 1024)


def test_damaged_gguf_files(run: Callable[..., Result], model_file: Path, tmp_path: Path) -> None:
    whole = model_file.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    for length in (0, 3, 20, 200, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        refused(run("what-fits", str(damaged), "--gpu", "cpu"), "damaged.gguf")
    damaged.write_bytes(b"<!DOCTYPE html>" + whole)
    refused(run("what-fits", str(damaged), "--gpu", "cpu"), "damaged.gguf")
    damaged.write_bytes(gguf([string("general.architecture", "llama")], []))
    refused(run("what-fits", str(damaged), "--gpu", "cpu"), "damaged.gguf")
    (tmp_path / "folder.gguf").mkdir()
    refused(run("what-fits", str(tmp_path / "folder.gguf"), "--gpu", "cpu"), "folder.gguf")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("llama.block_count", 2, "declares 2 blocks and holds 1"),
        ("llama.block_count", 4096, "declares 4096 blocks"),
        ("llama.feed_forward_length", 65, "ffn_"),
        ("llama.attention.head_count_kv", 1, "attn_k"),
        ("llama.embedding_length", 64, "token_embd.weight"),
    ],
)
def test_a_header_that_contradicts_its_tensors(
    run: Callable[..., Result], model_file: Path, key: str, value: int, says: str
) -> None:
    """llama.cpp would refuse to load it; numbers for it would be of no model."""
    content = model_file.read_bytes()
    place = content.index(key.encode()) + len(key) + 4
    model_file.write_bytes(content[:place] + struct.pack("<I", value) + content[place + 4 :])
    for specs in (["--gpu", "cpu"], ["--gpu", CARD], ["--gpu", CARD, "--gpu", CARD]):
        refused(run("what-fits", str(model_file), *specs), "tiny.gguf", says)


def test_the_list_of_tokens_decides_the_vocabulary(run: Callable[..., Result], tmp_path: Path) -> None:
    """As in llama.cpp, which reads the key only where there is no list."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(model_bytes().replace(u32("llama.vocab_size", 64), u32("llama.vocab_size", 65)))
    assert run("what-fits", str(path), "--gpu", "cpu").exit_code == 0
    path.write_bytes(model_bytes(tokens=65))
    refused(run("what-fits", str(path), "--gpu", "cpu"), "tiny.gguf", "token_embd.weight")


def test_fuzzed_models_are_planned_or_refused(run: Callable[..., Result], model_file: Path) -> None:
    """Whatever a byte says, the answer is a plan or one sentence, never a traceback."""
    dice = random.Random(20261128)  # noqa: S311
    sound = model_file.read_bytes()
    header = sound.index(b"output.weight") + 64
    codes = set()
    for _ in range(150):
        content = bytearray(sound)
        for _ in range(dice.choice((1, 1, 2, 4))):
            content[dice.randrange(4, header)] = dice.randrange(256)
        model_file.write_bytes(bytes(content))
        spec = dice.choice(("cpu", CARD))
        codes.add(run("what-fits", str(model_file), "--gpu", spec, "--json").exit_code)
    assert codes <= {0, 1, 2}
    assert 2 in codes


def test_a_context_beyond_the_file_is_refused(run: Callable[..., Result], model_file: Path) -> None:
    refused(run("what-fits", str(model_file), "--gpu", "cpu", "--context", "4096"), "supports 2048 tokens")


def config_dir(tmp_path: Path, **changes: Any) -> Path:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    merged = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(merged))
    return folder


def test_a_directory_with_config_json(run: Callable[..., Result], tmp_path: Path) -> None:
    found = candidates_of(run("what-fits", str(config_dir(tmp_path)), "--gpu", CARD, "--json"))
    assert {item["variant"] for item in found} >= {"BF16", "F16", "Q8_0", "Q4_K_M"}


def test_tensors_of_another_model_are_refused(run: Callable[..., Result], tmp_path: Path) -> None:
    folder = config_dir(tmp_path)
    infos = {
        name: {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8 * index, 8 * index + 8]}
        for index, name in enumerate(["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
    }
    text = json.dumps(infos).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refused(run("what-fits", str(folder), "--gpu", CARD), "24 layers and its tensors 1")


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"])
def test_a_missing_field_is_named(run: Callable[..., Result], tmp_path: Path, field: str) -> None:
    folder = config_dir(tmp_path, **{field: None})
    refused(run("what-fits", str(folder), "--gpu", CARD), field, "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", -896),
        ("num_hidden_layers", -1),
        ("vocab_size", 0),
        ("intermediate_size", "big"),
        ("num_key_value_heads", 0),
        ("num_attention_heads", 10**30),
        ("max_position_embeddings", -5),
    ],
)
def test_sizes_that_are_none(run: Callable[..., Result], tmp_path: Path, field: str, value: Any) -> None:
    refused(run("what-fits", str(config_dir(tmp_path, **{field: value})), "--gpu", CARD), field)


def test_directories_that_hold_no_model(run: Callable[..., Result], tmp_path: Path) -> None:
    refused(run("what-fits", str(tmp_path), "--gpu", CARD), "no config.json")
    folder = config_dir(tmp_path)
    for text in ("<html>", "[]", "[" * 100_000, "null", '"text"'):
        (folder / "config.json").write_text(text)
        refused(run("what-fits", str(folder), "--gpu", CARD), "config.json")
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(run("what-fits", str(folder), "--gpu", CARD), "config.json")


def test_heads_that_two_cards_cannot_share_are_planned_as_a_pipeline_or_refused(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    """7 heads on 2 equal cards: no tensor parallelism; what vLLM is offered instead divides."""
    folder = config_dir(tmp_path, hidden_size=896, num_attention_heads=7, num_key_value_heads=7)
    result = run(
        "what-fits", str(folder), "--gpu", "RTX 4090", "--gpu", "RTX 4090", "--engine", "vllm", "--json"
    )
    assert result.exit_code in (0, 1)
    for item in candidates_of(result):
        args = item["args"]
        tensor_parallel = (
            args[args.index("--tensor-parallel-size") + 1] if "--tensor-parallel-size" in args else "1"
        )
        assert 7 % int(tensor_parallel) == 0


# --- the planner's own rows


def plan_error(**variables: Any) -> FleetfitError:
    with pytest.raises(FleetfitError) as caught:
        policy_from_variables({f"fleetfit_{name}": value for name, value in variables.items()})
    return caught.value


def test_no_model_named_and_an_unknown_one() -> None:
    error = plan_error(model=None)
    assert error.code == "model_not_named"
    assert "catalog list" in str(error)
    assert plan_error(model="  ").code == "model_not_named"
    with pytest.raises(FleetfitError, match=r"Did you mean qwen2\.5-7b-instruct"):
        CATALOG.entry("qwen2.5-7b")


def test_unpinned_context_and_memory_say_what_to_do() -> None:
    from ansible_collections.fleetfit.llm.plugins.module_utils.selection import select

    with pytest.raises(NothingFitsError, match=f"fleetfit catalog pin {MODEL}") as unpinned:
        select(request(MODEL, facts(cards("RTX 4090")), require_pinned=True))
    assert unpinned.value.code == "model_not_pinned"
    with pytest.raises(FleetfitError, match="at most 131072 tokens") as context:
        select(request(MODEL, facts(cards("RTX 4090")), min_context_tokens=131073))
    assert context.value.code == "context_above_limit"
    with pytest.raises(NothingFitsError, match="short by") as memory:
        select(request("qwen2.5-32b-instruct", facts(cards(CARD), ram_gib=8)))
    assert "would fit" in str(memory.value.remedy)
    assert all(
        item.rejected.short_by_bytes and item.rejected.device
        for item in memory.value.candidates
        if item.rejected and item.rejected.code == "does_not_fit"
    )


# --- fleetfit catalog


def test_catalog_list_and_show(run: Callable[..., Result]) -> None:
    table = run("catalog", "list")
    assert table.exit_code == 0
    assert all(name in table.stdout for name in CATALOG.entries)
    listed = json.loads(run("catalog", "list", "--json").stdout)
    assert {item["id"] for item in listed} == set(CATALOG.entries)
    shown = json.loads(run("catalog", "show", MODEL, "--json").stdout)
    assert ModelShape.from_dict(shown["shape"]) == CATALOG.entry(MODEL).shape
    assert [item["name"] for item in shown["variants"]] == [
        item.name for item in CATALOG.entry(MODEL).variants
    ]
    assert "Q4_K_M" in run("catalog", "show", MODEL).stdout
    refused(run("catalog", "show", "qwen2.5-7b"), "Did you mean qwen2.5-7b-instruct")


def test_catalog_check(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run("catalog", "check")
    assert done.exit_code == 0
    assert "ok" in done.stdout
    overlay = {
        "schema_version": 1,
        "extends": "smollm2-135m-instruct",
        "parameters": 1_000_000,
        "variants": [
            {
                "name": "Q8_0",
                "format": "gguf",
                "engines": ["llama_cpp"],
                "scheme": "Q8_0",
                "repository": "lab/lab",
                "revision": "0" * 40,
                "files": [{"name": "m.gguf", "size": 5, "sha256": "0" * 64}],
            }
        ],
    }
    (tmp_path / "mine.yml").write_text(yaml.safe_dump(overlay))
    result = run("catalog", "check", "--catalog-dir", str(tmp_path))
    assert result.exit_code == 2
    assert "parameters is 1000000, the shape has" in result.stderr
    assert "Q8_0 has 5 bytes" in result.stderr
    assert str(tmp_path / "mine.yml") in result.stderr
    (tmp_path / "mine.yml").write_text("schema_version: 1\nid: x\n")
    refused(run("catalog", "check", "--catalog-dir", str(tmp_path)), "mine.yml", "catalog_entry.json")
    (tmp_path / "mine.yml").write_text("a: [")
    refused(run("catalog", "list", "--catalog-dir", str(tmp_path)), "is not valid YAML")


# --- fleetfit calibrate


def measurement(total: int = 6_000_000_000, **changes: Any) -> dict[str, Any]:
    return {
        "engine": "llama_cpp",
        "engine_version": str(CATALOG.engines["engines"]["llama_cpp"]["version"]),
        "gpu": "NVIDIA GeForce RTX 4090",
        "model": MODEL,
        "variant": "Q4_K_M",
        "predicted": {"weights": 4_000_000_000, "kv_cache": 900_000_000, "compute": 300_000_000},
        "measured": {"total": total},
        **changes,
    }


def test_calibrate_writes_a_file_that_planning_takes(run: Callable[..., Result], tmp_path: Path) -> None:
    source, output = tmp_path / "host.json", tmp_path / "overlay" / "calibration.yml"
    output.parent.mkdir()
    source.write_text(json.dumps({"measurements": [measurement(), measurement(5_900_000_000)]}))
    done = run("calibrate", str(source), "--output", str(output))
    assert done.exit_code == 0, done.output
    assert "2x" in done.stdout
    (record,) = load_catalog([output.parent]).calibration
    assert record["overhead_bytes"] == 800_000_000
    options = ("--gpu", "RTX 4090", "--engine", "llama_cpp", "--json")
    plain = candidates_of(run("what-fits", MODEL, *options))
    informed = candidates_of(run("what-fits", MODEL, *options, "--catalog-dir", str(output.parent)))
    overheads = {
        name: [item["memory_bytes"]["overhead"] for item in found if item["variant"] == "Q4_K_M"]
        for name, found in (("plain", plain), ("informed", informed))
    }
    assert overheads["informed"] != overheads["plain"]
    assert overheads["informed"][0] >= 800_000_000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "holds no measurements"),
        ("[]", "holds no measurements"),
        ("{}", "holds no measurements"),
        ('{"measurements": []}', "No measurement of a real GPU"),
        ('{"measurements": [{}]}', "holds no measurements"),
        ('{"measurements": 5}', "holds no measurements"),
        (json.dumps({"measurements": [measurement(total=-1)]}), "-1"),
        (json.dumps({"measurements": [measurement(predicted={})]}), "predicted weights is missing"),
    ],
)
def test_calibrate_refuses_what_is_no_measurement(
    run: Callable[..., Result], tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "host.json").write_text(text)
    refused(run("calibrate", str(tmp_path / "host.json"), "--output", str(tmp_path / "out.yml")), says)
    assert not (tmp_path / "out.yml").exists()
    refused(run("calibrate", "/nowhere.json"), "/nowhere.json")
    refused(run("calibrate"), "SOURCES")
