"""Entries, overlays and pins become one catalog; a mistake names the file and the place in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
import yaml
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.selection import layout_of
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import (
    CATALOG_DIR,
    load_catalog,
    near_names,
)

LAB = "smollm2-135m-instruct"


def overlay(**changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "extends": LAB,
        "variants": [
            {
                "name": "Q8_0",
                "format": "gguf",
                "engines": ["llama_cpp"],
                "scheme": "Q8_0",
                "label": "re-quantized from Q4_1",
                "repository": "lab/model",
                "revision": "0" * 40,
                "files": [{"name": "a.gguf", "size": 5, "sha256": "a" * 64}],
            }
        ],
        **changes,
    }


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def refused(directory: Path) -> FleetfitError:
    with pytest.raises(FleetfitError) as caught:
        load_catalog([directory])
    return caught.value


def test_the_shipped_catalog() -> None:
    found = load_catalog()
    sizes = ["0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b"]
    assert {f"qwen2.5-{size}-instruct" for size in sizes} | {LAB} <= set(found.entries)
    for size in sizes:
        names = {item.name for item in found.entry(f"qwen2.5-{size}-instruct").variants}
        assert {"BF16", "GPTQ-Int4", "GPTQ-Int8", "AWQ", "F16", "Q8_0", "Q4_K_M", "Q2_K"} <= names
        assert not any(item.pinned for item in found.entry(f"qwen2.5-{size}-instruct").variants)
    variant = found.entry(LAB).variant("Q4_1")
    assert variant.pinned
    # The pinned file's size is the tensors that its shape and scheme give, and its header.
    layout = layout_of(found.entry(LAB), variant)
    assert layout.tensor_bytes == 96576768
    assert variant.files[0].size == 98362432


def test_only_licences_that_need_it_are_asked_for() -> None:
    entries = load_catalog().entries.items()
    needs = {name: entry.licence for name, entry in entries if entry.licence_needs_acceptance}
    wanted = {"qwen2.5-3b-instruct": "qwen-research", "qwen2.5-72b-instruct": "qwen"}
    wanted |= {name: name[:5] for name, _ in entries if name.startswith("gemma-")}
    wanted |= {name: f"llama{name[6:9]}" for name, _ in entries if name.startswith("llama-")}
    assert needs == wanted


def test_an_overlay_adds_and_replaces_variants(tmp_path: Path) -> None:
    write(tmp_path / "lab.yml", overlay())
    entry = load_catalog([tmp_path]).entry(LAB)
    assert [item.name for item in entry.variants] == ["Q4_1", "Q8_0"]
    assert entry.variant("Q8_0").label == "re-quantized from Q4_1"
    assert str(tmp_path / "lab.yml") in entry.origin
    assert [item.name for item in load_catalog().entry(LAB).variants] == ["Q4_1"]
    changed = overlay()
    changed["variants"][0]["name"] = "Q4_1"
    write(tmp_path / "lab.yml", changed)
    assert load_catalog([tmp_path]).entry(LAB).variant("Q4_1").scheme == "Q8_0"


def test_pins_of_the_same_repository_are_merged_and_others_refused(tmp_path: Path) -> None:
    model = "qwen2.5-0.5b-instruct"
    pins = {
        "schema_version": 1,
        "id": model,
        "variants": {
            "Q8_0": {
                "repository": "Qwen/Qwen2.5-0.5B-Instruct-GGUF",
                "revision": "b" * 40,
                "files": [{"name": "x.gguf", "size": 9, "sha256": "b" * 64}],
            }
        },
    }
    write(tmp_path / "pins" / f"{model}.yml", pins)
    variant = load_catalog([tmp_path]).entry(model).variant("Q8_0")
    assert variant.pinned
    assert variant.model_file == "x.gguf"
    pins["variants"]["Q8_0"]["repository"] = "other/model"  # type: ignore[index]
    write(tmp_path / "pins" / f"{model}.yml", pins)
    assert refused(tmp_path).code == "bad_catalog_pins"


def test_a_template_beside_the_entry_is_read(tmp_path: Path) -> None:
    write(tmp_path / "lab.yml", overlay(chat={"template_file": "own.jinja"}))
    write(tmp_path / "own.jinja", "{{ messages }}")
    assert load_catalog([tmp_path]).entry(LAB).chat_template == "{{ messages }}"
    (tmp_path / "own.jinja").unlink()
    assert refused(tmp_path).code == "chat_template_missing"


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"schema_version": 2}, "catalog_schema_version", "schema_version 2"),
        ({"extends": "smollm2-135m-instruc"}, "unknown_model", LAB),
        ({"variants": [{"name": "Q8_0"}]}, "schema_mismatch", "variants.0"),
        ({"surprise": 1}, "schema_mismatch", "surprise"),
        ({"variants": "nothing"}, "schema_mismatch", "variants"),
        ({"extends": 5}, "schema_mismatch", "extends"),
        ({"extended_context_tokens": 4096}, "bad_catalog_entry", "below the native"),
        ({"extended_context_tokens": 16384}, "bad_catalog_entry", "rope_scaling"),
        (
            {"variants": [{**overlay()["variants"][0], "files": [{"name": "a.gguf", "size": 5}]}]},
            "bad_catalog_entry",
            "without the other",
        ),
        (
            {
                "variants": [
                    {
                        **overlay()["variants"][0],
                        "files": [{"name": "../../etc/x", "size": 5, "sha256": "a" * 64}],
                    }
                ]
            },
            "bad_catalog_entry",
            "leaves the model's directory",
        ),
    ],
)
def test_a_mistake_names_the_file_and_the_place(
    tmp_path: Path, change: dict[str, Any], code: str, says: str
) -> None:
    path = write(tmp_path / "lab.yml", overlay(**change))
    error = refused(tmp_path)
    assert error.code == code
    assert says in str(error)
    assert str(path) in str(error)


def test_yaml_that_is_none_and_a_directory_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "lab.yml", "a: [")
    error = refused(tmp_path)
    assert error.code == "bad_yaml"
    assert str(path) in str(error)
    assert refused(tmp_path / "nowhere").code == "catalog_dir_missing"


@pytest.mark.parametrize("kind", ["no text", "a folder", "a link to nothing"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "lab.yml"
    if kind == "no text":
        path.write_bytes(b"\xff\xfe\0")
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/nonexistent/lab.yml")
    error = refused(tmp_path)
    assert error.code == ("bad_yaml" if kind == "no text" else "file_unreadable")
    assert str(path) in str(error)
    assert error.remedy


def test_an_entry_of_ones_own_hears_what_it_lacks_and_not_what_an_overlay_would(tmp_path: Path) -> None:
    write(tmp_path / "own.yml", {"schema_version": 1, "id": "own-model", "variants": []})
    said = str(refused(tmp_path))
    assert "extends" not in said
    assert "'family' is a required property" in said


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("qwen2.5-7b", "qwen2.5-7b-instruct"),
        ("Qwen/Qwen2.5-14B-Instruct", "qwen2.5-14b-instruct"),
        ("smollm2", LAB),
    ],
)
def test_near_names_are_offered(name: str, near: str) -> None:
    with pytest.raises(FleetfitError, match="Did you mean") as caught:
        load_catalog().entry(name)
    assert near in str(caught.value)
    assert near_names("zzzzzz", load_catalog().entries) == []


@pytest.mark.parametrize("name", ["qwen2.5-instruct.jinja", "smollm2-instruct.jinja"])
@pytest.mark.parametrize("blocks", [False, True])
def test_the_chat_templates_write_chatml(name: str, blocks: bool) -> None:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=blocks, lstrip_blocks=blocks)
    template = environment.from_string((CATALOG_DIR / "templates" / name).read_text())
    tools = [{"type": "function", "function": {"name": "weather"}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    text = template.render(
        messages=[
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "sunny"},
            {"role": "tool", "content": "warm"},
        ],
        tools=tools,
        add_generation_prompt=True,
    )
    head, _, rest = text.partition("<|im_end|>\n")
    assert head.startswith("<|im_start|>system\nBe short.\n\n# Tools\n\n")
    assert "<tools>\n{" in head
    assert "}\n</tools>\n" in head
    assert rest == (
        "<|im_start|>user\nWeather?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nwarm\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = template.render(messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert plain.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert "Tools" not in plain
