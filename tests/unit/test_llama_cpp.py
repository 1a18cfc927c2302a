"""Promises of module_utils.llama_cpp: its own accounting is held against the plan, device by device."""

from __future__ import annotations

from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.engine_args import LLAMA_CPP_SETTINGS
from ansible_collections.fleetfit.llm.plugins.module_utils.llama_cpp import FIT_ROUNDING_BYTES, fit_precheck

SETTINGS: dict[str, Any] = {
    **dict.fromkeys(LLAMA_CPP_SETTINGS, 1),
    "tensor_split": [],
    "rope": None,
    "flash_attention": "on",
    "split_mode": "layer",
    "load_mode": "mmap",
    "kv_type_k": "f16",
    "kv_type_v": "f16",
}


def terms(total: int, margin: int) -> dict[str, int]:
    return {"weights": 1, "kv_cache": 1, "compute": 1, "overhead": 1, "margin": margin, "total": total}


def check(**changes: Any) -> dict[str, Any]:
    devices = [terms(100, 10), terms(200, 20)]
    options: dict[str, Any] = {"devices": devices, "host": terms(50, 5), "binary": "/b", "model_path": "/m"}
    return fit_precheck(SETTINGS, **{**options, **changes})


def test_limits_are_the_plans_totals_without_their_margins() -> None:
    expected = {"CUDA0": 90, "CUDA1": 180, "Host": 45}
    assert check()["limits"] == {name: size + FIT_ROUNDING_BYTES for name, size in expected.items()}


def test_on_the_cpu_everything_is_main_memory() -> None:
    assert set(check(devices=[])["limits"]) == {"Host"}


def test_the_tool_gets_the_arguments_that_decide_memory_and_prints() -> None:
    argv = check()["argv"]
    assert argv[:3] == ["/b", "-m", "/m"]
    assert argv[-2:] == ["--fit-print", "on"]
    assert {"-c", "-np", "-b", "-ub", "-ngl", "-ctk", "-ctv"} <= {*argv}
    assert argv[argv.index("--fit") + 1] == "off"
