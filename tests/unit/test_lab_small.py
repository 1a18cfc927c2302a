"""The lab's small card must lie between two quantizations, or two lab hosts would serve the same one."""

from __future__ import annotations

import configparser
from pathlib import Path

from ansible_collections.fleetfit.llm.plugins.module_utils.selection import select
from ansible_collections.fleetfit.llm.plugins.module_utils.units import MIB

from .planning import facts, lab_entry, request

PROFILE = Path(__file__).parents[2] / "lab" / "nvml" / "profiles" / "lab-small.ini"


def chosen(total_mib: int, profile: configparser.SectionProxy) -> tuple[str, bool]:
    card = {
        "uuid": profile["uuid"],
        "index": 0,
        "name": profile["name"],
        "compute_capability": profile["compute_capability"],
        "memory_total_bytes": total_mib * MIB,
        "memory_reserved_bytes": int(profile["memory_reserved_mib"]) * MIB,
        "memory_kind": "dedicated",
        "mig_enabled": False,
        "display": False,
    }
    best, _ = select(request(lab_entry(), facts([card]), engine="llama_cpp", open_webui=True))
    return best.variant.name, best.resident


def test_the_literal_is_in_the_middle_of_the_window() -> None:
    parser = configparser.ConfigParser()
    parser.read(PROFILE)
    profile = parser["gpu"]
    window = [size for size in range(1280, 2048, 2) if chosen(size, profile) == ("Q4_K_M", True)]
    assert window, "no size makes the planner choose Q4_K_M; look at the formulas"
    middle = (window[0] + window[-1]) // 2
    literal = int(profile["memory_total_mib"])
    assert abs(literal - middle) <= 2, (
        f"lab/nvml/profiles/lab-small.ini: the window is {window[0]} to {window[-1]} MiB; "
        f"set memory_total_mib = {middle}"
    )
    assert chosen(literal, profile) == ("Q4_K_M", True)
    assert chosen(24564, profile) == ("Q8_0", True)
