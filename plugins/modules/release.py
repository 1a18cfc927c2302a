#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Ansible module: write a release and make it the one that its service runs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release
short_description: Make a service run a release, or keep running the one it runs
version_added: "0.1.0"
description:
  - Writes C(/opt/fleetfit/<service>/releases/<digest>/), whose name is the digest of everything that decides
    how the service runs, and switches the service to it in one journalled transaction on the host - check, stop,
    back up, change the link C(current), start, gate - that goes back to the old release if the gate fails.
  - The transaction is the transient unit C(fleetfit-switch-<service>.service). It ends without the
    controller; a call while one is running waits for that one.
  - Where the release is current already, the service is started again only if it is not active or one of
    O(restart_on) differs from what its last good start saw, and through the same gate.
  - The unit must exist, its C(ExecStart) being C(/opt/fleetfit/<service>/current/run); the module
    M(fleetfit.llm.host_helper) must have run.
author:
  - fleetfit contributors (@fleetfit)
options:
  service:
    description: The unit's name without C(.service).
    type: str
    required: true
  argv:
    description:
      - The command and its arguments. C({release}) becomes the release's directory, C({credentials}) the
        directory of the unit's credentials; anything else is passed on exactly as it is.
    type: list
    elements: str
    required: true
  environment:
    description: Directory of the programs, which the release links to as C(env).
    type: path
  links:
    description: Further links in the release, name to absolute target.
    type: dict
    default: {}
  model_sha256:
    description: The checksums of the model's files.
    type: list
    elements: str
    default: []
  settings:
    description: Typed engine settings, written to C(settings.json) and compared with what the engine reports.
    type: dict
    default: {}
  files:
    description: Small text files of the release, name to text. The service's user can read them.
    type: dict
    default: {}
  environ:
    description: Environment variables, which are not secret.
    type: dict
    default: {}
  environ_credentials:
    description:
      - Environment variables that are secret, name to the name of a credential of the unit; several, in a list,
        are joined by semicolons. They are read when the service starts and stand in no file of the release.
    type: dict
    default: {}
  plan:
    description: The plan, written to C(plan.json). It is not part of the digest.
    type: dict
    default: {}
  restart_on:
    description: Files outside the release, such as the unit and its credentials, whose change calls for a restart.
    type: list
    elements: path
    default: []
  precheck:
    description:
      - What must hold before the old release is stopped. With C(kind=llama_fit_params), C(argv) is run as the
        unit's user, and what it prints must not exceed C(limits), name to bytes.
    type: dict
  gate:
    description:
      - What must hold before the new release counts as good.
      - C(kind) is V(llama_cpp), V(vllm) or V(open_webui); C(url); C(credential), a file; C(model), the name that
        is served; C(timeout_s), seconds without progress; C(max_timeout_s), seconds in all, six times
        C(timeout_s) by default; C(question) and C(expect), a regular expression or null; C(admin_email).
      - C(proof_s), 60 by default, is how long the prompt may take to prefill that an engine is asked once per
        release, to prove its memory. It is as long as the context, or shorter, which the result then says; 0
        asks for none.
    type: dict
    required: true
  backup:
    description:
      - What to copy while the service is stopped, and to put back if the new release fails.
      - C(kind=directory) with C(path).
    type: dict
  conflicts:
    description:
      - Other services of fleetfit that cannot run beside this one, such as another engine on the same GPUs.
      - They are stopped before it starts and no longer start at boot once its gate has passed; if the gate fails,
        those that ran are started again.
    type: list
    elements: str
    default: []
  keep:
    description: How many releases stay on the host, the current one included.
    type: int
    default: 2
  helper:
    description: The host helper.
    type: path
    default: /opt/fleetfit/libexec/current/fleetfit-host.pyz
attributes:
  check_mode:
    support: full
    description: Reports what would change.
  diff_mode:
    support: full
    description: Shows the command, settings and environment of the old and the new release.
"""

EXAMPLES = r"""
- name: The engine serves the planned model
  fleetfit.llm.release:
    service: llama-server
    environment: /opt/fleetfit/llama-server/envs/3f2a1b
    links:
      model: /var/lib/fleetfit/models/smollm2-135m-instruct/Q4_K_M
    model_sha256: [7b9d0a52e1c4f3a8b6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a0b9c8d7e6f5a4b3]
    settings: {n_ctx: 16384, slots: 2}
    argv: ["{release}/env/bin/llama-server", --model, "{release}/model/model.gguf", --port, "8080",
           --api-key-file, "{credentials}/api-key"]
    restart_on: [/etc/systemd/system/llama-server.service, /etc/fleetfit/credentials/llama-server.api-key]
    gate:
      kind: llama_cpp
      url: http://127.0.0.1:8080
      credential: /etc/fleetfit/credentials/llama-server.api-key
      model: smollm2-135m-instruct
      timeout_s: 300
"""

RETURN = r"""
digest:
  description: The release's name.
  returned: always
  type: str
previous:
  description: The release that was current before, null where there was none.
  returned: always
  type: str
switched:
  description: Whether the service went to another release.
  returned: always
  type: bool
restarted:
  description: Whether the same release was started again.
  returned: always
  type: bool
reason:
  description: Why something was done.
  returned: when something was done
  type: str
gate:
  description: The gate's result, that of the last good start where nothing was done.
  returned: always
  type: dict
journal:
  description: The transaction's journal, null where nothing was done.
  returned: always
  type: dict
removed:
  description: Releases and environments that were deleted.
  returned: always
  type: list
  elements: str
referenced:
  description: What the releases that stay link to, and what therefore must stay.
  returned: always
  type: list
  elements: str
"""

import json
import os
import subprocess

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils import switch
from ansible_collections.fleetfit.llm.plugins.module_utils.backup import check_backup
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.gate import parse_gate
from ansible_collections.fleetfit.llm.plugins.module_utils.manifest import HostPaths
from ansible_collections.fleetfit.llm.plugins.module_utils.release import (
    ReleaseSpec,
    current_digest,
    read_release,
    read_settings,
    referenced_paths,
    write_release,
)

SPEC_FIELDS = (
    "service",
    "argv",
    "environment",
    "links",
    "model_sha256",
    "settings",
    "files",
    "environ",
    "environ_credentials",
    "plan",
    "restart_on",
    "precheck",
    "gate",
    "backup",
    "conflicts",
)
SHOWN = ("argv", "environment", "environ", "links", "model_sha256")


def describe(paths, service, digest):
    """Return the text that a difference between releases is shown in, empty where there is no release."""
    if digest is None:
        return ""
    try:
        release = read_release(paths, service, digest)
        settings = read_settings(paths, service, digest)
    except FleetfitError:
        return f"release: {digest}\n"
    shown = {"release": digest, "settings": settings, **{name: release.get(name) for name in SHOWN}}
    return json.dumps(shown, indent=2, sort_keys=True) + "\n"


def describe_spec(spec, digest):
    """Return the same text for a release that is not written."""
    shown = {
        "release": digest,
        "settings": dict(spec.settings),
        **{name: getattr(spec, name) for name in SHOWN},
        "model_sha256": sorted(spec.model_sha256),
    }
    return json.dumps(shown, indent=2, sort_keys=True) + "\n"


def failure(journal):
    """Return (message, code, remedy) of a transaction that did not end well."""
    service, cause = journal["service"], journal["cause"] or {}
    said = cause.get("message", "no reason is known")
    if journal["state"] == "refused":
        return (
            f"The release {journal['to']} of {service} was not tried: {said}. The old one was not touched.",
            "precheck_failed",
            "Plan again with the host's facts as they are now, or choose a smaller variant or context.",
        )
    state = cause.get("state", "unknown")
    what = f"The release {journal['to']} of {service} failed at '{cause.get('step')}' ({state}): {said}."
    remedy = f"Read gate.log_tail below, or journalctl -u {service} on the host, and run the role again."
    if state == "port_in_use":
        remedy = "Stop what holds the port, or give the service another one, and run the role again."
    if state == "out_of_memory":
        remedy = (
            "Free what other programs hold of that memory, or plan for less (fleetfit_slots,"
            " fleetfit_min_context_tokens, a smaller variant). The same arguments were not tried again with others."
        )
    if journal["state"] == "reverted":
        if journal.get("displaced"):
            return f"{what} {' and '.join(journal['displaced'])} serves again.", "gate_failed", remedy
        serves = f"{journal['from']} serves again." if journal["from"] else "Nothing was running before it."
        return f"{what} {serves}", "gate_failed", remedy
    if journal["revert_gate"]:
        what += f" The old release {journal['from']} did not come back: {journal['revert_gate']['message']}."
    return what, "service_down", remedy


class Call:
    """One call of the module."""

    def __init__(self, module):
        """Read and check the arguments."""
        self.module = module
        self.paths = HostPaths()
        self.spec = ReleaseSpec(
            **{name: module.params[name] for name in SPEC_FIELDS if module.params[name] is not None}
        )
        self.service = self.spec.service
        self.keep = module.params["keep"]
        self.helper = module.params["helper"]
        parse_gate(self.service, self.spec.gate, self.spec.settings)
        if self.spec.backup:
            check_backup(self.spec.backup)
        if self.keep < 1:
            raise FleetfitError(
                f"keep is {self.keep}.", code="bad_release", remedy="Keep at least one release."
            )

    def finish_pending(self):
        """Wait for, or recover, a transaction that an earlier call began; return its journal, if any."""
        if not switch.is_running(switch.read_journal(self.paths, self.service)):
            return None
        return self.transact(None, None)

    def transact(self, digest, kind):
        """Request a transaction (none: go on with the one under way), run it and return its journal."""
        if not os.path.isfile(self.helper):
            raise FleetfitError(
                f"The host helper {self.helper} is not installed.",
                code="helper_missing",
                remedy="Run the module fleetfit.llm.host_helper first.",
            )
        journal = None
        if digest is not None:
            journal = switch.request(self.paths, self.service, digest, kind=kind, keep=self.keep)
        switch.launch(self.service, helper=self.helper)
        ended = switch.wait_end(self.paths, self.service, helper=self.helper)
        if journal is not None and ended.get("id") != journal["id"]:
            raise FleetfitError(
                f"Another switch of {self.service} took the place of this one.",
                code="switch_busy",
                remedy="Run the role again.",
            )
        return ended

    def run(self):
        """Bring the host to the release and return the module's result."""
        if self.module.check_mode:
            return self.predict()
        attached = self.finish_pending()
        previous = attached["from"] if attached else current_digest(self.paths, self.service)
        written = write_release(self.spec, self.paths)
        digest = written.digest
        journal, reason = attached, "a switch was under way" if attached else None
        switched = bool(attached) and attached["state"] == "committed" and attached["kind"] != "restart"
        restarted = bool(attached) and attached["kind"] == "restart"
        needed = self.needed(digest, written)
        while needed:
            kind, reason = needed
            journal = self.transact(digest, kind)
            if journal["to"] != digest:  # somebody else's, which has ended now
                needed = self.needed(digest, written)
                continue
            if journal["state"] != "committed":
                return self.failed(journal, digest, previous)
            switched, restarted = journal["kind"] != "restart", journal["kind"] == "restart"
            needed = None
        removed = switch.clean(self.paths, self.service, self.keep)
        result = {
            "changed": written.changed or bool(journal) or bool(removed),
            "digest": digest,
            "previous": previous,
            "switched": switched,
            "restarted": restarted,
            "gate": switch.read_good(self.paths, self.service)["gate"],
            "journal": journal,
            "removed": removed,
            "referenced": self.referenced(),
        }
        if reason:
            result["reason"] = reason
        if self.module._diff and previous != digest:
            result["diff"] = self.diff(previous, describe(self.paths, self.service, digest))
        return result

    def needed(self, digest, written):
        """Return (kind, reason) of the transaction that is needed, or None."""
        if current_digest(self.paths, self.service) != digest:
            return "switch", "the release is not current"
        if written.repaired:
            return "restart", f"{', '.join(written.repaired)} in the release had been changed"
        reason = switch.why_restart(self.paths, self.service, digest, self.spec.restart_on)
        return ("restart", reason) if reason else None

    def predict(self):
        """Return what run() would do, from what can be read."""
        previous = current_digest(self.paths, self.service)
        written = write_release(self.spec, self.paths, check_mode=True)
        needed = self.needed(written.digest, written)
        result = {
            "changed": written.changed or needed is not None,
            "digest": written.digest,
            "previous": previous,
            "switched": bool(needed) and needed[0] == "switch",
            "restarted": bool(needed) and needed[0] == "restart",
            "gate": switch.read_good(self.paths, self.service)["gate"],
            "journal": None,
            "removed": [],
            "referenced": self.referenced(),
        }
        if needed:
            result["reason"] = needed[1]
        if self.module._diff and previous != written.digest:
            result["diff"] = self.diff(previous, describe_spec(self.spec, written.digest))
        return result

    def referenced(self):
        """Return what the releases that stay link to."""
        kept = switch.kept_releases(self.paths, self.service, self.keep)
        return referenced_paths(self.paths, self.service, kept)

    def diff(self, previous, after):
        """Return Ansible's form of a difference."""
        header = f"{self.service} release"
        before = describe(self.paths, self.service, previous)
        return {"before": before, "after": after, "before_header": header, "after_header": header}

    def failed(self, journal, digest, previous):
        """Return the result of a transaction that did not commit."""
        message, code, remedy = failure(journal)
        return {
            "failed": True,
            "changed": True,
            "msg": f"{message} {remedy}",
            "code": code,
            "remedy": remedy,
            "digest": digest,
            "previous": previous,
            "switched": False,
            "restarted": False,
            "gate": journal["gate"],
            "journal": journal,
            "removed": [],
            "referenced": self.referenced(),
        }


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "service": {"type": "str", "required": True},
            "argv": {"type": "list", "elements": "str", "required": True},
            "environment": {"type": "path"},
            "links": {"type": "dict", "default": {}},
            "model_sha256": {"type": "list", "elements": "str", "default": []},
            "settings": {"type": "dict", "default": {}},
            "files": {"type": "dict", "default": {}},
            "environ": {"type": "dict", "default": {}},
            # Names of credentials, not their values.
            "environ_credentials": {"type": "dict", "default": {}, "no_log": False},
            "plan": {"type": "dict", "default": {}},
            "restart_on": {"type": "list", "elements": "path", "default": []},
            "precheck": {"type": "dict"},
            "gate": {"type": "dict", "required": True},
            "backup": {"type": "dict"},
            "conflicts": {"type": "list", "elements": "str", "default": []},
            "keep": {"type": "int", "default": 2},
            "helper": {"type": "path", "default": switch.HELPER},
        },
        supports_check_mode=True,
    )
    try:
        result = Call(module).run()
    except FleetfitError as error:
        module.fail_json(msg=str(error), code=error.code, remedy=error.remedy)
    except (OSError, subprocess.SubprocessError) as error:
        module.fail_json(msg=f"The release could not be made current: {error}", code="release_failed")
    if result.pop("failed", False):
        module.fail_json(**result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
