"""Filter: the source of an archive that has an address or lies on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
name: artifact_source
short_description: The source of an archive that has an address or lies on the controller
version_added: 0.1.0
description:
  - Turns an entry with C(url), or C(path) on the controller, into a source that M(fleetfit.llm.artifact) takes.
options:
  _input:
    description: The entry.
    type: dict
    required: true
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
sources: ["{{ archive | fleetfit.llm.artifact_source }}"]
"""

RETURN = r"""
_value:
  description: A source.
  type: dict
"""

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.python_runtime import source_of


def _filter(entry: dict[str, Any]) -> dict[str, Any]:
    try:
        return source_of(entry)
    except FleetfitError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """The collection's filter."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"artifact_source": _filter}
