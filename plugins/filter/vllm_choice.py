"""Filter: which wheelhouse, Python and environment vLLM gets on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
name: vllm_choice
short_description: Which wheelhouse, Python and environment vLLM gets on a host
version_added: 0.1.0
description:
  - Chooses, from a host's stable facts and the GPUs of its plan, the build of vLLM that runs there
    (C(catalog/engines.yml)), the wheelhouse of that build, the interpreter and the path of the environment.
  - A driver or a GPU that is too old for every wheelhouse, and a wheelhouse that is missing for the variant, are
    errors that name both versions.
options:
  _input:
    description: The stable half of the host's facts.
    type: dict
    required: true
  wheelhouses:
    description: >-
      Wheelhouses as python_runtime takes them, each with C(variant) and, where it is not the newest, C(release).
    type: list
    elements: dict
    required: true
  archives:
    description: The managed archives of CPython.
    type: list
    elements: dict
    required: true
  device_uuids:
    description: The GPUs of the plan.
    type: list
    elements: str
    default: []
  on_cpu:
    description: Whether the engine runs on the CPU, as it does where the GPUs are simulated.
    type: bool
    default: false
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
choice: >-
  {{ ansible_facts.fleetfit.stable | fleetfit.llm.vllm_choice(wheelhouses=vllm_wheelhouses,
  archives=python_runtime_archives, device_uuids=deployment.device_uuids) }}
"""

RETURN = r"""
_value:
  description: >-
    The keys minor, path, archive, wheelhouse, environment and unpacked of P(fleetfit.llm.python_choice#filter), and
    C(variant) and C(release) of the build.
  type: dict
"""

from collections.abc import Callable, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.vllm_wheels import choose_vllm_environment


def _choice(
    stable: dict[str, Any],
    *,
    wheelhouses: Sequence[Any],
    archives: Sequence[Any],
    device_uuids: Sequence[str] = (),
    on_cpu: bool = False,
) -> dict[str, Any]:
    # Not above: ansible-doc reads this file where jsonschema is not installed.
    from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_catalog

    by_uuid = {item["uuid"]: item for item in stable["accelerators"]}
    try:
        absent = [uuid for uuid in device_uuids if uuid not in by_uuid]
        if absent:
            raise FleetfitError(
                f"The plan names GPUs that this host does not have: {', '.join(absent)}.",
                code="device_missing",
                remedy="Plan the host again.",
            )
        driver = stable.get("driver")
        return choose_vllm_environment(
            load_catalog().engines,
            wheelhouses,
            archives,
            system_python=stable["os"]["python"],
            arch=stable["arch"],
            glibc=stable["os"]["glibc"],
            devices=[(by_uuid[uuid]["name"], by_uuid[uuid]["compute_capability"]) for uuid in device_uuids],
            driver_version=None if driver is None else driver["version"],
            on_cpu=on_cpu,
        )
    except FleetfitError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """The collection's filter."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"vllm_choice": _choice}
