"""Filter: the check of a plan by llama.cpp's own accounting of memory."""

from __future__ import annotations

DOCUMENTATION = r"""
name: llama_fit_precheck
short_description: The check of a plan by llama.cpp's own accounting of memory
version_added: 0.1.0
description:
  - Makes the precheck that M(fleetfit.llm.release) runs before it stops the old engine.
options:
  _input:
    description: The settings of a deployment whose engine is llama_cpp.
    type: dict
    required: true
  devices:
    description: The plan's memory terms per GPU, in the order in which the engine sees them.
    type: list
    elements: dict
    required: true
  host:
    description: The plan's memory terms for main memory.
    type: dict
    required: true
  binary:
    description: The program llama-fit-params.
    type: str
    required: true
  model_path:
    description: The model file.
    type: str
    required: true
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
precheck: >-
  {{ deployment.settings | fleetfit.llm.llama_fit_precheck(devices=deployment.devices, host=deployment.host,
  binary='{release}/env/bin/llama-fit-params', model_path='{release}/model/x.gguf') }}
"""

RETURN = r"""
_value:
  description: A value for the option O(fleetfit.llm.release#module:precheck).
  type: dict
"""

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.llama_cpp import fit_precheck


def _filter(
    settings: dict[str, Any], *, devices: list[Any], host: dict[str, Any], binary: str, model_path: str
) -> dict[str, Any]:
    try:
        return fit_precheck(settings, devices=devices, host=host, binary=binary, model_path=model_path)
    except FleetfitError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """The collection's filter."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"llama_fit_precheck": _filter}
