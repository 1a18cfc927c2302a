"""A job: artifacts fetched one after another, here or in a transient unit that outlives the SSH connection.

A job's directory under ``/run`` holds ``spec.json`` (what to fetch; root only, since addresses may hold
signatures) and ``status.json`` (how far it is). The unit is ``fleetfit-download-<id>.service``; its command
line names the directory only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

from .artifact import (
    Artifact,
    Settings,
    artifact_to_dict,
    check_disk,
    existing_parent,
    inspect_artifact,
    make_parent,
    parse_artifacts,
    place_file,
    read_json,
    write_json,
)
from .download import Limiter, fetch_artifact
from .errors import FleetfitError
from .helper_install import current_digest, current_helper
from .unpack import require_ours, unpack_archive

SCHEMA_VERSION = 1
UNIT_PREFIX = "fleetfit-download-"
_STATUS_EVERY_S = 0.5
Outcome = dict[str, Any]
# Runs a command; returns its exit code and what it said on both streams.
RunCommand = Callable[[list[str]], tuple[int, str]]


def settings_from_dict(values: dict[str, Any]) -> Settings:
    """Return the settings named in ``values``; names that this version does not know are an error."""
    return Settings(**{key: value for key, value in values.items() if value is not None})


# --- doing the work


def run_artifacts(
    artifacts: list[Artifact],
    settings: Settings,
    report: Callable[[str, Outcome], None],
    pushed: Optional[dict[str, str]] = None,
) -> None:
    """Fetch, place and unpack each artifact; ``report`` gets its dest and outcome, also while it is fetched.

    One artifact's failure does not keep the others from coming. ``pushed`` maps a dest to a file that is on
    the host already. Raises FleetfitError (``disk_too_small``) before anything is fetched.
    """
    pushed = pushed or {}
    missing = []
    for artifact in artifacts:
        presence = inspect_artifact(artifact, settings.state_dir)
        if not presence.present:
            missing.append((artifact, presence.bytes_to_fetch))
    check_disk(missing, settings.reserve_bytes)
    limiter = Limiter(settings.bandwidth_limit_bytes_per_s)
    for artifact in [pair[0] for pair in missing]:
        try:
            report(artifact.dest, _run_one(artifact, settings, limiter, report, pushed.get(artifact.dest)))
        except FleetfitError as error:
            report(artifact.dest, failure(error))
        except OSError as error:
            problem = FleetfitError(
                f"The artifact {artifact.name} could not be written: {error}.",
                code="disk_write_failed",
                remedy="Repair this on the host, then run again: it goes on where it stopped.",
            )
            report(artifact.dest, failure(problem))


def failure(error: FleetfitError) -> Outcome:
    """Return the outcome of an artifact that failed with ``error``."""
    problem = {"code": error.code, "message": error.message, "remedy": error.remedy}
    return {"state": "failed", "error": problem, "bytes_fetched": 0, "resumed_from": 0}


def _run_one(
    artifact: Artifact,
    settings: Settings,
    limiter: Limiter,
    report: Callable[[str, Outcome], None],
    pushed: Optional[str],
) -> Outcome:
    def progress(have_bytes: int) -> None:
        report(artifact.dest, {"state": "fetching", "have_bytes": have_bytes, "size": artifact.size})

    outcome: Outcome = {
        "state": "downloaded",
        "source": None,
        "bytes_fetched": 0,
        "resumed_from": 0,
        "warnings": [],
    }
    if artifact.unpack:
        require_ours(artifact, artifact.unpack.dest)
    archive_present = artifact.unpack and _archive_present(artifact, settings)
    if not archive_present:
        if pushed:
            _adopt_pushed(artifact, pushed)
            outcome.update(state="pushed", source="controller", bytes_fetched=artifact.size)
        else:
            fetched = fetch_artifact(artifact, settings, limiter, progress)
            outcome.update(vars(fetched))
        place_file(artifact, artifact.partial, settings.state_dir)
    if artifact.unpack:
        report(artifact.dest, {"state": "unpacking", "have_bytes": artifact.size, "size": artifact.size})
        unpack_archive(artifact, artifact.dest, settings.reserve_bytes)
        os.unlink(artifact.dest)  # the tree is what is used; the archive would take its space twice
        outcome["state"] = "unpacked"
    return outcome


def _archive_present(artifact: Artifact, settings: Settings) -> bool:
    plain = Artifact(**{**vars(artifact), "unpack": None})
    return inspect_artifact(plain, settings.state_dir).present


def _adopt_pushed(artifact: Artifact, path: str) -> None:
    """Move a pushed file to the artifact's partial path, verified."""
    make_parent(artifact.dest)
    digest = hashlib.sha256()
    with open(path, "rb") as source, open(artifact.partial, "wb") as stream:
        os.fchmod(stream.fileno(), 0o600)
        for chunk in iter(lambda: source.read(1 << 20), b""):
            digest.update(chunk)
            stream.write(chunk)
    if digest.hexdigest() != artifact.sha256:
        os.unlink(artifact.partial)
        raise FleetfitError(
            f"The artifact {artifact.name} arrived from the controller with the sha256 {digest.hexdigest()}, "
            f"expected was {artifact.sha256}.",
            code="wrong_checksum",
            remedy="Build or fetch it again on the controller, or correct the pinned checksum.",
        )


# --- jobs on the host


@dataclass
class JobState:
    """What is known of a job: whether its unit runs, and the last outcome of each dest."""

    id: str
    running: bool
    finished: bool
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    error: Optional[dict[str, Any]] = None


class Jobs:
    """Starts, finds and reads jobs below ``run_dir``."""

    def __init__(
        self, run_dir: str, libexec_dir: str, run_command: RunCommand, helper_digest: Optional[str] = None
    ) -> None:
        self.run_dir = run_dir
        self.libexec_dir = libexec_dir
        self.helper_digest = helper_digest
        self._run = run_command

    def available(self) -> bool:
        """Return whether transient units can be started here: systemd runs, and we are root."""
        return (
            os.path.isdir("/run/systemd/system") and os.geteuid() == 0 and bool(shutil.which("systemd-run"))
        )

    def helper(self) -> Optional[str]:
        """Return the path of the helper that a job would run; None where the wanted version is missing."""
        if self.helper_digest and current_digest(self.libexec_dir) != self.helper_digest:
            return None
        return current_helper(self.libexec_dir)

    def find(self, artifacts: list[Artifact], settings: Settings) -> list[tuple[str, bool]]:
        """Return running jobs that fetch any of ``artifacts``: id, and whether in the way that is wanted.

        Forgets jobs that have ended without anybody asking how.
        """
        wanted = {artifact.dest: artifact_to_dict(artifact) for artifact in artifacts}
        found = []
        for job_id in self._ids():
            if not self._active(job_id):
                self.forget(job_id)
                continue
            spec = read_json(os.path.join(self._directory(job_id), "spec.json")) or {}
            common = [entry for entry in spec.get("artifacts", []) if entry.get("dest") in wanted]
            if common:
                same = all(wanted[entry["dest"]] == entry for entry in common)
                found.append((job_id, same and spec.get("settings") == vars(settings)))
        return found

    def start(self, artifacts: list[Artifact], settings: Settings) -> str:
        """Start a job for ``artifacts``; return its id, the same for the same artifacts and settings."""
        spec = {
            "schema_version": SCHEMA_VERSION,
            "artifacts": [artifact_to_dict(artifact) for artifact in artifacts],
            "settings": vars(settings),
        }
        job_id = self.job_id(artifacts, settings)
        directory = self._directory(job_id)
        os.makedirs(self.run_dir, mode=0o700, exist_ok=True)
        shutil.rmtree(directory, ignore_errors=True)
        os.mkdir(directory, 0o700)
        write_json(os.path.join(directory, "spec.json"), spec)
        for artifact in artifacts:
            # The unit may write below these only, so they have to exist before it starts.
            make_parent(artifact.dest)
            if artifact.unpack:
                make_parent(artifact.unpack.dest)
        os.makedirs(settings.state_dir, mode=0o700, exist_ok=True)
        helper = self.helper()
        if helper is None:
            raise FleetfitError(
                f"The host helper is not installed in {self.libexec_dir}.",
                code="helper_missing",
                remedy="Run the module fleetfit.llm.host_helper before.",
            )
        code, output = self._run(self._unit_command(job_id, helper, directory, artifacts, settings))
        if code != 0:
            raise FleetfitError(
                f"Starting the unit {UNIT_PREFIX}{job_id}.service failed: {output.strip()}.",
                code="unit_not_started",
                remedy="Look at systemctl status on the host, or set background to never.",
            )
        return job_id

    def job_id(self, artifacts: list[Artifact], settings: Settings) -> str:
        """Return the id of the job for these artifacts and settings: 12 hexadecimal digits."""
        text = json.dumps(
            [[artifact_to_dict(artifact) for artifact in artifacts], vars(settings)], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def stop(self, job_id: str) -> None:
        """Stop a job; what it fetched stays for the next."""
        self._run(["systemctl", "stop", f"{UNIT_PREFIX}{job_id}.service"])
        shutil.rmtree(self._directory(job_id), ignore_errors=True)

    def state(self, job_id: str) -> JobState:
        """Return what is known of the job ``job_id``."""
        # The unit first: a job that ends in between is then seen as running once more, never as lost.
        running = self._active(job_id)
        status = read_json(os.path.join(self._directory(job_id), "status.json")) or {}
        return JobState(
            id=job_id,
            running=running,
            finished=bool(status.get("finished")),
            outcomes=status.get("outcomes", {}),
            error=status.get("error"),
        )

    def wait(self, job_id: str, seconds: float) -> JobState:
        """Return the job's state when it has ended, or after ``seconds``."""
        deadline = time.monotonic() + seconds
        pause = 0.1
        while True:
            state = self.state(job_id)
            if not state.running or time.monotonic() >= deadline:
                return state
            time.sleep(pause)
            pause = min(1.0, pause * 2)

    def forget(self, job_id: str) -> None:
        """Remove the directory of a job that has ended."""
        shutil.rmtree(self._directory(job_id), ignore_errors=True)

    def _ids(self) -> list[str]:
        try:
            return sorted(os.listdir(self.run_dir))
        except OSError:
            return []

    def _directory(self, job_id: str) -> str:
        return os.path.join(self.run_dir, job_id)

    def _active(self, job_id: str) -> bool:
        command = ["systemctl", "show", "--property=ActiveState", "--value"]
        output = self._run([*command, f"{UNIT_PREFIX}{job_id}.service"])[1]
        return output.strip() in ("active", "activating", "deactivating", "reloading")

    def _unit_command(
        self, job_id: str, helper: str, directory: str, artifacts: list[Artifact], settings: Settings
    ) -> list[str]:
        writable = {directory, settings.state_dir}
        for artifact in artifacts:
            writable.add(existing_parent(artifact.dest))
            if artifact.unpack:
                writable.add(existing_parent(artifact.unpack.dest))
        properties = {
            # A killed downloader goes on by itself; a reported failure does not come back.
            "Restart": "on-abnormal",
            "RestartSec": "2",
            "Nice": "10",
            "IOSchedulingClass": "best-effort",
            "IOSchedulingPriority": "7",
            "UMask": "0022",
            "NoNewPrivileges": "yes",
            "ProtectSystem": "strict",
            "ProtectHome": "read-only",
            "PrivateDevices": "yes",
            "ProtectKernelModules": "yes",
            "ProtectKernelTunables": "yes",
            "ProtectControlGroups": "yes",
            "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
            "RestrictSUIDSGID": "yes",
            "LockPersonality": "yes",
            "MemoryDenyWriteExecute": "yes",
            "CapabilityBoundingSet": "CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER",
            "ReadWritePaths": " ".join(f'"{path}"' for path in sorted(writable)),
        }
        command = ["systemd-run", "--quiet", "--collect", f"--unit={UNIT_PREFIX}{job_id}.service"]
        command.append("--description=fleetfit: download artifacts")
        command += [f"--property={name}={value}" for name, value in properties.items()]
        return [*command, "--", sys.executable, "-I", helper, "download", directory]


def main(argv: list[str]) -> int:
    """Run the job in the directory ``argv[0]``: exit code 0, or 1 where an artifact failed."""
    if len(argv) != 1:
        sys.stderr.write("usage: fleetfit-host.pyz download JOB_DIRECTORY\n")
        return 2
    directory = argv[0]
    spec = read_json(os.path.join(directory, "spec.json"))
    if spec is None or spec.get("schema_version") != SCHEMA_VERSION:
        version = None if spec is None else spec.get("schema_version")
        raise FleetfitError(
            f"{directory}/spec.json has the schema_version {version!r}, this helper knows {SCHEMA_VERSION}.",
            code="unknown_schema_version",
            remedy="Run the play again, so that helper and job come from one controller.",
        )
    status = _Status(directory)
    try:
        artifacts = parse_artifacts(spec["artifacts"])
        run_artifacts(artifacts, settings_from_dict(spec["settings"]), status.report)
    except FleetfitError as error:
        status.error = {"code": error.code, "message": error.message, "remedy": error.remedy}
    status.finish()
    # The addresses in it may hold passwords. The status stays: an execution that lost its connection and
    # the one that follows it may both ask for it.
    os.unlink(os.path.join(directory, "spec.json"))
    return 1 if status.failed else 0


class _Status:
    """Writes ``status.json`` at each outcome, and at most twice a second in between."""

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, "status.json")
        # After a kill the unit starts again: what came before the kill stays reported.
        self._outcomes: dict[str, Outcome] = (read_json(self._path) or {}).get("outcomes", {})
        self._written = 0.0
        self.error: Optional[dict[str, Any]] = None

    def report(self, dest: str, outcome: Outcome) -> None:
        """Take the outcome of ``dest``."""
        self._outcomes[dest] = outcome
        if outcome["state"] != "fetching" or time.monotonic() - self._written > _STATUS_EVERY_S:
            self._write(finished=False)

    def finish(self) -> None:
        """Write the last state."""
        self._write(finished=True)
        for outcome in self._outcomes.values():
            if outcome.get("error"):
                sys.stderr.write(outcome["error"]["message"] + "\n")
        if self.error:
            sys.stderr.write(f"{self.error['message']}\n")

    @property
    def failed(self) -> bool:
        """Return whether anything failed."""
        return bool(self.error) or any(outcome["state"] == "failed" for outcome in self._outcomes.values())

    def _write(self, *, finished: bool) -> None:
        self._written = time.monotonic()
        write_json(self._path, {"finished": finished, "outcomes": self._outcomes, "error": self.error})
