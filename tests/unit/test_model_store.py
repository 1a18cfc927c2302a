"""Promises of module_utils.model_store: unpinned models are refused, what is served is never deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.model_store import (
    MODELS,
    adapter_directories,
    model_artifacts,
    remove_variants,
    unreferenced_variants,
)

HUB = "http://hub"


def deployment(**changes: Any) -> dict[str, Any]:
    file = {"name": "x.gguf", "size": 7, "sha256": "a" * 64}
    return {"model": "m", "variant": "Q4", "repository": "o/n", "revision": "c0", "files": [file], **changes}


def test_own_sources_come_before_the_hub() -> None:
    sources = [
        {"type": "http", "url": "http://mirror/models/"},
        {"type": "file", "path": "/srv/models", "location": "host"},
    ]
    (artifact,) = model_artifacts(deployment(), sources=sources, hub=True, endpoint=HUB)
    assert artifact["dest"] == f"{MODELS}/m/Q4/x.gguf"
    assert artifact["sources"] == [
        {"type": "http", "url": "http://mirror/models/m/Q4/x.gguf"},
        {"type": "file", "path": "/srv/models/m/Q4/x.gguf", "location": "host"},
        {"type": "hub", "repository": "o/n", "revision": "c0", "filename": "x.gguf", "endpoint": HUB},
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"files": [{"name": "x.gguf", "size": 7, "sha256": None}]},
        {"files": [{"name": "x.gguf", "size": None, "sha256": "a"}]},
        {"files": []},
        {"revision": None},
    ],
)
def test_unpinned_model_is_refused_and_the_command_named(changes: dict[str, Any]) -> None:
    with pytest.raises(FleetfitError, match="fleetfit catalog pin m") as caught:
        model_artifacts(deployment(**changes), sources=[], hub=True, endpoint=HUB)
    assert caught.value.code == "model_not_pinned"


def test_a_model_of_no_repository_comes_from_own_sources_alone() -> None:
    """Its files are pinned by their own checksums (`fleetfit catalog add FILE.gguf`)."""
    local = deployment(repository=None, revision=None)
    sources = [{"type": "http", "url": "http://mirror/models"}]
    (artifact,) = model_artifacts(local, sources=sources, hub=True, endpoint=HUB)
    assert artifact["sources"] == [{"type": "http", "url": "http://mirror/models/m/Q4/x.gguf"}]
    with pytest.raises(FleetfitError, match="model_store_sources: it has no repository") as caught:
        model_artifacts(local, sources=[], hub=True, endpoint=HUB)
    assert caught.value.code == "no_source"


def test_no_source_at_all_is_told() -> None:
    with pytest.raises(FleetfitError, match="model_store_sources"):
        model_artifacts(deployment(), sources=[], hub=False, endpoint=HUB)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    for variant in ("a/Q4", "a/Q8", "b/F16"):
        (tmp_path / MODELS[1:] / variant).mkdir(parents=True)
        (tmp_path / MODELS[1:] / variant / "x.gguf").write_text("x")
    release = tmp_path / "opt/fleetfit/llama-server/releases/0123"
    release.mkdir(parents=True)
    (release / "model").symlink_to(f"{MODELS}/a/Q4")
    return tmp_path


def test_what_a_release_links_to_stays(host: Path) -> None:
    assert unreferenced_variants([], str(host)) == [f"{MODELS}/a/Q8", f"{MODELS}/b/F16"]


def test_what_the_plan_names_stays(host: Path) -> None:
    assert unreferenced_variants([f"{MODELS}/b/F16"], str(host)) == [f"{MODELS}/a/Q8"]


def test_removal_takes_an_emptied_model_along(host: Path) -> None:
    remove_variants(unreferenced_variants([], str(host)), str(host))
    assert sorted(str(p.relative_to(host / MODELS[1:])) for p in (host / MODELS[1:]).rglob("*")) == [
        "a",
        "a/Q4",
        "a/Q4/x.gguf",
    ]


@pytest.mark.parametrize("path", ["/etc", MODELS, f"{MODELS}/a", f"{MODELS}/a/../../../../etc"])
def test_no_other_path_is_ever_deleted(host: Path, path: str) -> None:
    with pytest.raises(FleetfitError, match="is not deleted"):
        remove_variants([path], str(host))


ADAPTER = {
    "name": "tone",
    "directory": "adapter-tone-0123456789abcdef",
    "files": [{"name": "tone.gguf", "size": 3, "sha256": "b" * 64}],
    "source": {"type": "http", "url": "http://models/tone"},
}


def test_adapters_are_brought_beside_the_model_from_their_own_source() -> None:
    wanted = deployment(adapters=[ADAPTER])
    sources = [{"type": "http", "url": "http://mirror"}]
    _, artifact = model_artifacts(wanted, sources=sources, hub=True, endpoint=HUB)
    assert artifact["dest"] == f"{MODELS}/m/adapter-tone-0123456789abcdef/tone.gguf"
    assert artifact["sha256"] == "b" * 64
    assert artifact["sources"] == [
        {"type": "http", "url": "http://mirror/m/adapter-tone-0123456789abcdef/tone.gguf"},
        {"type": "http", "url": "http://models/tone/tone.gguf"},
    ]


def test_an_adapter_on_a_hub_that_is_not_asked_has_no_source() -> None:
    hub = {**ADAPTER, "source": {"type": "hub", "repository": "o/tone", "revision": "c1"}}
    sources = [{"type": "http", "url": "http://mirror"}]
    wanted = deployment(adapters=[hub])
    _, artifact = model_artifacts(wanted, sources=[], hub=True, endpoint=HUB)
    assert artifact["sources"][0]["repository"] == "o/tone"
    assert len(model_artifacts(wanted, sources=sources, hub=False, endpoint=HUB)[1]["sources"]) == 1


def test_an_adapter_stays_as_long_as_a_release_links_to_it(tmp_path: Path) -> None:
    links = adapter_directories(deployment(adapters=[ADAPTER]))
    assert links == {"adapter-tone": f"{MODELS}/m/{ADAPTER['directory']}"}
    old = f"{MODELS}/m/adapter-tone-fedcba9876543210"
    for path in (*links.values(), old):
        (tmp_path / path.lstrip("/")).mkdir(parents=True)
    release = tmp_path / "opt/fleetfit/llama-server/releases/r1"
    release.mkdir(parents=True)
    (release / "adapter-tone").symlink_to(old)
    assert unreferenced_variants([], root=str(tmp_path)) == list(links.values())
    assert unreferenced_variants(list(links.values()), root=str(tmp_path)) == []
