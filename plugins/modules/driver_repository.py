#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: have the driver's package repository, with its key verified."""

from __future__ import annotations

DOCUMENTATION = r"""
module: driver_repository
short_description: Have the driver's package repository, with its key verified
version_added: "0.1.0"
description:
  - Compares the fingerprint of the repository's signing key before anything is written, writes key, sources and
    preferences, and fetches the index. Where a step fails, the files that were there before are there again.
  - Needs no gnupg on the host. What is in place already is neither fetched nor refreshed.
options:
  kind:
    description: What the repository is, V(apt_archive) for one of the distribution's own.
    type: str
    choices: [apt, apt_archive, dnf]
    required: true
  sources:
    description: The file among O(files) that defines the repository.
    type: path
    required: true
  files:
    description: The files, with C(path) and C(content).
    type: list
    elements: dict
    required: true
  key:
    description: The key, with C(path), C(fingerprint) (40 digits) and C(url) or C(content) (base64).
    type: dict
  proxy:
    description: The proxy for the key, with C(http), C(https) and C(no_proxy).
    type: dict
    default: {}
attributes:
  check_mode:
    support: full
    description: Verifies the key and reports what would change.
  diff_mode:
    support: none
    description: The result lists the files.
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
- name: The driver's repository is there
  fleetfit.llm.driver_repository:
    kind: apt
    sources: /etc/apt/sources.list.d/fleetfit-nvidia.sources
    files: "{{ ansible_facts.fleetfit_driver.files | selectattr('part', 'eq', 'repository') }}"
    key:
      path: /etc/apt/keyrings/fleetfit-nvidia.asc
      url: https://developer.download.nvidia.com/compute/cuda/repos/debian13/x86_64/8793F200.pub
      fingerprint: 02182E60104FCDC26EAE1B8597A5D4CB8793F200
"""

RETURN = r"""
files:
  description: The files that were or would be written.
  returned: success
  type: list
  elements: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.driver_repository import apply, fetch_key, plan
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.http_client import ClientSettings


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "kind": {"type": "str", "choices": ["apt", "apt_archive", "dnf"], "required": True},
            "sources": {"type": "path", "required": True},
            "files": {"type": "list", "elements": "dict", "required": True},
            "key": {"type": "dict", "no_log": False},
            "proxy": {"type": "dict", "default": {}, "no_log": True},
        },
        supports_check_mode=True,
    )
    proxy = module.params["proxy"] or {}
    settings = ClientSettings(
        proxy_http=proxy.get("http"), proxy_https=proxy.get("https"), no_proxy=proxy.get("no_proxy")
    )

    def run(argv):
        code, output, error = module.run_command(
            list(argv), environ_update={"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        )
        return code, f"{output}\n{error}"

    try:
        change = plan(module.params["files"], module.params["key"], lambda url: fetch_key(url, settings))
        if change.files and not module.check_mode:
            apply(change, module.params["kind"], module.params["sources"], run)
    except FleetfitError as error:
        module.fail_json(msg=str(error), code=error.code, remedy=error.remedy)
    except OSError as error:
        module.fail_json(msg=f"The repository's files could not be written: {error}", code="repository_files")
    module.exit_json(changed=bool(change.files), files=sorted(change.files))


if __name__ == "__main__":
    main()
