#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: ask a host's services whether they really answer."""

from __future__ import annotations

DOCUMENTATION = r"""
module: verify_host
short_description: Ask a host's services whether they really answer
version_added: "0.1.0"
description:
  - Asks every service that fleetfit manages on the host a question with a known answer, the engine through
    its own API and Open WebUI as its administrator, and compares what the engine says of itself and
    logged about its memory with the plan. Changes nothing.
  - Fails when an answer is wrong or missing, with the last journal lines and what to do.
options:
  prompt:
    description: The question.
    type: str
    default: What is the capital of France? Answer with its name.
  expected:
    description: A regular expression that the answer must contain; empty for any answer.
    type: str
    default: (?i)paris
  timeout_s:
    description: Seconds without progress after which a service counts as hung.
    type: float
    default: 120
  report_dir:
    description: A folder on the controller for the report, C(<host>.json); empty to write none.
    type: str
    default: ""
  root:
    description: Where the host's files are read; another value than C(/) is for tests.
    type: path
    default: /
attributes:
  check_mode:
    support: full
    description: Asks in any mode, and changes nothing.
  diff_mode:
    support: none
    description: Nothing changes.
author:
  - fleetfit contributors (@fleetfit) (@fleetfit)
"""

EXAMPLES = r"""
- name: The host serves what was planned
  fleetfit.llm.verify_host:
    report_dir: "{{ playbook_dir }}/../reports"
"""

RETURN = r"""
report:
  description:
    - C(state) (V(ok), V(failed) or V(not_deployed)), C(checks) with service, name, ok, message, code, remedy
      and log_tail; per service its answer, speed and release; C(memory), predicted and measured bytes.
  returned: always
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.manifest import HostPaths
from ansible_collections.fleetfit.llm.plugins.module_utils.verify import Question, sentence, verify_host


def main():
    """Ask and answer."""
    module = AnsibleModule(
        argument_spec={
            "prompt": {"type": "str", "default": "What is the capital of France? Answer with its name."},
            "expected": {"type": "str", "default": "(?i)paris"},
            "timeout_s": {"type": "float", "default": 120},
            "report_dir": {"type": "str", "default": ""},
            "root": {"type": "path", "default": "/"},
        },
        supports_check_mode=True,
    )
    question = Question(module.params["prompt"], module.params["expected"], module.params["timeout_s"])
    report = verify_host(HostPaths(module.params["root"]), question)
    if report["state"] != "ok":
        module.fail_json(msg=sentence("this host", report), code=report["state"], report=report)
    module.exit_json(changed=False, report=report)


if __name__ == "__main__":
    main()
