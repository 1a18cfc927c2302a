#!/usr/bin/python
# Copyright: fleetfit contributors
# Licensed under the Apache License, Version 2.0
"""Make a host trust a site's own certificate authorities."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ca_certificates
short_description: Make a host trust a site's own certificate authorities
version_added: 0.1.0
description:
  - Writes the given authorities as C(fleetfit-<name>.crt) into the host's trust store, removes those that an
    earlier run wrote and that are no longer given, and rebuilds the bundle when it lacks one of them.
  - Knows the trust stores of Debian (C(update-ca-certificates)) and of Red Hat (C(update-ca-trust)) systems.
options:
  certificates:
    description: The authorities, as a name and a text in PEM form each.
    type: dict
    required: true
    version_added: 0.1.0
attributes:
  check_mode:
    description: Can run in check mode and say what would change.
    support: full
  diff_mode:
    description: Shows the names of files written and removed.
    support: full
author:
  - fleetfit contributors (@fleetfit)
"""

EXAMPLES = r"""
- name: Trust the inspecting proxy's authority
  fleetfit.llm.ca_certificates:
    certificates:
      proxy: "{{ lookup('ansible.builtin.file', 'files/proxy.crt') }}"
"""

RETURN = r"""
paths:
  description: The files that hold the authorities.
  returned: success
  type: list
  elements: str
  sample: [/usr/local/share/ca-certificates/fleetfit-proxy.crt]
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.ca_certificates import (
    PREFIX,
    apply_changes,
    check_certificates,
    find_trust_store,
    plan_changes,
)
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={"certificates": {"type": "dict", "required": True}}, supports_check_mode=True
    )
    # Files end with one line break: Ansible's file lookup strips it.
    certificates = {name: f"{text.rstrip()}\n" for name, text in module.params["certificates"].items()}
    try:
        check_certificates(certificates)
        try:
            store = find_trust_store()
        except FleetfitError:
            if certificates:
                raise
            module.exit_json(changed=False, paths=[])
        changes = plan_changes(certificates, store)
        if changes.any and not module.check_mode:
            apply_changes(changes, store, module.run_command)
    except FleetfitError as error:
        module.fail_json(msg=str(error), code=error.code, remedy=error.remedy)
    module.exit_json(
        changed=changes.any,
        paths=[f"{store.directory}/{PREFIX}{name}.crt" for name in sorted(certificates)],
        diff={"before": "\n".join(changes.remove), "after": "\n".join(changes.write)},
    )


if __name__ == "__main__":
    main()
