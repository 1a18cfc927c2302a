"""`fleetfit catalog add` and `pin` of a hub id, against a server that the real huggingface_hub reads as the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import layout_of
from ansible_collections.fleetfit.llm.plugins.module_utils.tensor_sizes import (
    layout_from_scheme,
    safetensors_layout,
)
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_catalog
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from ..hub_server import COMMIT, TOKEN, HubServer, Large, Repo, hub_server, large, large_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.sizing import oracle as llama_oracle

BIN = Path(sys.executable).parent
SHAPE = load_catalog().entry("qwen3-0.6b").shape
CONFIG = json.dumps(
    {
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
).encode()
TOKENIZER = b'{"chat_template": "{{ messages }}"}'
CHAT = "acme/Tiny-Chat"
GGUF = "acme/Tiny-Chat-GGUF"
GATED = "acme/Gated-Chat"


def bf16_bytes(*, with_output: bool = False) -> int:
    layout = safetensors_layout(SHAPE, "BF16")
    return layout.file_bytes + (layout.token_embd if with_output else 0)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Large:
    """A GGUF with a true header and no data: 397 MB that take no space."""
    path = tmp_path_factory.mktemp("gguf") / "smallest.gguf"
    keys = {"general.file_type": 15, "general.license": "mit", "tokenizer.chat_template": "{{ messages }}"}
    llama_oracle.write_sparse_gguf(path, SHAPE, "Q4_K_M", keys)
    return large_file(path)


@pytest.fixture
def hub(smallest: Large) -> Iterator[HubServer]:
    """A hub with a model, a model of GGUF files alone, and one behind a gate."""
    with hub_server() as found:
        found.repositories[CHAT] = Repo(
            {
                "README.md": b"# Tiny-Chat",
                "config.json": CONFIG,
                "tokenizer_config.json": TOKENIZER,
                "model-00001-of-00002.safetensors": large("one", bf16_bytes() - 5000),
                "model-00002-of-00002.safetensors": large("two", 5000),
                "consolidated.safetensors": large("all of it again", bf16_bytes()),
                "original/params.json": b"{}",
            },
            licence="apache-2.0",
        )
        q8_0 = layout_from_scheme(SHAPE, "Q8_0").file_bytes
        found.repositories[GGUF] = Repo(
            {
                "Tiny-Chat-Q4_K_M.gguf": smallest,
                "Tiny-Chat-Q8_0/Tiny-Chat-Q8_0-00001-of-00002.gguf": large("first", q8_0 - 1000),
                "Tiny-Chat-Q8_0/Tiny-Chat-Q8_0-00002-of-00002.gguf": large("second", 1000),
                "Tiny-Chat-UD-Q2_K_XL.gguf": large("dynamic", 300_000_000),
                "Tiny-Chat-Q6_K.gguf": large("not what it says", 800_000_000),
                "mmproj-Tiny-Chat-f16.gguf": large("projector", 600_000_000),
            }
        )
        gated = dict(found.repositories[CHAT].files)
        found.repositories[GATED] = Repo(gated, licence="llama3.1", gated=True)
        yield found


def fleetfit(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command without what this machine's environment says of proxies and hubs."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith("HF_")
    }
    done = subprocess.run(
        [BIN / "fleetfit", *arguments],
        env={**inherited, **environ},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def client(hub: HubServer, token: str | bool = False) -> huggingface_hub.HfApi:
    """Return the real client; it may ask the server on loopback alone."""
    return huggingface_hub.HfApi(endpoint=hub.endpoint, token=token)


def test_the_server_speaks_the_hubs_api(hub: HubServer, smallest: Large, tmp_path: Path) -> None:
    """As far as the real client asks: descriptions, files, gates, names that do not exist."""
    api = client(hub)
    info = api.model_info(CHAT, files_metadata=True)
    assert info.sha == COMMIT
    assert info.gated is False
    assert info.card_data is not None
    assert info.card_data.license == "apache-2.0"
    listed = {item.rfilename: item for item in info.siblings or []}
    assert set(listed) == set(hub.repositories[CHAT].files)
    first = listed["model-00001-of-00002.safetensors"]
    assert first.lfs is not None
    assert first.lfs.size == first.size == bf16_bytes() - 5000
    assert api.list_repo_files(GGUF) == list(hub.repositories[GGUF].files)
    fetched = api.hf_hub_download(CHAT, "config.json", revision=COMMIT, local_dir=tmp_path / "got")
    assert Path(fetched).read_bytes() == CONFIG
    hub.repositories[GGUF].files["small.gguf"] = large_file(Path(fetched))
    large_one = api.hf_hub_download(GGUF, "small.gguf", local_dir=tmp_path / "got")
    assert Path(large_one).read_bytes() == CONFIG
    asked_of = huggingface_hub.get_hf_file_metadata(
        huggingface_hub.hf_hub_url(GGUF, "Tiny-Chat-Q4_K_M.gguf", endpoint=hub.endpoint)
    )
    assert (asked_of.size, asked_of.etag) == (smallest.size, smallest.sha256)
    with pytest.raises(GatedRepoError):
        api.hf_hub_download(GATED, "config.json", local_dir=tmp_path / "refused")
    assert api.model_info(GATED).gated == "manual"
    allowed = client(hub, TOKEN).hf_hub_download(GATED, "config.json", local_dir=tmp_path / "gated")
    assert Path(allowed).read_bytes() == CONFIG
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("acme/nothing")


def test_a_hub_id_is_added_pinned_checked_and_planned(hub: HubServer, tmp_path: Path) -> None:
    done = fleetfit("catalog", "add", CHAT, "--endpoint", hub.endpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    overlay = tmp_path / "fleetfit-catalog"
    entry = load_catalog([overlay]).entry("tiny-chat")
    assert entry.shape.as_dict() == {**SHAPE.as_dict(), "native_context_tokens": 40960}
    assert (entry.licence, entry.licence_needs_acceptance) == ("apache-2.0", False)
    assert entry.licence_url == f"{hub.endpoint}/{CHAT}"
    assert [item.name for item in entry.variants] == ["BF16"]
    assert "chat.template_file" not in done.stderr
    pinned = fleetfit(
        "catalog", "pin", "tiny-chat", "--catalog-dir", str(overlay), "--endpoint", hub.endpoint, cwd=tmp_path
    )
    assert pinned.returncode == 0, pinned.stderr
    # What is pinned is what the real client says of the same repository.
    info = client(hub).model_info(CHAT, files_metadata=True)
    told = {item.rfilename: item for item in info.siblings or []}
    pins = yaml.safe_load((overlay / "pins" / "tiny-chat.yml").read_text())["variants"]["BF16"]
    assert pins["revision"] == info.sha
    assert {item["name"] for item in pins["files"]} == {
        "config.json",
        "tokenizer_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    for item in pins["files"]:
        assert item["size"] == told[item["name"]].size
        lfs = told[item["name"]].lfs
        assert lfs is None or item["sha256"] == lfs.sha256
    checked = fleetfit("catalog", "check", "--catalog-dir", str(overlay), cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    options = ("--catalog-dir", str(overlay), "--gpu", "RTX 4090", "--json")
    fits = fleetfit("what-fits", "tiny-chat", *options, cwd=tmp_path)
    assert json.loads(fits.stdout)["selected"]["variant"] == "BF16"


def test_a_repository_of_gguf_files_is_read_from_the_first_bytes_of_one(
    hub: HubServer, tmp_path: Path
) -> None:
    done = fleetfit("catalog", "add", GGUF, "--endpoint", hub.endpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    entry = load_catalog([tmp_path / "fleetfit-catalog"]).entry("tiny-chat")
    assert entry.shape == SHAPE
    assert entry.licence == "mit"
    assert [item.name for item in entry.variants] == ["Q8_0", "Q4_K_M"]
    split = entry.variant("Q8_0")
    assert split.matches("Tiny-Chat-Q8_0/Tiny-Chat-Q8_0-00002-of-00002.gguf")
    assert not split.matches("Tiny-Chat-Q4_K_M.gguf")
    for text in (
        "left out: Tiny-Chat-UD-Q2_K_XL: not a scheme",
        "left out: mmproj-Tiny-Chat-f16: a projector for images",
        "left out: Tiny-Chat-Q6_K: it has 763 MiB, Q6_K gives 472 MiB",
    ):
        assert text in done.stderr
    # The weights stay where they are.
    asked = [(path, wanted) for method, path, wanted, _ in hub.asked if "/storage/" in path]
    assert [wanted for _, wanted in asked] == ["bytes=0-16777215"]
    assert hub.sent_bytes < 17 << 20
    pinned = fleetfit(
        *("catalog", "pin", "tiny-chat", "--catalog-dir", "fleetfit-catalog", "--endpoint", hub.endpoint),
        cwd=tmp_path,
    )
    assert pinned.returncode == 0, pinned.stderr
    assert "Q8_0: 2 files" in pinned.stdout
    entry = load_catalog([tmp_path / "fleetfit-catalog"]).entry("tiny-chat")
    assert all(variant.pinned for variant in entry.variants)
    assert entry.variant("Q8_0").model_file == "Tiny-Chat-Q8_0/Tiny-Chat-Q8_0-00001-of-00002.gguf"


def test_what_fits_reads_such_a_repository_too(hub: HubServer, tmp_path: Path) -> None:
    arguments = ("--gpu", "cpu", "--endpoint", hub.endpoint, "--json")
    done = fleetfit("what-fits", GGUF, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {item["variant"] for item in document["candidates"]} == {"Q8_0", "Q4_K_M"}


def test_an_output_matrix_that_the_files_hold_twice_is_seen(hub: HubServer, tmp_path: Path) -> None:
    files = hub.repositories[CHAT].files
    files["model-00001-of-00002.safetensors"] = large("one", bf16_bytes(with_output=True) - 5000)
    done = fleetfit("catalog", "add", CHAT, "--endpoint", hub.endpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    entry = load_catalog([tmp_path / "fleetfit-catalog"]).entry("tiny-chat")
    assert entry.variant("BF16").stored_output
    assert layout_of(entry, entry.variant("BF16")).file_bytes == bf16_bytes(with_output=True)


@pytest.mark.parametrize("token", [None, "hf_of_an_account_that_did_not_accept"])
@pytest.mark.parametrize("command", ["add", "what-fits", "pin"])
def test_a_gate_is_a_sentence_that_names_the_licences_page(
    hub: HubServer, tmp_path: Path, command: str, token: str | None
) -> None:
    overlay = tmp_path / "overlay"
    at = ("--endpoint", hub.endpoint)
    if command == "pin":
        says = ("--id", "gated", "--output-dir", str(overlay))
        added = fleetfit("catalog", "add", GATED, *at, *says, cwd=tmp_path, HF_TOKEN=TOKEN)
        assert added.returncode == 0, added.stderr
        entry = load_catalog([overlay]).entry("gated")
        assert (entry.licence, entry.licence_needs_acceptance) == ("llama3.1", True)
    arguments = {
        "add": ("catalog", "add", GATED, *at, "--output-dir", str(overlay)),
        "what-fits": ("what-fits", GATED, "--gpu", "RTX 4090", *at),
        "pin": ("catalog", "pin", "gated", "--catalog-dir", str(overlay), *at),
    }[command]
    done = fleetfit(*arguments, cwd=tmp_path, **({"HF_TOKEN": token} if token else {}))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"refuses {GATED} (HTTP {401 if token is None else 403})" in done.stderr
    assert "it is gated, and its licence was not accepted" in done.stderr
    assert f"Accept the licence on {hub.endpoint}/{GATED} and set HF_TOKEN" in done.stderr
    assert "hf_of_an_account" not in done.stderr
    assert not list(overlay.rglob("pins/*"))
    if command == "add":
        assert not overlay.exists()


def _nothing(hub: HubServer) -> str:
    hub.repositories[CHAT] = Repo({"README.md": b"x"})
    return CHAT


def _unknown_architecture(hub: HubServer) -> str:
    hub.repositories[CHAT].files["config.json"] = CONFIG.replace(b"qwen3", b"mamba2")
    return CHAT


def _multimodal(hub: HubServer) -> str:
    hub.repositories[CHAT].files["config.json"] = CONFIG[:-1] + b', "vision_config": {}}'
    return CHAT


def _missing_field(hub: HubServer) -> str:
    hub.repositories[CHAT].files["config.json"] = CONFIG.replace(b'"vocab_size"', b'"vocabulary"')
    return CHAT


def _page(hub: HubServer) -> str:
    hub.repositories[CHAT].files["config.json"] = b"<!DOCTYPE html><p>Blocked by your organisation.</p>"
    return CHAT


def _other_weights(hub: HubServer) -> str:
    hub.repositories[CHAT].files["model-00002-of-00002.safetensors"] = large("two", 7 << 30)
    return CHAT


def _no_such(hub: HubServer) -> str:
    return "acme/nothing"


def _projector_alone(hub: HubServer) -> str:
    hub.repositories[GGUF] = Repo({"mmproj-model-f16.gguf": large("projector", 600_000_000)})
    return GGUF


def _cut_header(hub: HubServer) -> str:
    whole = hub.repositories[GGUF].files["Tiny-Chat-Q4_K_M.gguf"]
    assert isinstance(whole, Large)
    assert whole.path is not None
    cut = whole.path.with_name("cut.gguf")
    with whole.path.open("rb") as stream:
        cut.write_bytes(stream.read(5000))
    hub.repositories[GGUF] = Repo({"Tiny-Chat-Q4_K_M.gguf": large_file(cut)})
    return GGUF


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (_nothing, ["neither a config.json nor a GGUF"]),
        (_unknown_architecture, ["'mamba2'", "Supported: "]),
        (_multimodal, ["multimodal", f"config.json of {CHAT}"]),
        (_missing_field, ["'vocab_size'", f"config.json of {CHAT}"]),
        (_page, ["is not JSON", "proxy's page"]),
        (_other_weights, ["no weights that the catalog can describe", "gives 1.1 GiB in BF16"]),
        (_no_such, ["refuses acme/nothing (HTTP 401)", "does not exist"]),
        (_projector_alone, ["No GGUF file of", "Known schemes"]),
        (_cut_header, [f"{GGUF}: Tiny-Chat-Q4_K_M.gguf", "ends within"]),
    ],
)
def test_what_cannot_be_described_is_one_sentence(
    hub: HubServer, tmp_path: Path, prepare: Any, says: list[str]
) -> None:
    model = prepare(hub)
    done = fleetfit("catalog", "add", model, "--endpoint", hub.endpoint, cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for text in says:
        assert text in done.stderr
    assert not (tmp_path / "fleetfit-catalog").exists()


def test_a_hub_id_that_resembles_a_model_of_the_catalog_is_still_asked_of_the_hub(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.repositories["acme/Qwen3-8B-Chat"] = hub.repositories[CHAT]
    options = ("--gpu", "RTX 4090", "--json")
    done = fleetfit("what-fits", "acme/Qwen3-8B-Chat", *options, cwd=tmp_path, HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0, done.stderr
    done = fleetfit("what-fits", "acme/Qwen3-8B-Absent", *options, cwd=tmp_path, HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 2
    assert "The catalog has qwen3-30b-a3b and qwen3-8b and" in done.stderr
