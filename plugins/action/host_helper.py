"""Controller-side half of fleetfit.llm.host_helper: sends the helper only to hosts that lack it."""

from __future__ import annotations

import base64
import hashlib
import zlib
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.helper_zip import build_helper_zip


class ActionModule(ActionBase):
    """Ask whether the host has the helper's digest; send the bytes where it has not."""

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset({"libexec_dir"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the module once, and once more with the archive where it is missing."""
        result = super().run(tmp, task_vars)
        unknown = sorted(set(self._task.args) - self._VALID_ARGS)
        if unknown:
            raise AnsibleActionFail(
                f"Unsupported options for fleetfit.llm.host_helper: {', '.join(unknown)}."
            )
        try:
            archive = build_helper_zip()
        except FleetfitError as error:
            return {**result, "failed": True, "msg": str(error), "code": error.code, "remedy": error.remedy}
        arguments = {**self._task.args, "sha256": hashlib.sha256(archive).hexdigest()}
        answer = self._install(arguments, task_vars)
        if answer.get("missing") and not self._task.check_mode:
            packed = base64.b64encode(zlib.compress(archive, 9)).decode()
            answer = self._install({**arguments, "archive": packed}, task_vars)
        answer.pop("missing", None)
        answer.pop("invocation", None)  # it would show the archive
        return {**result, **answer}

    def _install(self, arguments: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        return dict(
            self._execute_module(
                module_name="fleetfit.llm.host_helper", module_args=arguments, task_vars=task_vars
            )
        )
