"""What to do about a host's NVIDIA driver: settings, what is there and catalog data in; a decision out.

Pure: nothing here asks a host, a clock or a network. The shapes are those of docs/contracts.md, sections 14 and 15;
the data is catalog/drivers.yml.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from . import driver_files
from .errors import FleetfitError

SCHEMA_VERSION = 1
SOURCES = ("auto", "distribution", "nvidia", "none")
FLAVOURS = ("auto", "open", "proprietary")
REBOOTS = ("never", "if_needed")
# What other words mean the same distribution in os-release(5) and in Ansible's facts.
_DISTRIBUTION_NAMES = {"alma": "almalinux", "redhat": "rhel"}
# States in which the role changes packages.
CHANGING_STATES = ("install", "upgrade")

# Reasons of the facts that concern the host's administrator: the driver works without that reboot.
_NO_REASON_FOR_THE_DRIVER = ("kernel_outdated", "mok_pending")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The role's settings; ``today`` (YYYY-MM-DD) is the day against which ends of life are held."""

    source: str = "auto"
    branch: Optional[str] = None
    version: Optional[str] = None
    flavour: str = "auto"
    reboot: str = "never"
    cuda_toolkit: bool = False
    fabric_manager: str = "auto"
    fabric_manager_package: Optional[str] = None
    repository_url: Optional[str] = None
    security_repository_url: Optional[str] = None
    key_url: Optional[str] = None
    key_fingerprint: Optional[str] = None
    kernels: Optional[tuple[str, ...]] = None
    require_gpu: bool = True
    today: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Wanted:
        """Return the settings; raises ``driver_setting`` naming a setting or value that does not exist."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise FleetfitError(
                f"There is no driver setting {unknown[0]!r}.",
                code="driver_setting",
                remedy=f"The settings are {', '.join(sorted(known))}.",
            )
        clean = {name: value for name, value in values.items() if value not in (None, "")}
        for name in ("branch", "version"):
            if name in clean:
                clean[name] = str(clean[name])
        if clean.get("kernels") is not None:
            clean["kernels"] = tuple(clean["kernels"])
        if clean.get("key_fingerprint"):
            clean["key_fingerprint"] = "".join(str(clean["key_fingerprint"]).split()).upper()
        wanted = cls(**clean)
        for name, allowed in (("source", SOURCES), ("flavour", FLAVOURS), ("reboot", REBOOTS)):
            if getattr(wanted, name) not in allowed:
                raise FleetfitError(
                    f"nvidia_driver_{name} is {getattr(wanted, name)!r}.",
                    code="driver_setting",
                    remedy=f"Use one of {', '.join(allowed)}.",
                )
        return wanted


@dataclasses.dataclass
class _Work:
    """What is gathered on the way to a decision."""

    wanted: Wanted
    state: Mapping[str, Any]
    data: Mapping[str, Any]
    refusals: list[dict[str, str]] = dataclasses.field(default_factory=list)
    problems: list[dict[str, str]] = dataclasses.field(default_factory=list)
    actions: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def refuse(self, code: str, message: str, remedy: str) -> None:
        self.refusals.append({"code": code, "message": message, "remedy": remedy})

    def problem(self, code: str, message: str, remedy: str) -> None:
        self.problems.append({"code": code, "message": message, "remedy": remedy})

    def act(self, action: str, reason: str, items: Sequence[str] = ()) -> None:
        self.actions.append({"action": action, "reason": reason, "items": list(items)})


def decide(wanted: Wanted, state: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decision about one host's driver.

    ``state`` is the contract's ``driver_state``, ``data`` the content of catalog/drivers.yml. A refusal never goes
    with an action: the host is left as it is. Raises :class:`FleetfitError` for a state of another schema version.
    """
    if state.get("schema_version") != SCHEMA_VERSION:
        raise FleetfitError(
            f"The driver facts have schema_version {state.get('schema_version')!r}; this fleetfit reads "
            f"{SCHEMA_VERSION}.",
            code="driver_facts_version",
            remedy="Use the facts of the same fleetfit version.",
        )
    work = _Work(wanted, state, data)
    if wanted.source == "none":
        return _decision(work, "nothing", summary="The driver is not managed (nvidia_driver_source: none).")
    gpus = state["gpus"]
    if not gpus and wanted.require_gpu:
        return _decision(work, "nothing", summary="There is no NVIDIA GPU in this host.")

    distribution = _distribution(work)
    if distribution is None:
        return _decision(work, "refused")
    source = _source(work, distribution)
    if source is None:
        return _decision(work, "refused")
    repository = next((r for r in data["repositories"] if r["repository"] == source["repository"]), None)
    if repository and state["os"]["arch"] not in repository["arches"]:
        work.refuse(
            "unsupported_arch",
            f"{distribution['name']} on {state['os']['arch']} has no driver from {_source_text(source)}.",
            f"It exists for {' and '.join(sorted(repository['arches']))}.",
        )
        return _decision(work, "refused")
    _refuse_mixed_sources(work, source)
    branch = _branch(work, distribution, source)
    flavour = _flavour(work, distribution, source, branch) if branch else None
    if branch is None or flavour is None or work.refusals:
        return _decision(work, "refused", source=source["source"], branch=branch, flavour=flavour)
    return _decide_packages(work, distribution, source, repository, branch, flavour)


# ---- where from, which branch, which modules --------------------------------------------------------------------


def _distribution(work: _Work) -> Optional[Mapping[str, Any]]:
    system = work.state["os"]
    name = _DISTRIBUTION_NAMES.get(system["distribution"], system["distribution"])
    version = str(system["version"])
    for entry in work.data["distributions"]:
        if name in entry["distributions"] and entry["version"] in (version, version.partition(".")[0]):
            return dict(entry)
    supported = ", ".join(entry["name"] for entry in work.data["distributions"])
    work.refuse(
        "unsupported_distribution",
        f"{system['distribution']} {version} has no driver in fleetfit's catalog.",
        f"It has one for {supported}; or install the driver yourself and set nvidia_driver_source: none.",
    )
    return None


def _source(work: _Work, distribution: Mapping[str, Any]) -> Optional[Mapping[str, Any]]:
    """Return the source's entry. ``auto`` stays with what is installed, and prefers signed modules under
    Secure Boot."""
    entries = {entry["source"]: entry for entry in distribution["sources"]}
    chosen = work.wanted.source
    if chosen == "auto":
        present = work.state["installed"]["source"]
        signed = [
            name
            for name, entry in entries.items()
            if any(packages["modules"] == "signed" for packages in entry["packages"])
        ]
        if present in entries:
            chosen = present
        elif work.state["secure_boot"] == "enabled" and signed:
            chosen = signed[0]
        else:
            chosen = distribution["auto"]
    if chosen not in entries:
        work.refuse(
            "source_not_available",
            f"{distribution['name']} has no NVIDIA driver from the source {chosen!r}.",
            f"Set nvidia_driver_source to {' or '.join(sorted(entries))}.",
        )
        return None
    return dict(entries[chosen])


def _refuse_mixed_sources(work: _Work, source: Mapping[str, Any]) -> None:
    """Refuse what would put files of two packagings beside each other."""
    installed = work.state["installed"]
    own = driver_files.OWN_MARK
    evidence = {
        kind: [item["evidence"] for item in work.state["foreign_sources"] if item["kind"] == kind]
        for kind in ("runfile", "ppa", "cuda_repo")
    }
    if evidence["runfile"] or installed["source"] == "runfile":
        work.refuse(
            "runfile_present",
            "A driver from NVIDIA's .run installer is on this host "
            f"({', '.join(evidence['runfile']) or 'its library'}), "
            "and packages would overwrite parts of it.",
            "Remove it with `nvidia-uninstall`, then run this again.",
        )
    if evidence["ppa"] or installed["source"] == "ppa":
        work.refuse(
            "ppa_present",
            "A PPA's driver packages are configured or installed "
            f"({', '.join(evidence['ppa']) or 'by their versions'}).",
            "Remove the PPA and its packages (`ppa-purge`), then run this again.",
        )
    foreign_cuda = [path for path in evidence["cuda_repo"] if own not in path]
    if foreign_cuda and source["source"] == "distribution":
        work.refuse(
            "mixed_sources",
            f"NVIDIA's repository is configured ({', '.join(foreign_cuda)}) and the driver shall come "
            "from the "
            "distribution: its packages would replace them at the next upgrade.",
            "Remove that file, or set nvidia_driver_source: nvidia.",
        )
    if foreign_cuda and source["source"] == "nvidia" and not installed["version"]:
        work.refuse(
            "repository_defined",
            f"NVIDIA's repository is configured already ({', '.join(foreign_cuda)}), with a key that was "
            "not checked.",
            "Remove that file (package cuda-keyring); the role writes one of its own with the checked key.",
        )
    known = ("nvidia", "distribution")
    if installed["source"] in known and installed["source"] != source["source"]:
        work.refuse(
            "mixed_sources",
            f"The driver {installed['version']} on this host comes from "
            f"{_SOURCE_TEXTS[installed['source']]}, and "
            f"nvidia_driver_source asks for {source['source']}.",
            f"Set nvidia_driver_source: {installed['source']}, or remove the packages "
            f"({', '.join(sorted(installed['packages'])[:3]) or 'of the driver'} …) first.",
        )


_SOURCE_TEXTS = {"nvidia": "NVIDIA's repository", "distribution": "the distribution"}


def _source_text(source: Mapping[str, Any]) -> str:
    return _SOURCE_TEXTS[source["source"]]


def _branch(work: _Work, distribution: Mapping[str, Any], source: Mapping[str, Any]) -> Optional[str]:
    """Return the branch: asked for, else the installed one (a re-run moves nothing), else the data's default."""
    wanted, installed = work.wanted, work.state["installed"]
    carried = source["branches"]
    branches = {entry["branch"]: entry for entry in work.data["branches"]}
    asked = wanted.branch or (wanted.version.partition(".")[0] if wanted.version else None)
    setting = "nvidia_driver_branch" if wanted.branch else "nvidia_driver_version"
    if wanted.branch and wanted.version and wanted.version.partition(".")[0] != wanted.branch:
        work.refuse(
            "version_not_of_branch",
            f"nvidia_driver_version {wanted.version} is not of nvidia_driver_branch {wanted.branch}.",
            "Leave one of them out, or make them agree.",
        )
        return None
    if asked and asked not in branches:
        work.refuse(
            "unknown_branch",
            f"{setting} asks for the driver branch {asked}, which is not in fleetfit's catalog.",
            f"Known are {', '.join(sorted(branches))}; a new branch is an entry in catalog/drivers.yml.",
        )
        return None
    if asked and carried is not None and asked not in carried:
        work.refuse(
            "branch_not_carried",
            f"{setting} asks for branch {asked}, and {distribution['name']} carries {' and '.join(carried)}.",
            f"Leave {setting} out, or set nvidia_driver_source: nvidia.",
        )
        return None
    if wanted.version and carried is not None and not _carries_version(work, distribution, source):
        return None
    default = work.data["default_branch"]
    if carried is not None and default not in carried:
        default = carried[0]
    branch = str(asked or (installed["branch"] if installed["branch"] in branches else None) or default)
    _note_end_of_life(work, branches[branch])
    for gpu in work.state["gpus"]:
        entry = _generation(work, gpu)
        if entry is None:
            continue
        first, last = entry["first_branch"], entry["last_branch"]
        if (first and int(branch) < int(first)) or (last and int(branch) > int(last)):
            limit = (
                f"from branch {first} on" if first and int(branch) < int(first) else f"up to branch {last}"
            )
            work.refuse(
                "branch_without_gpu",
                f"Branch {branch} does not drive {gpu['name']} ({entry['generation']}); drivers do {limit}.",
                "Set nvidia_driver_branch to one that does"
                + ("" if carried is None else ", with nvidia_driver_source: nvidia")
                + ".",
            )
    return branch


def _carries_version(work: _Work, distribution: Mapping[str, Any], source: Mapping[str, Any]) -> bool:
    """Return whether a distribution has the version asked for, refusing it where it has another one.

    What its configured archives offer counts, else what the catalog knows; where neither tells, apt decides.
    """
    version, installed = str(work.wanted.version), work.state["installed"]["version"]
    if installed and same_version(version, installed):
        return True
    branch = version.partition(".")[0]
    offered = [
        offer["version"]
        for offer in work.state["candidate"].get("offered", [])
        if offer["source"] == "distribution" and offer["version"].partition(".")[0] == branch
    ]
    known = offered or [source[key] for key in ("version",) if source.get(key)]
    if not known or any(same_version(version, other) for other in known):
        return True
    work.refuse(
        "version_not_carried",
        f"{distribution['name']} carries {' and '.join(known)} of branch {branch}, and nvidia_driver_version is "
        f"{version}.",
        "Leave nvidia_driver_version out, or set nvidia_driver_source: nvidia.",
    )
    return False


def _note_end_of_life(work: _Work, entry: Mapping[str, Any]) -> None:
    end = entry["end_of_life"]
    if entry.get("supported") is False or (end and work.wanted.today and end < work.wanted.today):
        when = f"ended on {end}" if end else "has ended"
        work.problem(
            "driver_branch_end_of_life",
            f"NVIDIA's support of driver branch {entry['branch']} {when}: it gets no security fixes from "
            "NVIDIA.",
            f"Plan a move to branch {work.data['default_branch']} (nvidia_driver_source: nvidia).",
        )


def _generation(work: _Work, gpu: Mapping[str, Any]) -> Optional[Mapping[str, Any]]:
    for entry in work.data["generations"]:
        if gpu.get("compute_capability") in entry["compute_capabilities"]:
            return dict(entry)
    for entry in work.data["generations"]:
        if gpu.get("generation") == entry["generation"]:
            return dict(entry)
    return None


def _flavour(
    work: _Work, distribution: Mapping[str, Any], source: Mapping[str, Any], branch: str
) -> Optional[str]:
    """Return which kernel modules: what a card requires, else asked for, else installed, else open."""
    wanted, installed = work.wanted, work.state["installed"]
    needs: dict[str, list[str]] = {"open": [], "proprietary": []}
    for gpu in work.state["gpus"]:
        entry = _generation(work, gpu)
        if entry is None:
            if wanted.flavour == "auto" and not installed["flavour"]:
                work.refuse(
                    "unknown_generation",
                    f"The generation of {gpu['name']} ({gpu['pci_device_id']}) is not in fleetfit's catalog, so "
                    ""
                    "that it is unknown which kernel modules it needs.",
                    "Set nvidia_driver_flavour to open or proprietary (open needs a card from Turing on).",
                )
            continue
        need = entry["flavour"]
        if work.state["os"]["arch"] in entry.get("open_required_arches", []):
            need = "open"
        if need != "either":
            needs[need].append(f"{gpu['name']} ({entry['generation']})")
    if work.refusals:
        return None
    if needs["open"] and needs["proprietary"]:
        work.refuse(
            "mixed_generations",
            f"{needs['open'][0]} needs the open kernel modules and {needs['proprietary'][0]} the "
            "proprietary ones: "
            "one host cannot load both.",
            "Move one of the cards to another host.",
        )
        return None
    required = next((flavour for flavour, cards in needs.items() if cards), None)
    if required and wanted.flavour not in ("auto", required):
        work.refuse(
            "flavour_impossible",
            f"{needs[required][0]} needs the {required} kernel modules; nvidia_driver_flavour says "
            f"{wanted.flavour}.",
            "Set nvidia_driver_flavour: auto.",
        )
        return None
    offered = {flavour for packages in source["packages"] for flavour in packages["flavours"]}
    limits = next(entry["flavours"] for entry in work.data["branches"] if entry["branch"] == branch)
    offered &= set(limits) & set(source.get("flavours", limits))
    asked = required or (wanted.flavour if wanted.flavour != "auto" else None)
    if asked and asked not in offered:
        because = source.get("flavours_source") if asked in limits else f"branch {branch} has them no more"
        work.refuse(
            "flavour_not_available",
            f"{distribution['name']} has no {asked} kernel modules of branch {branch} from "
            f"{_source_text(source)}" + (f" ({because})." if because else "."),
            f"Set {'' if required else 'nvidia_driver_flavour: auto, or '}another nvidia_driver_source or "
            f"nvidia_driver_branch; there are {' and '.join(sorted(offered))} ones here.",
        )
        return None
    if asked:
        return str(asked)
    if installed["flavour"] in offered:
        return str(installed["flavour"])
    return "open" if "open" in offered else "proprietary"


# ---- packages, and what has to be done --------------------------------------------------------------------------


def _decide_packages(
    work: _Work,
    distribution: Mapping[str, Any],
    source: Mapping[str, Any],
    repository: Optional[Mapping[str, Any]],
    branch: str,
    flavour: str,
) -> dict[str, Any]:
    wanted, state, installed = work.wanted, work.state, work.state["installed"]
    entry = next(
        packages
        for packages in source["packages"]
        if flavour in packages["flavours"] and int(branch) < int(packages.get("below_branch", "1000"))
    )
    kernels = _kernels(work)
    packages = package_names(
        entry["names"], branch=branch, flavour=flavour, kernels=[k["release"] for k in kernels]
    )
    fabric_packages = _fabric_manager(work, source, branch)
    packages += fabric_packages
    packages += _cuda_toolkit(work, source, branch)
    dkms = entry["modules"] == "dkms"

    remove = sorted((_names_of_other_flavours(source, flavour) - set(packages)) & set(installed["packages"]))

    change, why = _change(wanted, installed, branch, flavour)
    fabric = state["fabricmanager"]["installed_version"]
    fabric_wanted = wanted.fabric_manager == "auto" and state["nvswitch_count"] > 0
    if change is None and fabric_wanted and fabric != installed["version"]:
        change, why = "install", f"Fabric Manager is {fabric or 'missing'}, the driver {installed['version']}"
    unbuilt = _unbuilt_kernels(work, kernels, dkms=dkms, installing=change is not None)
    unsigned = [] if dkms or change is not None else _kernels_without_signed_module(work, kernels)
    if unsigned:
        change, why = "install", f"the newest kernel {unsigned[0]} has no signed module of the driver"
        packages += [
            name.format(branch=branch, open="-open" if flavour == "open" else "", kernel=release)
            for name in entry["kernel_names"]
            for release in unsigned
        ]
    headless = [kernel["release"] for kernel in kernels if dkms and not kernel["headers"]]
    if change is None and (unbuilt or headless):
        lacking = ", ".join(dict.fromkeys([*unbuilt, *headless]))
        why = f"the driver is installed, and its module or the headers for it are missing for the kernel {lacking}"

    changes = change is not None or unbuilt or headless
    if changes:
        _refuse_half_installed(work)
    if changes or state["nouveau"]["in_initramfs"]:
        _refuse_full_boot(work)
    if change is not None:
        _refuse_unverified_repository(work, repository)
    _refuse_passphrase_reboot(work)
    _note_versions(work, branch, changes=change is not None)

    unhold: list[str] = []
    hold = sorted(set(installed["packages"]) - set(installed["held"]))
    if change is not None:
        # The repository first: where it cannot be reached, the holds stay as they are.
        if repository is not None:
            work.act("repository", f"packages come from {_source_text(source)}", [repository["repository"]])
        unhold = sorted(installed["held"])
        if unhold:
            work.act("unhold", "a wanted change must not fail on our own holds", unhold)
    if headless:
        names = [name.format(kernel=kernel) for kernel in headless for name in distribution["headers"]]
        work.act("install_headers", "the module is built against them", list(dict.fromkeys(names)))
    if change is not None:
        work.act("install_packages", why, packages)
        if remove:
            work.act("remove_packages", "kernel modules of two flavours would be in each other's way", remove)
    if unbuilt or (change is not None and dkms and kernels):
        work.act(
            "build_modules",
            "the module must exist before a kernel is booted",
            [kernel["release"] for kernel in kernels] if change is not None else unbuilt,
        )
    if change is not None:
        work.act("hold", "no automatic upgrade may move the driver under a running engine", packages)
    elif hold:
        work.act("hold", "packages of the driver are not held", hold)
    if state["nouveau"]["in_initramfs"] or not state["nouveau"]["blacklisted"]:
        work.act("blacklist_nouveau", "nouveau would take the card at boot", ["nouveau"])
    if not state["persistenced"]["active"] and state["gpus"]:
        if state["persistenced"]["installed"] or change is not None:
            work.act(
                "persistenced",
                "without it the driver initializes anew for each program",
                ["nvidia-persistenced"],
            )
        else:
            work.problem(
                "persistenced_missing",
                "The driver's packages on this host have no nvidia-persistenced: the driver initializes anew "
                "for each program.",
                "Install the package that has it (Ubuntu: nvidia-compute-utils-<branch>; elsewhere "
                "nvidia-persistenced).",
            )
    if not state["uvm_loaded"] and state["gpus"]:
        work.act("load_uvm", "hardened services may not load it", ["nvidia-uvm"])
    if fabric_wanted and not state["fabricmanager"]["active"]:
        work.act("fabric_manager", "NVSwitch needs it before CUDA works", ["nvidia-fabricmanager"])

    pending_mok = (
        dkms
        and state["secure_boot"] == "enabled"
        and state["mok"]["enrolled"] is not True
        and state["loaded"]["version"] is None
    )
    if pending_mok:
        _note_mok(work)
    reboot = _reboot(work, change, pending_mok=pending_mok)
    if reboot["needed"] and reboot["allowed"]:
        work.act("reboot", "; ".join(reason["message"] for reason in reboot["reasons"]))
    name = _state_name(work, change, bool(unbuilt or headless), pending_mok, reboot)
    return _decision(
        work,
        name,
        summary=_summary(name, why, branch, flavour, installed),
        source=source["source"],
        branch=branch,
        flavour=flavour,
        packages=packages,
        specs=_specs(
            packages,
            distribution["family"],
            # A driver that stays is not followed by the newest Fabric Manager, but by its own.
            dict.fromkeys(fabric_packages, installed["version"]) if change == "install" else {},
        ),
        remove=remove if change is not None else [],
        hold=hold if change is None else packages,
        unhold=unhold,
        repository=_repository(work, repository),
        lock={
            "kind": source.get("lock"),
            "stream": source.get("module_stream", {}).get(flavour, "").format(branch=branch) or None,
            "version": f"{wanted.version}*" if wanted.version else f"{branch}.*",
            "packages": distribution.get("lock_packages", []),
            "entries": driver_files.versionlock_entries(installed["packages"])
            if distribution["family"] == "redhat"
            else [],
        },
        modules_load=_modules_load(state, fabric_wanted=fabric_wanted),
        family=distribution["family"],
        modules=entry["modules"],
        kernels=[kernel["release"] for kernel in kernels],
        headers=[
            name
            for name in dict.fromkeys(
                text.format(kernel=kernel["release"])
                for kernel in kernels
                for text in distribution["headers"]
            )
            if dkms
        ],
        reboot=reboot,
    )


def package_names(names: Sequence[str], *, branch: str, flavour: str, kernels: Sequence[str]) -> list[str]:
    """Return the names filled in; a name per kernel flavour where it has ``{kernel_flavour}``.

    A kernel's flavour is what follows the last dash of its release: generic of 6.8.0-45-generic.
    """
    flavours = list(dict.fromkeys(kernel.rsplit("-", 1)[-1] for kernel in kernels)) or ["generic"]
    return list(
        dict.fromkeys(
            name.format(
                branch=branch, open="-open" if flavour == "open" else "", kernel_flavour=kernel_flavour
            )
            for name in names
            for kernel_flavour in flavours
        )
    )


def _specs(packages: Sequence[str], family: str, versions: Mapping[str, Optional[str]]) -> list[str]:
    """Return the packages as apt or dnf takes them, with the version of those that must have one."""
    form = "{name}={version}*" if family == "debian" else "{name}-{version}"
    return [
        form.format(name=name, version=versions[name]) if versions.get(name) else name for name in packages
    ]


def _names_of_other_flavours(source: Mapping[str, Any], flavour: str) -> set[str]:
    """Return what a source's other flavours would install; names of branches are apt's own conflicts."""
    return {
        name
        for packages in source["packages"]
        if flavour not in packages["flavours"]
        for name in packages["names"]
    }


def _kernels(work: _Work) -> list[dict[str, Any]]:
    """Return the kernels that need the module: the running and the newest one, or those that were named."""
    known = {kernel["release"]: dict(kernel) for kernel in work.state["kernels"]}
    if work.wanted.kernels is not None:
        return [
            known.get(release, {"release": release, "headers": False, "dkms": None, "dkms_error": None})
            for release in work.wanted.kernels
        ]
    return [kernel for kernel in known.values() if kernel.get("running") or kernel.get("newest")]


def _unbuilt_kernels(
    work: _Work, kernels: Sequence[Mapping[str, Any]], *, dkms: bool, installing: bool
) -> list[str]:
    """Return the kernels whose module is to be built; a build that failed for another reason is a refusal.

    A failure where the headers were missing is tried again: they are what the role installs.
    """
    if not dkms or installing or not work.state["installed"]["packages"]:
        return []
    for kernel in kernels:
        if kernel["dkms"] == "failed" and kernel["headers"]:
            work.refuse(
                "dkms_failed",
                f"The driver's module could not be built for the kernel {kernel['release']}: "
                f"{kernel['dkms_error'] or 'DKMS left no log'}.",
                "The log is /var/lib/dkms/nvidia*/*/build/make.log. Do not boot this kernel before the "
                "module is built; "
                "a newer driver version may support it.",
            )
    return [kernel["release"] for kernel in kernels if kernel["dkms"] != "installed"]


def _kernels_without_signed_module(work: _Work, kernels: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the newest kernel where it came after the driver: the metapackage that would have followed is held.

    The running one's lack is a reason to reboot: its own module may be in the archive no more.
    """
    return [
        kernel["release"]
        for kernel in kernels
        if kernel.get("newest") and not kernel.get("module_version") and work.state["installed"]["packages"]
    ]


def _fabric_manager(work: _Work, source: Mapping[str, Any], branch: str) -> list[str]:
    if work.wanted.fabric_manager != "auto" or work.state["nvswitch_count"] == 0:
        return []
    name = work.wanted.fabric_manager_package or source["fabric_manager"]
    if name is None:
        work.refuse(
            "fabric_manager_unknown",
            f"This host has {work.state['nvswitch_count']} NVSwitches, which need Fabric Manager, and its "
            "package in "
            f"{_source_text(source)} is not in fleetfit's catalog.",
            "Name it in nvidia_driver_fabric_manager_package.",
        )
        return []
    return [str(name).format(branch=branch)]


def _modules_load(state: Mapping[str, Any], *, fabric_wanted: bool) -> list[str]:
    """Return the kernel modules to load at boot.

    With NVLink 5 (Blackwell) Fabric Manager needs ib_umad before it starts: it reaches the switches over InfiniBand
    management datagrams (Fabric Manager user guide; issues of canvos and NVSentinel).
    """
    blackwell = any(gpu.get("generation") == "blackwell" for gpu in state["gpus"])
    return ["nvidia-uvm", *(["ib_umad"] if fabric_wanted and blackwell else [])]


def _cuda_toolkit(work: _Work, source: Mapping[str, Any], branch: str) -> list[str]:
    if not work.wanted.cuda_toolkit:
        return []
    name = source["cuda_toolkit"].get(branch)
    if name is None:
        work.refuse(
            "cuda_toolkit_unknown",
            f"No CUDA toolkit for branch {branch} from {_source_text(source)} is in fleetfit's catalog.",
            "Set nvidia_driver_cuda_toolkit: false and install the toolkit that you need yourself.",
        )
        return []
    return [str(name)]


def same_version(wanted: str, installed: str) -> bool:
    """Return whether an installed version is the wanted one: 580.95 asks for any 580.95.x."""
    return installed == wanted or installed.startswith((f"{wanted}.", f"{wanted}-"))


def _change(
    wanted: Wanted, installed: Mapping[str, Any], branch: str, flavour: str
) -> tuple[Optional[str], str]:
    """Return ``install``, ``upgrade`` or None, and why. A newer candidate alone is no reason."""
    version = installed["version"]
    if not version:
        return "install", f"no driver is installed; branch {branch} with {flavour} modules is wanted"
    if installed["branch"] != branch:
        return "upgrade", f"branch {branch} is wanted and {version} is installed"
    if wanted.version and not same_version(wanted.version, version):
        return "upgrade", f"version {wanted.version} is wanted and {version} is installed"
    if installed["flavour"] and installed["flavour"] != flavour:
        return "upgrade", f"{flavour} modules are wanted and {installed['flavour']} ones are installed"
    if not installed["flavour"] and installed["packages"]:
        return "install", "the libraries are installed, and kernel modules of no flavour or of two"
    return None, "what is wanted is installed"


def _refuse_half_installed(work: _Work) -> None:
    audit = work.state["dpkg_audit"]
    if audit:
        work.refuse(
            "dpkg_audit",
            f"Packages on this host are half installed: {'; '.join(line.strip() for line in audit[:2])}",
            "Run `dpkg --configure -a` and `apt-get -f install` until `dpkg --audit` is silent.",
        )


def _refuse_full_boot(work: _Work) -> None:
    free, least = work.state["boot_free_bytes"], work.data["boot_free_min_bytes"]
    if free is not None and free < least:
        work.refuse(
            "boot_full",
            f"/boot has {free // 1048576} MiB free and a new initramfs needs {least // 1048576} MiB.",
            "Remove old kernels (`apt autoremove --purge`, `dnf remove --oldinstallonly`).",
        )


def _refuse_unverified_repository(work: _Work, repository: Optional[Mapping[str, Any]]) -> None:
    if repository is None or repository["kind"] == "apt_archive":
        return
    fingerprint = work.wanted.key_fingerprint or repository["fingerprint"]
    if fingerprint is None:
        work.refuse(
            "key_fingerprint_unknown",
            f"The signing key of {_repository_url(work, repository)} is not known with all 40 digits.",
            "Verify the key another way and give its fingerprint in nvidia_driver_key_fingerprint.",
        )
    elif len(fingerprint) != 40 or set(fingerprint) - set("0123456789ABCDEF"):
        work.refuse(
            "key_fingerprint_invalid",
            f"nvidia_driver_key_fingerprint {fingerprint!r} is not 40 hexadecimal digits.",
            "A short key id can be forged; give the whole fingerprint.",
        )


def _refuse_passphrase_reboot(work: _Work) -> None:
    if work.wanted.reboot == "if_needed" and work.state["root_needs_passphrase"]:
        work.refuse(
            "reboot_needs_passphrase",
            "nvidia_driver_reboot allows a reboot, and this host's root disk asks for a passphrase at "
            "boot: it would "
            "not come back by itself.",
            "Set nvidia_driver_reboot: never for it and reboot it where you can type, or enrol a TPM or "
            "Clevis.",
        )


def _note_versions(work: _Work, branch: str, *, changes: bool) -> None:
    installed, loaded = work.state["installed"], work.state["loaded"]
    candidate = work.state["candidate"]
    floor = next(entry["security_floor"] for entry in work.data["branches"] if entry["branch"] == branch)
    version = installed["version"]
    if version and installed["branch"] == branch and floor and _key(version) < _key(floor):
        work.problem(
            "driver_below_security_floor",
            f"Driver {version} lacks security fixes that came with {floor}.",
            f"Set nvidia_driver_version to {floor} or a later one of its branch, in a maintenance window.",
        )
    if version and loaded["version"] and loaded["version"] != version:
        work.problem(
            "driver_library_mismatch",
            f"The kernel module loaded is {loaded['version']} and the libraries on disk are {version}: "
            "new CUDA "
            "programs fail until a reboot; engines that run go on.",
            "Reboot in a maintenance window, or set nvidia_driver_reboot: if_needed.",
        )
    if version and not changes and candidate["version"] and _key(candidate["version"]) > _key(version):
        work.problem(
            "driver_candidate",
            f"The repository offers {candidate['version']}; {version} stays until it is asked for.",
            f"Set nvidia_driver_version: {candidate['version']} to take it.",
        )


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("-")[0].split(".") if part.isdigit())


def _note_mok(work: _Work) -> None:
    step = (
        "its enrolment is waiting for the next boot"
        if work.state["mok"]["pending"]
        else "the key that signs the module is not enrolled"
    )
    work.problem(
        "mok_enrolment_pending",
        f"Secure Boot is on and {step}: the kernel would refuse the module.",
        "Run `mokutil --import /var/lib/dkms/mok.pub` (Ubuntu: /var/lib/shim-signed/mok/MOK.der) "
        "with a password "
        "of your own, reboot at the console and choose 'Enroll MOK'; then run this again.",
    )


def _reboot(work: _Work, change: Optional[str], *, pending_mok: bool) -> dict[str, Any]:
    """Return whether a reboot is needed, whether it is allowed here, and why."""
    state = work.state
    reasons = {
        reason["code"]: dict(reason)
        for reason in state["reboot_reasons"]
        if reason["code"] not in _NO_REASON_FOR_THE_DRIVER
    }
    loaded = state["loaded"]
    installed = state["installed"]["version"]
    # A module whose user space is gone stays loaded too, unless the new user space is of its version.
    left_over = (
        change == "install" and installed is None and loaded["version"] != state["candidate"]["version"]
    )
    if loaded["version"] and (change == "upgrade" or left_over):
        reasons.setdefault(
            "driver_changed",
            {"code": "driver_changed", "message": f"module {loaded['version']} stays loaded"},
        )
    if change != "upgrade" and installed and loaded["version"] and loaded["version"] != installed:
        message = f"module {loaded['version']} is loaded and {installed} installed"
        reasons.setdefault("driver_mismatch", {"code": "driver_mismatch", "message": message})
    if state["nouveau"]["loaded"] and state["gpus"]:
        reasons.setdefault("nouveau_loaded", {"code": "nouveau_loaded", "message": "nouveau holds the card"})
    forbidden = None
    if work.wanted.reboot == "never":
        forbidden = "nvidia_driver_reboot is never"
    elif state["is_controller"]:
        forbidden = "this is the machine that runs Ansible"
    elif pending_mok:
        forbidden = "Secure Boot would refuse the module: someone at the console must enrol its key first"
    elif state["root_needs_passphrase"]:
        forbidden = "the root disk asks for a passphrase at boot"
    return {
        "needed": bool(reasons),
        "allowed": forbidden is None,
        "forbidden_because": forbidden,
        "reasons": [reasons[code] for code in sorted(reasons)],
    }


def _state_name(
    work: _Work, change: Optional[str], repair: bool, pending_mok: bool, reboot: Mapping[str, Any]
) -> str:
    if work.refusals:
        return "refused"
    if change is not None:
        return change
    if repair:
        return "install"
    if pending_mok:
        return "pending_mok"
    return "pending_reboot" if reboot["needed"] else "ok"


def _summary(name: str, why: str, branch: str, flavour: str, installed: Mapping[str, Any]) -> str:
    texts = {
        "ok": f"Driver {installed['version']} is installed as wanted.",
        "pending_reboot": f"Driver {installed['version']} is installed; the host must reboot to use it.",
        "pending_mok": f"Driver {installed['version']} is installed; pending MOK enrolment.",
        "refused": "Nothing is changed.",
    }
    return texts.get(name, f"Branch {branch} with {flavour} modules: {why}.")


def _repository_url(work: _Work, repository: Mapping[str, Any]) -> str:
    arch = repository["arches"].get(work.state["os"]["arch"], work.state["os"]["arch"])
    return str(work.wanted.repository_url or repository["url"].format(arch=arch))


def _repository(work: _Work, repository: Optional[Mapping[str, Any]]) -> Optional[dict[str, Any]]:
    """Return the repository with the variables' mirrors in it; a mirror serves the key beside its packages."""
    if repository is None:
        return None
    wanted = work.wanted
    url = _repository_url(work, repository)
    arch = repository["arches"][work.state["os"]["arch"]]
    result: dict[str, Any] = {"repository": repository["repository"], "kind": repository["kind"], "url": url}
    if repository["kind"] == "apt_archive":
        result.update(
            security_url=wanted.security_repository_url
            or (None if wanted.repository_url else repository.get("security_url")),
            suites=repository["suites"],
            security_suites=repository.get("security_suites", []),
            components=repository["components"],
            signed_by=repository["signed_by"],
            key_url=None,
            fingerprint=None,
        )
        return result
    key_url = wanted.key_url or repository["key_url"].format(arch=arch)
    if wanted.repository_url and not wanted.key_url:
        key_url = f"{url.rstrip('/')}/{key_url.rsplit('/', 1)[-1]}"
    result.update(
        key_url=key_url,
        fingerprint=wanted.key_fingerprint or repository["fingerprint"],
        signed_by=driver_files.key_path(repository["kind"]),
    )
    return result


def pins(
    decision: Mapping[str, Any], data: Mapping[str, Any], version: Optional[str]
) -> list[dict[str, Any]]:
    """Return apt's pins: driver packages of the branch (or exact version) before all others, other ones never."""
    if decision["family"] != "debian" or decision["source"] != "nvidia":
        return []
    names = data["driver_packages"]
    return [
        {"packages": list(names["not_pinned"]), "pin": "version *", "priority": 500},
        {
            "packages": list(names["patterns"]),
            "pin": f"version {version or decision['branch']}{'*' if version else '.*'}",
            "priority": 1000,
        },
        {"packages": list(names["patterns"]), "pin": "version *", "priority": -1},
    ]


def what_is_there(state: Mapping[str, Any]) -> str:
    """Return the host's cards, driver, kernels and Secure Boot in one line for people."""
    cards = ", ".join(gpu["name"] or gpu["pci_device_id"] for gpu in state["gpus"]) or "no NVIDIA GPU"
    installed, loaded = state["installed"], state["loaded"]
    if installed["version"]:
        held = (
            "held"
            if installed["packages"] and not set(installed["packages"]) - set(installed["held"])
            else "not held"
        )
        driver = (
            f"driver {installed['version']} ({installed['flavour'] or 'no'} modules, from "
            f"{_SOURCE_TEXTS.get(installed['source'], installed['source'])}, {held})"
        )
    else:
        driver = "no driver installed"
    kernels = ", ".join(
        f"kernel {kernel['release']} ("
        + ", ".join(
            [
                *(word for word in ("running", "newest") if kernel.get(word)),
                f"module {kernel['module_version']}" if kernel.get("module_version") else "no module",
            ]
        )
        + ")"
        for kernel in state["kernels"]
    )
    parts = [
        cards,
        driver,
        f"module {loaded['version']} loaded" if loaded["version"] else "no module loaded",
        *([kernels] if kernels else []),
        f"Secure Boot {state['secure_boot']}",
        *(["nouveau loaded"] if state["nouveau"]["loaded"] else []),
    ]
    return f"there is: {'; '.join(parts)}"


def report(decision: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Return the decision in lines for people: what is there, what is to be done and why, what is wrong."""
    # With nvidia_driver_source: none nobody has looked.
    lines = [what_is_there(state)] if "gpus" in state else []
    lines += [decision["summary"]] if not decision["refusals"] else []
    lines += [f"refused: {item['message']} {item['remedy']}" for item in decision["refusals"]]
    lines += [
        f"{item['action']}: {' '.join(item['items'])} ({item['reason']})"
        if item["items"]
        else f"{item['action']}: {item['reason']}"
        for item in decision["actions"]
    ]
    lines += [f"problem: {item['message']} {item['remedy']}" for item in decision["problems"]]
    if decision["reboot"]["needed"]:
        lines += [f"reboot needed: {reason['message']}" for reason in decision["reboot"]["reasons"]]
        if decision["reboot"]["forbidden_because"]:
            lines.append(f"no reboot by this run: {decision['reboot']['forbidden_because']}")
    return lines


def solves(decision: Mapping[str, Any]) -> list[str]:
    """Return the codes of the host facts' problems that the decision's actions do away with."""
    if decision["state"] in CHANGING_STATES:
        return ["driver_missing", "nvml_not_found", "driver_library_mismatch", "nvml_error", "probe_failed"]
    if decision["reboot"]["needed"] and decision["reboot"]["allowed"]:
        return ["driver_missing", "driver_library_mismatch"]
    return []


def _decision(work: _Work, state: str, *, summary: str = "", **parts: Any) -> dict[str, Any]:
    """Return the decision's dict; with a refusal it carries no action, package or file."""
    refused = bool(work.refusals)
    decision: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "state": "refused" if refused else state,
        "summary": work.refusals[0]["message"] if refused else summary,
        "source": None,
        "branch": None,
        "flavour": None,
        "packages": [],
        "specs": [],
        "remove": [],
        "hold": [],
        "unhold": [],
        "repository": None,
        "lock": {"kind": None, "stream": None, "version": None, "packages": [], "entries": []},
        "modules_load": [],
        "family": None,
        "modules": None,
        "kernels": [],
        "headers": [],
        "pins": [],
        "files": [],
        "reboot": {"needed": False, "allowed": False, "forbidden_because": None, "reasons": []},
        "solves": [],
        "report": [],
        "actions": [] if refused else work.actions,
        "refusals": work.refusals,
        "problems": work.problems,
        "candidate": work.state.get("candidate", {}).get("version"),
    }
    if refused:
        decision.update({name: parts[name] for name in ("source", "branch", "flavour") if name in parts})
        decision["report"] = report(decision, work.state)
        return decision
    decision.update(parts)
    decision["solves"] = solves(decision)
    decision["report"] = report(decision, work.state)
    if decision["family"]:
        decision["pins"] = pins(decision, work.data, work.wanted.version)
        decision["files"] = driver_files.render(decision, work.data)
    return decision
