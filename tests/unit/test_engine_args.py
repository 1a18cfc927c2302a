"""Promises of vLLM's command line: all that decides memory is in it, and no secret and no pickled weight ever."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.engine_args import (
    VLLM_SETTINGS,
    llama_server_argv,
    vllm_argv,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import evaluate

from .planning import CATALOG, cards, facts, request

PLACES: dict[str, Any] = {
    "python": "{release}/env/bin/python",
    "model_path": "{release}/model",
    "host": "127.0.0.1",
    "port": 8101,
}


def settings(model: str = "qwen2.5-7b-instruct", card: str = "RTX 4090", **variables: Any) -> dict[str, Any]:
    """Return the settings of the first variant of `model` that vLLM serves on `card`."""
    wanted = {"accepted_licences": ["qwen-research", "qwen"], "engine": "vllm", **variables}
    found = evaluate(request(model, facts(cards(card)), engines=("vllm",), **wanted))
    return dict(next(item for item in found if item.fits).settings)


def option(argv: list[str], name: str) -> str:
    assert argv.count(name) == 1
    return argv[argv.index(name) + 1]


def test_what_decides_memory_is_written_out() -> None:
    planned = settings()
    argv = vllm_argv(planned, **PLACES)
    assert argv[:4] == ["{release}/env/bin/python", "-P", "-m", "vllm.entrypoints.openai.api_server"]
    assert option(argv, "--model") == "{release}/model"
    assert option(argv, "--served-model-name") == "qwen2.5-7b-instruct"
    assert option(argv, "--max-model-len") == "8192"
    assert option(argv, "--max-num-seqs") == "16"
    assert option(argv, "--max-num-batched-tokens") == "2048"
    assert float(option(argv, "--gpu-memory-utilization")) == planned["gpu_memory_utilization"]
    assert option(argv, "--tensor-parallel-size") == option(argv, "--pipeline-parallel-size") == "1"
    assert option(argv, "--kv-cache-dtype") == "auto"
    assert "--enable-prefix-caching" in argv
    assert "--enforce-eager" not in argv
    assert (option(argv, "--host"), option(argv, "--port")) == ("127.0.0.1", "8101")


def test_a_number_of_bytes_takes_the_place_of_the_share_of_memory() -> None:
    argv = vllm_argv({**settings(), "kv_cache_memory_bytes": 123456789, "enforce_eager": True}, **PLACES)
    assert option(argv, "--kv-cache-memory-bytes") == "123456789"
    assert "--gpu-memory-utilization" not in argv
    assert "--enforce-eager" in argv


def test_the_models_own_config_names_the_quantization_unless_the_plan_does() -> None:
    assert "--quantization" not in vllm_argv(settings(), **PLACES)
    argv = vllm_argv({**settings(), "quantization": "fp8"}, **PLACES)
    assert option(argv, "--quantization") == "fp8"


@pytest.mark.parametrize("name", sorted(CATALOG.entries))
@pytest.mark.parametrize("card", ["T4", "RTX 3060 12GB", "RTX 4090", "H100 SXM"])
def test_no_bfloat16_below_compute_capability_8_and_never_what_is_unsafe(name: str, card: str) -> None:
    licences = [CATALOG.entry(name).licence]
    policy = {"engine": "vllm", "accepted_licences": licences}
    for item in evaluate(request(name, facts(cards(card)), engines=("vllm",), **policy)):
        if not item.settings or (item.rejected and item.rejected.code == "compute_capability_too_low"):
            continue
        assert set(item.settings) == set(VLLM_SETTINGS)
        argv = vllm_argv(item.settings, **PLACES)
        wide = item.variant.scheme in ("BF16", "FP8") or name.startswith("gemma-")
        wanted = "bfloat16" if card != "T4" and wide else "float16"
        assert option(argv, "--dtype") == wanted
        assert option(argv, "--load-format") == "safetensors"
        text = " ".join(argv)
        assert "--api-key" not in text
        assert "--trust-remote-code" not in text
        for flag in ("--disable-fastapi-docs", "--no-enable-log-requests", "--disable-uvicorn-access-log"):
            assert flag in argv


def test_tool_calls_are_parsed_as_the_catalog_says() -> None:
    argv = vllm_argv(settings(), **PLACES)
    assert option(argv, "--tool-call-parser") == "hermes"
    assert "--enable-auto-tool-choice" in argv
    assert "--enable-auto-tool-choice" not in vllm_argv({**settings(), "tool_call_parser": None}, **PLACES)


def test_the_catalogs_chat_template_is_used_where_it_has_one() -> None:
    argv = vllm_argv(settings(), **PLACES, chat_template_file="{release}/chat_template.jinja")
    assert option(argv, "--chat-template") == "{release}/chat_template.jinja"
    assert "--chat-template" not in vllm_argv(settings(), **PLACES)


def test_a_longer_context_brings_yarn_and_the_extended_length() -> None:
    planned = settings("qwen2.5-7b-instruct", "H100 SXM", min_context_tokens=65536, slots=1)
    overrides = json.loads(option(vllm_argv(planned, **PLACES), "--hf-overrides"))
    assert overrides["rope_parameters"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "rope_theta": 1000000,
    }
    assert overrides["max_position_embeddings"] == 131072
    assert "--hf-overrides" not in vllm_argv(settings(), **PLACES)


def test_a_setting_that_is_missing_is_refused() -> None:
    broken = settings()
    del broken["kv_cache_dtype"]
    with pytest.raises(FleetfitError, match="kv_cache_dtype") as caught:
        vllm_argv(broken, **PLACES)
    assert caught.value.code == "incomplete_settings"


def test_gguf_is_refused_with_the_alternative() -> None:
    with pytest.raises(FleetfitError, match="GGUF") as caught:
        vllm_argv(settings(), **{**PLACES, "model_path": "/models/x.Q4_K_M.gguf"})
    assert caught.value.code == "format_not_supported"
    assert "fleetfit_engine=llama_cpp" in str(caught.value.remedy)


def test_adapters_have_slots_of_the_planned_rank_and_their_names_come_last() -> None:
    planned = {**settings(), "max_loras": 2, "max_lora_rank": 16, "lora_modules": ["curt", "tone"]}
    argv = vllm_argv(planned, **PLACES, adapters_directory="{release}")
    assert "--enable-lora" in argv
    assert (option(argv, "--max-loras"), option(argv, "--max-lora-rank")) == ("2", "16")
    assert argv[-3:] == ["--lora-modules", "curt={release}/adapter-curt", "tone={release}/adapter-tone"]
    assert not any("lora" in word for word in vllm_argv(settings(), **PLACES))


def test_llama_server_answers_without_an_adapter_unless_a_request_asks_for_one() -> None:
    found = evaluate(request("qwen2.5-7b-instruct", facts(cards("RTX 4090"))))
    planned = dict(next(item for item in found if item.fits).settings)
    places = {"binary": "b", "model_path": "m", "host": "h", "port": 1}
    line = {**places, "api_key_file": None, "chat_template_file": None, "adapters_directory": "{release}"}
    assert "--lora-scaled" not in llama_server_argv(planned, **line)
    planned["lora"] = [{"name": "curt", "file": "c.gguf"}, {"name": "tone", "file": "t.gguf"}]
    value = option(llama_server_argv(planned, **line), "--lora-scaled")
    assert value == "{release}/adapter-curt/c.gguf:0,{release}/adapter-tone/t.gguf:0"


def test_without_the_models_rope_theta_its_context_is_not_extended() -> None:
    entry = replace(CATALOG.entry("qwen2.5-7b-instruct"), rope_theta=None)
    found = evaluate(
        request(
            entry,
            facts(cards("H100 SXM")),
            engines=("vllm",),
            engine="vllm",
            min_context_tokens=65536,
            slots=1,
        )
    )
    codes = {item.rejected.code for item in found if item.rejected}
    assert not any(item.fits for item in found)
    assert "rope_theta_unknown" in codes
