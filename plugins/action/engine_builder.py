"""Action plugin: choose, once for all hosts, which host compiles llama.cpp; without a connection."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_on_host import Wanted, choose_builders


class ActionModule(ActionBase):
    """Look at the facts of all hosts of the play; nothing runs on a host."""

    BYPASS_HOST_LOOP = True
    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the builder and the asker of each build that hosts of this batch lack; none in check mode."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = self.validate_argument_spec({"variable": {"type": "str", "required": True}})[1]
        variables = task_vars or {}
        hostvars = variables["hostvars"]
        lacking: dict[str, Wanted] = {}
        if not self._task.check_mode:
            for host in variables["ansible_play_batch"]:
                # The raw variables alone: templating all of all hosts would cost minutes in a large fleet.
                known = hostvars.raw_get(host)
                found = known.get(arguments["variable"]) or {}
                if found.get("key") and not found.get("archive"):
                    stable = known["ansible_facts"]["fleetfit"]["stable"]
                    lacking[host] = Wanted(found["key"], stable["arch"], stable["os"]["glibc"])
        able, systems = {}, {}
        if lacking:
            for host in variables["ansible_play_hosts"]:
                facts = (hostvars.raw_get(host).get("ansible_facts") or {}).get("fleetfit")
                # Hosts of later batches are known where all were looked at before (site.yml does).
                if facts:
                    systems[host] = facts["stable"]["os"]
                    able[host] = (facts["stable"]["arch"], systems[host]["glibc"])
        builds: dict[str, dict[str, Any]] = {
            key: {**chosen, "os": systems[chosen["builder"]]}
            for key, chosen in choose_builders(lacking, able).items()
        }
        result.update(changed=False, builds=builds)
        return result
