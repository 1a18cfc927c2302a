#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: delete models that no release refers to."""

from __future__ import annotations

DOCUMENTATION = r"""
module: model_prune
short_description: Delete models that no release refers to
version_added: "0.1.0"
description:
  - Deletes the variants below C(/var/lib/fleetfit/models) that no link of a release points to, so that what
    a unit serves, and what it would be rolled back to, always stays.
options:
  keep:
    description: Further directories to keep, such as the plan's own.
    type: list
    elements: path
    default: []
attributes:
  check_mode:
    support: full
    description: Says what would be deleted.
  diff_mode:
    support: none
    description: There is no text to compare.
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
- name: Delete models that no release refers to
  fleetfit.llm.model_prune:
    keep: [/var/lib/fleetfit/models/smollm2-135m-instruct/Q4_K_M]
"""

RETURN = r"""
removed:
  description: The directories that were deleted.
  returned: success
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.model_store import (
    remove_variants,
    unreferenced_variants,
)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={"keep": {"type": "list", "elements": "path", "default": []}}, supports_check_mode=True
    )
    try:
        doomed = unreferenced_variants(module.params["keep"])
        if not module.check_mode:
            remove_variants(doomed)
    except FleetfitError as error:
        module.fail_json(msg=str(error), code=error.code, remedy=error.remedy)
    module.exit_json(changed=bool(doomed), removed=doomed)


if __name__ == "__main__":
    main()
