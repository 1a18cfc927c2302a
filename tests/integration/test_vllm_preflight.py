"""What the role vllm and the look at a model's directory refuse before a host is touched, and how.

The hosts are facts: cards and drivers that no test host has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
CUDA = {
    "variant": "cuda",
    "python": "3.11",
    "arch": "x86_64",
    "glibc": "2.34",
    "size": GIB,
    "sha256": "e" * 64,
}
WHEELHOUSE = {**CUDA, "url": "http://nowhere/vllm.tar"}
LOOK: list[dict[str, Any]] = [
    {
        "name": "Look at a host that the facts describe",
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "tasks": [
            {
                "name": "Take facts and plan",
                "ansible.builtin.set_fact": {
                    "cacheable": True,
                    "fleetfit": "{{ given_facts }}",
                    "fleetfit_plan": "{{ given_plan }}",
                },
            },
            {
                "name": "Check the host",
                "ansible.builtin.include_role": {"name": "fleetfit.llm.vllm", "tasks_from": "preflight"},
            },
        ],
    }
]
CHECK: list[dict[str, Any]] = [
    {
        "name": "Look at a model's directory",
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "tasks": [
            {
                "name": "Refuse what could run code",
                "fleetfit.llm.model_check": {"directory": "{{ directory }}", "model": "qwen2.5-7b-instruct"},
            }
        ],
    }
]


def play(folder: Path, document: list[dict[str, Any]], **variables: Any) -> tuple[int, str]:
    """Run a play on this machine; return its exit code and its output in one line."""
    (folder / "play.yml").write_text(json.dumps(document))
    everything = {**variables, "ansible_python_interpreter": sys.executable}
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible-playbook")),
            *[str(folder / "play.yml"), "-i", "localhost,", "-e", json.dumps(everything)],
        ],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, " ".join(done.stdout.split())


def preflight(
    folder: Path, card: tuple[str, str], driver: str, *, free_bytes: int = 100 * GIB, **variables: Any
) -> tuple[int, str]:
    """Run the role's preflight for one card with a driver."""
    name, capability = card
    stable = {
        "arch": "x86_64",
        "os": {"distribution": "debian", "version": "12", "python": "3.11.2", "glibc": "2.36"},
        "driver": {"version": driver},
        "accelerators": [{"uuid": "GPU-a", "name": name, "compute_capability": capability}],
    }
    deployment = {
        "engine": "vllm",
        "model": "qwen2.5-7b-instruct",
        "variant": "AWQ",
        "cpu_mapping": None,
        "settings": {"device_uuids": ["GPU-a"]},
    }
    facts = {"stable": stable, "live": {"disk_free_bytes": {"/opt/fleetfit": free_bytes}}}
    defaults = {"vllm_wheelhouses": [WHEELHOUSE], "vllm_secrets_dir": str(folder), "vllm_port": 28101}
    plan = {"deployments": [deployment]}
    return play(folder, LOOK, given_facts=facts, given_plan=plan, **{**defaults, **variables})


RTX_4090 = ("NVIDIA GeForce RTX 4090", "8.9")
REFUSED: dict[str, tuple[tuple[str, str], str, dict[str, Any], list[str]]] = {
    "driver too old for the wheelhouse": (
        RTX_4090,
        "550.163.01",
        {},
        [
            "its driver is 550.163.01",
            "vLLM 0.33.0 for CUDA 13.0 (variant cuda) needs driver 580",
            "change the driver's branch",
        ],
    ),
    "driver too old for every build": (
        RTX_4090,
        "470.256.02",
        {},
        [
            "driver 470.256.02 is older than 525",
            "Install driver branch 580 or newer",
            "fleetfit_engine=llama_cpp",
        ],
    ),
    "compute capability too low": (
        ("Tesla P40", "6.1"),
        "580.95.05",
        {},
        ["Tesla P40 has compute capability 6.1", "needs 7.5", "fleetfit_engine=llama_cpp"],
    ),
    "disk too small for two releases": (
        RTX_4090,
        "580.95.05",
        {"free_bytes": 5 * GIB},
        ["has 5.0 GiB free", "needs 5.0 GiB beside the present one", "1.0 GiB stay free"],
    ),
    "a release with a known hole": (
        RTX_4090,
        "580.95.05",
        {"vllm_wheelhouses": [{**WHEELHOUSE, "release": "0.10.0"}]},
        ["'cuda' 0.10.0", "Known are cuda 0.33.0"],
    ),
}


def test_a_host_that_fits_passes(tmp_path: Path) -> None:
    """The refusals below are those of the values that they change."""
    code, output = preflight(tmp_path, RTX_4090, "580.95.05")
    assert code == 0, output


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_pair_is_refused_with_both_values_and_a_remedy(tmp_path: Path, case: str) -> None:
    card, driver, variables, words = REFUSED[case]
    code, output = preflight(tmp_path, card, driver, **variables)
    assert code != 0
    assert [word for word in words if word not in output] == [], output


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("pytorch_model.bin", "x", "pickle_weights"),
        ("modeling_qwen.py", "import os", "remote_code"),
        ("config.json", '{"auto_map": {"AutoModel": "modeling_qwen.Model"}}', "remote_code"),
    ],
)
def test_a_models_directory_with_pickle_or_code_is_refused(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"weights")
    assert play(tmp_path, CHECK, directory=str(directory))[0] == 0
    (directory / name).write_text(content)
    code, output = play(tmp_path, CHECK, directory=str(directory))
    assert code != 0
    for word in (name, says, "qwen2.5-7b-instruct"):
        assert word in output, output
