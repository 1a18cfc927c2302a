"""Action plugin: print the plan of all hosts of the play once, without a connection."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.fleetfit.llm.plugins.plugin_utils.plan_table import plan_text

display = Display()


class ActionModule(ActionBase):
    """Print one table; nothing runs on a host."""

    BYPASS_HOST_LOOP = True
    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the text, and show it as it is."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec({"candidates": {"type": "bool", "default": False}})
        variables = task_vars or {}
        hosts, starts = {}, {}
        for host in variables["ansible_play_hosts_all"]:
            # The facts alone: templating all variables of all hosts would cost minutes in a large fleet.
            facts = variables["hostvars"].raw_get(host).get("ansible_facts") or {}
            hosts[host] = (facts.get("fleetfit"), facts.get("fleetfit_plan"))
            starts[host] = facts.get("fleetfit_last_start")
        text = plan_text(hosts, candidates=arguments["candidates"], last_starts=starts)
        display.display(f"\n{text}\n")
        result.update(changed=False, table=text)
        return result
