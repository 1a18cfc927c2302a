"""Promises of lab.mirror and lab.model: what is served is whole, in a hub's layout, and described truly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import select
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import (
    available_engines,
    load_catalog,
)

from fleetfit.lab import mirror, model
from fleetfit.lab.certificates import copy_authorities
from fleetfit.lab.model import HubFile
from fleetfit.lab.paths import LabPaths
from fleetfit.lab.up import lab_definition

from .planning import cards, facts, request

ROOT = Path(__file__).parents[2]


def hub_file(folder: Path, name: str, content: bytes) -> HubFile:
    path = folder / name
    path.write_bytes(content)
    return HubFile("org/model", "a" * 40, name, path, len(content), hashlib.sha256(content).hexdigest())


def test_hub_layout_has_files_and_the_apis_answers(tmp_path: Path) -> None:
    paths = LabPaths(tmp_path)
    files = [hub_file(tmp_path, "one.gguf", b"1"), hub_file(tmp_path, "two.gguf", b"22")]
    mirror.publish_hub(paths, files)
    served = mirror.mirror_folder(paths)
    assert (served / "org/model/resolve" / ("a" * 40) / "two.gguf").read_bytes() == b"22"
    for name in ("a" * 40, "main"):
        answer = json.loads((served / "api/models/org/model/revision" / name).read_text())
        assert answer["sha"] == "a" * 40
        assert {item["rfilename"]: item["lfs"]["sha256"] for item in answer["siblings"]} == {
            item.name: item.sha256 for item in files
        }
        tree = json.loads((served / "api/models/org/model/tree" / name).read_text())
        assert [(item["path"], item["size"]) for item in tree] == [("one.gguf", 1), ("two.gguf", 2)]


def test_a_changed_file_is_served_anew(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "served/a"
    source.write_bytes(b"old")
    mirror.place(source, target)
    source.unlink()  # as tools do that write beside and rename
    source.write_bytes(b"new content")
    mirror.place(source, target)
    assert target.read_bytes() == b"new content"


def test_a_published_artifact_is_described_and_readable(tmp_path: Path) -> None:
    paths = LabPaths(tmp_path)
    source = tmp_path / "engine.tar.gz"
    source.write_bytes(b"content")
    source.chmod(0o600)
    entry = mirror.publish_file(paths, source, "ab" * 32, version="1")
    assert entry["size"] == 7
    served = mirror.mirror_folder(paths) / entry["url"].removeprefix(f"{mirror.URL}/")
    assert served.read_bytes() == b"content"
    assert served.stat().st_mode & 0o444 == 0o444  # nginx reads it as another user
    mirror.write_artifacts(paths, {"engine": entry})
    assert mirror.read_artifacts(paths) == {"engine": entry}


def test_the_overlay_extends_the_catalog_and_says_what_it_is(tmp_path: Path) -> None:
    files = {name: hub_file(tmp_path, f"{name}.gguf", name.encode()) for name in model.QUANTIZATIONS}
    names = ["config.json", "model.safetensors"]
    safetensors = [hub_file(tmp_path, name, name.encode()) for name in names]
    model.write_overlay(tmp_path / "catalog", files, safetensors)
    entry = load_catalog([tmp_path / "catalog"]).entry(model.MODEL)
    for name, file in files.items():
        variant = entry.variant(name)
        assert variant.pinned
        assert variant.files[0].sha256 == file.sha256
        assert "re-quantized from Q4_1" in variant.label
    assert entry.variant("Q4_1").repository != files["Q8_0"].repository
    for_vllm = entry.variant(model.SAFETENSORS_VARIANT)
    assert (for_vllm.engines, for_vllm.format, for_vllm.pinned) == (("vllm",), "safetensors", True)
    assert [file.name for file in for_vllm.files] == names
    assert "dequantized from Q4_1" in for_vllm.label


def test_a_simulated_rtx_4090_is_given_the_labs_safetensors_under_vllm(tmp_path: Path) -> None:
    safetensors = [hub_file(tmp_path, "model.safetensors", b"weights")]
    quantizations = {name: hub_file(tmp_path, f"{name}.gguf", name.encode()) for name in model.QUANTIZATIONS}
    model.write_overlay(tmp_path, quantizations, safetensors)
    entry = load_catalog([tmp_path]).entry(model.MODEL)
    host = facts(cards("RTX 4090"))
    asked = request(entry, host, engine="vllm", engines=("llama_cpp", "vllm"), require_pinned=True)
    best, _ = select(asked)
    assert (best.engine, best.variant.name) == ("vllm", model.SAFETENSORS_VARIANT)
    assert best.settings["dtype"] == "bfloat16"


def test_authorities_follow_the_machine(tmp_path: Path) -> None:
    machine = tmp_path / "machine"
    (machine / "site").mkdir(parents=True)
    (machine / "a.crt").write_text("A")
    (machine / "site/a.crt").write_text("B")
    (machine / "notes.txt").write_text("no certificate")
    paths = LabPaths(tmp_path)
    assert sorted(path.name for path in copy_authorities(paths, machine)) == ["a.crt", "site-a.crt"]
    (machine / "a.crt").unlink()
    copy_authorities(paths, machine)
    assert [path.name for path in (tmp_path / ".lab/ca").iterdir()] == ["site-a.crt"]
    assert copy_authorities(paths, tmp_path / "none") == []


def test_inventory_and_lab_have_the_same_hosts_and_known_profiles() -> None:
    inventory = yaml.safe_load((ROOT / "inventory/lab/hosts.yml").read_text())
    definition = lab_definition()
    assert set(inventory["all"]["children"]["llm_hosts"]["hosts"]) == set(definition["hosts"])
    assert set(definition["forwards"]) <= set(definition["hosts"])
    for entry in definition["hosts"].values():
        if entry["profile"] is not None:
            assert (ROOT / f"lab/nvml/profiles/{entry['profile']}.ini").exists()


def test_the_labs_engines_have_roles_and_the_large_card_is_vllms() -> None:
    inventory = ROOT / "inventory/lab"
    engines = {"": yaml.safe_load((inventory / "group_vars/all/model.yml").read_text())["fleetfit_engine"]}
    for path in (inventory / "host_vars").glob("*.yml"):
        engines[path.stem] = yaml.safe_load(path.read_text()).get("fleetfit_engine", engines[""])
    assert engines["gpu-large"] == "vllm"
    assert set(engines.values()) == available_engines(ROOT / "roles")


@pytest.mark.parametrize("needed", ["listen 8080", "X-Repo-Commit", "/srv/mirror"])
def test_nginx_is_set_up_for_what_the_code_expects(needed: str) -> None:
    assert needed in (ROOT / "lab/mirror/nginx.conf").read_text()
    assert mirror.URL.endswith(":8080")
