"""Every command line that the plan renders for vLLM, in vLLM's own parser and its own checks of model and length.

vLLM is the lab's CPU build, in a container without network. Plans for cards are read there as they would be on a
host with these cards; what only a GPU can refuse (kernels, memory) is not covered.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.catalog_entry import CatalogEntry, Variant
from ansible_collections.fleetfit.llm.plugins.module_utils.cpu_mapping import map_to_cpu
from ansible_collections.fleetfit.llm.plugins.module_utils.engine_args import vllm_argv
from ansible_collections.fleetfit.llm.plugins.module_utils.model_shape import ModelShape
from ansible_collections.fleetfit.llm.plugins.module_utils.plan import deployment_of
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import Candidate, evaluate

from fleetfit.lab.layers import ensure_layer
from fleetfit.lab.machine import podman, ready_machine, ulimit_options

from ..unit.planning import CATALOG, cards, facts, request

pytestmark = pytest.mark.slow

DATA = Path(__file__).parent / "data"
# Hosts from the smallest card that vLLM runs on to four of the largest; pairs and fours are tensor-parallel.
HOSTS = (
    ["T4"],
    ["RTX 2080 Ti"],
    ["RTX 3060 12GB"],
    ["RTX 3090"],
    ["RTX 4060 Ti 16GB"],
    ["RTX 4090"],
    ["RTX 5090"],
    ["L4"],
    ["L40S"],
    ["A100 80GB"],
    ["H100 SXM"],
    ["RTX 3090"] * 2,
    ["A100 80GB"] * 2,
    ["L40S"] * 4,
    ["RTX 3060 12GB", "RTX 4090"],
)
# vLLM reads a cache in FP8 on these.
WITH_FP8_CACHE = ("RTX 4060 Ti 16GB", "L40S", "H100 SXM")
QUANTIZATION: Mapping[str, Mapping[str, Any]] = {
    "GPTQ-Int4": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "GPTQ-Int8": {"quant_method": "gptq", "bits": 8, "group_size": 128, "desc_act": False, "sym": True},
    "AWQ": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "FP8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
}
ADAPTER = {
    "name": "tone",
    "format": "safetensors",
    "rank": 12,
    "url": "http://mirror/tone",
    "files": [
        {"name": name, "size": 1, "sha256": "0" * 64}
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ],
}


# llama.cpp's name of the architecture -> transformers' model_type and class.
CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
}


def entries() -> list[CatalogEntry]:
    """Return all Qwen2.5 and the smallest of every other kind, each with an FP8 variant."""
    smallest: dict[tuple[str, str], CatalogEntry] = {}
    for entry in sorted(CATALOG.entries.values(), key=lambda item: item.parameters):
        if any("vllm" in variant.engines for variant in entry.variants):
            kind = entry.id if entry.family == "qwen2.5-instruct" else entry.family
            smallest.setdefault((kind, entry.shape.architecture), entry)
    found = []
    for entry in smallest.values():
        ours = [variant for variant in entry.variants if "vllm" in variant.engines]
        if not any(variant.scheme == "FP8" for variant in ours):
            ours.append(Variant("FP8", "safetensors", ("vllm",), "FP8", "Q8_0", repository="org/fp8"))
        found.append(replace(entry, variants=tuple(ours)))
    return found


def candidates() -> list[tuple[str, str, CatalogEntry, Candidate, Any]]:
    """Return (name, host, entry, candidate, request) of everything that fits."""
    found = []
    for entry in entries():
        for number, names in enumerate(HOSTS):
            # The arguments of the other kinds differ by the model alone: a third of the hosts is enough.
            if entry.family != "qwen2.5-instruct" and number % 3:
                continue
            host = facts(cards(*names), ram_gib=256)
            long = number % 2 == 0
            wanted = request(
                entry,
                host,
                engines=("vllm",),
                engine="vllm",
                min_quality_tier="rest",
                accepted_licences=[entry.licence],
                min_context_tokens=entry.max_context_tokens if long else 8192,
                slots=1 + number % 3,
                kv_type="fp8" if names[0] in WITH_FP8_CACHE else "f16",
                lora_adapters=[{**ADAPTER, "base_model": entry.id}] if number % 3 == 0 else [],
            )
            place = " + ".join(names)
            for item in evaluate(wanted):
                if item.fits:
                    context = item.settings["max_model_len"]
                    name = f"{entry.id} {item.variant.name} on {place}, {context} tokens"
                    found.append((name, place, entry, item, (wanted, host)))
    return found


def config_of(shape: ModelShape, scheme: str) -> dict[str, Any]:
    """Return the config.json of a model of this shape."""
    model_type, class_name = CLASSES[shape.architecture]
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.native_context_tokens,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-06,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied_embeddings,
        "torch_dtype": "bfloat16" if scheme in ("BF16", "FP8") else "float16",
    }
    if shape.experts:
        config["num_experts"] = shape.experts
        config["num_experts_per_tok"] = shape.experts_used
        config["moe_intermediate_size"] = shape.expert_intermediate_size
        config["intermediate_size"] = shape.expert_intermediate_size * shape.experts_used
    if shape.sliding_window:
        config["sliding_window"] = shape.sliding_window
    if scheme in QUANTIZATION:
        config["quantization_config"] = dict(QUANTIZATION[scheme])
    return config


def rendered(settings: Mapping[str, Any], folder: str) -> list[str]:
    """Return the arguments behind the program, as the role renders them."""
    argv = vllm_argv(
        settings,
        python="python",
        model_path=folder,
        host="127.0.0.1",
        port=8101,
        adapters_directory="/opt/fleetfit/vllm/current",
    )
    return argv[argv.index("--model") :]


def ask_vllm(models: dict[str, Any], lines: list[list[Any]]) -> dict[str, Any]:
    """Return what data/vllm_arguments.py says of the lines in the lab's environment of vLLM."""
    text = json.dumps({"models": models, "lines": lines})
    script = DATA / "vllm_arguments.py"
    own = os.environ.get("FLEETFIT_TEST_VLLM_PYTHON")
    if own:
        argv = [own, str(script)]
    else:
        machine = ready_machine()
        options = [
            "--rm",
            "-i",
            "--network=none",
            *ulimit_options(machine),
            f"--volume={script}:/check.py:ro",
        ]
        image = ensure_layer("vllm", "bookworm", machine)
        shell = "exec /opt/fleetfit/vllm/envs/*/bin/python -P /check.py"
        argv = podman(machine, "run", *options, image, "sh", "-c", shell)
    done = subprocess.run(
        ["nice", *argv], input=text, capture_output=True, text=True, timeout=3600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def planned() -> list[tuple[str, str, CatalogEntry, Candidate, Any]]:
    """Everything that fits, planned once."""
    return candidates()


@pytest.fixture(scope="module")
def answer(planned: list[tuple[str, str, CatalogEntry, Candidate, Any]]) -> dict[str, Any]:
    """What vLLM says of every line; the last three are wrong on purpose."""
    lines: list[list[Any]] = []
    models, looked_at = {}, set()
    for name, _, entry, item, (wanted, host) in planned:
        shape, scheme = entry.shape_of(item.variant), item.variant.scheme
        folder = f"/tmp/fleetfit-models/{entry.id}-{item.variant.name}"
        models[folder] = config_of(shape, scheme)
        # The engine's own look at the model costs time: once for each model, scheme, length and dtype.
        key = (folder, item.settings["max_model_len"], item.settings["dtype"])
        lines.append([name, rendered(item.settings, folder), key not in looked_at])
        if key not in looked_at and len(item.devices) == 1:
            mapped = map_to_cpu(deployment_of(wanted, item, host), host, shape)
            lines.append([f"{name}, on the CPU", rendered(mapped["settings"], folder), False])
        looked_at.add(key)
    good = lines[0][1]
    for name, more in (
        ("wrong option", ["--no-such-option"]),
        ("wrong rank", ["--max-lora-rank", "12"]),
    ):
        lines.append([name, [*good, *more], False])
    too_long = [
        *good[: good.index("--max-model-len") + 1],
        "999999",
        *good[good.index("--max-model-len") + 2 :],
    ]
    lines.append(["wrong length", too_long, True])
    said = ask_vllm(models, lines)
    said["lines"] = len(lines) - 3
    return said


def test_vllms_parser_takes_every_planned_line(
    planned: list[tuple[str, str, CatalogEntry, Candidate, Any]], answer: dict[str, Any]
) -> None:
    pairs = {(entry.id, host) for _, host, entry, _, _ in planned}
    schemes = {item.variant.scheme for _, _, _, item, _ in planned}
    words = {word for _, _, _, item, _ in planned for word in item.args()}
    assert len(pairs) >= 40
    assert schemes == {"BF16", "GPTQ-Int4", "GPTQ-Int8", "AWQ", "FP8"}
    assert {"--hf-overrides", "--enable-lora", "--tool-call-parser", "fp8", "float16", "bfloat16"} <= words
    assert {item.settings["tensor_parallel"] for _, _, _, item, _ in planned} >= {1, 2, 4}
    wrong = {name: text for name, text in answer["problems"].items() if not name.startswith("wrong ")}
    assert not wrong, json.dumps(wrong, indent=1)[:6000]
    print(f"vLLM {answer['version']}: {answer['lines']} command lines, {len(pairs)} pairs of model and host")


def test_the_comparison_itself_sees_what_is_wrong(answer: dict[str, Any]) -> None:
    assert {"wrong option", "wrong rank", "wrong length"} <= set(answer["problems"])


def test_the_engine_serves_the_planned_context(
    planned: list[tuple[str, str, CatalogEntry, Candidate, Any]], answer: dict[str, Any]
) -> None:
    """YaRN included: without it the engine refuses a length beyond the model's own."""
    wanted = {name: item.settings["max_model_len"] for name, _, _, item, _ in planned}
    assert answer["lengths"]
    assert max(answer["lengths"].values()) > 100_000
    assert all(wanted[name] == length for name, length in answer["lengths"].items())


def test_every_tool_call_parser_of_the_catalog_is_registered(answer: dict[str, Any]) -> None:
    parsers = {entry.tool_call_parser for entry in CATALOG.entries.values()} - {None}
    assert {"hermes", "llama3_json", "mistral"} <= parsers
    assert parsers <= set(answer["parsers"])


def test_every_variable_that_the_role_sets_is_one_that_vllm_reads(answer: dict[str, Any]) -> None:
    text = (Path(__file__).parents[2] / "roles/vllm/vars/main.yml").read_text()
    ours = set(re.findall(r"'(VLLM_\w+)':", text)) | {"VLLM_API_KEY"}
    assert len(ours) >= 8
    assert ours <= set(answer["environment"])
