#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: refuse LoRA adapters that are not for the model that is served."""

from __future__ import annotations

DOCUMENTATION = r"""
module: adapter_check
short_description: Refuse LoRA adapters that are not for the model that is served
version_added: "0.1.0"
description:
  - Compares the files of LoRA adapters with those of the model on the host. It reads what an adapter says of
    its model (C(base_model_name_or_path) in C(adapter_config.json); C(general.architecture) and
    C(general.base_model.0.name) in a GGUF file), and every tensor's size.
  - It runs before a release is switched, so that an adapter of another model never stops a running engine.
options:
  adapters:
    description: The C(adapters) of a plan's deployment.
    type: list
    elements: dict
    required: true
  models_directory:
    description: The directory on the host below which the model's variant and the adapters are.
    type: path
    required: true
  variant:
    description: The variant's directory in it.
    type: str
    required: true
  model_format:
    description: The format of the model's files.
    type: str
    choices: [gguf, safetensors]
    required: true
  model_files:
    description: The names of the model's files.
    type: list
    elements: str
    required: true
attributes:
  check_mode:
    support: partial
    description: Whether it can be asked in check mode.
    details: Adapters that a run would bring first are not looked at.
  diff_mode:
    support: none
    description: Changes nothing.
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
- name: Refuse adapters that are not for this model
  fleetfit.llm.adapter_check:
    adapters: "{{ deployment.adapters }}"
    models_directory: /var/lib/fleetfit/models/smollm2-135m-instruct
    variant: Q4_K_M
    model_format: gguf
    model_files: [SmolLM2-135M-Instruct.Q4_K_M.gguf]
"""

RETURN = r"""
checked:
  description: The names of the adapters that were looked at.
  returned: success
  type: list
  elements: str
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.lora import check_files


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "adapters": {"type": "list", "elements": "dict", "required": True},
            "models_directory": {"type": "path", "required": True},
            "variant": {"type": "str", "required": True},
            "model_format": {"type": "str", "choices": ["gguf", "safetensors"], "required": True},
            "model_files": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    checked = []
    model_directory = os.path.join(module.params["models_directory"], module.params["variant"])
    ggufs = sorted(name for name in module.params["model_files"] if name.endswith(".gguf"))
    for adapter in module.params["adapters"]:
        directory = os.path.join(module.params["models_directory"], adapter["directory"])
        if module.check_mode and not (os.path.isdir(directory) and os.path.isdir(model_directory)):
            continue
        try:
            check_files(
                adapter,
                directory,
                model_directory=model_directory,
                model_format=module.params["model_format"],
                model_file=ggufs[0] if ggufs else None,
            )
        except FleetfitError as error:
            module.fail_json(msg=str(error), code=error.code, remedy=error.remedy)
        checked.append(adapter["name"])
    module.exit_json(changed=False, checked=checked)


if __name__ == "__main__":
    main()
