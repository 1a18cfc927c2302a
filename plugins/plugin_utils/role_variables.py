"""Names of the roles' variables, and slips of the pen among an inventory's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import yaml

from ..module_utils.errors import FleetfitError

ROLES_DIR = Path(__file__).resolve().parents[2] / "roles"
# As alike as two letters that changed places in a name of four: port and prot.
LIKENESS = 0.75


@cache
def role_variables(roles_dir: Path = ROLES_DIR) -> dict[str, frozenset[str]]:
    """Return each role's options, without the role's name before them, from its argument_specs.yml."""
    found = {}
    for path in sorted(roles_dir.glob("*/meta/argument_specs.yml")):
        role = path.parents[1].name
        specs = yaml.safe_load(path.read_text())["argument_specs"].values()
        names = {name for spec in specs for name in spec.get("options") or {}}
        found[role] = frozenset(name.removeprefix(f"{role}_") for name in names)
    return found


def check_role_variables(names: Iterable[str]) -> None:
    """Raise ``unknown_variable`` for a name that is all but one of a role's options, and would be ignored.

    A name that resembles none is the inventory's own, or a role's result, and is left alone.
    """
    for name in sorted(names):
        for role, options in role_variables().items():
            option = name.removeprefix(f"{role}_")
            if option == name or option in options:
                continue
            near = difflib.get_close_matches(option, sorted(options), n=1, cutoff=LIKENESS)
            if near:
                raise FleetfitError(
                    f"The variable {name} is not one of the role {role}'s and would be ignored.",
                    code="unknown_variable",
                    remedy=f"Write {role}_{near[0]}, or give your own variable a name that does not resemble it.",
                )
