"""One look at a host's artifacts and one step towards having them: an execution of the module.

Every execution starts from what is there, so it does not matter which one was cut off: the next sees the same
files, partial files and running units, and goes on.
"""

from __future__ import annotations

from typing import Any, Optional

from .artifact import (
    Artifact,
    Presence,
    Settings,
    check_disk,
    inspect_artifact,
    remember_hash,
    set_attributes,
)
from .download_job import Jobs, JobState, Outcome, run_artifacts
from .units import MIB

# Above it a download runs in a unit of its own: half a minute at 16 Mbit/s, longer than a task should hang on
# SSH.
BACKGROUND_BYTES = 64 * MIB
BACKGROUND_S = 30


def ensure_artifacts(
    artifacts: list[Artifact],
    settings: Settings,
    jobs: Jobs,
    *,
    pushed: Optional[dict[str, str]] = None,
    job: Optional[str] = None,
    wait_s: float = 0.0,
    background: str = "auto",
    verify: bool = False,
    check_mode: bool = False,
) -> dict[str, Any]:
    """Make one step towards having ``artifacts`` and return what is true now.

    The answer: ``changed``, ``outcomes`` (dest -> outcome with state present, missing, downloaded, pushed,
    unpacked, fetching or failed), ``job`` (id of the unit to ask for, or null), ``needs_helper``. ``job`` is
    the unit an earlier execution named: its failures are reported, not tried again. Raises FleetfitError
    (``disk_too_small``, …).
    """
    outcomes: dict[str, Outcome] = {}
    ended: dict[str, Outcome] = {}
    if job:
        state = jobs.wait(job, wait_s)
        if state.running:
            return _pending(artifacts, state, outcomes)
        ended = _ended(artifacts, state)

    missing: list[tuple[Artifact, Presence]] = []
    changed = False
    for artifact in artifacts:
        presence = inspect_artifact(artifact, settings.state_dir, verify=verify, write_stamp=not check_mode)
        if presence.present:
            outcomes[artifact.dest] = _arrived(ended.get(artifact.dest))
            if not artifact.unpack:
                changed |= _correct_attributes(artifact, settings, check_mode)
            continue
        failed = ended.get(artifact.dest)
        outcomes[artifact.dest] = failed or _outcome("missing", bytes_to_fetch=presence.bytes_to_fetch)
        outcomes[artifact.dest]["reason"] = presence.reason
        if not failed:
            missing.append((artifact, presence))

    if missing:
        check_disk(
            [(artifact, presence.bytes_to_fetch) for artifact, presence in missing], settings.reserve_bytes
        )
    if check_mode:
        return _answer(outcomes, changed=changed or bool(missing))
    pushed = pushed or {}
    now = [pair[0] for pair in missing if pair[0].dest in pushed]
    pulls = [
        (artifact, presence)
        for artifact, presence in missing
        if artifact.dest not in pushed and artifact.sources
    ]
    if pulls and _in_background(pulls, settings, background, jobs):
        answer = _start(pulls, settings, jobs, wait_s, outcomes)
    else:
        now += [pair[0] for pair in pulls]
        answer = _answer(outcomes)
    if now:
        run_artifacts(now, settings, outcomes.__setitem__, pushed)
    answer["changed"] = changed or any(
        outcome["state"] in ("downloaded", "pushed", "unpacked") for outcome in outcomes.values()
    )
    return answer


def _arrived(outcome: Optional[Outcome]) -> Outcome:
    """Return the outcome of a file that is there; how it came may be unknown if its job's notes were lost."""
    if outcome is None:
        return _outcome("present")
    return _outcome("downloaded") if outcome["state"] == "failed" else outcome


def _start(
    pulls: list[tuple[Artifact, Presence]],
    settings: Settings,
    jobs: Jobs,
    wait_s: float,
    outcomes: dict[str, Outcome],
) -> dict[str, Any]:
    wanted = [pair[0] for pair in pulls]
    for job_id, same in jobs.find(wanted, settings):
        if same:
            return _pending(wanted, jobs.state(job_id), outcomes)
        jobs.stop(job_id)  # it fetches the same in a way that is not wanted any more; its bytes stay
    if jobs.helper() is None:
        return {**_answer(outcomes), "needs_helper": True}
    job_id = jobs.start(wanted, settings)
    return _pending(wanted, jobs.wait(job_id, wait_s), outcomes)


def _in_background(
    pulls: list[tuple[Artifact, Presence]], settings: Settings, background: str, jobs: Jobs
) -> bool:
    if background == "never" or not jobs.available():
        return False
    limit = settings.bandwidth_limit_bytes_per_s
    total = sum(pair[1].bytes_to_fetch for pair in pulls)
    return background == "always" or total > BACKGROUND_BYTES or bool(limit and total / limit > BACKGROUND_S)


def _pending(artifacts: list[Artifact], state: JobState, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Return the answer while a job runs, or just ended: the next execution reads its end."""
    for artifact in artifacts:
        if artifact.dest in state.outcomes:
            outcomes[artifact.dest] = state.outcomes[artifact.dest]
    return {**_answer(outcomes), "job": state.id}


def _ended(artifacts: list[Artifact], state: JobState) -> dict[str, Outcome]:
    """Return the outcomes of a job that ended: failed ones for what it was cut off from."""
    ended = {
        dest: outcome
        for dest, outcome in state.outcomes.items()
        if outcome["state"] not in ("fetching", "unpacking")
    }
    error = state.error
    if not state.finished and not error:
        error = {
            "code": "download_interrupted",
            "message": f"The unit fleetfit-download-{state.id}.service was stopped before it had finished.",
            "remedy": "Run again: it goes on from what it has.",
        }
    if error:
        for artifact in artifacts:
            ended.setdefault(artifact.dest, {**_outcome("failed"), "error": error})
    return ended


def _correct_attributes(artifact: Artifact, settings: Settings, check_mode: bool) -> bool:
    changed = set_attributes(
        artifact.dest, artifact.mode, artifact.owner, artifact.group, check_mode=check_mode
    )
    if changed and not check_mode:
        # Ownership moved the change time, which is part of the file's identity; its content was just found
        # right.
        remember_hash(artifact, settings.state_dir)
    return changed


def _outcome(state: str, **more: Any) -> Outcome:
    return {
        "state": state,
        "source": None,
        "bytes_fetched": 0,
        "resumed_from": 0,
        "bytes_to_fetch": 0,
        **more,
    }


def _answer(outcomes: dict[str, Outcome], *, changed: bool = False) -> dict[str, Any]:
    return {"changed": changed, "outcomes": outcomes, "job": None, "needs_helper": False}
