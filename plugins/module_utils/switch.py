"""The switch of a service from one release to another: one journalled transaction on the host.

The transaction runs in a transient unit and needs no controller. Each step is in the journal, on disk, before
it is done; whatever cuts it short - a kill, a reboot, power loss - its restart, the boot unit or the next
call finds the journal and either goes back to the old release or, once the gate has passed, completes.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, Optional

from . import backup as backups
from .errors import FleetfitError
from .gate import GateSpec, gate_of_release, parse_gate, read_unit, wait_ready
from .manifest import HostPaths, check_service_name, write_atomic
from .proof import is_due, prove
from .release import (
    collect_garbage,
    current_digest,
    fill_placeholders,
    garbage,
    point_current,
    read_release,
    read_settings,
    release_path,
    release_version,
)
from .units import MIB

SCHEMA_VERSION = 1
HELPER = "/opt/fleetfit/libexec/current/fleetfit-host.pyz"

# committed: the wanted release serves. refused: the check before it failed, nothing was touched.
# reverted: the old release serves again (or, at a first install, nothing does, as before).
# failed: the gate failed and there was nothing to go back to that serves.
FINAL_STATES = ("committed", "refused", "reverted", "failed")
FORWARD_STEPS = ("precheck", "stop", "backup", "put_back", "flip", "start", "gate", "prove", "record")
# switch: to another release. rollback: the same, to an earlier one, which is then held. restart: the same
# release again. restore: the same release with data from a backup.
KINDS = ("switch", "rollback", "restart", "restore")
REVERT_STEPS = (
    "revert_stop",
    "revert_flip",
    "revert_backup",
    "revert_start",
    "revert_gate",
    "revert_displaced",
)
PRECHECK_TIMEOUT_S = 600
# Longer than any unit's TimeoutStopSec that our roles set; systemd kills the engine at that.
STOP_TIMEOUT_S = 300
# What failed its gate has no answers worth waiting for, and one that hangs would use its unit's whole
# TimeoutStopSec while nothing serves: after this it is killed, so that the old release starts within 5 s.
FAILED_STOP_S = 2.0
# The transient unit is started again this often after it was killed, then the boot unit or the next call
# helps.
MAX_RESTARTS = 5
_STEP_ERRORS = (FleetfitError, OSError, subprocess.SubprocessError)
WAIT_POLL_S = 0.3
STOP_POLL_S = 0.1
# Without a transaction the lock is held for moments only: by one that ends, or by garbage collection.
REQUEST_WAIT_S = 60.0
# How long a transaction may be without a process before it counts as dead (systemd restarts it after 1 s).
DEAD_AFTER_S = 6.0


def transaction_unit(service: str) -> str:
    """Return the name of the transient unit that switches ``service``."""
    return f"fleetfit-switch-{service}.service"


def journal_path(paths: HostPaths, service: str) -> str:
    """Return the path of the journal of the service's last transaction."""
    return os.path.join(paths.switch(), f"{service}.json")


def good_path(paths: HostPaths, service: str) -> str:
    """Return the path of the root-only record of good starts."""
    return os.path.join(paths.switch(), f"{service}.good")


def _read_json(path: str) -> Optional[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as stream:
            document = json.load(stream)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise FleetfitError(
            f"{path} is not JSON ({error}).",
            code="journal_unreadable",
            remedy="Move it away; then run the role again.",
        ) from error
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        version = document.get("schema_version") if isinstance(document, dict) else None
        raise FleetfitError(
            f"{path} has schema version {version!r}; this fleetfit knows {SCHEMA_VERSION}.",
            code="journal_unreadable",
            remedy="Use the fleetfit that wrote it, or a newer one.",
        )
    return document


def _write_json(path: str, document: Mapping[str, Any]) -> None:
    write_atomic(path, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode(), 0o600)


def read_journal(paths: HostPaths, service: str) -> Optional[dict[str, Any]]:
    """Return the journal of the service's last transaction, or None if there never was one."""
    return _read_json(journal_path(paths, service))


def read_good(paths: HostPaths, service: str) -> dict[str, Any]:
    """Return the record of good starts: ``digest``, ``restart_on``, ``history`` (newest first), ``gate``.

    ``sequence`` has the releases in the order in which they were switched to, the newest first; unlike
    ``history``, going back does not change it. ``hold`` is None or what a rollback left: ``release``,
    ``instead_of`` and ``since`` (Unix seconds). Also ``proofs`` (digest → how its memory was proven) and
    ``last_start`` (seconds, see _remember).
    """
    document = _read_json(good_path(paths, service)) or {}
    return {
        "schema_version": SCHEMA_VERSION,
        "digest": None,
        "restart_on": {},
        "history": [],
        "sequence": document.get("history", []),
        "hold": None,
        "gate": None,
        "proofs": {},
        "last_start": None,
        **document,
    }


def end_hold(paths: HostPaths, service: str) -> None:
    """Forget that a rollback holds the service where it is."""
    _write_json(good_path(paths, service), {**read_good(paths, service), "hold": None})


def is_running(journal: Optional[Mapping[str, Any]]) -> bool:
    """Return whether the journal says that a transaction has not ended."""
    return journal is not None and journal["state"] not in FINAL_STATES


def hash_files(paths: HostPaths, files: Sequence[str]) -> dict[str, Optional[str]]:
    """Return path → sha256 of each file's content, None for one that is not there."""
    hashes: dict[str, Optional[str]] = {}
    for path in files:
        try:
            with open(paths.at(path), "rb") as stream:
                hashes[path] = hashlib.sha256(stream.read()).hexdigest()
        except FileNotFoundError:
            hashes[path] = None
    return hashes


@contextlib.contextmanager
def switch_lock(paths: HostPaths, service: str, *, wait_s: float = 0.0) -> Iterator[bool]:
    """Hold the service's switch lock; yields False where somebody else has it after ``wait_s`` seconds."""
    os.makedirs(paths.switch(), mode=0o700, exist_ok=True)
    descriptor = os.open(os.path.join(paths.switch(), f".{service}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end = time.monotonic() + wait_s
        held = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
                break
            except OSError:
                if time.monotonic() >= end:
                    break
                time.sleep(0.1)
        yield held
    finally:
        os.close(descriptor)


def new_journal(
    paths: HostPaths,
    service: str,
    digest: str,
    *,
    kind: str,
    keep: int,
    previous: Optional[str],
    put_back: Optional[Mapping[str, Any]] = None,
) -> dict[str, Any]:
    """Return the journal of a transaction that has not begun: what it needs to end without the controller.

    ``put_back`` is the data that the service gets before it starts: ``source``, ``copy`` and ``name``.
    """
    wanted = read_release(paths, service, digest)
    parse_gate(service, wanted["gate"], read_settings(paths, service, digest))
    conflicts = [check_service_name(name) for name in wanted.get("conflicts") or ()]
    return {
        "schema_version": SCHEMA_VERSION,
        "id": uuid.uuid4().hex,
        "service": service,
        "kind": kind,
        "from": previous,
        "to": digest,
        "keep": keep,
        "was_active": read_unit(service).active == "active",
        # Other engines whose place this one takes: noted before any is stopped, so that none is forgotten.
        "conflicts": conflicts,
        "displaced": [name for name in conflicts if _runs(name)],
        "state": "running",
        "step": "requested",
        "steps": [],
        "cause": None,
        "gate": None,
        "revert_gate": None,
        "precheck": None,
        "backup": None,
        "put_back": dict(put_back) if put_back else None,
        "taken_back": False,
        "started_at": None,
        "hashes": {},
        "faults": [],
        "requested_at": time.time(),
        "ended_at": None,
    }


def decide_recovery(journal: Mapping[str, Any]) -> str:
    """Return what to do with a transaction that was cut short.

    ``nothing`` it had ended; ``run`` it had not begun; ``refuse`` the old engine was not touched yet;
    ``again`` a restart of the same release, which has no other to go back to; ``complete`` the gate had
    passed; ``revert``.
    """
    if journal["state"] in FINAL_STATES:
        return "nothing"
    step = journal["step"]
    if step == "requested":
        return "run"
    if step == "precheck":
        return "refuse"
    gate = journal["gate"]
    # A release whose memory was not proven yet is not good: what cut it short may have been that.
    if step in ("gate", "prove", "record") and gate and gate["ok"] and not gate.get("proof_due"):
        return "complete"
    if journal["kind"] == "restart":
        return "again"
    return "revert"


def parse_fit_params(text: str) -> dict[str, int]:
    """Return line name → bytes (model + context + compute) from ``llama-fit-params --fit-print on``.

    Its lines are ``<device> <model> <context> <compute>`` in whole MiB (llama.cpp, common/fit.cpp).
    """
    found: dict[str, int] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 4 and all(word.isdecimal() for word in words[-3:]):
            found[" ".join(words[:-3])] = sum(int(word) for word in words[-3:]) * MIB
    return found


def compare_fit(reported: Mapping[str, int], limits: Mapping[str, Any]) -> Optional[str]:
    """Return the sentence with both numbers where the engine's own accounting exceeds a limit, or None."""
    for name in sorted(limits):
        limit = int(limits[name])
        if name not in reported:
            if limit > 0:
                return f"the engine reported no memory for {name}, the plan puts {limit // MIB} MiB there"
            continue
        if reported[name] > limit:
            return (
                f"the engine itself needs {reported[name] // MIB} MiB on {name}, "
                f"the plan allows {limit // MIB} MiB"
            )
    return None


def _as_service_user(service: str) -> dict[str, Any]:
    """Return subprocess arguments that drop root to the unit's own user, who has all that a check needs."""
    done = subprocess.run(
        ["systemctl", "show", f"{service}.service", "--property=User"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    name = done.stdout.strip().partition("=")[2]
    if not name or name == "root" or os.geteuid() != 0:
        return {}
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return {}
    return {
        "user": entry.pw_uid,
        "group": entry.pw_gid,
        "extra_groups": os.getgrouplist(name, entry.pw_gid),
    }


def run_precheck(
    service: str, precheck: Mapping[str, Any], release: str, environ: Mapping[str, str]
) -> dict[str, Any]:
    """Run the engine's own accounting of ``precheck`` and compare it with the plan's limits.

    Returns ``{"ok", "message", "reported", "limits"}`` (bytes). Raises FleetfitError for an unknown kind.
    """
    if precheck.get("kind") != "llama_fit_params":
        raise FleetfitError(
            f"The precheck kind {precheck.get('kind')!r} is not known.",
            code="bad_precheck",
            remedy="Use llama_fit_params.",
        )
    limits = dict(precheck.get("limits") or {})
    argv = [fill_placeholders(argument, release) for argument in precheck["argv"]]
    failed = {"ok": False, "reported": {}, "limits": limits}
    try:
        done = subprocess.run(
            argv,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PRECHECK_TIMEOUT_S,
            cwd="/",
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", **environ},
            **_as_service_user(service),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {**failed, "message": f"{argv[0]} could not be run: {error}"}
    reported = parse_fit_params(done.stdout)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        return {**failed, "message": f"{argv[0]} ended with {done.returncode}: {last}"}
    if not reported:
        return {**failed, "message": f"{argv[0]} printed no memory figures"}
    difference = compare_fit(reported, limits)
    return {
        "ok": difference is None,
        "message": difference or "within the plan",
        "reported": reported,
        "limits": limits,
    }


def _runs(service: str) -> bool:
    """Return whether a unit runs or is about to: a start that waits for another unit counts."""
    unit = read_unit(service)
    return unit.active not in ("inactive", "failed") or unit.starting


def _systemctl(*arguments: str, timeout_s: float = 60.0) -> None:
    done = subprocess.run(
        ["systemctl", *arguments], check=False, capture_output=True, text=True, timeout=timeout_s
    )
    if done.returncode != 0:
        raise FleetfitError(
            f"systemctl {' '.join(arguments)} failed: {done.stderr.strip() or done.returncode}",
            code="systemctl_failed",
            remedy="Look at the unit with systemctl status.",
        )


def needs_daemon_reload(service: str) -> bool:
    """Return whether the unit file on disk is newer than what systemd has loaded."""
    done = subprocess.run(
        ["systemctl", "show", f"{service}.service", "--property=NeedDaemonReload"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.stdout.strip() == "NeedDaemonReload=yes"


class Transaction:
    """One transaction over its journal; the caller holds the service's switch lock."""

    def __init__(self, paths: HostPaths, journal: dict[str, Any]) -> None:
        """Work on ``journal``, which is written at every step."""
        self.paths = paths
        self.journal = journal
        self.service: str = journal["service"]
        self.reverting = False

    def save(self) -> None:
        """Put the journal on disk; on the way back a full disk does not keep the old engine stopped."""
        try:
            _write_json(journal_path(self.paths, self.service), self.journal)
        except OSError:
            if not self.reverting:
                raise

    def _fault(self, moment: str) -> None:
        """Die here if FLEETFIT_FAULT of a test says so: before:<step> or after:<step>, once a transaction."""
        if os.environ.get("FLEETFIT_FAULT") == moment and moment not in self.journal["faults"]:
            self.journal["faults"].append(moment)
            self.save()
            os.kill(os.getpid(), signal.SIGKILL)

    def _do(self, step: str, action: Callable[[], Optional[dict[str, Any]]]) -> None:
        """Journal ``step``, do it, and journal what it found (merged into the journal)."""
        self.journal["step"] = step
        self.journal["steps"].append({"step": step, "at": time.time(), "done": False})
        self.save()
        self._fault(f"before:{step}")
        found = action()
        self.journal.update(found or {})
        self.journal["steps"][-1]["done"] = True
        self.save()
        self._fault(f"after:{step}")

    def _end(self, state: str, cause: Optional[Mapping[str, Any]] = None) -> None:
        if cause is not None:
            self.journal["cause"] = dict(cause)
        self.journal["state"] = state
        self.journal["ended_at"] = time.time()
        self.save()

    def go(self) -> str:
        """Run, or recover, until the transaction has ended; return its final state."""
        try:
            self._advance(decide_recovery(self.journal))
        except _STEP_ERRORS as error:
            # Whatever goes wrong ends the transaction: one that stays under way would block every later call.
            self._give_up(error)
        return str(self.journal["state"])

    def _give_up(self, error: Exception) -> None:
        step = self.journal["step"]
        cause = {"step": step, "state": "error", "message": str(error)}
        if step in ("requested", "precheck"):
            self._end("refused", cause)
        elif self.journal["kind"] == "restart" and self.journal.get("displaced") and not self.reverting:
            self.journal["cause"] = self.journal["cause"] or cause
            try:
                self._bring_back()
            except _STEP_ERRORS as second:
                self.journal["revert_gate"] = {"ok": False, "state": "error", "message": str(second)}
                self._end("failed")
        elif self.journal["kind"] == "restart" or step == "record" or self.reverting:
            self.reverting = True
            self._end("failed", self.journal["cause"] or cause)
        else:
            self.journal["cause"] = self.journal["cause"] or cause
            try:
                self._revert()
            except _STEP_ERRORS as second:
                self.journal["revert_gate"] = {"ok": False, "state": "error", "message": str(second)}
                self._end("failed")

    def _advance(self, decision: str) -> None:
        if decision == "run":
            self._forward()
        elif decision == "refuse":
            self._end(
                "refused", {"step": "precheck", "state": "interrupted", "message": "it was interrupted"}
            )
        elif decision == "complete":
            self._record()
        elif decision == "again" and self.journal["step"] == "revert_displaced":
            self._bring_back()
        elif decision == "again":
            self._restart()
        elif decision == "revert":
            self._note_interruption()
            self._revert()

    def rewind(self) -> bool:
        """Do only what must precede the start of services at boot; return whether go() has work left."""
        decision = decide_recovery(self.journal)
        if decision == "revert" and not self.journal["taken_back"]:
            self._note_interruption()
            self._take_back()
        return decision != "nothing"

    def _note_interruption(self) -> None:
        if self.journal["cause"] is None:
            step = self.journal["step"]
            message = f"it was interrupted at the step '{step}'"
            self.journal["cause"] = {"step": step, "state": "interrupted", "message": message}

    def _forward(self) -> None:
        if self.journal["kind"] == "restart":
            self._restart()
            return
        release = read_release(self.paths, self.service, self.journal["to"])
        wanted_backup = self._wanted_backup(release)
        put_back = self.journal.get("put_back")
        if wanted_backup:
            extra_bytes = backups.tree_bytes(put_back["copy"]) if put_back else 0
            backups.check_room(self.paths, self.service, wanted_backup, extra_bytes)
        if release.get("precheck") and self.journal["kind"] != "restore":
            where = release_path(self.service, self.journal["to"])
            environ = {name: fill_placeholders(value, where) for name, value in release["environ"].items()}
            self._do(
                "precheck",
                lambda: {"precheck": run_precheck(self.service, release["precheck"], where, environ)},
            )
            precheck = self.journal["precheck"]
            if not precheck["ok"]:
                self._end(
                    "refused", {"step": "precheck", "state": "precheck", "message": precheck["message"]}
                )
                return
        self._do("stop", self._stop_all)
        if wanted_backup:
            self._do("backup", lambda: {"backup": self._back_up(wanted_backup)})
        if put_back:
            self._do("put_back", lambda: self._put_back(put_back))
        if self.journal["kind"] != "restore":
            self._do("flip", lambda: self._flip(self.journal["to"]))
        self._do("start", self._start)
        cause = self._judge()
        if cause is None:
            self._record()
        else:
            self.journal["cause"] = cause
            self._revert()

    def _restart(self) -> None:
        """Restart the same release; where its gate fails there is no other release to go back to."""
        self._do("stop", self._stop_all)
        self._do("start", self._start)
        cause = self._judge()
        if cause is None:
            self._record()
            return
        if self.journal.get("displaced"):
            self.journal["cause"] = cause
            self._bring_back()
        else:
            self._end("failed", cause)

    def _wanted_backup(self, release: Mapping[str, Any]) -> Optional[Mapping[str, Any]]:
        """Return what to copy before ``release`` starts, or None where its start cannot change the data."""
        spec: Optional[Mapping[str, Any]] = release.get("backup")
        if not spec or not self.journal["from"]:
            return None
        if self.journal.get("put_back"):
            return spec
        old = read_release(self.paths, self.service, self.journal["from"])
        return spec if backups.is_needed(spec, old, release) else None

    def _back_up(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        previous = self.journal["from"]
        facts = {
            "version": release_version(self.paths, self.service, previous),
            "environment": read_release(self.paths, self.service, previous).get("environment"),
        }
        return backups.back_up(self.paths, self.service, spec, previous, self.journal["id"], facts)

    def _put_back(self, put_back: Mapping[str, Any]) -> None:
        backups.give_to_owner(put_back["copy"], put_back["source"])
        backups.restore(self.paths, put_back)

    def _stop(self) -> None:
        if _runs(self.service):
            _systemctl("stop", f"{self.service}.service", timeout_s=STOP_TIMEOUT_S)

    def _stop_failed(self) -> None:
        """Stop a release that is not to serve: asked to end, and killed where it does not within FAILED_STOP_S."""
        if not _runs(self.service):
            return
        unit = f"{self.service}.service"
        _systemctl("stop", "--no-block", unit)
        end = time.monotonic() + FAILED_STOP_S
        while _runs(self.service) and time.monotonic() < end:
            time.sleep(STOP_POLL_S)
        if _runs(self.service):
            # Between the look and the kill it may have ended: then there is nothing to kill, and that is well.
            subprocess.run(
                ["systemctl", "kill", "--signal=SIGKILL", unit], check=False, capture_output=True, timeout=60
            )
        self._stop()

    def _stop_all(self) -> None:
        """Stop the service and those that cannot run beside it: two engines cannot hold one GPU's memory."""
        for name in self.journal.get("conflicts") or ():
            if _runs(name):
                _systemctl("stop", f"{name}.service", timeout_s=STOP_TIMEOUT_S)
        self._stop()

    def _displace(self) -> None:
        """Keep those that gave way from the next boot on: this service has taken their place."""
        for name in self.journal.get("conflicts") or ():
            if read_unit(name).load != "not-found":
                _systemctl("disable", "--quiet", f"{name}.service")

    def _bring_back(self) -> None:
        """Start again what gave way to this service, which does not come back at boot either."""

        def start() -> None:
            self._stop_failed()
            _systemctl("disable", "--quiet", f"{self.service}.service")
            for name in self.journal["displaced"]:
                _systemctl("start", "--no-block", f"{name}.service")

        self.reverting = True
        self._do("revert_displaced", start)
        self._end("reverted")

    def _flip(self, digest: Optional[str]) -> None:
        point_current(self.paths, self.service, digest)

    def _start(self) -> dict[str, Any]:
        # Always: a drop-in may be a link into the release, and systemd misses one that became older (a
        # revert).
        _systemctl("daemon-reload")
        subprocess.run(
            ["systemctl", "reset-failed", f"{self.service}.service"],
            check=False,
            capture_output=True,
            timeout=60,
        )
        release = read_release(self.paths, self.service, str(current_digest(self.paths, self.service)))
        hashes = hash_files(self.paths, release["restart_on"])
        started_at = time.time()
        _systemctl("start", "--no-block", f"{self.service}.service")
        return {"hashes": hashes, "started_at": started_at}

    def _judge(self) -> Optional[dict[str, Any]]:
        """Gate the new release and, once per release, prove its memory; return the cause of a failure."""
        digest = self.journal["to"]
        spec = gate_of_release(self.paths, self.service, digest)
        known = read_good(self.paths, self.service)["proofs"].get(digest)
        due = is_due(spec, known)
        self._do("gate", lambda: {"gate": self._gate(spec, known, due=due)})
        if self.journal["gate"].get("proof_due"):
            self._do("prove", lambda: {"gate": self._prove(spec)})
        gate = self.journal["gate"]
        if gate["ok"]:
            return None
        return {"step": self.journal["step"], "state": gate["state"], "message": gate["message"]}

    def _gate(self, spec: GateSpec, proof: Any, *, due: bool = False) -> dict[str, Any]:
        gate = wait_ready(spec, since=self.journal["started_at"], restarts=0)
        ready_s = round(time.time() - self.journal["started_at"], 2)
        return {**gate, "ready_s": ready_s, "proof": proof, "proof_due": due and gate["ok"]}

    def _prove(self, spec: GateSpec) -> dict[str, Any]:
        ready = self.journal["gate"]
        gate = prove(spec, ready, since=self.journal["started_at"], restarts=0)
        return {**gate, "ready_s": ready["ready_s"], "proof_due": False}

    def _record(self) -> None:
        def record() -> None:
            self._displace()
            self._remember(self.journal["to"], self.journal["gate"], self._hold())

        self._do("record", record)
        self._end("committed")

    def _hold(self) -> Optional[dict[str, Any]]:
        """Return what holds the service now that the transaction is good."""
        kind = self.journal["kind"]
        if kind == "rollback":
            return {
                "release": self.journal["to"],
                "instead_of": self.journal["from"],
                "since": time.time(),
            }
        hold: Optional[dict[str, Any]] = read_good(self.paths, self.service)["hold"]
        return None if kind == "switch" else hold

    def _remember(self, digest: str, gate: Mapping[str, Any], hold: Optional[Mapping[str, Any]]) -> None:
        good = read_good(self.paths, self.service)
        history = [digest, *[old for old in good["history"] if old != digest]]
        # Of releases that are gone nothing needs to be known.
        proofs = {old: proof for old, proof in good["proofs"].items() if old in history[:50]}
        if gate.get("proof"):
            proofs[digest] = dict(gate["proof"])
        sequence = list(good["sequence"])
        if digest not in sequence or (self.journal["kind"] == "switch" and digest == self.journal["to"]):
            sequence = [digest, *[old for old in sequence if old != digest]]
        _write_json(
            good_path(self.paths, self.service),
            {
                "schema_version": SCHEMA_VERSION,
                "digest": digest,
                "restart_on": self.journal["hashes"],
                "history": history[:50],
                "sequence": sequence[:50],
                "hold": dict(hold) if hold else None,
                "gate": dict(gate),
                "proofs": proofs,
                "last_start": {"digest": digest, "ready_s": gate.get("ready_s"), "stop_s": self._stop_s()},
                "recorded_at": time.time(),
            },
        )

    def _stop_s(self) -> Optional[float]:
        """Return the seconds from the last stop to the start after it, what lies between included."""
        begun: Optional[float] = None
        for step in self.journal["steps"]:
            if step["step"] in ("stop", "revert_stop"):
                begun = step["at"]
        started_at = self.journal["started_at"]
        return round(started_at - begun, 2) if begun is not None and started_at else None

    def _take_back(self) -> None:
        """Stop the new release and point ``current`` to the old one; each part may be done twice."""
        self._do("revert_stop", self._stop_failed)
        self._do("revert_flip", lambda: self._flip(self.journal["from"]))
        if self.journal["backup"]:
            self._do("revert_backup", self._restore)
        self.journal["taken_back"] = True
        self.save()

    def _restore(self) -> None:
        backups.restore(self.paths, self.journal["backup"])

    def _revert(self) -> None:
        self.reverting = True
        if not self.journal["taken_back"]:
            self._take_back()
        previous = self.journal["from"]
        if self.journal.get("displaced"):
            self._bring_back()
            return
        if previous is None:
            self._end("reverted")
            return
        self._do("revert_start", self._start)
        # It was good before: its outage is not made longer by proving it again.
        spec = gate_of_release(self.paths, self.service, previous)
        known = read_good(self.paths, self.service)["proofs"].get(previous)
        self._do("revert_gate", lambda: {"revert_gate": self._gate(spec, known)})
        gate = self.journal["revert_gate"]
        if gate["ok"]:
            # It was started with the files as they are now: the next run need not do so again.
            self._remember(previous, gate, read_good(self.paths, self.service)["hold"])
        self._end("reverted" if gate["ok"] else "failed")


def request(
    paths: HostPaths,
    service: str,
    digest: str,
    *,
    kind: str = "switch",
    keep: int = 2,
    put_back: Optional[Mapping[str, Any]] = None,
) -> dict[str, Any]:
    """Write the journal of a new transaction and return it, or that of one that is under way already."""
    end = time.monotonic() + REQUEST_WAIT_S
    while True:
        with switch_lock(paths, service) as held:
            journal = read_journal(paths, service)
            if journal is not None and is_running(journal):
                return journal
            if held:
                same = kind in ("restart", "restore")
                previous = digest if same else current_digest(paths, service)
                journal = new_journal(
                    paths, service, digest, kind=kind, keep=keep, previous=previous, put_back=put_back
                )
                _write_json(journal_path(paths, service), journal)
                return journal
        if time.monotonic() >= end:
            raise FleetfitError(
                f"Another process holds the switch of {service}.",
                code="switch_busy",
                remedy="Run the role again in a moment.",
            )
        time.sleep(0.1)


def launch(service: str, *, helper: str = HELPER, python: str = sys.executable) -> None:
    """Start the transient unit that runs, or recovers, the transaction; one that runs is left alone."""
    unit = transaction_unit(service)
    # By its digest: a newer helper may become current while this one runs.
    helper = os.path.realpath(helper)
    subprocess.run(["systemctl", "reset-failed", unit], check=False, capture_output=True, timeout=60)
    command = [
        "systemd-run",
        "--no-block",
        "--quiet",
        "--collect",
        f"--unit={unit}",
        f"--description=Switch {service} to another release",
        "--property=Restart=on-failure",
        "--property=RestartSec=1",
        "--property=StartLimitIntervalSec=600",
        f"--property=StartLimitBurst={MAX_RESTARTS}",
        "--property=UMask=0077",
        "--property=OOMScoreAdjust=-900",
        "--",
        python,
        "-I",
        helper,
        "switch",
        f"--service={service}",
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    if done.returncode != 0 and read_unit(unit[: -len(".service")]).active not in ("active", "activating"):
        raise FleetfitError(
            f"The switch of {service} could not be started: {done.stderr.strip()}",
            code="switch_not_started",
            remedy="Look at the host with systemctl status.",
        )


def wait_end(
    paths: HostPaths,
    service: str,
    *,
    helper: str = HELPER,
    python: str = sys.executable,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Wait until the service's transaction has ended and return its journal.

    One whose process is gone is started again, at most MAX_RESTARTS times; then FleetfitError.
    """
    launches = 0
    last_alive = time.monotonic()
    while True:
        journal = read_journal(paths, service)
        if journal is None or not is_running(journal):
            return journal or {}
        unit = read_unit(transaction_unit(service)[: -len(".service")])
        if unit.active in ("active", "activating"):
            last_alive = time.monotonic()
        elif time.monotonic() - last_alive > DEAD_AFTER_S:
            with switch_lock(paths, service) as free:
                pass
            if free:
                launches += 1
                if launches > MAX_RESTARTS:
                    raise FleetfitError(
                        f"The switch of {service} stopped at the step '{journal['step']}' and cannot go on.",
                        code="switch_stuck",
                        remedy=f"Look at journalctl -u {transaction_unit(service)} on the host.",
                    )
                launch(service, helper=helper, python=python)
            last_alive = time.monotonic()
        sleep(WAIT_POLL_S)


def transact(
    paths: HostPaths,
    service: str,
    digest: Optional[str],
    *,
    kind: str = "switch",
    keep: int = 2,
    helper: str = HELPER,
    put_back: Optional[Mapping[str, Any]] = None,
) -> dict[str, Any]:
    """Request a transaction (``digest`` None: go on with the one under way), run it, return its journal."""
    if not os.path.isfile(helper):
        raise FleetfitError(
            f"The host helper {helper} is not installed.",
            code="helper_missing",
            remedy="Run the module fleetfit.llm.host_helper first.",
        )
    journal = None
    if digest is not None:
        journal = request(paths, service, digest, kind=kind, keep=keep, put_back=put_back)
    launch(service, helper=helper)
    ended = wait_end(paths, service, helper=helper)
    if journal is not None and ended.get("id") != journal["id"]:
        raise FleetfitError(
            f"Another switch of {service} took the place of this one.",
            code="switch_busy",
            remedy="Run the role again.",
        )
    return ended


def explain_failure(journal: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return (message, code, remedy) of a transaction that did not end well."""
    service, cause = journal["service"], journal["cause"] or {}
    said = cause.get("message", "no reason is known")
    if journal["state"] == "refused" and cause.get("state") == "error":
        return (
            f"{service} was not touched: {said}",
            "switch_refused",
            "Remove the cause and run it again.",
        )
    if journal["state"] == "refused":
        return (
            f"The release {journal['to']} of {service} was not tried: {said}. The old one was not touched.",
            "precheck_failed",
            "Plan again with the host's facts as they are now, or choose a smaller variant or context.",
        )
    state = cause.get("state", "unknown")
    subject = f"The release {journal['to']}"
    if journal["kind"] == "restore":
        subject = f"With the backup {journal['put_back']['name']}, the release {journal['to']}"
    what = f"{subject} of {service} failed at '{cause.get('step')}' ({state}): {said}."
    remedy = f"Read gate.log_tail below, or journalctl -u {service} on the host, and run the role again."
    if state == "port_in_use":
        remedy = "Stop what holds the port, or give the service another one, and run the role again."
    if state == "out_of_memory":
        remedy = (
            "Free what other programs hold of that memory, or plan for less (fleetfit_slots,"
            " fleetfit_min_context_tokens, a smaller variant). The same arguments were not tried again with others."
        )
    if journal["state"] == "reverted":
        if journal.get("displaced"):
            return f"{what} {' and '.join(journal['displaced'])} serves again.", "gate_failed", remedy
        serves = f"{journal['from']} serves again." if journal["from"] else "Nothing was running before it."
        if journal["kind"] == "restore":
            serves = "The data that it replaced is back, and serves again."
        return f"{what} {serves}", "gate_failed", remedy
    if journal["revert_gate"]:
        what += f" The old release {journal['from']} did not come back: {journal['revert_gate']['message']}."
    return what, "service_down", remedy


def kept_releases(paths: HostPaths, service: str, keep: int) -> list[str]:
    """Return the digests that stay: what ``current`` points to and the last good ones, ``keep`` in all."""
    present = [
        digest
        for digest in read_good(paths, service)["history"]
        if os.path.isdir(os.path.join(paths.releases(service), digest))
    ]
    current = current_digest(paths, service)
    kept = ([current] if current else []) + [digest for digest in present if digest != current]
    return kept[: max(keep, 1)]


def clean(
    paths: HostPaths, service: str, keep: int, *, also: Sequence[str] = (), check_mode: bool = False
) -> list[str]:
    """Delete what the last ``keep`` releases do not need, and return it; nothing during a switch.

    ``also`` are releases that stay although they never served.
    """
    with switch_lock(paths, service) as held:
        if not held or is_running(read_journal(paths, service)) or current_digest(paths, service) is None:
            return []
        kept = kept_releases(paths, service, keep)
        kept += [digest for digest in also if digest not in kept]
        if check_mode:
            return garbage(paths, service, kept) + backups.superseded(paths, service, kept)
        return collect_garbage(paths, service, kept) + backups.discard(paths, service, kept)


def why_restart(paths: HostPaths, service: str, digest: str, restart_on: Sequence[str]) -> Optional[str]:
    """Return why the release that is current must be started again, or None."""
    good = read_good(paths, service)
    if good["digest"] != digest:
        return "its last start was not seen to succeed"
    hashes = hash_files(paths, restart_on)
    for path in sorted(hashes):
        if good["restart_on"].get(path, "") != hashes[path]:
            return f"{path} changed"
    if needs_daemon_reload(service):
        return "its unit file changed"
    active = read_unit(service).active
    return None if active == "active" else f"it is {active}"


def main_switch(argv: Sequence[str]) -> int:
    """Run ``switch --service NAME``: the transaction in the journal; exit code 0 once it has ended."""
    parser = argparse.ArgumentParser(prog="fleetfit-host.pyz switch")
    parser.add_argument("--service", required=True)
    service = check_service_name(parser.parse_args(list(argv)).service)
    paths = HostPaths()
    with switch_lock(paths, service, wait_s=2.0) as held:
        if not held:
            sys.stdout.write(f"another process is switching {service}\n")
            return 0
        journal = read_journal(paths, service)
        if journal is None or not is_running(journal):
            sys.stdout.write(f"there is no switch of {service} under way\n")
            return 0
        state = Transaction(paths, journal).go()
    cause = journal["cause"]
    sys.stdout.write(f"{service}: {state}" + (f": {cause['message']}" if cause else "") + "\n")
    return 0


def main_recover(argv: Sequence[str]) -> int:
    """Run ``recover [--wait]``: take back what was cut short, then let the transient unit gate it.

    Exit code 0 also where there is nothing to do; 1 where a journal could not be handled.
    """
    parser = argparse.ArgumentParser(prog="fleetfit-host.pyz recover")
    parser.add_argument("--wait", action="store_true", help="do all of it here")
    options = parser.parse_args(list(argv))
    paths = HostPaths()
    code = 0
    directory = paths.switch()
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    for name in names:
        if name.startswith(".") or not name.endswith(".json"):
            continue
        service = name[: -len(".json")]
        try:
            with switch_lock(paths, service) as held:
                journal = read_journal(paths, service)
                if not held or journal is None:
                    continue
                transaction = Transaction(paths, journal)
                if options.wait:
                    transaction.go()
                    continue
                left = transaction.rewind()
            if left:
                try:
                    launch(service, helper=sys.argv[0])
                except (FleetfitError, OSError, subprocess.SubprocessError):
                    # What was taken back should serve, even if nobody is there to look at it.
                    _systemctl("start", "--no-block", f"{service}.service")
                    raise
        except (FleetfitError, OSError, subprocess.SubprocessError) as error:
            sys.stderr.write(f"{service}: {error}\n")
            code = 1
    return code
