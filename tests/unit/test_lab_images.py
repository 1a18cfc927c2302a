"""Promises of lab.images: hosts come from the machine's own Debian archive, and a changed recipe is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

from fleetfit.lab import images
from fleetfit.lab.images import AptSource, parse_sources, recipe_key, sources_for_suite

TARGETS = """http://archive.example/debian/ bookworm main
http://archive.example/debian bookworm main
http://archive.example/debian bookworm contrib
http://archive.example/debian bookworm-updates main
http://archive.example/debian-security bookworm-security main
https://packages.example/apt cloud-sdk-bookworm main
https://other.example/repo bookworm stable
https://node.example/20 nodistro main
"""


def test_only_debians_own_archive_is_taken_for_another_suite() -> None:
    found = sources_for_suite(parse_sources(TARGETS), "bookworm", "trixie")
    assert [source.line() for source in found] == [
        "deb http://archive.example/debian trixie main",
        "deb http://archive.example/debian trixie-updates main",
        "deb http://archive.example/debian-security trixie-security main",
    ]


def test_other_components_come_from_where_main_comes_from() -> None:
    found = sources_for_suite(parse_sources(TARGETS), "bookworm", "bookworm", ("main", "contrib", "non-free"))
    assert [source.line() for source in found][:3] == [
        "deb http://archive.example/debian bookworm main",
        "deb http://archive.example/debian bookworm contrib",
        "deb http://archive.example/debian bookworm non-free",
    ]
    assert len(found) == 9


def test_a_machine_of_another_distribution_has_none() -> None:
    assert sources_for_suite(parse_sources(TARGETS), "jammy", "trixie") == []


def test_a_mirror_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETFIT_DEBIAN_MIRROR", "http://mirror.example/debian/")
    assert images.find_sources("trixie")[0] == AptSource("http://mirror.example/debian", "trixie", "main")


def test_the_key_changes_with_the_recipe_and_with_nothing_else() -> None:
    recipe = {"suite": "trixie", "packages": ["dbus"], "hooks": []}
    assert recipe_key(recipe) == recipe_key(dict(reversed(recipe.items())))
    assert recipe_key(recipe) != recipe_key({**recipe, "packages": ["dbus", "curl"]})


def test_an_unknown_image_names_those_that_exist() -> None:
    with pytest.raises(FleetfitError, match="bookworm, trixie"):
        images.image_name("sid")


def test_recipes_name_no_package_archive() -> None:
    text = (Path(__file__).parents[2] / "lab/images.yml").read_text()
    assert "://" not in text
