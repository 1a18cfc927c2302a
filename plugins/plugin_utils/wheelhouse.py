"""Build a wheelhouse: the wheels of a hash-pinned lock for one Python, packed as one reproducible tar.

The controller builds it once, with its own package index settings; hosts install from it without any index.
Layout of the tar: ``requirements.txt`` (every wheel with the sha256 of the file beside it),
``wheelhouse.json`` (what it was built from) and ``wheels/*.whl``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from ..module_utils.errors import FleetfitError

# Part of the cache key: raise it when the layout of the tar changes.
FORMAT = 1
# The oldest C library among the systems that fleetfit supports (EL 9: glibc 2.34).
DEFAULT_GLIBC = "2.34"
# Pins that one pip run fetches. What a run has fetched stays when a later one is interrupted.
BATCH = 12


@dataclass(frozen=True)
class Pin:
    """One locked release: name, exact version, the sha256 digests allowed, and its environment marker."""

    name: str
    version: str
    hashes: tuple[str, ...]
    marker: str | None = None

    def __str__(self) -> str:
        """Return ``name==version``."""
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Wheelhouse:
    """A built wheelhouse: where its tar is, what identifies it, and what is in it (``name==version``)."""

    tar: Path
    sha256: str
    size: int  # bytes
    python: str
    platform: str
    requirements: tuple[str, ...]
    reused: bool


def read_lock(path: Path) -> list[Pin]:
    """Return the pins of a pip requirements file; raise FleetfitError where one has no sha256 hash."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FleetfitError(
            f"The lock {path} cannot be read: {error.strerror}.",
            code="lock_not_found",
            remedy="Name a file under locks/, such as locks/open-webui/cpu-py311.txt.",
        ) from error
    pins: list[Pin] = []
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip()
        if not line:
            continue
        hashes = tuple(sorted(re.findall(r"--hash=sha256:([0-9a-f]{64})", line)))
        specification = re.sub(r"\s*--hash=\S+", "", line).strip()
        try:
            requirement = Requirement(specification)
        except InvalidRequirement as error:
            raise FleetfitError(
                f"{path}: '{specification}' is not a pinned requirement.",
                code="lock_not_pinned",
                remedy="A lock has only lines of the form name==version --hash=sha256:….",
            ) from error
        versions = [s.version for s in requirement.specifier if s.operator == "=="]
        if len(versions) != 1 or len(list(requirement.specifier)) != 1 or not hashes:
            raise FleetfitError(
                f"{path}: {requirement.name} is not pinned to one version with sha256 hashes.",
                code="lock_not_pinned",
                remedy="Make the lock again with `uv pip compile --generate-hashes`.",
            )
        marker = str(requirement.marker) if requirement.marker else None
        pins.append(Pin(canonicalize_name(requirement.name), versions[0], hashes, marker))
    if not pins:
        raise FleetfitError(f"The lock {path} is empty.", code="lock_not_pinned", remedy="Make it again.")
    return pins


def marker_environment(python: str, machine: str) -> dict[str, str]:
    """Return the PEP 508 environment of a Linux host: CPython ``python`` ("3.11"), ``machine`` ("x86_64")."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
        "extra": "",
    }


def pins_for(pins: Sequence[Pin], python: str, machine: str) -> list[Pin]:
    """Return the pins whose marker holds on the target, sorted by name.

    pip evaluates markers for the Python that runs it, not for ``--python-version``; so they are decided here.
    """
    environment = marker_environment(python, machine)
    kept = [p for p in pins if p.marker is None or Marker(p.marker).evaluate(environment)]
    return sorted(kept, key=lambda p: p.name)


def platform_tags(machine: str, glibc: str) -> list[str]:
    """Return pip's platform tags for a host with this C library, newest first (PEP 600, legacy names)."""
    major, minor = (int(part) for part in glibc.split("."))
    oldest = 5 if machine == "x86_64" else 17
    tags: list[str] = []
    legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    for number in range(minor, oldest - 1, -1):
        tags.append(f"manylinux_{major}_{number}_{machine}")
        if number in legacy:
            tags.append(f"{legacy[number]}_{machine}")
    return [*tags, f"linux_{machine}"]


def cache_key(lock: Path, python: str, machine: str, glibc: str) -> str:
    """Return the content key of a wheelhouse: a digest of the lock, the Python, the platform, the layout."""
    digest = hashlib.sha256()
    for part in (str(FORMAT), python, machine, glibc):
        digest.update(part.encode() + b"\0")
    digest.update(lock.read_bytes())
    return digest.hexdigest()[:24]


def build_wheelhouse(
    lock: Path,
    python: str,
    cache: Path,
    *,
    machine: str = "x86_64",
    glibc: str = DEFAULT_GLIBC,
    jobs: int = 3,
    report: Callable[[str], None] = lambda _: None,
) -> Wheelhouse:
    """Return the wheelhouse of ``lock`` for CPython ``python`` ("3.11"), from ``cache`` where it is there.

    Downloads use this machine's pip settings and must match the lock's hashes. What an interrupted build
    has fetched is used by the next one; the tar appears under its name only when it is complete. Raises
    FleetfitError with codes ``lock_not_found``, ``lock_not_pinned``, ``not_offered`` (with the pins),
    ``hash_mismatch``, ``download_failed``, ``no_interpreter`` (to compile a source release), ``disk_full``.
    """
    if not re.fullmatch(r"3\.\d+", python):
        raise FleetfitError(
            f"'{python}' is not a Python version.", code="bad_python", remedy="Write it as 3.11."
        )
    pins = pins_for(read_lock(lock), python, machine)
    name = f"{lock.resolve().parent.name}-{lock.stem}-{machine}-{cache_key(lock, python, machine, glibc)}"
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{name}.lock", report):
        record = cache / f"{name}.json"
        found = _read_record(record, cache)
        if found is not None:
            return found
        work = cache / f"{name}.partial"
        wheels = work / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        _fetch(pins, wheels, python, platform_tags(machine, glibc), jobs, report)
        built = _pack(
            pins, work, wheels, cache / f"{name}.tar", python, f"{machine}-glibc{glibc}", lock, report
        )
        _write_json(record, {**asdict(built), "tar": built.tar.name})
        shutil.rmtree(work)
        return built


def build_first(
    locks: Sequence[Path],
    python: str,
    cache: Path,
    *,
    machine: str = "x86_64",
    glibc: str = DEFAULT_GLIBC,
    report: Callable[[str], None] = lambda _: None,
) -> Wheelhouse:
    """Build the first lock whose releases this machine's indexes offer; raise the last error else."""
    for number, lock in enumerate(locks, start=1):
        try:
            return build_wheelhouse(lock, python, cache, machine=machine, glibc=glibc, report=report)
        except FleetfitError as error:
            if error.code != "not_offered" or number == len(locks):
                raise
            report(f"{error.message} Going on with {locks[number].name}.")
    raise FleetfitError("No lock was given.", code="lock_not_found", remedy="Name a file under locks/.")


def tar_sha256(path: Path) -> str:
    """Return the sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- fetching ---


def _fetch(
    pins: Sequence[Pin],
    wheels: Path,
    python: str,
    tags: Sequence[str],
    jobs: int,
    report: Callable[[str], None],
) -> None:
    """Bring a wheel of every pin into ``wheels``; those there already, with an allowed hash, are kept."""
    present = _verified(pins, wheels)
    missing = [pin for pin in pins if pin not in present]
    if not missing:
        return
    report(f"Fetching {len(missing)} of {len(pins)} packages for CPython {python}.")
    batches = [missing[start : start + BATCH] for start in range(0, len(missing), BATCH)]
    done = len(present)
    unoffered: list[Pin] = []
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        futures = {pool.submit(_download_batch, batch, wheels, python, tags): batch for batch in batches}
        try:
            for future in as_completed(futures):
                unoffered += future.result()
                done += len(futures[future])
                report(f"{done} of {len(pins)} packages.")
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    refused: list[Pin] = []
    for pin in unoffered:
        report(f"{pin} has no wheel for this target: building it from its source release.")
        if not _build_from_source(pin, wheels, python):
            refused.append(pin)
    if refused:
        names = ", ".join(str(pin) for pin in refused)
        raise FleetfitError(
            f"This machine's package indexes do not offer {names} for CPython {python}.",
            code="not_offered",
            remedy="Add an index or a find-links folder that does (pip config set global.extra-index-url), or"
            " use a lock without it: locks/<service>/default-* and cuda-* take torch from an ordinary index.",
        )


def _pip(arguments: Sequence[str], python: str = sys.executable) -> tuple[int, str]:
    """Run pip with this machine's settings; return the exit status and what it printed."""
    run = subprocess.run(
        [python, "-m", "pip", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={
            **os.environ,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INPUT": "1",
            "PIP_PROGRESS_BAR": "off",
        },
    )
    return run.returncode, run.stdout


def _requirement_line(pin: Pin) -> str:
    return " ".join([str(pin), *(f"--hash=sha256:{digest}" for digest in pin.hashes)])


def _download_batch(batch: Sequence[Pin], wheels: Path, python: str, tags: Sequence[str]) -> list[Pin]:
    """Fetch the wheels of a batch; return the pins of which no wheel for the target is offered."""
    left = list(batch)
    unoffered: list[Pin] = []
    while left:
        with tempfile.TemporaryDirectory(prefix="batch-", dir=wheels.parent) as directory:
            requirements = Path(directory, "requirements.txt")
            requirements.write_text("".join(_requirement_line(pin) + "\n" for pin in left), encoding="utf-8")
            arguments = [
                "download",
                "--no-deps",
                "--require-hashes",
                "--only-binary",
                ":all:",
                "--no-cache-dir",
            ]
            arguments += ["--implementation", "cp", "--python-version", python]
            arguments += [option for tag in tags for option in ("--platform", tag)]
            status, output = _pip([*arguments, "--dest", directory, "--requirement", str(requirements)])
            if status == 0:
                for wheel in Path(directory).glob("*.whl"):
                    wheel.replace(wheels / wheel.name)
                return unoffered
        named = re.search(r"No matching distribution found for ([^\s=;]+)", output)
        absent = [pin for pin in left if named and pin.name == canonicalize_name(named.group(1))]
        if not absent:
            raise _pip_error(output)
        unoffered += absent
        left = [pin for pin in left if pin not in absent]
    return unoffered


def _pip_error(output: str) -> FleetfitError:
    """Return the error that pip's output stands for."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if "DO NOT MATCH THE HASHES" in output:
        detail = next((line for line in lines if "from http" in line or "from file" in line), "")
        return FleetfitError(
            f"A downloaded package does not have the sha256 that the lock pins. {detail}".strip(),
            code="hash_mismatch",
            remedy="The file was replaced or damaged: find out by whom before you use this index.",
        )
    if "No space left on device" in output:
        return FleetfitError(
            "The disk of the wheelhouse cache is full.",
            code="disk_full",
            remedy="Free about 3 GiB and run it again.",
        )
    return FleetfitError(
        "pip could not fetch the packages: " + " | ".join(lines[-3:]),
        code="download_failed",
        remedy="Check this machine's index, proxy and CA settings (`pip config list`) and run it again; what"
        " was fetched is kept.",
    )


def _build_from_source(pin: Pin, wheels: Path, python: str) -> bool:
    """Build the wheel of a release that has only a source archive; return False where there is none."""
    interpreter = find_interpreter(python)
    with tempfile.TemporaryDirectory(prefix="source-", dir=wheels.parent) as directory:
        requirements = Path(directory, "requirements.txt")
        requirements.write_text(_requirement_line(pin) + "\n", encoding="utf-8")
        arguments = ["wheel", "--no-deps", "--require-hashes", "--no-binary", pin.name, "--no-cache-dir"]
        arguments += ["--wheel-dir", directory, "--requirement", str(requirements)]
        status, output = _pip(arguments, interpreter or sys.executable)
        if status != 0:
            if "No matching distribution found" in output:
                return False
            raise _pip_error(output)
        (wheel,) = Path(directory).glob("*.whl")
        pure = wheel.name.endswith("-none-any.whl")
        if not pure and interpreter is None:
            raise FleetfitError(
                f"{pin} has to be compiled for CPython {python}, which this machine does not have.",
                code="no_interpreter",
                remedy=f"Install it (`uv python install {python}`, say) and run this again.",
            )
        # Marks that the hash of this wheel is ours; the lock's hashes were checked on the source archive.
        (wheels / f"{wheel.name}.built").write_text(tar_sha256(wheel), encoding="ascii")
        wheel.replace(wheels / wheel.name)
    return True


def find_interpreter(python: str) -> str | None:
    """Return a CPython of version ``python`` ("3.11") on this machine that starts, or None."""
    home = Path.home()
    pyenv = Path(os.environ.get("PYENV_ROOT", home / ".pyenv"))
    managed = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", home / ".local/share/uv/python"))
    candidates = [os.environ.get("UV_PYTHON"), shutil.which(f"python{python}")]
    candidates += sorted(str(path) for path in pyenv.glob(f"versions/{python}.*/bin/python3"))
    candidates += sorted(str(path) for path in managed.glob(f"cpython-{python}.*/bin/python3"))
    probe = f"import sys, pip; sys.exit(sys.version_info[:2] != ({python.replace('.', ', ')}))"
    for candidate in candidates:
        if candidate is None:
            continue
        try:
            if (
                subprocess.run(
                    [candidate, "-c", probe], capture_output=True, check=False, timeout=30
                ).returncode
                == 0
            ):
                return candidate
        except (OSError, subprocess.TimeoutExpired):
            continue
    return None


def _verified(pins: Sequence[Pin], wheels: Path) -> dict[Pin, Path]:
    """Return the wheel of each pin that is there with an allowed hash; delete wheels that are not."""
    by_release = {(pin.name, pin.version): pin for pin in pins}
    found: dict[Pin, Path] = {}
    for wheel in sorted(wheels.glob("*.whl")):
        try:
            name, version, _build, _tags = parse_wheel_filename(wheel.name)
        except InvalidWheelFilename:
            wheel.unlink()
            continue
        pin = by_release.get((name, str(version)))
        built = wheels / f"{wheel.name}.built"
        allowed = {built.read_text(encoding="ascii")} if built.exists() else set(pin.hashes if pin else ())
        if pin is None or tar_sha256(wheel) not in allowed:
            wheel.unlink()
            continue
        found[pin] = wheel
    return found


# --- packing ---


def _pack(
    pins: Sequence[Pin],
    work: Path,
    wheels: Path,
    tar: Path,
    python: str,
    platform: str,
    lock: Path,
    report: Callable[[str], None],
) -> Wheelhouse:
    """Write the tar beside its name, flush it to the disk and rename it."""
    found = _verified(pins, wheels)
    absent = [str(pin) for pin in pins if pin not in found]
    if absent:
        raise FleetfitError(
            f"Wheels are missing after the download: {', '.join(absent)}.",
            code="download_failed",
            remedy="Run it again.",
        )
    lines = [f"{pin} --hash=sha256:{tar_sha256(found[pin])}" for pin in pins]
    (work / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    description = {
        "format": FORMAT,
        "python": python,
        "platform": platform,
        "lock": f"{lock.resolve().parent.name}/{lock.name}",
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest(),
        "packages": len(pins),
    }
    _write_json(work / "wheelhouse.json", description)
    report(f"Packing {len(pins)} wheels.")
    partial = work / "wheelhouse.tar"
    members = [work / "requirements.txt", work / "wheelhouse.json", *sorted(found.values())]
    with partial.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for member in members:
                # The same content gives the same bytes, whoever packs it and when.
                info = tarfile.TarInfo(str(member.relative_to(work)))
                info.size = member.stat().st_size
                info.mode = 0o644
                with member.open("rb") as content:
                    archive.addfile(info, content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(tar)
    digest = tar_sha256(tar)
    return Wheelhouse(
        tar, digest, tar.stat().st_size, python, platform, tuple(str(pin) for pin in pins), reused=False
    )


def _read_record(record: Path, cache: Path) -> Wheelhouse | None:
    """Return a wheelhouse built before, or None where its tar is gone or has changed in size."""
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        tar = cache / data["tar"]
        if tar.stat().st_size != data["size"]:
            return None
        return Wheelhouse(
            tar,
            data["sha256"],
            data["size"],
            data["python"],
            data["platform"],
            tuple(data["requirements"]),
            reused=True,
        )
    except (OSError, ValueError, KeyError):
        return None


def _write_json(path: Path, content: object) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def _locked(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Let one process at a time build a wheelhouse; the others wait and then find it."""
    with path.open("w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("Another process builds this wheelhouse: waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
