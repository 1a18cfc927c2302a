"""Promises of module_utils.model_files: what could run code when it is loaded is refused, whoever put it there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.catalog_entry import entry_from_dict
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.model_files import check_directory
from ansible_collections.fleetfit.llm.plugins.module_utils.model_store import model_artifacts
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import (
    CATALOG_DIR,
    check_schema,
    read_yaml,
)

PICKLES = [
    "pytorch_model.bin",
    "model.pt",
    "consolidated.00.pth",
    "extra.pkl",
    "last.CKPT",
    "sub/training_args.bin",
]
CODE = ["modeling_own.py", "sub/configuration_own.py"]


def deployment(*names: str, waivers: tuple[str, ...] = ()) -> dict[str, Any]:
    files = [{"name": name, "size": 7, "sha256": "a" * 64} for name in ("model.safetensors", *names)]
    return {
        "model": "m",
        "variant": "BF16",
        "repository": "o/n",
        "revision": "c0",
        "files": files,
        "waivers": list(waivers),
        "adapters": [],
    }


def entry(name: str, waivers: dict[str, str]) -> Any:
    data = read_yaml(CATALOG_DIR / "models" / "smollm2-135m-instruct.yml")
    variant = {
        "name": "BF16",
        "format": "safetensors",
        "engines": ["vllm"],
        "scheme": "BF16",
        "repository": "o/n",
        "revision": "0" * 40,
        "files": [{"name": name, "size": 7, "sha256": "a" * 64}],
        **({"waivers": waivers} if waivers else {}),
    }
    data["variants"] = [variant]
    check_schema({**data, "chat": {}}, "catalog_entry", "test")
    return entry_from_dict(data, origin="mine.yml")


@pytest.mark.parametrize(("names", "waiver"), [(PICKLES, "pickle_weights"), (CODE, "remote_code")])
def test_a_catalog_and_a_plan_with_such_files_are_refused_unless_waived(
    names: list[str], waiver: str
) -> None:
    for name in names:
        for attempt in (
            lambda name=name: entry(name, {}),
            lambda name=name: model_artifacts(deployment(name), sources=[], hub=True, endpoint="http://hub"),
        ):
            with pytest.raises(FleetfitError) as caught:
                attempt()
            assert caught.value.code == "unsafe_model_file"
            assert name in caught.value.message
            assert waiver in str(caught.value.remedy)
        assert entry(name, {waiver: "read at that revision"}).variants[0].waivers == (waiver,)
        allowed = deployment(name, waivers=(waiver,))
        assert len(model_artifacts(allowed, sources=[], hub=True, endpoint="http://hub")) == 2


def test_one_waiver_does_not_stand_for_the_other() -> None:
    with pytest.raises(FleetfitError, match=r"modeling_own\.py"):
        entry("modeling_own.py", {"pickle_weights": "read"})


def test_a_waiver_needs_its_reason_and_a_known_name() -> None:
    for waivers in ({"remote_code": ""}, {"everything": "why not"}):
        with pytest.raises(FleetfitError, match="waivers"):
            entry("model.safetensors", waivers)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes(b"data")
    return tmp_path


def refusal(directory: Path, *waivers: str) -> str:
    with pytest.raises(FleetfitError) as caught:
        check_directory(str(directory), list(waivers), model="m")
    assert caught.value.code == "unsafe_model_file"
    return str(caught.value)


def test_a_directory_of_data_passes(directory: Path) -> None:
    # A word of the vocabulary is no instruction.
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"auto_map": 7}}}))
    assert len(check_directory(str(directory), [], model="m")) == 4


@pytest.mark.parametrize("name", [*PICKLES, *CODE])
def test_a_file_that_no_plan_names_is_found_in_the_directory(directory: Path, name: str) -> None:
    (directory / "sub").mkdir()
    (directory / name).write_bytes(b"")
    assert name in refusal(directory)
    waiver = "pickle_weights" if name in PICKLES else "remote_code"
    assert name in check_directory(str(directory), [waiver], model="m")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_configuration_that_names_the_repositorys_own_classes_is_refused(
    directory: Path, name: str, nested: bool
) -> None:
    content: dict[str, Any] = {"auto_map": {"AutoConfig": "other/repo--configuration_own.OwnConfig"}}
    (directory / name).write_text(json.dumps({"text_config": [content]} if nested else content))
    assert f"auto_map in {name}" in refusal(directory)
    assert refusal(directory, "pickle_weights")
    assert check_directory(str(directory), ["remote_code"], model="m")


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "\ufeff{}"])
def test_a_configuration_that_cannot_be_read_is_refused(directory: Path, content: str) -> None:
    (directory / "config.json").write_text(content)
    assert "config.json" in refusal(directory)
