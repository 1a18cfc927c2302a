#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: hold packages back from upgrades."""

from __future__ import annotations

DOCUMENTATION = r"""
module: package_holds
short_description: Hold packages back from upgrades, or let them go
version_added: "0.1.0"
description:
  - Sets dpkg's selections of all packages in one go. Packages that are not installed are skipped.
options:
  names:
    description: The packages.
    type: list
    elements: str
    required: true
  state:
    description: Whether they are held.
    type: str
    choices: [held, unheld]
    default: held
attributes:
  check_mode:
    support: full
    description: Reports what would change.
  diff_mode:
    support: none
    description: The result lists the packages.
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
- name: No upgrade touches the driver
  fleetfit.llm.package_holds:
    names: [nvidia-kernel-dkms, libcuda1]
"""

RETURN = r"""
packages:
  description: The packages whose selection changed.
  returned: success
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.package_holds import apply, plan, selections


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "names": {"type": "list", "elements": "str", "required": True},
            "state": {"type": "str", "choices": ["held", "unheld"], "default": "held"},
        },
        supports_check_mode=True,
    )

    def run(argv, text):
        code, output, error = module.run_command(list(argv), data=text)
        return code, output or error

    names, state = module.params["names"], module.params["state"]
    try:
        changed = plan(names, state, selections(run)) if names else []
        if changed and not module.check_mode:
            apply(changed, state, run)
    except FleetfitError as error:
        module.fail_json(msg=str(error), code=error.code, remedy=error.remedy)
    module.exit_json(changed=bool(changed), packages=changed)


if __name__ == "__main__":
    main()
