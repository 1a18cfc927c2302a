#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: build a virtual environment from an unpacked wheelhouse."""

from __future__ import annotations

DOCUMENTATION = r"""
module: python_environment
short_description: Build a virtual environment from an unpacked wheelhouse
version_added: "0.1.0"
description:
  - Builds the environment with uv, with checksums required and without any package index, beside its name,
    and renames it when it is whole. An environment that is there is never changed, its path names its content.
options:
  path:
    description: Where the environment goes, C(/opt/fleetfit/<service>/envs/<digest>).
    type: path
    required: true
  uv:
    description: The program uv.
    type: path
    required: true
  python:
    description: The interpreter.
    type: path
    required: true
  wheelhouse:
    description: The unpacked wheelhouse, with C(requirements.txt) and C(wheels/).
    type: path
    required: true
  compile_bytecode:
    description: Whether modules are compiled now. The service cannot write where the environment is.
    type: bool
    default: true
attributes:
  check_mode:
    support: full
    description: Reports whether the environment would be built.
  diff_mode:
    support: none
    description: There is no text to compare.
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
- name: Have the environment
  fleetfit.llm.python_environment:
    path: /opt/fleetfit/open-webui/envs/0f3c1d2e4b5a6978
    uv: /opt/fleetfit/uv/0.9.10/uv
    python: /usr/bin/python3.11
    wheelhouse: /opt/fleetfit/open-webui/envs/.wheelhouse-7b9d0a52e1c4f3a8
"""

RETURN = r"""
path:
  description: The environment.
  returned: success
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.python_environment import (
    EnvironmentSpec,
    build,
    exists,
)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "uv": {"type": "path", "required": True},
            "python": {"type": "path", "required": True},
            "wheelhouse": {"type": "path", "required": True},
            "compile_bytecode": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    wheelhouse = module.params["wheelhouse"]
    spec = EnvironmentSpec(
        path=module.params["path"],
        uv=module.params["uv"],
        python=module.params["python"],
        requirements=f"{wheelhouse}/requirements.txt",
        find_links=f"{wheelhouse}/wheels",
        compile_bytecode=module.params["compile_bytecode"],
    )
    try:
        if module.check_mode:
            changed = not exists(spec)
        else:
            changed = build(
                spec, lambda argv, env: module.run_command(list(argv), environ_update=env, cwd="/")
            )
    except FleetfitError as error:
        module.fail_json(msg=str(error), code=error.code, remedy=error.remedy)
    module.exit_json(changed=changed, path=spec.path)


if __name__ == "__main__":
    main()
