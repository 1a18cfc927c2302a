"""Controller-side half of fleetfit.llm.verify_host: names the host, and keeps its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.fleetfit.llm.plugins.module_utils.verify import sentence


class ActionModule(ActionBase):
    """Run the module on the host; write its report to a folder of the controller where one is named."""

    TRANSFERS_FILES = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the module's result."""
        super().run(tmp, task_vars)
        variables = task_vars or {}
        host = str(variables.get("inventory_hostname", "host"))
        result: dict[str, Any] = self._execute_module(task_vars=variables)
        report = result.get("report")
        if not isinstance(report, dict):
            return result
        report = {"host": host, **report}
        result["report"] = report
        if report["state"] != "ok":
            result["msg"] = sentence(host, report)
        folder = self._task.args.get("report_dir")
        if folder:
            result["report_file"] = str(write_report(Path(folder), host, report))
        return result


def write_report(folder: Path, host: str, report: dict[str, Any]) -> Path:
    """Write the host's report, readable by its owner alone since it holds journal lines; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{host}.json"
    temporary = folder / f".{host}.json.new"
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path
