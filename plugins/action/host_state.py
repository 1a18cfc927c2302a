"""Controller-side half of fleetfit.llm.host_state: hands the NVML client and the time to the host."""

from __future__ import annotations

from ansible_collections.fleetfit.llm.plugins.plugin_utils.probe_action import ProbeAction


class ActionModule(ProbeAction):
    """Probe a whole host."""

    MODULE_NAME = "fleetfit.llm.host_state"
    TELLS_TIME = True
