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
  - With O(state=rollback), goes back to a release that is on the host, through the same transaction, and holds the
    service there - a later O(state=present) gets its release ready and does not switch to it, until O(hold=false).
  - The unit must exist, its C(ExecStart) being C(/opt/fleetfit/<service>/current/run); the module
    M(fleetfit.llm.host_helper) must have run.
author:
  - fleetfit contributors (@fleetfit)
options:
  state:
    description:
      - V(present) runs the release that the other options describe; V(rollback) goes back to O(to); V(listed) lists
        the releases on the host.
    type: str
    choices: [present, rollback, listed]
    default: present
  to:
    description:
      - With O(state=rollback), the release to go back to - the beginning of its name (four digits or more), or a
        version. Empty for the one before the current one.
    type: str
    default: ""
  data:
    description:
      - With O(state=rollback), what becomes of data that newer code has changed for good. V(auto) keeps the data
        where no migration lies between the releases and refuses otherwise; V(restore) puts back the backup that
        was taken of the older release's data; V(keep) tries it with the data as it is.
    type: str
    choices: [auto, keep, restore]
    default: auto
  hold:
    description: Whether a service that was rolled back stays where it is.
    type: bool
    default: true
  service:
    description: The unit's name without C(.service).
    type: str
    required: true
  argv:
    description:
      - The command and its arguments. C({release}) becomes the release's directory, C({credentials}) the
        directory of the unit's credentials; anything else is passed on exactly as it is.
      - Required with O(state=present).
    type: list
    elements: str
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
  version:
    description:
      - The version of the program, for people and for O(to). It is not part of the digest. For vLLM and Open WebUI
        what is installed in O(environment) counts.
    type: str
    default: ""
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
      - Required with O(state=present).
    type: dict
  backup:
    description:
      - What to copy while the service is stopped, and to put back if the new release fails.
      - C(kind) with C(path). V(directory) copies before every switch. V(open_webui) copies databases through
        SQLite's own interface, checks them, and copies only before a switch to another environment, since other
        arguments migrate nothing.
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

- name: Go back by one
  fleetfit.llm.release:
    service: llama-server
    state: rollback
"""

RETURN = r"""
digest:
  description: The release's name.
  returned: unless O(state=listed)
  type: str
previous:
  description: The release that was current before, null where there was none.
  returned: unless O(state=listed)
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
plan:
  description: The plan of the release that is current.
  returned: unless O(state=listed)
  type: dict
version:
  description: The version of the program that the current release runs, null where nothing tells.
  returned: unless O(state=listed)
  type: str
environment:
  description: The environment of the release that is current.
  returned: unless O(state=listed)
  type: str
model:
  description: The name of the model that the current release's gate asks for.
  returned: unless O(state=listed)
  type: str
hold:
  description:
    - What a rollback left - C(release), C(instead_of), C(since) - or null. Where it kept the service from the
      wanted release, C(wanted) names that, and the plan that is served becomes the fact C(fleetfit_plan).
  returned: always
  type: dict
data:
  description: What became of the service's data - C(action), C(message), C(backup).
  returned: with O(state=rollback)
  type: dict
releases:
  description: The releases on the host, the newest first.
  returned: with O(state=rollback) and O(state=listed)
  type: list
  elements: dict
message:
  description: What was done, or would be, in one sentence.
  returned: with O(state=rollback)
  type: str
referenced:
  description: What the releases that stay link to, and what therefore must stay.
  returned: always
  type: list
  elements: str
"""

import json
import os
import subprocess
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleetfit.llm.plugins.module_utils import rollback, switch
from ansible_collections.fleetfit.llm.plugins.module_utils.backup import check_backup
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.gate import parse_gate
from ansible_collections.fleetfit.llm.plugins.module_utils.manifest import HostPaths, check_service_name
from ansible_collections.fleetfit.llm.plugins.module_utils.release import (
    ReleaseSpec,
    current_digest,
    read_plan,
    read_release,
    read_settings,
    referenced_paths,
    release_version,
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
    "version",
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


class Host:
    """What every call needs of the host: its transactions."""

    def __init__(self, module):
        """Read and check the arguments that every state has."""
        self.module = module
        self.paths = HostPaths()
        self.service = check_service_name(module.params["service"])
        self.keep = module.params["keep"]
        self.helper = module.params["helper"]
        if self.keep < 1:
            raise FleetfitError(
                f"keep is {self.keep}.", code="bad_release", remedy="Keep at least one release."
            )

    def finish_pending(self):
        """Wait for, or recover, a transaction that an earlier call began; return its journal, if any."""
        if not switch.is_running(switch.read_journal(self.paths, self.service)):
            return None
        return self.transact(None, None)

    def transact(self, digest, kind, put_back=None):
        """Request a transaction (none: go on with the one under way), run it and return its journal."""
        return switch.transact(
            self.paths,
            self.service,
            digest,
            kind=kind,
            keep=self.keep,
            helper=self.helper,
            put_back=put_back,
        )

    def hold(self):
        """Return what a rollback left, or None."""
        hold = switch.read_good(self.paths, self.service)["hold"]
        return hold if hold and hold["release"] == current_digest(self.paths, self.service) else None

    def of_current(self, digest):
        """Return what the result says of the release that serves."""
        if digest is None:
            return {"plan": {}, "version": None, "environment": None, "model": None}
        release = read_release(self.paths, self.service, digest)
        return {
            "plan": read_plan(self.paths, self.service, digest),
            "version": release_version(self.paths, self.service, digest),
            "environment": release.get("environment"),
            "model": release["gate"].get("model"),
        }

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
        message, code, remedy = switch.explain_failure(journal)
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


class Rollback(Host):
    """A call with state listed or rollback."""

    def run(self):
        """Go back and return the module's result."""
        if self.module.params["state"] == "listed":
            rows = rollback.list_releases(self.paths, self.service)
            return {"changed": False, "releases": rows, "hold": self.hold()}
        attached = None if self.module.check_mode else self.finish_pending()
        if attached and attached["kind"] == "rollback" and attached["state"] == "committed":
            return self.result(attached["from"], attached["to"], attached, None)
        rows = rollback.list_releases(self.paths, self.service)
        target = rollback.resolve(self.service, rows, self.module.params["to"])
        current = current_digest(self.paths, self.service)
        if target == current:
            return self.result(current, current, None, None)
        data = rollback.decide_data(self.paths, self.service, current, target, self.module.params["data"])
        if self.module.check_mode:
            return self.result(current, target, None, data)
        spec = read_release(self.paths, self.service, target).get("backup") or {}
        put_back = rollback.data_to_put_back(self.paths, spec, data["backup"])
        journal = self.transact(target, "rollback", put_back)
        if journal["to"] != target or journal["state"] != "committed":
            return {**self.failed(journal, target, current), "releases": rows, "data": data}
        return self.result(current, target, journal, data)

    def result(self, previous, target, journal, data):
        """Return what was done, or in check mode what would be."""
        data = data or {"action": "none", "message": "the data was left alone", "backup": None}
        rows = rollback.list_releases(self.paths, self.service)
        named = {row["digest"]: rollback.describe_release({**row, "current": False}) for row in rows}
        changed = previous != target
        verb = "would go" if self.module.check_mode else "went"
        message = (
            f"{self.service} {verb} from {named.get(previous)} to {named.get(target)}; {data['message']}."
        )
        if not changed:
            message = f"{self.service} runs {named.get(target)} already."
        result = {
            "changed": changed,
            "digest": target,
            "previous": previous,
            "switched": changed,
            "restarted": False,
            "gate": switch.read_good(self.paths, self.service)["gate"],
            "journal": journal,
            "removed": [],
            "referenced": self.referenced(),
            "data": data,
            "releases": rows,
            "hold": self.hold(),
            "message": message,
            **self.of_current(target),
        }
        if self.module._diff and changed:
            result["diff"] = self.diff(previous, describe(self.paths, self.service, target))
        return result


class Call(Host):
    """A call with state present."""

    def __init__(self, module):
        """Read and check the arguments."""
        super().__init__(module)
        self.spec = ReleaseSpec(
            **{name: module.params[name] for name in SPEC_FIELDS if module.params[name] is not None}
        )
        self.honours_hold = module.params["hold"]
        parse_gate(self.service, self.spec.gate, self.spec.settings)
        if self.spec.backup:
            check_backup(self.spec.backup)

    def run(self):
        """Bring the host to the release and return the module's result."""
        if self.module.check_mode:
            return self.predict()
        attached = self.finish_pending()
        previous = attached["from"] if attached else current_digest(self.paths, self.service)
        written = write_release(self.spec, self.paths)
        digest = written.digest
        # Where SELinux is on, systemd may start only what has the label of a program (host_baseline has the rule).
        self.module.set_default_selinux_context(
            os.path.join(self.paths.releases(self.service), digest, "run"), False
        )
        journal, reason = attached, "a switch was under way" if attached else None
        kind = attached["kind"] if attached else None
        switched = kind in ("switch", "rollback") and attached["state"] == "committed"
        restarted = kind in ("restart", "restore")
        held = self.held(digest)
        if held:
            return self.stay(held, digest, previous, written)
        hold_ended = bool(self.hold())
        if hold_ended and current_digest(self.paths, self.service) == digest:
            # What is wanted is what serves: there is nothing to hold it from any more.
            switch.end_hold(self.paths, self.service)
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
            "changed": written.changed or bool(journal) or bool(removed) or hold_ended,
            "digest": digest,
            "previous": previous,
            "switched": switched,
            "restarted": restarted,
            "gate": switch.read_good(self.paths, self.service)["gate"],
            "journal": journal,
            "removed": removed,
            "referenced": self.referenced(),
            "hold": None,
            **self.of_current(digest),
        }
        if reason:
            result["reason"] = reason
        if self.module._diff and previous != digest:
            result["diff"] = self.diff(previous, describe(self.paths, self.service, digest))
        return result

    def held(self, digest):
        """Return the hold that keeps the service from the release ``digest``, or None."""
        hold = self.hold()
        return (
            {**hold, "wanted": digest} if hold and self.honours_hold and hold["release"] != digest else None
        )

    def stay(self, held, digest, previous, written):
        """Leave a service that was rolled back where it is, and have the wanted release ready."""
        current = held["release"]
        since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(held["since"]))
        self.module.warn(
            f"{self.service} is held at the release {current}: it was rolled back from {held['instead_of']}"
            f" on {since}. The wanted release {digest} is ready; -e fleetfit_release_hold=false switches to it."
        )
        journal, reason = None, None
        restart_on = read_release(self.paths, self.service, current)["restart_on"]
        why = switch.why_restart(self.paths, self.service, current, restart_on)
        if why and not self.module.check_mode:
            journal = self.transact(current, "restart")
            if journal["state"] != "committed":
                return self.failed(journal, current, previous)
        reason = why
        removed = switch.clean(
            self.paths, self.service, self.keep, also=[digest], check_mode=self.module.check_mode
        )
        serves = self.of_current(current)
        result = {
            "changed": written.changed or bool(why) or bool(removed),
            "digest": current,
            "previous": previous,
            "switched": False,
            "restarted": bool(why),
            "gate": switch.read_good(self.paths, self.service)["gate"],
            "journal": journal,
            "removed": [] if self.module.check_mode else removed,
            "referenced": self.referenced(),
            "hold": held,
            **serves,
        }
        if reason:
            result["reason"] = reason
        if serves["plan"]:
            # The roles that follow go by what this host serves, not by what it was planned to.
            result["ansible_facts"] = {"fleetfit_plan": serves["plan"]}
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
        held = self.held(written.digest)
        if held:
            return self.stay(held, written.digest, previous, written)
        needed = self.needed(written.digest, written)
        result = {
            "changed": written.changed or needed is not None or bool(self.hold()),
            "digest": written.digest,
            "previous": previous,
            "switched": bool(needed) and needed[0] == "switch",
            "restarted": bool(needed) and needed[0] == "restart",
            "gate": switch.read_good(self.paths, self.service)["gate"],
            "journal": None,
            "removed": [],
            "referenced": self.referenced(),
            "hold": None,
            "plan": dict(self.spec.plan),
            "version": self.spec.version or None,
            "environment": self.spec.environment,
            "model": self.spec.gate.get("model"),
        }
        if needed:
            result["reason"] = needed[1]
        if self.module._diff and previous != written.digest:
            result["diff"] = self.diff(previous, describe_spec(self.spec, written.digest))
        return result


def main():
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "rollback", "listed"], "default": "present"},
            "to": {"type": "str", "default": ""},
            "data": {"type": "str", "choices": ["auto", "keep", "restore"], "default": "auto"},
            "hold": {"type": "bool", "default": True},
            "service": {"type": "str", "required": True},
            "argv": {"type": "list", "elements": "str"},
            "environment": {"type": "path"},
            "links": {"type": "dict", "default": {}},
            "model_sha256": {"type": "list", "elements": "str", "default": []},
            "settings": {"type": "dict", "default": {}},
            "files": {"type": "dict", "default": {}},
            "environ": {"type": "dict", "default": {}},
            # Names of credentials, not their values.
            "environ_credentials": {"type": "dict", "default": {}, "no_log": False},
            "plan": {"type": "dict", "default": {}},
            "version": {"type": "str", "default": ""},
            "restart_on": {"type": "list", "elements": "path", "default": []},
            "precheck": {"type": "dict"},
            "gate": {"type": "dict"},
            "backup": {"type": "dict"},
            "conflicts": {"type": "list", "elements": "str", "default": []},
            "keep": {"type": "int", "default": 2},
            "helper": {"type": "path", "default": switch.HELPER},
        },
        required_if=[("state", "present", ["argv", "gate"])],
        supports_check_mode=True,
    )
    try:
        result = (Call if module.params["state"] == "present" else Rollback)(module).run()
    except FleetfitError as error:
        module.fail_json(msg=str(error), code=error.code, remedy=error.remedy)
    except (OSError, subprocess.SubprocessError) as error:
        module.fail_json(msg=f"The release could not be made current: {error}", code="release_failed")
    if result.pop("failed", False):
        module.fail_json(**result)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
