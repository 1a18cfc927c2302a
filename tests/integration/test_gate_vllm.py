"""The gate before a real vLLM: the CPU build with the lab's model, as a unit on a systemd host.

A model with heads of 16 values is one that vLLM loads, says ``/health`` 200 to, and dies of at the first request.
"""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.engine_args import VLLM_SETTINGS, vllm_argv

from fleetfit.lab.layers import ensure_layer
from fleetfit.lab.model import base_file, safetensors_files

from .conftest import SystemdHost, start_host

pytestmark = pytest.mark.slow

HELPER = "/opt/fleetfit/libexec/current/fleetfit-host.pyz"
PORT = 8101
MODELS = "/var/lib/fleetfit/models/m"
KEY_FILE = "/etc/fleetfit/credentials/vllm.api-key"
CONTEXT = 1024
READY_FACTOR = 1.5
UNIT = """\
[Service]
Type=exec
ExecStart=/opt/fleetfit/vllm/current/run
LoadCredential=api-key:/etc/fleetfit/credentials/vllm.api-key
Environment=HOME=/var/tmp
Restart=always
RestartSec=5
"""
DRIVER = f"""
from fleetfit_host import switch
from fleetfit_host.manifest import HostPaths
from fleetfit_host.release import ReleaseSpec, write_release
paths = HostPaths()
written = write_release(ReleaseSpec(**json.loads(sys.argv[1])), paths)
switch.request(paths, "vllm", written.digest)
switch.launch("vllm", helper={HELPER!r})
print(json.dumps(switch.wait_end(paths, "vllm", helper={HELPER!r})))
"""
DEPLOYMENT = {
    "devices": [],
    "host": {"weights": 2**28, "kv_cache": 2**28, "compute": 0, "overhead": 0, "margin": 0}
    | {"total": 2**29, "budget": 2**32},
}


def settings(**other: Any) -> dict[str, Any]:
    """Return the settings that a plan maps to the CPU build."""
    known: dict[str, Any] = {
        **dict.fromkeys(VLLM_SETTINGS),
        "max_model_len": CONTEXT,
        "max_num_seqs": 2,
        "max_num_batched_tokens": CONTEXT,
        "kv_cache_memory_bytes": 2**28,
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "kv_cache_dtype": "auto",
        "enable_prefix_caching": True,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "lora_modules": {},
        "served_model_name": "m",
    }
    return {**known, **other}


def write_small_heads(folder: Path, config: dict[str, Any]) -> None:
    """Write a model with heads of 16 values beside its config.json; its weights are all the same."""
    width, vocabulary = 64, config["vocab_size"]
    config.update(hidden_size=width, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config.update(intermediate_size=128, num_hidden_layers=1)
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": [vocabulary, width],
        "model.norm.weight": [width],
        f"{layer}input_layernorm.weight": [width],
        f"{layer}post_attention_layernorm.weight": [width],
        f"{layer}self_attn.q_proj.weight": [64, width],
        f"{layer}self_attn.k_proj.weight": [32, width],
        f"{layer}self_attn.v_proj.weight": [32, width],
        f"{layer}self_attn.o_proj.weight": [width, 64],
        f"{layer}mlp.gate_proj.weight": [128, width],
        f"{layer}mlp.up_proj.weight": [128, width],
        f"{layer}mlp.down_proj.weight": [width, 128],
    }
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    # 0x3c24 is 0.01 in BF16.
    data = struct.pack("<Q", len(text)) + text + b"\x24\x3c" * (end // 2)
    (folder / "model.safetensors").write_bytes(data)


class Vllm:
    """The host as the tests see it."""

    def __init__(self, host: SystemdHost) -> None:
        self.host = host
        self.environment = "/opt/fleetfit/vllm/envs/" + host.run("ls", "/opt/fleetfit/vllm/envs").split()[0]

    def drive(self, model: str, **other: Any) -> dict[str, Any]:
        """Bring the service to a release and return the journal."""
        wanted = settings(**other)
        argv = vllm_argv(
            wanted,
            python="{release}/env/bin/python",
            model_path="{release}/model",
            host="127.0.0.1",
            port=PORT,
        )
        release = {
            "service": "vllm",
            "environment": self.environment,
            "links": {"model": f"{MODELS}/{model}"},
            "settings": wanted,
            "argv": argv,
            "environ": {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"},
            "environ_credentials": {"VLLM_API_KEY": "api-key"},
            "plan": {"deployments": [DEPLOYMENT]},
            "gate": {
                "kind": "vllm",
                "url": f"http://127.0.0.1:{PORT}",
                "credential": KEY_FILE,
                "model": "m",
                "timeout_s": 600,
                "proof_s": 20,
            },
        }
        journal: dict[str, Any] = self.host.python(DRIVER, json.dumps(release), timeout_s=3000)
        return journal


def put_libnuma(host: SystemdHost, folder: Path) -> None:
    """Install what the role installs from the distribution, which this host cannot reach."""
    subprocess.run(["apt-get", "download", "libnuma1"], check=True, cwd=folder, capture_output=True)
    (package,) = folder.glob("libnuma1_*.deb")
    host.put("/var/tmp/libnuma1.deb", package.read_bytes())
    host.run("dpkg", "--install", "/var/tmp/libnuma1.deb")


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """Yield a host that has vLLM's environment, the lab's model and one with small heads."""
    folder = tmp_path_factory.mktemp("vllm")
    host = start_host(folder, ensure_layer("vllm", "bookworm"))
    try:
        files = {item.path.name: item.path for item in safetensors_files(base_file())}
        small = folder / "small"
        small.mkdir()
        write_small_heads(small, json.loads(files["config.json"].read_text()))
        for name, path in files.items():
            host.put(f"{MODELS}/whole/{name}", path.read_bytes())
            source = small / name if (small / name).exists() else path
            host.put(f"{MODELS}/small/{name}", source.read_bytes())
        put_libnuma(host, folder)
        host.put(KEY_FILE, "canary-key-3456\n", "0600")
        host.put("/etc/systemd/system/vllm.service", UNIT)
        host.run("systemctl", "daemon-reload")
        yield Vllm(host)
    finally:
        host.podman("rm", "--force", "--time=0", host.name)


def test_a_real_vllm_is_proven_and_one_that_dies_at_the_first_request_is_taken_back(vllm: Vllm) -> None:
    good = vllm.drive("whole")
    assert good["state"] == "committed", (good["cause"], "\n".join(good["gate"]["log_tail"]))
    proof = good["gate"]["proof"]
    assert proof["ok"]
    assert proof["of_tokens"] == CONTEXT
    assert proof["shortened"] or proof["prompt_tokens"] > CONTEXT - 50
    assert good["gate"]["measured"]["vllm"]["kv_tokens"] >= CONTEXT

    bad = vllm.drive("small")
    assert (bad["state"], bad["cause"]["state"]) == ("reverted", "crashed")
    assert "head_dim=16" in bad["cause"]["message"]
    assert bad["revert_gate"]["answer"].startswith("The capital of France is Paris")
    at = {step["step"]: step["at"] for step in bad["steps"]}
    start_s, ready_s = bad["started_at"] - at["revert_stop"], bad["revert_gate"]["ready_s"]
    print(
        f"\nvLLM: cold start {good['gate']['ready_s']:.1f} s; {good['gate']['message']}; the broken one's verdict "
        f"came {at['revert_stop'] - at['gate']:.1f} s after its start; old release started {start_s:.1f} s after "
        f"that and ready in {ready_s:.1f} s"
    )
    assert start_s <= 5
    assert ready_s <= READY_FACTOR * good["gate"]["ready_s"]


def test_a_cache_too_small_for_the_context_shows_the_plans_terms(vllm: Vllm) -> None:
    journal = vllm.drive("whole", kv_cache_memory_bytes=8_000_000)
    assert (journal["state"], journal["cause"]["state"]) == ("reverted", "out_of_memory")
    message = journal["cause"]["message"]
    assert "KV cache is needed, which is larger than the available KV cache memory" in message
    assert "Planned for RAM: weights 256 MiB + kv_cache 256 MiB" in message
    assert "The engine logged vllm: model 256 MiB" in message
