"""A host that is only looked at, or that is refused, keeps every file as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .conftest import Fleet, Host


@pytest.fixture(scope="module")
def host(start_host: Callable[..., Host], fleet: Fleet) -> Host:
    """Return a host where nothing of ours was ever installed."""
    fleet.hosts[:] = ["e2e-virgin"]
    return start_host("e2e-virgin", "trixie")


@pytest.fixture
def untouched(host: Host) -> Iterator[Host]:
    """Return the host, and compare its files when the test has ended."""
    before = host.files()
    yield host
    after = host.files()
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == set()


def test_check_mode_of_the_main_job(untouched: Host, fleet: Fleet) -> None:
    played = fleet.play("site.yml", "--check")
    assert played.returncode == 0, played.output
    assert played.recap()["e2e-virgin"]["failed"] == 0
    assert "llama_cpp : service | Make the plan's release current" in played.text


def test_no_model_named(untouched: Host, fleet: Fleet) -> None:
    played = fleet.play(fleetfit_model=None)
    assert played.returncode != 0
    assert "fleetfit_model" in played.text


def test_unknown_model_gets_near_names(untouched: Host, fleet: Fleet) -> None:
    played = fleet.play(fleetfit_model="smollm2-135m-instrukt")
    assert played.returncode != 0
    assert "smollm2-135m-instruct" in played.text


def test_unpinned_model_is_refused_with_the_command(untouched: Host, fleet: Fleet) -> None:
    played = fleet.play(fleetfit_model="qwen2.5-0.5b-instruct")
    assert played.returncode != 0
    assert "fleetfit catalog pin qwen2.5-0.5b-instruct" in played.text


def test_context_above_the_models_limit(untouched: Host, fleet: Fleet) -> None:
    played = fleet.play(fleetfit_min_context_tokens=1_000_000)
    assert played.returncode != 0
    assert "1000000" in played.text


def test_disk_too_small_is_told_before_the_download(untouched: Host, fleet: Fleet) -> None:
    played = fleet.play(host_baseline_disk_reserve_bytes=10**16)
    assert played.returncode != 0
    assert "the disk of /var/lib/fleetfit has" in played.text
    assert "host_baseline_disk_reserve_bytes" in played.text


def test_port_in_use_names_who_holds_it(untouched: Host, fleet: Fleet) -> None:
    untouched.run(
        "systemd-run --unit=e2e-squatter python3 -m http.server 8080 --bind 127.0.0.1 --directory /proc"
    )
    untouched.run(
        "for i in $(seq 50); do ss -Hltn sport = :8080 | grep -q . && exit; sleep 0.1; done; exit 1"
    )
    try:
        played = fleet.play()
    finally:
        untouched.run("systemctl stop e2e-squatter")
    assert played.returncode != 0
    assert "Port 8080 is in use by python3" in played.text
    assert "e2e-squatter.service" in played.text
    assert "llama_cpp_port" in played.text


def test_no_archive_that_fits(untouched: Host, fleet: Fleet) -> None:
    played = fleet.play(llama_cpp_version="0.0.0")
    assert played.returncode != 0
    assert "version 0.0.0 for cpu on x86_64" in played.text


def test_unknown_value_of_an_option_is_refused(untouched: Host, fleet: Fleet) -> None:
    played = fleet.play(llama_cpp_install_method="curl-pipe-sh")
    assert played.returncode != 0
    assert "llama_cpp_install_method" in played.text


def test_broken_driver_is_a_problem_with_a_remedy(start_host: Callable[..., Host], fleet: Fleet) -> None:
    broken = start_host("e2e-broken", "bookworm", "fault-library-mismatch")
    before = broken.files()
    fleet.hosts[:] = ["e2e-broken"]
    try:
        played = fleet.play()
    finally:
        fleet.hosts[:] = ["e2e-virgin"]
    assert played.returncode != 0
    assert "driver_library_mismatch" in played.text
    assert broken.files() == before


def test_unreachable_host_does_not_stop_the_others(host: Host, fleet: Fleet) -> None:
    fleet.hosts[:] = ["e2e-virgin", "e2e-absent"]
    try:
        played = fleet.play("playbooks/check_hosts.yml")
    finally:
        fleet.hosts[:] = ["e2e-virgin"]
    recap = played.recap()
    assert played.returncode == 4
    assert recap["e2e-absent"]["unreachable"] == 1
    assert recap["e2e-virgin"]["failed"] == 0
    assert recap["e2e-virgin"]["ok"] > 5
