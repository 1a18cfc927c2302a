"""Cards by their PCI ids: name, generation, compute capability."""

from __future__ import annotations

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.pci_ids import _NAMES, card_generation

# What is in a card's name says which generation it is of.
SAYS = {
    "Tesla P40": "pascal",
    "GeForce GTX 10": "pascal",
    "Tesla V100": "volta",
    "GeForce GTX 16": "turing",
    "GeForce RTX 2060": "turing",
    "Tesla T4": "turing",
    "A100": "ampere",
    "GeForce RTX 3060": "ampere",
    "GeForce RTX 3090": "ampere",
    "H100": "hopper",
    "H200": "hopper",
    "GH200": "hopper",
    "Ada Generation": "ada",
    "GeForce RTX 40": "ada",
    "L40": "ada",
    "GeForce RTX 50": "blackwell",
    "Blackwell": "blackwell",
    "B200": "blackwell",
}


def test_every_card_that_has_a_name_has_the_generation_that_the_name_says() -> None:
    """The table of ranges against the table of names."""
    seen = set()
    for line in _NAMES.splitlines():
        device, name = line.split(" ", 1)
        generation, capability = card_generation(f"10de:{device}")
        assert generation, line
        assert capability, line
        for words, expected in SAYS.items():
            if f" {name}".find(f" {words}") >= 0:
                assert generation == expected, line
                seen.add(words)
    assert seen == set(SAYS)


@pytest.mark.parametrize(
    ("device", "told", "generation", "capability"),
    [
        ("10de:2342", None, "hopper", "9.0"),
        ("10de:2684", "8.9", "ada", "8.9"),
        ("10de:2e12", None, "blackwell", None),
        ("10de:2e12", "12.1", "blackwell", "12.1"),
        ("10de:ffff", None, None, None),
        ("1002:2684", None, None, None),
        ("10de:ffff", "12.0", "blackwell", "12.0"),
        ("10de:ffff", "7.5", "turing", "7.5"),
        ("10de:ffff", "7.0", "volta", "7.0"),
        ("10de:ffff", "8.7", "ampere", "8.7"),
        ("10de:13c2", None, "maxwell", None),
        ("10de:102d", None, "kepler", None),
    ],
)
def test_generation_by_id_then_by_capability(
    device: str, told: str | None, generation: str | None, capability: str | None
) -> None:
    assert card_generation(device, told) == (generation, capability)
