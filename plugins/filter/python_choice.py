"""Filter: which Python and environment a service gets on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
name: python_choice
short_description: Which Python and environment a service gets on a host
version_added: 0.1.0
description:
  - Chooses, from a host's stable facts, the system's interpreter or a managed archive; with O(service) and
    O(wheelhouses), the wheelhouse and the path of the environment too.
options:
  _input:
    description: The stable half of the host's facts.
    type: dict
    required: true
  archives:
    description: The managed archives.
    type: list
    elements: dict
    required: true
  wanted:
    description: The versions that fit, such as 3.12, the preferred one first.
    type: list
    elements: str
  service:
    description: The service whose environment it is.
    type: str
  wheelhouses:
    description: The service's wheelhouses.
    type: list
    elements: dict
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
choice: "{{ ansible_facts.fleetfit.stable | fleetfit.llm.python_choice(archives=[], wanted=['3.12']) }}"
"""

RETURN = r"""
_value:
  description: The keys minor, path and archive; for a service wheelhouse, environment and unpacked too.
  type: dict
"""

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.python_runtime import (
    choose_environment,
    choose_interpreter,
)


def _choice(
    stable: dict[str, Any],
    *,
    archives: list[Any],
    wanted: list[str] | None = None,
    service: str | None = None,
    wheelhouses: list[Any] | None = None,
) -> dict[str, Any]:
    host = {
        "system_python": stable["os"]["python"],
        "arch": stable["arch"],
        "glibc": stable["os"]["glibc"],
    }
    try:
        if service is None:
            return choose_interpreter(wanted or [], archives, **host)
        return choose_environment(service, wheelhouses or [], archives, **host)
    except FleetfitError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """The collection's filter."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"python_choice": _choice}
