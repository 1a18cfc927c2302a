"""The child process that asks the driver: whatever happens to it, the caller goes on."""

from __future__ import annotations

import os
import signal
import time

import pytest
from ansible_collections.fleetfit.llm.plugins.module_utils.nvml import (
    ChildError,
    DeadlineError,
    call_in_child,
    load_pynvml,
)


def test_the_childs_result_comes_back() -> None:
    assert call_in_child(lambda: {"a": [1, None, "ü" * 100_000]}, 10) == {"a": [1, None, "ü" * 100_000]}


def test_a_hanging_child_is_killed_at_the_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"no answer within 0\.3 s"):
        call_in_child(lambda: time.sleep(60), 0.3)
    assert time.monotonic() - started < 5


def test_a_killed_child_is_named_by_its_signal() -> None:
    with pytest.raises(ChildError, match="signal 11"):
        call_in_child(lambda: os.kill(os.getpid(), signal.SIGSEGV), 10)


def test_an_exception_in_the_child_is_one_sentence() -> None:
    with pytest.raises(ChildError, match="ZeroDivisionError: "):
        call_in_child(lambda: 1 // 0, 10)


def test_a_child_that_leaves_without_an_answer_is_an_error() -> None:
    with pytest.raises(ChildError, match="without an answer"):
        call_in_child(lambda: os._exit(0), 10)


def test_the_child_holds_none_of_our_files() -> None:
    """A driver stuck in the kernel would otherwise hold the SSH connection open for ever."""
    reader, writer = os.pipe()

    def open_files() -> list[str]:
        found = [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]
        for fd in (reader, writer):
            try:
                found.append(os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:
                continue
        return found

    try:
        answer = call_in_child(open_files, 10)
        assert answer[:3] == ["/dev/null"] * 3
        assert not [name for name in answer if name == os.readlink(f"/proc/self/fd/{reader}")]
    finally:
        os.close(reader)
        os.close(writer)


def test_no_process_is_left_behind() -> None:
    before = children()
    with pytest.raises(DeadlineError):
        call_in_child(lambda: time.sleep(60), 0.1)
    call_in_child(lambda: 1, 10)
    assert children() == before


def children() -> str:
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return file.read()


def test_the_handed_over_client_is_used_and_not_an_installed_one() -> None:
    def ask() -> int:
        number: int = load_pynvml("ANSWER = 42").ANSWER
        return number

    assert call_in_child(ask, 10) == 42
