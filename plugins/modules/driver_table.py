#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: documentation of the action driver_table, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: driver_table
short_description: Print the NVIDIA drivers of all hosts once
version_added: "0.1.0"
description:
  - Prints, once for the play and on the controller, which driver every host has loaded, installed and offered,
    whether it is held, whether each kernel has its module, why a reboot is needed, and what is wrong.
  - Reads the fact C(fleetfit_drivers), which M(fleetfit.llm.gpu_facts) sets with its option C(drivers). Changes
    nothing on a host.
options:
  path:
    description: A file on the controller that gets the same as JSON, in check mode too.
    type: path
attributes:
  check_mode:
    support: full
    description: Changes nothing on hosts in any mode; the report is written in any mode.
  diff_mode:
    support: none
    description: There is no text to compare.
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
- name: The hosts' drivers are known
  fleetfit.llm.gpu_facts:
    drivers: true

- name: Show the drivers of all hosts
  fleetfit.llm.driver_table:
    path: drivers.json
"""

RETURN = r"""
table:
  description: The text that was printed.
  returned: success
  type: str
path:
  description: The file that was written, or null.
  returned: success
  type: str
"""
