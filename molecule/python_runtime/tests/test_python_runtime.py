"""What a host is like after the role python_runtime has made a service's environment."""

from __future__ import annotations

from testinfra.host import Host

ENVIRONMENTS = "/opt/fleetfit/probe/envs"


def environment(machine: Host) -> str:
    names = machine.check_output(f"ls {ENVIRONMENTS}").splitlines()
    assert len(names) == 1
    return f"{ENVIRONMENTS}/{names[0]}"


def test_the_package_runs_with_the_python_that_was_wanted(machine: Host) -> None:
    assert machine.check_output(f"{environment(machine)}/bin/fleetfit-probe") == "11"


def test_the_systems_python_is_untouched(machine: Host) -> None:
    assert machine.run("/usr/bin/python3 -c 'import fleetfit_probe'").rc != 0
    home = machine.check_output(f"grep ^home {environment(machine)}/pyvenv.cfg").split(" = ")[1]
    if machine.system_info.release.startswith("12"):
        assert home == "/usr/bin"
        assert not machine.file("/opt/fleetfit/python").exists
    else:
        assert home.startswith("/opt/fleetfit/python/3.11")


def test_nothing_half_made_and_no_wheelhouse_is_left(machine: Host) -> None:
    left = machine.check_output(f"find {ENVIRONMENTS} -mindepth 1 -maxdepth 1 -name '.*' ! -name '*.lock'")
    assert left == ""


def test_a_service_user_can_run_it_but_not_write_it(machine: Host) -> None:
    path = environment(machine)
    assert machine.check_output(f"runuser -u nobody -- {path}/bin/fleetfit-probe") == "11"
    assert machine.check_output(f"find {path} ! -type l -perm /022") == ""
