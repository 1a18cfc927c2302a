"""Action plugin: decide what to do about a host's driver, on the controller and without a connection."""

from __future__ import annotations

import datetime
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.fleetfit.llm.plugins.module_utils.driver_decision import Wanted, decide
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_drivers


class ActionModule(ActionBase):
    """Return the decision as the fact fleetfit_driver."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Decide; an error of ours fails the task with code and remedy."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = self.validate_argument_spec({"wanted": {"type": "dict", "required": True}})[1]
        state = (task_vars or {}).get("ansible_facts", {}).get("fleetfit_drivers")
        try:
            if state is None and arguments["wanted"].get("source") != "none":
                raise FleetfitError(
                    "The driver's facts of this host are not there.",
                    code="driver_facts_missing",
                    remedy="Run fleetfit.llm.gpu_facts with drivers: true first.",
                )
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            wanted = Wanted.from_dict({"today": today, **arguments["wanted"]})
            decision = decide(wanted, state or {"schema_version": 1}, load_drivers())
        except FleetfitError as error:
            return {**result, "failed": True, "msg": str(error), "code": error.code, "remedy": error.remedy}
        result.update(changed=False, ansible_facts={"fleetfit_driver": decision}, decision=decision)
        return result
