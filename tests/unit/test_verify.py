"""What verify makes of an engine's own words, and what a person reads when a host fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.manifest import HostPaths, write_section
from ansible_collections.fleetfit.llm.plugins.module_utils.verify import (
    REMEDIES,
    Question,
    check_identity,
    check_listeners,
    check_memory,
    check_speed,
    compare_memory,
    engine_identity,
    failed,
    listening_addresses,
    sentence,
    speed_is_impossible,
    verify_host,
)
from click.testing import CliRunner

from fleetfit.verify import (
    EXIT_FAILED,
    EXIT_NOT_CHECKED,
    EXIT_OK,
    Outcome,
    memory_text,
    speed_text,
    verify,
)

MIB = 1024 * 1024
GPU_DEPLOYMENT: dict[str, Any] = {
    "engine": "llama_cpp",
    "variant": "Q4_K_M",
    "served_model_name": "m",
    "settings": {"model_file": "m.Q4_K_M.gguf"},
    "devices": [
        {"id": "GPU-a", "name": "A", "weights": 100 * MIB, "kv_cache": 50 * MIB, "compute": 20 * MIB}
        | {"overhead": 5 * MIB, "margin": 10 * MIB, "total": 185 * MIB},
        {"id": "GPU-b", "name": "B", "weights": 90 * MIB, "kv_cache": 40 * MIB, "compute": 20 * MIB}
        | {"overhead": 5 * MIB, "margin": 10 * MIB, "total": 165 * MIB},
    ],
    "host": {"weights": 30 * MIB, "kv_cache": 0, "compute": 10 * MIB, "margin": 5 * MIB, "total": 45 * MIB},
    "cpu_mapping": None,
}


def test_each_gpu_and_the_host_are_compared_with_their_own_prediction() -> None:
    measured = {
        "CUDA0": {"model": 100 * MIB, "kv": 50 * MIB, "compute": 22 * MIB},
        "CUDA1": {"model": 90 * MIB, "kv": 30 * MIB, "rs": 10 * MIB, "compute": 20 * MIB},
        "CUDA_Host": {"output": 1 * MIB, "compute": 8 * MIB},
        "CPU_Mapped": {"model": 30 * MIB},
    }
    first, second, host = compare_memory(GPU_DEPLOYMENT, measured)
    assert (first["device"], first["measured_bytes"], first["difference_percent"]) == ("A", 172 * MIB, 1.18)
    assert second["measured"] == {"weights": 90 * MIB, "kv_cache": 40 * MIB, "compute": 20 * MIB}
    assert (host["device"], host["measured_bytes"]) == ("host", 39 * MIB)
    assert all(row["ok"] for row in (first, second, host))


def test_a_gpu_beyond_all_that_was_set_aside_fails_with_both_numbers() -> None:
    rows = compare_memory(GPU_DEPLOYMENT, {"CUDA0": {"model": 100 * MIB, "kv": 90 * MIB}})
    check = check_memory("llama-server", rows)
    assert (check.ok, check.code) == (False, "more_memory")
    assert "170 MiB" in check.message
    assert "190 MiB" in check.message


def test_a_simulated_gpu_is_compared_with_the_prediction_for_the_cpu() -> None:
    mapping = {
        "settings": {"model_file": "m.Q4_K_M.gguf"},
        "host": {"weights": 200 * MIB, "compute": 10 * MIB},
    }
    rows = compare_memory(
        {**GPU_DEPLOYMENT, "cpu_mapping": mapping},
        {"CPU": {"kv": 4 * MIB, "output": 1 * MIB}, "CPU_Mapped": {"model": 200 * MIB}},
    )
    assert [row["device"] for row in rows] == ["host"]
    assert rows[0]["predicted_bytes"] == 210 * MIB


def test_vllm_filling_its_share_with_cache_is_not_a_wrong_prediction() -> None:
    measured = {"vllm": {"model_bytes": 100 * MIB, "kv_bytes": 5000 * MIB, "kv_tokens": 1}}
    (row,) = compare_memory(GPU_DEPLOYMENT, measured)
    assert row["measured"]["kv_cache"] == 50 * MIB
    assert row["ok"]


def test_a_log_without_figures_is_said_and_does_not_fail() -> None:
    check = check_memory("llama-server", [])
    assert check.ok
    assert "not compared" in check.message


def test_the_engines_own_name_for_the_variant_is_reported() -> None:
    identity = engine_identity(
        {"model_path": "/opt/r/model/m.Q4_K_M.gguf", "model_ftype": "Q4_K - Medium"}, {"data": [{"id": "m"}]}
    )
    check = check_identity("llama-server", identity, GPU_DEPLOYMENT)
    assert check.ok
    assert "Q4_K - Medium" in check.message


@pytest.mark.parametrize(
    ("path", "served"), [("/opt/r/model/m.Q8_0.gguf", "m"), ("/opt/r/model/m.Q4_K_M.gguf", "other")]
)
def test_an_engine_that_runs_something_else_fails(path: str, served: str) -> None:
    identity = engine_identity({"model_path": path}, {"data": [{"id": served}]})
    check = check_identity("llama-server", identity, GPU_DEPLOYMENT)
    assert (check.ok, check.code) == (False, "wrong_model")


@pytest.mark.parametrize(
    ("root", "ok"),
    [
        ("/var/lib/fleetfit/models/m/BF16", True),
        ("/var/lib/fleetfit/models/m/AWQ", False),
        ("/opt/fleetfit/vllm/releases/0/model", True),  # a release from before the directory was named
    ],
)
def test_vllms_api_names_the_variant_by_its_models_directory(root: str, ok: bool) -> None:
    deployment = {"engine": "vllm", "variant": "BF16", "served_model_name": "m", "settings": {}}
    identity = engine_identity(None, {"data": [{"id": "m", "root": root}]})
    check = check_identity("vllm", identity, deployment)
    assert check.ok is ok
    assert root.rpartition("/")[2] in check.message


def test_addresses_are_read_from_the_kernels_tables() -> None:
    v4 = "head\n 0: 0100007F:0BB8 00000000:0000 0A 0\n 1: 00000000:0016 00000000:0000 0A 0\n"
    v6 = f"head\n 0: {'0' * 24}01000000:0BB8 x 0A 0\n 1: {'0' * 32}:0BB8 x 01 0\n"
    assert listening_addresses(3000, [v4, v6]) == ["127.0.0.1", "::1"]
    assert listening_addresses(22, [v4, v6]) == ["0.0.0.0"]


@pytest.mark.parametrize(
    ("addresses", "ok"), [(["127.0.0.1", "::1"], True), (["0.0.0.0"], False), (["127.0.0.1", "::"], False)]
)
def test_a_port_open_to_the_network_fails(addresses: list[str], ok: bool) -> None:
    assert check_listeners("open-webui", 3000, addresses).ok is ok


def test_a_failure_shows_the_last_journal_lines_and_what_to_do() -> None:
    check = failed("llama-server", "answers", "out_of_memory", "it died", [f"line {n}" for n in range(20)])
    text = sentence("edge-1", {"state": "failed", "checks": [vars(check)]})
    assert "edge-1: llama-server" in text
    assert "line 19" in text
    assert "line 3" not in text
    assert "fleetfit_replan=true" in text


def test_every_gate_state_that_is_not_ready_has_a_remedy() -> None:
    from ansible_collections.fleetfit.llm.plugins.module_utils.gate import STATES

    assert set(STATES) - {"ready"} <= set(REMEDIES)
    for text in REMEDIES.values():
        assert "{" not in text.format(service="x")


def test_a_host_with_nothing_on_it_is_not_a_failure_of_an_engine(tmp_path: Path) -> None:
    report = verify_host(HostPaths(str(tmp_path)), Question("q", "a", 1))
    assert (report["state"], report["checks"]) == ("not_deployed", [])


def test_a_service_without_a_release_fails(tmp_path: Path) -> None:
    paths = HostPaths(str(tmp_path))
    write_section(paths.manifest(), "llama_cpp", {"units": ["llama-server.service"]})
    report = verify_host(paths, Question("q", "a", 1))
    assert report["state"] == "failed"
    assert report["checks"][0]["code"] == "not_deployed"


def test_an_engine_that_gave_way_to_another_is_not_asked(tmp_path: Path) -> None:
    paths = HostPaths(str(tmp_path))
    for section in ("llama_cpp", "vllm"):
        write_section(paths.manifest(), section, {"units": []})
    plan = {"schema_version": 1, "deployments": [{"engine": "vllm", "files": []}]}
    write_section(paths.manifest(), "plan", plan)
    report = verify_host(paths, Question("q", "a", 1))
    assert [check["service"] for check in report["checks"]] == ["vllm"]


def test_a_manifest_that_cannot_be_read_fails_with_its_reason(tmp_path: Path) -> None:
    paths = HostPaths(str(tmp_path))
    Path(paths.manifest()).parent.mkdir(parents=True)
    Path(paths.manifest()).write_text("{")
    report = verify_host(paths, Question("q", "a", 1))
    assert (report["state"], report["checks"][0]["code"]) == ("failed", "unreadable")


def event(kind: str, host: str, **result: Any) -> dict[str, Any]:
    data = {"host": host, "res": result, "resolved_action": "fleetfit.llm.verify_host"}
    return {"event": kind, "event_data": data}


OK = event("runner_on_ok", "a", report={"state": "ok", "checks": []})
BAD = event("runner_on_failed", "b", report={"state": "failed", "checks": []})
EMPTY = event("runner_on_failed", "e", report={"state": "not_deployed", "checks": []})
GONE = event("runner_on_unreachable", "c", msg="no route")
BROKEN = {
    "event": "runner_on_failed",
    "event_data": {"host": "d", "task_action": "x", "res": {"msg": "no sudo"}},
}


@pytest.mark.parametrize(
    ("events", "code"),
    [
        ([], EXIT_NOT_CHECKED),
        ([OK], EXIT_OK),
        ([OK, BAD], EXIT_FAILED),
        ([BAD, GONE], EXIT_FAILED),
        ([OK, GONE], EXIT_NOT_CHECKED),
        ([OK, BROKEN], EXIT_NOT_CHECKED),
        ([OK, EMPTY], EXIT_NOT_CHECKED),
    ],
)
def test_the_exit_code_says_failed_before_not_checked(events: list[dict[str, Any]], code: int) -> None:
    outcome = Outcome()
    for one in events:
        outcome.add_event(one)
    assert outcome.exit_code == code
    document = json.loads(json.dumps(outcome.document()))
    assert document["ok"] is (code == EXIT_OK)
    assert set(document["hosts"]) == {one["event_data"]["host"] for one in events}


def test_expected_is_a_regular_expression() -> None:
    result = CliRunner().invoke(verify, ["--expected", "("])
    assert isinstance(result.exception, FleetfitError)
    assert "--expected '(' is not a regular expression" in str(result.exception)


@pytest.mark.parametrize(
    ("proof", "text"),
    [
        (None, ""),
        ({"slots": 1, "shortened": False}, "proven: 8,180 of 8,192 tokens"),
        ({"slots": 2, "shortened": False}, "proven: 2 x 8,180 of 8,192 tokens"),
        ({"slots": 1, "shortened": True}, "proven: 8,180 of 8,192 tokens, shortened"),
    ],
)
def test_the_table_shows_the_prompt_that_proved_the_memory(proof: Any, text: str) -> None:
    tokens = {"prompt_tokens": 8180, "of_tokens": 8192}
    report = {"memory": [], "proof": {**tokens, **proof} if proof else None}
    assert memory_text(report) == text


def test_vllm_on_the_cpu_is_compared_with_the_hosts_memory() -> None:
    host = {"weights": 256 * MIB, "kv_cache": 512 * MIB, "margin": 0, "total": 800 * MIB}
    deployment = {**GPU_DEPLOYMENT, "cpu_mapping": {"host": host}}
    measured = {"vllm": {"model_bytes": 256 * MIB, "kv_bytes": 1024 * MIB, "kv_tokens": 46592}}
    (row,) = compare_memory(deployment, measured)
    assert (row["device"], row["measured"]["weights"], row["ok"]) == ("host", 256 * MIB, True)
    assert row["measured"]["kv_cache"] == 512 * MIB


# An RTX 3060 and Qwen2.5-Coder-7B in Q4_K_M: 360 GB/s allow 82 tokens/s, and somebody claims 119.
ROOFLINE = {"expected_tokens_per_s": 65.0, "roofline_tokens_per_s": 82.4}


def test_a_speed_above_the_roofline_is_called_impossible_and_fails_no_host() -> None:
    deployment = {**GPU_DEPLOYMENT, **ROOFLINE}
    check = check_speed("llama-server", deployment, 119.0)
    assert check is not None
    assert check.ok
    assert "IMPOSSIBLE" in check.message
    assert "119.0 tokens/s measured, 65.0 expected, 82.4 at most" in check.message
    assert speed_is_impossible(deployment, 119.0)
    report = {"tokens_per_s": 119.0, **ROOFLINE, "speed_is_impossible": True}
    assert speed_text(report) == "119 of 65 (impossible: at most 82)"


@pytest.mark.parametrize("measured", [12.0, 65.0, 82.4, 86.0])
def test_a_speed_within_the_roofline_is_compared_alone(measured: float) -> None:
    deployment = {**GPU_DEPLOYMENT, **ROOFLINE}
    check = check_speed("llama-server", deployment, measured)
    assert check is not None
    assert check.ok
    assert "IMPOSSIBLE" not in check.message
    assert not speed_is_impossible(deployment, measured)


def test_an_assumed_bandwidth_makes_nothing_impossible() -> None:
    """The RAM of a host that nobody measured is two channels in the plan; a server has eight."""
    deployment = {
        **GPU_DEPLOYMENT,
        **ROOFLINE,
        "sources": {"ram_bandwidth": "assumed: two channels of DDR4-3200"},
    }
    assert not speed_is_impossible(deployment, 119.0)
    check = check_speed("llama-server", deployment, 119.0)
    assert check is not None
    assert "assumed: two channels" in check.message


def test_a_simulated_card_has_no_speed_to_compare() -> None:
    deployment = {**GPU_DEPLOYMENT, **ROOFLINE, "cpu_mapping": {"settings": {}}}
    assert check_speed("llama-server", deployment, 119.0) is None
    assert not speed_is_impossible(deployment, 119.0)
    assert check_speed("llama-server", GPU_DEPLOYMENT, 119.0) is None
