"""Same inputs, same bytes: the planner under every CPython from 3.9 to 3.13 that this machine has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import (
    CATALOG_DIR,
    load_catalog,
    read_yaml,
)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "data" / "plan_bytes.py"
VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13")
MIB, GIB = 1 << 20, 1 << 30
MODELS = ("qwen2.5-0.5b-instruct", "qwen2.5-7b-instruct", "qwen2.5-14b-instruct", "smollm2-135m-instruct")


def interpreters() -> dict[str, Path]:
    """Return the CPython of each minor version that is installed with a version manager."""
    found: dict[str, Path] = {}
    for path in sorted((Path.home() / ".pyenv" / "versions").glob("3.*/bin/python")):
        minor = ".".join(path.parts[-3].split(".")[:2])
        if minor in VERSIONS and os.access(path, os.X_OK):
            found[minor] = path
    return found


def accelerator(name: str, total_mib: int, capability: str, index: int) -> dict[str, Any]:
    return {
        "uuid": f"GPU-{index}",
        "index": index,
        "name": name,
        "compute_capability": capability,
        "memory_total_bytes": total_mib * MIB,
        "memory_reserved_bytes": 400 * MIB,
        "memory_kind": "dedicated",
        "mig_enabled": False,
        "display": index == 0,
    }


def requests() -> list[dict[str, Any]]:
    """Return hosts of all kinds, some of which nothing fits, for every model and preference."""
    small = ("NVIDIA GeForce RTX 3060", 12288, "8.6")
    large = ("NVIDIA GeForce RTX 4090", 24564, "8.9")
    hosts: list[list[tuple[str, int, str]]] = [
        [],
        [small],
        [small, large],
        [large, large],
        [small] * 4,
        [("Tesla T4", 15360, "7.5")],
        [("NVIDIA H100 80GB HBM3", 81559, "9.0")],
        [("Never Heard Of", 3000, "8.0")],
    ]
    found = []
    for number, kinds in enumerate(hosts):
        facts = {
            "schema_version": 1,
            "stable": {
                "machine_id": f"{number:032x}",
                "ram_total_bytes": (4 + 20 * (number % 3)) * GIB,
                "cgroup_limit_bytes": None,
                "cpu": {"threads": 8},
                "driver": {"version": "580.95.05"} if kinds else None,
                "accelerators": [accelerator(*kind, index) for index, kind in enumerate(kinds)],
            },
            "foreign_bytes": {"GPU-0": 256 * MIB} if kinds else {},
            "problems": [],
        }
        for model in MODELS:
            for prefer in ("quality", "speed", "context"):
                variables = {
                    "fleetfit_model": model,
                    "fleetfit_prefer": prefer,
                    "fleetfit_slots": 1 + number % 3,
                    "fleetfit_min_quality_tier": "rest",
                    "fleetfit_simulated_gpus": prefer == "speed",
                }
                found.append({"facts": facts, "variables": variables, "model": model})
    return found


def plans(python: Path | str, document: Path) -> bytes:
    """Return what one interpreter plans, with hashing as that interpreter likes it."""
    done = subprocess.run(
        [python, SCRIPT, document, ROOT / "plugins"],
        env={"PATH": os.environ["PATH"], "PYTHONHASHSEED": "random", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    catalog = load_catalog()
    entries = {}
    for name in MODELS:
        entries[name] = read_yaml(CATALOG_DIR / "models" / f"{name}.yml")
        entries[name]["chat"] = {"template": catalog.entry(name).chat_template}
    path: Path = tmp_path_factory.mktemp("plans") / "requests.json"
    content = {"entries": entries, "gpus": catalog.gpus, "engines": catalog.engines, "requests": requests()}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def ours(document: Path) -> bytes:
    """Return the plans of the Python that runs the tests, which at least must be among those compared."""
    found = plans(sys.executable, document)
    lines = [json.loads(line) for line in found.splitlines()]
    assert len(lines) == len(requests())
    assert sum("deployments" in line for line in lines) > len(lines) // 2
    assert any("code" in line for line in lines)
    return found


@pytest.mark.parametrize("minor", VERSIONS)
def test_the_plans_are_the_same_bytes(minor: str, document: Path, ours: bytes) -> None:
    python = interpreters().get(minor)
    if python is None:
        if minor == f"{sys.version_info.major}.{sys.version_info.minor}":
            python = Path(sys.executable)
        else:
            pytest.skip(f"no CPython {minor} under ~/.pyenv/versions")
    theirs = plans(python, document)
    for line, (one, other) in enumerate(zip(ours.splitlines(), theirs.splitlines(), strict=True)):
        assert one == other, f"request {line} differs on {minor}"
    assert theirs == ours
