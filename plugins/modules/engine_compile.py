#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: compile llama.cpp on a host, for all hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
module: engine_compile
short_description: Compile llama.cpp on a host, for all hosts
version_added: "0.1.0"
description:
  - The controller pushes the source as one file, the host compiles it in a transient unit which a lost connection
    does not end, and the controller fetches the result once and keeps it in its cache, where
    M(fleetfit.llm.engine_build) finds it.
  - Needs a compiler, CMake and ninja on the host. Compiles without a network.
options:
  build:
    description: What decides the build, as M(fleetfit.llm.engine_build) returns it, with the host's C(glibc).
    type: dict
  host:
    description: The host's name, for messages.
    type: str
  directory:
    description: Set by the action. Where the source was unpacked.
    type: path
  key:
    description: Set by the action. What names the build.
    type: str
  script:
    description: Set by the action. What compiles.
    type: str
  start:
    description: Set by the action. Start the unit, unless it runs or has finished.
    type: bool
    default: false
  state:
    description: Set by the action. V(absent) deletes what compiling left.
    type: str
    choices: [present, absent]
    default: present
  wait_s:
    description: Set by the action. Seconds to wait for the unit.
    type: int
    default: 30
attributes:
  check_mode:
    support: none
    description: In check mode nothing is compiled, and M(fleetfit.llm.engine_builder) chooses no host.
  diff_mode:
    support: none
    description: There is no text to compare.
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
- name: Compile there, and bring the result to the controller
  fleetfit.llm.engine_compile:
    build: "{{ build.build | combine({'glibc': '2.36'}) }}"
    host: edge-1
  delegate_to: edge-1
"""

RETURN = r"""
key:
  description: What names the build in the controller's cache.
  returned: success
  type: str
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.engine_compile import Compilation
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "build": {"type": "dict"},
            "host": {"type": "str"},
            "directory": {"type": "path"},
            "key": {"type": "str", "no_log": False},
            "script": {"type": "str"},
            "start": {"type": "bool", "default": False},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "wait_s": {"type": "int", "default": 30},
        },
    )
    parameters = module.params
    if not parameters["directory"] or not parameters["key"]:
        module.fail_json(msg="This module is run through its action plugin.", code="bad_option")

    def run(argv):
        code, out, err = module.run_command(argv)
        return code, out + err

    compilation = Compilation(os.path.normpath(parameters["directory"]), parameters["key"], run)
    try:
        if parameters["state"] == "absent":
            module.exit_json(changed=compilation.remove())
        if parameters["start"] and not compilation.finished():
            compilation.start(parameters["script"] or "")
        module.exit_json(changed=True, **compilation.wait(parameters["wait_s"]))
    except FleetfitError as error:
        module.fail_json(msg=str(error), code=error.code, remedy=error.remedy)


if __name__ == "__main__":
    main()
