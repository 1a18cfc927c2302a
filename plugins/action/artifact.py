"""Controller-side half of fleetfit.llm.artifact: pushes files, polls downloads, tries sources in order."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.fleetfit.llm.plugins.module_utils.artifact import Artifact, Source, parse_artifacts
from ansible_collections.fleetfit.llm.plugins.module_utils.errors import FleetfitError
from ansible_collections.fleetfit.llm.plugins.module_utils.host_helper import archive_digest
from ansible_collections.fleetfit.llm.plugins.module_utils.units import format_size
from ansible_collections.fleetfit.llm.plugins.plugin_utils.helper_zip import build_helper_zip

PUSH_LIMIT_BYTES = 256 * 1024 * 1024  # design: below it a push is one short copy, above it a host pulls
POLL_S = 15.0  # one execution waits this long on the host, so that a long download costs few of them
RECONNECT_S = 600.0  # how long a host may be away while its download goes on without us
RECONNECT_PAUSE_S = 5.0

display = Display()


@dataclass
class _Wanted:
    """One artifact on its way: the sources left, and why those before them failed."""

    artifact: Artifact
    entry: dict[str, Any]
    segments: list[list[Source]]
    problems: list[FleetfitError] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=dict)
    bytes_to_fetch: int | None = None

    @property
    def done(self) -> bool:
        return self.outcome.get("state") in ("present", "downloaded", "pushed", "unpacked")

    @property
    def failed(self) -> bool:
        return not self.done and not self.segments

    @property
    def push_source(self) -> Source | None:
        """Return the controller's file to push next, None where the host fetches."""
        first = self.segments[0][0] if self.segments else None
        return first if first and first.on_controller else None

    def host_entry(self) -> dict[str, Any]:
        """Return the module's argument: only sources that the host is to try now."""
        given = self.entry.get("sources") or []
        pulls = self.segments[0] if self.segments and not self.push_source else []
        order = list(self.artifact.sources)
        return {**self.entry, "sources": [given[order.index(source)] for source in pulls]}

    def next_segment(self, problem: FleetfitError) -> None:
        self.problems.append(problem)
        self.segments.pop(0)


class ActionModule(ActionBase):
    """Look at the host, push or let it fetch, wait; until each artifact is there or has no source left."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the module until everything is there; failures of one artifact do not stop the others."""
        result = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        try:
            entries = arguments.get("artifacts")
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise FleetfitError(
                    "The option artifacts is not a list of artifacts.",
                    code="artifact_invalid",
                    remedy="Give artifacts as a list, each with name, size, sha256, dest and sources.",
                )
            entries = [_with_location(entry) for entry in entries]
            wanted = [
                _Wanted(artifact, entry, _segments(artifact))
                for artifact, entry in zip(parse_artifacts(entries), entries, strict=True)
            ]
        except FleetfitError as error:
            return {**result, **_failure(error)}
        push_limit = int(arguments.get("push_limit_bytes") or PUSH_LIMIT_BYTES)
        try:
            return {**result, **self._bring(wanted, arguments, push_limit, task_vars or {})}
        except FleetfitError as error:
            return {**result, **_failure(error)}
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)

    def _bring(
        self, wanted: list[_Wanted], arguments: dict[str, Any], push_limit: int, task_vars: dict[str, Any]
    ) -> dict[str, Any]:
        by_dest = {item.artifact.dest: item for item in wanted}
        step: dict[str, Any] = {}
        changed, helper_installed = False, False
        meter = _Meter()
        while True:
            answer = self._look(wanted, arguments, step, task_vars)
            if answer.get("failed") or answer.get("unreachable"):
                return answer
            changed |= bool(answer.get("changed"))
            self._take(answer["outcomes"], by_dest)
            arguments["verify"] = False  # once is enough
            if answer["needs_helper"]:
                if helper_installed:
                    raise AnsibleConnectionFailure("the host helper vanished while it was needed")
                installed = self._install_helper(arguments, task_vars)
                if installed.get("failed") or installed.get("unreachable"):
                    return installed
                helper_installed, changed, step = True, True, {}
                continue
            if answer["job"]:
                meter.show(answer["outcomes"], by_dest)
                step = {"job": answer["job"], "wait_s": POLL_S}
                continue
            if self._task.check_mode:
                return self._would(wanted, push_limit, changed)
            pushed = self._push_missing(wanted, push_limit)
            step = {"pushed": pushed}
            if not pushed and all(item.done or item.failed for item in wanted):
                return _report(wanted, changed)

    def _look(
        self,
        wanted: list[_Wanted],
        arguments: dict[str, Any],
        step: dict[str, Any],
        task_vars: dict[str, Any],
    ) -> dict[str, Any]:
        """Run the module once; while a unit downloads without us, wait for a host that went away."""
        step = {**step, "helper_digest": archive_digest(build_helper_zip())}
        module_args = {**arguments, "artifacts": [item.host_entry() for item in wanted], "step": step}
        deadline = time.monotonic() + RECONNECT_S
        while True:
            try:
                return dict(
                    self._execute_module(
                        module_name="fleetfit.llm.artifact", module_args=module_args, task_vars=task_vars
                    )
                )
            except AnsibleConnectionFailure as error:
                if not step.get("job") or time.monotonic() > deadline:
                    raise
                display.v(
                    f"{self._host(task_vars)}: connection lost ({error}); the download goes on, trying again"
                )
                time.sleep(RECONNECT_PAUSE_S)
                self._connection.reset()

    def _take(self, outcomes: dict[str, Any], by_dest: dict[str, _Wanted]) -> None:
        for dest, outcome in outcomes.items():
            item = by_dest[dest]
            if item.bytes_to_fetch is None:
                item.bytes_to_fetch = int(outcome.get("bytes_to_fetch") or 0)
            if outcome["state"] == "failed":
                if item.segments:
                    item.next_segment(FleetfitError(**_error_fields(outcome["error"])))
                item.outcome = outcome
            elif not item.done:  # what was brought stays brought, though it is only present at the next look
                item.outcome = outcome

    def _push_missing(self, wanted: list[_Wanted], push_limit: int) -> dict[str, str]:
        """Copy the files whose turn it is to the host; return their paths there by dest."""
        pushed = {}
        for index, item in enumerate(wanted):
            source = item.push_source
            while source and not item.done:
                try:
                    local = self._local_file(item.artifact, source, push_limit)
                except FleetfitError as error:
                    item.next_segment(error)
                    source = item.push_source
                    continue
                shell = self._connection._shell
                if shell.tmpdir is None:
                    self._make_tmp_path()
                remote = shell.join_path(shell.tmpdir, f"artifact-{index}")
                display.v(f"pushing {item.artifact.name}, {format_size(item.artifact.size)}")
                self._transfer_file(str(local), remote)
                self._fixup_perms2((shell.tmpdir, remote))
                pushed[item.artifact.dest] = remote
                break
        return pushed

    def _local_file(self, artifact: Artifact, source: Source, push_limit: int) -> Path:
        """Return the controller's file, checked before a byte is sent."""
        path = Path(self._loader.path_dwim(source.path))
        try:
            size = path.stat().st_size
        except OSError as error:
            raise FleetfitError(
                f"{path} on the controller cannot be read: {error.strerror}.",
                code="file_missing",
                remedy="Put the file there, or name another source.",
            ) from error
        if size != artifact.size:
            raise FleetfitError(
                f"{path} on the controller has {size} bytes, expected were {artifact.size}.",
                code="wrong_size",
                remedy="Put the pinned file there, or correct the artifact's size and sha256.",
            )
        if size > push_limit:
            raise FleetfitError(
                f"{path} on the controller has {format_size(size)}, more than the "
                f"{format_size(push_limit)} that are pushed over SSH.",
                code="push_too_large",
                remedy="Serve it over HTTP and add a source of type http, put it on the host with location: "
                "host, or raise push_limit_bytes.",
            )
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != artifact.sha256:
            raise FleetfitError(
                f"{path} on the controller has the sha256 {found}, expected was {artifact.sha256}.",
                code="wrong_checksum",
                remedy="Put the pinned file there, or correct the artifact's sha256.",
            )
        return path

    def _install_helper(self, arguments: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        task = self._task.copy()
        task.args = {"libexec_dir": arguments["libexec_dir"]} if "libexec_dir" in arguments else {}
        action = self._shared_loader_obj.action_loader.get(
            "fleetfit.llm.host_helper",
            task=task,
            connection=self._connection,
            play_context=self._play_context,
            loader=self._loader,
            templar=self._templar,
            shared_loader_obj=self._shared_loader_obj,
        )
        return dict(action.run(task_vars=task_vars))

    def _would(self, wanted: list[_Wanted], push_limit: int, changed: bool) -> dict[str, Any]:
        """Return check mode's report: the states that a run would reach, as far as can be known."""
        for item in wanted:
            if item.done:
                continue
            while item.push_source and len(item.segments) > 1:
                try:
                    self._local_file(item.artifact, item.push_source, push_limit)
                    break
                except FleetfitError as error:
                    item.next_segment(error)
            source = item.segments[0][0]
            state = "unpacked" if item.artifact.unpack else "pushed" if source.on_controller else "downloaded"
            item.outcome = {**item.outcome, "state": state, "source": source.describe()}
        return _report(wanted, changed)

    @staticmethod
    def _host(task_vars: dict[str, Any]) -> str:
        return str(task_vars.get("inventory_hostname", "host"))


class _Meter:
    """Shows how far downloads are, at -v, with the speed since the last look."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, int]] = {}

    def show(self, outcomes: dict[str, Any], by_dest: dict[str, _Wanted]) -> None:
        for dest, outcome in outcomes.items():
            if outcome["state"] != "fetching":
                continue
            now, have, size = time.monotonic(), int(outcome["have_bytes"]), int(outcome["size"])
            before, had = self._last.get(dest, (now, have))
            self._last[dest] = (now, have)
            speed = f", {format_size(int((have - had) / (now - before)))}/s" if now > before else ""
            display.v(f"{by_dest[dest].artifact.name}: {100 * have // size} % of {format_size(size)}{speed}")


def _with_location(entry: dict[str, Any]) -> dict[str, Any]:
    """Return ``entry`` with ``on`` read as ``location``; YAML reads an unquoted ``on`` as true."""
    given = entry.get("sources") or []
    if not isinstance(given, list) or not all(isinstance(source, dict) for source in given):
        return entry  # parse_artifacts says what is wrong with it
    sources = [
        {"location" if str(key).lower() in ("on", "true") else key: value for key, value in source.items()}
        for source in given
    ]
    return {**entry, "sources": sources}


def _segments(artifact: Artifact) -> list[list[Source]]:
    """Return the sources in order, those in a row that the host can try by itself together."""
    segments: list[list[Source]] = []
    for source in artifact.sources:
        if segments and not source.on_controller and not segments[-1][0].on_controller:
            segments[-1].append(source)
        else:
            segments.append([source])
    return segments


def _error_fields(error: dict[str, Any]) -> dict[str, Any]:
    return {"message": error["message"], "code": error["code"], "remedy": error.get("remedy")}


def _failure(error: FleetfitError) -> dict[str, Any]:
    return {"failed": True, "msg": str(error), "code": error.code, "remedy": error.remedy}


def _report(wanted: list[_Wanted], changed: bool) -> dict[str, Any]:
    reports = []
    for item in wanted:
        outcome = item.outcome
        reports.append(
            {
                "name": item.artifact.name,
                "dest": item.artifact.dest,
                "state": outcome.get("state"),
                "source": outcome.get("source"),
                "bytes_fetched": outcome.get("bytes_fetched", 0),
                "resumed_from": outcome.get("resumed_from", 0),
                "bytes_to_fetch": item.bytes_to_fetch or 0,
            }
        )
    result: dict[str, Any] = {"changed": changed, "artifacts": reports}
    warnings = sorted({text for item in wanted for text in item.outcome.get("warnings") or []})
    if warnings:
        result["warnings"] = warnings
    failed = [item for item in wanted if item.failed]
    if failed:
        problems = [problem for item in failed for problem in item.problems]
        result["failed"] = True
        result["msg"] = " ".join(str(problem) for problem in problems)
        result["code"], result["remedy"] = problems[-1].code, problems[-1].remedy
        result["problems"] = [
            {
                "name": item.artifact.name,
                "code": problem.code,
                "message": problem.message,
                "remedy": problem.remedy,
            }
            for item in failed
            for problem in item.problems
        ]
    return result
