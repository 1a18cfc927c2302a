"""Action plugin: have a host compile llama.cpp, and bring the result into the controller's cache."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_build import (
    EngineBuild,
    build_script,
    finished_build,
)
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_on_controller import locked
from ansible_collections.fleetfit.llm.plugins.plugin_utils.engine_on_host import source_archive, take_result
from ansible_collections.fleetfit.llm.plugins.plugin_utils.pip_fetch import file_sha256

display = Display()

BUILDS = "/var/lib/fleetfit/build"
# How long one execution of the module waits for the unit: a lost connection is noticed that soon.
WAIT_S = 30
RECONNECT_S, RECONNECT_PAUSE_S = 600, 10


class ActionModule(ActionBase):
    """Push the source as one file, wait for the unit that compiles it, fetch what it made once."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the key of the build; a failed compilation has the last lines of its log."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = self.validate_argument_spec(
            {"build": {"type": "dict", "required": True}, "host": {"type": "str", "required": True}}
        )[1]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fleetfit"
        try:
            build = EngineBuild(**arguments["build"])
            folder = cache / "engine" / build.key()
            with locked(folder / "lock"):
                if finished_build(build, cache) is not None:  # by another run meanwhile
                    return {**result, "changed": False, "key": build.key()}
                return {**result, **self._compile(build, cache, folder, arguments["host"], task_vars or {})}
        except FleetfitError as error:
            return {**result, "failed": True, "msg": str(error), "code": error.code, "remedy": error.remedy}
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)

    def _compile(
        self, build: EngineBuild, cache: Path, folder: Path, host: str, task_vars: dict[str, Any]
    ) -> dict[str, Any]:
        directory = f"{BUILDS}/{build.key()}"
        brought = self._bring_source(source_archive(build, folder), directory, task_vars)
        if brought.get("failed") or brought.get("unreachable"):
            return brought
        step: dict[str, Any] = {
            "directory": directory,
            "key": build.key(),
            # Every core: the script's own number of jobs is the host's.
            "script": build_script(build, "$(nproc)"),
            "start": True,
        }
        while True:
            answer = self._module(step, task_vars, patient=not step["start"])
            if answer.get("failed") or answer.get("unreachable"):
                return answer
            if answer["state"] == "finished":
                break
            display.v(
                f"{host}: compiling llama.cpp {build.version}: {answer['log_tail'][-1:] or ['started']}"
            )
            step["start"] = False
        local = folder / "from-host.tar.gz"
        self._connection.fetch_file(answer["archive"], str(local))
        take_result(build, cache, local, answer["sha256"])
        self._module({**step, "start": False, "state": "absent"}, task_vars, patient=False)
        return {
            "changed": True,
            "key": build.key(),
            "warnings": [
                f"llama.cpp {build.version} was compiled on {host}, for all hosts; the compiler and CMake that were"
                " installed there for it stay."
            ],
        }

    def _bring_source(self, archive: Path, directory: str, task_vars: dict[str, Any]) -> dict[str, Any]:
        task = self._task.copy()
        task.args = {
            "artifacts": [
                {
                    "name": archive.name,
                    "size": archive.stat().st_size,
                    "sha256": file_sha256(archive),
                    "dest": f"{directory}/source.tar.gz",
                    "unpack": {"dest": f"{directory}/source", "strip": 0, "creates": "CMakeLists.txt"},
                    "sources": [{"type": "file", "path": str(archive), "location": "controller"}],
                }
            ]
        }
        action = self._shared_loader_obj.action_loader.get(
            "fleetfit.llm.artifact",
            task=task,
            connection=self._connection,
            play_context=self._play_context,
            loader=self._loader,
            templar=self._templar,
            shared_loader_obj=self._shared_loader_obj,
        )
        return dict(action.run(task_vars=task_vars))

    def _module(self, step: dict[str, Any], task_vars: dict[str, Any], *, patient: bool) -> dict[str, Any]:
        """Run the module once; while the unit compiles without us, wait for a host that went away."""
        deadline = time.monotonic() + RECONNECT_S
        while True:
            try:
                return dict(
                    self._execute_module(
                        module_name="fleetfit.llm.engine_compile",
                        module_args={**step, "wait_s": WAIT_S},
                        task_vars=task_vars,
                    )
                )
            except AnsibleConnectionFailure as error:
                if not patient or time.monotonic() > deadline:
                    raise
                display.v(f"connection lost ({error}); the compilation goes on, trying again")
                time.sleep(RECONNECT_PAUSE_S)
                self._connection.reset()
