"""Action plugin: print the NVIDIA drivers of all hosts of the play once, without a connection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.fleetfit.llm.plugins.plugin_utils.driver_table import drivers_json, drivers_text

display = Display()


class ActionModule(ActionBase):
    """Print one table; nothing runs on a host."""

    BYPASS_HOST_LOOP = True
    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the text, show it as it is, and write the report where a path is given."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = self.validate_argument_spec({"path": {"type": "path"}})[1]
        variables = task_vars or {}
        hosts = {
            host: (variables["hostvars"].raw_get(host).get("ansible_facts") or {}).get("fleetfit_drivers")
            for host in variables["ansible_play_hosts_all"]
        }
        if arguments["path"]:
            try:
                Path(arguments["path"]).write_text(drivers_json(hosts), encoding="utf-8")
            except OSError as error:
                result.update(
                    failed=True,
                    msg=f"The report cannot be written to {arguments['path']}: {error.strerror}.",
                    code="report_not_written",
                    remedy="Give a path in a directory that is there and that you may write to.",
                )
                return result
        text = drivers_text(hosts)
        display.display(f"\n{text}\n")
        result.update(changed=False, table=text, path=arguments["path"])
        return result
