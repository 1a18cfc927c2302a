"""Action plugin: build llama.cpp on the controller, without a connection."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_build import (
    DEFAULT_SHA256,
    DEFAULT_VERSION,
    EngineBuild,
)
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_on_controller import (
    build_engine,
    cpu_baseline,
)


class ActionModule(ActionBase):
    """Find or make the build; nothing runs on a host."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the archive of the build, or the error as a sentence."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            {
                "version": {"type": "str", "default": DEFAULT_VERSION},
                "source_sha256": {"type": "str"},
                "backend": {"type": "str", "choices": ["cpu", "cuda"], "default": "cpu"},
                "arch": {"type": "str", "required": True},
                "glibc": {"type": "str", "required": True},
                "cpu_isa": {"type": "list", "elements": "str", "required": True},
            }
        )
        checksum = arguments["source_sha256"] or (
            DEFAULT_SHA256 if arguments["version"] == DEFAULT_VERSION else None
        )
        if checksum is None:
            result.update(
                failed=True,
                code="engine_build_unpinned",
                msg=f"llama.cpp {arguments['version']} has no checksum: set llama_cpp_build_source_sha256.",
            )
            return result
        build = EngineBuild(
            version=arguments["version"],
            source_sha256=checksum,
            backend=arguments["backend"],
            cpu_baseline=cpu_baseline(arguments["cpu_isa"]),
            arch=arguments["arch"],
        )
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fleetfit"
        try:
            outcome = build_engine(
                build, glibc=arguments["glibc"], cache=cache, only_look=self._task.check_mode
            )
        except FleetfitError as error:
            result.update(failed=True, msg=str(error), code=error.code, remedy=error.remedy)
            return result
        result.update(changed=outcome["built"], key=outcome["key"], archive=outcome["archive"])
        return result
