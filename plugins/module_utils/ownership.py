"""Whose process is it: ours or somebody else's, told by the systemd unit that its cgroup belongs to."""

from __future__ import annotations

from typing import Optional

from .probe_root import ProbeRoot

# Units of ours that keep a fixed name; every other unit of ours begins with the prefix.
SERVICES = ("llama-server", "vllm", "open-webui")
ENGINES = ("llama-server", "vllm")
UNIT_PREFIX = "fleetfit-"
_UNIT_DIRECTORY = "/etc/systemd/system"
_OUR_TREE = "/opt/fleetfit/"
_INIT_SCOPE = "/init.scope"


class Ownership:
    """Tells the owner of a process on one host; reads unit files once."""

    def __init__(self, root: ProbeRoot) -> None:
        self._root = root
        # The names are common ones: somebody's own llama-server.service is not ours.
        self._units: set[str] = {
            f"{service}.service"
            for service in SERVICES
            if _OUR_TREE in (root.read(f"{_UNIT_DIRECTORY}/{service}.service") or "")
        }
        # In a container on a cgroup v1 machine every path begins with the container's own.
        self._prefixes = {
            path[: -len(_INIT_SCOPE)] for path in self._cgroups(1) if path.endswith(_INIT_SCOPE)
        } | {""}

    def owner(self, pid: int) -> str:
        """Return ``fleetfit`` for a process of one of our units, else ``other``."""
        return "fleetfit" if self.unit(pid) else "other"

    def unit(self, pid: int) -> Optional[str]:
        """Return the name of our unit that the process belongs to, or None."""
        for path in self._cgroups(pid):
            for prefix in self._prefixes:
                if path.startswith(prefix + "/"):
                    unit = self._unit_in(path[len(prefix) :])
                    if unit:
                        return unit
        return None

    def engine_runs(self) -> bool:
        """Return whether any process belongs to an engine of ours."""
        engines = {f"{service}.service" for service in ENGINES}
        return any(self.unit(int(name)) in engines for name in self._root.names("/proc") if name.isdecimal())

    def _unit_in(self, path: str) -> Optional[str]:
        """Return our unit in a path below the system manager's own: slices, then the unit."""
        for part in path.strip("/").split("/"):
            if part.endswith(".slice"):
                if part.startswith("user"):
                    return None
                continue
            return part if part in self._units or part.startswith(UNIT_PREFIX) else None
        return None

    def _cgroups(self, pid: int) -> list[str]:
        """Return the cgroup paths of a process: one on cgroup v2, one per hierarchy on v1."""
        lines = (self._root.read(f"/proc/{pid}/cgroup") or "").splitlines()
        return [line.split(":", 2)[2] for line in lines if line.count(":") >= 2]
