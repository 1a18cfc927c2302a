"""`fleetfit catalog add`: an entry of what a file says of itself, and one sentence for what cannot be described."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import from_config_json
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import model_tensors, scheme_of_config
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_catalog
from click.testing import CliRunner, Result

from fleetfit import cli

from .planning import CATALOG
from .test_gguf_reader import gguf, llama_pairs, string

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.sizing import oracle as llama_oracle

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
Q8_0 = 7  # general.file_type of MOSTLY_Q8_0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run the command as the shell does, in an empty directory."""
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.chdir(tmp_path)

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


def model_dir(tmp_path: Path, **changes: Any) -> Path:
    folder = tmp_path / "Tiny-Chat"
    folder.mkdir(exist_ok=True)
    merged = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(merged))
    return folder


def sparse(path: Path, model: str = "smollm2-135m-instruct", **more: str | int) -> Path:
    """Write a GGUF with a catalog model's true header and no data: 145 MB that take no space."""
    keys = {"general.file_type": Q8_0, **{key.replace("__", "."): value for key, value in more.items()}}
    llama_oracle.write_sparse_gguf(path, CATALOG.entry(model).shape, "Q8_0", keys)
    return path


def written(tmp_path: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((tmp_path / "fleetfit-catalog" / f"{name}.yml").read_text())
    return document


def test_a_models_directory(run: Callable[..., Result], tmp_path: Path) -> None:
    folder = model_dir(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    done = run("catalog", "add", str(folder))
    assert done.exit_code == 0, done.output
    document = written(tmp_path, "tiny-chat")
    assert document["parameters"] == CATALOG.entry("qwen3-0.6b").parameters
    assert document["rope_theta"] == 1000000
    assert [item["name"] for item in document["variants"]] == ["BF16"]
    # What it could not know is said, in the file too, and where it goes.
    for field in ("licence.id", "licence.url", "variants[].repository", "chat.tool_call_parser", "family"):
        assert f"to fill in: {field}: " in done.stderr
        assert f"# - {field}: " in (tmp_path / "fleetfit-catalog" / "tiny-chat.yml").read_text()
    assert "chat.template_file" not in done.stderr
    assert document["licence"] == {"id": "unknown", "needs_acceptance": True}
    # The other commands take it from there.
    overlay = ("--catalog-dir", "fleetfit-catalog")
    assert run("catalog", "check", *overlay).exit_code == 0
    assert "tiny-chat" in run("catalog", "list", *overlay).stdout
    fits = run("what-fits", "tiny-chat", *overlay, "--gpu", "RTX 4090", "--json")
    assert fits.exit_code == 0, fits.output
    assert json.loads(fits.stdout)["selected"]["engine"] == "vllm"
    refused = run("catalog", "pin", "tiny-chat", "BF16", *overlay)
    assert refused.exit_code == 2
    assert "names no repository" in refused.stderr


def safetensors(folder: Path, *, twice: bool = False, layers: int | None = None) -> None:
    """Write weights of the directory's own shape, one tensor a layer, without data; the output matrix too?"""
    shape = from_config_json(json.loads((folder / "config.json").read_text()))
    sizes = {"model.embed_tokens.weight": 0, "model.norm.weight": 0}
    for item in model_tensors(shape):
        name = {-1: "model.norm.weight"}.get(item.layer, f"model.layers.{item.layer}.all.weight")
        name = "model.embed_tokens.weight" if item.category == "token_embd" else name
        if item.layer < (shape.layers if layers is None else layers):
            sizes[name] = sizes.get(name, 0) + 2 * item.cols * item.rows
    if twice:
        sizes["lm_head.weight"] = sizes["model.embed_tokens.weight"]
    header, offset = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + offset)


def test_the_weights_of_a_directory_are_looked_at(run: Callable[..., Result], tmp_path: Path) -> None:
    folder = model_dir(tmp_path)
    safetensors(folder)
    assert run("catalog", "add", str(folder)).exit_code == 0
    assert "stored_output" not in written(tmp_path, "tiny-chat")["variants"][0]
    # As in Qwen3-0.6B: the output matrix is stored although it is tied.
    safetensors(folder, twice=True)
    assert run("catalog", "add", str(folder), "--force").exit_code == 0
    assert written(tmp_path, "tiny-chat")["variants"][0]["stored_output"] is True
    before = (tmp_path / "fleetfit-catalog" / "tiny-chat.yml").read_bytes()
    for layers, says in ((27, "28 layers and its tensors 27"), (None, "1.1 GiB of weights")):
        safetensors(folder, layers=layers)
        if layers is None:
            changed = {**CONFIG, "intermediate_size": 6144}
            (folder / "config.json").write_text(json.dumps(changed))
        done = run("catalog", "add", str(folder), "--force")
        assert done.exit_code == 2, done.output
        assert says in done.stderr
    assert (tmp_path / "fleetfit-catalog" / "tiny-chat.yml").read_bytes() == before


def test_what_the_caller_says_counts(run: Callable[..., Result], tmp_path: Path) -> None:
    config = model_dir(tmp_path) / "config.json"
    overlay = tmp_path / "mine"
    (overlay / "models").mkdir(parents=True)
    says = ("--id", "my-model", "--family", "qwen3", "--licence", "apache-2.0", "--repository", "acme/tiny")
    done = run(
        "catalog", "add", str(config), "--output-dir", str(overlay), *says, "--tool-call-parser", "hermes"
    )
    assert done.exit_code == 0, done.output
    assert f"written to {overlay}/models/my-model.yml" in done.stdout
    entry = load_catalog([overlay]).entry("my-model")
    assert (entry.family, entry.licence, entry.licence_needs_acceptance) == ("qwen3", "apache-2.0", False)
    assert entry.tool_call_parser == "hermes"
    assert entry.variant("BF16").repository == "acme/tiny"
    assert "chat.template_file: needed if" in done.stderr
    assert "variants[].repository" not in done.stderr
    assert "fleetfit catalog pin my-model" in done.stderr


def test_a_config_that_extends_its_context_is_written_as_yarn(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    run("catalog", "add", str(model_dir(tmp_path, rope_scaling=scaling, max_position_embeddings=131072)))
    document = written(tmp_path, "tiny-chat")
    assert document["shape"]["native_context_tokens"] == 32768
    assert (document["extended_context_tokens"], document["rope_scaling"]) == (131072, "yarn")


def test_a_gguf_file_is_pinned_by_its_own_checksum(run: Callable[..., Result], tmp_path: Path) -> None:
    path = sparse(
        tmp_path / "Small-Chat.Q8_0.gguf",
        general__license="mit",
        tokenizer__chat_template="{{ messages }}",
    )
    done = run("catalog", "add", str(path))
    assert done.exit_code == 0, done.output
    entry = load_catalog([tmp_path / "fleetfit-catalog"]).entry("small-chat")
    variant = entry.variant("Q8_0")
    (file,) = variant.files
    assert file.name == path.name
    assert file.size == path.stat().st_size
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert entry.shape == CATALOG.entry("smollm2-135m-instruct").shape
    assert (entry.licence, entry.licence_needs_acceptance) == ("mit", False)
    assert "catalog pin" not in done.stderr
    overlay = ("--catalog-dir", "fleetfit-catalog")
    assert run("catalog", "check", *overlay).exit_code == 0
    fits = run("what-fits", "small-chat", *overlay, "--gpu", "cpu", "--json")
    assert json.loads(fits.stdout)["selected"]["variant"] == "Q8_0"
    pinned = run("catalog", "pin", "small-chat", *overlay)
    assert pinned.exit_code == 2
    assert "no variant to pin" in pinned.stderr


def test_a_file_without_a_template_is_told(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run("catalog", "add", str(sparse(tmp_path / "m.Q8_0.gguf")))
    assert "to fill in: chat.template_file: the files have no chat template" in done.stderr


def test_an_entry_is_not_overwritten_without_force(run: Callable[..., Result], tmp_path: Path) -> None:
    folder = str(model_dir(tmp_path))
    assert run("catalog", "add", folder).exit_code == 0
    file = tmp_path / "fleetfit-catalog" / "tiny-chat.yml"
    file.write_text(file.read_text().replace("family: tiny-chat", "family: edited"))
    again = run("catalog", "add", folder)
    assert again.exit_code == 2
    for text in ("'tiny-chat'", "fleetfit-catalog/tiny-chat.yml", "--id", "--force"):
        assert text in again.stderr
    assert "family: edited" in file.read_text()
    # One that we ship, and one in another overlay, are kept too.
    shipped = run("catalog", "add", folder, "--id", "qwen3-8b")
    assert shipped.exit_code == 2
    assert "catalog/models/qwen3-8b.yml" in shipped.stderr
    other = run("catalog", "add", folder, "--catalog-dir", "fleetfit-catalog", "--output-dir", "second")
    assert other.exit_code == 2
    assert run("catalog", "add", folder, "--force").exit_code == 0
    assert "family: tiny-chat" in file.read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": None}, ["hidden_size", "Tiny-Chat/config.json", "Fetch the file again"]),
        ({"model_type": None}, ["model_type", "Tiny-Chat/config.json"]),
        ({"num_hidden_layers": "many"}, ["num_hidden_layers", "'many'", "whole number"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
        ({"model_type": "mamba2"}, ["'mamba2'", "never compared", "Supported: "]),
        ({"vision_config": {}}, ["multimodal", "text-only"]),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["bitsandbytes", "AWQ"]),
        ({"torch_dtype": "float8"}, ["float8", "Known safetensors schemes"]),
    ],
)
def test_a_config_that_cannot_be_described(
    run: Callable[..., Result], tmp_path: Path, changes: dict[str, Any], says: list[str]
) -> None:
    done = run("catalog", "add", str(model_dir(tmp_path, **changes)))
    assert done.exit_code == 2
    for text in says:
        assert text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "fleetfit-catalog").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1), "ends within"),
        (b"<!DOCTYPE html>", "not a GGUF file"),
        (gguf([string("general.architecture", "mamba")], []), "'mamba'"),
        (gguf([string("general.architecture", "clip")], []), "multimodal projector"),
        (gguf([string("general.architecture", "llama")], []), "no field"),
        (gguf(llama_pairs(), []), "declares 1 blocks and holds 0"),
    ],
)
def test_a_gguf_that_cannot_be_described(
    run: Callable[..., Result], tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    done = run("catalog", "add", str(path))
    assert done.exit_code == 2, done.output
    assert "damaged.gguf" in done.stderr
    assert says in done.stderr
    assert not (tmp_path / "fleetfit-catalog").exists()


def test_a_truncated_model_and_one_of_another_quantization(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    path = sparse(tmp_path / "cut.Q8_0.gguf")
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)
    done = run("catalog", "add", str(path))
    assert done.exit_code == 2
    assert "cut.Q8_0.gguf ends within" in done.stderr
    assert "incomplete or damaged" in done.stderr
    # Declared as Q4_K_M, stored as Q8_0.
    path = sparse(tmp_path / "mixed.gguf", general__file_type=15)
    done = run("catalog", "add", str(path))
    assert done.exit_code == 2
    assert "declares Q4_K_M" in done.stderr
    assert "quantized in a way of their own" in done.stderr
    path = sparse(tmp_path / "unknown.gguf", general__file_type=20)
    done = run("catalog", "add", str(path))
    assert done.exit_code == 0, done.output  # an unknown number: the type that most bytes have is taken


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nothing-like-it",), ["'nothing-like-it'", "organisation/name"]),
        (("x" * 5000,), ["organisation/name"]),
        (("/nowhere/model.gguf",), ["/nowhere/model.gguf"]),
        (("empty",), ["empty has no config.json"]),
        (("notes.txt",), ["neither a .gguf file nor a config.json"]),
        (("broken/config.json",), ["broken/config.json is not JSON"]),
        (("Tiny-Chat", "--id", "Bad Id"), ["'Bad Id'", "--id"]),
        (("Tiny-Chat", "--repository", "no-slash"), ["'no-slash'", "organisation/name"]),
        (("acme/tiny", "--endpoint", "http://127.0.0.1:9"), ["http://127.0.0.1:9", "--endpoint"]),
        (("acme/tiny", "--endpoint", "hub"), ["'hub'", "not a URL"]),
    ],
)
def test_bad_input_is_one_sentence(
    run: Callable[..., Result], tmp_path: Path, arguments: tuple[str, ...], says: list[str]
) -> None:
    model_dir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("<html>")
    (tmp_path / "notes.txt").write_text("a note")
    done = run("catalog", "add", *arguments)
    assert done.exit_code == 2
    for text in says:
        assert text in done.stderr
    assert not (tmp_path / "fleetfit-catalog").exists()


@pytest.mark.parametrize(
    ("quantization", "scheme"),
    [
        ({"quant_method": "fp8"}, "FP8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "FP8",
        ),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ-Int4"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
    ],
)
def test_quantizations_that_a_config_declares(quantization: dict[str, Any], scheme: str) -> None:
    assert scheme_of_config({**CONFIG, "quantization_config": quantization}) == scheme
