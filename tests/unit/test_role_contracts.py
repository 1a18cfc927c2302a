"""Promises of every role: its documented options are its defaults, and its tasks keep the house rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (REPO / "roles").iterdir() if (path / "meta").is_dir())
PLAYS = sorted((REPO / "playbooks").glob("*.yml"))
# Keys of a task that are not its module.
KEYWORDS = {
    *("name", "when", "vars", "register", "loop", "loop_control", "notify", "tags", "become", "become_user"),
    *("no_log", "diff", "check_mode", "changed_when", "failed_when", "until", "retries", "delay", "throttle"),
    *(
        "delegate_to",
        "run_once",
        "environment",
        "block",
        "rescue",
        "always",
        "args",
        "listen",
        "any_errors_fatal",
    ),
}
# What may differ between check mode and a run: files that look at a service which is not there yet, and those
# whose module fails where its own dependency or the packages' repository is not there yet.
CHECK_MODE_FILES = {"service.yml", "verify.yml", "install_package.yml", "install_dnf.yml"}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def role_files(role: str, *parts: str) -> list[Path]:
    return [path for part in parts for path in sorted((REPO / "roles" / role / part).glob("[a-z]*.yml"))]


def tasks_of(items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for item in items:
        yield item
        for section in ("block", "rescue", "always", "tasks", "pre_tasks", "post_tasks", "handlers"):
            yield from tasks_of(item.get(section) or [])


def all_task_files() -> list[Path]:
    return [path for role in ROLES for path in role_files(role, "tasks", "handlers")] + PLAYS


def identify(path: Path) -> str:
    return str(path.relative_to(REPO))


@pytest.mark.parametrize("role", ROLES)
def test_documented_options_are_the_defaults(role: str) -> None:
    defaults = load(REPO / "roles" / role / "defaults/main.yml") or {}
    specs = load(REPO / "roles" / role / "meta/argument_specs.yml")["argument_specs"]
    options = {
        name: option for spec in specs.values() for name, option in (spec.get("options") or {}).items()
    }
    optional = {name: option for name, option in options.items() if not option.get("required")}
    assert set(defaults) == set(optional)
    for name, option in optional.items():
        assert option["default"] == defaults[name], name


@pytest.mark.parametrize("role", ROLES)
def test_every_option_is_typed_described_and_carries_the_roles_name(role: str) -> None:
    specs = load(REPO / "roles" / role / "meta/argument_specs.yml")["argument_specs"]
    for entry_point, spec in specs.items():
        assert spec["short_description"], entry_point
        for name, option in (spec.get("options") or {}).items():
            assert name.startswith(f"{role}_"), name
            assert option["description"], name
            assert option["type"], name
            if option["type"] == "list":
                assert option["elements"], name


@pytest.mark.parametrize("role", ROLES)
def test_entry_points_have_their_task_files(role: str) -> None:
    for entry_point in load(REPO / "roles" / role / "meta/argument_specs.yml")["argument_specs"]:
        assert (REPO / "roles" / role / "tasks" / f"{entry_point}.yml").is_file()


@pytest.mark.parametrize("role", ROLES)
def test_internal_variables_are_marked(role: str) -> None:
    for path in role_files(role, "vars"):
        for name in load(path) or {}:
            assert name.startswith(f"__{role}_"), f"{identify(path)}: {name}"
    for path in role_files(role, "tasks"):
        for task in tasks_of(load(path) or []):
            register = task.get("register")
            # Without the underscores it is a result that plays may read.
            assert register is None or register.removeprefix("__").startswith(f"{role}_"), (
                f"{identify(path)}: {register}"
            )


@pytest.mark.parametrize("role", ROLES)
def test_defaults_never_read_facts(role: str) -> None:
    assert "ansible_facts" not in (REPO / "roles" / role / "defaults/main.yml").read_text()


@pytest.mark.parametrize("role", ROLES)
def test_templates_say_who_wrote_them(role: str) -> None:
    for path in sorted((REPO / "roles" / role / "templates").glob("*.j2")):
        if path.name == "unit.conf.j2":  # a file of a release, which is never edited
            continue
        assert path.read_text().startswith("{{ ansible_managed | comment"), identify(path)


@pytest.mark.parametrize("path", all_task_files(), ids=identify)
def test_tasks_hide_no_failure(path: Path) -> None:
    for task in tasks_of(load(path) or []):
        where = f"{identify(path)}: {task.get('name')}"
        assert "ignore_errors" not in task, where
        assert "ignore_unreachable" not in task, where
        assert task.get("failed_when") is not False, where
        assert task.get("changed_when") is not True, where
        assert not {"shell", "ansible.builtin.shell"} & set(task), where


@pytest.mark.parametrize("path", all_task_files(), ids=identify)
def test_tasks_are_named_and_modules_fully_qualified(path: Path) -> None:
    for task in tasks_of(load(path) or []):
        where = f"{identify(path)}: {task}"
        assert task.get("name"), where
        if "hosts" in task:
            assert task["gather_facts"] is False, where
            continue
        modules = set(task) - KEYWORDS
        if "block" not in task:
            assert len(modules) == 1, where
            assert next(iter(modules)).startswith(("ansible.builtin.", "fleetfit.llm.")), where


@pytest.mark.parametrize("path", all_task_files(), ids=identify)
def test_check_mode_is_asked_for_only_where_a_service_is_missing(path: Path) -> None:
    if path.name not in CHECK_MODE_FILES and path.parts[-3] != "verify":
        assert "ansible_check_mode" not in path.read_text()


@pytest.mark.parametrize("path", all_task_files(), ids=identify)
def test_facts_are_read_from_ansible_facts(path: Path) -> None:
    injected = re.findall(
        r"\bansible_(?!facts|check_mode|managed|play_|verbosity|playbook_python|failed_result|host\b)\w+",
        path.read_text(),
    )
    assert injected == []


@pytest.mark.parametrize("role", ROLES)
def test_roles_name_no_inventory_group(role: str) -> None:
    for path in role_files(role, "tasks", "defaults", "vars"):
        text = path.read_text()
        assert "groups[" not in text, identify(path)
        assert "hostvars" not in text, identify(path)


def test_sub_task_files_prefix_their_tasks() -> None:
    for role in ROLES:
        for path in role_files(role, "tasks"):
            if path.name == "main.yml":
                continue
            prefix = path.stem
            for task in tasks_of(load(path) or []):
                assert task["name"].startswith(f"{prefix} | "), f"{identify(path)}: {task['name']}"


@pytest.mark.parametrize("path", PLAYS, ids=identify)
def test_a_play_on_an_inventory_without_hosts_is_no_success(path: Path) -> None:
    # A play on a group that is not there does nothing and ends with 0.
    for play in load(path):
        hosts = play.get("hosts")
        if path.name not in ("deploy_hosts.yml", "report_drivers.yml") and hosts is not None:
            assert "undef(hint='The inventory has no host in the group llm_hosts" in hosts
