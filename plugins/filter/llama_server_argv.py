"""Filter: the command line of llama-server, rendered from typed settings."""

from __future__ import annotations

DOCUMENTATION = r"""
name: llama_server_argv
short_description: The command line of llama-server, rendered from typed settings
version_added: 0.1.0
description:
  - Renders a plan's engine settings as arguments. The plan carries settings, never a command line.
options:
  _input:
    description: The settings of a deployment whose engine is llama_cpp.
    type: dict
    required: true
  binary:
    description: The program.
    type: str
    required: true
  model_path:
    description: The model file.
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
  api_key_file:
    description: The file that holds the key.
    type: str
    required: true
  chat_template_file:
    description: The chat template; none for the one in the model file.
    type: str
  alias:
    description: The name under which the model is served.
    type: str
    required: true
  adapters_directory:
    description: The directory with the links to the LoRA adapters; needed where the settings name some.
    type: str
    default: ""
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
argv: >-
  {{ deployment.settings | fleetfit.llm.llama_server_argv(binary='{release}/env/bin/llama-server',
  model_path='{release}/model/x.gguf', host='127.0.0.1', port=8080, api_key_file='{credentials}/api-key',
  chat_template_file=none, alias='x') }}
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
from ansible_collections.fleetfit.llm.plugins.module_utils.engine_args import llama_server_argv
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError


def _filter(
    settings: dict[str, Any],
    *,
    binary: str,
    model_path: str,
    host: str,
    port: int,
    api_key_file: str,
    alias: str,
    chat_template_file: str | None = None,
    adapters_directory: str = "",
) -> list[str]:
    try:
        return llama_server_argv(
            settings,
            binary=binary,
            model_path=model_path,
            host=host,
            port=int(port),
            api_key_file=api_key_file,
            chat_template_file=chat_template_file,
            alias=alias,
            adapters_directory=adapters_directory,
        )
    except FleetfitError as error:
        raise AnsibleFilterError(str(error)) from error


class FilterModule:
    """The collection's filter."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"llama_server_argv": _filter}
