"""Filter: the artifacts of a plan's deployment."""

from __future__ import annotations

DOCUMENTATION = r"""
name: model_artifacts
short_description: The artifacts of a plan's deployment
version_added: 0.1.0
description:
  - Turns one deployment of a plan into the list that M(fleetfit.llm.artifact) takes, with the sources to
    try in order. A model that is not pinned is refused.
options:
  _input:
    description: A deployment of the plan.
    type: dict
    required: true
  sources:
    description: Bases tried before the hub; below each, a file is C(<model>/<variant>/<name>).
    type: list
    elements: dict
    required: true
  hub:
    description: Whether the model's hub is tried last.
    type: bool
    required: true
  endpoint:
    description: The hub's address, or a mirror's.
    type: str
    required: true
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
artifacts: "{{ deployment | fleetfit.llm.model_artifacts(sources=[], hub=true, endpoint='http://mirror') }}"
"""

RETURN = r"""
_value:
  description: A list for the option O(fleetfit.llm.artifact#module:artifacts).
  type: list
  elements: dict
"""

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.model_store import model_artifacts


def _filter(
    deployment: dict[str, Any], *, sources: list[Any], hub: bool, endpoint: str
) -> list[dict[str, Any]]:
    try:
        return model_artifacts(deployment, sources=sources, hub=hub, endpoint=endpoint)
    except FleetfitError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """The collection's filter."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"model_artifacts": _filter}
