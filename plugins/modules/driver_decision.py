#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: documentation of the action driver_decision, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: driver_decision
short_description: Decide what to do about a host's NVIDIA driver
version_added: "0.1.0"
description:
  - Compares what is wanted of the driver with the facts of M(fleetfit.llm.gpu_facts) (with C(drivers)) and the
    catalog's data, on the controller. Changes nothing; the answer is the same in check mode.
options:
  wanted:
    description:
      - What is wanted, with C(source), C(branch), C(version), C(flavour), C(reboot), C(cuda_toolkit),
        C(fabric_manager), C(fabric_manager_package), C(repository_url), C(security_repository_url), C(key_url),
        C(key_fingerprint), C(kernels) and C(require_gpu); all optional.
    type: dict
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
- name: What the driver needs is known
  fleetfit.llm.driver_decision:
    wanted:
      source: auto
      reboot: never
"""

RETURN = r"""
ansible_facts:
  description: The decision as the fact C(fleetfit_driver) (docs/contracts.md, section 15).
  returned: success
  type: dict
decision:
  description: The decision.
  returned: success
  type: dict
"""
