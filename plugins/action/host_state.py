"""Controller-side half of fleetfit.llm.host_state: hands the NVML client and the time to the host."""

from __future__ import annotations

from typing import Any

from ansible_collections.fleetfit.llm.plugins.module_utils.plan import SCHEMA_VERSION, previous_of
from ansible_collections.fleetfit.llm.plugins.plugin_utils.probe_action import ProbeAction


class ActionModule(ProbeAction):
    """Probe a whole host."""

    MODULE_NAME = "fleetfit.llm.host_state"
    TELLS_TIME = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Probe; keep what the next plan needs of the last one, and how long the services took to start.

        These are the facts fleetfit_previous_plan and fleetfit_last_start.
        """
        result = super().run(tmp, task_vars)
        if "ansible_facts" in result:
            sections = (result.get("manifest") or {}).get("sections") or {}
            last = sections.get("plan") or {}
            known = last.get("schema_version") == SCHEMA_VERSION
            # A plan of another version is handed on by its version alone: planning refuses it by name.
            previous = (
                previous_of(last) if known or not last else {"schema_version": last.get("schema_version")}
            )
            result["ansible_facts"]["fleetfit_previous_plan"] = previous
            result["ansible_facts"]["fleetfit_last_start"] = {
                name: service.get("last_start") or {}
                for name, service in (result.get("services") or {}).items()
                if service.get("release")
            }
        return result
