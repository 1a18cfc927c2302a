"""Filter: the command line of vLLM's server, rendered from typed settings."""

from __future__ import annotations

DOCUMENTATION = r"""
name: vllm_argv
short_description: The command line of vLLM's server, rendered from typed settings
version_added: 0.1.0
description:
  - Renders a plan's engine settings as arguments. The plan carries settings, never a command line.
  - The API key is not among them. The server reads it from the environment variable C(VLLM_API_KEY).
options:
  _input:
    description: The settings of a deployment whose engine is vllm.
    type: dict
    required: true
  python:
    description: The interpreter of the environment that vLLM is installed in.
    type: str
    required: true
  model_path:
    description: The model's directory.
    type: str
    required: true
  host:
    description: The address to listen on.
    type: str
    required: true
  port:
    description: The port to listen on.
    type: int
    required: true
  served_model_name:
    description: The name under which the model is served.
    type: str
    required: true
  chat_template_file:
    description: The chat template; none for the one in the model's directory.
    type: str
  adapters_directory:
    description: The directory with the links to the LoRA adapters; needed where the settings name some.
    type: str
    default: ""
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
argv: >-
  {{ deployment.settings | fleetfit.llm.vllm_argv(python='{release}/env/bin/python', model_path='{release}/model',
  host='127.0.0.1', port=8101, served_model_name='x', chat_template_file=none) }}
"""

RETURN = r"""
_value:
  description: The arguments, the program first.
  type: list
  elements: str
"""

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.fleetfit.llm.plugins.module_utils.engine_args import vllm_argv
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError


def _filter(
    settings: dict[str, Any],
    *,
    python: str,
    model_path: str,
    host: str,
    port: int,
    served_model_name: str,
    chat_template_file: str | None = None,
    adapters_directory: str = "",
) -> list[str]:
    try:
        return vllm_argv(
            settings,
            python=python,
            model_path=model_path,
            host=host,
            port=int(port),
            served_model_name=served_model_name,
            chat_template_file=chat_template_file,
            adapters_directory=adapters_directory,
        )
    except FleetfitError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """The collection's filter."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"vllm_argv": _filter}
