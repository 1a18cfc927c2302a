"""Which build of vLLM runs on a host: the rows of catalog/engines.yml against driver, GPUs and Python.

The planner asks whether any build could use the host's GPUs; the role asks which of the wheelhouses that it
was given is the right one. Both read the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from .errors import FleetfitError
from .host_view import compute_capability_number, leading_number
from .python_runtime import choose_environment

SERVICE = "vllm"
CPU = "cpu"


@dataclass(frozen=True)
class Wheel:
    """One published build; ``cuda``, ``min_driver`` and ``min_compute_capability`` are null for the CPU's."""

    variant: str
    release: str
    requirement: str
    pythons: tuple[str, ...]
    archs: tuple[str, ...]
    min_glibc: str
    locks: tuple[str, ...] = ()
    cuda: Optional[str] = None
    min_driver: Optional[str] = None
    min_compute_capability: Optional[str] = None
    source: str = ""

    def __str__(self) -> str:
        """Return the build as messages name it."""
        built_for = "the CPU" if self.cuda is None else f"CUDA {self.cuda}"
        return f"vLLM {self.release} for {built_for} (variant {self.variant})"


@dataclass(frozen=True)
class WheelProblem:
    """Why a build does not run on a host; ``device`` is the position of the GPU that it is about."""

    code: str
    reason: str
    remedy: str
    device: Optional[int] = None

    def error(self) -> FleetfitError:
        """Return the problem as an error."""
        return FleetfitError(f"{self.reason}.", code=self.code, remedy=self.remedy)


def wheels_of(engines: Mapping[str, Any]) -> tuple[Wheel, ...]:
    """Return the builds of catalog/engines.yml, the preferred one first."""
    rows: list[dict[str, Any]] = engines["engines"]["vllm"]["wheels"]
    found = []
    for row in rows:
        fields: dict[str, Any] = dict(row)
        for name in ("pythons", "archs", "locks"):
            fields[name] = tuple(fields[name])
        found.append(Wheel(**fields))
    return tuple(found)


def able_devices(
    wheels: Sequence[Wheel], capabilities: Sequence[Optional[str]], least: str = "0.0"
) -> list[int]:
    """Return the positions of the GPUs that some build has code for; ``least`` is what a format needs."""
    return [
        index
        for index, capability in enumerate(capabilities)
        if any(_capable(wheel, capability, least) for wheel in wheels if wheel.cuda is not None)
    ]


def gpu_problem(
    wheels: Sequence[Wheel],
    devices: Sequence[tuple[str, Optional[str]]],
    driver_version: Optional[str],
    *,
    scheme: str = "",
    least: str = "0.0",
) -> Optional[WheelProblem]:
    """Return why no build can use any of the devices (name, compute capability), or None where one can.

    The compute capability comes first: a newer driver does not help a card that no build has code for.
    """
    able = [
        wheel
        for wheel in wheels
        if wheel.cuda is not None and any(_capable(wheel, device[1], least) for device in devices)
    ]
    if not able:
        best = max(
            range(len(devices)), key=lambda index: compute_capability_number(devices[index][1] or "0.0")
        )
        name, capability = devices[best]
        lowest = min(
            (wheel for wheel in wheels if wheel.cuda is not None),
            key=lambda wheel: compute_capability_number(wheel.min_compute_capability or "0.0"),
        )
        needed = max(lowest.min_compute_capability or "0.0", least, key=compute_capability_number)
        return WheelProblem(
            "compute_capability_too_low",
            f"{name} has compute capability {capability or 'unknown'}; {lowest} needs {needed}"
            + (f" for {scheme}" if scheme else ""),
            "Use fleetfit_engine=llama_cpp on this host: its builds for CUDA go further back.",
            device=best,
        )
    least_wheel = min(able, key=lambda wheel: leading_number(wheel.min_driver or "0"))
    if driver_version and leading_number(driver_version) >= leading_number(least_wheel.min_driver or "0"):
        return None
    return WheelProblem(
        "driver_too_old",
        f"driver {driver_version or 'none'} is older than {least_wheel.min_driver}, which {least_wheel} needs",
        f"Install driver branch {able[0].min_driver} or newer, or use fleetfit_engine=llama_cpp.",
    )


def host_problem(wheel: Wheel, *, arch: str, glibc: str) -> Optional[WheelProblem]:
    """Return why a build does not start on this architecture or C library, or None."""
    if arch not in wheel.archs:
        return WheelProblem(
            "arch_not_supported",
            f"{wheel} is built for {' and '.join(wheel.archs)}, and this host is {arch}",
            "Use fleetfit_engine=llama_cpp on this host.",
        )
    if compute_capability_number(glibc) < compute_capability_number(wheel.min_glibc):
        return WheelProblem(
            "glibc_too_old",
            f"{wheel} needs glibc {wheel.min_glibc} or newer, and this host has {glibc}",
            "Upgrade the system, or use fleetfit_engine=llama_cpp.",
        )
    return None


def fitting_wheels(
    wheels: Sequence[Wheel],
    *,
    arch: str,
    glibc: str,
    devices: Sequence[tuple[str, Optional[str]]],
    driver_version: Optional[str],
    on_cpu: bool = False,
) -> tuple[Wheel, ...]:
    """Return the builds that run on a host with all of these devices, the preferred one first.

    ``on_cpu`` asks for those without CUDA. Raises FleetfitError naming what is too old and what is needed.
    """
    wanted = [wheel for wheel in wheels if (wheel.cuda is None) == on_cpu]
    if not wanted:
        raise FleetfitError(
            "catalog/engines.yml has no such build of vLLM.", code="unknown_wheel", remedy="Add a row to it."
        )
    problems = [host_problem(wheel, arch=arch, glibc=glibc) for wheel in wanted]
    wanted = [wheel for wheel, problem in zip(wanted, problems) if problem is None]
    if not wanted:
        raise next(problem for problem in problems if problem is not None).error()
    if on_cpu:
        return tuple(wanted)
    if not devices:
        raise FleetfitError(
            "This host's plan names no GPU, and vLLM is planned for GPUs.",
            code="no_gpu",
            remedy="Plan the host again, or use fleetfit_engine=llama_cpp.",
        )
    for device in devices:
        problem = gpu_problem(wanted, [device], driver_version)
        if problem is not None:
            raise problem.error()
    fitting = [
        wheel
        for wheel in wanted
        if all(gpu_problem([wheel], [device], driver_version) is None for device in devices)
    ]
    if not fitting:
        names = ", ".join(f"{name} ({capability})" for name, capability in devices)
        raise FleetfitError(
            f"No one build of vLLM runs on all of {names} with driver {driver_version}.",
            code="no_common_wheel",
            remedy="Plan for fewer GPUs of this host, or use fleetfit_engine=llama_cpp.",
        )
    return tuple(fitting)


def choose_vllm_environment(
    engines: Mapping[str, Any],
    wheelhouses: Sequence[Mapping[str, Any]],
    archives: Sequence[Mapping[str, Any]],
    *,
    system_python: str,
    arch: str,
    glibc: str,
    devices: Sequence[tuple[str, Optional[str]]] = (),
    driver_version: Optional[str] = None,
    on_cpu: bool = False,
) -> dict[str, Any]:
    """Return what choose_environment returns for the right wheelhouse, with ``variant`` and ``release`` of it.

    A wheelhouse is an entry of python_runtime's with ``variant`` and, where it is not the variant's first
    row, ``release``. Of those that run on the host, the data's order decides, then the list's. Raises
    FleetfitError before anything is installed: ``driver_too_old``, ``compute_capability_too_low``,
    ``unknown_wheel``, ``below_security_floor``, ``python_not_supported``, ``no_wheelhouse_of_variant``,
    ``no_fitting_wheelhouse``, ``no_fitting_python``.
    """
    wheels = wheels_of(engines)
    offered = [(entry, _wheel_of(wheels, entry)) for entry in wheelhouses]
    floor = str(engines["engines"]["vllm"]["security_floor"])
    for entry, wheel in offered:
        if _version(wheel.release) < _version(floor):
            raise FleetfitError(
                f"vLLM {wheel.release} is below {floor}, the oldest release without a known hole.",
                code="below_security_floor",
                remedy="Build a wheelhouse of a newer release (tools/lock_environment vllm).",
            )
        if str(entry["python"]) not in wheel.pythons:
            raise FleetfitError(
                f"{wheel} runs on Python {wheel.pythons[0]} to {wheel.pythons[-1]}, and a wheelhouse of it is"
                f" for {entry['python']}.",
                code="python_not_supported",
                remedy="Build the wheelhouse for one of these.",
            )
    fitting = fitting_wheels(
        wheels, arch=arch, glibc=glibc, devices=devices, driver_version=driver_version, on_cpu=on_cpu
    )
    usable = [wheel for wheel in fitting if any(item[1] == wheel for item in offered)]
    if not usable:
        raise _no_wheelhouse(fitting, [item[1] for item in offered], driver_version)
    refused: Optional[FleetfitError] = None
    for wheel in usable:
        entries = [
            {key: value for key, value in entry.items() if key not in ("variant", "release")}
            for entry, other in offered
            if other == wheel
        ]
        try:
            chosen = choose_environment(
                SERVICE, entries, archives, system_python=system_python, arch=arch, glibc=glibc
            )
        except FleetfitError as error:
            refused = refused or error
            continue
        return {**chosen, "variant": wheel.variant, "release": wheel.release}
    raise refused or _no_wheelhouse(fitting, [], driver_version)


def wheel_of_requirements(wheels: Sequence[Wheel], requirements: Sequence[str]) -> Optional[Wheel]:
    """Return the build that a list of ``name==version`` holds, or None where there is none of vLLM."""
    return next((wheel for wheel in wheels if wheel.requirement in requirements), None)


def _wheel_of(wheels: Sequence[Wheel], entry: Mapping[str, Any]) -> Wheel:
    variant, release = entry.get("variant"), entry.get("release")
    for wheel in wheels:
        if wheel.variant == variant and release in (None, "", wheel.release):
            return wheel
    known = ", ".join(f"{wheel.variant} {wheel.release}" for wheel in wheels)
    raise FleetfitError(
        f"vllm_wheelhouses has a wheelhouse of variant {variant!r}" + (f" {release}" if release else "") + ","
        " of which it is not known where it runs.",
        code="unknown_wheel",
        remedy=f"Known are {known}; a new release is a row in catalog/engines.yml.",
    )


def _no_wheelhouse(
    fitting: Sequence[Wheel], offered: Sequence[Wheel], driver_version: Optional[str]
) -> FleetfitError:
    first = fitting[0]
    names = list(dict.fromkeys(str(wheel) for wheel in offered))
    reason = f"This host runs {first}" + (f", and its driver is {driver_version}" if first.cuda else "")
    if offered:
        needs = [
            f"{wheel} needs driver {wheel.min_driver}"
            for wheel in dict.fromkeys(offered)
            if wheel.min_driver and first.cuda
        ]
        reason += f"; vllm_wheelhouses has only {', '.join(names)}"
        reason += f" ({'; '.join(needs)})" if needs else ""
    else:
        reason += "; vllm_wheelhouses is empty"
    locks = next((wheel.locks for wheel in fitting if wheel.locks), ())
    remedy = "Build one of that variant"
    remedy += f": `fleetfit wheelhouse build --lock {locks[0]}`." if locks else " with a lock of your own."
    if first.cuda and offered:
        remedy += " Or change the driver's branch (the role nvidia_driver)."
    return FleetfitError(f"{reason}.", code="no_wheelhouse_of_variant", remedy=remedy)


def _capable(wheel: Wheel, capability: Optional[str], least: str = "0.0") -> bool:
    floor = max(
        compute_capability_number(wheel.min_compute_capability or "0.0"), compute_capability_number(least)
    )
    return compute_capability_number(capability or "0.0") >= floor


def _version(text: str) -> tuple[int, ...]:
    return tuple(leading_number(part) for part in text.split("."))
