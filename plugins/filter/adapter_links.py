"""Filter: the links of a release to a deployment's LoRA adapters."""

from __future__ import annotations

DOCUMENTATION = r"""
name: adapter_links
short_description: The links of a release to a deployment's LoRA adapters
version_added: 0.1.0
description:
  - Turns one deployment of a plan into names of links and the directories that they point to, for the option
    O(fleetfit.llm.release#module:links). While a release links to an adapter, it is not deleted.
options:
  _input:
    description: A deployment of the plan.
    type: dict
    required: true
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
links: "{{ {'model': directory} | combine(deployment | fleetfit.llm.adapter_links) }}"
"""

RETURN = r"""
_value:
  description: Names of links with the directories that they point to.
  type: dict
"""

from collections.abc import Callable
from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.model_store import adapter_directories


class FilterModule:
    """The collection's filter."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"adapter_links": adapter_directories}
