"""The NVIDIA driver's management library, read through ``nvidia-ml-py`` in a child process with a time limit.

A hung driver blocks its callers in the kernel and a broken library can kill them, so the questions are asked
in a child; what comes back is plain data. Nothing here decides: `gpu_facts` makes facts and problems of it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import select
import signal
import sys
import time
import types
from typing import Any, Callable, Optional

# nvmlReturn_t of NVIDIA's nvml.h.
NOT_SUPPORTED = 3
NO_PERMISSION = 4
DRIVER_NOT_LOADED = 9
LIBRARY_NOT_FOUND = 12
GPU_IS_LOST = 15
LIB_RM_VERSION_MISMATCH = 18

# Where the Windows host puts the library for WSL guests, not always on the loader's path.
_WSL_LIBRARY = "/usr/lib/wsl/lib/libnvidia-ml.so.1"
_SONAME = "libnvidia-ml.so.1"
# The most NVLink links of a card (NVML_NVLINK_MAX_LINKS in nvml.h).
_MAX_NVLINK_LINKS = 18
_MIB = 1024 * 1024
# A child's answer is a few KB; what is longer is not an answer.
_ANSWER_LIMIT_BYTES = 4 * _MIB


class ChildError(Exception):
    """The child process gave no answer; the message says how it ended."""


class DeadlineError(ChildError):
    """The child process did not answer in time."""


def call_in_child(function: Callable[[], Any], timeout_s: float) -> Any:
    """Run ``function`` in a forked child and return its JSON-able result.

    The child has none of our files: a child stuck in the kernel must not hold the connection open. Raises
    DeadlineError after ``timeout_s`` seconds and ChildError where the child dies.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover - the child's coverage is not collected
        _child(function, writer)
    os.close(writer)
    try:
        data = _read_all(reader, time.monotonic() + timeout_s)
    except DeadlineError:
        os.kill(pid, signal.SIGKILL)
        _reap(pid)
        raise DeadlineError(f"no answer within {timeout_s:g} s") from None
    finally:
        os.close(reader)
    status = _reap(pid)
    if status is not None and os.WIFSIGNALED(status):
        raise ChildError(f"killed by signal {os.WTERMSIG(status)} ({signal.strsignal(os.WTERMSIG(status))})")
    try:
        answer = json.loads(data.decode("utf-8"))
    except ValueError:
        raise ChildError("ended without an answer") from None
    if "error" in answer:
        raise ChildError(answer["error"])
    return answer["result"]


def _child(function: Callable[[], Any], writer: int) -> None:  # pragma: no cover - runs in the child
    """Answer through ``writer`` and end; never returns."""
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nothing, fd)
        os.closerange(3, writer)
        os.closerange(writer + 1, 4096)
        try:
            answer: dict[str, Any] = {"result": function()}
        except Exception as error:  # the parent reports it; a traceback would help nobody
            answer = {"error": f"{type(error).__name__}: {error}"}
        data = json.dumps(answer).encode("utf-8")
        while data:
            data = data[os.write(writer, data) :]
    finally:
        os._exit(0)


def _read_all(reader: int, deadline: float) -> bytes:
    data = b""
    while len(data) < _ANSWER_LIMIT_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            raise DeadlineError
        chunk = os.read(reader, 65536)
        if not chunk:
            break
        data += chunk
    return data


def _reap(pid: int) -> Optional[int]:
    """Return the child's status, or None where it is stuck in the kernel and cannot even be killed."""
    for _attempt in range(100):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    return None


def load_pynvml(source: Optional[str] = None) -> types.ModuleType:
    """Return the module ``pynvml``: from ``source`` (the text of the controller's copy) or installed."""
    if source is None:
        return importlib.import_module("pynvml")
    module = types.ModuleType("pynvml")
    # The file looks itself up in sys.modules (its error classes).
    sys.modules["pynvml"] = module
    exec(compile(source, "pynvml.py", "exec"), module.__dict__)  # noqa: S102 - our own pinned file
    return module


def read(
    *, pynvml_source: Optional[str] = None, library_path: Optional[str] = None, timeout_s: float = 20
) -> dict[str, Any]:
    """Ask the driver everything at once and return plain data; raises ChildError or DeadlineError.

    ``{"error": null | {"stage": "load" | "init" | "count", "code": int, "text": str}, "driver_version",
    "cuda_version", "devices": [...]}``; a device that cannot be asked has only ``index`` and ``error``.
    """

    def ask() -> dict[str, Any]:
        return Reader(load_pynvml(pynvml_source), library_path).read()

    result: dict[str, Any] = call_in_child(ask, timeout_s)
    return result


class Reader:
    """One reading of everything; runs in the child."""

    def __init__(self, pynvml: types.ModuleType, library_path: Optional[str]) -> None:
        self.nvml: Any = pynvml
        self.library_path = library_path

    def read(self) -> dict[str, Any]:
        """Return the reading as `read` describes it."""
        reading: dict[str, Any] = {"error": None, "driver_version": None, "cuda_version": None, "devices": []}
        try:
            self._load()
        except OSError as error:
            reading["error"] = {"stage": "load", "code": LIBRARY_NOT_FOUND, "text": str(error)}
            return reading
        stage = "init"
        try:
            self.nvml.nvmlInit()
            stage = "count"
            reading["driver_version"] = self._maybe("nvmlSystemGetDriverVersion")
            cuda = self._maybe("nvmlSystemGetCudaDriverVersion_v2") or 0
            # NVML: 1000 * major + 10 * minor.
            reading["cuda_version"] = f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None
            count = self.nvml.nvmlDeviceGetCount()
        except self.nvml.NVMLError as error:
            reading["error"] = {"stage": stage, "code": error.value, "text": self._text(error)}
            return reading
        reading["devices"] = [self._device(index) for index in range(count)]
        self._maybe("nvmlShutdown")
        return reading

    def _load(self) -> None:
        """Load the library that was named, or the loader's, or WSL's; raises the loader's OSError."""
        if self.library_path:
            self.nvml.nvmlLib = ctypes.CDLL(self.library_path)
            return
        try:
            self.nvml.nvmlLib = ctypes.CDLL(_SONAME)
        except OSError:
            if not os.path.exists(_WSL_LIBRARY):
                raise
            self.nvml.nvmlLib = ctypes.CDLL(_WSL_LIBRARY)

    @staticmethod
    def _text(error: Exception) -> str:
        # pynvml shows the bytes of a text that it had to ask the library for.
        text = str(error)
        return text[2:-1] if text.startswith("b'") else text

    def _maybe(self, name: str, *arguments: Any) -> Any:
        """Return what the call returns, or None where driver, card or pynvml cannot tell."""
        try:
            return getattr(self.nvml, name)(*arguments)
        except (self.nvml.NVMLError, AttributeError):
            return None

    def _device(self, index: int) -> dict[str, Any]:
        try:
            handle = self.nvml.nvmlDeviceGetHandleByIndex(index)
            device = self._common(handle)
        except self.nvml.NVMLError as error:
            return {"index": index, "error": {"code": error.value, "text": self._text(error)}}
        device["index"] = index
        pci = self._maybe("nvmlDeviceGetPciInfo", handle)
        if pci is not None:
            device["pci_bus_id"] = _decoded(pci.busId)
            # NVML packs device and vendor into one number: 0x268410DE.
            device["pci_device_id"] = f"{pci.pciDeviceId & 0xFFFF:04x}:{pci.pciDeviceId >> 16:04x}"
        capability = self._maybe("nvmlDeviceGetCudaComputeCapability", handle)
        device["compute_capability"] = f"{capability[0]}.{capability[1]}" if capability else None
        device["display"] = bool(self._maybe("nvmlDeviceGetDisplayActive", handle))
        device["addressing"] = self._maybe("nvmlDeviceGetAddressingMode", handle)
        device["throttle"] = self._maybe("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        device["ecc_uncorrected"] = self._maybe(
            "nvmlDeviceGetTotalEccErrors",
            handle,
            self.nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            self.nvml.NVML_VOLATILE_ECC,
        )
        # Rows corrected, rows not corrected, waits for a reset, could not be replaced; Ampere and later.
        rows = self._maybe("nvmlDeviceGetRemappedRows", handle)
        device["remapped_rows"] = rows and {"pending": bool(rows[2]), "failed": bool(rows[3])}
        device["nvlink_peers"] = self._nvlink_peers(handle)
        mode = self._maybe("nvmlDeviceGetMigMode", handle)
        device["mig_enabled"] = bool(mode and mode[0])
        device["instances"] = self._instances(handle) if device["mig_enabled"] else []
        return device

    def _common(self, handle: Any) -> dict[str, Any]:
        """Return what a card and a MIG instance both have; raises NVMLError where even the UUID fails."""
        device: dict[str, Any] = {"error": None, "uuid": self.nvml.nvmlDeviceGetUUID(handle)}
        device["name"] = self._maybe("nvmlDeviceGetName", handle)
        device["memory"] = device["memory_error"] = None
        try:
            device["memory"] = self._memory(handle)
        except self.nvml.NVMLError as error:
            device["memory_error"] = {"code": error.value, "text": self._text(error)}
        device["processes"] = self._processes(handle)
        return device

    def _memory(self, handle: Any) -> dict[str, Optional[int]]:
        """Return version 2's numbers, which tell reserved memory apart; else version 1's, whose ``used`` has the
        reserved memory in it (seen on an H100, 580.159.04)."""
        reserved: Optional[int] = None
        try:
            info = self.nvml.nvmlDeviceGetMemoryInfo(handle, self.nvml.nvmlMemory_v2)
            reserved = int(info.reserved)
        except self.nvml.NVMLError:
            info = self.nvml.nvmlDeviceGetMemoryInfo(handle)
        return {
            "total_bytes": int(info.total),
            "reserved_bytes": reserved,
            "free_bytes": int(info.free),
            "used_bytes": int(info.used),
        }

    def _processes(self, handle: Any) -> list[dict[str, Any]]:
        """Return each process once: one that computes and draws is in both lists with the same memory."""
        found: dict[int, dict[str, Any]] = {}
        for call in ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3"):
            for process in self._maybe(call, handle) or []:
                used = process.usedGpuMemory
                found.setdefault(
                    int(process.pid),
                    {"pid": int(process.pid), "used_bytes": None if used is None else int(used)},
                )
        return list(found.values())

    def _instances(self, handle: Any) -> list[dict[str, Any]]:
        instances = []
        for index in range(self._maybe("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            instance = self._maybe("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
            if instance is None:
                continue
            try:
                device = self._common(instance)
            except self.nvml.NVMLError:
                continue
            device["mig_profile"] = self._mig_profile(device["name"], instance)
            instances.append(device)
        return instances

    def _mig_profile(self, name: Optional[str], instance: Any) -> Optional[str]:
        """Return ``3g.40gb`` from the instance's name, else from its slices and memory."""
        match = re.search(r"\bMIG (\S+)", name or "")
        if match:
            return match.group(1)
        attributes = self._maybe("nvmlDeviceGetAttributes_v2", instance)
        if attributes is None:
            return None
        return f"{attributes.gpuInstanceSliceCount}g.{(attributes.memorySizeMB + 1023) // 1024}gb"

    def _nvlink_peers(self, handle: Any) -> list[str]:
        peers = set()
        for link in range(_MAX_NVLINK_LINKS):
            if not self._maybe("nvmlDeviceGetNvLinkState", handle, link):
                continue
            pci = self._maybe("nvmlDeviceGetNvLinkRemotePciInfo", handle, link)
            if pci is not None:
                peers.add(_decoded(pci.busId))
        return sorted(peers)


def _decoded(text: Any) -> str:
    return text.decode("ascii", "replace") if isinstance(text, bytes) else str(text)
