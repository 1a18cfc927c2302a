"""Render an engine's command line from the plan's typed settings; nothing that decides memory is left to
it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from .errors import FleetfitError

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
)
VLLM_SETTINGS = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "tensor_parallel",
    "pipeline_parallel",
    "kv_cache_dtype",
    "dtype",
    "enforce_eager",
    "rope",
    "tool_call_parser",
    "served_model_name",
    "device_uuids",
)


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
) -> list[str]:
    """Return llama-server's whole command line, program first.

    ``api_key_file`` and ``chat_template_file`` are paths (never the secret itself); ``alias`` defaults to
    the setting ``served_model_name``. Raises :class:`FleetfitError` (``incomplete_settings``).
    """
    argv = [binary, "-m", model_path, *llama_server_args(settings)]
    argv += ["--alias", alias or str(settings["served_model_name"])]
    argv += ["--host", host, "--port", str(port), "--offline"]
    if chat_template_file:
        argv += ["--chat-template-file", chat_template_file]
    if api_key_file:
        argv += ["--api-key-file", api_key_file]
    return argv


def vllm_args(settings: Mapping[str, Any]) -> list[str]:
    """Return the `vllm serve` arguments that decide memory, from the plan's settings.

    ``--quantization`` is left out on purpose: vLLM reads the method from the model's config.json. Raises
    :class:`FleetfitError` (``incomplete_settings``).
    """
    _check_complete("vllm", VLLM_SETTINGS, settings)
    args = [
        "--max-model-len",
        str(settings["max_model_len"]),
        "--max-num-seqs",
        str(settings["max_num_seqs"]),
        "--max-num-batched-tokens",
        str(settings["max_num_batched_tokens"]),
        "--gpu-memory-utilization",
        _number(settings["gpu_memory_utilization"]),
        "--tensor-parallel-size",
        str(settings["tensor_parallel"]),
        "--pipeline-parallel-size",
        str(settings["pipeline_parallel"]),
        "--kv-cache-dtype",
        str(settings["kv_cache_dtype"]),
        "--dtype",
        str(settings["dtype"]),
    ]
    if settings["enforce_eager"]:
        args.append("--enforce-eager")
    rope = settings["rope"]
    if rope:
        text = (
            f'{{"rope_scaling":{{"rope_type":"{rope["scaling"]}","factor":{_number(rope["scale"])},'
            f'"original_max_position_embeddings":{rope["original_context_tokens"]}}}}}'
        )
        args += ["--hf-overrides", text]
    if settings["tool_call_parser"]:
        args += ["--enable-auto-tool-choice", "--tool-call-parser", str(settings["tool_call_parser"])]
    return args


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
