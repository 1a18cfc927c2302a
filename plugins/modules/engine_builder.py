#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: documentation of the action engine_builder, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: engine_builder
short_description: Choose the host that compiles llama.cpp for others
version_added: "0.1.0"
description:
  - Of the hosts of the play that can be reached, the one with the oldest C library and the right architecture
    compiles each build that hosts of the batch lack, so that the result runs on all of them.
options:
  variable:
    description: The variable in which each host's result of M(fleetfit.llm.engine_build) is registered.
    type: str
    required: true
attributes:
  check_mode:
    support: full
    description: Chooses none.
  diff_mode:
    support: none
    description: There is no text to compare.
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
- name: Choose the hosts that compile
  fleetfit.llm.engine_builder:
    variable: build
  run_once: true
  register: builders
"""

RETURN = r"""
builds:
  description: For each key of a build, C(builder) compiles it, C(os) is that host's, and C(asker) has it compiled.
  returned: success
  type: dict
"""
