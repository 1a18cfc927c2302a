"""Action plugin: find a build of llama.cpp for a host, or make it on the controller; without a connection."""

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
                "build_on": {
                    "type": "str",
                    "choices": ["oldest_host", "controller"],
                    "default": "controller",
                },
                "required": {"type": "bool", "default": False},
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
        on_host = arguments["build_on"] == "oldest_host"
        try:
            outcome = build_engine(
                build, glibc=arguments["glibc"], cache=cache, only_look=self._task.check_mode or on_host
            )
            if outcome["archive"] is None and arguments["required"] and not self._task.check_mode:
                raise FleetfitError(
                    f"There is no build of llama.cpp {build.version} ({build.backend}, {build.cpu_baseline}) for"
                    f" glibc {arguments['glibc']}: the host that was to make it has failed.",
                    code="engine_build_missing",
                    remedy="Mend what is said of that host above, or set llama_cpp_build_on to controller.",
                )
        except FleetfitError as error:
            result.update(failed=True, msg=str(error), code=error.code, remedy=error.remedy)
            return result
        result.update(
            # On a host it is only looked for here; the task that compiles there says what it changed.
            changed=outcome["built"] and (self._task.check_mode or not on_host),
            key=outcome["key"],
            archive=outcome["archive"],
            build=build.identity(),
        )
        return result
