"""Run programs as argument lists; a failure becomes a FleetfitError with the end of its output."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError

OUTPUT_TAIL_LINES = 8


def run(
    argv: Sequence[str],
    *,
    what: str,
    remedy: str | None = None,
    stdin: bytes | None = None,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[bytes]:
    """Run ``argv`` to its end and return the completed process with its output as bytes.

    ``what`` says in a few words what was tried ("start the container"). With ``log`` the output goes
    to that file. Raises FleetfitError ``command_failed`` where the exit status is not 0 and ``check``.
    """
    try:
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as stream:
                done = subprocess.run(
                    argv,
                    input=stdin,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=env,
                    cwd=cwd,
                    timeout=timeout_s,
                    check=False,
                )
            done.stdout, done.stderr = b"", b""
        else:
            done = subprocess.run(
                argv, input=stdin, capture_output=True, env=env, cwd=cwd, timeout=timeout_s, check=False
            )
    except FileNotFoundError as error:
        raise FleetfitError(
            f"Could not {what}: the program {argv[0]} is not installed.",
            code="program_missing",
            remedy=remedy or f"Install {argv[0]} and run this again.",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise FleetfitError(
            f"Could not {what}: {argv[0]} did not end within {timeout_s:.0f} s.",
            code="command_timeout",
            remedy=remedy,
        ) from error
    if check and done.returncode != 0:
        output = log.read_bytes() if log is not None else done.stderr or done.stdout
        tail = "\n".join(output.decode(errors="replace").strip().splitlines()[-OUTPUT_TAIL_LINES:])
        where = f" (all of it: {log})" if log is not None else ""
        raise FleetfitError(
            f"Could not {what}: {argv[0]} ended with status {done.returncode}: {tail}{where}",
            code="command_failed",
            remedy=remedy,
        )
    return done


def output(argv: Sequence[str], *, what: str) -> str:
    """Return the standard output of ``argv`` as stripped text; raises like ``run``."""
    return run(argv, what=what).stdout.decode(errors="replace").strip()


def stop_children() -> None:
    """Ask all programs that this process started in its own session to end; what they made stays."""
    session = os.getsid(0)
    for listed in Path("/proc/self/task").glob("*/children"):
        for pid in listed.read_text().split():
            try:
                if os.getsid(int(pid)) == session:
                    os.kill(int(pid), signal.SIGTERM)
            except ProcessLookupError:
                continue  # it ended by itself
