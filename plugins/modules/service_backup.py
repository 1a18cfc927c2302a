#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: back up the data of a service, list its backups, and put one back."""

from __future__ import annotations

DOCUMENTATION = r"""
module: service_backup
short_description: Back up the data of a service, list its backups, and put one back
version_added: "0.1.0"
description:
  - Copies the data of a service whose release names a backup of kind V(open_webui), while it runs - databases
    through SQLite's own backup interface, each copy checked - to C(/var/lib/fleetfit/backups/<service>/), which
    only root can read.
  - Puts a backup back in the journalled transaction that also switches releases - stop, back up what is there, put
    the backup in its place, start, gate - which returns to the data that was there if the gate fails. That data
    stays as a backup.
author:
  - fleetfit contributors (@fleetfit)
options:
  service:
    description: The unit's name without C(.service).
    type: str
    required: true
  state:
    description: V(present) makes a backup, V(listed) lists them, V(restored) puts one back.
    type: str
    choices: [present, listed, restored]
    default: present
  name:
    description: With O(state=restored), the backup; V(latest) is the newest, whoever made it.
    type: str
  archive:
    description: With O(state=restored), a file on the host that was exported from this host or another one.
    type: path
  export_dir:
    description: With O(state=present), a directory on the host to pack the backup into as one file, for its owner.
    type: path
  keep:
    description: With O(state=present), how many backups that were asked for stay; 0 keeps all.
    type: int
    default: 0
  helper:
    description: The host helper.
    type: path
    default: /opt/fleetfit/libexec/current/fleetfit-host.pyz
attributes:
  check_mode:
    support: full
    description: Reports what would be done; an O(archive) is not looked into.
  diff_mode:
    support: none
    description: The data of users is not shown.
"""

EXAMPLES = r"""
- name: Back up the chats
  fleetfit.llm.service_backup:
    service: open-webui

- name: Go back to the chats of that day
  fleetfit.llm.service_backup:
    service: open-webui
    state: restored
    name: manual-20260301T040000Z
"""

RETURN = r"""
backup:
  description: The backup that was made or put back; null where there is none to name in check mode.
  returned: unless O(state=listed)
  type: dict
backups:
  description: All backups of the service, the newest first.
  returned: always
  type: list
  elements: dict
archive:
  description: The exported file, with C(path) and C(size).
  returned: with O(export_dir)
  type: dict
replaced:
  description: The backup that holds the data which was replaced.
  returned: with O(state=restored)
  type: str
removed:
  description: The backups that were deleted.
  returned: with O(state=present)
  type: list
  elements: str
message:
  description: What was done, or would be, in one sentence.
  returned: always
  type: str
journal:
  description: The transaction's journal.
  returned: with O(state=restored)
  type: dict
"""

import os
import subprocess

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils import backup as backups
from ansible_collections.fleetfit.llm.plugins.module_utils import rollback, switch
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.manifest import HostPaths, check_service_name
from ansible_collections.fleetfit.llm.plugins.module_utils.release import (
    current_digest,
    read_release,
    release_version,
)

LOCK_WAIT_S = 60.0


class Call:
    """One call of the module."""

    def __init__(self, module):
        """Read what runs now."""
        self.module = module
        self.params = module.params
        self.paths = HostPaths()
        self.service = check_service_name(self.params["service"])
        self.digest = current_digest(self.paths, self.service)

    def spec(self):
        """Return what the current release says of its data."""
        if self.digest is None:
            raise FleetfitError(
                f"{self.service} has no release on this host.", code="no_release", remedy="Run site.yml."
            )
        spec = read_release(self.paths, self.service, self.digest).get("backup")
        if not spec or spec.get("kind") != "open_webui":
            raise FleetfitError(
                f"The release of {self.service} names no data that can be backed up.",
                code="bad_backup",
                remedy="Run site.yml once, which renews the release's record.",
            )
        return spec

    def rows(self):
        """Return all backups."""
        return backups.list_backups(self.paths, self.service)

    def make(self):
        """Make a backup, and a file of it where that is asked for."""
        spec = self.spec()
        if self.module.check_mode:
            message = f"{self.service} would be backed up."
            return {
                "changed": True,
                "backup": None,
                "backups": self.rows(),
                "removed": [],
                "message": message,
            }
        facts = {
            "version": release_version(self.paths, self.service, self.digest),
            "environment": read_release(self.paths, self.service, self.digest).get("environment"),
        }
        with switch.switch_lock(self.paths, self.service, wait_s=LOCK_WAIT_S) as held:
            if not held or switch.is_running(switch.read_journal(self.paths, self.service)):
                raise FleetfitError(
                    f"{self.service} is being switched.",
                    code="switch_busy",
                    remedy="Run it again afterwards.",
                )
            row = backups.take(self.paths, self.service, spec, self.digest, facts)
            removed = []
            if self.params["keep"]:
                removed = backups.delete_manual(self.paths, self.service, self.params["keep"])
        result = {"changed": True, "backup": row, "backups": self.rows(), "removed": removed}
        if self.params["export_dir"]:
            target = os.path.join(self.params["export_dir"], f"{self.service}-{row['name']}.tar")
            result["archive"] = backups.export_archive(row, target)
        return {**result, "message": f"The backup {backups.describe_backup(row)} is in {row['copy']}."}

    def put_back(self):
        """Put a backup back through the transaction."""
        spec = self.spec()
        if self.module.check_mode and self.params["archive"]:
            message = f"{self.service} would get the data in {self.params['archive']}."
            return {
                **{"changed": True, "backup": None, "backups": self.rows(), "journal": None},
                **{"replaced": None, "message": message},
            }
        if self.params["archive"]:
            row = backups.import_archive(self.paths, self.service, self.params["archive"])
        else:
            row = backups.find_backup(self.paths, self.service, self.params["name"])
        installed = release_version(self.paths, self.service, self.digest)
        if rollback.newer_than(row.get("version"), installed):
            raise FleetfitError(
                f"The backup {row['name']} was made by {self.service} {row['version']}; {installed} is installed,"
                " which cannot use what newer code has migrated.",
                code="backup_newer",
                remedy="Upgrade first, or name an older backup.",
            )
        result = {"changed": True, "backup": row, "journal": None, "replaced": None}
        if self.module.check_mode:
            message = f"{self.service} would get the data of {backups.describe_backup(row)}."
            return {**result, "backups": self.rows(), "message": message}
        if switch.is_running(switch.read_journal(self.paths, self.service)):
            switch.transact(self.paths, self.service, None, helper=self.params["helper"])
            self.digest = current_digest(self.paths, self.service)
        journal = switch.transact(
            self.paths,
            self.service,
            self.digest,
            kind="restore",
            helper=self.params["helper"],
            put_back=rollback.data_to_put_back(self.paths, spec, row),
        )
        if journal["state"] != "committed":
            message, code, remedy = switch.explain_failure(journal)
            failed = {"failed": True, "msg": f"{message} {remedy}", "code": code, "remedy": remedy}
            return {**result, **failed, "backups": self.rows(), "journal": journal}
        replaced = os.path.basename(os.path.dirname(journal["backup"]["copy"]))
        return {
            **result,
            "backups": self.rows(),
            "journal": journal,
            "replaced": replaced,
            "message": f"{self.service} has the data of {backups.describe_backup(row)};"
            f" what it replaced is the backup {replaced}.",
        }

    def run(self):
        """Do what is asked for and return the module's result."""
        if self.params["state"] == "present":
            return self.make()
        if self.params["state"] == "restored":
            return self.put_back()
        rows = self.rows()
        message = "; ".join(backups.describe_backup(row) for row in rows) or "There is no backup."
        return {"changed": False, "backups": rows, "message": message}


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "service": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "listed", "restored"], "default": "present"},
            "name": {"type": "str"},
            "archive": {"type": "path"},
            "export_dir": {"type": "path"},
            "keep": {"type": "int", "default": 0},
            "helper": {"type": "path", "default": switch.HELPER},
        },
        mutually_exclusive=[("name", "archive")],
        required_if=[("state", "restored", ["name", "archive"], True)],
        supports_check_mode=True,
    )
    try:
        result = Call(module).run()
    except FleetfitError as error:
        module.fail_json(msg=str(error), code=error.code, remedy=error.remedy)
    except (OSError, subprocess.SubprocessError) as error:
        module.fail_json(
            msg=f"The data of {module.params['service']} could not be copied: {error}", code="backup_failed"
        )
    if result.pop("failed", False):
        module.fail_json(**result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
