"""Render roles for hosts that are only described: what each task would be told, on each system; nothing is run.

Reads ``{"hosts": {name: variables}, "files": [[role, task file], …]}`` from standard input; variables may hold
``registers``, what tasks would have found. Writes ``{name: [[task, text], …]}``. A program of its own, since
Ansible's collection loader cannot be had twice in a process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[3]

from ansible.plugins.loader import init_plugin_loader  # noqa: E402

init_plugin_loader([str(REPO / "collections")])

from ansible.parsing.dataloader import DataLoader  # noqa: E402
from ansible.template import Templar, trust_as_template  # noqa: E402

LOADER = DataLoader()
KEYWORDS = {
    "delegate_to",
    "run_once",
    "name",
    "when",
    "vars",
    "register",
    "loop",
    "loop_control",
    "no_log",
    "diff",
    "changed_when",
    "check_mode",
}
INCLUDES = ("ansible.builtin.include_tasks", "ansible.builtin.import_tasks")


def load(path: Path) -> Any:
    """Return a YAML file of ours, whose strings may be templates."""
    return LOADER.load_from_file(str(path), trusted_as_template=True)


class Readable(yaml.SafeDumper):
    """YAML in which a text of several lines keeps its lines."""


def text_node(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Readable.add_representer(str, text_node)


class Role:
    """One role on one host."""

    def __init__(self, role: str, host: dict[str, Any]) -> None:
        self.role = role
        folder = REPO / "roles" / role
        self.variables: dict[str, Any] = {}
        for part in ("defaults", "vars"):
            if (folder / part / "main.yml").exists():
                self.variables |= load(folder / part / "main.yml") or {}
        self.variables |= {
            "role_path": str(folder),
            "ansible_search_path": [str(folder)],
            "ansible_check_mode": False,
        }
        self.variables |= host["variables"]
        self.registers = host.get("registers", {})
        self.rendered: list[list[str]] = []

    def file(self, name: str, extra: dict[str, Any] | None = None) -> None:
        """Render every task of a file."""
        path = Path(self.variables["role_path"]) / "tasks" / Path(name).name
        for task in load(path):
            self.task(task, extra or {})

    def task(self, task: dict[str, Any], extra: dict[str, Any]) -> None:
        """Render one task, and those that it includes."""
        scope = {**self.variables, **extra, **task.get("vars", {})}
        templar = Templar(loader=LOADER, variables=scope)
        conditions = task.get("when", [])
        conditions = conditions if isinstance(conditions, list) else [conditions]
        if not all(templar.evaluate_conditional(condition) for condition in conditions):
            self.say(task, "skipped")
            return
        (module,) = set(task) - KEYWORDS
        if module in INCLUDES:
            self.file(str(templar.template(task[module])), {**extra, **task.get("vars", {})})
            return
        if "register" in task:
            self.variables[task["register"]] = self.registers.get(task["register"], {})
        items = (
            templar.template(task["loop"])
            if "loop" in task and module != "ansible.builtin.assert"
            else [None]
        )
        for item in task["loop"] if module == "ansible.builtin.assert" and "loop" in task else items:
            item_templar = Templar(
                loader=LOADER, variables={**scope, **({"item": item} if item is not None else {})}
            )
            if module == "ansible.builtin.assert":
                self.judge(task, item_templar)
            elif module == "ansible.builtin.set_fact":
                self.variables |= item_templar.template(task[module])
            else:
                self.say(task, self.told(module, task[module] or {}, item_templar, task.get("vars", {})))

    def judge(self, task: dict[str, Any], templar: Templar) -> None:
        """Render a requirement: met, or the sentence that the user reads."""
        arguments = task["ansible.builtin.assert"]
        that = arguments["that"]
        for condition in that if isinstance(that, list) else [that]:
            if not templar.evaluate_conditional(condition):
                self.say(task, f"REFUSED: {templar.template(arguments.get('fail_msg', ''))}")
                return
        if [self.title(task), "met"] not in self.rendered[-1:]:  # once for all requirements of a task
            self.say(task, "met")

    def told(self, module: str, arguments: Any, templar: Templar, extra: dict[str, Any]) -> str:
        """Render what a module is told, a template with its content."""
        told = templar.template(arguments)
        if module == "ansible.builtin.template":
            source = f"{self.variables['role_path']}/templates/{told['src']}"
            scope = {**self.variables, **extra, "rendered_file": source}
            content = Templar(loader=LOADER, variables=scope).template(CONTENT)
            told = {**told, "content": str(content)}
        return f"{module}\n{yaml.dump(json.loads(json.dumps(told)), Dumper=Readable, width=110)}"

    def say(self, task: dict[str, Any], text: str) -> None:
        self.rendered.append([self.title(task), text])

    def title(self, task: dict[str, Any]) -> str:
        return f"{self.role}: {task['name']}"


CONTENT = trust_as_template("{{ lookup('ansible.builtin.template', rendered_file) }}")


def main() -> None:
    """Render what standard input asks for."""
    request = json.load(sys.stdin)
    answer = {}
    for name, host in request["hosts"].items():
        answer[name] = []
        for role, files in request["files"]:
            rendering = Role(role, host)
            for file in files:
                rendering.file(f"{file}.yml")
            answer[name] += rendering.rendered
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
