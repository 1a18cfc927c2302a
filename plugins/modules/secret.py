#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: a secret in a file on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: secret
short_description: Have a secret in a file on a host
version_added: "0.1.0"
description:
  - Takes the secret, in this order, from O(value), from the controller's store (C(<store_dir>/<name>)), from
    the host's own file, which the store then adopts, or generates it.
  - The file is readable by root alone. The value is in no result, diff, log or command line.
  - A secret is never generated where the controller could not keep it.
options:
  name:
    description: The secret's name in the store.
    type: str
    required: true
  path:
    description: The file on the host.
    type: path
    required: true
  value:
    description: The secret, from a variable or a vault.
    type: str
  store_dir:
    description: The controller's folder for this host's secrets; empty where the controller keeps nothing.
    type: str
    default: ""
  length:
    description: How many letters and digits a generated secret has.
    type: int
    default: 32
  step:
    description: Set by the action plugin, V(read) or V(write).
    type: str
    choices: [read, write]
attributes:
  check_mode:
    support: full
    description: Reports what would change; generates nothing.
  diff_mode:
    support: none
    description: There is nothing to show of a secret.
author:
  - fleetfit contributors (@fleetfit) (@fleetfit)
"""

EXAMPLES = r"""
- name: The engine's API key is on the host
  fleetfit.llm.secret:
    name: llama-server.api-key
    path: /etc/fleetfit/credentials/llama-server.api-key
    store_dir: "{{ inventory_dir }}/.secrets/{{ inventory_hostname }}"
"""

RETURN = r"""
path:
  description: The file on the host.
  returned: always
  type: str
origin:
  description: Where the secret came from, V(value), V(store), V(host) or V(generated).
  returned: always
  type: str
"""

import base64

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.secret import read_secret, write_secret


def main():
    """Read or write the host's file for the action plugin."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            "value": {"type": "str", "no_log": True},
            "store_dir": {"type": "str", "default": ""},
            "length": {"type": "int", "default": 32},
            "step": {"type": "str", "choices": ["read", "write"]},
        },
        supports_check_mode=True,
    )
    path = module.params["path"]
    try:
        if module.params["step"] == "read":
            found = read_secret(path)
            # Encoded, so that a debugging controller's log does not show it in clear.
            content = base64.b64encode(found.encode()).decode() if found else None
            module.exit_json(changed=False, content=content)
        if module.params["step"] != "write" or not module.params["value"]:
            module.fail_json(
                msg="The module secret works through its action plugin only.", code="no_action_plugin"
            )
        changed = write_secret(path, module.params["value"], check_mode=module.check_mode)
    except OSError as error:
        module.fail_json(msg=f"The secret file {path}: {error.strerror}.", code="secret_not_written")
    module.exit_json(changed=changed, path=path)


if __name__ == "__main__":
    main()
