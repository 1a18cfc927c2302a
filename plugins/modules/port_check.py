#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: refuse a port that another program holds."""

from __future__ import annotations

DOCUMENTATION = r"""
module: port_check
short_description: Refuse a port that another program holds
version_added: "0.1.0"
description:
  - Fails when something other than O(unit) listens on a TCP port, and names it. Changes nothing.
options:
  port:
    description: The TCP port.
    type: int
    required: true
  unit:
    description: The systemd unit that may hold the port.
    type: str
    required: true
  setting:
    description: The variable that sets the port, named in the message.
    type: str
    required: true
attributes:
  check_mode:
    support: full
    description: Changes nothing in any mode.
  diff_mode:
    support: none
    description: There is no text to compare.
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
- name: Require a free port
  fleetfit.llm.port_check:
    port: 8080
    unit: llama-server.service
    setting: llama_cpp_port
"""

RETURN = r"""
listeners:
  description: Who listens (pid, process, unit).
  returned: success
  type: list
  elements: dict
"""

from dataclasses import asdict

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.ports import find_listeners


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "port": {"type": "int", "required": True},
            "unit": {"type": "str", "required": True},
            "setting": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    port, setting = module.params["port"], module.params["setting"]
    listeners = find_listeners(port)
    for listener in listeners:
        if listener.unit != module.params["unit"]:
            holder = f"{listener.process or 'a process'} (pid {listener.pid}, unit {listener.unit or 'none'})"
            module.fail_json(
                msg=f"Port {port} is in use by {holder}. Stop it, or set {setting} to a free port.",
                code="port_in_use",
            )
    module.exit_json(changed=False, listeners=[asdict(listener) for listener in listeners])


if __name__ == "__main__":
    main()
