"""What the action plugins of gpu_facts and host_state share: they hand the NVML client to the host."""

from __future__ import annotations

import base64
import datetime
import functools
import importlib.util
import time
import zlib
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.host_facts import settle_clock


@functools.cache
def packed_pynvml() -> str:
    """Return the controller's pinned pynvml.py, compressed, in base64; raises FleetfitError without one."""
    spec = importlib.util.find_spec("pynvml")
    if spec is None or not spec.origin:
        raise FleetfitError(
            "The controller has no pynvml (package nvidia-ml-py), which probes the hosts' GPUs.",
            code="pynvml_missing",
            remedy="Install requirements/controller.txt into the Python that runs Ansible.",
        )
    return base64.b64encode(zlib.compress(Path(spec.origin).read_bytes(), 9)).decode("ascii")


# A host's variable for the option `root`: an inventory of simulated GPUs sets it once, no play needs to.
ROOT_VARIABLE = "fleetfit_probe_root"


def driver_context(*, local: bool) -> dict[str, Any]:
    """Return what a host's driver facts need of the controller: its boot id, the day, the drivers' branches.

    ``local`` says that the connection is: the host is the controller then, whatever its boot id.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # a controller that is no Linux machine cannot be one of the hosts
        boot_id = None
    return {
        "controller_boot_id": boot_id,
        "local_connection": local,
        "branches": known_branches(),
        "today": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


@functools.cache
def known_branches() -> dict[str, dict[str, Any]]:
    """Return end of life and support of each driver branch in catalog/drivers.yml."""
    # Imported here: it needs jsonschema, which a probe without `drivers` does not.
    from ansible_collections.fleetfit.llm.plugins.plugin_utils.catalog_loader import load_drivers

    return {
        str(entry["branch"]): {
            "end_of_life": entry.get("end_of_life"),
            "supported": entry.get("supported", True),
        }
        for entry in load_drivers()["branches"]
    }


class ProbeAction(ActionBase):
    """Run a probing module with the client in its arguments: the host needs nothing and keeps nothing."""

    TRANSFERS_FILES = False
    MODULE_NAME = ""
    TELLS_TIME = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the module on the host; an error of ours fails the task with code and remedy."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        try:
            arguments = {**self._task.args, "pynvml_archive": packed_pynvml()}
        except FleetfitError as error:
            return {**result, "failed": True, "msg": str(error), "code": error.code, "remedy": error.remedy}
        root = (task_vars or {}).get(ROOT_VARIABLE)
        if root and "root" not in arguments:
            arguments["root"] = self._templar.template(root)
        if arguments.get("drivers"):
            arguments["driver_context"] = driver_context(local=self._connection.transport == "local")
        asked_s = time.time()
        if self.TELLS_TIME:
            arguments["reference_time_s"] = asked_s
        answer = self._execute_module(
            module_name=self.MODULE_NAME, module_args=arguments, task_vars=task_vars
        )
        facts = answer.get("ansible_facts", {}).get("fleetfit")
        if self.TELLS_TIME and facts:
            settle_clock(facts, time.time() - asked_s)
        # What the task was asked is shown as the user wrote it, without the archive.
        if "invocation" in answer:
            answer["invocation"] = {"module_args": dict(self._task.args)}
        return {**result, **answer}
