#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: install the host helper."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_helper
short_description: Install fleetfit's helper program on a host
version_added: "0.1.0"
description:
  - Installs C(fleetfit-host.pyz), one zip application that needs only Python 3.9, under
    C(<libexec_dir>/<digest>/), and makes C(<libexec_dir>/current) link to it in one step.
  - The bytes are sent only where the host does not have them yet. Versions that no process and no transient
    unit uses are removed.
author:
  - fleetfit contributors (@fleetfit)
options:
  libexec_dir:
    description: Where helpers are kept.
    type: path
    default: /opt/fleetfit/libexec
  sha256:
    description: Set by the action plugin, the sha256 of the helper's archive.
    type: str
  archive:
    description: Set by the action plugin, the archive (zlib, base64).
    type: str
attributes:
  check_mode:
    support: full
    description: Reports what would change.
  diff_mode:
    support: none
    description: There is no text to compare.
"""

EXAMPLES = r"""
- name: The host helper is current
  fleetfit.llm.host_helper:
"""

RETURN = r"""
digest:
  description: The name of the helper's directory.
  returned: always
  type: str
helper:
  description: The helper's path, by its digest.
  returned: always
  type: str
previous:
  description: The digest that was current before; null where there was none.
  returned: always
  type: str
removed:
  description: Digests that nothing used any more.
  returned: always
  type: list
  elements: str
"""

import base64
import os
import zlib

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.helper_install import HELPER_NAME, install_helper
from ansible_collections.fleetfit.llm.plugins.module_utils.host_helper import DIGEST_LENGTH


def main():
    """Install the helper, or say that its bytes are missing."""
    module = AnsibleModule(
        argument_spec={
            "libexec_dir": {"type": "path", "default": "/opt/fleetfit/libexec"},
            "sha256": {"type": "str"},
            # Not a secret: but 200 KiB have no place in the host's log.
            "archive": {"type": "str", "no_log": True},
        },
        supports_check_mode=True,
    )
    sha256, libexec_dir = module.params["sha256"], module.params["libexec_dir"]
    if not sha256:
        module.fail_json(
            msg="The module host_helper works through its action plugin only.", code="no_action_plugin"
        )
    archive = module.params["archive"]
    try:
        content = zlib.decompress(base64.b64decode(archive)) if archive else None
        result = install_helper(libexec_dir, sha256, content, check_mode=module.check_mode)
    except FleetfitError as error:
        module.fail_json(msg=str(error), code=error.code, remedy=error.remedy)
    except OSError as error:
        module.fail_json(msg=f"Installing the host helper failed: {error}", code="helper_not_installed")
    digest = sha256[:DIGEST_LENGTH]
    module.exit_json(
        changed=result.changed,
        digest=digest,
        helper=os.path.join(libexec_dir, digest, HELPER_NAME),
        previous=result.previous,
        removed=result.removed,
        missing=result.missing,
    )


if __name__ == "__main__":
    main()
