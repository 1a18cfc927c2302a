#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: replace one section of the host's manifest."""

from __future__ import annotations

DOCUMENTATION = r"""
module: manifest_section
short_description: Record what a role manages on a host
version_added: "0.1.0"
description:
  - Replaces one section of C(/etc/fleetfit/manifest.json) whole and atomically. The file has mode 0600 and
    belongs to root.
  - Drift, rollback and decommissioning read it, so a role calls this at its end with all that it manages.
author:
  - fleetfit contributors (@fleetfit)
options:
  name:
    description: The section, which is the role's name.
    type: str
    required: true
  content:
    description:
      - What the role manages. C(paths), C(units) and C(users) are lists of strings; other keys are free.
      - Required with O(state=present).
    type: dict
  state:
    description: Whether the section is there.
    type: str
    choices: [present, absent]
    default: present
  path:
    description: The manifest.
    type: path
    default: /etc/fleetfit/manifest.json
attributes:
  check_mode:
    support: full
    description: Reports what would change.
  diff_mode:
    support: full
    description: Shows the section before and after.
"""

EXAMPLES = r"""
- name: The manifest says what this role manages
  fleetfit.llm.manifest_section:
    name: llama_cpp
    content:
      paths: [/opt/fleetfit/llama-server, /etc/systemd/system/llama-server.service]
      units: [llama-server.service]
      users: [fleetfit-llama]
      release: 0f3c1d2e4b5a6978

- name: The manifest no longer mentions this role
  fleetfit.llm.manifest_section:
    name: llama_cpp
    state: absent
"""

RETURN = r"""
previous:
  description: The section as it was, null where there was none.
  returned: always
  type: dict
"""

import json

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.manifest import (
    MANIFEST_PATH,
    read_manifest,
    write_section,
)


def main():
    """Replace the section, or say why that is not possible."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "content": {"type": "dict"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "path": {"type": "path", "default": MANIFEST_PATH},
        },
        required_if=[("state", "present", ["content"])],
        supports_check_mode=True,
    )
    name, path = module.params["name"], module.params["path"]
    content = module.params["content"] if module.params["state"] == "present" else None
    try:
        before = (read_manifest(path) or {"sections": {}})["sections"].get(name)
        changed = write_section(path, name, content, check_mode=module.check_mode)
    except FleetfitError as error:
        module.fail_json(msg=str(error), code=error.code, remedy=error.remedy)
    except OSError as error:
        module.fail_json(
            msg=f"The manifest {path} could not be written: {error}", code="manifest_not_written"
        )
    result = {"changed": changed, "previous": before}
    if module._diff:
        texts = [
            json.dumps(section, indent=2, sort_keys=True) + "\n" if section is not None else ""
            for section in (before, content)
        ]
        header = f"{path} section {name}"
        result["diff"] = {
            "before": texts[0],
            "after": texts[1],
            "before_header": header,
            "after_header": header,
        }
    module.exit_json(**result)


if __name__ == "__main__":
    main()
