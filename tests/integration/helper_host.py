"""What a host with the host helper offers to tests, be it a container or a virtual machine."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from ansible_collections.fleetfit.llm.plugins.plugin_utils.helper_zip import (
    MODULE_UTILS,
    build_helper_zip,
    pack_modules,
)

HELPER = "/opt/fleetfit/libexec/current/fleetfit-host.pyz"
# All module_utils, for tests that call in a host what no subcommand of the helper does.
ALL_MODULES = "/srv/fleetfit-all-modules.pyz"


class HelperHost:
    """Commands in a host, for classes that know how to run one there and how to write a file."""

    def run(self, *command: str, stdin: str = "", check: bool = True, timeout_s: float = 300) -> str:
        """Run a command in the host and return what it wrote to standard output."""
        done = self.run_raw(*command, stdin=stdin, timeout_s=timeout_s)
        if check and done.returncode != 0:
            raise AssertionError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return str(done.stdout)

    def run_raw(
        self, *command: str, stdin: str = "", timeout_s: float = 300, environ: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the host and return all of its result."""
        raise NotImplementedError

    def put(self, path: str, content: str | bytes, mode: str = "0644") -> None:
        """Write a file into the host."""
        raise NotImplementedError

    def install_helper(self) -> None:
        """Put the helper where hosts have it."""
        self.put("/opt/fleetfit/libexec/test/fleetfit-host.pyz", build_helper_zip(), "0755")
        self.run("ln", "-sfn", "test", "/opt/fleetfit/libexec/current")
        self.put(ALL_MODULES, pack_modules(path.stem for path in MODULE_UTILS.glob("*.py")))

    def python(self, code: str, *arguments: str, timeout_s: float = 300) -> Any:
        """Run Python code in the host with our modules; return the JSON that it prints last."""
        prefix = f"import sys, json; sys.path.insert(0, {ALL_MODULES!r})\n"
        text = self.run("python3", "-", *arguments, stdin=prefix + code, timeout_s=timeout_s)
        return json.loads(text.strip().splitlines()[-1]) if text.strip() else None

    def show(self, unit: str, name: str) -> str:
        """Return one property of a unit."""
        return self.run("systemctl", "show", unit, f"--property={name}", "--value").strip()
