#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: documentation of the action plan_table, which runs on the controller."""

from __future__ import annotations

DOCUMENTATION = r"""
module: plan_table
short_description: Print the plan of all hosts once
version_added: "0.1.0"
description:
  - Prints, once for the play and on the controller, what would be served on every host and why, and what is
    wrong with hosts. Changes nothing.
options:
  candidates:
    description: Whether every candidate is shown with the reason for or against it.
    type: bool
    default: false
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
- name: Show the plan of all hosts
  fleetfit.llm.plan_table:
"""

RETURN = r"""
table:
  description: The text that was printed.
  returned: success
  type: str
"""
