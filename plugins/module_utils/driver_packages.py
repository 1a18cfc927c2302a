"""The NVIDIA driver's packages on a host: what is installed, held and offered, and who it comes from.

Reads dpkg's own database, the configured repositories and apt's policy; on the RHEL family rpm, dnf and
dnf's versionlock. Asks nothing of the network. Debian and Ubuntu formats are run in tests; those of rpm and
dnf are read from recorded text only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from .probe_root import ProbeRoot, Runner

DPKG_STATUS = "/var/lib/dpkg/status"
# A desktop's database has some 10 MB.
_STATUS_LIMIT_BYTES = 64 << 20

# Packages of the driver by the names that Debian, Ubuntu, NVIDIA's repositories and RPM Fusion give them.
_DRIVER_PACKAGE = re.compile(
    r"^(nvidia-|libnvidia-|libcuda1$|libnvcuvid|libnvoptix|libxnvctrl|cuda-drivers|kmod-nvidia|"
    r"akmod-nvidia|dkms-nvidia|linux-(modules|objects|signatures)-nvidia|xserver-xorg-video-nvidia|"
    r"firmware-nvidia-gsp|xorg-x11-drv-nvidia|libnvcuvid1$)"
)
# What has such a name and is not the driver: toolkits, containers' tools, libraries above CUDA, Debian's helpers.
_NOT_DRIVER = re.compile(
    r"^(nvidia-(cuda-|container|docker|cudnn|nsight|vaapi|visual-profiler|profiler|opencl-dev|gds|fs|peermem|"
    r"texture-tools|primus|installer-cleanup|support$)|libnvidia-container|nvidia-driver-pinning)"
)
# Packages whose version is the user space's, the first that is installed counts: the management library
# of Debian and NVIDIA's Debian repository, of Ubuntu, of the RHEL family, then what needs it.
_USER_SPACE = (
    re.compile(r"^libnvidia-(tesla-|legacy-)?(\d+xx-|\d+-)?ml1$"),
    re.compile(r"^libnvidia-compute(-\d+)?(-server)?$"),
    re.compile(r"^libnvidia-ml$"),
    re.compile(r"^nvidia-driver-cuda-libs$"),
    re.compile(r"^xorg-x11-drv-nvidia(-\d+xx)?-cuda-libs$"),
    re.compile(r"^(libcuda1|nvidia-driver-cuda|nvidia-smi|nvidia-driver)$"),
)
_KERNEL_MODULES = re.compile(
    r"(-kernel-(open-)?dkms$|^nvidia-dkms(-|$)|^linux-(modules|objects)-nvidia-|^a?kmod-nvidia)"
)
_FABRIC_MANAGER = re.compile(r"^nvidia-fabric-?manager(-\d+)?$")
# The names to ask a package manager for where nothing is installed.
_APT_NAMES = ("libnvidia-ml1", "libnvidia-compute")
_DNF_NAMES = ("nvidia-driver-cuda-libs", "libnvidia-ml", "nvidia-driver-cuda")
# The version in a package's version: 580.95.05 in 580.95.05-0ubuntu0.22.04.1 or 3:580.95.05-1.el9.
_UPSTREAM = re.compile(r"^(?:\d+:)?(\d{3}\.\d+(?:\.\d+)?)")
_CUDA_REPOSITORY = "compute/cuda/repos/"
_PPA = re.compile(r"ppa\.launchpad(content)?\.net/graphics-drivers\b|^ppa:graphics-drivers\b")
_PPA_VERSION = "~gpu"
# The .run installer puts these beside each other and records what it replaced (NVIDIA's README, chapter
# "Installing the Driver").
_RUNFILE_TRACES = ("/usr/bin/nvidia-uninstall", "/usr/bin/nvidia-installer", "/var/lib/nvidia/log")
_LIBRARY = re.compile(r"^libnvidia-ml\.so\.(\d{3}\.\d+(?:\.\d+)?)$")
_LIBRARY_FOLDERS = (
    *("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"),
    *("/usr/lib/x86_64-linux-gnu/nvidia/current", "/usr/lib/aarch64-linux-gnu/nvidia/current"),
)


class Package(NamedTuple):
    """An installed package: its version as packaged, who maintains it, whether it is held."""

    version: str
    maintainer: str
    held: bool


class Offer(NamedTuple):
    """A version that a repository offers: upstream version and source (``nvidia``, ``distribution`` …)."""

    version: str
    source: str


def upstream_version(version: str) -> Optional[str]:
    """Return the driver's version in a package's version, or None where there is none."""
    match = _UPSTREAM.match(version)
    return match.group(1) if match else None


def version_key(version: str) -> tuple[int, ...]:
    """Return a key that orders driver versions: 580.105.08 is newer than 580.95.05."""
    return tuple(int(part) for part in version.split("."))


def branch(version: Optional[str]) -> Optional[str]:
    """Return the branch of a version: 580 of 580.95.05."""
    return version.partition(".")[0] if version else None


def is_driver_package(name: str) -> bool:
    """Return whether a package of this name is the driver's own, no toolkit's and no container's."""
    return bool(_DRIVER_PACKAGE.match(name)) and not _NOT_DRIVER.match(name)


def dpkg_packages(status: str) -> dict[str, Package]:
    """Return the driver's installed packages from the text of dpkg's status file; the native one of two."""
    found: dict[str, Package] = {}
    for paragraph in status.split("\n\n"):
        # Most of thousands of paragraphs are told apart by their first line.
        name = paragraph.lstrip("\n").partition("\n")[0].partition(": ")[2]
        if not is_driver_package(name):
            continue
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, re.MULTILINE))
        wanted, _flag, state = (fields.get("Status", "") + "  ").split(" ")[:3]
        if state in ("", "not-installed", "config-files") or "Version" not in fields:
            continue
        if name not in found or fields.get("Architecture") != "i386":
            found[name] = Package(fields["Version"], fields.get("Maintainer", ""), wanted == "hold")
    return found


def rpm_packages(output: str, versionlock: str) -> dict[str, Package]:
    """Return the driver's packages from ``rpm -qa`` (name, version, architecture, vendor, tab between)."""
    locks = {line.strip() for line in versionlock.splitlines()}
    found = {}
    for line in output.splitlines():
        name, version, architecture, vendor = [*line.split("\t"), "", "", ""][:4]
        if not is_driver_package(name) or not version:
            continue
        # Held is what is locked at its very version, as `dnf versionlock add` writes it: a lock on a branch
        # (name-580.*) lets a package move within it, and a name alone locks nothing.
        whole = f"{name}-{version if ':' in version else f'0:{version}'}"
        bare = f"{name}-{version.rpartition(':')[2]}"
        held = any(
            f"{text}{ending}" in locks for text in (whole, bare) for ending in ("", ".*", f".{architecture}")
        )
        found[name] = Package(version, vendor, held)
    return found


def user_space_package(packages: Iterable[str]) -> Optional[str]:
    """Return the package whose version is that of the driver's user space, or None."""
    names = sorted(packages)
    for pattern in _USER_SPACE:
        for name in names:
            if pattern.match(name):
                return name
    return None


def module_flavour(packages: Iterable[str]) -> Optional[str]:
    """Return ``open`` or ``proprietary`` by the kernel module's package; None where there is none or both."""
    flavours = {
        "open" if "open" in name else "proprietary" for name in packages if _KERNEL_MODULES.search(name)
    }
    return flavours.pop() if len(flavours) == 1 else None


def fabric_manager_version(packages: Mapping[str, Package]) -> Optional[str]:
    """Return the version of the Fabric Manager that is installed, or None."""
    for name, package in sorted(packages.items()):
        if _FABRIC_MANAGER.match(name):
            return upstream_version(package.version)
    return None


def library_version(probe: ProbeRoot) -> Optional[str]:
    """Return the newest version of the management library among the files, package or not."""
    versions = [
        match.group(1)
        for folder in _LIBRARY_FOLDERS
        for match in map(_LIBRARY.match, probe.names(folder))
        if match
    ]
    return max(versions, key=version_key, default=None)


# ---- repositories ---------------------------------------------------------------------------------------------


def foreign_sources(probe: ProbeRoot, packages: Mapping[str, Package]) -> list[dict[str, str]]:
    """Return everything a driver could come or came from, each with the file that shows it."""
    found = [{"kind": "runfile", "evidence": path} for path in _RUNFILE_TRACES if probe.exists(path)][:1]
    for path, text in _repository_files(probe):
        if any(_PPA.search(line) for line in _addresses(text)):
            found.append({"kind": "ppa", "evidence": path})
        elif any(_CUDA_REPOSITORY in line for line in _addresses(text)):
            found.append({"kind": "cuda_repo", "evidence": path})
    if any(source_of_package(package) == "distribution" for package in packages.values()):
        found.append({"kind": "distribution", "evidence": DPKG_STATUS})
    return found


def _repository_files(probe: ProbeRoot) -> list[tuple[str, str]]:
    paths = ["/etc/apt/sources.list"]
    for folder, endings in (
        ("/etc/apt/sources.list.d", (".list", ".sources")),
        ("/etc/yum.repos.d", (".repo",)),
    ):
        paths += [f"{folder}/{name}" for name in probe.names(folder) if name.endswith(endings)]
    return [(path, text) for path in paths for text in [probe.read(path)] if text]


def _addresses(text: str) -> list[str]:
    """Return the addresses that are in use in a file of apt's or dnf's: comments and what is off left out."""
    found = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\[)", text):
        lines = [line for line in paragraph.splitlines() if not line.lstrip().startswith("#")]
        if any(re.match(r"\s*enabled\s*[:=]\s*(no|0|false)\s*$", line, re.IGNORECASE) for line in lines):
            continue
        found += [word for line in lines for word in re.split(r"[\s=]+", line) if "//" in word or ":" in word]
    return found


def source_of_package(package: Package) -> str:
    """Return who packaged it, by maintainer and version: ``nvidia``, ``ppa``, ``distribution``, ``unknown``."""
    if _PPA_VERSION in package.version:
        return "ppa"
    if re.search(r"@nvidia\.com|^NVIDIA\b", package.maintainer):
        return "nvidia"
    if re.search(r"@([\w.-]+\.)?(debian\.(org|net)|ubuntu\.com|canonical\.com)>?$", package.maintainer):
        return "distribution"
    return "unknown"


def source_of_origin(origin: str, address: str) -> str:
    """Return the source behind a repository's Origin field and address."""
    if "LP-PPA-graphics-drivers" in origin or _PPA.search(address):
        return "ppa"
    if origin.upper().startswith("NVIDIA") or _CUDA_REPOSITORY in address:
        return "nvidia"
    return "distribution" if origin in ("Debian", "Ubuntu") else "unknown"


def apt_origins(policy: str) -> dict[str, str]:
    """Return the source of each repository in ``apt-cache policy``, by its line without the priority."""
    found: dict[str, str] = {}
    address = None
    for line in policy.splitlines():
        match = re.match(r"\s*-?\d+ (\S.*)$", line)
        if match:
            address = match.group(1)
        elif address and line.strip().startswith("release "):
            origin = re.search(r"(?:^|,)o=([^,]*)", line.strip()[len("release ") :])
            found[address] = source_of_origin(origin.group(1) if origin else "", address)
    return found


def apt_offers(policy: str, origins: Mapping[str, str]) -> tuple[list[Offer], Optional[Offer]]:
    """Return what ``apt-cache policy NAMES`` offers, newest first, and what apt would take.

    Versions that only the host's own database has are not offered. Pinned-away versions are.
    """
    offers: set[Offer] = set()
    candidates: list[Offer] = []
    for block in re.split(r"^(?=\S)", policy, flags=re.MULTILINE):
        chosen = re.search(r"^  Candidate: (\S+)$", block, re.MULTILINE)
        version = None
        for line in block.partition("Version table:")[2].splitlines():
            entry = re.match(r"^ (?:\*\*\*|   ) (\S+)(?: .*)?$", line)
            place = re.match(r"^ {7,}-?\d+ (\S.*)$", line)
            if entry:
                version = entry.group(1)
            elif place and version and place.group(1) != DPKG_STATUS:
                upstream = upstream_version(version)
                if upstream is None:
                    continue
                offer = Offer(upstream, origins.get(place.group(1)) or source_of_origin("", place.group(1)))
                offers.add(offer)
                if chosen and chosen.group(1) == version:
                    candidates.append(offer)
    newest = sorted(offers, key=lambda offer: (version_key(offer.version), offer.source), reverse=True)
    return newest, max(candidates, key=lambda offer: version_key(offer.version), default=None)


def installed_origin(policy: str, origins: Mapping[str, str]) -> Optional[str]:
    """Return the source of the repository that offers the version which is installed, or None."""
    after = re.search(r"^ \*\*\* .*\n((?: {7,}.*\n?)*)", policy, re.MULTILINE)
    for line in (after.group(1) if after else "").splitlines():
        place = re.match(r"^ {7,}-?\d+ (\S.*)$", line)
        if place and place.group(1) in origins and place.group(1) != DPKG_STATUS:
            return origins[place.group(1)]
    return None


def dnf_offers(output: str, repositories: Mapping[str, str]) -> list[Offer]:
    """Return what ``dnf repoquery`` offers (name, version, repository id, tab between), newest first."""
    offers = set()
    for line in output.splitlines():
        _name, version, repository = [*line.split("\t"), "", ""][:3]
        upstream = upstream_version(version)
        if upstream:
            offers.add(Offer(upstream, repositories.get(repository, "unknown")))
    return sorted(offers, key=lambda offer: (version_key(offer.version), offer.source), reverse=True)


def dnf_repositories(probe: ProbeRoot) -> dict[str, str]:
    """Return the source of each repository id in /etc/yum.repos.d."""
    found = {}
    for _path, text in _repository_files(probe):
        for section in re.finditer(r"^\[([^\]]+)\]([^\[]*)", text, re.MULTILINE):
            identity, body = section.groups()
            nvidia = any(_CUDA_REPOSITORY in word for word in _addresses(body)) or identity.startswith(
                "cuda-"
            )
            found[identity] = "nvidia" if nvidia else "unknown"
    return found


def newest_of_branches(offers: Sequence[Offer]) -> list[Offer]:
    """Return the newest offer of each branch and source, newest first."""
    seen = set()
    kept = []
    for offer in offers:
        key = (branch(offer.version), offer.source)
        if key not in seen:
            seen.add(key)
            kept.append(offer)
    return kept


# ---- one look -------------------------------------------------------------------------------------------------


class DriverPackages(NamedTuple):
    """The ``installed``, ``candidate``, ``foreign_sources`` and ``dpkg_audit`` of the driver facts."""

    installed: dict[str, Any]
    candidate: dict[str, Any]
    foreign_sources: list[dict[str, str]]
    fabric_manager: Optional[str]
    audit: list[str]


def read_packages(probe: ProbeRoot, run: Runner) -> DriverPackages:
    """Look at the packages of a host of either family."""
    status = probe.read(DPKG_STATUS, _STATUS_LIMIT_BYTES)
    offers: list[Offer] = []
    taken: Optional[Offer] = None
    origin: Optional[str] = None
    audit: list[str] = []
    if status is not None:
        packages = dpkg_packages(status)
        main = user_space_package(packages)
        offers, taken, origin = _ask_apt(run, main)
        code, output = run(["dpkg", "--audit"])
        audit = [line for line in output.splitlines() if line.strip()][:20] if code in (0, 1) else []
    else:
        packages, offers, origin = _ask_rpm(probe, run)
        taken = offers[0] if offers else None
        main = user_space_package(packages)
    library = library_version(probe)
    sources = foreign_sources(probe, packages)
    runfile = any(source["kind"] == "runfile" for source in sources)
    version = upstream_version(packages[main].version) if main else None
    source: Optional[str] = None
    if main:
        told = source_of_package(packages[main])
        source = origin if origin not in (None, "unknown") else told
    elif library:
        version, source = library, "runfile" if runfile else "unknown"
    return DriverPackages(
        installed={
            "version": version,
            "flavour": module_flavour(packages),
            "branch": branch(version),
            "source": source,
            "packages": {name: packages[name].version for name in sorted(packages)},
            "held": sorted(name for name, package in packages.items() if package.held),
        },
        candidate=candidate(version, offers, taken),
        foreign_sources=sources,
        fabric_manager=fabric_manager_version(packages),
        audit=audit,
    )


def candidate(installed: Optional[str], offers: Sequence[Offer], taken: Optional[Offer]) -> dict[str, Any]:
    """Return the candidate: the newest of the installed branch, else what the package manager would take."""
    same = [offer for offer in offers if installed and branch(offer.version) == branch(installed)]
    chosen = same[0] if same else (taken if installed is None else None)
    return {
        "version": chosen.version if chosen else None,
        "source": chosen.source if chosen else None,
        "offered": [offer._asdict() for offer in newest_of_branches(offers)],
    }


def _ask_apt(run: Runner, main: Optional[str]) -> tuple[list[Offer], Optional[Offer], Optional[str]]:
    code, listed = run(["apt-cache", "pkgnames", "libnvidia-compute"])
    names = {*_APT_NAMES, *([main] if main else [])}
    if code == 0:
        names |= {name for name in listed.split() if _USER_SPACE[1].match(name)}
    code, policy = run(["apt-cache", "policy", *sorted(names)])
    if code or not policy.strip():
        return [], None, None
    code, general = run(["apt-cache", "policy"])
    origins = apt_origins(general) if code == 0 else {}
    offers, taken = apt_offers(policy, origins)
    own = re.search(rf"^{re.escape(main)}:\n(?:\s.*\n?)*", policy, re.MULTILINE) if main else None
    return offers, taken, installed_origin(own.group(0), origins) if own else None


def _ask_rpm(probe: ProbeRoot, run: Runner) -> tuple[dict[str, Package], list[Offer], Optional[str]]:
    """Ask rpm and dnf, from dnf's cache alone (-C): facts never load a repository's index."""
    lock = probe.read("/etc/dnf/plugins/versionlock.list") or ""
    form = r"%{NAME}\t%|EPOCH?{%{EPOCH}:}:{}|%{VERSION}-%{RELEASE}\t%{ARCH}\t%{VENDOR}\n"
    code, listed = run(["rpm", "-qa", "--qf", form])
    packages = rpm_packages(listed, lock) if code == 0 else {}
    repositories = dnf_repositories(probe)
    query = ["dnf", "-q", "-C", "repoquery"]
    form = r"%{name}\t%{version}\t%{repoid}\n"
    code, offered = run([*query, "--qf", form, *_DNF_NAMES])
    offers = dnf_offers(offered, repositories) if code == 0 else []
    main = user_space_package(packages)
    if main is None:
        return packages, offers, None
    code, origin = run([*query, "--installed", "--qf", r"%{from_repo}\n", main])
    return packages, offers, repositories.get(origin.strip()) if code == 0 else None
