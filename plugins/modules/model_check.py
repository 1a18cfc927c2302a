#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: refuse a model directory that holds pickled weights or code."""

from __future__ import annotations

DOCUMENTATION = r"""
module: model_check
short_description: Refuse a model directory that holds pickled weights or code
version_added: "0.1.0"
description:
  - Looks at every file of a model's directory, also at those that no plan names, since an engine is given the
    directory. Pickled weights, Python files and a configuration with C(auto_map) are refused unless waived.
options:
  directory:
    description: The model's directory. In check mode it may be missing.
    type: path
    required: true
  model:
    description: The model's name, for messages.
    type: str
    required: true
  waivers:
    description: What the catalog's variant waives.
    type: list
    elements: str
    choices: [pickle_weights, remote_code]
    default: []
attributes:
  check_mode:
    support: full
    description: Changes nothing at all.
  diff_mode:
    support: none
    description: There is no text to compare.
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
- name: Refuse pickled weights and code
  fleetfit.llm.model_check:
    directory: /var/lib/fleetfit/models/smollm2-135m-instruct/BF16
    model: smollm2-135m-instruct
"""

RETURN = r"""
checked:
  description: The files that were looked at.
  returned: success
  type: list
  elements: str
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.model_files import check_directory


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "model": {"type": "str", "required": True},
            "waivers": {
                "type": "list",
                "elements": "str",
                "choices": ["pickle_weights", "remote_code"],
                "default": [],
            },
        },
        supports_check_mode=True,
    )
    directory = module.params["directory"]
    if module.check_mode and not os.path.isdir(directory):
        module.exit_json(changed=False, checked=[])
    try:
        checked = check_directory(directory, module.params["waivers"], model=module.params["model"])
    except FleetfitError as error:
        module.fail_json(msg=str(error), code=error.code, remedy=error.remedy)
    module.exit_json(changed=False, checked=checked)


if __name__ == "__main__":
    main()
