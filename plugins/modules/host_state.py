#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: everything a run needs to know about a host, in one execution."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_state
short_description: Read a host's facts, manifest and running services in one execution
version_added: "0.1.0"
description:
  - Returns the facts that planning reads (GPUs, driver, CPU, RAM, system), what fleetfit manages on the host,
    and which of its services run. Changes nothing.
  - What is wrong with the host's driver, GPUs or clock is listed in the facts' C(problems), each with what to
    do; it never fails the task.
author:
  - fleetfit contributors (@fleetfit) (@fleetfit)
options:
  root:
    description:
      - Where the host's files are read; another value than C(/) is for tests and the lab.
      - Where it is not given, the variable C(fleetfit_probe_root) of the host is used.
    type: path
    default: /
  library_path:
    description: A C(libnvidia-ml.so.1) other than the one that the loader finds.
    type: path
  probe_timeout_s:
    description: Seconds after which a driver that does not answer is a problem.
    type: float
    default: 20
  drivers:
    description:
      - Tell also what is installed, loaded, held and offered of the driver, and why a reboot is needed, as the fact
        C(fleetfit_drivers).
      - Lists packages, kernels and initramfs, which takes a few seconds on a host with a card.
    type: bool
    default: false
  driver_kernels:
    description:
      - With O(drivers), kernel releases to look at instead of those that are installed, for tests and containers.
      - The first one counts as running where the host's own is not among them.
    type: list
    elements: str
    default: []
  driver_context:
    description: Set by the action plugin, what the controller knows (its boot id, the day, the drivers' branches).
    type: dict
  pynvml_archive:
    description: Set by the action plugin, the controller's C(pynvml.py) (zlib, base64).
    type: str
  reference_time_s:
    description: Set by the action plugin, the controller's clock in seconds since the epoch.
    type: float
attributes:
  check_mode:
    support: full
    description: Reads only, always.
  diff_mode:
    support: none
    description: Nothing changes.
seealso:
  - module: fleetfit.llm.gpu_facts
"""

EXAMPLES = r"""
- name: The host's state is known
  fleetfit.llm.host_state:
  register: host

- name: Nothing is wrong with the host
  ansible.builtin.assert:
    that: ansible_facts['fleetfit'].problems | length == 0
    fail_msg: >-
      {% for problem in ansible_facts['fleetfit'].problems %}{{ problem.message }} {{ problem.remedy }}
      {% endfor %}
"""

RETURN = r"""
ansible_facts:
  description: The facts document, and the driver's.
  returned: always
  type: dict
  contains:
    fleetfit:
      description: >-
        C(schema_version), C(stable) (what planning reads, with C(foreign_bytes) beside it), C(live) (what
        moves) and C(problems). The JSON schema is catalog/schemas/facts.json.
      type: dict
      returned: always
    fleetfit_drivers:
      description: With O(drivers), the driver's facts (docs/contracts.md, section 14).
      type: dict
      returned: with O(drivers)
manifest:
  description: The content of /etc/fleetfit/manifest.json; null where fleetfit manages nothing yet.
  returned: always
  type: dict
services:
  description: >-
    Per service C(active) (systemd's word), C(release) (digest or null), C(unit_file) and, where it is known,
    C(last_start) (C(ready_s) and C(stop_s), the seconds that its last good start and the stop before it took).
  returned: always
  type: dict
  sample: {llama-server: {active: active, release: 3f0c9a, unit_file: true}}
helper_digest:
  description: The digest of the host helper that is installed, or null.
  returned: always
  type: str
"""

import base64
import zlib

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.driver_facts import driver_state
from ansible_collections.fleetfit.llm.plugins.module_utils.host_state import host_state
from ansible_collections.fleetfit.llm.plugins.module_utils.probe_root import tool_runner


def main():
    """Look and answer."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "default": "/"},
            "library_path": {"type": "path"},
            "probe_timeout_s": {"type": "float", "default": 20},
            "drivers": {"type": "bool", "default": False},
            "driver_kernels": {"type": "list", "elements": "str", "default": []},
            "driver_context": {"type": "dict"},
            # Not a secret: but 70 KB have no place in the host's log.
            "pynvml_archive": {"type": "str", "no_log": True},
            "reference_time_s": {"type": "float"},
        },
        supports_check_mode=True,
    )
    archive = module.params["pynvml_archive"]
    if not archive:
        module.fail_json(
            msg="The module host_state works through its action plugin only.", code="no_action_plugin"
        )

    run = tool_runner(module)
    state = host_state(
        module.params["root"],
        run=run,
        pynvml_source=zlib.decompress(base64.b64decode(archive)).decode("utf-8"),
        library_path=module.params["library_path"],
        probe_timeout_s=module.params["probe_timeout_s"],
        reference_time_s=module.params["reference_time_s"],
    )
    facts = {"fleetfit": state.pop("facts")}
    if module.params["drivers"]:
        facts["fleetfit_drivers"] = driver_state(
            module.params["root"],
            run=run,
            accelerators=facts["fleetfit"]["stable"]["accelerators"],
            problems=facts["fleetfit"]["problems"],
            driver_kernels=module.params["driver_kernels"],
            **(module.params["driver_context"] or {}),
        )
    module.exit_json(changed=False, ansible_facts=facts, **state)


if __name__ == "__main__":
    main()
