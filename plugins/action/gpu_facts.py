"""Controller-side half of fleetfit.llm.gpu_facts: hands the NVML client to the host."""

from __future__ import annotations

from ansible_collections.fleetfit.llm.plugins.plugin_utils.probe_action import ProbeAction


class ActionModule(ProbeAction):
    """Probe a host's GPUs."""

    MODULE_NAME = "fleetfit.llm.gpu_facts"
