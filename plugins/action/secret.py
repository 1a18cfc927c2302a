"""Controller-side half of fleetfit.llm.secret: decides which secret it is, and keeps it in the store."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.secret import (
    check_value,
    generate,
    read_secret,
    write_secret,
)

# AWX and AAP run in execution environments whose disk is gone after the job: this is in a job's environment,
# and the job's number among its variables. AWX_ISOLATED_DATA_DIR is no mark: every ansible-runner sets it.
EPHEMERAL_ENVIRONMENT = "AWX_PRIVATE_DATA_DIR"
EPHEMERAL_VARIABLES = ("awx_job_id", "tower_job_id")


class ActionModule(ActionBase):
    """Take the secret from the variable, the store, the host, or generate it; write it to the host."""

    TRANSFERS_FILES = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return ``changed``, ``path`` and ``origin``; never the secret."""
        super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        try:
            return self._run(arguments, task_vars or {})
        except FleetfitError as error:
            return {"failed": True, "msg": str(error), "code": error.code, "remedy": error.remedy}

    def _run(self, arguments: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        name, folder = str(arguments.get("name", "")), str(arguments.get("store_dir") or "")
        if "/" in name or name.startswith("."):
            raise FleetfitError(
                f"'{name}' is not a secret's name.", code="bad_secret", remedy="Use a plain file name."
            )
        store = Path(folder).expanduser() / name if folder else None
        secret, origin = str(arguments.get("value") or "") or None, "value"
        if secret is None and store is not None:
            secret, origin = read_secret(str(store)), "store"
        if secret is None:
            found = self._host("read", arguments, task_vars)
            if found.get("failed") or found.get("unreachable"):
                return found
            content = found.get("content")
            secret, origin = base64.b64decode(content).decode() if content else None, "host"
        if secret is None:
            origin = "generated"
            if self._task.check_mode:
                return {"changed": True, "path": arguments.get("path"), "origin": origin}
            secret = generate(int(arguments.get("length") or 32))
        check_value(name, secret)
        marks = [mark for mark in EPHEMERAL_VARIABLES if mark in task_vars]
        if os.environ.get(EPHEMERAL_ENVIRONMENT):
            marks.append(EPHEMERAL_ENVIRONMENT)
        stored = origin in ("host", "generated") and self._keep(
            store, name, secret, generated=origin == "generated", ephemeral=next(iter(marks), None)
        )
        result = self._host("write", {**arguments, "value": secret}, task_vars)
        if not result.get("failed") and not result.get("unreachable"):
            result.update(changed=bool(result.get("changed") or stored), origin=origin)
        return result

    def _host(self, step: str, arguments: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        """Run the module on the host; nothing secret is sent for reading."""
        sent = {key: value for key, value in arguments.items() if step == "write" or key != "value"}
        result: dict[str, Any] = self._execute_module(
            module_name="fleetfit.llm.secret", module_args={**sent, "step": step}, task_vars=task_vars
        )
        result.pop("invocation", None)
        return result

    def _keep(
        self, store: Path | None, name: str, secret: str, *, generated: bool, ephemeral: str | None
    ) -> bool:
        """Put the secret into the store; return whether it was new there; raise where it would be lost."""
        if store is None or ephemeral:
            if generated:
                why = (
                    f"this controller's disk does not last ({ephemeral})"
                    if ephemeral
                    else "there is no store"
                )
                raise FleetfitError(
                    f"The secret {name} would be generated and lost, since {why}.",
                    code="no_secret_store",
                    remedy="Give it as a variable (from a vault, say), or set fleetfit_secrets_dir.",
                )
            return False
        if self._task.check_mode:
            return True
        try:
            store.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Whatever repository the folder lies in: secrets do not get into it.
            ignore = store.parent / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n", encoding="ascii")
            return write_secret(str(store), secret)
        except OSError as error:
            raise FleetfitError(
                f"The secret {name} cannot be kept in {store.parent}: {error.strerror}.",
                code="no_secret_store",
                remedy="Make the folder writable, or set fleetfit_secrets_dir to one that is.",
            ) from error
