"""Promises of the role nvidia_driver that only its tasks can keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TASKS = Path(__file__).resolve().parents[2] / "roles/nvidia_driver/tasks"


def tasks(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((TASKS / f"{name}.yml").read_text())
    return found


def test_a_reboot_is_over_when_the_boot_id_is_new_and_the_driver_answers() -> None:
    """A host that goes down late still answers as before: only a new boot id says that it has rebooted."""
    sequence = tasks("reboot")
    (reboot,) = [task["ansible.builtin.reboot"] for task in sequence if "ansible.builtin.reboot" in task]
    assert reboot["boot_time_command"] == "cat /proc/sys/kernel/random/boot_id"
    after = sequence[[("ansible.builtin.reboot" in task) for task in sequence].index(True) + 1]
    assert "fleetfit.llm.gpu_facts" in after
    assert "accelerators" in after["until"]


def test_the_reboot_happens_in_one_place_and_only_where_it_was_decided() -> None:
    places = [
        (path.stem, task)
        for path in TASKS.glob("*.yml")
        for task in tasks(path.stem)
        if "reboot.yml" in str(task.get("ansible.builtin.include_tasks", ""))
        or "ansible.builtin.reboot" in task
    ]
    assert {name for name, _task in places} == {"reboot", "service"}
    (include,) = [task for name, task in places if name == "service"]
    assert "'reboot' in __nvidia_driver_decision.actions | map(attribute='action')" in include["when"]
    assert "not ansible_check_mode" in include["when"]


def test_services_come_with_a_reboot_that_this_run_makes() -> None:
    """Before it there is no driver to start them with: enabled is enough, and must not wait for a second run."""
    for service in ("nvidia-fabricmanager", "nvidia-persistenced"):
        (task,) = [
            task
            for task in tasks("service")
            if task.get("ansible.builtin.systemd_service", {}).get("name") == f"{service}.service"
        ]
        assert task["ansible.builtin.systemd_service"]["enabled"] is True
        assert "omit" in task["ansible.builtin.systemd_service"]["state"]
        assert not any("decision.state ==" in condition for condition in task["when"])


def test_a_package_manager_gets_versions_where_they_matter() -> None:
    """`packages` are names; what must have the driver's version has it in `specs`."""
    for name, module in (("install_package", "ansible.builtin.apt"), ("install_dnf", "ansible.builtin.dnf")):
        (task,) = [task for task in tasks(name) if task["name"].endswith("Have the driver's packages")]
        assert task[module]["name"] == "{{ __nvidia_driver_decision.specs }}"
        assert task[module]["allow_downgrade"] == "{{ __nvidia_driver_moves }}"
        # On a bare host under --check the repository is not there yet.
        assert all("not ansible_check_mode" in task["when"] for task in tasks(name))
