#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: facts about NVIDIA GPUs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_facts
short_description: Tell which NVIDIA GPUs a host has and what is wrong with them
version_added: "0.1.0"
description:
  - Reads the NVIDIA driver's management library (NVML) with the controller's own copy of C(pynvml.py), so
    the host needs nothing but Python 3.9 and keeps nothing.
  - A card without a driver is found on the PCI bus. A broken driver, a lost card or a driver that hangs is a
    problem in the result, with what to do; it never fails the task.
author:
  - fleetfit contributors (@fleetfit) (@fleetfit)
options:
  root:
    description:
      - Where C(/sys), C(/proc) and C(/etc) of the host are read.
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
attributes:
  check_mode:
    support: full
    description: Reads only, always.
  diff_mode:
    support: none
    description: Nothing changes.
seealso:
  - module: fleetfit.llm.host_state
"""

EXAMPLES = r"""
- name: The host's GPUs are known
  fleetfit.llm.gpu_facts:
  register: gpus

- name: No GPU has a problem
  ansible.builtin.assert:
    that: gpus.problems | length == 0
    fail_msg: "{{ gpus.problems | map(attribute='message') | join(' ') }}"
"""

RETURN = r"""
ansible_facts:
  description: The driver's facts.
  returned: with O(drivers)
  type: dict
  contains:
    fleetfit_drivers:
      description: With O(drivers), the driver's facts (docs/contracts.md, section 14).
      type: dict
      returned: with O(drivers)
driver:
  description: Version and CUDA version of the driver that is loaded; null where none is.
  returned: always
  type: dict
  sample: {version: 580.95.05, cuda_version: "13.0"}
accelerators:
  description: Cards and MIG instances, with memory in bytes; as C(stable.accelerators) in the facts.
  returned: always
  type: list
  elements: dict
  sample:
    - uuid: GPU-4090f1ee-0000-4000-8000-000000000001
      index: 0
      name: NVIDIA GeForce RTX 4090
      compute_capability: "8.9"
      memory_total_bytes: 25757220864
      memory_reserved_bytes: 507510784
      memory_kind: dedicated
      mig_enabled: false
      mig_profile: null
      mig_parent: null
      display: false
      pci_bus_id: "00000000:01:00.0"
      pci_device_id: "10de:2684"
links:
  description: NVLink connections between cards; cards without one talk over PCIe.
  returned: always
  type: list
  elements: dict
foreign_bytes:
  description: Per device, memory held by processes that are not fleetfit's, rounded up to 256 MiB.
  returned: always
  type: dict
live:
  description: Per device what moves, such as free and used memory, processes, throttling and errors.
  returned: always
  type: dict
problems:
  description: What is wrong, each with C(code), C(message), C(remedy) and C(device).
  returned: always
  type: list
  elements: dict
"""

import base64
import zlib

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils import gpu_facts
from ansible_collections.fleetfit.llm.plugins.module_utils.driver_facts import driver_state
from ansible_collections.fleetfit.llm.plugins.module_utils.probe_root import tool_runner


def main():
    """Probe and answer."""
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
        },
        supports_check_mode=True,
    )
    archive = module.params["pynvml_archive"]
    if not archive:
        module.fail_json(
            msg="The module gpu_facts works through its action plugin only.", code="no_action_plugin"
        )
    facts = gpu_facts.gather(
        module.params["root"],
        pynvml_source=zlib.decompress(base64.b64decode(archive)).decode("utf-8"),
        library_path=module.params["library_path"],
        probe_timeout_s=module.params["probe_timeout_s"],
    )
    answer = facts.to_dict()
    if module.params["drivers"]:
        state = driver_state(
            module.params["root"],
            run=tool_runner(module),
            accelerators=answer["accelerators"],
            problems=answer["problems"],
            driver_kernels=module.params["driver_kernels"],
            **(module.params["driver_context"] or {}),
        )
        answer["problems"] = state["problems"]
        answer["ansible_facts"] = {"fleetfit_drivers": state}
    module.exit_json(changed=False, **answer)


if __name__ == "__main__":
    main()
